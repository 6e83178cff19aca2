"""Correction: how a sequential head changes a draft's logits for the token before each position."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .fields import describe
from .types import PackedWeight


class Correction(NamedTuple):
    """What is added to the logits at position i, after token x: W silu(codes[x] + inner[i])."""

    codes: Tensor  # [V, r], of every token
    inner: Tensor | None  # [B, positions, r]; None: 0
    weight: PackedWeight | Tensor  # W [Vd, r]; a tensor has rows contiguous


class Corrected(NamedTuple):
    """Logits of several positions before their correction, and the tokens before the first."""

    logits: Tensor  # f32 [B positions, Vd]
    correction: Correction
    anchor: Tensor  # i64 [B]


describe(
    Correction,
    codes="[V, r] of the logits' dtype, a code of every token of the target",
    inner="[B, positions, r], added to the code of the token before each position; None: nothing",
    weight="[Vd, r], W: a tensor, or what `pack_weight` made of it",
)
