// Compiled once for each instruction set, with SPECDIFF_ISA naming it.
//
// A query's sums go over its own entries in the order of their positions: blocks of 64 positions,
// each with the largest score so far, and spans of 256, whose results are merged one after another.
// Blocks and spans begin at fixed positions, counted from the row's first entry, so that nothing
// depends on what else is computed, on who computes it, or on where an entry lies in memory.
#include <limits>

#include "forward.h"
#include "tile_product.h"

namespace specdiff::cpu {
namespace {

constexpr int kBlock = 64;  // positions
constexpr int kAhead = 16;  // positions from the key that is read to the one that is asked for
constexpr int kScored = 3;  // rows that meet keys together
constexpr int64_t kFar = int64_t(1) << 61;  // lengths beyond it count as that: no sum overflows
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Entries of a block of positions, one address each.
struct Block {
  const float* rows[kBlock];
  uint64_t there;  // which there are
};

// Rows of a tile are pairs of a query and a head. Positions count from the first entry seen.
struct Work {
  alignas(64) float query[kTileRows][kMostSize];
  alignas(64) float weights[kTileRows][kBlock];
  alignas(64) float sums[kTileRows][kMostSize];    // of the span
  alignas(64) float totals[kTileRows][kMostSize];  // of all spans so far
  alignas(64) float scores[kTileRows][kBlock];
  alignas(64) float copies[2][kBlock][kMostSize];  // of keys and of values
  Block keys, values;
  float most[kTileRows], total[kTileRows], span_most[kTileRows], span_total[kTileRows];
  int64_t low[kTileRows], high[kTileRows];  // positions that a row sees
  bool seen[kTileRows];                     // whether a row sees anything of the span
};

// Where the entries of one row lie.
struct Entries {
  const AttentionParams& p;
  const char *keys, *values;
  const int32_t* table;
  int64_t start;        // slot of position 0
  int64_t prefix;       // entries before the queries, in positions
  const int64_t* path;  // of a tree: the query at each depth; null: slots follow positions

  int64_t slot(int64_t position) const {
    return path && position >= prefix ? start + prefix + path[position - prefix] : start + position;
  }

  // null if there is none
  template <class T>
  const T* row(int64_t slot, bool is_key) const {
    const KeyValues& c = p.cache;
    const T* base = reinterpret_cast<const T*>(is_key ? keys : values);
    const int64_t step = is_key ? c.key_position : c.value_position;
    if (slot >= c.slots) return nullptr;
    if (!table) return base + slot * step;
    const int64_t block = table[slot / c.block_size];
    if (block < 0 || block >= c.blocks) return nullptr;
    return base + block * (is_key ? c.key_row : c.value_row) + slot % c.block_size * step;
  }
};

// Keys or values of positions first, ..., first + count - 1 as f32: where they lie, if they lie so
// and no vector of `whole` columns reaches beyond them, else as copies; zeros if there are none.
template <class T>
void find(const Entries& entries, int64_t first, int64_t count, bool is_key, int64_t whole,
          float (*copies)[kMostSize], Block& block) {
  const int64_t size = entries.p.size;
  const bool in_place = std::is_same_v<T, float> && size % whole == 0;
  block.there = ~uint64_t(0);
  if (in_place && !entries.table && !entries.path) {
    const KeyValues& c = entries.p.cache;
    const float* from = reinterpret_cast<const float*>(entries.row<T>(entries.slot(first), is_key));
    for (int64_t j = 0; j < count; ++j) {
      block.rows[j] = from + j * (is_key ? c.key_position : c.value_position);
    }
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    const T* from = entries.row<T>(entries.slot(first + j), is_key);
    block.rows[j] = copies[j];
    if (in_place && from) {
      block.rows[j] = reinterpret_cast<const float*>(from);
      continue;
    }
    if (!from) block.there &= ~(uint64_t(1) << j);
    for (int64_t d = 0; d < size; d += kLanes) {
      const int64_t left = std::min<int64_t>(size - d, kLanes);
      store(copies[j] + d, from ? load_some(from + d, left) : Floats{});
    }
  }
}

// Products of C rows of queries and K keys, summed up in lanes: sums [C][K].
template <int C, int K>
inline void products_of(const float* const* keys, const float (*query)[kMostSize], int64_t size,
                        Floats (&sums)[C][K]) {
  each<C>([&](auto c)
              SPECDIFF_INLINE { each<K>([&](auto k) SPECDIFF_INLINE { sums[c][k] = Floats{}; }); });
  for (int64_t d = 0; d < size; d += kLanes) {
    Floats key[K];
    each<K>([&](auto k) SPECDIFF_INLINE { key[k] = load(keys[k] + d); });
    each<C>([&](auto c) SPECDIFF_INLINE {
      const Floats x = load(query[c] + d);
      each<K>([&](auto k) SPECDIFF_INLINE { sums[c][k] = sums[c][k] + key[k] * x; });
    });
  }
}

// Scores of C rows from c on against kLanes keys, from position j of the block on.
template <int C>
void score(const float* const* keys, int64_t size, int c, int j, Work& t) {
  constexpr int K = C == 1 ? kLanes : std::min(kLanes, kBytes == 64 ? 8 : 4);
  Floats sums[C][kLanes];
  for (int k = 0; k < kLanes; k += K) {
    Floats part[C][K];
    products_of(keys + k, t.query + c, size, part);
    for (int i = 0; i < C; ++i) std::copy(part[i], part[i] + K, sums[i] + k);
  }
  for (int i = 0; i < C; ++i) {
    transpose(sums[i]);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) sums[i][lane] = sums[i][lane] + sums[i][lane + half];
    }
    store(t.scores[c + i] + j, sums[i][0]);
  }
}

