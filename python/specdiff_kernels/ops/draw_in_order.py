"""`draw_in_order`: draw positions from left to right, each corrected for the token before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import function_of, reason_against, requested
from ..checks import INT64, check_shape, check_tensor
from ..corrections import Correction
from ..inputs import DenoiseStepInputs
from ..reveal import Reveal
from ..types import Draft, PackedWeight, Pending
from .denoise_step import OP, after_step, checked, denoise_step
from .registry import watched
from .skinny_linear import WEIGHTS, packed_shape, skinny_linear
from .verify import check_draft


class DrawInOrderInputs(NamedTuple):
    """What an implementation is given: the first position's step, and how to go on."""

    step: DenoiseStepInputs  # reveals position lo
    correction: Correction
    anchor: Tensor  # i64 [B]
    hi: int


def draw_in_order(
    draft: Draft,
    correction: Correction,
    anchor: Tensor,
    lo: int,
    hi: int,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    *,
    entropies: bool = False,
    seed: int | Tensor | None = None,
    round: int | Tensor | None = None,
    position: int | Tensor | None = None,
    words: Tensor | None = None,
    backend: str | None = None,
) -> Draft:
    """Draw positions lo to hi - 1 of a draft from left to right.

    The logits of each are corrected for the token before it, in place, and its token is drawn: a
    `denoise_step` with `Reveal.chunk(i, i + 1)` as step i. Its record is the corrected
    distribution. One native call makes all of them on a CPU.

    Args:
        draft: as `Draft.masked` makes it, with logits f32 or of the correction's dtype; positions
            before lo are drawn already.
        correction: of positions lo to hi - 1.
        anchor: i64 [B], the token before position 0.
        entropies: measure the entropy at position lo, corrected, into `draft.entropy`.
        temperature, top_k, top_p, min_p, seed, round, position, words, backend: as in
            `denoise_step`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range.
        IndexError: a token before a position has no code.
        BackendError: a forced backend cannot run.

    Source: the Markov head of DSpark (2607.05147), and Domino (2605.29707).
    """
    check_draft(draft)
    if draft.logits is None:
        raise ValueError("draft.logits: expected the pool of the model's logits, got None")
    B, K = draft.tokens.shape
    if not 0 <= lo < hi <= K:
        raise ValueError(f"lo, hi: expected 0 <= lo < hi <= K = {K}, got {lo} and {hi}")
    check_tensor("anchor", anchor, (B,), ("B",), INT64, draft.tokens.device)
    codes, inner, weight = check_correction(correction, B, hi - lo, draft.logits.shape[1])
    sampling, random = (temperature, top_k, top_p, min_p), (words, seed, round, position)
    draws: dict[str, Any] = dict(seed=seed, round=round, position=position, words=words)
    device = anchor.device
    native = fused(device.type, requested(backend))
    if native is not None and fits(draft.logits, correction):
        inputs, sizes = checked(
            draft, Reveal.chunk(lo, lo + 1), lo, sampling, random,
            pool_rows=None, entropies=entropies,
        )  # fmt: skip
        if not watched((*OP.inputs.flatten(inputs), codes, inner, anchor)):
            out: Pending = OP.outputs.empty(sizes, device, inputs)
            native(DrawInOrderInputs(inputs, correction, anchor.contiguous(), hi), out=out)
            return after_step(draft, out, inputs, entropies=entropies)
    pool = draft.logits[: B * K].view(B, K, -1)
    for i in range(lo, hi):
        before = anchor if i == 0 else draft.tokens[:, i - 1].clamp(min=0)
        code = F.embedding(before, codes)
        code = F.silu(code if inner is None else code + inner[:, i - lo])
        pool[:, i] += times(code, weight)
        draft = denoise_step(
            draft, Reveal.chunk(i, i + 1), i, *sampling, entropies=entropies and i == lo,
            **draws, backend=backend,
        )  # fmt: skip
    return draft


def check_correction(correction: Correction, B: int, positions: int, Vd: int) -> Correction:
    """Raise unless it fits so many positions and columns."""
    codes, inner, weight = correction
    check_shape("correction.codes", codes, (None, None), ("V", "r"))
    r = codes.shape[1]
    if inner is not None:
        check_shape("correction.inner", inner, (B, positions, r), ("B", "positions", "r"))
    if shape_of(weight) != (Vd, r):
        raise ValueError(
            f"correction.weight: expected [Vd, r] = {[Vd, r]}, got {list(shape_of(weight))}"
        )
    return correction


@cache
def fused(device: str, forced: str | None) -> Callable[..., Any] | None:
    """The single call, where it is asked for or nothing else is; None: there is none."""
    name = forced or "cpp"
    if reason_against(name, device, "draw_in_order") is not None:
        return None
    return function_of(name, "draw_in_order")


def times(x: Tensor, weight: PackedWeight | Tensor) -> Tensor:
    """x [B, r] W^T"""
    return F.linear(x, weight) if isinstance(weight, Tensor) else skinny_linear(x, weight)


def shape_of(weight: PackedWeight | Tensor) -> tuple[int, int]:
    """[N, K]"""
    if isinstance(weight, PackedWeight):
        return weight.rows, weight.packs.shape[1]
    return weight.shape[0], weight.shape[1]


def fits(logits: Tensor, correction: Correction) -> bool:
    """Whether native code reads them as they lie."""
    codes, inner, weight = correction
    if isinstance(weight, PackedWeight):
        tensor, shape = weight.packs, packed_shape(weight.rows, codes.shape[1])
        lies = tensor.is_contiguous() and tensor.shape == shape
    else:
        tensor, lies = weight, weight.stride(1) == 1
    return (lies and tensor.dtype in WEIGHTS and tensor.device == logits.device) and all(
        x is None or (x.dtype is torch.float32 and x.is_contiguous() and x.device == logits.device)
        for x in (logits, codes, inner)
    )
