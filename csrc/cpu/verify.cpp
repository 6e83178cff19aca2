#include <algorithm>

#include "ops.h"
#include "residual.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

// One draw from p without x; from p if that is empty.
int64_t draw_without(const Row& target, const RowDistribution& distribution, int64_t* sums,
                     int64_t x, uint64_t word) {
  const int64_t e_x = weight(target.at(x), x, distribution);
  if (distribution.total == e_x) return draw(target, distribution, sums, word);
  sums[x / kTile] -= e_x;
  int64_t r = mulhi(word, distribution.total - e_x);
  const int64_t tile = scan(sums, target.tiles(), r);
  alignas(64) int64_t e[kTile];
  tile_weights(target, distribution, tile, e);
  if (tile == x / kTile) e[x % kTile] = 0;
  return tile * kTile + scan(e, target.tile_size(tile), r);
}

// Verifies one sequence. The target's rows are read in order, for as long as a token may follow.
class Sequence {
 public:
  Sequence(const VerifyParams& params, int64_t b, int thread)
      : p_(params), b_(b), emitted_(params.emitted + b * (params.k + 1)) {
    scratch_ = p_.scratch ? p_.scratch + thread * p_.target.columns : nullptr;
    length_ = p_.lengths ? p_.lengths[b_] : p_.k;
    if (lenient()) raise_ = raise_by(p_.lenience, p_.amounts[b_]);
  }

  void run() {
    std::fill(emitted_, emitted_ + p_.k + 1, -1);
    int32_t status = kToken;
    if (0 <= length_ && length_ <= p_.k) status = by_rule();
    p_.status[b_] = status;
    p_.bias[b_] = status == kOk ? bias_ : 0;
    p_.accepted[b_] = status == kOk ? accepted_ : 0;
    if (status != kOk) std::fill(emitted_, emitted_ + p_.k + 1, -1);
  }

 private:
  bool lenient() const { return p_.rule == kLenientRule; }

  int32_t by_rule() {
    if (lenient() && !valid_amount(p_.lenience, p_.amounts[b_])) return kParameter;
    if (p_.rule == kBlockRule) return block_rule();
    return p_.rule == kCoupledRule ? coupled_rule() : token_rule();
  }

  int32_t token_rule() {
    bool rejected = false;
    for (; accepted_ < length_; ++accepted_) {
      const int32_t status = examine(accepted_, &rejected);
      if (status != kOk || rejected) return status;
    }
    return bonus();
  }

  // Accepts or rejects drafted token i, and emits what follows from that.
  int32_t examine(int64_t i, bool* rejected) {
    const Row target(p_.target, b_, i);
    const RowDistribution distribution = distribution_of(target);
    if (distribution.status != kOk) return distribution.status;
    const bool is_recorded = recorded(i);
    DraftRow draft{target, {}, nullptr};
    const int32_t status = find_draft(i, is_recorded, &draft);
    if (status != kOk) return status;
    const int64_t x = token(i);
    const double p = chance(target, distribution, x);
    const double q = probability(draft.weight_of(x), inverse(draft.distribution.total));
    *rejected = !accepts(accept_word(i), lenient() ? raised(p, q, raise_) : p, q);
    if (lenient()) bias_ += double(bias_at(target, distribution, draft, p, q)) * 0x1p-60;
    emitted_[i] = x;
    if (!*rejected) return kOk;
    if (!is_recorded) {
      emitted_[i] = draw_without(target, distribution, sums_, x, last_word(i));
      return kOk;
    }
    const Residual residual(target, distribution, draft, 1);
    emitted_[i] = residual.total() ? residual.draw(last_word(i))
                                   : draw(target, distribution, sums_, last_word(i));
    return kOk;
  }

  // Under a greedy distribution of the draft, q is 0 but at the token; under one of the target, p
  // is 0 or 1.
  int64_t bias_at(const Row& target, const RowDistribution& distribution, const DraftRow& draft,
                  double p, double q) const {
    if (distribution.scale == 0 || draft.distribution.scale == 0) return bias_weight(p, q, raise_);
    return bias(target, distribution, draft, raise_);
  }

  int32_t block_rule() {
    Prefix* prefixes = p_.prefixes + b_ * (p_.k + 1);
    prefixes[0].chance = 1;
    int64_t i = 0;  // the longest prefix that has a chance
    for (; i < length_; ++i) {
      const int32_t status = extend(prefixes, i);
      if (status != kOk) return status;
      if (prefixes[i + 1].chance == 0) break;
    }
    for (; i > 0; --i) {
      const double u = unit(accept_word(i - 1)), chance = prefixes[i].chance;
      if (u >= chance) continue;  // h_i is at most P_i
      if (i == length_ || chance == 1) break;
      if (end_with_residual(prefixes[i], i, u)) return kOk;
    }
    accept(i);
    if (i == length_) return bonus();
    end_with_residual(prefixes[i], i, -1);
    return kOk;
  }

