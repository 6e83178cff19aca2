#include "specdiff/commit.h"

#include <cstring>

#include "ops.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

// Moves what row b keeps of its tree to its first positions, in a cache.
void move(const CommitParams& p, const Caches& caches, char* cache, int64_t b) {
  const int64_t kept = p.kept[b], start = p.new_lengths[b] - kept;
  const int64_t* path = p.path + b * p.columns;
  for (int64_t i = 0; i < kept; ++i) {
    // ascending: a target lies before the sources that are still to be read
    const int64_t source = entry(caches, p.pages, b, start + path[i]);
    const int64_t target = entry(caches, p.pages, b, start + i);
    if (source < 0 || target < 0 || source == target) continue;
    for (int64_t head = 0; head < caches.heads; ++head) {
      char* const at = cache + head * caches.head_stride;
      std::memcpy(at + target, at + source, caches.bytes);
    }
  }
}

// Drops the blocks behind what each row keeps. Those that nobody holds then are listed as free,
// each where it was dropped last.
void give_back(const CommitParams& p) {
  constexpr int32_t kFree = INT32_MIN;  // references of a block that is to be listed
  const Pages& pages = p.pages;
  const auto known = [&](int32_t block) { return block >= 0 && block < pages.blocks; };
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t j = first_dropped(p, b); j < pages.columns; ++j) {
      const int32_t block = pages.tables[b * pages.columns + j];
      if (known(block)) --pages.references[block];
    }
  }
  for (int64_t b = p.batch; b-- > 0;) {
    const int64_t first = first_dropped(p, b);
    for (int64_t j = pages.columns; j-- > first;) {
      int32_t& block = pages.tables[b * pages.columns + j];
      if (known(block) && pages.references[block] == 0) {
        pages.references[block] = kFree;
      } else {
        block = -1;
      }
    }
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t j = first_dropped(p, b); j < pages.columns; ++j) {
      int32_t& block = pages.tables[b * pages.columns + j];
      if (block < 0) continue;
      pages.references[block] = 0;
      if (*pages.count < pages.blocks) pages.free[*pages.count] = block;
      ++*pages.count;
      block = -1;
    }
  }
}

}  // namespace

void commit(const CommitParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) advance(p, b);
  for (int g = 0; p.path && g < p.geometries; ++g) {
    const Caches& caches = p.caches[g];
    const int64_t items = caches.count * p.batch;
    const int64_t work = items * p.columns * caches.heads * caches.bytes;
    parallel_for(items, work / 4, p.threads, [&](int64_t item, int) {
      move(p, caches, caches.data[item / p.batch], item % p.batch);
    });
  }
  if (p.pages.tables) give_back(p);
}

}  // namespace specdiff::cpu
