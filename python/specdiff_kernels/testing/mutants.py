"""The token rule in plain torch, and verifiers with one known mistake each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .worlds import Drafted, K


class Outcome(NamedTuple):
    """Results of a verifier on N drafts."""

    accepted: Tensor  # integers [N], how many drafted tokens stand
    token: Tensor  # integers [N], the one behind them


Verifier = Callable[[Drafted], Outcome]


def token_rule(draft: Drafted) -> Outcome:
    """The token rule in plain torch (Leviathan et al. 2023, Algorithm 1): the control.

    Example:
        >>> from specdiff_kernels.testing import check_verifier
        >>> check_verifier(token_rule, draws=2000).failures("u = 0")
        ()
    """
    return _verify(draft)


def fp32_gumbel(logits: Tensor) -> Tensor:
    """A sampler by argmax of logits and -log(-log u) in fp32, with 24 bits of u: a mutant.

    Neighbours with equal logits share one number, the largest of as many. Tokens have the same
    distribution as with a number each, up to ties, and cost a thousandth of the time.

    Args:
        logits: f32 [N, V], N equal rows.

    Returns:
        i64 [N].

    Example:
        >>> _ = torch.manual_seed(0)
        >>> fp32_gumbel(torch.tensor([[0.0, -90.0, 0.0]]).expand(1000, 3)).unique().tolist()
        [0, 2]
    """
    values, sizes = logits[0].unique_consecutive(return_counts=True)
    u = torch.rand(len(logits), len(values), dtype=torch.float64) ** (1.0 / sizes)
    u = ((u * 2**24).floor() * 2**-24).float()
    best = (values - (-u.log()).log()).argmax(-1)
    member = (torch.rand(len(logits), dtype=torch.float64) * sizes[best]).long()
    return (sizes.cumsum(0) - sizes)[best] + member


def _strict(u: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return u * q < p


def _residual(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).clamp_min(0)


def _normalised(u: Tensor, weights: Tensor) -> Tensor:
    return _inverse(u * weights.sum(-1), weights)


def _inverse(u: Tensor, weights: Tensor) -> Tensor:
    """The first token whose cumulated weight exceeds u. [N], [N, V] -> [N]"""
    beyond = (weights.cumsum(-1) <= u[:, None]).sum(-1)
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).long().argmax(-1)
    return beyond.minimum(last)


def _verify(
    draft: Drafted,
    *,
    uniform: Callable[..., Tensor] | None = None,
    accept: Callable[[Tensor, Tensor, Tensor], Tensor] = _strict,
    residual: Callable[[Tensor, Tensor], Tensor] = _residual,
    draw: Callable[[Tensor, Tensor], Tensor] = _normalised,
    shared: bool = False,
    believe: bool = False,
) -> Outcome:
    """The token rule with its parts exchangeable. shared: u decides on the next token too.
    believe: every row is used, also those that another reverse step has made stale."""
    N = len(draft.tokens)
    p, q = draft.target_logits.double().softmax(-1), draft.draft_logits.double().softmax(-1)
    guess = torch.nn.functional.one_hot(draft.tokens, q.shape[-1]).double()
    q = torch.where(draft.recorded[:, None] | believe, q, guess)
    at = draft.tokens[..., None]
    u = (uniform or torch.rand)(N, K + 1, dtype=torch.float64)
    stands = accept(u[:, :K], p[:, :K].gather(-1, at)[..., 0], q.gather(-1, at)[..., 0])
    accepted = stands.long().cumprod(-1).sum(-1)
    rows = torch.arange(N)
    last = accepted == K
    stopped = accepted.clamp_max(K - 1)
    weights = residual(p[rows, stopped], q[rows, stopped])
    weights = torch.where(last[:, None], p[:, K], weights)
    v = torch.where(last, u[:, K], u[rows, stopped]) if shared else torch.rand(N).double()
    return Outcome(accepted, draw(v, weights))


MUTANTS: dict[str, Verifier] = {
    "u = 0": lambda d: _verify(d, uniform=torch.zeros),
    "non-strict accept": lambda d: _verify(d, accept=lambda u, p, q: u * q <= p),
    "residual unnormalised": lambda d: _verify(d, draw=_inverse),
    "residual skipped": lambda d: _verify(d, residual=lambda p, q: p),
    "noise of acceptance and residual shared": lambda d: _verify(d, shared=True),
    "recorded q on an out-of-order draft": lambda d: _verify(d, believe=True),
}
