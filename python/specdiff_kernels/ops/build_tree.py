"""`build_tree`: a tree of drafted tokens from logits for each depth."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import implementation
from ..checks import (
    INT64,
    check_increasing,
    check_shape,
    check_tensor,
    columns,
    device_of,
    expect_record,
    integer,
    random_key,
    readable,
)
from ..corrections import Corrected, Correction
from ..fields import Sizes
from ..inputs import BuildTreeInputs
from ..trees import ROOT, Grown, Tree
from ..types import PackedWeight
from .draw_in_order import check_correction
from .registry import Op
from .skinny_linear import WEIGHTS, packed_shape

OP = Op("build_tree", BuildTreeInputs, Grown)
FLOAT = (torch.float32,)


def build_tree(
    logits: Tensor,
    N: int,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    *,
    shape: Tensor | None = None,
    replacement: bool = False,
    correction: Correction | None = None,
    anchor: Tensor | None = None,
    draft_ids: Tensor | None = None,
    lengths: Tensor | None = None,
    seed: int | Tensor | None = None,
    round: int | Tensor | None = None,
    words: Tensor | None = None,
    backend: str | None = None,
) -> Tree:
    """Make a tree of N nodes of a drafter's logits for the next K tokens.

    Without a `shape` it is the tree of N nodes with the greatest expected number of accepted
    tokens, if tokens came by the drafter's distribution (DDTree, 2604.12989): best first by the
    product of the probabilities from the root to a node. Its tokens are bare guesses. The first n
    nodes are the best tree of n nodes. This is for `verify_tree`'s rules "walk", "greedy" and
    "coupled".

    With a shape, a token is drawn for each of its places, as `verify_tree`'s rule "rejection" needs
    them: siblings one after another, each from what the earlier ones left, or with replacement. The
    shape must not depend on what is drawn. Nodes are recorded with the row of logits that they were
    drawn from.

    With a `correction`, the logits at a place are corrected for the token before it, as
    `draw_in_order` does, so that nodes of different parents have different distributions. Otherwise
    all nodes of a depth have the same one.

    Args:
        logits: [B, K, Vd] f32, bf16 or f16 with contiguous rows, of the tokens 1 to K behind the
            root. With a correction f32.
        N: nodes of each sequence.
        temperature, top_k, top_p, min_p: of the draft's distribution, a number or a tensor [B]; see
            `row_distribution`.
        shape: i64 [N], the parent of each place, which comes before it; -1: the root.
        replacement: whether siblings are drawn with replacement.
        correction: Correction(codes [V, r], inner [B, K, r] or None, weight [Vd, r]), see
            `draw_in_order`. f32; the weight may be bf16, or what `pack_weight` made of it.
        anchor: i64 [B], the token at the root, which a correction needs.
        draft_ids: i64 [Vd], strictly increasing: the target's token id of each column.
        lengths: i64 [B], most tokens that a path may have; None: K.
        seed, round: as in `verify`; node n draws with slot n. Not needed without a shape.
        words: i64 [B, N], the word of each node's draw, in place of seed and round.
        backend: force one; see `available_backends`.

    Returns:
        Tree, with the logits and distributions that its nodes were drawn from, and `chances`. Where
        there is no node its token is -1: a path would be too long, its parent is not there, no
        token is left, or `tree.distribution.status` says why a row has no distribution.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range; a shape whose parents
            do not come before their children, where it can be looked at.
        BackendError: a forced backend cannot run.

    Example:
        >>> logits = torch.tensor([[[0.6, 0.4], [0.3, 0.7]]]).log()
        >>> tree = build_tree(logits, 3)
        >>> tree.tokens.tolist(), tree.parents.tolist()
        ([[0, 1, 1]], [[-1, 0, -1]])
        >>> [round(chance, 2) for chance in tree.chances[0].tolist()]
        [0.6, 0.42, 0.4]
    """
    device = device_of("logits", logits)
    check_shape("logits", logits, (None, None, None), ("B", "K", "Vd"))
    B, K, Vd = logits.shape
    N = integer("N", N)
    sizes: Sizes = {"B": B, "K": K, "N": N, "words": (B, N), "R": B * K}
    sizes["Vd"] = columns("draft_ids", draft_ids, Vd, device)
    if words is None:
        greedy = 0.0 if shape is None else temperature
        seed, round = random_key(B, greedy, seed=seed, round=round)
    pool, corrected = logits.flatten(0, 1), None
    if correction is not None:
        if anchor is None:
            raise ValueError("anchor: expected the token at each root with a correction, got None")
        check_tensor("logits", logits, (B, K, Vd), ("B", "K", "Vd"), FLOAT, device)
        check_tensor("anchor", anchor, (B,), ("B",), INT64, device)
        correction = as_kernels_take(correction, B, K, Vd, device)
        check_codes(correction.codes, draft_ids, Vd, anchor)
        corrected = Corrected(pool.contiguous(), correction, anchor.contiguous())
        sizes["R"] = B * (N + 1)
        pool = logits.new_empty(sizes["R"], Vd)
    inputs = OP.check(
        sizes, device, pool, K, N, shape, replacement, lengths, draft_ids,
        (temperature, top_k, top_p, min_p), (words, seed, round, None),
    )  # fmt: skip
    if draft_ids is not None:
        check_increasing("draft_ids", draft_ids, 2**31)
    if inputs.shape is not None:
        check_parents(inputs.shape)
    if corrected is None:
        grown = OP(inputs, sizes, device, backend)
    else:  # whose logits are written in place; PyTorch's dispatcher need not see that
        grown = OP.outputs.empty(sizes, device, inputs)
        with torch.no_grad():
            implementation("build_tree", device, backend)(inputs, out=grown, corrected=corrected)
    return Tree(
        grown.tokens, grown.parents, grown.rows, pool, grown.distribution, draft_ids,
        inputs.replacement, grown.chances,
    )  # fmt: skip


def as_kernels_take(
    correction: Correction, B: int, K: int, Vd: int, device: torch.device
) -> Correction:
    """It with contiguous tensors, after checks of their shapes and dtypes."""
    expect_record("correction", Correction, correction)
    codes, inner, weight = check_correction(correction, B, K, Vd)
    check_tensor("correction.codes", codes, (None, None), ("V", "r"), FLOAT, device)
    if inner is not None:
        check_tensor("correction.inner", inner, tuple(inner.shape), (), FLOAT, device)
        inner = inner.contiguous()
    if isinstance(weight, PackedWeight):
        packs, shape = weight.packs, packed_shape(Vd, codes.shape[1])
        check_tensor("correction.weight.packs", packs, shape, ("packs", "r"), WEIGHTS, device)
        weight = PackedWeight(packs.contiguous(), weight.rows)
    else:
        check_tensor("correction.weight", weight, tuple(weight.shape), (), WEIGHTS, device)
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
    return Correction(codes.contiguous(), inner, weight)


def check_codes(codes: Tensor, draft_ids: Tensor | None, Vd: int, anchor: Tensor) -> None:
    """Raise unless each token that may be before another has a code, where it can be looked at."""
    if draft_ids is not None:
        check_increasing("draft_ids", draft_ids, len(codes))
    elif len(codes) < Vd:
        raise ValueError(
            f"correction.codes: expected a row for each of {Vd} tokens, got {len(codes)}"
        )
    if anchor.numel() and readable(anchor):
        least, most = int(anchor.min()), int(anchor.max())
        if least < 0 or most >= len(codes):
            raise ValueError(f"anchor: expected tokens in [0, {len(codes)}), got {least} to {most}")


def check_parents(shape: Tensor) -> None:
    """Raise unless parents [N] come before their children, where they can be looked at."""
    if shape.numel() == 0 or not readable(shape):
        return
    own = torch.arange(len(shape), device=shape.device)
    wrong = ((shape < ROOT) | (shape >= own)).nonzero()
    if wrong.numel():
        n = int(wrong[0])
        raise ValueError(
            f"shape: expected the parent of place {n} to be -1 or a place before it, "
            f"got {int(shape[n])}"
        )
