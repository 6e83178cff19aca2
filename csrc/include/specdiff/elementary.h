// Logarithm and exponential in fp64, from single rounded operations alone: the same bits anywhere.
#pragma once

#include "specdiff/platform.h"

namespace specdiff {

constexpr double kLn2 = 0.6931471805599453;

// Natural logarithm of a positive normal number, relative error at most 1e-15: x = 2^k z with z in
// [sqrt(1/2), sqrt(2)), ln z = 2 artanh(s), s = (z - 1) / (z + 1).
SPECDIFF_HD double log(double x) {
  const int64_t bits = bit_cast<int64_t>(x);
  const int64_t k = (bits - 0x3fe6a09e667f3bcd) >> 52;
  const double z = bit_cast<double>(bits - int64_t(uint64_t(k) << 52));
  const double s = (z - 1.0) / (z + 1.0);
  const double w = s * s;
  double p = 1.0 / 17;
  for (int n = 15; n >= 1; n -= 2) {
    p = p * w;
    p = p + 1.0 / n;
  }
  p = p * (s + s);
  return double(k) * kLn2 + p;
}

// 2^t for t cut to [-1000, 1000], relative error at most 1e-12.
SPECDIFF_HD double exp2(double t) {
  t = t < -1000.0 ? -1000.0 : t;
  t = t > 1000.0 ? 1000.0 : t;
  int64_t n = int64_t(t);
  n -= double(n) > t ? 1 : 0;
  const double y = (t - double(n)) * kLn2;
  double factorial = 6227020800.0;  // 13!
  double p = 1.0 / factorial;
  for (int k = 13; k >= 1; --k) {
    factorial = factorial / k;
    p = p * y;
    p = p + 1.0 / factorial;
  }
  return p * bit_cast<double>((n + 1023) << 52);
}

}  // namespace specdiff
