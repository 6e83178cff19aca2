"""One reverse step of absorbing-state diffusion, position by position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import DenoiseStepInputs, RowDistributionInputs, Sampling
from ..reveal import Order, Reveal
from ..types import Pending, Purpose, RowDistribution, Status
from .numerics import (
    draw,
    entropy,
    mean_exp,
    mulhi,
    probability,
    race,
    race_words,
    random_word,
    unit,
    weights,
)
from .row_distribution import row_distribution
from .verify import empty_distribution


def denoise_step(inputs: DenoiseStepInputs, *, out: Pending) -> None:
    """Logits [R, V] and positions [B, K] -> the positions after the step."""
    draft, pool_rows, reveal, step, entropies, sampling, randomness = inputs
    logits, draft_ids, lengths, rate = draft.logits, draft.draft_ids, draft.lengths, reveal.rate
    assert logits is not None and draft.distribution is not None
    (R, V), K = logits.shape, draft.tokens.shape[1]
    random = Random(*randomness, step)
    masked = masked_positions(draft.tokens, lengths, pool_rows, R)  # [B, K]
    tokens = torch.full_like(draft.tokens, -1)  # what each position would become
    rows, distribution = (
        draft.rows.clone(),
        RowDistribution(*(field.clone() for field in draft.distribution)),
    )
    measured = torch.full_like(tokens, float("nan"), dtype=torch.float64)
    rank = torch.full_like(measured, float("inf"))  # the lowest are revealed first

    for i in range(K):
        row = pool_rows[:, i].clamp(0, R - 1)
        x = logits[row]  # [B, V]
        drawn_from, raw = (empty_distribution(len(row), row.device) for _ in range(2))
        row_distribution(RowDistributionInputs(x, sampling), out=drawn_from)
        plain = Sampling(torch.ones_like(sampling.temperature), None, None, None)
        row_distribution(RowDistributionInputs(x, plain), out=raw)
        read = masked[:, i] & considered(reveal, masked, i, random)
        for field, new in zip(distribution, drawn_from, strict=True):
            field[row[read]] = new[read]

        good = read & (drawn_from.status == Status.OK.value)
        if entropies:
            measured[:, i] = torch.where(good, entropy(x, raw), measured[:, i])
        if reveal.order == Order.SEDD:
            good = good & (unit(random.coin(i)) < rate * mean_exp(raw, V))
        column = random.column(weights(x, drawn_from), draft_ids, i)
        if reveal.order == Order.ENTROPY:
            rank[:, i] = torch.where(good, measured[:, i], rank[:, i])
        if reveal.order == Order.CONFIDENCE:
            e = weights(x, raw).gather(1, column[:, None])[:, 0]
            rank[:, i] = torch.where(good, -probability(e, raw.total), rank[:, i])
        token = column if draft_ids is None else draft_ids[column]
        tokens[:, i] = torch.where(good, token, -1)
        rows[:, i] = torch.where(drawn_from.scale == 0, -1, row)

    chosen = tokens >= 0
    if reveal.order in (Order.ENTROPY, Order.CONFIDENCE):
        place = rank.argsort(dim=-1, stable=True).argsort(-1)
        chosen = chosen & (place < reveal.number)
    out.tokens.copy_(torch.where(chosen, tokens, draft.tokens))
    out.tau.copy_(torch.where(chosen, step, draft.tau))
    out.rows.copy_(torch.where(chosen, rows, draft.rows))
    for field, new in zip(out.distribution, distribution, strict=True):
        field.copy_(new)
    out.entropy.copy_(measured)


class Random(NamedTuple):
    """Where a step's words come from."""

    words: Tensor | None
    seed: Tensor | None
    round: Tensor | None
    position: Tensor | None
    step: int

    def coin(self, i: int) -> Tensor:
        """The word that decides whether position i is revealed. -> i64 [B]"""
        if self.words is not None:
            return self.words[:, i, 0]
        return random_word(self.seed, i, self.round, Purpose.REVEAL, self.step)

    def column(self, e: Tensor, ids: Tensor | None, i: int) -> Tensor:
        """The column that position i draws from weights e [B, V]. -> i64 [B]"""
        V = e.shape[-1]
        if self.position is not None:
            ids = torch.arange(V, device=e.device) if ids is None else ids
            if self.words is not None:
                return race(e, self.words[:, i, 1:])
            return race(e, race_words(self.seed, self.position + i, ids))
        if self.words is not None:
            return draw(e, self.words[:, i, 1]).clamp(max=V - 1)
        word = random_word(self.seed, i, self.round, Purpose.DRAFT, self.step)
        return draw(e, word).clamp(max=V - 1)


def masked_positions(tokens: Tensor, lengths: Tensor | None, pool_rows: Tensor, R: int) -> Tensor:
    """Positions that a step may reveal. -> bool [B, K]"""
    masked = (tokens < 0) & (pool_rows >= 0) & (pool_rows < R)
    if lengths is None:
        return masked
    return masked & (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])


def considered(reveal: Reveal, masked: Tensor, i: int, random: Random) -> Tensor | bool:
    """Whether position i's logits have to be read, by all that is known without them. [B]"""
    if reveal.order == Order.CHUNK:
        return reveal.lo <= i < reveal.hi
    if reveal.order == Order.MDLM:
        return unit(random.coin(i)) < reveal.rate
    if reveal.order == Order.FIRST_HITTING:
        return masked[:, :i].sum(-1) == mulhi(random.coin(0), masked.sum(-1))
    return True
