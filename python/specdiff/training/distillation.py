"""Distillation: a DraftNetwork learns the target's distributions on text that the target wrote.

A parallel drafter knows only the tokens before the draft. Its ideal distribution at position i of a
draft is the target's, averaged over the drafted tokens in between. Text written by the target has
these tokens at the right frequencies. So the ideal distribution minimises the divergence from the
target's distribution at each position, averaged over the text (DistillSpec, 2310.08461;
ParallelSpec, 2410.05589). An eagle knows the tokens in between, so its ideal is the target's
distribution itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..drafters.head import scaled
from ..drafters.network import DraftConfig, DraftNetwork, principal_axes
from .conversations import Conversations
from .groups import Groups, forward_groups, sample_groups, shifted, take
from .linear_divergence import linear_divergence
from .objective import Objective
from .seeds import generator
from .teacher import BATCH, Teacher

FLEX_LEAST = 16  # smallest head width that FlexAttention supports
RIDGE = 1e-3  # relative to the inputs' mean square, which is 1


class Batch(NamedTuple):
    """Texts and groups of one forward."""

    tokens: Tensor  # i64 [B, S]
    states: Tensor  # f32 [B, S, (n + 1) target_d], the target's: n layers, then the lm head's input
    first: Tensor  # i64 [B], column that predicts the answer's first token
    length: Tensor  # i64 [B]
    groups: Groups
    block: int  # K, draft length


class Drafts(NamedTuple):
    """States of the network and the target for a draft of K positions after each anchor."""

    states: Tensor  # [B, A, K, d], the network's states
    before: Tensor  # i64 [B, A, K], the text's token before each position
    target: Tensor  # [B, A, K, target_d], the lm head's input at each position
    inside: Tensor  # bool [B, A, K], whether the position is within the answer
    text: Tensor  # [B, S, d], the network's states of the text


class Distillation(nn.Module):
    """Training task: the mean divergence over texts, drafts and positions.

    Args:
        network: the network to train.
        teacher: the target to learn from.
        rows, held_out: i64, indices of conversations to train on, and for `held_out_loss`.
        objective: divergence and weights.
        seed: seed of the groups' positions.
    """

    def __init__(
        self,
        network: DraftNetwork,
        teacher: Teacher,
        rows: Tensor,
        held_out: Tensor,
        objective: Objective,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.objective = network, objective
        self.teacher, self.data = teacher, teacher.conversations
        self.rows, self.held_out = rows, held_out
        self.seed = seed
        self.lengths = self.data.length[rows]

    def forward(self, chosen: Tensor, step: int, progress: float) -> Tensor:
        """Mean loss of the conversations with indices i64 [B]. -> f32 []

        `progress` is the finished share of the training.
        """
        chosen = chosen.cpu()  # DDP has moved it to the device
        block = draft_length(self.network.config, self.seed, step)
        return self.loss(
            self.network, self.batch(chosen, step, self.objective.anchors, block), progress
        )

    def batch(self, chosen: Tensor, step: int, anchors: int, block: int) -> Batch:
        """Texts with groups. The groups depend on the seed, the step and each text only."""
        data, config = self.data, self.network.config
        first, length = data.prompt_length[chosen] - 1, data.length[chosen]
        generators = [generator(self.seed, step, row) for row in chosen.tolist()]
        revealing = config.kind == "block-diffusion"
        groups = sample_groups(first, length - 2, anchors, block, generators, revealing=revealing)
        S, device = int(length.max()), self.teacher.device
        states = self.teacher.states(chosen, S)
        moved = (x.to(device) for x in (first, length, *groups))
        first, length, anchor, revealed = moved
        tokens = data.tokens[chosen, :S].to(device)
        return Batch(tokens, states, first, length, Groups(anchor, revealed), block)

    def loss(self, network: DraftNetwork, batch: Batch, progress: float) -> Tensor:
        """Mean over texts of the weighted mean over drafts and their positions. -> f32 []"""
        drafts = make_drafts(network, self.teacher, batch)
        weight = self.weights(network.config, batch) * drafts.inside
        asked = weight > 0
        rows = [x[asked] for x in (drafts.states, drafts.before, drafts.target, weight)]
        if network.config.causal:  # train the first position on the whole text
            column = torch.arange(batch.tokens.shape[1], device=batch.first.device)
            answer = (column >= batch.first[:, None]) & (column < batch.length[:, None] - 1)
            share = answer / answer.sum(1, keepdim=True)
            text = (drafts.text, batch.tokens, head_inputs(network, batch.states), share)
            rows = [torch.cat((x[answer], y)) for x, y in zip(text, rows, strict=True)]
        states, before, target, weight = rows
        value = linear_divergence(
            output_inputs(network, self.teacher, states, before),
            target,
            weight,
            self.teacher.draft_output,
            None if network.head is None else network.head.out.weight,
            network.bias,
            lambda divergence: self.objective.value(divergence, progress),
        )
        positions = range(network.config.block)
        return value / (len(batch.length) * sum(map(self.objective.position_weight, positions)))

    def weights(self, config: DraftConfig, batch: Batch) -> Tensor:
        """Weights of draft positions. Positions that fewer drafts reach weigh more.

        -> f32 [B, A, K]
        """
        K, device = batch.block, batch.first.device
        A = batch.groups.anchor.shape[1]
        offset = torch.arange(K, device=device) - batch.groups.revealed[..., None]
        first = 1 if config.causal else 0
        weight = torch.tensor([self.objective.position_weight(i) for i in range(K)], device=device)
        lengths = draft_lengths(config)
        reached = [sum(k > i for k in lengths) / len(lengths) for i in range(K)]
        weight = weight[offset.clamp(min=0)] / torch.tensor(reached, device=device)
        return weight.where(offset >= first, 0.0) / A

    @torch.no_grad()
    def held_out_loss(self, network: DraftNetwork, texts: int = 16) -> float:
        """Loss at progress 0 on fixed drafts of up to `texts` held-out conversations."""
        rows, total = by_length(self.held_out[:texts], self.data), 0.0
        for block in (lengths := draft_lengths(network.config)):
            for chosen in rows.split(4):
                batch = self.batch(chosen, -1, 16, block)
                total += float(self.loss(network, batch, 0.0)) * len(chosen)
        return total / len(lengths) / len(rows)


def make_drafts(network: DraftNetwork, teacher: Teacher, batch: Batch) -> Drafts:
    """Run the network on texts and groups, and pair its states with the target's."""
    K, S = batch.block, batch.tokens.shape[1]
    embedded = F.embedding(batch.tokens, teacher.embedding).float()
    flex = embedded.is_cuda and network.config.hidden_size // network.config.heads >= FLEX_LEAST
    text, states = forward_groups(
        network, embedded, shifted(batch.states), batch.groups, K, flex=flex
    )
    anchor = batch.groups.anchor
    if network.config.causal:
        states = torch.cat((take(text, anchor)[:, :, None], states), 2)
    # [B, A, K], the column before each position
    column = anchor[..., None] + torch.arange(K, device=anchor.device)
    inside = column + 1 < batch.length[:, None, None]
    column = column.clamp(max=S - 1)
    before = batch.tokens.gather(1, column.flatten(1)).view_as(column)
    target = take(head_inputs(network, batch.states), column.flatten(1))
    return Drafts(states, before, target.view(*column.shape, -1), inside, text)


