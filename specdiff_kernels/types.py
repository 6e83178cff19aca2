"""The values that cross the op boundary: row distributions, drafts, results, statuses."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

MAX_VOCABULARY = 2**19 - 1  # 2^19 weights of 2^44 would overflow an int64 total


class Status(IntEnum):
    """Why a row has no distribution, or a sequence no verdict. Anything but OK comes with token
    -1."""

    OK = 0
    NAN = 1
    POS_INF = 2
    EMPTY = 3
    PARAMETER = 4
    TOKEN = 5
    DRAFT = 6


REASONS = {
    Status.NAN: "its logits contain NaN",
    Status.POS_INF: "its logits contain +inf",
    Status.EMPTY: "no token has any weight: all its logits are -inf",
    Status.PARAMETER: "a sampling parameter is out of range: temperature must be 0 or in "
    "[2^-95, 2^95], top_k >= 0, top_p in (0, 1], min_p in [0, 1], an amount of lenience in "
    "(0, 1], of additive >= 0, of ensemble in [0, 1]",
    Status.TOKEN: "a drafted token is out of range (-1: still masked), or a draft row index or a "
    "draft's length is, or a row is recorded of a draft without logits and distribution",
    Status.DRAFT: "a drafted token has no weight in the draft distribution recorded for it: record "
    "row -1 for a token that was not drawn from a recorded distribution",
}


class DistributionError(ValueError):
    """A row of logits defines no distribution, or a draft contradicts its own record."""


def check_status(status: Tensor, what: str = "row") -> None:
    """Raise if any entry of `status` is not OK. Reads the device: call it where you synchronise.

    Args:
        status: int32 [N], as returned by any op.
        what: what one entry stands for, used in the message ("sequence", "draft row").

    Raises:
        DistributionError: names the first offending index and the reason.
    """
    bad = status.nonzero()
    if bad.numel():
        index = int(bad[0])
        reason = REASONS[Status(int(status[index]))]
        others = f" (and {bad.numel() - 1} more)" if bad.numel() > 1 else ""
        raise DistributionError(f"{what} {index} has no distribution{others}: {reason}")


class Purpose(IntEnum):
    """What a random word is used for. Two uses never share a Philox counter."""

    REVEAL = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    BONUS = 4
    COUPLED = 5


class RowDistribution(NamedTuple):
    """The distribution of N rows of logits, without any probability tensor.

    Token v has integer weight e(v) = (M << 21) >> -n, 0 if below `threshold`, with
    2^t ~ M 2^(n-23) and t = (logit - max) * scale; its probability is e(v) / total.
    A row with scale 0 is greedy: its one token is held in `threshold`.
    """

    max: Tensor  # f32 [N]
    scale: Tensor  # f32 [N], log2(e) / temperature
    threshold: Tensor  # i64 [N]
    total: Tensor  # i64 [N]
    status: Tensor  # i32 [N], Status


DISTRIBUTION_DTYPES = (torch.float32, torch.float32, torch.int64, torch.int64, torch.int32)


class Draft(NamedTuple):
    """K proposed tokens a sequence, and what is known of the distribution each was drawn from.

    A position is *recorded* when `rows` points at the logits that its token was sampled from;
    -1 makes it *one-hot*: the token is a bare guess. Which records `verify` may use is decided in
    `specdiff_kernels.records`, from tau, value_dependent, final_step, entangled and coupled. A
    draft under construction has token -1 where a position is still masked. Rows of revealed
    positions must stay as they are until `verify` has read them.
    """

    tokens: Tensor  # i64 [B, K]
    tau: Tensor  # i32 [B, K], reverse step that sampled the position
    rows: Tensor  # i64 [B, K], row of `logits`, or -1
    logits: Tensor | None = None  # [R, Vd] f32 | bf16 | f16, rows of any stride
    distribution: RowDistribution | None = None  # of the R rows
    draft_ids: Tensor | None = None  # i64 [Vd], strictly increasing: target id of each column
    lengths: Tensor | None = None  # i64 [B], drafted tokens of each sequence; None: K
    value_dependent: bool = False  # sampled values decided which positions were revealed or masked
    final_step: int | None = None  # the tau of the last scheduled step, which sampled all masked
    entangled: bool = False  # the drafter keeps what docs/losslessness.md says after a rejection
    coupled: bool = False  # tokens were drawn with the noise of their absolute positions
    entropy: Tensor | None = None  # f64 [B, K] nats, as `denoise_step` last measured it, or NaN

    @classmethod
    def masked(
        cls,
        B: int,
        K: int,
        logits: Tensor,
        *,
        draft_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        entangled: bool = False,
    ) -> Draft:
        """A draft with every position masked, for `denoise_step` to fill.

        Args:
            B, K: sequences and positions.
            logits: [R, Vd], the pool that the drafter will write its logits to. Columns that are
                no tokens (the mask, padding) are left out by a view: `pool[:, :V]`.
            draft_ids, lengths, entangled: as in `Draft`.

        Example:
            >>> Draft.masked(1, 2, torch.zeros(2, 5)).tokens.tolist()
            [[-1, -1]]
        """
        tokens = torch.full((B, K), -1, dtype=torch.int64, device=logits.device)
        distribution = RowDistribution(
            *(logits.new_zeros(len(logits), dtype=dtype) for dtype in DISTRIBUTION_DTYPES)
        )
        tau, rows = tokens.int(), tokens.clone()
        return cls(tokens, tau, rows, logits, distribution, draft_ids, lengths, entangled=entangled)


class Pending(NamedTuple):
    """What a reverse step changes of a draft."""

    tokens: Tensor  # i64 [B, K]
    tau: Tensor  # i32 [B, K]
    rows: Tensor  # i64 [B, K]
    distribution: RowDistribution  # of the R rows
    entropy: Tensor  # f64 [B, K], only written


class Lenience(NamedTuple):
    """How `verify` with rule="lenient" raises the chance of acceptance above the exact rule's.

    A drafted token is accepted with probability min(1, p'(x) / q(x)), where p'(v) is 0 where p(v)
    is, and otherwise (Yin et al. 2411.00841, docs/losslessness.md):

        "lenience"  p / amount                                amount in (0, 1]; 1 is exact
        "additive"  p + amount                                amount >= 0; 0 is exact
        "ensemble"  max(p, (1 - amount) q + amount p)         amount in [0, 1]; 1 is exact
    """

    kind: str
    amount: float | Tensor  # or f64 [B]


class Verified(NamedTuple):
    """What a target forward settled: `accepted` drafts, then one token more, then -1."""

    accepted: Tensor  # i64 [B]
    emitted: Tensor  # i64 [B, K + 1]
    status: Tensor  # i32 [B], Status; where it is not OK, accepted and bias are 0, emitted all -1
    bias: Tensor  # f64 [B], total variation spent by the lenient rule; 0 under the exact ones


class RowDivergence(NamedTuple):
    """How far the draft's distribution q of each row is from the target's distribution p; NaN: a
    row has none."""

    tv: Tensor  # f32 [N], total variation: 1 - the probability that verification accepts
    kl: Tensor  # f32 [N] nats, KL(p || q) over the drafted tokens
    reverse_kl: Tensor  # f32 [N] nats, KL(q || p)
    target_entropy: Tensor  # f32 [N] nats
    draft_entropy: Tensor  # f32 [N] nats


class RowStatistics(NamedTuple):
    """What the backward pass of `row_divergence` needs of each row beside its logits: the columns
    of an f64 [N, 8]. All NaN: a row has no distribution."""

    target_max: Tensor  # the largest logit
    target_sum: Tensor  # sum over v of exp((l_v - max) / temperature)
    draft_max: Tensor
    draft_sum: Tensor
    drafted: Tensor  # sum of p over the drafted tokens
    excess: Tensor  # sum of q where q > p
    reverse_kl: Tensor
    draft_entropy: Tensor


class Committed(NamedTuple):
    """Per-row cache lengths after a round."""

    lengths: Tensor  # i64 [B]
    kept: Tensor  # i64 [B], emitted tokens that stand
    finished: Tensor  # bool [B]


class PackedWeight(NamedTuple):
    """A linear layer's weight [N, K] as `skinny_linear` reads it fastest; see `pack_weight`."""

    packs: Tensor  # f32 or bf16 [ceil(N / 16), K, 16], zeros behind row N
    rows: int  # N
