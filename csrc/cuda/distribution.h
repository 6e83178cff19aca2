// The distribution of a row whose parts several blocks have, and draws from it.
#pragma once

#include <type_traits>

#include "row.h"
#include "specdiff/accept.h"
#include "specdiff/philox.h"
#include "specdiff/race.h"
#include "specdiff/scan.h"

namespace specdiff::cuda {

// Words that the blocks of one row share. All zero when a launch begins.
struct RowWords {
  uint64_t met;   // arrivals at meetings of the row's blocks
  uint64_t done;  // blocks that are done with the row
  uint64_t key;   // of its largest logit
  float max, scale;
  int64_t threshold, total;
  int32_t status;
  int32_t recorded;
  int64_t token;                       // drawn from it
  int64_t candidate;                   // a token that may be revealed + 1; 0: none
  double target_chance, draft_chance;  // p(x), q(x) of the block rule
  double prefix_chance;                // P_i
  int64_t excess;                      // 2^60 S_i, or 2^60 times the bias of the lenient rule
  int64_t raw_total, spread;           // of the model's own distribution
  double rank;
  // of a sequence, in its first row
  uint64_t sequence_done, sequence_settled, sequence_ended;
  uint64_t ends;  // k - i, the largest of the rows i where the round ends
  int64_t sure;   // tokens that the block rule accepts in any case
  int64_t sequence_status;
  // of a launch, in the first row of all
  uint64_t tickets;

  __device__ RowDistribution distribution() const { return {max, scale, threshold, total, status}; }
};

constexpr int64_t kRowWords = sizeof(RowWords) / sizeof(int64_t);
constexpr int kBinSets = 3;

// Scratch of one row.
struct Area {
  RowWords* words;
  int64_t* sums;     // [parts], of weights
  int64_t* excess;   // [parts], of residual weights, or least times of a race
  int64_t* winners;  // [parts], the columns of these times
  int64_t* bins;     // [kBinSets, kBins]

  __host__ __device__ Area(int64_t* workspace, int64_t rows, int64_t row, int32_t parts)
      : words(reinterpret_cast<RowWords*>(workspace) + row),
        sums(workspace + rows * kRowWords + row * (3 * parts + kBinSets * kBins)),
        excess(sums + parts),
        winners(excess + parts),
        bins(winners + parts) {}
};

// Whether this block is the last of so many to get here; then it sees what all of them wrote.
__device__ inline bool is_last(uint64_t* counter, int64_t arrivals, Shared& shared) {
  int64_t last = 0;
  __syncthreads();  // all threads have written before one of them counts
  if (threadIdx.x == 0) last = arrive(counter) == uint64_t(arrivals) - 1;
  return from_first(last, shared);
}

// The blocks that have parts of one row. They wait for each other, which is safe because they are
// counted as they begin: all blocks of a row have begun when one of the next row does. At most
// one row of a launch then lacks blocks, and these find room when other rows are done.
class Team {
 public:
  __device__ Team(const Area& area, const Split& split, int64_t part, Shared& shared)
      : area(area), parts(split.parts), part(part), shared_(shared) {}

  // Waits until all blocks of the row are here, with all that they wrote. False if one of them has
  // left, as the row does not matter any more.
  __device__ bool meet() {
    if (parts == 1) {
      __syncthreads();
      return true;
    }
    ++meetings_;
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint64_t all = meetings_ * parts, seen = arrive(&area.words->met) + 1;
      shared_.found = (seen < all ? wait_for(&area.words->met, all) : seen) < kLeft;
    }
    __syncthreads();
    return shared_.found;
  }

  // Sets of bins take turns: a set is emptied a meeting before it is filled again, and a meeting
  // after it was read. Two are empty before the row's first meeting.
  __device__ void empty_first_bins() {
    empty(0);
    empty(1);
  }
  __device__ int64_t* next_bins() { return area.bins + fills_++ % kBinSets * kBins; }
  __device__ void empty_old_bins() { empty((fills_ + 1) % kBinSets); }

  // Lets nobody wait for this block.
  __device__ void leave() {
    if (threadIdx.x == 0) raise(&area.words->met, kLeft);
  }

  // Whether this is the last block that is done with the row.
  __device__ bool done_last() { return is_last(&area.words->done, parts, shared_); }

  const Area area;
  const int64_t parts, part;

 private:
  static constexpr uint64_t kLeft = uint64_t(1) << 32;

