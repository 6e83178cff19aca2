"""The values that cross the op boundary: row distributions, drafts, results, statuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from .checks import INT64, check_shape, check_tensor, device_of, integer, kind_of
from .fields import (
    BOOL,
    DTYPES,
    F32,
    F64,
    I32,
    I64,
    NOT_NEGATIVE,
    SIZE,
    Group,
    Logits,
    Scalar,
    describe,
    layout_of,
)

OTHER_VOCABULARY = (
    "a draft over some of the target's tokens names them in draft_ids, and columns that are no "
    "tokens are left out by a view, logits[:, :V]"
)


class Status(IntEnum):
    """Reason why a row has no distribution, or a sequence no verdict. Its token is -1, unless the
    status is OK."""

    OK = 0
    NAN = 1
    POS_INF = 2
    EMPTY = 3
    PARAMETER = 4
    TOKEN = 5
    DRAFT = 6
    RECORD = 7  # found by verify(..., check=True) alone


REASONS = {
    Status.NAN: "its logits contain NaN",
    Status.POS_INF: "its logits contain +inf",
    Status.EMPTY: "no token has any weight: all its logits are -inf",
    Status.PARAMETER: "a sampling parameter is out of range: temperature must be 0 or in "
    "[2^-95, 2^95], top_k >= 0, top_p in (0, 1], min_p in [0, 1], an amount of lenience in "
    "(0, 1], of additive >= 0, of ensemble in [0, 1]",
    Status.TOKEN: "a drafted token is out of range (-1: still masked), or a draft row index or a "
    "draft's length is, or a row is recorded of a draft without logits and distribution, or a "
    "parent is no node before its child, or siblings of a tree are equal though drawn without "
    "replacement",
    Status.DRAFT: "a drafted token has no weight in the draft distribution recorded for it: record "
    "row -1 for a token that was not drawn from a recorded distribution",
    Status.RECORD: "the distribution recorded for a drafted token is not that of the logits that "
    "the draft points at: they were changed after it was made, or they are another row's; keep "
    "them as they are until verify has read them",
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
        ValueError, TypeError: it is no tensor [N] of Status.

    Example:
        >>> check_status(row_distribution(torch.zeros(2, 5)).status)
    """
    check_shape("status", status, (None,), ("N",))
    bad = status.nonzero()
    if bad.numel():
        index = int(bad[0])
        code = int(status[index])
        if code not in tuple(Status):
            raise ValueError(f"status: expected 0 to {len(REASONS)}, a Status, got {code}")
        reason = REASONS[Status(code)]
        others = f" (and {bad.numel() - 1} more)" if bad.numel() > 1 else ""
        raise DistributionError(f"{what} {index} has no distribution{others}: {reason}")


class Purpose(IntEnum):
    """Use of a random word. Two uses never share a Philox counter."""

    REVEAL = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    BONUS = 4
    COUPLED = 5


class RowDistribution(NamedTuple):
    """The distribution of N rows of logits, without any probability tensor.

    A token with logit l has integer weight e = floor(2^(44 + (l - offset) scale - shift)), up to
    the rounding in docs/numerics.md, and 0 if that is below `threshold`; `origin` gives offset and
    shift. Its probability is e / total. A row with scale 0 is greedy: its one token is held in
    `threshold`.
    """

    max: Annotated[Tensor, F32("N")]
    scale: Annotated[Tensor, F32("N")]  # log2(e) / temperature
    threshold: Annotated[Tensor, I64("N")]
    total: Annotated[Tensor, I64("N")]
    status: Annotated[Tensor, I32("N")]  # Status

    def origin(self) -> tuple[Tensor, Tensor]:
        """The origin of each row's exponents. The largest logit then weighs 2^42 to 2^44.

        Returns:
            offset f32 [N], shift f64 [N]: (0, 2 ceil(max scale / 2 - 2^-31)) where |max scale| <=
            2^20, else (max, 0).
        """
        highest = self.max.double() * self.scale.double()  # exact
        near = highest.abs() <= 2.0**20
        offset = torch.where(near, 0.0, self.max)
        return offset, torch.where(near, 2.0 * torch.ceil(highest / 2.0 - 2.0**-31), 0.0)

    def log_probability(self, logits: Tensor) -> Tensor:
        """Natural logarithm of the probability of one token a row, as if it were not cut off.

        Args:
            logits: f32 [N], the token's own.

        Returns:
            f64 [N].
        """
        offset, shift = self.origin()
        t = (logits - offset).double() * self.scale.double() - shift
        return math.log(2) * (t + 44 - self.total.double().log2())


