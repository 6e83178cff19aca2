// The accept rule and the residual, in fp64 with single roundings.
#pragma once

#include "specdiff/platform.h"

namespace specdiff {

// e as a double, exact for 0 <= e < 2^52; vectorises where int64 -> double does not.
SPECDIFF_HD double exact_double(int64_t e) {
  return bit_cast<double>(e | 0x4330000000000000) - 0x1p52;
}

SPECDIFF_HD double inverse(int64_t total) { return 1.0 / double(total); }

SPECDIFF_HD double probability(int64_t e, double inverse_total) {
  return exact_double(e) * inverse_total;
}

SPECDIFF_HD double unit(uint64_t word) { return double(int64_t(word >> 11)) * 0x1p-53; }

// Strict: a token of probability 0 is never accepted, not even by u = 0.
SPECDIFF_HD bool accepts(uint64_t word, double p, double q) { return unit(word) * q < p; }

// int64(max(p - q, 0) 2^60), exact: the mantissa shifted by the exponent.
SPECDIFF_HD int64_t residual_weight(double p, double q) {
  const double difference = p - q;
  const double excess = difference > 0x1p-62 ? difference : 0x1p-62;  // below 2^-60 it is 0
  const uint64_t bits = bit_cast<uint64_t>(excess);
  const uint64_t mantissa = (bits & 0xfffffffffffff) | uint64_t(1) << 52;
  return int64_t(mantissa << 8 >> (1023 - (bits >> 52)));
}

enum Lenience : int32_t { kLenience, kAdditive, kEnsemble };

SPECDIFF_HD bool valid_amount(int32_t lenience, double amount) {
  if (lenience == kLenience) return amount > 0 && amount <= 1;
  return amount >= 0 && (lenience == kAdditive || amount <= 1);
}

// p' = max(p, (q_share q + p_share p + more) / divisor) where p > 0, else 0: p / amount,
// p + amount, or (1 - amount) q + amount p, since the operations that a kind does not need are
// exact.
struct Raise {
  double q_share, p_share, more, divisor;
};

SPECDIFF_HD Raise raise_by(int32_t lenience, double amount) {
  if (lenience == kLenience) return {0, 1, 0, amount};
  if (lenience == kAdditive) return {0, 1, amount, 1};
  return {1 - amount, amount, 0, 1};
}

SPECDIFF_HD double raised(double p, double q, const Raise& by) {
  const double from_q = by.q_share * q, from_p = by.p_share * p;
  const double sum = from_q + from_p;
  const double more = (sum + by.more) / by.divisor;
  return p > 0 ? (more > p ? more : p) : 0;
}

// int64(max(min(q, p') - p, 0) 2^60): what a token adds to the bias of its position.
SPECDIFF_HD int64_t bias_weight(double p, double q, const Raise& by) {
  const double chance = raised(p, q, by);
  return residual_weight(q < chance ? q : chance, p);
}

}  // namespace specdiff