  __device__ void empty(int set) {
    if (part != 0) return;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) area.bins[set * kBins + bin] = 0;
  }

  uint64_t meetings_ = 0;
  int fills_ = 0;
  Shared& shared_;
};

// The number of this block in the order in which blocks begin.
__device__ inline int64_t take_ticket(int64_t* workspace, Shared& shared) {
  int64_t ticket = 0;
  if (threadIdx.x == 0) ticket = take(&reinterpret_cast<RowWords*>(workspace)->tickets);
  return from_first(ticket, shared);
}

__device__ inline int32_t status_of(uint32_t key, const Parameters& parameters, int64_t index) {
  if (!valid(parameters, index)) return kParameter;
  if (key == kNanKey) return kNan;
  const int32_t order = int32_t(key ^ 0x80000000u);
  if (order == 0x7f800000) return kPosInf;
  return order == int32_t(0x807fffff) ? kEmpty : kOk;
}

// The largest threshold t such that the weights e >= t sum to at least `need` (by_weight), or
// number that. Radix selection, 9 of the 45 bits at a time; false if a block has left.
template <Dtype dtype>
__device__ bool select(const Slice<dtype>& slice, const Weigher& by, int64_t need, bool by_weight,
                       Team& team, Shared& shared, int64_t* threshold) {
  int64_t prefix = 0;
  int64_t left = need - 1;  // less what lies above the bin
  for (int step = 0; step < 5; ++step) {
    const int shift = 36 - 9 * step;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.bins[bin] = 0;
    __syncthreads();
    slice.revisit([&](int64_t, const float (&l)[8]) {
      for (int j = 0; j < 8; ++j) {
        const int64_t e = whole_weight(l[j], by);
        const int digit = int(e >> shift) & (kBins - 1);
        if (digit && e >> (shift + 9) == prefix) add_shared(&shared.bins[digit], by_weight ? e : 1);
      }
    });
    __syncthreads();
    int64_t* bins = team.next_bins();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      if (shared.bins[bin]) add(&bins[bin], shared.bins[bin]);
    }
    if (!team.meet()) return false;
    team.empty_old_bins();
    const auto from_above = [&](int64_t i) { return bins[kBins - 1 - i]; };
    const int64_t above = find_first(kBins - 1, from_above, left, shared);
    prefix = prefix << 9 | (kBins - 1 - above);
  }
  *threshold = prefix;
  return true;
}

// The sum of weights, of all blocks, that reach the threshold. False if a block has left.
template <Dtype dtype>
__device__ bool sum_from(const Slice<dtype>& slice, Weigher by, int64_t threshold, Team& team,
                         Shared& shared, int64_t* total) {
  by.threshold = threshold;
  const int64_t sum = block_sum(slice.any_sum(by), shared);
  int64_t* bin = team.next_bins();
  if (threadIdx.x == 0) add(bin, sum);
  if (!team.meet()) return false;
  team.empty_old_bins();
  *total = *bin;
  return true;
}

// The smallest weight that survives top-k, then top-p, then min-p; the largest logit always does.
// False if a block has left.
template <Dtype dtype>
__device__ bool truncate(const Slice<dtype>& slice, const RowDistribution& distribution,
                         const Parameters& parameters, int64_t index, int64_t columns, Team& team,
                         Shared& shared, int64_t* threshold) {
  const Weigher by = weigher_of(distribution);
  const int64_t highest = whole_weight(distribution.max, by);
  const int64_t top_k = parameters.top_k ? parameters.top_k[index] : 0;
  const float top_p = parameters.top_p ? parameters.top_p[index] : 1;
  *threshold = 0;
#pragma unroll 1
  for (int by_weight = 0; by_weight < 2; ++by_weight) {
    int64_t need = top_k, found;
    if (by_weight ? top_p == 1 : top_k == 0 || top_k >= columns) continue;
    if (by_weight) {
      if (!sum_from(slice, by, *threshold, team, shared, &need)) return false;
      need = ceil_share(top_p, need);
    }
    if (!select(slice, by, need, by_weight, team, shared, &found)) return false;
    *threshold = found > *threshold ? found : *threshold;
  }
  if (parameters.min_p) {
    const int64_t floor = min_p_threshold(parameters.min_p[index], highest);
    *threshold = floor > *threshold ? floor : *threshold;
  }
  *threshold = *threshold < highest ? *threshold : highest;
  return true;
}

