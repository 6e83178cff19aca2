// Verification of a draft: one launch where all blocks find room at once, else two.
//
// 1. judge: the distribution of each target row; the last block of a row judges the drafted token.
// Rows
//    behind one that ended the round are left out if they come later.
// 2. end: residual weights where one may be drawn from, under the lenient rule bias weights of all
//    examined rows; the last block of a sequence draws.
//
// Blocks go through the rows from the first position to the last, as later ones may not be needed.
#include "residual.h"

namespace specdiff::cuda {
namespace {

// One sequence's round.
struct Sequence {
  const VerifyParams& p;
  const Split& split;
  int64_t* workspace;
  int64_t b;
  Shared& shared;

  // Drafted tokens, -1 if that is out of range.
  __device__ int64_t length() const {
    const int64_t length = p.lengths ? p.lengths[b] : p.k;
    return length <= p.k ? length : -1;
  }

  __device__ Area area(int64_t i) const {
    return Area(workspace, p.batch * (p.k + 1), b * (p.k + 1) + i, split.parts);
  }
  __device__ RowWords& words(int64_t i) const { return *area(i).words; }
  __device__ Row row(int64_t i) const { return Row(p.target, b, i); }
  __device__ int64_t token(int64_t i) const { return p.tokens[b * p.k + i]; }
  __device__ bool block_rule() const { return p.rule == kBlockRule; }
  __device__ bool lenient() const { return p.rule == kLenientRule; }
  // Whether sums are needed of other rows than the one that ends the round.
  __device__ bool every_row() const { return block_rule() || lenient(); }
  __device__ Raise raise_by_amount() const { return raise_by(p.lenience, p.amounts[b]); }

  // Where the round has to end for all that is known by now.
  __device__ int64_t stop() const {
    int64_t ends = 0;
    if (threadIdx.x == 0) ends = load_acquire(&words(0).ends);
    return p.k - from_first(ends, shared);
  }
  __device__ void stop_at(int64_t i) const { raise(&words(0).ends, p.k - i); }

  // Accepted tokens, when all rows are judged one by one.
  __device__ int64_t end() const {
    const int64_t last = stop(), drafted = length();
    return drafted < 0 ? 0 : last < drafted ? last : drafted;
  }

