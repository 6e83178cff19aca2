// commit: a launch for each geometry of caches whose entries move, then one.
//
// 1. move: along the accepted path, in all caches of a geometry. It finds by itself what a row
//    keeps, since 2 may write over the lengths.
// 2. advance_rows: lengths; or roll_back, one block: lengths, then what pages hold behind them.
#include <algorithm>

#include "block.h"
#include "specdiff/commit.h"

namespace specdiff::cuda {
namespace {

constexpr int kGroup = 8;  // loads that a thread has under way

__global__ void __launch_bounds__(kThreads) advance_rows(CommitParams p) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b < p.batch) advance(p, b);
}

// --- a tree's path ---

// Caches of one geometry, `count` of them; the kernel's parameters hold their addresses.
struct Moves {
  static constexpr int kMost = 256;
  Caches caches;
  int64_t count, words, parts;  // words of a head; warps for a row
  char* data[kMost];
};
static_assert(sizeof(CommitParams) + sizeof(Moves) <= 4096);

// Offsets within a cache; a target of -1: nothing moves.
struct Step {
  int64_t source, target;
};

__device__ Step step(const CommitParams& p, const Caches& caches, int64_t b, int64_t i) {
  const int64_t length = p.lengths[b];
  const int64_t source = entry(caches, p.pages, b, length + p.path[b * p.columns + i]);
  const int64_t target = entry(caches, p.pages, b, length + i);
  return {source, source < 0 || source == target ? -1 : target};
}

// A warp moves 32 words of each entry of a row, a lane always the same one. Ascending, loads before
// stores: a target lies before the sources that are still to be read.
template <class Word>
__global__ void __launch_bounds__(kThreads, 2) move(CommitParams p, Moves m) {
  const int64_t index = int64_t(blockIdx.x) * kWarps + warp(), row = index / m.parts;
  if (row >= m.count * p.batch) return;
  const int64_t b = row % p.batch, word = index % m.parts * 32 + lane(), head = word / m.words;
  const bool exists = head < m.caches.heads;
  char* const data = m.data[row / p.batch] + head * m.caches.head_stride;
  const auto at = [&](int64_t offset) {
    return reinterpret_cast<Word*>(data + offset) + word % m.words;
  };
  const int64_t kept = outcome(p, b).kept;
  for (int64_t first = 0; first < kept; first += 32) {
    const int64_t i = first + lane();
    const Step mine = i < kept ? step(p, m.caches, b, i) : Step{-1, -1};
    for (int k = 0; k < 32 && first + k < kept; k += kGroup) {
      Word held[kGroup];
      int64_t targets[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int64_t source = __shfl_sync(kAll, mine.source, k + j);
        targets[j] = __shfl_sync(kAll, mine.target, k + j);
        if (exists && targets[j] >= 0) held[j] = *at(source);
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (exists && targets[j] >= 0) *at(targets[j]) = held[j];
      }
    }
  }
}

// Of 16 bytes, or what divides all addresses and strides.
int64_t word_size(const Caches& caches) {
  uint64_t all =
      16 | caches.bytes | caches.outer_stride | caches.position_stride | caches.head_stride;
  for (int64_t i = 0; i < caches.count; ++i) all |= reinterpret_cast<uintptr_t>(caches.data[i]);
  return int64_t(all & -all);
}

template <class Word>
void move_words(const CommitParams& p, const Caches& caches, const Queue& queue) {
  const int64_t words = caches.bytes / int64_t(sizeof(Word));
  const int64_t parts = (caches.heads * words + 31) / 32;
  for (int64_t first = 0; first < caches.count; first += Moves::kMost) {
    const int64_t count = std::min<int64_t>(caches.count - first, Moves::kMost);
    Moves m{caches, count, words, parts, {}};
    std::copy_n(caches.data + first, count, m.data);
    launch(move<Word>, (count * p.batch * parts + kWarps - 1) / kWarps, queue, p, m);
  }
}

void move_all(const CommitParams& p, const Caches& caches, const Queue& queue) {
  switch (word_size(caches)) {
    case 16:
      return move_words<uint4>(p, caches, queue);
    case 8:
      return move_words<uint64_t>(p, caches, queue);
    case 4:
      return move_words<uint32_t>(p, caches, queue);
    case 2:
      return move_words<uint16_t>(p, caches, queue);
    default:
      return move_words<uint8_t>(p, caches, queue);
  }
}

// --- pages ---

// The table entries behind what sequences keep: a warp has those of some successive sequences, and
// a lane the same ones at each visit.
class Dropped {
 public:
  explicit __device__ Dropped(const CommitParams& p)
      : p_(p), rows_((p.batch + kWarps - 1) / kWarps) {}