// A row's distribution but for what takes sums over all its blocks: the total, and a greedy row's
// threshold. Of these the block's share: its sum of weights, or its first column that holds the
// largest logit; none where `share` is null. Greedy and truncated rows are read again, so that
// their code need not keep the logits that are held. False if a block has left.
template <Dtype dtype>
__device__ bool begin_distribution(Slice<dtype>& slice, const Parameters& parameters, int64_t index,
                                   int64_t columns, Team& team, Shared& shared,
                                   RowDistribution* distribution, int64_t* share) {
  if (parameters.top_k || parameters.top_p) team.empty_first_bins();
  const uint32_t key = block_max(slice.hold(), shared);
  if (threadIdx.x == 0) raise(&team.area.words->key, key);
  if (!team.meet()) return false;
  const uint32_t largest = uint32_t(team.area.words->key);
  *distribution = RowDistribution();
  distribution->status = status_of(largest, parameters, index);
  if (distribution->status != kOk) return true;
  distribution->max = from_key(largest) + 0.0f;  // never -0
  const float temperature = parameters.temperature[index];
  if (temperature == 0) {
    if (share) *share = block_min(slice.first(distribution->max), shared);
    return true;
  }
  distribution->scale = kLog2E / temperature;
  if (!parameters.top_k && !parameters.top_p && !parameters.min_p) {
    if (share) *share = block_sum(slice.sum(weigher_of(*distribution)), shared);
    return true;
  }
  int64_t threshold;
  if (!truncate(slice, *distribution, parameters, index, columns, team, shared, &threshold))
    return false;
  distribution->threshold = threshold;
  if (share) *share = block_sum(slice.any_sum(weigher_of(*distribution)), shared);
  return true;
}

// The distribution of a row, all of whose blocks have left their sums. Only for the last block.
__device__ inline RowDistribution end_distribution(RowDistribution distribution, const Row& row,
                                                   const Split& split, const Area& area,
                                                   Shared& shared) {
  if (distribution.status == kOk && distribution.scale == 0) {
    uint32_t first = 0xffffffffu;
    for (int part = threadIdx.x; part < split.parts; part += kThreads) {
      first = uint32_t(area.sums[part]) < first ? uint32_t(area.sums[part]) : first;
    }
    distribution.threshold = block_min(first, shared);
    distribution.total = kOne;
    const int64_t holder = (distribution.threshold + row.shift()) / split.part_columns();
    for (int part = threadIdx.x; part < split.parts; part += kThreads) {
      area.sums[part] = part == holder ? kOne : 0;
    }
  } else if (distribution.status == kOk) {
    int64_t sum = 0;
    for (int part = threadIdx.x; part < split.parts; part += kThreads) sum += area.sums[part];
    distribution.total = block_sum(sum, shared);
  }
  if (threadIdx.x == 0) {
    area.words->max = distribution.max;
    area.words->scale = distribution.scale;
    area.words->threshold = distribution.threshold;
    area.words->total = distribution.total;
    area.words->status = distribution.status;
  }
  return distribution;
}

// --- draws, by one block ---

// The column at which the running sum of a part's weights exceeds r, or the row's last one.
// weigh(column, weights): of eight columns
template <class Weigh>
__device__ int64_t draw_within(const Row& row, const Split& split, int64_t part, int64_t r,
                               Weigh weigh, Shared& shared) {
  for (int k = 0; k < split.groups; ++k) {
    int64_t e[8], sum = 0, column = column_of(row, split, part, k);
    weigh(column, e);
    for (int j = 0; j < 8; ++j) sum += e[j];
    const int thread = find_thread(sum, r, shared);
    if (thread == kThreads) continue;
    if (thread == int(threadIdx.x)) {
      bool before = true;
      for (int j = 0; j < 8; ++j) {
        before = before && r >= e[j];
        if (before) r -= e[j];
        column += before;
      }
      shared.column = column;
    }
    __syncthreads();
    return shared.column;
  }
  return row.columns - 1;  // only if the distribution is not this row's
}

// Weights of columns v to v + 7.
__device__ inline void row_weights(const Row& row, const RowDistribution& distribution, int64_t v,
                                   int64_t (&e)[8]) {
  if (distribution.scale == 0) {
    for (int j = 0; j < 8; ++j) e[j] = v + j == distribution.threshold ? kOne : 0;
    return;
  }
  const Weigher by = weigher_of(distribution);
  float l[8];
  row.widen(row.load(v), l);
  for (int j = 0; j < 8; ++j) e[j] = sampled_weight(l[j], by);
}

