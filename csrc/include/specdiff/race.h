// Coupled draws: argmin_v E_v / e_v with exponential variates that belong to a sequence's absolute
// position and a token id, whatever the round, the draft and the distribution.
#pragma once

#include "specdiff/accept.h"
#include "specdiff/elementary.h"
#include "specdiff/philox.h"

namespace specdiff {

// Two ids share one call of Philox: 2 pair and 2 pair + 1.
SPECDIFF_HD Counter race_pair(uint64_t seed, int64_t position, int64_t pair) {
  return philox(seed, {uint32_t(pair), uint32_t(position), kCoupled, 0});
}

SPECDIFF_HD uint64_t word_of_pair(const Counter& r, int64_t id) {
  return id & 1 ? r.purpose | uint64_t(r.extra) << 32 : r.slot | uint64_t(r.round) << 32;
}

SPECDIFF_HD uint64_t race_word(uint64_t seed, int64_t position, int64_t id) {
  return word_of_pair(race_pair(seed, position, id >> 1), id);
}

// E = -ln u, u = ((word >> 11) + 1) 2^-53 in (0, 1]
SPECDIFF_HD double exponential(uint64_t word) {
  return 0.0 - log(double(int64_t(word >> 11) + 1) * 0x1p-53);
}

// False if E / weight cannot be below `best`, found without a logarithm: E >= 1 - u, here from the
// upper 52 bits. Also false for a weight of 0.
SPECDIFF_HD bool may_win(uint64_t word, double weight, double best) {
  const double least = exact_double((int64_t(1) << 52) - 1 - int64_t(word >> 12)) * 0x1p-52;
  return least * (1 - 1e-9) < best * weight;
}

}  // namespace specdiff
