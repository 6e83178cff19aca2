#include <algorithm>
#include <cmath>

#include "divergence.h"
#include "ops.h"
#include "row.h"
#include "specdiff/elementary.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr RowStatistics kNoStatistics = {kNan, kNan, kNan, kNan, kNan, kNan, kNan, kNan};

// Increasing ids within the target's vocabulary; null stands for all of them.
bool valid_ids(const int64_t* ids, int64_t count, int64_t columns) {
  if (!ids) return true;
  for (int64_t j = 1; j < count; ++j) {
    if (ids[j] <= ids[j - 1]) return false;
  }
  return ids[0] >= 0 && ids[count - 1] < columns;
}

// The target's logits at the drafted tokens first .. first + n - 1.
const float* target_tile(const Row& row, const int64_t* ids, int64_t first, int n, float* buffer) {
  if (!ids) return row.tile(first, n, buffer);
  row.gather(ids + first, n, buffer);
  return buffer;
}

Weight make_weight(double max, double temperature) {
  const double step = temperature * kLn2;
  Weight row;
  row.max = float(max);
  row.lowest = float(-125 * step);
  row.log2_scale = float(1 / step);
  row.step_high = bit_cast<float>(bit_cast<uint32_t>(float(step)) & 0xfffffe00u);
  row.step_low = float(step - double(row.step_high));
  row.inverse = float(1 / temperature);
  return row;
}

double log_ratio(double sum_p, double sum_q) { return log(sum_p) - log(sum_q); }

Pair make_pair(const RowStatistics& s, double temperature) {
  return {make_weight(s.target_max, temperature), make_weight(s.draft_max, temperature),
          float(s.target_sum / s.draft_sum),
          float(temperature * log_ratio(s.target_sum, s.draft_sum))};
}

Moments moments(const Row& row, const Weight& weight) {
  alignas(64) float buffer[kTile];
  Moments sums;
  for (int64_t tile = 0; tile < row.tiles(); ++tile) {
    const int n = row.tile_size(tile);
    divergence().moments(row.tile(tile * kTile, n, buffer), n, weight, &sums);
  }
  return sums;
}

Overlap overlap(const Row& target, const Row& draft, const int64_t* ids, const Pair& pair) {
  alignas(64) float buffer_p[kTile], buffer_q[kTile];
  Overlap sums;
  for (int64_t tile = 0; tile < draft.tiles(); ++tile) {
    const int64_t first = tile * kTile;
    const int n = draft.tile_size(tile);
    const float* l_p = target_tile(target, ids, first, n, buffer_p);
    divergence().overlap(l_p, draft.tile(first, n, buffer_q), n, pair, &sums);
  }
  return sums;
}

double entropy(const Moments& row, double temperature) {
  return log(row.sum) - row.distance / (temperature * row.sum);
}

struct Result {
  double tv = kNan, kl = kNan, target_entropy = kNan;
  RowStatistics statistics = kNoStatistics;  // the rest
};

Result compare(const Row& target, const Row& draft, const int64_t* ids, double temperature) {
  float target_max, draft_max;
  Result result;
  if (find_max(target, &target_max) != kOk || find_max(draft, &draft_max) != kOk) return result;
  const Moments p = moments(target, make_weight(target_max, temperature));
  const Moments q = moments(draft, make_weight(draft_max, temperature));
  RowStatistics& s = result.statistics;
  s = {target_max, p.sum, draft_max, q.sum, 0, 0, 0, entropy(q, temperature)};
  const Pair pair = make_pair(s, temperature);
  const Overlap sums = overlap(target, draft, ids, pair);
  // what fp32 lost of the ratio and of its logarithm is added here
  const double ratio = p.sum / q.sum - double(pair.ratio);
  const double shift = log_ratio(p.sum, q.sum) - double(pair.shift) / temperature;
  result.tv = std::max(0.0, (sums.difference + ratio * sums.excess) / p.sum);
  result.kl = (sums.kl / temperature - shift * sums.drafted) / p.sum;
  result.target_entropy = entropy(p, temperature);
  s.drafted = sums.drafted / p.sum;
  s.excess = sums.excess / q.sum;
  s.reverse_kl = shift - sums.reverse / (temperature * q.sum);
  return result;
}

