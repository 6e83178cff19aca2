"""How far the draft's distribution is from the target's, and its gradient, in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import RowDivergenceBackwardInputs, RowDivergenceInputs
from ..types import Divergences, RowDivergence, RowStatistics
from .row_distribution import TEMPERATURE_RANGE

NAN, INF = float("nan"), float("inf")


def row_divergence(inputs: RowDivergenceInputs, *, out: Divergences) -> None:
    """[N, V], [N, D], [D], [N] -> RowDivergence of [N] and statistics [N, 8]"""
    target_logits, draft_logits, draft_ids, temperature = inputs
    V = target_logits.shape[1]
    low, high = TEMPERATURE_RANGE
    valid = (temperature >= low) & (temperature <= high)
    if draft_ids is not None:
        valid = valid & (draft_ids >= 0).all() & (draft_ids < V).all()
        valid = valid & (draft_ids[1:] > draft_ids[:-1]).all()
    target, draft = softmax(target_logits, temperature), softmax(draft_logits, temperature)
    log_p, log_q = drafted(target.log, draft_ids), draft.log  # [N, D]
    p, q = log_p.exp(), log_q.exp()

    tv = (q - p).clamp(min=0).sum(-1)
    kl, reverse_kl = relative_entropy(log_p, log_q), relative_entropy(log_q, log_p)
    target_entropy = torch.special.entr(target.log.exp()).sum(-1)
    draft_entropy = torch.special.entr(q).sum(-1)
    excess = torch.where(q > p, q, 0.0).sum(-1)
    statistics = RowStatistics(
        target.max, target.sum, draft.max, draft.sum, p.sum(-1), excess, reverse_kl, draft_entropy
    )
    # a row that has NaN or +inf, or nothing but -inf, sums to NaN
    valid = valid & ~target.sum.isnan() & ~draft.sum.isnan()
    rows = RowDivergence(tv, kl, reverse_kl, target_entropy, draft_entropy)
    results = (*zip(out.rows, rows, strict=True), (out.statistics, torch.stack(statistics, -1)))
    for tensor, result in results:
        tensor.copy_(torch.where(valid.view(-1, *[1] * (result.ndim - 1)), result, NAN))


def row_divergence_backward(inputs: RowDivergenceBackwardInputs, *, out: Tensor) -> None:
    """The gradients of four outputs [N] -> that of the draft's logits [N, D]"""
    forward, statistics, tv, kl, reverse_kl, draft_entropy = inputs
    target_logits, draft_logits, draft_ids, temperature = forward
    T = temperature.double()[:, None]
    s = RowStatistics(*statistics[:, None].unbind(-1))  # [N, 1] each
    log_p = drafted((target_logits.double() - s.target_max) / T - s.target_sum.log(), draft_ids)
    log_q = (draft_logits.double() - s.draft_max) / T - s.draft_sum.log()
    p, q = log_p.exp(), log_q.exp()
    slopes = (
        (tv, q * ((q > p).double() - s.excess)),
        (kl, s.drafted * q - p),
        (reverse_kl, q * (log_q - log_p - s.reverse_kl)),
        (draft_entropy, -q * (log_q + s.draft_entropy)),
    )
    gradient = sum(torch.where(up[:, None] == 0, 0.0, up[:, None] * slope) for up, slope in slopes)
    gradient = torch.where(draft_logits == -INF, 0.0, gradient / T)

    asked = torch.stack([up != 0 for up, _ in slopes]).any(0)[:, None]
    lost = asked & s.excess.isnan() | (reverse_kl != 0)[:, None] & s.reverse_kl.isinf()
    out.copy_(torch.where(lost, NAN, gradient))


class Softmax(NamedTuple):
    log: Tensor  # f64 [N, V], logarithms of the probabilities
    max: Tensor  # [N], the largest logit
    sum: Tensor  # [N], of exp((l - max) / temperature)


def softmax(logits: Tensor, temperature: Tensor) -> Softmax:
    x = logits.double()
    maximum = x.amax(-1)
    scaled = (x - maximum[:, None]) / temperature.double()[:, None]
    total = scaled.exp().sum(-1)
    return Softmax(scaled - total.log()[:, None], maximum, total)


def drafted(x: Tensor, draft_ids: Tensor | None) -> Tensor:
    """The columns of the drafted tokens. [N, V] -> [N, D]"""
    return x if draft_ids is None else x[:, draft_ids.clamp(0, x.shape[1] - 1)]


def relative_entropy(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum of a (log a - log b), where a token that a cannot reach counts nothing, and one that b
    alone cannot reach counts infinity. -> [N]"""
    terms = torch.where(log_b == -INF, INF, log_a.exp() * (log_a - log_b))
    return torch.where(log_a == -INF, 0.0, terms).sum(-1)
