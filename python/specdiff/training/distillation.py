"""Distillation: a drafter with a DraftNetwork learns the target's laws on the target's text.

The law that a drafter should have at position i of a draft, knowing only what comes before the
draft, is the target's averaged over the tokens between. Text that the target wrote has those tokens
at the right frequencies, so a divergence from the target's law at each position, averaged over the
text, is least there (DistillSpec, 2310.08461; ParallelSpec, 2410.05589). An eagle knows the tokens
between, and its law should be the target's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdiff_kernels import row_divergence

from ..drafters.head import scaled
from ..drafters.network import DraftConfig, DraftNetwork, principal_axes
from .conversations import Conversations
from .groups import Groups, forward_groups, sample_groups, shifted, take
from .objective import Objective
from .seeds import generator
from .teacher import BATCH, Teacher

FLEX_LEAST = 16  # width of a head that FlexAttention compiles for
RIDGE = 1e-3  # relative to the inputs' mean square, which is 1


class Batch(NamedTuple):
    """Texts of one forward, and what is asked about them."""

    tokens: Tensor  # i64 [B, S]
    states: Tensor  # f32 [B, S, (n + 1) target_d], the target's; last the lm head's input
    first: Tensor  # i64 [B], the column that the answer's first token is predicted from
    length: Tensor  # i64 [B]
    groups: Groups
    block: int  # K, tokens in a draft


class Drafts(NamedTuple):
    """Whole drafts of K positions behind each anchor, as the network and the target see them."""

    states: Tensor  # [B, A, K, d], of the network
    target: Tensor  # [B, A, K, target_d], the lm head's input for the same token
    inside: Tensor  # bool [B, A, K], whether the answer reaches so far
    text: Tensor  # [B, S, d], the network's states of the text


class Distillation(nn.Module):
    """A training task: the mean divergence over texts, drafts and positions.

    Args:
        network: what learns.
        teacher: from whom.
        rows, held_out: i64, conversations to learn from, and those for `held_out_loss`.
        objective: see there.
        seed: of the groups' places.
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
        """Mean loss of conversations i64 [B], at this step and share of the training. -> f32 []"""
        chosen = chosen.cpu()  # where DDP has moved it from
        block = draft_length(self.network.config, self.seed, step)
        return self.loss(
            self.network, self.batch(chosen, step, self.objective.anchors, block), progress
        )

    def batch(self, chosen: Tensor, step: int, anchors: int, block: int) -> Batch:
        """Texts with groups that depend on the seed, the step and each text alone."""
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
        states, target, weight = drafts.states[asked], drafts.target[asked], weight[asked]
        if network.config.causal:  # the first position is asked everywhere in the text
            column = torch.arange(batch.tokens.shape[1], device=batch.first.device)
            answer = (column >= batch.first[:, None]) & (column < batch.length[:, None] - 1)
            share = (answer / answer.sum(1, keepdim=True))[answer]
            states = torch.cat((drafts.text[answer], states))
            width = network.config.target_hidden_size
            target = torch.cat((batch.states[..., -width:][answer], target))
            weight = torch.cat((share, weight))
        with torch.autocast(states.device.type, enabled=False):  # bf16 is too coarse for logits
            law = F.linear(target, self.teacher.draft_output)  # [N, D]
            logits = draft_logits(network, self.teacher, states.float())
            value = self.objective.value(row_divergence(law, logits), progress)
        decay = self.objective.position_decay
        total = len(batch.length) * sum(decay**i for i in range(network.config.block))
        return (value * weight).sum() / total

    def weights(self, config: DraftConfig, batch: Batch) -> Tensor:
        """Of each position of a draft; those that few drafts are long enough for weigh more.

        -> f32 [B, A, K]
        """
        K, device = batch.block, batch.first.device
        A = batch.groups.anchor.shape[1]
        offset = torch.arange(K, device=device) - batch.groups.revealed[..., None]
        first = 1 if config.causal else 0
        decay = self.objective.position_decay ** offset.clamp(min=0).float()
        lengths = draft_lengths(config)
        reached = [sum(k > i for k in lengths) / len(lengths) for i in range(K)]
        return (decay / torch.tensor(reached, device=device)).where(offset >= first, 0.0) / A

    @torch.no_grad()
    def held_out_loss(self, network: DraftNetwork, texts: int = 16) -> float:
        """The loss on fixed drafts of up to `texts` held-out conversations, as training begins."""
        rows, total = by_length(self.held_out[:texts], self.data), 0.0
        for block in (lengths := draft_lengths(network.config)):
            for chosen in rows.split(4):
                batch = self.batch(chosen, -1, 16, block)
                total += float(self.loss(network, batch, 0.0)) * len(chosen)
        return total / len(lengths) / len(rows)


