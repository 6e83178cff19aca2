#include "device.h"

namespace specdiff::cuda {
namespace {

__device__ bool stops(const CommitParams& p, int64_t token) {
  for (int64_t s = 0; s < p.stops; ++s) {
    if (p.stop_tokens[s] == token) return true;
  }
  return false;
}

__global__ void __launch_bounds__(kThreads) advance(CommitParams p) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= p.batch) return;
  const int64_t* emitted = p.emitted + b * p.columns;
  const int64_t length = p.lengths[b];
  bool done = p.finished && p.finished[b];
  int64_t room = done ? 0 : p.columns;
  if (p.limit) {
    const int64_t allowed = p.limit[b] > length ? p.limit[b] - length : 0;
    room = room < allowed ? room : allowed;
  }
  int64_t kept = 0;
  while (kept < room && emitted[kept] >= 0 && !done) done = stops(p, emitted[kept++]);
  p.new_lengths[b] = length + kept;
  p.kept[b] = kept;
  p.new_finished[b] = done || (p.limit && length + kept >= p.limit[b]);
}

}  // namespace

void commit(const CommitParams& p, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  launch(advance, (p.batch + kThreads - 1) / kThreads, queue, p);
}

}  // namespace specdiff::cuda