def head_inputs(network: DraftNetwork, states: Tensor) -> Tensor:
    """The lm head's inputs: the last target_d of the concatenated states. -> [..., target_d]"""
    return states[..., -network.config.target_hidden_size :]


def draft_logits(network: DraftNetwork, teacher: Teacher, states: Tensor, before: Tensor) -> Tensor:
    """Final states [..., d] and tokens before i64 [...] -> logits [..., D] over draft_ids"""
    matrix = teacher.draft_output
    if network.head is not None:
        matrix = torch.cat((matrix, network.head.out.weight), 1)
    return F.linear(output_inputs(network, teacher, states, before), matrix, network.bias)


def output_inputs(
    network: DraftNetwork, teacher: Teacher, states: Tensor, before: Tensor
) -> Tensor:
    """Inputs of the target's output embedding and of the sequential head's W, concatenated.

    -> [..., target_d + r]
    """
    predicted = network.embed_out(states)
    if network.head is None:
        return predicted
    embedded = F.embedding(before, teacher.embedding).float()
    return torch.cat((predicted, network.head.code(embedded, states)), -1)


def draft_lengths(config: DraftConfig) -> list[int]:
    """Draft lengths in training: the maximum, half and a quarter of it, and the default."""
    block = config.block
    return sorted({block, max(1, block // 2), max(1, block // 4), config.k or block})


def draft_length(config: DraftConfig, seed: int, step: int) -> int:
    """The draft length of a step."""
    lengths = draft_lengths(config)
    return lengths[int(torch.randint(len(lengths), (), generator=generator(seed, step)))]


def by_length(rows: Tensor, data: Conversations) -> Tensor:
    """Sort rows by length, so that neighbours need little padding."""
    return rows[data.length[rows].argsort(stable=True)]


@torch.no_grad()
def fit_linear(network: DraftNetwork, teacher: Teacher, rows: Tensor) -> None:
    """Initialise the network with the best linear prediction of the next state.

    Ridge regression predicts h[t] from the token x[t], the state h[t-1] and a constant. It is
    solved in closed form in one pass over `rows`, and saves the first gradient steps. The residual
    stream's axes are then the principal axes of the states, scaled to a root mean square of about
    1. Here a state is the lm head's input; states of other layers initially have no effect.
    """
    data, d = teacher.conversations, network.config.target_hidden_size
    device = teacher.device
    gram = torch.zeros(2 * d + 1, 2 * d + 1, dtype=torch.float64, device=device)
    cross, moments = gram.new_zeros(2 * d + 1, d), gram.new_zeros(d, d)
    for part in by_length(rows, data).split(BATCH):
        states = head_inputs(network, teacher.states(part, int(data.length[part].max()) - 1))
        t = torch.arange(1, states.shape[1])
        inside = (t >= data.prompt_length[part, None] - 1) & (t < data.length[part, None] - 1)
        inside = inside.to(device)
        tokens = data.tokens[part][:, t].to(device)
        token = F.embedding(tokens, teacher.embedding).float()[inside]
        x = torch.cat((scaled(token), scaled(states[:, :-1][inside])), 1)
        x, y = F.pad(x, (0, 1), value=1.0), states[:, 1:][inside]
        gram, cross, moments = gram + x.T @ x, cross + x.T @ y, moments + y.T @ y
    count = gram[-1, -1]
    ridge = RIDGE * count * torch.eye(2 * d + 1, device=device)
    weight = torch.linalg.solve(gram + ridge, cross).float()
    axes = principal_axes(moments.float(), network.config.hidden_size)
    size = (moments.trace() / d / count).sqrt().float()
    kept = axes.shape[1]
    network.embed_in.weight.zero_()[:kept] = (weight[:d] @ axes / size).T
    network.hidden_in.weight.zero_()[:kept, -d:] = (weight[d : 2 * d] @ axes / size).T
    network.embed_out.weight.zero_()[:, :kept] = axes * size
    network.bias.copy_(teacher.draft_output @ weight[-1])


class Judged(NamedTuple):
    """Comparison of one-step drafts with the target, after A anchors in each of C conversations."""

    overlap: Tensor  # f32 [C, A, K], sum_x min(p(x), q(x)), the acceptance
    match: Tensor  # f32 [C, A, K], whether the argmaxes agree
    inside: Tensor  # bool [C, A, K], whether the answer reaches so far

    def figures(self) -> dict[str, list[float]]:
        """Means over all drafts, by position.

        acceptance: probability of acceptance, given the text's prefix;
        greedy_match: share of positions where the argmaxes agree;
        tokens_per_forward, greedy_tokens_per_forward: for drafts of 1, 2, .. K tokens, 1 + the mean
            number of leading tokens accepted. It is the sum of products of the two values above
            along each draft.
        """
        count = self.inside.sum((0, 1)).clamp(min=1)
        return {
            "acceptance": ((self.overlap * self.inside).sum((0, 1)) / count).tolist(),
            "greedy_match": ((self.match * self.inside).sum((0, 1)) / count).tolist(),
            "tokens_per_forward": (1 + self._leading(self.overlap).mean((0, 1)).cumsum(0)).tolist(),
            "greedy_tokens_per_forward": (
                1 + self._leading(self.match).mean((0, 1)).cumsum(0)
            ).tolist(),
        }

    def tokens(self) -> Tensor:
        """Tokens per forward in each conversation, with drafts of K tokens. f32 [C]"""
        return 1 + self._leading(self.overlap).mean(1).sum(-1)

    def _leading(self, chance: Tensor) -> Tensor:
        """Probability that a draft is accepted up to each position. [C, A, K]"""
        return (chance * self.inside).cumprod(-1)


@torch.no_grad()
def judge(
    network: DraftNetwork, teacher: Teacher, rows: Tensor, block: int, *, anchors: int = 16
) -> Judged:
    """Compare one-step drafts with the target's distribution over its full vocabulary.

    Args:
        rows: i64 [C], indices of conversations. The drafts' positions in them are fixed.
        block: K, draft length.
        anchors: A, number of drafts in each conversation.
    """
    task = Distillation(network, teacher, rows, rows, Objective())
    parts = []
    for chosen in rows.split(4):
        batch = task.batch(chosen, -1, anchors, block)
        unrevealed = batch.groups._replace(revealed=torch.zeros_like(batch.groups.revealed))
        drafts = make_drafts(network, teacher, batch._replace(groups=unrevealed))
        q = draft_logits(network, teacher, drafts.states, drafts.before).softmax(-1)
        target = F.linear(drafts.target, teacher.output)  # [B, A, K, V]
        ids = network.draft_ids
        p = (target[..., ids] - target.logsumexp(-1, keepdim=True)).exp()
        match = (ids[q.argmax(-1)] == target.argmax(-1)).float()
        parts.append(Judged(torch.minimum(p, q).sum(-1), match, drafts.inside))
    return Judged(*(torch.cat(part) for part in zip(*parts, strict=True)))


def evaluate(
    network: DraftNetwork, teacher: Teacher, rows: Tensor, block: int, *, anchors: int = 16
) -> dict[str, list[float]]:
    """The figures of `judge`, with conversations batched by length."""
    rows = by_length(rows, teacher.conversations)
    return judge(network, teacher, rows, block, anchors=anchors).figures()
