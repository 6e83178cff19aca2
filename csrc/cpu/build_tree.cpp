#include <algorithm>

#include "forward.h"
#include "ops.h"
#include "row.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

constexpr int64_t kRoot = -1;

// The likeliest tokens of a row, in the order of their weights, equal ones by column.
struct Best {
  int64_t *weights, *columns;
  int64_t most, count;

  void add(int64_t e, int64_t column) {
    if (count == most && e <= weights[count - 1]) return;
    int64_t i = count < most ? count++ : count - 1;
    for (; i > 0 && weights[i - 1] < e; --i) {
      weights[i] = weights[i - 1];
      columns[i] = columns[i - 1];
    }
    weights[i] = e;
    columns[i] = column;
  }
};

class Sequence {
 public:
  Sequence(const BuildTreeParams& params, int64_t b, int thread, int threads)
      : p_(params), b_(b), threads_(threads) {
    const int64_t n = p_.n, most = std::min(n, p_.logits.columns);
    int64_t* memory = p_.memory + thread * memory_size(n, p_.logits.columns);
    depths_ = memory;
    columns_ = depths_ + n;
    children_ = columns_ + n;  // [n + 1], how many a node has; the root's are the first
    counts_ = children_ + n + 1;
    best_ = counts_ + n + 1;  // [n + 1, 2, most], by parent, or by depth without a correction
    scratch_ = best_ + 2 * (n + 1) * most;
    most_ = most;
    drawn_ = p_.drawn + thread * p_.correction.rank;
    depth_ = p_.lengths ? std::min(p_.k, std::max<int64_t>(0, p_.lengths[b])) : p_.k;
    tokens_ = p_.tokens + b * n;
    parents_ = p_.parents + b * n;
    rows_ = p_.rows + b * n;
    chances_ = p_.chances + b * n;
  }

  static int64_t memory_size(int64_t n, int64_t columns) {  // int64s
    return 4 * n + 2 + 2 * (n + 1) * std::min(n, columns) + columns;
  }

  void run() {
    for (int64_t n = 0; n < p_.n; ++n) remove(n);
    std::fill(counts_, counts_ + p_.n + 1, -1);
    if (p_.shape) {
      for (int64_t n = 0; n < p_.n; ++n) sample(n);
    } else {
      grow();
    }
  }

 private:
  void remove(int64_t n) {
    tokens_[n] = -1;
    parents_[n] = kRoot;
    rows_[n] = -1;
    chances_[n] = 0;
    depths_[n] = depth_;  // nothing grows there
  }

  void put(int64_t n, int64_t parent, int64_t column, double chance) {
    tokens_[n] = p_.draft_ids ? p_.draft_ids[column] : column;
    parents_[n] = parent;
    rows_[n] = p_.shape ? row_behind(parent) : -1;
    chances_[n] = chance;
    depths_[n] = depth_of(parent) + 1;
  }

  int64_t depth_of(int64_t node) const { return node == kRoot ? 0 : depths_[node]; }
  double chance_of(int64_t node) const { return node == kRoot ? 1 : chances_[node]; }

  // Best first: see reference/build_tree.py.
  void grow() {
    std::fill(children_, children_ + p_.n + 1, 0);
    for (int64_t n = 0; n < p_.n; ++n) {
      int64_t parent = kRoot, column = -1;
      double chance = -1;  // one may be so small that it is 0
      for (int64_t node = kRoot; node < n; ++node) {
        const int64_t number = children_[node + 1];
        const Best* best = best_behind(node);
        if (!best || number >= best->count) continue;
        const int64_t total = p_.distribution.total[row_behind(node)];
        const double next = chance_of(node) * probability(best->weights[number], inverse(total));
        if (!(next > chance)) continue;
        parent = node;
        column = best->columns[number];
        chance = next;
      }
      if (column < 0) return;
      ++children_[parent + 1];
      put(n, parent, column, chance);
    }
  }

  // A token for place n of the shape.
  void sample(int64_t n) {
    const int64_t parent = p_.shape[n];
    if (depth_of(parent) == depth_ || !read(parent)) return;
    const int64_t row = row_behind(parent);
    const Row logits(p_.logits, 0, row);
    int64_t sums[kMaxTiles];
    const RowDistribution distribution =
        make_distribution(logits, p_.parameters, b_, sums, scratch_);
    int64_t total = distribution.total;
    each_taken(n, [&](int64_t column) {
      const int64_t e = weight(logits.at(column), column, distribution);
      total -= e;
      sums[column / kTile] -= e;
    });
    if (total == 0) return;
    int64_t r = mulhi(word(n), total);
    const int64_t tile = scan(sums, logits.tiles(), r);
    alignas(64) int64_t e[kTile];
    tile_weights(logits, distribution, tile, e);
    each_taken(n, [&](int64_t column) {
      if (column / kTile == tile) e[column % kTile] = 0;
    });
    const int64_t column = tile * kTile + scan(e, logits.tile_size(tile), r);
    columns_[n] = column;
    put(n, parent, column, chance_of(parent) * probability(e[column % kTile], inverse(total)));
  }