  // Counts them off. Those that name no block become -1.
  __device__ void count_off() {
    const Pages& pages = p_.pages;
    for (int64_t r = 0; r < rows_; ++r) {
      unsigned end = 0;
      visit_row(r, pages.columns, [&](int64_t column, int64_t at, int32_t block) {
        if (0 <= block && block < pages.blocks) {
          add(&pages.references[block], -1);
          end = unsigned(column) + 1;
        } else if (block != -1) {
          pages.tables[at] = -1;
        }
      });
      end = __reduce_max_sync(kAll, end);
      if (lane() == r % 32 && end > end_) end_ = end;
    }
  }

  // visit(index in tables, block), by all lanes together; -1: no block. Up to the last one that
  // count_off found.
  template <class Visit>
  __device__ void visit(Visit visit) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t end = __shfl_sync(kAll, end_, int(r % 32));
      visit_row(r, end, [&](int64_t, int64_t at, int32_t block) { visit(at, block); });
    }
  }

 private:
  // visit(column, index in tables, block)
  template <class Visit>
  __device__ void visit_row(int64_t r, int64_t end, Visit visit) const {
    const int64_t b = warp() * rows_ + r, row = b * p_.pages.columns;
    if (b >= p_.batch) return;
    for (int64_t first = first_dropped(p_, b); first < end; first += 32 * kGroup) {
      const int64_t mine = first + lane();
      int32_t blocks[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        blocks[k] = mine + 32 * k < end ? p_.pages.tables[row + mine + 32 * k] : -1;
      }
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (first + 32 * k < end) visit(mine + 32 * k, row + mine + 32 * k, blocks[k]);
      }
    }
  }

  const CommitParams& p_;
  const int64_t rows_;
  int64_t end_ = 0;  // of the columns that name blocks, in this lane's rows: r % 32
};

// What is dropped and held by nobody stays in the tables; all else that is dropped becomes -1.
__device__ void keep_free(const Dropped& dropped, const Pages& pages) {
  dropped.visit([&](int64_t at, int32_t block) {
    if (block >= 0 && pages.references[block] != 0) pages.tables[at] = -1;
  });
}

// Of several entries of a block the last one stays. Returns how many do in this warp's share.
__device__ int64_t keep_last(const Dropped& dropped, const Pages& pages) {
  const auto claim = [](int64_t at) { return ~int32_t(at); };  // below 0; the last one is lowest
  dropped.visit([&](int64_t at, int32_t block) {
    if (block >= 0) lower(&pages.references[block], claim(at));
  });
  __syncthreads();
  int64_t kept = 0;
  dropped.visit([&](int64_t at, int32_t block) {
    const bool last = block >= 0 && pages.references[block] == claim(at);
    if (block >= 0 && !last) pages.tables[at] = -1;
    kept += __popc(__ballot_sync(kAll, last));
  });
  return kept;
}

// Moves what stayed to the stack, from `place` on.
__device__ void list(const Dropped& dropped, const Pages& pages, int64_t place) {
  dropped.visit([&](int64_t at, int32_t block) {
    const unsigned all = __ballot_sync(kAll, block >= 0);
    const int64_t own = place + __popc(all & ((1u << lane()) - 1));
    place += __popc(all);
    if (block < 0) return;
    if (own < pages.blocks) pages.free[own] = block;
    pages.references[block] = 0;
    pages.tables[at] = -1;
  });
}

// Drops the blocks behind what each row keeps. Those that nobody holds then are listed as free,
// each where it was dropped last.
__device__ void give_back(const CommitParams& p, Shared& shared) {
  const Pages& pages = p.pages;
  Dropped dropped(p);
  dropped.count_off();
  __syncthreads();
  keep_free(dropped, pages);
  __syncthreads();
  const int64_t freed = keep_last(dropped, pages);
  if (lane() == 0) shared.of_warp[warp()] = freed;
  int64_t count = *pages.count, place = 0;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp()) place = count;
    count += shared.of_warp[w];
  }
  list(dropped, pages, place);
  if (threadIdx.x == 0) *pages.count = int32_t(count);
}

__global__ void __launch_bounds__(kThreads, 1) roll_back(CommitParams p) {
  SPECDIFF_SHARED(Shared, shared);
  for (int64_t b = threadIdx.x; b < p.batch; b += kThreads) advance(p, b);
  __syncthreads();
  give_back(p, shared);
}

}  // namespace

void commit(const CommitParams& p, const Queue& queue) {
  if (p.batch * p.pages.columns > INT32_MAX) {
    throw std::invalid_argument("CUDA: too many entries of tables for one launch");
  }
  const DeviceGuard guard(queue.device);
  for (int g = 0; p.path && g < p.geometries; ++g) move_all(p, p.caches[g], queue);
  if (p.pages.tables) return launch(roll_back, p.batch > 0, queue, p);
  launch(advance_rows, (p.batch + kThreads - 1) / kThreads, queue, p);
}

}  // namespace specdiff::cuda
