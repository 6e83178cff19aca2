"""Verification of a draft: the token, block, coupled and lenient rules."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..inputs import Randomness, RowDistributionInputs, Sampling, VerifyInputs
from ..lenience import KINDS
from ..records import Record
from ..types import DISTRIBUTION, Draft, Lenience, Purpose, RowDistribution, Status, Verified
from .numerics import ONE, draw, probability, race, race_words, random_word, unit, weights
from .row_distribution import row_distribution

Fields = TypeVar("Fields", Sampling, RowDistribution)


def verify(inputs: VerifyInputs, *, out: Verified) -> None:
    """[B, K+1, V] target logits and a Draft -> Verified."""
    target_logits, draft, rule, record, lenience, sampling, random = inputs
    B, positions, _ = target_logits.shape
    K = positions - 1
    lengths = draft_lengths(draft, B, K)
    status = torch.where((lengths < 0) | (lengths > K), int(Status.TOKEN), 0).int()
    if lenience is not None:
        _, allows = KINDS[lenience.kind]
        unfit = (status == Status.OK.value) & ~allows(torch.as_tensor(lenience.amount))
        status = torch.where(unfit, int(Status.PARAMETER), status)
    distributions = []
    for i in range(positions):
        distributions.append(empty_distribution(B, target_logits.device))
        row = RowDistributionInputs(target_logits[:, i], sampling)
        row_distribution(row, out=distributions[i])
    e_p = [weights(target_logits[:, i], distributions[i]) for i in range(positions)]  # each [B, V]
    round_ = Round(draft, lengths, recorded_positions(draft, record), distributions, e_p, status)
    bias = torch.zeros_like(lengths, dtype=torch.float64)
    if rule == "coupled":
        accepted, token, status = coupled_rule(round_, random)
    elif rule == "block":
        accepted, token, status = block_rule(round_, random)
    else:
        accepted, token, status, bias = token_rule(round_, random, lenience)

    good = status == Status.OK.value
    column = torch.arange(positions, device=accepted.device)
    padded = torch.cat((draft.tokens, token[:, None]), 1)
    emitted = torch.where(column < accepted[:, None], padded, -1)
    emitted = torch.where(column == accepted[:, None], token[:, None], emitted)
    out.accepted.copy_(torch.where(good, accepted, 0))
    out.emitted.copy_(torch.where(good[:, None], emitted, -1))
    out.status.copy_(status)
    out.bias.copy_(torch.where(good, bias, 0.0))


class Round(NamedTuple):
    """Inputs of the acceptance rules."""

    draft: Draft
    lengths: Tensor  # i64 [B]
    recorded: Tensor  # bool [B, K]
    distributions: list[RowDistribution]  # of the K + 1 target rows
    e_p: list[Tensor]  # their weights [B, V]
    status: Tensor  # i32 [B], faults of the arguments


def accept_word(random: Randomness, i: int) -> Tensor:
    """For drafted token i. -> i64 [B]"""
    if random.words is not None:
        return random.words[:, i]
    return random_word(random.seed, i, random.round, Purpose.ACCEPT)


def last_word(random: Randomness, i: int, drafted: Tensor) -> Tensor:
    """For the token that ends the round at position i: a residual draw or the bonus."""
    if random.words is not None:
        return random.words[:, -1]
    purpose = torch.where(drafted, int(Purpose.RESIDUAL), int(Purpose.BONUS))
    return random_word(random.seed, i, random.round, purpose)


def token_rule(
    r: Round, random: Randomness, lenience: Lenience | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accept x iff u q(x) < p(x); on rejection emit from (p - q)+ (Leviathan et al. 2211.17192,
    Algorithm 1), after the last drafted token from p. Under a lenience accept x iff u q(x) < p'(x)
    >= p(x), which has the bias sum_v (min(q, p') - p)+ (Yin et al. 2411.00841).
    -> accepted, token behind, status, bias [B]
    """
    bias = torch.zeros_like(r.lengths, dtype=torch.float64)
    status, accepted, token = r.status, torch.zeros_like(r.lengths), torch.zeros_like(r.lengths)
    running = status == Status.OK.value
    for i, (distribution, e_p) in enumerate(zip(r.distributions, r.e_p, strict=True)):
        status = torch.where(running, distribution.status, status)
        drafted = running & (i < r.lengths)
        accept, residual, spent = torch.zeros_like(drafted), e_p, torch.zeros_like(bias)
        if i < r.draft.tokens.shape[1]:
            e_q, q_total, fault = draft_weights(r.draft, i, r.recorded[:, i], e_p.shape[1])
            status = torch.where(drafted & (status == Status.OK.value), fault, status)
            x = r.draft.tokens[:, i].clamp(0, e_p.shape[1] - 1)[:, None]
            p, q = probability(e_p, distribution.total[:, None]), probability(e_q, q_total[:, None])
            chance = p
            if lenience is not None:
                chance = raised(p, q, lenience)
                spent = excess(torch.minimum(q, chance), p).sum(-1).double() * 2.0**-60
            accept = unit(accept_word(random, i)) * q.gather(1, x)[:, 0] < chance.gather(1, x)[:, 0]
            without_x = e_p.scatter(1, x, 0)
            residual = torch.where(r.recorded[:, i, None], excess(p, q), without_x)
        running = running & (status == Status.OK.value)
        accept = accept & drafted
        bias = torch.where(running & drafted, bias + spent, bias)
        last = torch.where(drafted[:, None], or_else(residual, e_p), e_p)
        drawn = draw(last, last_word(random, i, drafted))
        token = torch.where(running & ~accept, drawn, token)
        accepted = accepted + (running & accept)
        running = running & accept
    return accepted, token, status, bias


