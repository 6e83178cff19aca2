// The parts of commit that CPU and CUDA share: which tokens stand, where a position is cached.
#pragma once

#include "specdiff/params.h"

namespace specdiff {

struct Outcome {
  int64_t kept;
  bool finished;
};

SPECDIFF_HD bool stops(const CommitParams& p, int64_t token) {
  for (int64_t s = 0; s < p.stops; ++s) {
    if (p.stop_tokens[s] == token) return true;
  }
  return false;
}

SPECDIFF_HD Outcome outcome(const CommitParams& p, int64_t b) {
  const int64_t* emitted = p.emitted + b * p.columns;
  const int64_t length = p.lengths[b];
  bool done = p.finished && p.finished[b];
  int64_t room = done ? 0 : p.columns;
  if (p.limit) {
    const int64_t allowed = p.limit[b] > length ? p.limit[b] - length : 0;
    room = room < allowed ? room : allowed;
  }
  int64_t kept = 0;
  while (kept < room && emitted[kept] >= 0 && !done) done = stops(p, emitted[kept++]);
  return {kept, done || (p.limit && length + kept >= p.limit[b])};
}

// The outputs may be the inputs' memory.
SPECDIFF_HD void advance(const CommitParams& p, int64_t b) {
  const Outcome found = outcome(p, b);
  const int64_t last = found.kept > 0 ? p.emitted[b * p.columns + found.kept - 1] : -1;
  p.new_lengths[b] = p.lengths[b] + found.kept;
  p.kept[b] = found.kept;
  p.new_finished[b] = found.finished;
  p.last[b] = last;
}

SPECDIFF_HD int64_t blocks_of(int64_t positions, int64_t block_size) {
  return (positions + block_size - 1) / block_size;
}

// The first column of row b's table that it does not need after the round.
SPECDIFF_HD int64_t first_dropped(const CommitParams& p, int64_t b) {
  if (p.release && p.new_finished[b]) return 0;
  const int64_t length = p.new_lengths[b];
  return length < 0 ? 0 : blocks_of(length, p.pages.block_size);
}

// Offset in bytes of position t of row b within a cache; -1 if it has none.
SPECDIFF_HD int64_t entry(const Caches& caches, const Pages& pages, int64_t b, int64_t t) {
  if (t < 0) return -1;
  if (!pages.tables) {
    if (t >= caches.positions) return -1;
    return b * caches.outer_stride + t * caches.position_stride;
  }
  const int64_t column = t / pages.block_size;
  if (column >= pages.columns) return -1;
  const int64_t block = pages.tables[b * pages.columns + column];
  if (block < 0 || block >= caches.outer) return -1;
  return block * caches.outer_stride + t % pages.block_size * caches.position_stride;
}

}  // namespace specdiff