using Score = void (*)(const float* const*, int64_t, int, int, Work&);
template <int... C>
constexpr Score score_of(int rows, std::integer_sequence<int, C...>) {
  constexpr Score scores[] = {score<C + 1>...};
  return scores[rows - 1];
}

// Has the values of some positions, and keys of later ones, on their way.
void ask_ahead(const Entries& entries, int first, int end, const Work& t) {
  const int64_t bytes = entries.p.size * sizeof(float);
  const int64_t further = kAhead * entries.p.cache.key_position * sizeof(float);
  for (int i = first; i < end; ++i) {
    const char* value = reinterpret_cast<const char*>(t.values.rows[i]);
    const char* key = reinterpret_cast<const char*>(t.keys.rows[i]) + further;
    for (int64_t byte = 0; byte < bytes; byte += kLine) {
      __builtin_prefetch(value + byte, 0, 2);
      if (!entries.table) __builtin_prefetch(key + byte);
    }
  }
}

inline Ints lane_numbers() {
  Ints numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

// Weights of a row from its scores at positions low <= j < high of a block. Returns whether it sees
// any of them.
bool weigh(int c, int low, int high, uint64_t there, float softcap, int64_t size, Work& t) {
  constexpr int kAll = kBlock / kLanes;
  Floats s[kAll];
  Floats most = all(-kInfinity);
  for (int i = 0; i < kAll; ++i) {
    const int first = i * kLanes;
    if (first >= high || first + kLanes <= low) {
      s[i] = all(-kInfinity);
      continue;
    }
    s[i] = load(t.scores[c] + first);
    if (softcap > 0) s[i] = tanh_of(s[i] / softcap) * softcap;
    const Ints j = lane_numbers() + first;
    s[i] = (j >= low) & (j < high) ? s[i] : all(-kInfinity);
    if (there != ~uint64_t(0)) {
      for (int lane = 0; lane < kLanes; ++lane) {
        if (!(there >> (first + lane) & 1)) s[i][lane] = -kInfinity;
      }
    }
    most = s[i] > most ? s[i] : most;
  }
  float high_score = t.span_most[c];
  for (int lane = 0; lane < kLanes; ++lane) {
    high_score = most[lane] > high_score ? most[lane] : high_score;
  }
  if (there != ~uint64_t(0) && high_score == -kInfinity) return false;
  const float kept = exponential(all(t.span_most[c] - high_score))[0];
  Floats total{};
  for (int i = 0; i < kAll; ++i) {
    const int first = i * kLanes;
    Floats w{};
    if (first < high && first + kLanes > low) {
      const Ints j = lane_numbers() + first;
      w = exponential(s[i] - high_score);
      w = (j >= low) & (j < high) ? w : Floats{};
    }
    store(t.weights[c] + first, w);
    total = total + w;
  }
  t.span_total[c] = t.span_total[c] * kept + total_of(total);
  if (kept != 1.0f) {
    for (int64_t d = 0; d < size; d += kLanes) {
      store(t.sums[c] + d, load(t.sums[c] + d) * kept);
    }
  }
  t.span_most[c] = high_score;
  t.seen[c] = true;
  return true;
}

// Adds to the sums of C rows their weights times values of positions j, ..., end - 1 of a block.
template <int C>
void mix(int64_t j, int64_t end, int64_t size, int c, Work& t) {
  constexpr int kFits = 12 / (C * kVectors);  // packs of columns whose sums fit into registers
  constexpr int kWide = kFits >= 4 ? 4 : kFits >= 2 ? 2 : 1;
  const auto columns = [&](int64_t d, auto packs) SPECDIFF_INLINE {
    constexpr int V = kVectors * packs;
    Floats sums[C][V];
    each<C>([&](auto i) SPECDIFF_INLINE {
      each<V>([&](auto v) SPECDIFF_INLINE { sums[i][v] = load(t.sums[c + i] + d + v * kLanes); });
    });
    for (int64_t n = j; n < end; ++n) {
      const float* row = t.values.rows[n] + d;
      Floats value[V];
      each<V>([&](auto v) SPECDIFF_INLINE { value[v] = load(row + v * kLanes); });
      each<C>([&](auto i) SPECDIFF_INLINE {
        const float weight = t.weights[c + i][n];
        each<V>([&](auto v) SPECDIFF_INLINE { sums[i][v] = sums[i][v] + value[v] * weight; });
      });
    }
    each<C>([&](auto i) SPECDIFF_INLINE {
      each<V>([&](auto v) SPECDIFF_INLINE { store(t.sums[c + i] + d + v * kLanes, sums[i][v]); });
    });
  };
  int64_t d = 0;
  for (; d + kWide * kPack <= size; d += kWide * kPack) {
    columns(d, std::integral_constant<int, kWide>{});
  }
  for (; d < size; d += kPack) columns(d, std::integral_constant<int, 1>{});
}

using Mix = void (*)(int64_t, int64_t, int64_t, int, Work&);
template <int... C>
constexpr Mix mix_of(int rows, std::integer_sequence<int, C...>) {
  constexpr Mix mixes[] = {mix<C + 1>...};
  return mixes[rows - 1];
}

// Rows a <= c < b of a tile and the positions of one block.
template <class T>
void attend_block(const Entries& entries, int64_t first, int a, int b, Work& t) {
  int64_t count = 0;
  bool any = false;
  for (int c = a; c < b; ++c) {
    if (t.high[c] > first && t.low[c] < first + kBlock) any = true;
    count = std::max(count, std::min<int64_t>(t.high[c] - first, kBlock));
  }
  if (!any) return;
  const int64_t size = entries.p.size;
  find<T>(entries, first, count, true, kLanes, t.copies[0], t.keys);
  find<T>(entries, first, count, false, kPack, t.copies[1], t.values);
  for (int j = int(count); j % kLanes != 0; ++j) t.keys.rows[j] = t.keys.rows[count - 1];
  for (int j = 0; j < count; j += kLanes) {
    ask_ahead(entries, j, int(std::min<int64_t>(j + kLanes, count)), t);
    for (int c = a; c < b;) {
      const int rows = std::min(b - c, kScored);
      score_of(rows, std::make_integer_sequence<int, kScored>{})(t.keys.rows + j, size, c, j, t);
      c += rows;
    }
  }
  int64_t low[kTileRows], high[kTileRows];
  for (int c = a; c < b; ++c) {
    low[c] = std::max<int64_t>(t.low[c] - first, 0);
    high[c] = std::min<int64_t>(t.high[c] - first, kBlock);
    if (low[c] >= high[c] ||
        !weigh(c, int(low[c]), int(high[c]), t.keys.there, entries.p.softcap, size, t)) {
      low[c] = high[c] = 0;
    }
  }
  // rows that see something, a few at a time, together where all see the same
  for (int c = a; c < b;) {
    if (high[c] == 0) {
      ++c;
      continue;
    }
    int end = c;
    int64_t from = 0, to = kBlock;
    while (end < b && end - c < kMostX && high[end] != 0) {
      from = std::max(from, low[end]);
      to = std::min(to, high[end]);
      ++end;
    }
    if (from >= to) from = to = 0;  // nothing in common
    for (int i = c; i < end; ++i) {
      if (low[i] < from) mix<1>(low[i], from, size, i, t);
    }
    if (from < to) {
      mix_of(end - c, std::make_integer_sequence<int, kMostX>{})(from, to, size, c, t);
    }
    for (int i = c; i < end; ++i) {
      const int64_t next = from < to ? to : low[i];
      if (next < high[i]) mix<1>(next, high[i], size, i, t);
    }
    c = end;
  }
}

struct Place {
  int64_t batch, head, tile;  // head: of keys
  int64_t first, last;        // rows of the head: query * group + head in the group
};

Place place_of(const AttentionParams& p, const AttentionPlan& plan, int64_t item) {
  const int64_t rows = p.queries * (p.heads / p.kv_heads);
  Place place;
  place.tile = item % plan.tiles;
  place.head = item / plan.tiles % p.kv_heads;
  place.batch = item / plan.tiles / p.kv_heads;
  place.first = rows * place.tile / plan.tiles;
  place.last = rows * (place.tile + 1) / plan.tiles;
  return place;
}

void begin_span(int rows, int64_t size, Work& t) {
  for (int c = 0; c < rows; ++c) {
    t.span_most[c] = -kInfinity;
    t.span_total[c] = 0;
    t.seen[c] = false;
    std::fill(t.sums[c], t.sums[c] + (size + kPack - 1) / kPack * kPack, 0.0f);
  }
}

// A span's result after those before it.
SPECDIFF_ONE_COPY void merge_span(float span_most, float span_total, const float* sums,
                                  int64_t size, float& most, float& total, float* totals) {
  const float high = span_most > most ? span_most : most;
  const float kept = exponential(all(most - high))[0];
  const float added = exponential(all(span_most - high))[0];
  total = total * kept + span_total * added;
  for (int64_t d = 0; d < size; d += kLanes) {
    store(totals + d, load(totals + d) * kept + load(sums + d) * added);
  }
  most = high;
}

SPECDIFF_ONE_COPY void write(const AttentionParams& p, const AttentionPlan& plan,
                             const Place& place, int64_t row, float most, float total,
                             const float* totals) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t head = place.head * group + row % group;
  float scale = 1.0f;
  if (p.sinks) {  // one more logit, without a value
    const float sink = p.sinks[head], high = sink > most ? sink : most;
    scale = exponential(all(most - high))[0];
    total = total * scale + exponential(all(sink - high))[0];
  }
  if (most == -kInfinity && !(total != total)) total = 0;  // nothing seen
  scale = total == 0 ? 0.0f : scale / total;
  const int64_t m = place.batch * p.queries + row / group, column = head * p.size;
  for (int64_t d = 0; d < p.size;) {
    float* to = at(plan.out, m, column + d);
    const int64_t run = plan.out.length - (column + d) % plan.out.length;
    const int64_t end = std::min(p.size - d, run);
    for (int64_t i = 0; i < end; i += kLanes) {
      const int64_t left = std::min<int64_t>(end - i, kLanes);
      store_some(to + i, load_some(totals + d + i, left) * scale, left);
    }
    d += end;
  }
}

