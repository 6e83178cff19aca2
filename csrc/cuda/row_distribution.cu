#include "distribution.h"

namespace specdiff::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 2)
    make_distributions(RowDistributionParams p, Split split, int64_t* workspace) {
  SPECDIFF_SHARED(Shared, shared);
  const int64_t place = take_ticket(workspace, shared);
  const int64_t index = place / split.parts, part = place % split.parts;
  const Area area(workspace, p.rows, index, split.parts);
  const Row row(p.logits, 0, index);
  Team team(area, split, part, shared);
  Slice slice(row, split, part, shared);
  RowDistribution distribution;
  begin_distribution(slice, p.parameters, index, row.columns, team, shared, &distribution);
  if (distribution.status == kOk) {
    const int64_t sum = slice_sum(slice, distribution, shared);
    if (threadIdx.x == 0) area.sums[part] = sum;
  }
  if (!team.done_last()) return;
  distribution = end_distribution(distribution, row, split, area, shared);
  if (threadIdx.x == 0) store(distribution, p.distribution, index);
}

}  // namespace

int64_t workspace_size(int64_t rows, int64_t columns) {
  const int64_t parts = (columns + 7 + kThreads * 8 - 1) / (kThreads * 8);  // at most
  return rows * (kRowWords + 3 * parts + kBinSets * kBins);
}

std::string fault(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, make_distributions);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

void row_distribution(const RowDistributionParams& p, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const int64_t room = capacity<make_distributions>(queue.device);
  const Split split = begin_rows(p.logits, p.rows, room, queue);
  launch(make_distributions, p.rows * split.parts, queue, p, split, queue.workspace);
}

}  // namespace specdiff::cuda
