// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include "specdiff/platform.h"

namespace specdiff {

enum Purpose : uint32_t { kReveal, kDraftToken, kAccept, kResidual, kBonus, kCoupled };

struct Counter {
  uint32_t slot, round, purpose, extra;
};

SPECDIFF_HD Counter philox(uint64_t key, Counter c) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int i = 0; i < 10; ++i) {
    const uint64_t low = uint64_t(c.slot) * 0xD2511F53u;
    const uint64_t high = uint64_t(c.purpose) * 0xCD9E8D57u;
    c = {uint32_t(high >> 32) ^ c.round ^ k0, uint32_t(high), uint32_t(low >> 32) ^ c.extra ^ k1,
         uint32_t(low)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

SPECDIFF_HD uint64_t random_word(int64_t seed, int64_t slot, int64_t round, uint32_t purpose,
                                 uint32_t step = 0) {
  const Counter r = philox(uint64_t(seed), {uint32_t(slot), uint32_t(round), purpose, step});
  return r.slot | uint64_t(r.round) << 32;
}

}  // namespace specdiff
