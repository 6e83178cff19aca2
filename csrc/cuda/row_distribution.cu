#include "distribution.h"

namespace specdiff::cuda {
namespace {

template <Dtype dtype>
__global__ void __launch_bounds__(kThreads, 2)
    make_distributions(RowDistributionParams p, Split split, int64_t* workspace) {
  SPECDIFF_SHARED(Shared, shared);
  const int64_t place = take_ticket(workspace, shared);
  const int64_t index = place / split.parts, part = place % split.parts;
  const Area area(workspace, p.rows, index, split.parts);
  const Row row(p.logits, 0, index);
  Team team(area, split, part, shared);
  Slice<dtype> slice(row, split, part);
  RowDistribution distribution;
  int64_t share = 0;
  begin_distribution(slice, p.parameters, index, row.columns, team, shared, &distribution, &share);
  if (threadIdx.x == 0) area.sums[part] = share;
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
  const cudaError_t error = cudaFuncGetAttributes(&attributes, make_distributions<kFloat32>);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

void row_distribution(const RowDistributionParams& p, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  by_dtype(p.logits.dtype, [&](auto dtype) {
    constexpr auto kernel = make_distributions<dtype()>;
    const Split split = begin_rows(p.logits, p.rows, capacity<kernel>(queue.device), queue);
    launch(kernel, p.rows * split.parts, queue, p, split, queue.workspace);
  });
}

}  // namespace specdiff::cuda