float* partial_of(const AttentionParams& p, const AttentionPlan& plan, int64_t item, int64_t span) {
  return plan.partial + (item * plan.spans + span) * kTileRows * (p.size + 2);
}

template <class T>
void attend_tile(const AttentionParams& p, const AttentionPlan& plan, int64_t item, Work& t) {
  const int64_t only = plan.split ? item % plan.spans : -1;
  const Place place = place_of(p, plan, plan.split ? item / plan.spans : item);
  const int64_t group = p.heads / p.kv_heads, b = place.batch, size = p.size;
  const int rows = int(place.last - place.first);
  const int64_t length = std::min(std::max<int64_t>(p.lengths[b], 0), kFar);
  const int64_t start = p.first ? std::min(std::max<int64_t>(p.first[b], 0), kFar) : 0;
  const int64_t bytes = sizeof(T), slots = std::max<int64_t>(p.cache.slots - start, 0);
  const int64_t key_row = p.cache.tables ? 0 : b * p.cache.key_row;
  const int64_t value_row = p.cache.tables ? 0 : b * p.cache.value_row;
  Entries entries{p,
                  p.cache.keys + (key_row + place.head * p.cache.key_head) * bytes,
                  p.cache.values + (value_row + place.head * p.cache.value_head) * bytes,
                  p.cache.tables ? p.cache.tables + b * p.cache.columns : nullptr,
                  start,
                  length - start,
                  nullptr};
  const int64_t window = std::min(p.window, 2 * kFar);
  int64_t high = 0;
  for (int c = 0; c < rows; ++c) {
    const int64_t row = place.first + c, query = row / group;
    const float* from = p.query + b * p.query_row + query * p.query_query +
                        (place.head * group + row % group) * p.query_head;
    float* to = t.query[c];
    for (int64_t d = 0; d < size; ++d) to[d] = from[d] * p.scale;
    std::fill(to + size, to + (size + kPack - 1) / kPack * kPack, 0.0f);
    const int64_t depth = plan.depths ? plan.depths[b * p.queries + query] : query;
    const int64_t position = entries.prefix + depth;
    t.low[c] = window > 0 ? std::max<int64_t>(position - window + 1, 0) : 0;
    const int64_t end = p.limits ? p.limits[b * p.queries + query] - start : position + 1;
    t.high[c] = std::min(end, slots);
    high = std::max(high, t.high[c]);
    t.most[c] = -kInfinity;
    t.total[c] = 0;
    std::fill(t.totals[c], t.totals[c] + (size + kPack - 1) / kPack * kPack, 0.0f);
  }
  const int64_t spans = (high + kSpan - 1) / kSpan;
  for (int64_t span = only < 0 ? 0 : only; span < (only < 0 ? spans : only + 1); ++span) {
    begin_span(rows, size, t);
    const int64_t end = std::min((span + 1) * kSpan, high);
    for (int64_t first = span * kSpan; first < end; first += kBlock) {
      if (!plan.paths || first + kBlock <= entries.prefix) {
        entries.path = nullptr;
        attend_block<T>(entries, first, 0, rows, t);
        continue;
      }
      for (int c = 0; c < rows;) {  // queries of a tree one by one
        const int64_t query = (place.first + c) / group;
        const int to = int(std::min((query + 1) * group - place.first, int64_t(rows)));
        entries.path = plan.paths + (b * p.queries + query) * p.queries;
        attend_block<T>(entries, first, c, to, t);
        c = to;
      }
    }
    for (int c = 0; c < rows; ++c) {
      if (only >= 0) {
        float* partial = partial_of(p, plan, item / plan.spans, only) + c * (size + 2);
        partial[0] = t.seen[c] ? t.span_most[c] : -kInfinity;
        partial[1] = t.seen[c];
        if (!t.seen[c]) continue;
        partial[1] = t.span_total[c];
        std::copy(t.sums[c], t.sums[c] + size, partial + 2);
      } else if (t.seen[c]) {
        merge_span(t.span_most[c], t.span_total[c], t.sums[c], size, t.most[c], t.total[c],
                   t.totals[c]);
      }
    }
  }
  if (only >= 0) return;
  for (int c = 0; c < rows; ++c) {
    write(p, plan, place, place.first + c, t.most[c], t.total[c], t.totals[c]);
  }
}

