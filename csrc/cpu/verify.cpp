#include <algorithm>

#include "ops.h"
#include "row.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

// The recorded law of one drafted position, over the target's ids.
struct DraftRow {
  Row row;
  RowLaw law;
  const int64_t* ids;  // of the columns, increasing, or null

  // weight of target id v
  int64_t weight_of(int64_t v) const {
    if (law.status != kOk) return 0;
    int64_t column = v;
    if (ids) {
      column = std::lower_bound(ids, ids + row.columns, v) - ids;
      if (column == row.columns || ids[column] != v) return 0;
    }
    return weight(row.at(column), column, law);
  }
};

// Walks a draft row alongside the target's tiles and lays its weights out over target ids.
class DraftTiles {
 public:
  explicit DraftTiles(const DraftRow& draft) : draft_(draft) {}

  void next(int64_t tile, int n, int64_t* e) {
    if (!draft_.ids) return tile_weights(draft_.row, draft_.law, tile, e);
    std::fill(e, e + n, 0);
    const int64_t first = tile * kTile;
    for (; column_ < draft_.row.columns && draft_.ids[column_] < first + n; ++column_) {
      e[draft_.ids[column_] - first] = weight(draft_.row.at(column_), column_, draft_.law);
    }
  }

  void seek(int64_t tile) {
    if (draft_.ids) {
      column_ =
          std::lower_bound(draft_.ids, draft_.ids + draft_.row.columns, tile * kTile) - draft_.ids;
    }
  }

 private:
  const DraftRow& draft_;
  int64_t column_ = 0;
};

// sum_v W(v) of every tile from the two rows' logits at once; both dense, neither greedy.
int64_t dense_excess(const Row& target, const RowLaw& law, const DraftRow& draft, int64_t* excess) {
  alignas(64) float p[kTile], q[kTile];
  const double inverse_p = inverse(law.total), inverse_q = inverse(draft.law.total);
  int64_t total = 0;
  for (int64_t tile = 0; tile < target.tiles(); ++tile) {
    const int n = target.tile_size(tile);
    const float* l_p = target.tile(tile * kTile, n, p);
    const float* l_q = draft.row.tile(tile * kTile, n, q);
    excess[tile] = kernels().excess(l_p, l_q, n, law, draft.law, inverse_p, inverse_q);
    total += excess[tile];
  }
  return total;
}

// One draw from (p - q)+; from p if that is empty.
int64_t draw_residual(const Row& target, const RowLaw& law, const int64_t* sums,
                      const DraftRow& draft, uint64_t word) {
  alignas(64) int64_t e_p[kTile], e_q[kTile], w[kTile];
  int64_t excess[kMaxTiles];
  const double inverse_p = inverse(law.total), inverse_q = inverse(draft.law.total);
  DraftTiles tiles(draft);
  const auto residual = [&](int64_t tile) {
    const int n = target.tile_size(tile);
    tile_weights(target, law, tile, e_p);
    tiles.next(tile, n, e_q);
    return kernels().residual(e_p, e_q, n, inverse_p, inverse_q, w);
  };
  int64_t total = 0;
  if (draft.ids || law.scale == 0 || draft.law.scale == 0) {
    for (int64_t tile = 0; tile < target.tiles(); ++tile) total += excess[tile] = residual(tile);
  } else {
    total = dense_excess(target, law, draft, excess);
  }
  if (total == 0) return draw(target, law, sums, word);
  int64_t r = mulhi(word, total);
  const int64_t tile = scan(excess, target.tiles(), r);
  tiles.seek(tile);
  residual(tile);
  return tile * kTile + scan(w, target.tile_size(tile), r);
}

// One draw from p without x; from p if that is empty.
int64_t draw_without(const Row& target, const RowLaw& law, int64_t* sums, int64_t x,
                     uint64_t word) {
  const int64_t e_x = weight(target.at(x), x, law);
  if (law.total == e_x) return draw(target, law, sums, word);
  sums[x / kTile] -= e_x;
  int64_t r = mulhi(word, law.total - e_x);
  const int64_t tile = scan(sums, target.tiles(), r);
  alignas(64) int64_t e[kTile];
  tile_weights(target, law, tile, e);
  if (tile == x / kTile) e[x % kTile] = 0;
  return tile * kTile + scan(e, target.tile_size(tile), r);
}