void store(const Result& row, const RowDivergenceParams& out, int64_t i) {
  out.tv[i] = float(row.tv);
  out.kl[i] = float(row.kl);
  out.reverse_kl[i] = float(row.statistics.reverse_kl);
  out.target_entropy[i] = float(row.target_entropy);
  out.draft_entropy[i] = float(row.statistics.draft_entropy);
  out.statistics[i] = row.statistics;
}

// Gradients of what was put out of one row.
struct Upstream {
  double tv, kl, reverse_kl, draft_entropy;

  bool zero() const { return tv == 0 && kl == 0 && reverse_kl == 0 && draft_entropy == 0; }
};

// A factor that is 0 takes away what may be infinite.
double times(double factor, double x) { return factor == 0 ? 0 : factor * x; }

Slope make_slope(const RowStatistics& s, const Upstream& up, double temperature) {
  Slope slope;
  slope.pair = make_pair(s, temperature);
  slope.inverse_p = float(1 / s.target_sum);
  slope.inverse_q = float(1 / s.draft_sum);
  slope.log_sum = float(temperature * log(s.draft_sum));
  slope.tv = float(up.tv / temperature);
  slope.kl = float(up.kl / temperature);
  slope.reverse = float(up.reverse_kl / temperature);
  slope.entropy = float(up.draft_entropy / temperature);
  slope.constant = float((up.kl * s.drafted - up.tv * s.excess -
                          times(up.reverse_kl, s.reverse_kl) - up.draft_entropy * s.draft_entropy) /
                         temperature);
  return slope;
}

// One row of the gradient, tile after tile.
class Gradient {
 public:
  Gradient(const RowDivergenceBackwardParams& p, int64_t i)
      : target_(p.target, 0, i), draft_(p.draft, 0, i), ids_(p.draft_ids), dtype_(p.draft.dtype) {
    out_ = static_cast<char*>(p.out) + size() * i * p.draft.columns;
  }

  void fill(float x) const {
    alignas(64) float buffer[kTile];
    std::fill(buffer, buffer + kTile, x);
    each([&](int64_t, int) { return buffer; });
  }

  void write(const Slope& slope) const {
    alignas(64) float buffer_p[kTile], buffer_q[kTile], result[kTile];
    each([&](int64_t first, int n) {
      const float* l_p = target_tile(target_, ids_, first, n, buffer_p);
      divergence().gradient(l_p, draft_.tile(first, n, buffer_q), n, slope, result);
      return result;
    });
  }

 private:
  int64_t size() const { return dtype_ == kFloat32 ? 4 : 2; }

  template <class Tile>
  void each(const Tile& make) const {
    for (int64_t tile = 0; tile < draft_.tiles(); ++tile) {
      const int64_t first = tile * kTile;
      const int n = draft_.tile_size(tile);
      const float* values = make(first, n);
      if (dtype_ == kFloat32) {
        std::copy(values, values + n, reinterpret_cast<float*>(out_) + first);
      } else {
        divergence().narrow(values, dtype_, n, reinterpret_cast<uint16_t*>(out_) + first);
      }
    }
  }

  Row target_, draft_;
  const int64_t* ids_;
  int32_t dtype_;
  char* out_;
};

}  // namespace

void row_divergence(const RowDivergenceParams& p) {
  const bool valid = valid_ids(p.draft_ids, p.draft.columns, p.target.columns);
  const int64_t elements = p.rows * (p.target.columns + p.draft.columns);
  parallel_for(p.rows, elements, p.threads, [&](int64_t i, int) {
    const float temperature = p.temperature[i];
    Result result;
    if (valid && temperature != 0 && valid_temperature(temperature)) {
      result = compare(Row(p.target, 0, i), Row(p.draft, 0, i), p.draft_ids, temperature);
    }
    store(result, p, i);
  });
}

void row_divergence_backward(const RowDivergenceBackwardParams& p) {
  parallel_for(p.rows, 2 * p.rows * p.draft.columns, p.threads, [&](int64_t i, int) {
    const RowStatistics& s = p.statistics[i];
    const Upstream up = {p.tv[i], p.kl[i], p.reverse_kl[i], p.draft_entropy[i]};
    const Gradient row(p, i);
    if (up.zero()) return row.fill(0);
    if (std::isnan(s.excess) || (up.reverse_kl != 0 && std::isinf(s.reverse_kl))) {
      return row.fill(float(kNan));
    }
    row.write(make_slope(s, up, p.temperature[i]));
  });
}

}  // namespace specdiff::cpu
