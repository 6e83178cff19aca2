#include <limits>

#include "ops.h"
#include "row.h"
#include "specdiff/reveal.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

void copy_distributions(const DenoiseStepParams& p) {
  if (same_memory(p.distribution, p.new_distribution)) return;
  for (int64_t row = 0; row < p.pool; ++row)
    store(load(p.distribution, row), p.new_distribution, row);
}

// One position of one sequence.
class Position {
 public:
  Position(const DenoiseStepParams& params, int64_t at, int thread)
      : p_(params), at_(at), b_(at / params.k), i_(at % params.k), row_(params.pool_rows[at]) {
    scratch_ = p_.scratch ? p_.scratch + thread * p_.logits.columns : nullptr;
  }

  void run() {
    Candidate& candidate = p_.candidates[at_];
    candidate = {0, -1};
    p_.entropy[at_] = kNone;
    if (!masked(i_) || !considered()) return;
    const Row row(p_.logits, 0, row_);
    int64_t sums[kMaxTiles];
    const RowDistribution distribution = make_distribution(row, p_.parameters, b_, sums, scratch_);
    store(distribution, p_.new_distribution, row_);
    if (distribution.status != kOk) return;
    const RowDistribution raw = measures() ? raw_distribution(row, distribution) : distribution;
    if (p_.entropies) p_.entropy[at_] = entropy(spread_of(row, raw), raw);
    if (p_.order == kSedd && !(coin(i_) < p_.rate[b_] * mean_exp(raw, row.columns))) return;
    const int64_t column = draw_column(row, distribution, sums);
    candidate.token = p_.draft_ids ? p_.draft_ids[column] : column;
    if (p_.order == kLowestEntropy) candidate.rank = p_.entropy[at_];
    if (p_.order == kConfidence) {
      candidate.rank = -probability(weight(row.at(column), column, raw), inverse(raw.total));
    }
  }

 private:
  bool masked(int64_t i) const {
    const int64_t at = b_ * p_.k + i;
    return p_.tokens[at] < 0 && (!p_.lengths || i < p_.lengths[b_]) && p_.pool_rows[at] >= 0 &&
           p_.pool_rows[at] < p_.pool;
  }

  // Whether the logits have to be read, by all that is known without them.
  bool considered() const {
    if (p_.order == kChunk) return p_.lo <= i_ && i_ < p_.hi;
    if (p_.order == kMdlm) return coin(i_) < p_.rate[b_];
    if (p_.order != kFirstHitting) return true;
    int64_t all = 0, before = 0;
    for (int64_t i = 0; i < p_.k; ++i) {
      all += masked(i);
      before += i < i_ && masked(i);
    }
    return mulhi(word(0, 0, kReveal), all) == before;
  }

  double coin(int64_t i) const { return unit(word(i, 0, kReveal)); }

  bool measures() const { return p_.entropies || p_.order == kSedd || p_.order == kConfidence; }

  // The model's own distribution: temperature 1, nothing cut off.
  RowDistribution raw_distribution(const Row& row, const RowDistribution& distribution) const {
    RowDistribution raw{distribution.max, kLog2E, 0, distribution.total, kOk};
    if (distribution.scale == raw.scale && distribution.threshold == 0) return raw;
    const Weigher weigher = weigher_of(raw);
    alignas(64) float buffer[kTile];
    raw.total = 0;
    for (int64_t tile = 0; tile < row.tiles(); ++tile) {
      const int n = row.tile_size(tile);
      raw.total += kernels().sum(row.tile(tile * kTile, n, buffer), n, weigher, true);
    }
    return raw;
  }

  static int64_t spread_of(const Row& row, const RowDistribution& raw) {
    const Weigher weigher = weigher_of(raw);
    alignas(64) float buffer[kTile];
    int64_t total = 0;
    for (int64_t tile = 0; tile < row.tiles(); ++tile) {
      const int n = row.tile_size(tile);
      total += kernels().spread(row.tile(tile * kTile, n, buffer), n, weigher);
    }
    return total;
  }

  int64_t draw_column(const Row& row, const RowDistribution& distribution,
                      const int64_t* sums) const {
    const Randomness& random = p_.random;
    if (!random.position) return draw(row, distribution, sums, word(i_, 1, kDraftToken));
    const int64_t* words = random.words ? random.words + at_ * stride() + 1 : nullptr;
    const uint64_t seed = words ? 0 : uint64_t(random.seed[b_]);
    return race(row, distribution, p_.draft_ids, {words, seed, random.position[b_] + i_});
  }

  int64_t stride() const { return p_.random.position ? 1 + p_.logits.columns : 2; }

  uint64_t word(int64_t slot, int64_t column, Purpose purpose) const {
    const Randomness& random = p_.random;
    if (random.words) return uint64_t(random.words[(b_ * p_.k + slot) * stride() + column]);
    return random_word(random.seed[b_], slot, random.round[b_], purpose, uint32_t(p_.step));
  }

  const DenoiseStepParams& p_;
  const int64_t at_, b_, i_, row_;
  int64_t* scratch_;
};

// Whether fewer than `count` candidates of the same sequence come before candidate i.
bool among_first(const Candidate* candidates, int64_t k, int64_t i, int64_t count) {
  int64_t before = 0;
  for (int64_t j = 0; j < k; ++j) {
    if (candidates[j].token < 0) continue;
    before += candidates[j].rank < candidates[i].rank ||
              (candidates[j].rank == candidates[i].rank && j < i);
  }
  return before < count;
}

void reveal(const DenoiseStepParams& p, int64_t b) {
  const bool ranked = p.order == kLowestEntropy || p.order == kConfidence;
  const Candidate* candidates = p.candidates + b * p.k;
  for (int64_t i = 0; i < p.k; ++i) {
    const int64_t at = b * p.k + i, row = p.pool_rows[at];
    const bool chosen =
        candidates[i].token >= 0 && (!ranked || among_first(candidates, p.k, i, p.count));
    p.new_tokens[at] = chosen ? candidates[i].token : p.tokens[at];
    p.new_tau[at] = chosen ? p.step : p.tau[at];
    p.new_rows[at] = !chosen ? p.rows[at] : p.new_distribution.scale[row] == 0 ? -1 : row;
  }
}

}  // namespace

void denoise_step(const DenoiseStepParams& params) {
  copy_distributions(params);
  const int64_t positions = params.batch * params.k;
  parallel_for(positions, positions * params.logits.columns, params.threads,
               [&](int64_t at, int thread) { Position(params, at, thread).run(); });
  for (int64_t b = 0; b < params.batch; ++b) reveal(params, b);
}

}  // namespace specdiff::cpu
