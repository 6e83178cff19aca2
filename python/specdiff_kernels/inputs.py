"""Inputs of each op, one record an op, in the order in which native code reads them."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from .fields import (
    BOOL,
    CACHE,
    F32,
    F64,
    FLAG,
    I32,
    I64,
    SIZE,
    WEIGHTS,
    Group,
    Logits,
    Range,
    Scalar,
)
from .pages import Pages
from .records import RULES, Record
from .reveal import Reveal
from .trees import Tree
from .types import OTHER_VOCABULARY, Draft, Lenience, RowDistribution

# numbers that a scalar may be, or that may stand for all rows
TEMPERATURES = Range("0 or a number in [2^-95, 2^95]", 2.0**-95, 2.0**95, zero=True)
TOP_KS = Range("an integer in [0, 2^63) (0: off)", 0, 2**63 - 1)
TOP_PS = Range("a number in [2^-149, 1]", 2.0**-149, 1)
SHARES = Range("a number in [0, 1]", 0, 1)
COUNTS = Range("an integer in [-2^63, 2^63)", -(2**63), 2**63 - 1)
SCALES = Range("a number in (-2^128, 2^128)", -(2.0**128 - 2.0**104), 2.0**128 - 2.0**104)
CAPS = Range("a number in [2^-126, 2^128)", 2.0**-126, 2.0**128 - 2.0**104)
WINDOWS = Range("an integer in [1, 2^63)", 1, 2**63 - 1)
SEEDS = Range("an integer in [-2^63, 2^64)", -(2**63), 2**64 - 1, spread=True)


class Sampling(NamedTuple):
    """Sampling parameters of each row; None: off."""

    temperature: Annotated[Tensor, F32("N", TEMPERATURES)]
    top_k: Annotated[Tensor | None, I64("N", TOP_KS)]
    top_p: Annotated[Tensor | None, F32("N", TOP_PS)]
    min_p: Annotated[Tensor | None, F32("N", SHARES)]

    @property
    def selects(self) -> bool:
        """Whether a threshold has to be searched for."""
        return self.top_k is not None or self.top_p is not None

    @property
    def truncates(self) -> bool:
        return not (self.top_k is None and self.top_p is None and self.min_p is None)


class Randomness(NamedTuple):
    """Random words, or what makes them: seeds with rounds, for coupled draws with positions."""

    words: Annotated[Tensor | None, I64("words")]  # each op has its own shape
    seed: Annotated[Tensor | None, I64("N", SEEDS)]
    round: Annotated[Tensor | None, I64("N", COUNTS)]
    position: Annotated[Tensor | None, I64("N", COUNTS)]


class RowDistributionInputs(NamedTuple):
    logits: Annotated[Tensor, Logits("N V")]
    sampling: Annotated[Sampling, Group(named=False)]


class SampleInputs(NamedTuple):
    logits: Annotated[Tensor, Logits("N V")]
    distribution: RowDistribution
    random: Annotated[Randomness, Group(named=False)]
    slot: Annotated[Tensor | None, I64("N", COUNTS)]
    purpose: Annotated[int, Scalar(schema="int")]
    draft_ids: Annotated[Tensor | None, I64("V")]


class VerifyInputs(NamedTuple):
    target_logits: Annotated[Tensor, Logits("B K1 V")]
    draft: Draft
    rule: Annotated[str, Scalar(str, "str", RULES)]
    record: Annotated[Record, Scalar(Record, "int")]
    lenience: Annotated[Lenience | None, Group("B")]
    sampling: Annotated[Sampling, Group("B", named=False)]
    random: Annotated[Randomness, Group("B", named=False)]


TREE_RULES = ("rejection", "walk", "coupled", "greedy")


class VerifyTreeInputs(NamedTuple):
    target_logits: Annotated[Tensor, Logits("B N1 V")]
    tree: Tree
    rule: Annotated[str, Scalar(str, "str", TREE_RULES)]
    sampling: Annotated[Sampling, Group("B", named=False)]
    random: Annotated[Randomness, Group("B", named=False)]


class BuildTreeInputs(NamedTuple):
    logits: Annotated[Tensor, Logits("R Vd")]  # row b K + d: of the token d + 1 behind the root
    K: Annotated[int, Scalar(size="K")]
    N: Annotated[int, Scalar(size="N")]
    shape: Annotated[Tensor | None, I64("N")]
    replacement: Annotated[bool, FLAG]
    lengths: Annotated[Tensor | None, I64("B")]
    draft_ids: Annotated[Tensor | None, I64("Vd")]
    sampling: Annotated[Sampling, Group("B", named=False)]
    random: Annotated[Randomness, Group("B", named=False)]


class DenoiseStepInputs(NamedTuple):
    draft: Annotated[Draft, Group(given=("logits", "distribution"))]
    pool_rows: Annotated[Tensor, I64("B K")]
    reveal: Annotated[Reveal, Group("B", named=False)]
    step: Annotated[int, SIZE]
    entropies: Annotated[bool, FLAG]
    sampling: Annotated[Sampling, Group("B", named=False)]
    random: Annotated[Randomness, Group("B", named=False)]

    @property
    def logits(self) -> Tensor:
        """The pool, which this draft has to have."""
        assert self.draft.logits is not None
        return self.draft.logits


class CommitInputs(NamedTuple):
    emitted: Annotated[Tensor, I64("B N", sized=True)]
    lengths: Annotated[Tensor, I64("B")]
    stop_tokens: Annotated[Tensor | None, I64("S", sized=True)]
    limit: Annotated[Tensor | None, I64("B")]
    finished: Annotated[Tensor | None, BOOL("B")]
    pages: Annotated[Pages | None, Group("P")]
    release: Annotated[bool, FLAG]
    path: Annotated[Tensor | None, I64("B N")]
    caches: Annotated[list[Tensor], I64("", many=True, written=True)]


class RowDivergenceInputs(NamedTuple):
    target_logits: Annotated[Tensor, Logits("N V")]
    draft_logits: Annotated[Tensor, Logits("N D", way_out=OTHER_VOCABULARY)]
    draft_ids: Annotated[Tensor | None, I64("D")]
    temperature: Annotated[Tensor, F32("N", Range("a number in [2^-95, 2^95]", 2.0**-95, 2.0**95))]


class RowDivergenceBackwardInputs(NamedTuple):
    forward: Annotated[RowDivergenceInputs, Group(named=False)]
    statistics: Annotated[Tensor, F64("N 8")]
    tv: Annotated[Tensor, F32("N")]  # upstream gradients, as what follows
    kl: Annotated[Tensor, F32("N")]
    reverse_kl: Annotated[Tensor, F32("N")]
    draft_entropy: Annotated[Tensor, F32("N")]


class SkinnyLinearInputs(NamedTuple):
    x: Annotated[Tensor, F32("M K", rows=True)]
    weight: Annotated[Tensor, WEIGHTS("weight")]  # [N, K], or packed [ceil(N / 16), K, 16]
    N: Annotated[int, Scalar(size="N")]
    bias: Annotated[Tensor | None, F32("N")]


class CachedAttentionInputs(NamedTuple):
    query: Annotated[Tensor, F32("B Q GH D", rows=True)]
    keys: Annotated[Tensor, CACHE("keys")]  # [B, H, S, D], or with tables [blocks, size, H, D]
    values: Annotated[Tensor, CACHE("values")]
    lengths: Annotated[Tensor, I64("B")]
    tables: Annotated[Tensor | None, I32("B M")]
    first: Annotated[Tensor | None, I64("B")]
    parents: Annotated[Tensor | None, I64("B Q")]
    sinks: Annotated[Tensor | None, F32("GH")]
    scale: Annotated[float, Scalar(float, "float", number=SCALES)]
    window: Annotated[int, Scalar(number=WINDOWS)]  # 0: none
    softcap: Annotated[float, Scalar(float, "float", number=CAPS)]  # 0: none
