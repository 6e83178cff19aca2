"""Row distribution: logits -> max, scale, threshold, total, status."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import RowDistributionInputs, Sampling
from ..types import RowDistribution, Status
from .numerics import LOG2_E, ONE, weights

TEMPERATURE_RANGE = (2.0**-95, 2.0**95)


def row_distribution(inputs: RowDistributionInputs, *, out: RowDistribution) -> None:
    """[N, V] logits and [N] parameters -> RowDistribution, by definition rather than by speed."""
    logits, sampling = inputs
    temperature, top_k, top_p, min_p = sampling
    x = logits.float()
    status = row_status(x, sampling)
    good = status == Status.OK.value
    greedy = temperature == 0
    maximum = torch.where(good, x.amax(-1), torch.zeros_like(temperature))
    log2_e = torch.full_like(temperature, LOG2_E)
    scale = log2_e / torch.where(good & ~greedy, temperature, torch.ones_like(temperature))
    scale = torch.where(good & ~greedy, scale, torch.zeros_like(scale))
    first_maximum = (x == maximum[:, None]).int().argmax(-1)
    zero = torch.zeros_like(first_maximum)

    plain = RowDistribution(
        maximum, scale, torch.where(good & greedy, first_maximum, zero), zero, status
    )
    e = weights(x, plain)
    highest = weights(maximum[:, None], plain)[:, 0]
    threshold = truncate(e, highest, top_k, top_p, min_p)
    total = torch.where(e >= threshold[:, None], e, torch.zeros_like(e)).sum(-1)
    sampled = good & ~greedy
    out.max.copy_(maximum)
    out.scale.copy_(scale)
    out.threshold.copy_(torch.where(sampled, threshold, plain.threshold))
    out.total.copy_(torch.where(sampled, total, torch.where(good, ONE, 0)))
    out.status.copy_(status)


def row_status(x: Tensor, sampling: Sampling) -> Tensor:
    """The first reason why a row has no distribution, else OK. -> i32 [N]"""
    temperature, top_k, top_p, min_p = sampling
    low, high = TEMPERATURE_RANGE
    bad = ~((temperature == 0) | ((temperature >= low) & (temperature <= high)))
    if top_k is not None:
        bad = bad | (top_k < 0)
    if top_p is not None:
        bad = bad | ~((top_p > 0) & (top_p <= 1))
    if min_p is not None:
        bad = bad | ~((min_p >= 0) & (min_p <= 1))
    status = torch.zeros_like(temperature, dtype=torch.int32)
    status = torch.where((x == float("-inf")).all(-1), int(Status.EMPTY), status)
    status = torch.where((x == float("inf")).any(-1), int(Status.POS_INF), status)
    status = torch.where(x.isnan().any(-1), int(Status.NAN), status)
    return torch.where(bad, int(Status.PARAMETER), status)


def truncate(
    e: Tensor, highest: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """Smallest weight that survives top-k, then top-p, then min-p (0 = off). [N, V] -> i64 [N]

    highest: the weight of each row's largest logit, which always survives.
    """
    descending = e.sort(-1, descending=True).values
    threshold = torch.zeros_like(e[:, 0])
    if top_k is not None:
        last = (top_k - 1).clamp(0, e.shape[-1] - 1)
        kth = descending.gather(-1, last[:, None]).squeeze(-1)
        threshold = torch.where((top_k > 0) & (top_k < e.shape[-1]), kth, threshold)
    if top_p is not None:
        kept = torch.where(descending >= threshold[:, None], descending, torch.zeros_like(e))
        cumulative = kept.cumsum(-1)
        need = ceil_share(top_p, cumulative[:, -1])
        index = (cumulative < need[:, None]).sum(-1, keepdim=True).clamp(max=e.shape[-1] - 1)
        nucleus = torch.maximum(threshold, kept.gather(-1, index).squeeze(-1))
        threshold = torch.where(top_p < 1, nucleus, threshold)
    if min_p is not None:
        floor = (min_p.double() * highest.double()).to(torch.int64)
        threshold = torch.maximum(threshold, floor)
    return torch.minimum(threshold, highest)


def ceil_share(share: Tensor, total: Tensor) -> Tensor:
    """ceil(share * total) for share in (0, 1] read as a multiple of 2^-31, at least 1. -> i64"""
    numerator = (share.double() * 2.0**31).to(torch.int64)
    low = numerator * (total & 0x7FFFFFFF)
    return (numerator * (total >> 31) + ((low + 0x7FFFFFFF) >> 31)).clamp(min=1)
