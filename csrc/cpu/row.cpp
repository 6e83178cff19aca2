#include "row.h"

#include "specdiff/race.h"

namespace specdiff::cpu {
namespace {

int64_t first_equal(const Row& row, float value) {
  int64_t v = 0;
  while (row.at(v) != value) ++v;
  return v;
}

// The largest threshold t among the e such that the e >= t sum to at least `need` (by_weight), or
// number at least `need`. Radix selection, eleven or twelve of the 45 bits at a time.
int64_t select(const int64_t* e, int64_t n, int64_t need, bool by_weight) {
  constexpr int kShifts[] = {33, 22, 11, 0};
  int64_t prefix = 0, above = 0;
  for (const int shift : kShifts) {
    const int bits = shift == 33 ? 12 : 11;
    int64_t bins[1 << 12] = {};
    for (int64_t v = 0; v < n; ++v) {
      if (e[v] >> (shift + bits) == prefix) {
        bins[(e[v] >> shift) & ((1 << bits) - 1)] += by_weight ? e[v] : 1;
      }
    }
    int bin = (1 << bits) - 1;
    while (bin > 0 && above + bins[bin] < need) above += bins[bin--];
    prefix = prefix << bits | bin;
  }
  return prefix;
}

bool truncates(const Parameters& parameters, int64_t i, int64_t columns) {
  return (parameters.top_k && parameters.top_k[i] > 0 && parameters.top_k[i] < columns) ||
         (parameters.top_p && parameters.top_p[i] < 1) ||
         (parameters.min_p && parameters.min_p[i] > 0);
}

int64_t sum_from(const int64_t* e, int64_t n, int64_t threshold) {
  int64_t total = 0;
  for (int64_t v = 0; v < n; ++v) total += e[v] >= threshold ? e[v] : 0;
  return total;
}

// Smallest weight that survives top-k, then top-p, then min-p. The largest logit, of weight
// `highest`, always does.
int64_t truncate(const int64_t* e, int64_t n, int64_t highest, const Parameters& parameters,
                 int64_t i) {
  int64_t threshold = 0;
  if (parameters.top_k && parameters.top_k[i] > 0 && parameters.top_k[i] < n) {
    threshold = select(e, n, parameters.top_k[i], false);
  }
  if (parameters.top_p && parameters.top_p[i] < 1) {
    const int64_t need = ceil_share(parameters.top_p[i], sum_from(e, n, threshold));
    const int64_t nucleus = select(e, n, need, true);
    threshold = nucleus > threshold ? nucleus : threshold;
  }
  if (parameters.min_p) {
    const int64_t floor = min_p_threshold(parameters.min_p[i], highest);
    threshold = floor > threshold ? floor : threshold;
  }
  return threshold < highest ? threshold : highest;
}

int64_t greedy_sums(const Row& row, const RowDistribution& distribution, int64_t* sums) {
  for (int64_t tile = 0; tile < row.tiles(); ++tile) {
    sums[tile] = distribution.threshold / kTile == tile ? kOne : 0;
  }
  return kOne;
}

// The words of one tile's columns, read or made into the buffer.
const int64_t* tile_noise(const Noise& noise, const int64_t* ids, int64_t tile, int n,
                          int64_t* buffer) {
  const int64_t first = tile * kTile;
  if (noise.words) return noise.words + first;
  if (!ids) {
    uint64_t* words = reinterpret_cast<uint64_t*>(buffer);
    kernels().noise(noise.seed, noise.position, first / 2, (n + 1) / 2, words);
  } else {
    for (int i = 0; i < n; ++i) {
      buffer[i] = int64_t(race_word(noise.seed, noise.position, ids[first + i]));
    }
  }
  return buffer;
}

int64_t tile_sums(const Row& row, const RowDistribution& distribution, int64_t* sums) {
  const Weigher weigher = weigher_of(distribution);
  alignas(64) float buffer[kTile];
  int64_t total = 0;
  for (int64_t tile = 0; tile < row.tiles(); ++tile) {
    const int n = row.tile_size(tile);
    sums[tile] = kernels().sum(row.tile(tile * kTile, n, buffer), n, weigher, true);
    total += sums[tile];
  }
  return total;
}

}  // namespace

void tile_weights(const Row& row, const RowDistribution& distribution, int64_t tile, int64_t* e) {
  const int n = row.tile_size(tile);
  if (distribution.scale == 0) {
    for (int i = 0; i < n; ++i) e[i] = tile * kTile + i == distribution.threshold ? kOne : 0;
    return;
  }
  alignas(64) float buffer[kTile];
  kernels().weights(row.tile(tile * kTile, n, buffer), n, weigher_of(distribution), e);
}

Status find_max(const Row& row, float* max) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  alignas(64) float buffer[kTile];
  float largest = -kInfinity;
  for (int64_t tile = 0; tile < row.tiles(); ++tile) {
    const int n = row.tile_size(tile);
    const float x = kernels().largest(row.tile(tile * kTile, n, buffer), n);
    if (x != x) return kNan;
    largest = x > largest ? x : largest;
  }
  if (largest == kInfinity) return kPosInf;
  if (largest == -kInfinity) return kEmpty;
  *max = largest + 0.0f;
  return kOk;
}

RowDistribution make_distribution(const Row& row, const Parameters& parameters, int64_t index,
                                  int64_t* sums, int64_t* scratch) {
  RowDistribution distribution;
  distribution.status = kParameter;
  if (!valid(parameters, index)) return distribution;
  distribution.status = find_max(row, &distribution.max);
  if (distribution.status != kOk) return distribution;
  const float temperature = parameters.temperature[index];
  if (temperature == 0) {
    distribution.threshold = first_equal(row, distribution.max);
    distribution.total = greedy_sums(row, distribution, sums);
    return distribution;
  }
  distribution.scale = kLog2E / temperature;
  if (truncates(parameters, index, row.columns)) {
    for (int64_t tile = 0; tile < row.tiles(); ++tile) {
      tile_weights(row, distribution, tile, scratch + tile * kTile);
    }
    const int64_t highest = weight(distribution.max, 0, distribution);
    distribution.threshold = truncate(scratch, row.columns, highest, parameters, index);
  }
  distribution.total = tile_sums(row, distribution, sums);
  return distribution;
}

int64_t draw(const Row& row, const RowDistribution& distribution, const int64_t* sums,
             uint64_t word) {
  int64_t r = mulhi(word, distribution.total);
  const int64_t tile = scan(sums, row.tiles(), r);
  alignas(64) int64_t e[kTile];
  tile_weights(row, distribution, tile, e);
  return tile * kTile + scan(e, row.tile_size(tile), r);
}

int64_t race(const Row& row, const RowDistribution& distribution, const int64_t* ids,
             const Noise& noise) {
  if (distribution.scale == 0) return distribution.threshold;
  alignas(64) int64_t e[kTile], buffer[kTile];
  double best = std::numeric_limits<double>::infinity();
  int64_t winner = 0;
  for (int64_t tile = 0; tile < row.tiles(); ++tile) {
    const int n = row.tile_size(tile);
    tile_weights(row, distribution, tile, e);
    const int64_t* words = tile_noise(noise, ids, tile, n, buffer);
    const int i = kernels().race(e, words, n, &best);
    if (i >= 0) winner = tile * kTile + i;
  }
  return winner;
}

}  // namespace specdiff::cpu
