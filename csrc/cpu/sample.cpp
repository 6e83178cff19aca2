#include "ops.h"
#include "row.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

// As draw(), without tile sums at hand: weights are summed until they exceed r.
int64_t draw_reading(const Row& row, const RowDistribution& distribution, uint64_t word) {
  if (distribution.scale == 0) return distribution.threshold;
  int64_t r = mulhi(word, distribution.total);
  const Weigher weigher = weigher_of(distribution);
  alignas(64) float buffer[kTile];
  alignas(64) int64_t e[kTile];
  for (int64_t tile = 0; tile < row.tiles(); ++tile) {
    const int n = row.tile_size(tile);
    const float* l = row.tile(tile * kTile, n, buffer);
    const int64_t sum = kernels().sum(l, n, weigher, false);
    if (sum > r) {
      kernels().weights(l, n, weigher, e);
      return tile * kTile + scan(e, n, r);
    }
    r -= sum;
  }
  return row.columns - 1;  // only if the distribution is not this row's
}

int64_t draw_column(const SampleParams& p, const Row& row, const RowDistribution& distribution,
                    int64_t i) {
  const Randomness& random = p.random;
  if (random.position) {
    const int64_t* words = random.words ? random.words + i * row.columns : nullptr;
    const uint64_t seed = words ? 0 : uint64_t(random.seed[i]);
    return race(row, distribution, p.draft_ids, {words, seed, random.position[i]});
  }
  const uint64_t word = random.words
                            ? uint64_t(random.words[i])
                            : random_word(random.seed[i], p.slot[i], random.round[i], p.purpose);
  return draw_reading(row, distribution, word);
}

}  // namespace

void sample(const SampleParams& p) {
  parallel_for(p.rows, p.rows * p.logits.columns, p.threads, [&](int64_t i, int) {
    const RowDistribution distribution = load(p.distribution, i);
    if (distribution.status != kOk) {
      p.tokens[i] = -1;
      return;
    }
    const int64_t column = draw_column(p, Row(p.logits, 0, i), distribution, i);
    p.tokens[i] = p.draft_ids ? p.draft_ids[column] : column;
  });
}

}  // namespace specdiff::cpu