  // Calls f(column) for what earlier siblings took.
  template <class F>
  void each_taken(int64_t n, const F& f) const {
    if (p_.replacement) return;
    for (int64_t s = 0; s < n; ++s) {
      if (p_.shape[s] == p_.shape[n] && tokens_[s] >= 0) f(columns_[s]);
    }
  }

  // The row of the pool that the tokens behind a node come from.
  int64_t row_behind(int64_t node) const {
    return p_.correction.codes ? b_ * (p_.n + 1) + node + 1 : b_ * p_.k + depth_of(node);
  }

  // The likeliest tokens behind a node; null: nothing grows there.
  const Best* best_behind(int64_t node) {
    if (depth_of(node) == depth_ || !read(node)) return nullptr;
    const int64_t place = p_.correction.codes ? node + 1 : depth_of(node);
    int64_t* memory = best_ + 2 * place * most_;
    found_ = {memory, memory + most_, most_, counts_[place]};
    return &found_;
  }

  // Whether the row behind a node has a distribution, which is written down when first asked for.
  bool read(int64_t node) {
    const int64_t place = p_.correction.codes ? node + 1 : depth_of(node),
                  number = row_behind(node);
    if (counts_[place] >= 0) return p_.distribution.status[number] == kOk;
    if (p_.correction.codes) correct(node, number);
    const Row row(p_.logits, 0, number);
    int64_t sums[kMaxTiles];
    const RowDistribution distribution = make_distribution(row, p_.parameters, b_, sums, scratch_);
    store(distribution, p_.distribution, number);
    counts_[place] = 0;
    if (distribution.status != kOk) return false;
    if (p_.shape) return true;
    int64_t* memory = best_ + 2 * place * most_;
    Best best{memory, memory + most_, most_, 0};
    alignas(64) int64_t e[kTile];
    for (int64_t tile = 0; tile < row.tiles(); ++tile) {
      tile_weights(row, distribution, tile, e);
      const int size = row.tile_size(tile);
      for (int i = 0; i < size; ++i) {
        if (e[i] > 0) best.add(e[i], tile * kTile + i);
      }
    }
    counts_[place] = best.count;
    return true;
  }

  // The logits behind a node, corrected for its token.
  void correct(int64_t node, int64_t number) {
    const int64_t Vd = p_.logits.columns, depth = depth_of(node);
    const Correction& c = p_.correction;
    const int64_t token = node == kRoot ? c.anchor[b_] : tokens_[node];
    const float* inner = c.inner ? c.inner + (b_ * p_.k + depth) * c.rank : nullptr;
    sequential_code(c, token, inner, plain_rows(drawn_, 0), 0);
    float* logits =
        static_cast<float*>(const_cast<void*>(p_.logits.data)) + number * p_.logits.row_stride;
    Product product = {};
    product.x = plain_rows(drawn_, 0);
    product.m = 1;
    product.k = c.rank;
    product.weight = c.weight;
    product.residual = p_.base + (b_ * p_.k + depth) * Vd;
    product.residual_stride = Vd;
    product.out = plain_rows(logits, Vd);
    multiply(product, threads_);
  }

  uint64_t word(int64_t n) const {
    const Randomness& random = p_.random;
    if (random.words) return uint64_t(random.words[b_ * p_.n + n]);
    return random_word(random.seed[b_], n, random.round[b_], kDraftToken);
  }

  const BuildTreeParams& p_;
  const int64_t b_;
  const int threads_;
  int64_t *depths_, *columns_, *children_, *counts_, *best_, *scratch_;
  int64_t most_, depth_;
  float* drawn_;
  int64_t *tokens_, *parents_, *rows_;
  double* chances_;
  Best found_{};
};

}  // namespace

int64_t build_tree_memory(int64_t n, int64_t columns) { return Sequence::memory_size(n, columns); }

void build_tree(const BuildTreeParams& p) {
  const int64_t pool = p.correction.codes ? p.batch * (p.n + 1) : p.batch * p.k;
  for (int64_t row = 0; row < pool; ++row) store(RowDistribution{}, p.distribution, row);
  const int inner = p.batch == 1 ? p.threads : 1;
  parallel_for(p.batch, p.batch * p.k * p.logits.columns, p.threads,
               [&](int64_t b, int thread) { Sequence(p, b, thread, inner).run(); });
}

}  // namespace specdiff::cpu
