#include <algorithm>

#include "ops.h"
#include "residual.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

constexpr int64_t kRoot = -1;

// What is left of the target's distribution at a node, as integer weights that sum to `total`.
// Until a child has been rejected they are the row's own, and are not written down.
class Left {
 public:
  Left(const Row& row, const RowDistribution& distribution, const int64_t* sums, int64_t* weights)
      : row_(row),
        distribution_(distribution),
        sums_(sums),
        weights_(weights),
        total_(distribution.total) {}

  double probability_of(int64_t x) const { return double(weight_of(x)) * inverse(total_); }

  // A rejected guess takes its token along.
  void remove(int64_t x) {
    const int64_t e = weight_of(x);
    if (e == total_) return;  // nothing would be left
    write_down();
    weights_[x] = 0;
    total_ -= e;
  }

  // p becomes (p - q)+. e_q(tile, n, e) gives the draft's weights of a tile.
  template <class F>
  void subtract(const F& e_q, int64_t q_total, int64_t* spare) {
    const double inverse_p = inverse(total_), inverse_q = inverse(q_total);
    int64_t left = 0;
    alignas(64) int64_t p[kTile], q[kTile];
    for (int64_t tile = 0; tile < row_.tiles(); ++tile) {
      const int n = row_.tile_size(tile);
      e_q(tile, n, q);
      if (!written_) {
        tile_weights(row_, distribution_, tile, p);
        left += kernels().residual(p, q, n, {inverse_p, inverse_q, 1}, spare + tile * kTile);
        continue;
      }
      for (int i = 0; i < n; ++i) {
        const int64_t v = tile * kTile + i;
        const double own = double(weights_[v]) * inverse_p;
        left += spare[v] = residual_weight(own, probability(q[i], inverse_q));
      }
    }
    if (left == 0) return;  // it stays as it was
    std::copy_n(spare, row_.columns, weights_);
    written_ = true;
    total_ = left;
  }

  int64_t draw(uint64_t word) const {
    if (!written_) return cpu::draw(row_, distribution_, sums_, word);
    int64_t r = mulhi(word, total_);
    return scan(weights_, row_.columns, r);
  }

 private:
  int64_t weight_of(int64_t x) const {
    return written_ ? weights_[x] : weight(row_.at(x), x, distribution_);
  }

  void write_down() {
    if (written_) return;
    for (int64_t tile = 0; tile < row_.tiles(); ++tile) {
      alignas(64) int64_t e[kTile];
      tile_weights(row_, distribution_, tile, e);
      std::copy_n(e, row_.tile_size(tile), weights_ + tile * kTile);
    }
    written_ = true;
  }

  const Row& row_;
  const RowDistribution& distribution_;
  const int64_t* sums_;
  int64_t* weights_;
  int64_t total_;
  bool written_ = false;
};

// Verifies one sequence. Rows of the target are read where a path leads.
class Sequence {
 public:
  Sequence(const VerifyTreeParams& params, int64_t b, int thread)
      : p_(params),
        b_(b),
        tokens_(params.tokens + b * params.n),
        parents_(params.parents + b * params.n),
        rows_(params.rows + b * params.n),
        emitted_(params.emitted + b * (params.n + 1)),
        path_(params.path + b * (params.n + 1)),
        scratch_(params.scratch ? params.scratch + 2 * thread * params.target.columns : nullptr) {}

  void run() {
    int32_t status = well_formed() ? kOk : kToken;
    path_[0] = 0;
    for (int64_t node = kRoot; status == kOk;) {
      const Row target(p_.target, b_, node + 1);
      RowDistribution distribution = make_distribution(target, p_.parameters, b_, sums_, scratch_);
      status = distribution.status;
      if (status != kOk) break;
      int64_t child = kRoot;
      status = p_.rule == kTreeRejection ? try_children(node, target, distribution, &child)
                                         : meet(node, target, distribution, &child);
      if (status != kOk || child == kRoot) break;
      emitted_[accepted_++] = tokens_[child];
      path_[accepted_] = child + 1;
      node = child;
    }
    const bool good = status == kOk;
    p_.status[b_] = status;
    p_.accepted[b_] = good ? accepted_ : 0;
    const int64_t kept = good ? accepted_ + 1 : 0;
    std::fill(emitted_ + kept, emitted_ + p_.n + 1, -1);
    std::fill(path_ + kept, path_ + p_.n + 1, -1);
  }