// The column of mulhi(word, total), by the sums of the row's parts.
__device__ inline int64_t draw(const Row& row, const RowDistribution& distribution,
                               const Split& split, const int64_t* sums, uint64_t word,
                               Shared& shared) {
  if (distribution.scale == 0) return distribution.threshold;
  int64_t r = mulhi(word, distribution.total);
  const int64_t part = find_first(split.parts, [&](int64_t i) { return sums[i]; }, r, shared);
  const auto weigh = [&](int64_t v, int64_t (&e)[8]) { row_weights(row, distribution, v, e); };
  return draw_within(row, split, part, r, weigh, shared);
}

// Where the exponential variates of a coupled draw come from.
struct Noise {
  const int64_t* words;  // of each column, or null
  uint64_t seed;
  int64_t position;
  const int64_t* ids;  // of the columns, or null
};

// A thread's view of the noise, which remembers the words of the last pair of ids.
class NoiseReader {
 public:
  explicit __device__ NoiseReader(const Noise& noise) : noise_(noise) {}

  __device__ uint64_t word(int64_t v) {
    if (noise_.words) return uint64_t(noise_.words[v]);
    const int64_t id = noise_.ids ? noise_.ids[v] : v;
    if (id >> 1 != pair_) {
      pair_ = id >> 1;
      words_ = race_pair(noise_.seed, noise_.position, pair_);
    }
    return word_of_pair(words_, id);
  }

 private:
  const Noise& noise_;
  int64_t pair_ = -1;
  Counter words_;
};

// The least E_v / e_v among a block's columns; of a greedy row the first with the largest logit.
template <Dtype dtype>
__device__ Finish slice_race(const Slice<dtype>& slice, const RowDistribution& distribution,
                             const Noise& noise, int64_t columns, Shared& shared) {
  double least = bit_cast<double>(int64_t(0x7ff0000000000000));  // +inf
  int64_t winner = columns;
  NoiseReader reader(noise);
  const Weigher by = weigher_of(distribution);
  slice.revisit([&](int64_t v, const float (&l)[8]) {
    for (int j = 0; j < 8; ++j) {
      double time = 0;
      if (distribution.scale != 0) {
        const int64_t e = sampled_weight(l[j], by);
        if (e == 0) continue;
        const uint64_t word = reader.word(v + j);
        if (!may_win(word, double(e), least)) continue;
        time = exponential(word) / double(e);
      } else if (l[j] != distribution.max) {
        continue;
      }
      if (time < least) {
        least = time;
        winner = v + j;
      }
    }
  });
  return block_first({bit_cast<int64_t>(least), winner}, shared);
}

__device__ inline void store_race(const Area& area, int64_t part, const Finish& finish) {
  if (threadIdx.x == 0) {
    area.excess[part] = finish.time;
    area.winners[part] = finish.column;
  }
}

// The column that wins a row, all of whose parts have raced.
__device__ inline int64_t end_race(const Area& area, const Split& split, Shared& shared) {
  Finish first{0x7ff0000000000000, INT64_MAX};
  for (int part = threadIdx.x; part < split.parts; part += kThreads) {
    const Finish other{area.excess[part], area.winners[part]};
    if (other.before(first)) first = other;
  }
  return block_first(first, shared).column;
}

// --- hosts ---

// Of the blocks that a device runs at once, at most this share have parts of one row and wait for
// each other, so that several streams may do this at the same time; see Team.
constexpr int64_t kShare = 32;

inline void clear_words(int64_t rows, const Queue& queue) {
  if (rows == 0) return;
  check(cudaMemsetAsync(queue.workspace, 0, rows * sizeof(RowWords), cudaStream_t(queue.stream)));
}

// call(a constant of this dtype)
template <class Call>
void by_dtype(int32_t dtype, Call call) {
  if (dtype == kFloat32) return call(std::integral_constant<Dtype, kFloat32>());
  if (dtype == kBFloat16) return call(std::integral_constant<Dtype, kBFloat16>());
  call(std::integral_constant<Dtype, kFloat16>());
}

// How rows are divided whose blocks wait for each other, with their words cleared.
inline Split begin_rows(const Logits& logits, int64_t rows, int64_t capacity, const Queue& queue) {
  clear_words(rows, queue);
  return split_of(logits, rows, capacity, capacity / kShare);
}

}  // namespace specdiff::cuda