def raised(p: Tensor, q: Tensor, lenience: Lenience) -> Tensor:
    """p' >= p, by which a lenient rule accepts; 0 where p is. [B, V] -> f64 [B, V]"""
    amount = torch.as_tensor(lenience.amount)[:, None]
    if lenience.kind == "lenience":
        more = p / amount
    elif lenience.kind == "additive":
        more = p + amount
    else:
        more = torch.maximum(p, (1.0 - amount) * q + amount * p)
    return torch.where(p > 0, more, 0.0)


def block_rule(r: Round, random: Randomness) -> tuple[Tensor, Tensor, Tensor]:
    """Block verification (Sun et al. 2403.10444, Algorithm 2): P_i = min(1, P_{i-1} p(x_i)/q(x_i)),
    S_i = sum_v (P_i p_{i+1}(v) - q_{i+1}(v))+, accept up to the largest i with u_i < h_i,
    h_i = min(P_i, S_i / (S_i + 1 - P_i)), 1 where P_i is 1, and h_K = P_K; then emit from
    (P_i p_{i+1} - q_{i+1})+, after the last drafted token from p. -> accepted, token behind, status

    Once P_i is 0 nothing further is read.
    """
    status, V = r.status, r.e_p[0].shape[1]
    accepted, token = torch.zeros_like(r.lengths), torch.zeros_like(r.lengths)
    last_fault = torch.zeros_like(status)  # of the bonus row, if it comes to that
    P = torch.ones_like(r.lengths, dtype=torch.float64)
    for i, (distribution, e_p) in enumerate(zip(r.distributions, r.e_p, strict=True)):
        running = (status == Status.OK.value) & (P > 0) & (i <= r.lengths)
        drafted = running & (i < r.lengths)
        status = torch.where(drafted, distribution.status, status)
        S, residual, p_x, q_x = torch.zeros_like(P), e_p, P, P
        if i < r.draft.tokens.shape[1]:
            e_q, q_total, fault = draft_weights(r.draft, i, r.recorded[:, i], V)
            status = torch.where(drafted & (status == Status.OK.value), fault, status)
            x = r.draft.tokens[:, i].clamp(0, V - 1)[:, None]
            p, q = probability(e_p, distribution.total[:, None]), probability(e_q, q_total[:, None])
            residual = excess(P[:, None] * p, q)
            S = residual.sum(-1).double() * 2.0**-60
            p_x, q_x = p.gather(1, x)[:, 0], q.gather(1, x)[:, 0]
        h = torch.where(drafted & (P < 1), torch.minimum(S / (S + 1.0 - P), P), P)
        u = unit(accept_word(random, i - 1)) if i else torch.full_like(P, -1.0)
        here = running & (status == Status.OK.value) & (u < h)
        last = torch.where(drafted[:, None], or_else(residual, e_p), e_p)
        drawn = draw(last, last_word(random, i, drafted))
        accepted, token = torch.where(here, i, accepted), torch.where(here, drawn, token)
        last_fault = torch.where(here, distribution.status, last_fault)
        P = torch.where(drafted, (P * p_x / q_x).clamp(max=1.0), P)
    return accepted, token, torch.where(status == Status.OK.value, last_fault, status)