// Verifies one sequence: the target's rows are read in order, up to the first rejection.
class Sequence {
 public:
  Sequence(const VerifyParams& params, int64_t b, int thread)
      : p_(params), b_(b), emitted_(params.emitted + b * (params.k + 1)) {
    scratch_ = p_.scratch ? p_.scratch + thread * p_.target.columns : nullptr;
  }

  void run() {
    std::fill(emitted_, emitted_ + p_.k + 1, -1);
    p_.accepted[b_] = 0;
    const int64_t length = p_.lengths ? p_.lengths[b_] : p_.k;
    int32_t status = length < 0 || length > p_.k ? kToken : kOk;
    int64_t i = 0;
    if (status == kOk) {
      while (i < length && (status = examine(i)) == kOk && !rejected_) ++i;
    }
    if (status == kOk && !rejected_) status = bonus(i);
    p_.status[b_] = status;
    if (status == kOk) {
      p_.accepted[b_] = i;
    } else {
      std::fill(emitted_, emitted_ + p_.k + 1, -1);
    }
  }

 private:
  uint64_t word(int64_t column, int64_t slot, Purpose purpose) const {
    const Randomness& random = p_.random;
    if (random.words) return uint64_t(random.words[b_ * (p_.k + 1) + column]);
    return random_word(random.seed[b_], slot, random.round[b_], purpose);
  }

  // Running-max rule: position i's record counts if none before it was sampled in a later step.
  bool recorded(int64_t i) {
    const int64_t at = b_ * p_.k + i;
    latest_ = i == 0 ? p_.tau[at] : std::max(latest_, p_.tau[at]);
    return !p_.value_dependent && p_.rows[at] >= 0 && p_.tau[at] >= latest_;
  }

  // Accepts or rejects drafted token i, and emits what follows from that.
  int32_t examine(int64_t i) {
    const Row target(p_.target, b_, i);
    const RowLaw law = make_law(target, p_.parameters, b_, sums_, scratch_);
    if (law.status != kOk) return law.status;
    const int64_t x = p_.tokens[b_ * p_.k + i], row = p_.rows[b_ * p_.k + i];
    const bool is_recorded = recorded(i);
    if (x < 0 || x >= p_.target.columns) return kToken;
    if (is_recorded && (!p_.draft.data || row >= p_.draft_rows)) return kToken;
    const double p = probability(weight(target.at(x), x, law), inverse(law.total));
    const uint64_t accept = word(i, i, kAccept);
    if (!is_recorded) {
      rejected_ = !accepts(accept, p, 1.0);
      emitted_[i] = rejected_ ? draw_without(target, law, sums_, x, last_word(i)) : x;
      return kOk;
    }
    const DraftRow draft{Row(p_.draft, 0, row), load(p_.draft_law, row), p_.draft_ids};
    const int64_t e_q = draft.weight_of(x);
    if (e_q == 0) return kDraft;
    rejected_ = !accepts(accept, p, probability(e_q, inverse(draft.law.total)));
    emitted_[i] = rejected_ ? draw_residual(target, law, sums_, draft, last_word(i)) : x;
    return kOk;
  }

  uint64_t last_word(int64_t i) const { return word(p_.k, i, kResidual); }

  int32_t bonus(int64_t i) {
    const Row target(p_.target, b_, i);
    const RowLaw law = make_law(target, p_.parameters, b_, sums_, scratch_);
    if (law.status == kOk) emitted_[i] = draw(target, law, sums_, word(p_.k, i, kBonus));
    return law.status;
  }

  const VerifyParams& p_;
  const int64_t b_;
  int64_t* const emitted_;
  int64_t* scratch_;
  int64_t sums_[kMaxTiles];
  int32_t latest_ = 0;
  bool rejected_ = false;
};

}  // namespace

void verify(const VerifyParams& params) {
  const int64_t logits = params.batch * (params.k + 1) * params.target.columns;
  parallel_for(params.batch, logits, params.threads,
               [&](int64_t b, int thread) { Sequence(params, b, thread).run(); });
}

}  // namespace specdiff::cpu
