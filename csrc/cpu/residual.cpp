#include "residual.h"

#include <algorithm>
#include <limits>

namespace specdiff::cpu {
namespace {

// The target's logits at n ids; p is 0 at one that it does not have.
void target_logits(const Row& target, const int64_t* ids, int n, float* out) {
  const uint64_t columns = uint64_t(target.columns);
  bool inside = true;
  for (int i = 0; i < n; ++i) inside &= uint64_t(ids[i]) < columns;
  if (inside) return target.gather(ids, n, out);
  for (int i = 0; i < n; ++i) {
    out[i] =
        uint64_t(ids[i]) < columns ? target.at(ids[i]) : -std::numeric_limits<float>::infinity();
  }
}

}  // namespace

void draft_weights(const DraftRow& draft, int64_t tile, int n, int64_t* e) {
  if (!draft.ids) {
    if (draft.distribution.scale != 0) return tile_weights(draft.row, draft.distribution, tile, e);
    for (int i = 0; i < n; ++i) e[i] = tile * kTile + i == draft.distribution.threshold ? kOne : 0;
    return;
  }
  std::fill(e, e + n, 0);
  const Weigher weigher = weigher_of(draft.distribution);
  const bool greedy = draft.distribution.scale == 0;
  const int64_t first = tile * kTile;
  const int64_t* end = draft.ids + draft.row.columns;
  for (const int64_t* id = std::lower_bound(draft.ids, end, first); id < end && *id < first + n;
       ++id) {
    const int64_t column = id - draft.ids;
    if (*id < first) continue;
    e[*id - first] = greedy ? weight(0, column, draft.distribution)
                            : sampled_weight(draft.row.at(column), weigher);
  }
}

int64_t DraftRow::weight_of(int64_t v) const {
  if (distribution.status != kOk) return 0;
  int64_t column = v;
  if (ids) {
    column = std::lower_bound(ids, ids + row.columns, v) - ids;
    if (column == row.columns || ids[column] != v) return 0;
  }
  return weight(row.at(column), column, distribution);
}

Residual::Residual(const Row& target, const RowDistribution& distribution, const DraftRow& draft,
                   double a)
    : target_(target),
      distribution_(distribution),
      draft_(draft),
      scales_{inverse(distribution.total), inverse(draft.distribution.total), a} {
  if (!draft.ids && distribution.scale != 0 && draft.distribution.scale != 0) {
    dense_sums();
  } else {
    alignas(64) int64_t w[kTile];
    for (int64_t tile = 0; tile < target.tiles(); ++tile) sums_[tile] = tile_weights_into(tile, w);
  }
  for (int64_t tile = 0; tile < target.tiles(); ++tile) total_ += sums_[tile];
}

int64_t Residual::draw(uint64_t word) const {
  int64_t r = mulhi(word, total_);
  const int64_t tile = scan(sums_, target_.tiles(), r);
  alignas(64) int64_t w[kTile];
  tile_weights_into(tile, w);
  return tile * kTile + scan(w, target_.tile_size(tile), r);
}

int64_t Residual::tile_weights_into(int64_t tile, int64_t* w) const {
  alignas(64) int64_t e_p[kTile], e_q[kTile];
  const int n = target_.tile_size(tile);
  tile_weights(target_, distribution_, tile, e_p);
  draft_weights(draft_, tile, n, e_q);
  return kernels().residual(e_p, e_q, n, scales_, w);
}

// From the two rows' logits at once; both dense, neither greedy.
void Residual::dense_sums() {
  const Weigher weigher_p = weigher_of(distribution_), weigher_q = weigher_of(draft_.distribution);
  alignas(64) float p[kTile], q[kTile];
  for (int64_t tile = 0; tile < target_.tiles(); ++tile) {
    const int n = target_.tile_size(tile);
    const float* l_p = target_.tile(tile * kTile, n, p);
    const float* l_q = draft_.row.tile(tile * kTile, n, q);
    sums_[tile] = kernels().excess(l_p, l_q, n, weigher_p, weigher_q, scales_);
  }
}

// Over the draft's columns alone, as elsewhere q is 0.
int64_t bias(const Row& target, const RowDistribution& distribution, const DraftRow& draft,
             const Raise& raise) {
  const Scales scales{inverse(distribution.total), inverse(draft.distribution.total), 1};
  const Weigher weigher_p = weigher_of(distribution), weigher_q = weigher_of(draft.distribution);
  alignas(64) float p[kTile], q[kTile];
  int64_t total = 0;
  for (int64_t tile = 0; tile < draft.row.tiles(); ++tile) {
    const int n = draft.row.tile_size(tile);
    const float *l_p = p, *l_q = draft.row.tile(tile * kTile, n, q);
    if (draft.ids) {
      target_logits(target, draft.ids + tile * kTile, n, p);
    } else {
      l_p = target.tile(tile * kTile, n, p);
    }
    total += kernels().bias(l_p, l_q, n, weigher_p, weigher_q, scales, raise);
  }
  return total;
}

}  // namespace specdiff::cpu