void attend(const AttentionParams& p, const AttentionPlan& plan, int64_t item) {
  thread_local Work t;
  if (p.cache.dtype == kFloat32) return attend_tile<float>(p, plan, item, t);
  if (p.cache.dtype == kBFloat16) return attend_tile<BFloat16>(p, plan, item, t);
  attend_tile<Float16>(p, plan, item, t);
}

// One row of a tile.
void merge(const AttentionParams& p, const AttentionPlan& plan, int64_t item) {
  const Place place = place_of(p, plan, item / kTileRows);
  const int64_t c = item % kTileRows;
  if (place.first + c >= place.last) return;
  alignas(64) float totals[kMostSize + kPack]{}, sums[kMostSize + kPack]{};
  float most = -kInfinity, total = 0;
  for (int64_t span = 0; span < plan.spans; ++span) {
    const float* partial = partial_of(p, plan, item / kTileRows, span) + c * (p.size + 2);
    if (partial[0] == -kInfinity && partial[1] == 0) continue;  // it sees nothing there
    std::copy(partial + 2, partial + 2 + p.size, sums);
    merge_span(partial[0], partial[1], sums, p.size, most, total, totals);
  }
  write(p, plan, place, place.first + c, most, total, totals);
}

}  // namespace

using Attend = decltype(Forward::attend);
extern const Attend SPECDIFF_CONCAT(attend_, SPECDIFF_ISA);
extern const Attend SPECDIFF_CONCAT(merge_, SPECDIFF_ISA);
const Attend SPECDIFF_CONCAT(attend_, SPECDIFF_ISA) = attend;
const Attend SPECDIFF_CONCAT(merge_, SPECDIFF_ISA) = merge;

}  // namespace specdiff::cpu