DISTRIBUTION = layout_of(RowDistribution)


class Draft(NamedTuple):
    """K proposed tokens per sequence, and a record of the distribution that each was drawn from.

    A position is *recorded* when `rows` points at the logits that its token was sampled from;
    -1 makes it *one-hot*: the token is a bare guess. Which records `verify` may use is decided in
    `specdiff_kernels.records`, from tau, value_dependent, final_step, entangled and coupled. A
    draft under construction has token -1 where a position is still masked. Rows of revealed
    positions must stay as they are until `verify` has read them.
    """

    tokens: Annotated[Tensor, I64("B K", sized=True)]
    tau: Annotated[Tensor, I32("B K")]  # reverse step that sampled the position
    rows: Annotated[Tensor, I64("B K")]  # row of `logits`, or -1
    # rows of any stride
    logits: Annotated[Tensor | None, Logits("R Vd", way_out=OTHER_VOCABULARY)] = None
    distribution: Annotated[RowDistribution | None, Group("R")] = None  # of the R rows
    draft_ids: Annotated[Tensor | None, I64("Vd")] = None  # increasing: target id of each column
    lengths: Annotated[Tensor | None, I64("B")] = None  # drafted tokens of each sequence; None: K
    value_dependent: bool = False  # sampled values decided which positions were revealed or masked
    # the tau of the last scheduled step, which sampled all masked
    final_step: Annotated[int | None, SIZE] = None
    entangled: bool = False  # the drafter keeps what docs/losslessness.md says after a rejection
    coupled: bool = False  # tokens were drawn with the noise of their absolute positions
    # f64 [B, K] nats, as `denoise_step` last measured it, or NaN
    entropy: Tensor | None = None

    @classmethod
    def guesses(cls, tokens: Tensor, lengths: Tensor | None = None) -> Draft:
        """A draft of bare guesses: tokens that were drawn from no recorded distribution, such as
        the continuation of an n-gram, or an argmax.

        Args:
            tokens: i64 [B, K]. K = 0 drafts nothing.
            lengths: i64 [B], drafted tokens of each sequence; None: K.

        Raises:
            ValueError, TypeError: tokens of another shape or dtype.

        Example:
            >>> Draft.guesses(torch.tensor([[7, 3]])).rows.tolist()
            [[-1, -1]]
        """
        check_tokens(tokens)
        tau = torch.zeros_like(tokens, dtype=torch.int32)
        return cls(tokens, tau, torch.full_like(tokens, -1), lengths=lengths)

    @classmethod
    def sequential(
        cls,
        tokens: Tensor,
        logits: Sequence[Tensor] | Tensor,
        distributions: Sequence[RowDistribution],
        *,
        draft_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        coupled: bool = False,
    ) -> Draft:
        """A draft whose tokens were drawn one after another, each from logits behind the one before
        it, as an autoregressive drafter does.

        Args:
            tokens: i64 [B, K], drawn by `sample`, token i with slot=i.
            logits: K tensors [B, Vd] f32, bf16 or f16, or one [B, K, Vd]: what each was drawn from.
            distributions: K RowDistributions of B rows: those that the draws used.
            draft_ids, lengths, coupled: as in `Draft`.

        Raises:
            ValueError, TypeError: an argument of another shape or kind, or not K of them.

        Example:
            >>> logits = [torch.zeros(1, 5), torch.ones(1, 5)]
            >>> distributions = [row_distribution(row) for row in logits]
            >>> draft = Draft.sequential(torch.tensor([[7, 3]]), logits, distributions)
            >>> draft.tau.tolist(), draft.rows.tolist(), draft.logits.shape
            ([[0, 1]], [[0, 1]], torch.Size([2, 5]))
        """
        check_tokens(tokens)
        (B, K), device = tokens.shape, tokens.device
        if K == 0:
            return cls.guesses(tokens, lengths)
        if not isinstance(logits, Tensor):
            expect_each("logits", "tensors [B, Vd]", Tensor, logits, K)
            Vd = None
            for i, each in enumerate(logits):
                check_tensor(f"logits[{i}]", each, (B, Vd), ("B", "Vd"), tuple(DTYPES), device)
                Vd = each.shape[1]
            logits = torch.stack(tuple(logits), 1)
        check_tensor("logits", logits, (B, K, None), ("B", "K", "Vd"), tuple(DTYPES), device)
        expect_each("distributions", "RowDistributions", RowDistribution, distributions, K)
        for i, row in enumerate(distributions):
            check_tensor(f"distributions[{i}].total", row.total, (B,), ("B",), INT64, device)
        fields = zip(*distributions, strict=True)
        tau = torch.arange(K, dtype=torch.int32, device=device).expand(B, K)
        return cls(
            tokens,
            tau,
            rows=torch.arange(B * K, device=device).view(B, K),
            logits=logits.flatten(0, 1),
            distribution=RowDistribution(*(torch.stack(f, 1).flatten() for f in fields)),
            draft_ids=draft_ids,
            lengths=lengths,
            coupled=coupled,
        )

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

        Raises:
            ValueError, TypeError: B or K is no integer of at least 0, or the pool no [R, Vd].

        Example:
            >>> Draft.masked(1, 2, torch.zeros(2, 5)).tokens.tolist()
            [[-1, -1]]
        """
        B, K = integer("B", B), integer("K", K)
        check_shape("logits", logits, (None, None), ("R", "Vd"))
        tokens = torch.full((B, K), -1, dtype=torch.int64, device=logits.device)
        distribution = DISTRIBUTION.empty({"N": len(logits)}, logits.device, None)
        for field in distribution:
            field.zero_()
        tau, rows = tokens.int(), tokens.clone()
        return cls(tokens, tau, rows, logits, distribution, draft_ids, lengths, entangled=entangled)


def check_tokens(tokens: Tensor) -> None:
    """Raise unless they are drafted tokens, i64 [B, K]."""
    device = device_of("tokens", tokens)
    check_tensor("tokens", tokens, (None, None), ("B", "K"), INT64, device)


def expect_each(name: str, expected: str, kind: type, values: Any, K: int) -> None:
    """Raise unless it is a list or tuple of K values of a kind."""
    listed = isinstance(values, (list, tuple)) and not isinstance(values, RowDistribution)
    if not listed or not all(isinstance(value, kind) for value in values):
        kinds = ", ".join(map(kind_of, values)) if listed else kind_of(values)
        raise TypeError(f"{name}: expected a list of K={K} {expected}, got {kinds}")
    if len(values) != K:
        raise ValueError(f"{name}: expected a list of K={K} {expected}, got {len(values)}")


class Pending(NamedTuple):
    """The fields of a draft that a reverse step changes."""

    tokens: Annotated[Tensor, I64("B K")]
    tau: Annotated[Tensor, I32("B K")]
    rows: Annotated[Tensor, I64("B K")]
    distribution: Annotated[RowDistribution, Group("R")]
    entropy: Annotated[Tensor, F64("B K")]


# kind of lenience: (amounts allowed, test of a number or a tensor)
KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "lenience": ("a number in (0, 1]", lambda x: (x > 0) & (x <= 1)),
    "additive": ("a number >= 0", lambda x: x >= 0),
    "ensemble": ("a number in [0, 1]", lambda x: (x >= 0) & (x <= 1)),
}


class Lenience(NamedTuple):
    """How `verify` with rule="lenient" raises the chance of acceptance above the exact rule's.

    A drafted token is accepted with probability min(1, p'(x) / q(x)), where p'(v) is 0 where p(v)
    is, and otherwise (Yin et al. 2411.00841, docs/losslessness.md):

        "lenience"  p / amount                                amount in (0, 1]; 1 is exact
        "additive"  p + amount                                amount >= 0; 0 is exact
        "ensemble"  max(p, (1 - amount) q + amount p)         amount in [0, 1]; 1 is exact
    """

    kind: Annotated[str, Scalar(str, "str", tuple(KINDS))]
    amount: Annotated[float | Tensor, F64("N", NOT_NEGATIVE)]


class Verified(NamedTuple):
    """Result of a verification: the accepted draft tokens of each sequence, and one token more."""

    accepted: Annotated[Tensor, I64("B")]
    emitted: Annotated[Tensor, I64("B K1")]
    # Status; where it is not OK, accepted and bias are 0, emitted all -1
    status: Annotated[Tensor, I32("B")]
    # total variation spent by the lenient rule; 0 under the exact ones
    bias: Annotated[Tensor, F64("B")]


class RowDivergence(NamedTuple):
    """Divergences of each row's draft distribution q from the target distribution p. NaN: a row has
    no distribution."""

    # total variation: 1 - the probability that verification accepts
    tv: Annotated[Tensor, F32("N")]
    kl: Annotated[Tensor, F32("N")]  # nats, KL(p || q) over the drafted tokens
    reverse_kl: Annotated[Tensor, F32("N")]  # nats, KL(q || p)
    target_entropy: Annotated[Tensor, F32("N")]  # nats
    draft_entropy: Annotated[Tensor, F32("N")]  # nats


class RowStatistics(NamedTuple):
    """Statistics of each row for the backward pass of `row_divergence`: the columns of an f64
    [N, 8]. All NaN: a row has no distribution."""

    target_max: Tensor  # the largest logit
    target_sum: Tensor  # sum over v of exp((l_v - max) / temperature)
    draft_max: Tensor
    draft_sum: Tensor
    drafted: Tensor  # sum of p over the drafted tokens
    excess: Tensor  # sum of q where q > p
    reverse_kl: Tensor
    draft_entropy: Tensor


class Divergences(NamedTuple):
    """Outputs of the forward pass of `row_divergence`."""

    rows: Annotated[RowDivergence, Group(named=False)]
    statistics: Annotated[Tensor, F64("N 8")]  # RowStatistics


class Committed(NamedTuple):
    """What stands of a round, and each row's cache length after it."""

    lengths: Annotated[Tensor, I64("B")]
    kept: Annotated[Tensor, I64("B")]  # emitted tokens that stand
    finished: Annotated[Tensor, BOOL("B")]
    last: Annotated[Tensor, I64("B")]  # the last token that stands; -1: none does


class PackedWeight(NamedTuple):
    """A linear layer's weight [N, K] as `skinny_linear` reads it fastest; see `pack_weight`."""

    packs: Tensor  # f32 or bf16 [ceil(N / 16), K, 16], zeros behind row N
    rows: int  # N


describe(
    RowDistribution,
    max="f32 [N], the largest logit of the row",
    scale="f32 [N], log2(e) / temperature; 0: the row is greedy",
    threshold="i64 [N], weights below it count as 0; of a greedy row: its token",
    total="i64 [N], the sum of the row's weights",
    status="i32 [N], a Status",
)
describe(
    Draft,
    tokens="i64 [B, K], drafted tokens; -1: still masked",
    tau="i32 [B, K], the reverse step that sampled the position",
    rows="i64 [B, K], the row of `logits` that the token was sampled from; -1: a bare guess",
    logits="f32, bf16 or f16 [R, Vd], the drafter's logits; None: all tokens are bare guesses",
    distribution="RowDistribution of the R rows of `logits`",
    draft_ids="i64 [Vd], strictly increasing: the target's token id of each column; None: Vd = V",
    lengths="i64 [B], drafted tokens of each sequence; None: K",
    value_dependent="bool, whether sampled values decided which positions were revealed or masked",
    final_step="int, the tau of the last scheduled step, which sampled all masked positions; None: "
    "unknown",
    entangled="bool, whether the drafter keeps tokens after a rejection, see docs/losslessness.md",
    coupled="bool, whether tokens were drawn with the noise of their absolute positions",
    entropy="f64 [B, K] nats, as `denoise_step` last measured it; NaN: not measured",
)
describe(
    Verified,
    accepted="i64 [B], leading draft tokens of each sequence that were accepted",
    emitted="i64 [B, K + 1], the accepted tokens, then one more token (a replacement or the bonus "
    "token), then -1",
    status="i32 [B], a Status; unless it is OK, accepted and bias are 0 and emitted is -1",
    bias="f64 [B], total variation spent by the lenient rule; 0 under the exact rules",
)
describe(
    Committed,
    lengths="i64 [B], cached positions of each sequence after the round",
    kept="i64 [B], emitted tokens that stand",
    finished="bool [B], whether the sequence has ended",
    last="i64 [B], the last emitted token that stands; -1: the round keeps none",
)
describe(
    RowDivergence,
    tv="f32 [N], total variation: 1 - the probability that verification accepts",
    kl="f32 [N] nats, KL(p || q) over the drafted tokens",
    reverse_kl="f32 [N] nats, KL(q || p)",
    target_entropy="f32 [N] nats",
    draft_entropy="f32 [N] nats",
)
describe(
    Lenience,
    kind='"lenience", "additive" or "ensemble"',
    amount="a number, or f64 [B]; see above",
)
describe(
    PackedWeight,
    packs="f32 or bf16 [ceil(N / 16), K, 16], zeros in rows from N on",
    rows="int, N",
)
