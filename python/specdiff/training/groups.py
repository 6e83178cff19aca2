"""Groups: training drafts of masks, appended after random positions of a text.

A group follows the token at its anchor. It attends to the text up to the anchor and to itself. In
`ParallelDrafter` (ParallelSpec, 2410.05589, group-wise training) a mask attends to the masks before
it in its group. In `BlockDiffusion` it attends to the whole group, whose left part may be revealed
as in the later steps of a draft. One forward covers the text and all groups. In `Eagle` a group
consists of the text's tokens, with the network's predictions instead of the target's states (HASS,
2408.15766). Each token of a group takes another forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from ..drafters.network import DraftNetwork, Mask

REVEALED_SHARE = 0.25  # share of block-diffusion groups with a random left part revealed


class Groups(NamedTuple):
    """Positions of A groups in each of B texts."""

    anchor: Tensor  # i64 [B, A], column of the last text token before the group
    revealed: Tensor  # i64 [B, A], number of revealed tokens on the left; 0 in parallel drafts


class States(NamedTuple):
    """Final states of texts and groups."""

    text: Tensor  # [B, S, d]
    groups: Tensor  # [B, A, M, d]; M = K - 1 for an eagle


def sample_groups(
    first: Tensor,
    last: Tensor,
    count: int,
    block: int,
    generators: Sequence[torch.Generator],
    *,
    revealing: bool,
) -> Groups:
    """Draw stratified anchors, with one generator per row.

    Args:
        first, last: i64 [B], range of columns for anchors.
        count: A, number of groups per row.
        block: K, columns of a group.
        generators: B generators.
        revealing: whether to reveal a random left part of some groups.
    """
    anchor, revealed = [], []
    for lo, hi, generator in zip(first.tolist(), last.tolist(), generators, strict=True):
        share, some = torch.rand(2, count, generator=generator)
        share = (torch.arange(count) + share) / count
        anchor.append(lo + (share * (hi + 1 - lo)).long().clamp(max=hi - lo))
        known = torch.randint(1, max(2, block), (count,), generator=generator)
        hidden = (some >= REVEALED_SHARE) | (block == 1) | (not revealing)
        revealed.append(known.masked_fill(hidden, 0))
    return Groups(torch.stack(anchor), torch.stack(revealed))


def group_mask(anchor: Tensor, columns: int, masks: int, *, causal: bool, flex: bool) -> Mask:
    """Attention mask of S text columns followed by A groups of M masks, Q = S + A M.

    Args:
        anchor: i64 [B, A].
        columns, masks: S and M.
        causal: whether a mask attends only to earlier masks of its group and itself.
        flex: make a block mask for FlexAttention, which skips masked blocks.

    Returns:
        bool [B, 1, Q, Q], or a BlockMask of that shape.
    """
    S, (B, A) = columns, anchor.shape

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        group = (query - S).clamp(min=0) // max(1, masks)
        of_text = key <= torch.where(query < S, query, anchor[b, group])
        of_group = (key - S) // max(1, masks) == group
        if causal:
            of_group = of_group & (key <= query)
        return torch.where(key < S, of_text, of_group & (query >= S))

    Q = S + A * masks
    if flex:
        return create_block_mask(sees, B, None, Q, Q, device=str(anchor.device))
    column = torch.arange(Q, device=anchor.device)
    batch = torch.arange(B, device=anchor.device).view(B, 1, 1, 1)
    return sees(batch, batch, column[:, None], column)


def forward_groups(
    network: DraftNetwork,
    embedded: Tensor,
    before: Tensor,
    groups: Groups,
    block: int,
    *,
    flex: bool = False,
) -> States:
    """Final states of texts and their groups, computed as when drafting.

    Args:
        network: the network. Its `config.kind` determines the groups and their attention.
        embedded: [B, S, target_d], the target's embeddings of the texts.
        before: [B, S, (n + 1) target_d], the target's states before each token; zeros before the
            first.
        groups: positions of the groups.
        block: K, draft length.
        flex: use FlexAttention instead of a dense mask.
    """
    text = network.embed_prefix(embedded, before)
    if network.config.kind == "eagle":
        return forward_tokens(network, text, embedded, groups.anchor, block, flex=flex)
    B, S, width = embedded.shape
    M = network.config.masks(block)
    anchor = take(text, groups.anchor)
    masks = network.embed_masks(anchor, M)  # [B, A, M, d]
    offset = torch.arange(M, device=embedded.device)
    positions = groups.anchor[..., None] + 1 + offset  # [B, A, M]
    if network.config.kind == "block-diffusion":
        given = take(embedded, positions.clamp(max=S - 1).flatten(1)).view(*masks.shape[:3], width)
        known = offset < groups.revealed[..., None]
        masks = network.embed_revealed(given).where(known[..., None], masks)
    x = torch.cat((text, masks.flatten(1, 2)), 1)
    column = torch.arange(S, device=embedded.device).expand(B, S)
    mask = group_mask(groups.anchor, S, M, causal=network.config.causal, flex=flex)
    states = network(x, torch.cat((column, positions.flatten(1)), 1), mask)
    return States(states[:, :S], states[:, S:].view(masks.shape))


class Grown:
    """A cache of keys and values that every forward extends."""

    def __init__(self) -> None:
        self.store: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [B, H, Q, D]; return all keys and values so far."""
        if layer in self.store:
            keys, values = self.store[layer]
            k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        self.store[layer] = k, v
        return k, v


def forward_tokens(
    network: DraftNetwork,
    text: Tensor,
    embedded: Tensor,
    anchor: Tensor,
    block: int,
    *,
    flex: bool,
) -> States:
    """Eagle: a forward over texts [B, S, d], then one for each token position of all groups."""
    (B, S, _), A = text.shape, anchor.shape[1]
    column, group = torch.arange(S, device=text.device), torch.arange(A, device=text.device)
    cache = Grown()
    mask = group_mask(anchor, S, 0, causal=True, flex=flex)
    states = network(text, column.expand(B, S), mask, cache)
    of_text = column <= anchor[..., None]  # [B, A, S]
    of_group = (group == group[:, None]).expand(B, A, A)
    groups, state = [], take(states, anchor)  # [B, A, d]
    for i in range(1, block):
        token = take(embedded, (anchor + i).clamp(max=S - 1))
        x = network.embed_prefix(token, network.embed_out(state))
        mask = torch.cat((of_text, of_group.repeat(1, 1, i)), 2)[:, None]
        state = network(x, anchor + i, mask, cache)
        groups.append(state)
    empty = states.new_empty(B, A, 0, states.shape[-1])
    return States(states, torch.stack(groups, 2) if groups else empty)


def take(x: Tensor, columns: Tensor) -> Tensor:
    """Select columns i64 [B, N] of x [B, S, d]. -> [B, N, d]"""
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))


def shifted(states: Tensor) -> Tensor:
    """The state before each token, zeros before the first. [B, S, d] -> [B, S, d]"""
    return F.pad(states, (0, 0, 1, 0))[:, :-1]