 private:
  // Whether it is a tree of tokens, with its records.
  bool well_formed() const {
    for (int64_t n = 0; n < p_.n; ++n) {
      const int64_t token = tokens_[n], parent = parents_[n];
      if (token == -1) continue;
      if (token < 0 || token >= p_.target.columns || parent < kRoot || parent >= n) return false;
      if (rows_[n] < -1 || rows_[n] >= (p_.draft.data ? p_.draft_rows : 0)) return false;
      if (parent != kRoot && tokens_[parent] == -1) return false;
      if (p_.replacement) continue;
      for (int64_t other = 0; other < n; ++other) {
        if (parents_[other] == parent && tokens_[other] == token) return false;
      }
    }
    return true;
  }

  int64_t next_child(int64_t node, int64_t after) const {
    int64_t n = after + 1;
    while (n < p_.n && (parents_[n] != node || tokens_[n] == -1)) ++n;
    return n;
  }

  // The target's own token ends the round, unless a child has it.
  int32_t meet(int64_t node, const Row& target, const RowDistribution& distribution,
               int64_t* child) {
    const int64_t y = p_.rule == kTreeCoupled
                          ? race(target, distribution, nullptr, noise(accepted_))
                          : draw(target, distribution, sums_, word(node + 1, node + 1, kBonus));
    emitted_[accepted_] = y;
    for (int64_t n = next_child(node, node); n < p_.n; n = next_child(node, n)) {
      if (tokens_[n] != y) continue;
      *child = n;
      break;
    }
    return kOk;
  }

  int32_t try_children(int64_t node, const Row& target, const RowDistribution& distribution,
                       int64_t* child) {
    int64_t* spare = scratch_ + p_.target.columns;
    Left left(target, distribution, sums_, scratch_);
    const int64_t first = next_child(node, node);
    for (int64_t n = first; n < p_.n; n = next_child(node, n)) {
      const int64_t x = tokens_[n];
      DraftRow draft{target, {}, nullptr};
      double q = 1;
      int64_t q_total = 0;
      if (rows_[n] >= 0) {
        draft = {Row(p_.draft, 0, rows_[n]), load(p_.draft_distribution, rows_[n]), p_.draft_ids};
        q_total = draft.distribution.total;
        const int64_t e = draft.weight_of(x);
        if (e == 0) return kDraft;
        each_taken(node, n, [&](int64_t y) { q_total -= draft.weight_of(y); });
        q = probability(e, inverse(q_total));
      }
      if (accepts(word(n, n, kAccept), left.probability_of(x), q)) {
        *child = n;
        return kOk;
      }
      if (rows_[n] < 0) {
        left.remove(x);
        continue;
      }
      left.subtract(
          [&](int64_t tile, int size, int64_t* e) {
            draft_weights(draft, tile, size, e);
            each_taken(node, n, [&](int64_t y) {
              if (y / kTile == tile) e[y % kTile] = 0;
            });
          },
          q_total, spare);
    }
    emitted_[accepted_] = left.draw(word(p_.n, node + 1, first < p_.n ? kResidual : kBonus));
    return kOk;
  }

  // Calls f(token) for the tokens that earlier siblings took from node n's record.
  template <class F>
  void each_taken(int64_t node, int64_t n, const F& f) const {
    if (p_.replacement) return;
    for (int64_t s = next_child(node, node); s < n; s = next_child(node, s)) {
      if (rows_[s] == rows_[n]) f(tokens_[s]);
    }
  }

  uint64_t word(int64_t column, int64_t slot, Purpose purpose) const {
    const Randomness& random = p_.random;
    if (random.words) return uint64_t(random.words[b_ * (p_.n + 1) + column]);
    return random_word(random.seed[b_], slot, random.round[b_], purpose);
  }

  Noise noise(int64_t depth) const {
    const Randomness& random = p_.random;
    if (random.words) {
      return {random.words + (b_ * (p_.n + 1) + depth) * p_.target.columns, 0, 0};
    }
    return {nullptr, uint64_t(random.seed[b_]), random.position[b_] + depth};
  }

  const VerifyTreeParams& p_;
  const int64_t b_;
  const int64_t *tokens_, *parents_, *rows_;
  int64_t *emitted_, *path_;
  int64_t* scratch_;  // [2, columns]
  int64_t accepted_ = 0;
  int64_t sums_[kMaxTiles];
};

}  // namespace

void verify_tree(const VerifyTreeParams& params) {
  const int64_t logits = params.batch * (params.n + 1) * params.target.columns;
  parallel_for(params.batch, logits, params.threads,
               [&](int64_t b, int thread) { Sequence(params, b, thread).run(); });
}

}  // namespace specdiff::cpu
