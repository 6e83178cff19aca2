#include "distribution.h"

namespace specdiff::cuda {
namespace {

__device__ uint64_t word_of(const SampleParams& p, int64_t i) {
  if (p.random.words) return uint64_t(p.random.words[i]);
  return random_word(p.random.seed[i], p.slot[i], p.random.round[i], p.purpose);
}

__device__ Noise noise_of(const SampleParams& p, int64_t i) {
  if (p.random.words) return {p.random.words + i * p.logits.columns, 0, 0, nullptr};
  return {nullptr, uint64_t(p.random.seed[i]), p.random.position[i], p.draft_ids};
}

template <Dtype dtype>
__global__ void __launch_bounds__(kThreads, 2)
    draw_tokens(SampleParams p, Split split, int64_t* workspace) {
  SPECDIFF_SHARED(Shared, shared);
  const int64_t index = blockIdx.x / split.parts, part = blockIdx.x % split.parts;
  const Area area(workspace, p.rows, index, split.parts);
  const Row row(p.logits, 0, index);
  const RowDistribution distribution = load(p.distribution, index);
  Team team(area, split, part, shared);
  const Slice<dtype> slice(row, split, part);
  const bool races = p.random.position;
  if (distribution.status == kOk && (races || distribution.scale != 0)) {
    if (races) {
      store_race(area, part,
                 slice_race(slice, distribution, noise_of(p, index), row.columns, shared));
    } else {
      const int64_t sum = block_sum(slice.any_sum(weigher_of(distribution)), shared);
      if (threadIdx.x == 0) area.sums[part] = sum;
    }
  }
  if (!team.done_last()) return;
  int64_t token = -1;
  if (distribution.status == kOk) {
    token = races ? end_race(area, split, shared)
                  : draw(row, distribution, split, area.sums, word_of(p, index), shared);
    if (token >= row.columns)
      token = row.columns - 1;  // only if the distribution is not this row's
    if (p.draft_ids) token = p.draft_ids[token];
  }
  if (threadIdx.x == 0) p.tokens[index] = token;
}

}  // namespace

void sample(const SampleParams& p, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  clear_words(p.rows, queue);
  by_dtype(p.logits.dtype, [&](auto dtype) {
    constexpr auto kernel = draw_tokens<dtype()>;
    const int64_t room = capacity<kernel>(queue.device);
    const Split split = split_of(p.logits, p.rows, room, room);
    launch(kernel, p.rows * split.parts, queue, p, split, queue.workspace);
  });
}

}  // namespace specdiff::cuda