  // The word passed in for `column`, or made for `slot`.
  __device__ uint64_t word(int64_t column, int64_t slot, Purpose purpose) const {
    if (p.random.words) return uint64_t(p.random.words[b * (p.k + 1) + column]);
    return random_word(p.random.seed[b], slot, p.random.round[b], purpose);
  }
  __device__ double accept_unit(int64_t i) const { return unit(word(i, i, kAccept)); }
};

// Whether the record of position i counts.
__device__ bool is_recorded(const Sequence& s, int64_t i) {
  const VerifyParams& p = s.p;
  const int32_t* tau = p.tau + s.b * p.k;
  uint32_t latest = 0;
  if (p.record == kRunningMax) {
    for (int64_t j = threadIdx.x; j <= i; j += kThreads) {
      const uint32_t key = uint32_t(tau[j]) ^ 0x80000000u;
      latest = key > latest ? key : latest;
    }
    latest = block_max(latest, s.shared);
  }
  if (p.rows[s.b * p.k + i] < 0 || p.record == kOneHot) return false;
  if (p.record == kFinal) return tau[i] == p.final_step;
  return p.record == kEntangled || (uint32_t(tau[i]) ^ 0x80000000u) == latest;
}

// Whether no later row can matter: x is rejected, has no chance in the block rule, or something is
// wrong. For one thread.
__device__ bool ends_round(const Sequence& s, int64_t i, const Row& row,
                           const RowDistribution& distribution, bool recorded) {
  RowWords& words = s.words(i);
  words.recorded = recorded;
  const DraftDistribution draft(s.p, s.b * s.p.k + i, recorded);
  if (distribution.status == kOk) words.status = draft.fault();
  if (words.status != kOk) return true;
  const double p =
      probability(weight(row.at(draft.x), draft.x, distribution), inverse(distribution.total));
  const double q = probability(draft.weight_of_token(), inverse(draft.distribution.total));
  words.target_chance = p;
  words.draft_chance = q;
  if (s.block_rule()) return p == 0;
  double chance = p;
  if (s.lenient()) {
    const Raise by = s.raise_by_amount();
    chance = raised(p, q, by);
    if (!recorded) words.excess = bias_weight(p, q, by);  // else a sum over the row, later
  }
  return !accepts(s.word(i, i, kAccept), chance, q);
}

// A block's part in the distribution of row i, and the judgement if it is the last.
template <Dtype dtype>
__device__ void judge_part(const Sequence& s, int64_t i, int64_t part) {
  Team team(s.area(i), s.split, part, s.shared);
  if (i > s.length() || i > s.stop()) return team.leave();
  const Row row = s.row(i);
  Slice<dtype> slice(row, s.split, part);
  RowDistribution distribution;
  int64_t share = 0;
  if (!begin_distribution(slice, s.p.parameters, s.b, row.columns, team, s.shared, &distribution,
                          &share))
    return;
  if (threadIdx.x == 0) team.area.sums[part] = share;
  if (!team.done_last()) return;
  distribution = end_distribution(distribution, row, s.split, team.area, s.shared);
  if (i == s.length()) return;
  const bool recorded = is_recorded(s, i);
  if (threadIdx.x == 0 && ends_round(s, i, row, distribution, recorded)) s.stop_at(i);
}

// P_i = min(1, P_{i-1} p(x_i) / q(x_i)) of all prefixes. Only for the last block of a sequence:
// each of its warps loads 32 positions at a time and goes through them; one thread writes.
__device__ void chain_chances(const Sequence& s) {
  const int64_t length = s.length(), stop = s.stop(), k = s.p.k;
  int64_t sure = 0, status = kOk;
  double chance = 1;
  if (threadIdx.x == 0) s.words(0).prefix_chance = 1;
  for (int64_t first = 0; first < k; first += 32) {
    const int64_t mine = first + lane();
    int64_t p = 0, q = 0, fault = kOk;
    if (mine < length && mine <= stop) {
      p = bit_cast<int64_t>(s.words(mine).target_chance);
      q = bit_cast<int64_t>(s.words(mine).draft_chance);
      fault = s.words(mine).status;
    }
    for (int64_t i = first; i < k && i < first + 32; ++i) {
      const double p_i = bit_cast<double>(__shfl_sync(kAll, p, int(i - first)));
      const double q_i = bit_cast<double>(__shfl_sync(kAll, q, int(i - first)));
      const int64_t fault_i = __shfl_sync(kAll, fault, int(i - first));
      const double joint = chance * p_i / q_i;
      const bool lives = i < length && i <= stop && status == kOk && chance > 0;
      status = lives ? fault_i : status;
      chance = !lives ? 0 : joint < 1 ? joint : 1;
      sure = chance == 1 ? i + 1 : sure;
      if (threadIdx.x == 0) s.words(i + 1).prefix_chance = chance;
    }
  }
  if (threadIdx.x == 0) {
    s.words(0).sure = sure;
    s.words(0).sequence_status = status;
  }
}

// Whether S_i can be needed: u_i < P_i, behind the tokens that are accepted in any case.
__device__ bool may_end_at(const Sequence& s, int64_t i) {
  const int64_t sure = s.words(0).sure;
  return i == sure || (i > sure && s.accept_unit(i - 1) < s.words(i).prefix_chance);
}

// The largest i with u_i < h_i.
__device__ int64_t longest_prefix(const Sequence& s) {
  const int64_t length = s.length(), sure = s.words(0).sure;
  uint32_t longest = 0;
  for (int64_t i = threadIdx.x; i <= length; i += kThreads) {
    const double P = s.words(i).prefix_chance, S = double(s.words(i).excess) * 0x1p-60;
    double h = P;
    if (i < length && P < 1) {
      h = S / (S + 1.0 - P);
      h = h < P ? h : P;
    }
    if (i == sure || (i > sure && s.accept_unit(i - 1) < h)) longest = uint32_t(i);
  }
  return block_max(longest, s.shared);
}

// Drawn behind i accepted tokens: from the residual, or from p without x; if that is empty, from p.
__device__ int64_t last_token(const Sequence& s, int64_t i) {
  const Area area = s.area(i);
  const Row row = s.row(i);
  const RowDistribution distribution = area.words->distribution();
  const bool drafted = i < s.length();
  const bool recorded = drafted && area.words->recorded;
  const bool residual = s.block_rule() ? drafted : recorded;
  const double a = s.block_rule() ? area.words->prefix_chance : 1;
  const DraftDistribution draft(s.p, drafted ? s.b * s.p.k + i : -1, recorded);
  int64_t x = drafted && !residual ? draft.x : -1;  // left out
  const int64_t holder = x < 0 ? -1 : (x + row.shift()) / s.split.part_columns();
  const int64_t e_x = x < 0 ? 0 : weight(row.at(x), x, distribution);
  bool from_target = !residual;
  const auto kept = [&](int64_t part) {
    return from_target ? area.sums[part] - (part == holder && x >= 0 ? e_x : 0) : area.excess[part];
  };
  int64_t total = 0;
  for (int64_t part = threadIdx.x; part < s.split.parts; part += kThreads) total += kept(part);
  total = block_sum(total, s.shared);
  if (total == 0) {
    total = distribution.total;
    from_target = true;
    x = -1;
  }
  int64_t r = mulhi(s.word(s.p.k, i, drafted ? kResidual : kBonus), total);
  const int64_t part = find_first(s.split.parts, kept, r, s.shared);
  const auto weigh = [&](int64_t v, int64_t (&e)[8]) {
    if (!from_target) return weigh_both(row, distribution, draft, v, ResidualWeight{a}, e);
    row_weights(row, distribution, v, e);
    for (int j = 0; j < 8; ++j) e[j] = v + j == x ? 0 : e[j];
  };
  return draw_within(row, s.split, part, r, weigh, s.shared);
}

// The biases of the examined positions, added from left to right.
__device__ double bias_of(const Sequence& s, int64_t accepted) {
  double bias = 0;
  for (int64_t i = 0; i <= accepted && i < s.length(); ++i) {
    bias += double(s.words(i).excess) * 0x1p-60;
  }
  return bias;
}

// A sequence's result: its accepted tokens, the last one, then -1.
__device__ void emit(const Sequence& s, int64_t accepted, int64_t token, int32_t status,
                     double bias) {
  const VerifyParams& p = s.p;
  const int64_t shown = status == kOk ? accepted : -1;
  for (int64_t j = threadIdx.x; j <= p.k; j += kThreads) {
    p.emitted[s.b * (p.k + 1) + j] = j < shown ? s.token(j) : j == shown ? token : -1;
  }
  if (threadIdx.x == 0) {
    p.accepted[s.b] = shown < 0 ? 0 : shown;
    p.status[s.b] = status;
    p.bias[s.b] = bias;
  }
}

// A block's part in the sums of row i, and the sequence's end if it is the last. lenient: the rule
// is, of which the exact ones' kernels then know nothing.
template <Dtype dtype, bool lenient>
__device__ void end_part(const Sequence& s, int64_t i, int64_t part) {
  const int64_t length = s.length(), end = lenient ? s.end() : i;
  RowWords& head = s.words(0);
  const Area area = s.area(i);
  const bool recorded = area.words->recorded;
  int32_t status = s.block_rule() ? int32_t(head.sequence_status) : s.words(end).status;
  if (lenient && !valid_amount(s.p.lenience, s.p.amounts[s.b])) status = kParameter;
  if (length < 0) status = kToken;
  const bool sums = status == kOk && i < length;
  if (lenient && sums && recorded && i <= end) {
    const DraftDistribution draft(s.p, s.b * s.p.k + i, recorded);
    const BiasWeight weigh{s.raise_by_amount()};
    const int64_t found =
        sum_both(s.row(i), area.words->distribution(), draft, s.split, part, weigh, s.shared);
    if (threadIdx.x == 0) add(&area.words->excess, found);
  }
  if (sums && (s.block_rule() ? may_end_at(s, i) : recorded && i == end)) {
    const double a = s.block_rule() ? area.words->prefix_chance : 1;
    const DraftDistribution draft(s.p, s.b * s.p.k + i, recorded);
    const int64_t found = residual_sum<dtype>(s.row(i), area.words->distribution(), draft, s.split,
                                              part, a, s.shared);
    if (threadIdx.x == 0) {
      area.excess[part] = found;
      if (s.block_rule()) add(&area.words->excess, found);
    }
  }
  const int64_t blocks = s.split.parts * (s.every_row() ? s.p.k + 1 : 1);
  if (!is_last(&head.sequence_ended, blocks, s.shared)) return;
  i = end;
  if (s.block_rule()) {
    i = longest_prefix(s);
    if (i == length && status == kOk) status = s.words(i).status;
  }
  const double bias = lenient && status == kOk ? bias_of(s, i) : 0;
  emit(s, i, status == kOk ? last_token(s, i) : -1, status, bias);
}

// together: all blocks run at once, so that they may wait for a sequence's other rows.
template <Dtype dtype, bool together, bool lenient>
__global__ void __launch_bounds__(kThreads, (together && lenient) ? 1 : 2)
    judge(VerifyParams p, Split split, int64_t* workspace) {
  SPECDIFF_SHARED(Shared, shared);
  const int64_t place = together ? blockIdx.x : take_ticket(workspace, shared);
  const int64_t part = place % split.parts, index = place / split.parts;
  const int64_t i = index / p.batch, blocks = (p.k + 1) * split.parts;
  const Sequence s{p, split, workspace, index % p.batch, shared};
  judge_part<dtype>(s, i, part);
  if (!together && !s.block_rule()) return;
  RowWords& head = s.words(0);
  if (is_last(&head.sequence_done, blocks, shared)) {
    if (s.block_rule()) chain_chances(s);
    if (threadIdx.x == 0) arrive(&head.sequence_settled);
  }
  if constexpr (together) {
    if (threadIdx.x == 0) wait_for(&head.sequence_settled, 1);
    __syncthreads();
    if (s.every_row() || i == s.end()) end_part<dtype, lenient>(s, i, part);
  }
}

template <Dtype dtype, bool lenient>
__global__ void __launch_bounds__(kThreads, 2)
    end_rounds(VerifyParams p, Split split, int64_t* workspace) {
  SPECDIFF_SHARED(Shared, shared);
  const int64_t index = blockIdx.x / split.parts, part = blockIdx.x % split.parts;
  const bool every_row = lenient || p.rule == kBlockRule;
  const int64_t b = every_row ? index / (p.k + 1) : index;
  const Sequence s{p, split, workspace, b, shared};
  end_part<dtype, lenient>(s, every_row ? index % (p.k + 1) : s.end(), part);
}

// A block's part in the race of row i, and what follows from its winner if it is the last.
template <Dtype dtype>
__device__ void race_part(const Sequence& s, int64_t i, int64_t part) {
  const VerifyParams& p = s.p;
  Team team(s.area(i), s.split, part, s.shared);
  if (i > s.length() || i > s.stop()) return team.leave();
  const Row row = s.row(i);
  Slice<dtype> slice(row, s.split, part);
  RowDistribution distribution;
  if (!begin_distribution(slice, p.parameters, s.b, row.columns, team, s.shared, &distribution,
                          nullptr))
    return;
  if (distribution.status == kOk) {
    const int64_t* words = p.random.words;
    const Noise noise =
        words ? Noise{words + (s.b * (p.k + 1) + i) * row.columns, 0, 0, nullptr}
              : Noise{nullptr, uint64_t(p.random.seed[s.b]), p.random.position[s.b] + i, nullptr};
    store_race(team.area, part, slice_race(slice, distribution, noise, row.columns, s.shared));
  }
  if (!team.done_last()) return;
  const int64_t y = distribution.status == kOk ? end_race(team.area, s.split, s.shared) : -1;
  if (threadIdx.x != 0) return;
  const bool drafted = i < s.length();
  const int64_t x = drafted ? s.token(i) : y;
  const bool possible = !drafted || (0 <= x && x < row.columns);
  team.area.words->token = y;
  team.area.words->status = distribution.status != kOk || possible ? distribution.status : kToken;
  if (drafted && (distribution.status != kOk || x != y)) s.stop_at(i);
}

// The coupled rule: the token of each target row, and where the drafted ones depart from it.
template <Dtype dtype>
__global__ void __launch_bounds__(kThreads, 2)
    race_rows(VerifyParams p, Split split, int64_t* workspace) {
  SPECDIFF_SHARED(Shared, shared);
  const int64_t place = take_ticket(workspace, shared);
  const int64_t part = place % split.parts, index = place / split.parts;
  const Sequence s{p, split, workspace, index % p.batch, shared};
  race_part<dtype>(s, index / p.batch, part);
  if (!is_last(&s.words(0).sequence_done, (p.k + 1) * split.parts, shared)) return;
  const int64_t i = s.end();
  emit(s, i, s.words(i).token, s.length() < 0 ? kToken : s.words(i).status, 0);
}

template <Dtype dtype, bool lenient>
void verify_by(const VerifyParams& p, const Queue& queue) {
  const int64_t rows = p.batch * (p.k + 1);
  // Half of the device, as blocks of other streams may hold the rest and wait.
  const int64_t room = capacity<judge<dtype, true, lenient>>(queue.device) / 2;
  Split split = split_of(p.target, rows, room, room);
  if (0 < rows && rows * split.parts <= room) {
    clear_words(rows, queue);
    const int64_t blocks = rows * split.parts;
    if (launch_together(judge<dtype, true, lenient>, blocks, queue, p, split, queue.workspace))
      return;
  }
  split = begin_rows(p.target, rows, capacity<judge<dtype, false, lenient>>(queue.device), queue);
  launch(judge<dtype, false, lenient>, rows * split.parts, queue, p, split, queue.workspace);
  const int64_t ended = lenient || p.rule == kBlockRule ? rows : p.batch;
  launch(end_rounds<dtype, lenient>, ended * split.parts, queue, p, split, queue.workspace);
}

}  // namespace

void verify(const VerifyParams& p, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const int64_t rows = p.batch * (p.k + 1);
  by_dtype(p.target.dtype, [&](auto dtype) {
    if (p.rule == kCoupledRule) {
      constexpr auto kernel = race_rows<dtype()>;
      const Split split = begin_rows(p.target, rows, capacity<kernel>(queue.device), queue);
      return launch(kernel, rows * split.parts, queue, p, split, queue.workspace);
    }
    if (p.rule == kLenientRule) return verify_by<dtype(), true>(p, queue);
    verify_by<dtype(), false>(p, queue);
  });
}

}  // namespace specdiff::cuda