def coupled_rule(r: Round, random: Randomness) -> tuple[Tensor, Tensor, Tensor]:
    """Emit y = argmin_v E_v / e_p(v), the noise keyed by absolute position and token alone; go on
    while the drafted token is y. -> accepted, token behind, status [B]
    """
    status, accepted, token = r.status, torch.zeros_like(r.lengths), torch.zeros_like(r.lengths)
    running = status == Status.OK.value
    V = r.e_p[0].shape[1]
    for i, (distribution, e_p) in enumerate(zip(r.distributions, r.e_p, strict=True)):
        status = torch.where(running, distribution.status, status)
        drafted = running & (i < r.lengths)
        ids = torch.arange(V, device=e_p.device)
        at = None if random.position is None else random.position + i
        words = race_words(random.seed, at, ids) if random.words is None else random.words[:, i]
        y = race(e_p, words)
        x = r.draft.tokens[:, i] if i < r.draft.tokens.shape[1] else y
        bad_id = drafted & (status == Status.OK.value) & ((x < 0) | (x >= V))
        status = torch.where(bad_id, int(Status.TOKEN), status)
        running = running & (status == Status.OK.value)
        accept = running & drafted & (x == y)
        token = torch.where(running & ~accept, y, token)
        accepted = accepted + accept
        running = accept
    return accepted, token, status


def excess(p: Tensor, q: Tensor) -> Tensor:
    """int(max(p - q, 0) 2^60). f64 -> i64"""
    return ((p - q).clamp(min=0) * 2.0**60).to(torch.int64)


def or_else(e: Tensor, other: Tensor) -> Tensor:
    """Weights e [B, V], or the other ones where they are all 0."""
    return torch.where(e.sum(-1, keepdim=True) > 0, e, other)


def draft_lengths(draft: Draft, B: int, K: int) -> Tensor:
    """How many tokens each sequence drafted. -> i64 [B]"""
    if draft.lengths is not None:
        return draft.lengths
    return torch.full((B,), K, dtype=torch.int64, device=draft.tokens.device)


def recorded_positions(draft: Draft, record: Record) -> Tensor:
    """Where the recorded distribution is used. -> bool [B, K]"""
    recorded = draft.rows >= 0
    if record == Record.ONE_HOT or draft.tokens.shape[1] == 0:
        return torch.zeros_like(recorded)
    if record == Record.FINAL:
        return recorded & (draft.tau == draft.final_step)
    if record == Record.RUNNING_MAX:
        return recorded & (draft.tau >= draft.tau.cummax(-1).values)
    return recorded


def draft_weights(draft: Draft, i: int, recorded: Tensor, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of position i's distributions over the target's ids: the recorded one, or all on the
    token.

    Returns:
        e_q [B, V], its total and the fault of the record [B].
    """
    x = draft.tokens[:, i]
    fault = torch.where((x < 0) | (x >= V), int(Status.TOKEN), int(Status.OK)).int()
    one_hot = torch.zeros((len(x), V), dtype=torch.int64, device=x.device)
    one_hot.scatter_(1, x.clamp(0, V - 1)[:, None], ONE)
    total = torch.full_like(x, ONE)
    if draft.logits is None or draft.distribution is None or len(draft.logits) == 0:
        return one_hot, total, torch.where(recorded, int(Status.TOKEN), fault)
    R = len(draft.logits)
    fault = torch.where(recorded & (draft.rows[:, i] >= R), int(Status.TOKEN), fault)
    row = draft.rows[:, i].clamp(0, R - 1)
    distribution = RowDistribution(*(field[row] for field in draft.distribution))
    ids = torch.arange(V, device=x.device) if draft.draft_ids is None else draft.draft_ids
    e = one_hot.new_zeros(len(x), V + 1)  # a column too many, for ids that the target does not have
    e[:, torch.where((ids >= 0) & (ids < V), ids, V)] = weights(draft.logits[row], distribution)
    e = e[:, :V]
    weightless = e.gather(1, x.clamp(0, V - 1)[:, None])[:, 0] == 0
    contradiction = recorded & weightless & (fault == Status.OK.value)
    fault = torch.where(contradiction, int(Status.DRAFT), fault)
    e = torch.where(recorded[:, None], e, one_hot)
    return e, torch.where(recorded & (distribution.status == 0), distribution.total, total), fault


def one_row(fields: Fields, row: int) -> Fields:
    """A record of tensors [N, ...] for a single row, [1, ...]."""
    rows: list[Any] = [None if x is None else x[row : row + 1] for x in fields]
    return type(fields)(*rows)


def empty_distribution(N: int, device: torch.device) -> RowDistribution:
    """A RowDistribution of N rows to write into."""
    return DISTRIBUTION.empty({"N": N}, device, None)
