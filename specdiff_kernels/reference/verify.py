"""Verification of a draft by the token rule, position by position."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import LAW_DTYPES, Draft, Purpose, RowLaw, Status, Verified
from .numerics import draw, probability, random_word, unit, weights
from .row_law import row_law


def verify(
    target_logits: Tensor,
    draft: Draft,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor | None,
    round: Tensor | None,
    words: Tensor | None,
    *,
    out: Verified,
) -> None:
    """[B, K+1, V] target logits and a Draft -> Verified.

    Accept x iff u q(x) < p(x) (Leviathan et al. 2211.17192, Algorithm 1); on rejection emit from
    (p - q)+, after the last drafted token from p.
    """
    B, positions, V = target_logits.shape
    K = positions - 1
    lengths = draft_lengths(draft, B, K)
    recorded = recorded_positions(draft)  # [B, K]
    status = torch.where((lengths < 0) | (lengths > K), int(Status.TOKEN), 0).int()
    running = status == Status.OK
    accepted = torch.zeros_like(lengths)
    emitted = torch.full_like(out.emitted, -1)

    for i in range(K + 1):
        p_law = empty_law(B, target_logits.device)
        row_law(target_logits[:, i], temperature, top_k, top_p, min_p, out=p_law)
        e_p = weights(target_logits[:, i], p_law)  # [B, V]
        status = torch.where(running, p_law.status, status)
        drafted = running & (i < lengths)
        if i < K:
            x = draft.tokens[:, i]
            e_q, q_total, fault = draft_weights(draft, i, recorded[:, i], V)
            status = torch.where(drafted & (status == Status.OK), fault, status)
            x_at = x.clamp(0, V - 1)[:, None]
            one_hot = torch.zeros_like(e_p, dtype=torch.bool).scatter_(1, x_at, True)
            p, q = probability(e_p, p_law.total[:, None]), probability(e_q, q_total[:, None])
            q_x = torch.where(recorded[:, i], q.gather(1, x_at)[:, 0], 1.0)
            accept = unit(accept_word(words, seed, round, i)) * q_x < p.gather(1, x_at)[:, 0]
            residual = ((p - q).clamp(min=0) * 2.0**60).to(torch.int64)
            without_x = torch.where(one_hot, 0, e_p)
            residual = torch.where(recorded[:, i, None], residual, without_x)
            residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, e_p)
        else:
            x, accept, residual = lengths, torch.zeros_like(drafted), e_p
        running = running & (status == Status.OK)
        accept = accept & drafted
        last = torch.where(drafted[:, None], residual, e_p)
        token = draw(last, last_word(words, seed, round, i, drafted))
        emitted[:, i] = torch.where(running, torch.where(accept, x, token), -1)
        accepted += running & accept
        running = running & accept

    good = status == Status.OK
    out.accepted.copy_(torch.where(good, accepted, 0))
    out.emitted.copy_(torch.where(good[:, None], emitted, -1))
    out.status.copy_(status)


def draft_lengths(draft: Draft, B: int, K: int) -> Tensor:
    """How many tokens each sequence drafted. -> i64 [B]"""
    if draft.lengths is not None:
        return draft.lengths
    return torch.full((B,), K, dtype=torch.int64, device=draft.tokens.device)


def recorded_positions(draft: Draft) -> Tensor:
    """Where the recorded law may be used: the running-max rule. -> bool [B, K]

    x_i still follows its recorded law given that all earlier positions were accepted only if none
    of them was sampled in a later reverse step. If sampled values chose what to reveal, nowhere.
    """
    recorded = draft.rows >= 0
    if draft.value_dependent:
        return torch.zeros_like(recorded)
    if draft.tokens.shape[1] == 0:
        return recorded
    return recorded & (draft.tau >= draft.tau.cummax(-1).values)


def draft_weights(draft: Draft, i: int, recorded: Tensor, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of position i's recorded laws over the target's ids. -> [B, V], total, fault [B]"""
    x = draft.tokens[:, i]
    fault = torch.where((x < 0) | (x >= V), int(Status.TOKEN), int(Status.OK)).int()
    e = torch.zeros((len(x), V), dtype=torch.int64, device=x.device)
    total = torch.ones_like(x)
    if draft.logits is None or draft.law is None or len(draft.logits) == 0:
        return e, total, torch.where(recorded, int(Status.TOKEN), fault)
    R = len(draft.logits)
    fault = torch.where(recorded & (draft.rows[:, i] >= R), int(Status.TOKEN), fault)
    row = draft.rows[:, i].clamp(0, R - 1)
    law = RowLaw(*(field[row] for field in draft.law))
    reduced = weights(draft.logits[row], law)  # [B, Vd]
    ids = torch.arange(V, device=x.device) if draft.draft_ids is None else draft.draft_ids
    e[:, ids] = torch.where(recorded[:, None], reduced, 0)
    total = torch.where(recorded & (law.status == 0), law.total, total)
    weightless = e.gather(1, x.clamp(0, V - 1)[:, None])[:, 0] == 0
    contradiction = recorded & weightless & (fault == Status.OK)
    return e, total, torch.where(contradiction, int(Status.DRAFT), fault)


def accept_word(words: Tensor | None, seed: Tensor | None, round: Tensor | None, i: int) -> Tensor:
    return words[:, i] if words is not None else random_word(seed, i, round, Purpose.ACCEPT)


def last_word(
    words: Tensor | None, seed: Tensor | None, round: Tensor | None, i: int, drafted: Tensor
) -> Tensor:
    """The word of the token that ends the round at position i: a residual draw or the bonus."""
    if words is not None:
        return words[:, -1]
    purpose = torch.where(drafted, int(Purpose.RESIDUAL), int(Purpose.BONUS))
    return random_word(seed, i, round, purpose)


def empty_law(N: int, device: torch.device) -> RowLaw:
    """A RowLaw of N rows to write into."""
    return RowLaw(*(torch.empty(N, dtype=dtype, device=device) for dtype in LAW_DTYPES))
