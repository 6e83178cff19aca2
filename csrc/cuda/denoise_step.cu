// One reverse step of absorbing-state diffusion. The last block of a row knows its distribution and
// draws its token, the last of a sequence decides which positions are revealed.
#include "distribution.h"
#include "specdiff/reveal.h"

namespace specdiff::cuda {
namespace {

constexpr int64_t kNoEntropy = 0x7ff8000000000000;  // NaN

__global__ void __launch_bounds__(kThreads) copy_distributions(DenoiseStepParams p) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < p.pool) store(load(p.distribution, row), p.new_distribution, row);
}

// One position of one sequence.
struct Position {
  const DenoiseStepParams& p;
  const Split& split;
  int64_t* workspace;
  int64_t at;
  Shared& shared;

  __device__ int64_t b() const { return at / p.k; }
  __device__ int64_t i() const { return at % p.k; }
  __device__ Area area() const { return Area(workspace, p.batch * p.k, at, split.parts); }
  __device__ Position of(int64_t i) const { return {p, split, workspace, b() * p.k + i, shared}; }

  __device__ bool masked() const {
    return p.tokens[at] < 0 && (!p.lengths || i() < p.lengths[b()]) && p.pool_rows[at] >= 0 &&
           p.pool_rows[at] < p.pool;
  }

  // Whether the logits have to be read, by all that is known without them.
  __device__ bool is_read() const {
    if (!masked()) return false;
    if (p.order == kChunk) return p.lo <= i() && i() < p.hi;
    if (p.order == kMdlm) return coin() < p.rate[b()];
    if (p.order != kFirstHitting) return true;
    int64_t all = 0, before = 0;
    for (int64_t j = 0; j < p.k; ++j) {
      const bool other = of(j).masked();
      all += other;
      before += j < i() && other;
    }
    return mulhi(of(0).word(0, kReveal), all) == before;
  }

  __device__ bool measures() const {
    return p.entropies || p.order == kSedd || p.order == kConfidence;
  }

  __device__ double coin() const { return unit(word(0, kReveal)); }

  __device__ uint64_t word(int64_t column, Purpose purpose) const {
    if (p.random.words) return uint64_t(p.random.words[at * stride() + column]);
    return random_word(p.random.seed[b()], i(), p.random.round[b()], purpose, uint32_t(p.step));
  }

  __device__ Noise noise() const {
    if (p.random.words) return {p.random.words + at * stride() + 1, 0, 0, nullptr};
    return {nullptr, uint64_t(p.random.seed[b()]), p.random.position[b()] + i(), p.draft_ids};
  }

 private:
  __device__ int64_t stride() const { return p.random.position ? 1 + p.logits.columns : 2; }
};

// The model's own distribution: temperature 1, nothing cut off.
__device__ RowDistribution raw_distribution(const RowDistribution& distribution, int64_t total) {
  return {distribution.max, kLog2E, 0, total, distribution.status};
}

// A block's share of the model's own total and of its entropy.
template <Dtype dtype>
__device__ void add_raw_sums(const Position& q, const Slice<dtype>& slice,
                             const RowDistribution& distribution, RowWords& words) {
  const Weigher by = weigher_of(raw_distribution(distribution, 0));
  int64_t spreads = 0;
  if (q.p.entropies) {
    slice.revisit([&](int64_t, const float (&l)[8]) {
      for (int j = 0; j < 8; ++j) spreads += spread(l[j], by);
    });
  }
  const int64_t total = block_sum(slice.any_sum(by), q.shared);
  spreads = block_sum(spreads, q.shared);
  if (threadIdx.x == 0) {
    add(&words.raw_total, total);
    add(&words.spread, spreads);
  }
}

// Candidate of a position: its token, if its own coin allows it, and its rank.
__device__ void draw_token(const Position& q, const Row& row, const RowDistribution& distribution,
                           const Area& area) {
  const DenoiseStepParams& p = q.p;
  const RowDistribution raw = raw_distribution(distribution, area.words->raw_total);
  const double measured =
      p.entropies ? entropy(area.words->spread, raw) : bit_cast<double>(kNoEntropy);
  const int64_t column = p.random.position ? end_race(area, q.split, q.shared)
                                           : draw(row, distribution, q.split, area.sums,
                                                  q.word(1, kDraftToken), q.shared);
  if (threadIdx.x != 0) return;
  p.entropy[q.at] = measured;
  const bool possible = p.order != kSedd || q.coin() < p.rate[q.b()] * mean_exp(raw, row.columns);
  area.words->candidate = possible ? (p.draft_ids ? p.draft_ids[column] : column) + 1 : 0;
  area.words->rank = measured;
  if (p.order == kConfidence) {
    const int64_t e = weight(row.at(column), column, raw);
    area.words->rank = -probability(e, inverse(raw.total));
  }
}

