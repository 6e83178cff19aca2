// The distribution a p - q, cut at 0, that a rejected token is replaced by; and what leniency
// costs.
#pragma once

#include "row.h"

namespace specdiff::cpu {

// The distribution that one drafted token came from, over the target's ids.
struct DraftRow {
  Row row;
  RowDistribution distribution;
  const int64_t* ids;  // of the columns, increasing, or null

  // weight of target id v
  int64_t weight_of(int64_t v) const;
};

// Its weights at the target's ids of one tile of n.
void draft_weights(const DraftRow& draft, int64_t tile, int n, int64_t* e);

class Residual {
 public:
  // Sums W(v) = (a p(v) - q(v))+ in units of 2^-60.
  Residual(const Row& target, const RowDistribution& distribution, const DraftRow& draft, double a);

  int64_t total() const { return total_; }

  // One draw by W, whose total must not be 0.
  int64_t draw(uint64_t word) const;

 private:
  int64_t tile_weights_into(int64_t tile, int64_t* w) const;
  void dense_sums();

  const Row& target_;
  const RowDistribution& distribution_;
  const DraftRow& draft_;
  const Scales scales_;
  int64_t total_ = 0;
  int64_t sums_[kMaxTiles];  // by tile
};

// The sum of bias weights, in units of 2^-60. Neither distribution is greedy.
int64_t bias(const Row& target, const RowDistribution& distribution, const DraftRow& draft,
             const Raise& raise);

}  // namespace specdiff::cpu
