// The accept rule and the residual, in fp64 with single roundings.
#pragma once

#include "specdiff/platform.h"

namespace specdiff {

// e as a double, exact for 0 <= e < 2^52; vectorises where int64 -> double does not.
SPECDIFF_HD double exact_double(int64_t e) {
  return bit_cast<double>(e | 0x4330000000000000) - 0x1p52;
}

// int64(x 2^60) for x in [0, 1], exact, in two halves that fit 32-bit conversions.
SPECDIFF_HD int64_t fixed60(double x) {
  const double scaled = x * 0x1p30;
  const int32_t high = int32_t(scaled);
  const int32_t low = int32_t((scaled - double(high)) * 0x1p30);
  return (int64_t(high) << 30) + low;
}

SPECDIFF_HD double inverse(int64_t total) { return 1.0 / double(total); }

SPECDIFF_HD double probability(int64_t e, double inverse_total) {
  return exact_double(e) * inverse_total;
}

SPECDIFF_HD double unit(uint64_t word) { return double(int64_t(word >> 11)) * 0x1p-53; }

// Strict: a token of probability 0 is never accepted, not even by u = 0.
SPECDIFF_HD bool accepts(uint64_t word, double p, double q) { return unit(word) * q < p; }

SPECDIFF_HD int64_t residual_weight(double p, double q) {
  const double excess = p - q;
  return fixed60(excess > 0 ? excess : 0);
}

}  // namespace specdiff