// A block's part in a row that is read, and what follows from its distribution if it is the last.
template <Dtype dtype>
__device__ void read_part(const Position& q, int64_t part) {
  const DenoiseStepParams& p = q.p;
  const int64_t index = p.pool_rows[q.at];
  const Row row(p.logits, 0, index);
  Team team(q.area(), q.split, part, q.shared);
  Slice<dtype> slice(row, q.split, part);
  RowDistribution distribution;
  int64_t share = 0;
  begin_distribution(slice, p.parameters, q.b(), row.columns, team, q.shared, &distribution,
                     &share);
  if (threadIdx.x == 0) team.area.sums[part] = share;
  if (distribution.status == kOk) {
    if (q.measures()) add_raw_sums(q, slice, distribution, *team.area.words);
    if (p.random.position) {
      store_race(team.area, part,
                 slice_race(slice, distribution, q.noise(), row.columns, q.shared));
    }
  }
  if (!team.done_last()) return;
  distribution = end_distribution(distribution, row, q.split, team.area, q.shared);
  if (threadIdx.x == 0) store(distribution, p.new_distribution, index);
  if (distribution.status == kOk) {
    draw_token(q, row, distribution, team.area);
  } else if (threadIdx.x == 0) {
    p.entropy[q.at] = bit_cast<double>(kNoEntropy);
  }
}

// How many candidates come before this one: those of lower rank, then those to the left.
__device__ int64_t place(const Position& q) {
  const RowWords& mine = *q.area().words;
  int64_t before = 0;
  for (int64_t j = 0; j < q.p.k; ++j) {
    const RowWords& other = *q.of(j).area().words;
    if (other.candidate == 0) continue;
    before += other.rank < mine.rank || (other.rank == mine.rank && j < q.i());
  }
  return before;
}

// Writes a sequence's positions, of which the chosen ones are revealed.
__device__ void end_step(const Position& first) {
  const DenoiseStepParams& p = first.p;
  const bool ranked = p.order == kLowestEntropy || p.order == kConfidence;
  for (int64_t i = threadIdx.x; i < p.k; i += kThreads) {
    const Position q = first.of(i);
    const int64_t candidate = q.area().words->candidate, row = p.pool_rows[q.at];
    const bool chosen = candidate != 0 && (!ranked || place(q) < p.count);
    p.new_tokens[q.at] = chosen ? candidate - 1 : p.tokens[q.at];
    p.new_tau[q.at] = chosen ? p.step : p.tau[q.at];
    p.new_rows[q.at] = !chosen ? p.rows[q.at] : p.new_distribution.scale[row] == 0 ? -1 : row;
  }
}

template <Dtype dtype>
__global__ void __launch_bounds__(kThreads, 2)
    reveal_rows(DenoiseStepParams p, Split split, int64_t* workspace) {
  SPECDIFF_SHARED(Shared, shared);
  const int64_t ticket = take_ticket(workspace, shared);
  const Position q{p, split, workspace, ticket / split.parts, shared};
  const int64_t part = ticket % split.parts;
  if (q.is_read()) {
    read_part<dtype>(q, part);
  } else if (part == 0 && threadIdx.x == 0) {
    p.entropy[q.at] = bit_cast<double>(kNoEntropy);
  }
  const Position first = q.of(0);
  if (is_last(&first.area().words->sequence_done, p.k * split.parts, shared)) end_step(first);
}

}  // namespace

void denoise_step(const DenoiseStepParams& p, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const int64_t rows = p.batch * p.k;
  if (!same_memory(p.distribution, p.new_distribution)) {
    launch(copy_distributions, (p.pool + kThreads - 1) / kThreads, queue, p);
  }
  by_dtype(p.logits.dtype, [&](auto dtype) {
    constexpr auto kernel = reveal_rows<dtype()>;
    const Split split = begin_rows(p.logits, rows, capacity<kernel>(queue.device), queue);
    launch(kernel, rows * split.parts, queue, p, split, queue.workspace);
  });
}

}  // namespace specdiff::cuda