def make_drafts(network: DraftNetwork, teacher: Teacher, batch: Batch) -> Drafts:
    """What the network says of texts and groups, and the target."""
    K, S = batch.block, batch.tokens.shape[1]
    embedded = F.embedding(batch.tokens, teacher.embedding).float()
    flex = embedded.is_cuda and network.config.hidden_size // network.config.heads >= FLEX_LEAST
    text, states = forward_groups(
        network, embedded, shifted(batch.states), batch.groups, K, flex=flex
    )
    anchor = batch.groups.anchor
    if network.config.causal:
        states = torch.cat((take(text, anchor)[:, :, None], states), 2)
    before = anchor[..., None] + torch.arange(K, device=anchor.device)  # [B, A, K]
    last = batch.states[..., -network.config.target_hidden_size :]
    target = take(last, before.clamp(max=S - 1).flatten(1))
    inside = before + 1 < batch.length[:, None, None]
    return Drafts(states, target.view(*states.shape[:3], -1), inside, text)


def draft_logits(network: DraftNetwork, teacher: Teacher, states: Tensor) -> Tensor:
    """Final states [..., d] -> logits over the draft's vocabulary [..., D]"""
    return F.linear(network.embed_out(states), teacher.draft_output, network.bias)


def draft_lengths(config: DraftConfig) -> list[int]:
    """Lengths of drafts that a network learns: the longest, its half and quarter, and the usual."""
    block = config.block
    return sorted({block, max(1, block // 2), max(1, block // 4), config.k or block})


def draft_length(config: DraftConfig, seed: int, step: int) -> int:
    """That of a step."""
    lengths = draft_lengths(config)
    return lengths[int(torch.randint(len(lengths), (), generator=generator(seed, step)))]


def by_length(rows: Tensor, data: Conversations) -> Tensor:
    """Rows in order of their length, so that neighbours need little padding."""
    return rows[data.length[rows].argsort(stable=True)]


@torch.no_grad()
def fit_linear(network: DraftNetwork, teacher: Teacher, rows: Tensor) -> None:
    """Start at the best linear prediction of the next state, by ridge regression.

    h[t] from the token x[t], the state h[t-1] and a constant: in closed form, in one pass over
    `rows`, which spares the gradient steps from random weights to there. The network's stream then
    runs along the principal axes of the states, scaled to a root mean square of about 1. A state is
    the lm head's input here; those of layers begin without effect.
    """
    data, d = teacher.conversations, network.config.target_hidden_size
    device = teacher.device
    gram = torch.zeros(2 * d + 1, 2 * d + 1, dtype=torch.float64, device=device)
    cross, moments = gram.new_zeros(2 * d + 1, d), gram.new_zeros(d, d)
    for part in by_length(rows, data).split(BATCH):
        states = teacher.states(part, int(data.length[part].max()) - 1)[..., -d:]  # [B, S, d]
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


@torch.no_grad()
def evaluate(
    network: DraftNetwork, teacher: Teacher, rows: Tensor, block: int, *, anchors: int = 16
) -> dict[str, list[float]]:
    """One-step drafts on given conversations, against the target's law over its whole vocabulary.

    Args:
        rows: i64, the conversations.
        block: K, the length of the drafts.
        anchors: drafts in each conversation.

    Returns:
        acceptance: mean of sum_x min(p(x), q(x)) at each position, on the text's own prefix;
        greedy_match: how often the argmaxes agree, at each position;
        tokens_per_forward, greedy_tokens_per_forward: with drafts of 1, 2, .. K tokens, 1 + the
            mean number of leading tokens accepted, from the two above, multiplied along each draft.
    """
    data = teacher.conversations
    task = Distillation(network, teacher, rows, rows, Objective())
    overlap, match, valid = [], [], []
    for chosen in by_length(rows, data).split(4):
        batch = task.batch(chosen, -1, anchors, block)
        unrevealed = batch.groups._replace(revealed=torch.zeros_like(batch.groups.revealed))
        drafts = make_drafts(network, teacher, batch._replace(groups=unrevealed))
        q = draft_logits(network, teacher, drafts.states).softmax(-1)
        target = F.linear(drafts.target, teacher.output)  # [B, A, K, V]
        ids = network.draft_ids
        p = (target[..., ids] - target.logsumexp(-1, keepdim=True)).exp()
        overlap.append(torch.minimum(p, q).sum(-1).flatten(0, 1))
        match.append((ids[q.argmax(-1)] == target.argmax(-1)).flatten(0, 1).float())
        valid.append(drafts.inside.flatten(0, 1))
    a, g, mask = torch.cat(overlap), torch.cat(match), torch.cat(valid)  # [drafts, K]
    count = mask.sum(0).clamp(min=1)
    return {
        "acceptance": ((a * mask).sum(0) / count).tolist(),
        "greedy_match": ((g * mask).sum(0) / count).tolist(),
        "tokens_per_forward": (1 + (a * mask).cumprod(1).mean(0).cumsum(0)).tolist(),
        "greedy_tokens_per_forward": (1 + (g * mask).cumprod(1).mean(0).cumsum(0)).tolist(),
    }