  // P_{i+1} = min(1, P_i p(x) / q(x)), and what is needed of position i later.
  int32_t extend(Prefix* prefixes, int64_t i) {
    const Row target(p_.target, b_, i);
    const RowDistribution distribution = distribution_of(target);
    if (distribution.status != kOk) return distribution.status;
    prefixes[i].distribution = distribution;
    prefixes[i].recorded = recorded(i);
    DraftRow draft{target, {}, nullptr};
    const int32_t status = find_draft(i, prefixes[i].recorded, &draft);
    if (status != kOk) return status;
    const double q = probability(draft.weight_of(token(i)), inverse(draft.distribution.total));
    const double joint = prefixes[i].chance * chance(target, distribution, token(i));
    prefixes[i + 1].chance = std::min(1.0, joint / q);
    return kOk;
  }

  // Accepts i tokens and draws from the residual behind them iff u < h_i.
  bool end_with_residual(const Prefix& prefix, int64_t i, double u) {
    const Row target(p_.target, b_, i);
    DraftRow draft{target, {}, nullptr};
    find_draft(i, prefix.recorded, &draft);
    const Residual residual(target, prefix.distribution, draft, prefix.chance);
    const double S = double(residual.total()) * 0x1p-60;
    const double rest = S + 1.0;
    if (u >= 0 && !(u < S / (rest - prefix.chance))) return false;
    accept(i);
    if (residual.total()) {
      emitted_[i] = residual.draw(last_word(i));
    } else {
      const RowDistribution distribution = distribution_of(target);  // for the sums of its tiles
      emitted_[i] = draw(target, distribution, sums_, last_word(i));
    }
    return true;
  }

  void accept(int64_t i) {
    accepted_ = i;
    std::copy_n(p_.tokens + b_ * p_.k, i, emitted_);
  }

  int32_t coupled_rule() {
    for (;; ++accepted_) {
      const Row target(p_.target, b_, accepted_);
      const RowDistribution distribution = distribution_of(target);
      if (distribution.status != kOk) return distribution.status;
      const bool drafted = accepted_ < length_;
      if (drafted && !in_vocabulary(token(accepted_))) return kToken;
      const int64_t y = race(target, distribution, nullptr, noise(accepted_));
      emitted_[accepted_] = y;
      if (!drafted || token(accepted_) != y) return kOk;
    }
  }

  int32_t bonus() {
    const Row target(p_.target, b_, length_);
    const RowDistribution distribution = distribution_of(target);
    if (distribution.status == kOk) {
      emitted_[length_] = draw(target, distribution, sums_, word(p_.k, length_, kBonus));
    }
    return distribution.status;
  }

  RowDistribution distribution_of(const Row& target) {
    return make_distribution(target, p_.parameters, b_, sums_, scratch_);
  }

  double chance(const Row& target, const RowDistribution& distribution, int64_t x) const {
    return probability(weight(target.at(x), x, distribution), inverse(distribution.total));
  }

  int64_t token(int64_t i) const { return p_.tokens[b_ * p_.k + i]; }
  bool in_vocabulary(int64_t x) const { return 0 <= x && x < p_.target.columns; }

  // Whether the record of position i counts. To be asked in order.
  bool recorded(int64_t i) {
    const int64_t at = b_ * p_.k + i;
    latest_ = i == 0 ? p_.tau[at] : std::max(latest_, p_.tau[at]);
    if (p_.rows[at] < 0 || p_.record == kOneHot) return false;
    if (p_.record == kFinal) return p_.tau[at] == p_.final_step;
    return p_.record == kEntangled || p_.tau[at] == latest_;
  }

  // The distribution that drafted token i came from: its record, or all weight on the token.
  int32_t find_draft(int64_t i, bool is_recorded, DraftRow* draft) const {
    const int64_t x = token(i), row = p_.rows[b_ * p_.k + i];
    if (!in_vocabulary(x)) return kToken;
    if (!is_recorded) {
      draft->distribution.threshold = x;
      draft->distribution.total = kOne;
      return kOk;
    }
    if (!p_.draft.data || row >= p_.draft_rows) return kToken;
    draft->row = Row(p_.draft, 0, row);
    draft->distribution = load(p_.draft_distribution, row);
    draft->ids = p_.draft_ids;
    return draft->weight_of(x) == 0 ? kDraft : kOk;
  }

  uint64_t word(int64_t column, int64_t slot, Purpose purpose) const {
    const Randomness& random = p_.random;
    if (random.words) return uint64_t(random.words[b_ * (p_.k + 1) + column]);
    return random_word(random.seed[b_], slot, random.round[b_], purpose);
  }
  uint64_t accept_word(int64_t i) const { return word(i, i, kAccept); }
  uint64_t last_word(int64_t i) const { return word(p_.k, i, kResidual); }

  Noise noise(int64_t i) const {
    const Randomness& random = p_.random;
    if (random.words) {
      return {random.words + (b_ * (p_.k + 1) + i) * p_.target.columns, 0, 0};
    }
    return {nullptr, uint64_t(random.seed[b_]), random.position[b_] + i};
  }

  const VerifyParams& p_;
  const int64_t b_;
  int64_t* const emitted_;
  int64_t* scratch_;
  int64_t length_;
  int64_t accepted_ = 0;
  double bias_ = 0;
  Raise raise_{};
  int64_t sums_[kMaxTiles];
  int32_t latest_ = 0;
};

}  // namespace

void verify(const VerifyParams& params) {
  const int64_t logits = params.batch * (params.k + 1) * params.target.columns;
  parallel_for(params.batch, logits, params.threads,
               [&](int64_t b, int thread) { Sequence(params, b, thread).run(); });
}

}  // namespace specdiff::cpu
