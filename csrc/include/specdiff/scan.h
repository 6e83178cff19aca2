// The integer draw: the first v with e[0] + ... + e[v] > r, r = mulhi(word, sum e).
#pragma once

#include "specdiff/platform.h"

namespace specdiff {

// High 64 bits of word * total, for total < 2^63.
SPECDIFF_HD int64_t mulhi(uint64_t word, int64_t total) {
#ifdef __CUDA_ARCH__
  return int64_t(__umul64hi(word, uint64_t(total)));
#else
  const uint64_t u1 = word >> 32, u0 = word & 0xffffffffu;
  const uint64_t z1 = uint64_t(total) >> 32, z0 = uint64_t(total) & 0xffffffffu;
  const uint64_t w = u1 * z0 + (u0 * z0 >> 32);
  const uint64_t x = u0 * z1 + (w & 0xffffffffu);
  return int64_t(u1 * z1 + (w >> 32) + (x >> 32));
#endif
}

// First index whose running sum exceeds r, or n; r is left as what remains of it.
SPECDIFF_HD int64_t scan(const int64_t* e, int64_t n, int64_t& r) {
  for (int64_t v = 0; v < n; ++v) {
    if (e[v] > r) return v;
    r -= e[v];
  }
  return n;
}

}  // namespace specdiff
