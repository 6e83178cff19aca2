"""What drafters with a DraftNetwork share: it stands beside its target."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cpu import accelerate, is_accelerated, restore
from ..sampling import Sampling
from ..target import Target
from .base import News
from .network import DraftNetwork, PrefixCache

D = TypeVar("D", bound="PrefixDrafter")


class Columns(NamedTuple):
    """Columns that one forward reads."""

    x: Tensor  # [B, Q, d]
    positions: Tensor  # i64 [B, Q]
    slots: Tensor  # i64 [B, Q], where their keys and values go
    last: Tensor  # i64 [B, Q], the last slot that each of them sees


class PrefixDrafter:
    """A drafter that reads committed tokens once and puts masks or drafted tokens behind them.

    Args:
        network: of the class's own `kind`. It is moved to the target's device and dtype, and
            accelerated iff the target's model is.
        target: whose embeddings and states it reads.
        backend: of the ops; None chooses.

    Raises:
        ValueError: a network of another kind, or for a target of another shape.
    """

    kind: str
    needs_hidden = True
    capturable = True

    def __init__(
        self, network: DraftNetwork, target: Target, *, backend: str | None = None
    ) -> None:
        config = network.config
        if config.kind != self.kind:
            raise ValueError(
                f"network must be of kind {self.kind!r} for {type(self).__name__}, "
                f"got {config.kind!r}: `load_drafter` finds the drafter of a folder"
            )
        embedding = target.model.get_input_embeddings().weight.detach()
        expected = (config.target_vocab_size, config.target_hidden_size)
        if embedding.shape != expected:
            raise ValueError(
                f"the drafter was trained for a target with embeddings {list(expected)}, "
                f"got {list(embedding.shape)}: load the drafter of this target"
            )
        self.network = network.to(target.device, target.dtype).eval().requires_grad_(False)
        self.embedding = embedding
        self.vocab_size: int | None = config.target_vocab_size
        self.block = config.k or config.block
        self.most = config.block
        self.backend = backend
        output = target.head.weight.detach()[network.draft_ids]
        weight = output @ network.embed_out.weight  # [Vd, d]
        Vd, d = weight.shape
        self.head = nn.Linear(d, Vd, device="meta")
        self.head.weight, self.head.bias = nn.Parameter(weight, False), network.bias
        change = accelerate if is_accelerated(target.model) else restore
        change(self.network)
        change(self.head)

    @classmethod
    def load(cls: type[D], folder: str | Path, target: Target, *, backend: str | None = None) -> D:
        """Read a trained drafter from a folder. Raises ValueError as the constructor and
        `DraftNetwork.load` do."""
        return cls(DraftNetwork.load(folder), target, backend=backend)

    def start(self, batch: int, capacity: int, sampling: Sampling) -> None:
        self.sampling = sampling
        self.cache = PrefixCache(self.network.config, batch, capacity, self.head.weight)

    def forget(self, rows: list[int]) -> None:
        self.cache.lengths[rows] = 0

    def check(self, news: News, k: int) -> None:
        """Raise ValueError unless it can draft k tokens from these news."""
        if not 1 <= k <= self.most:
            raise ValueError(f"k must be in [1, {self.most}] for this drafter, got {k}")
        if news.hidden is None:
            raise ValueError(f"news.hidden is None; {type(self).__name__} needs hidden states")

    def commit(self, news: News) -> Columns:
        """Columns of what was committed. `anchor` [B, d] becomes the embedding of the newest token
        of each row, `newest` [B] its column."""
        cache, B = self.cache, len(news.counts)
        embedded = F.embedding(news.tokens, self.embedding)
        hidden = embedded if news.hidden is None else news.hidden
        prefix = self.network.embed_prefix(embedded, hidden.to(embedded.dtype))
        self.newest = (news.counts - 1).clamp(min=0)
        self.anchor = prefix[torch.arange(B, device=prefix.device), self.newest]
        column = torch.arange(news.tokens.shape[1], device=prefix.device)
        at = cache.lengths[:, None] + column
        slots = at.where(column < news.counts[:, None], cache.padding)
        cache.lengths.add_(news.counts)  # in place: a captured round reads it again
        cache.longest = int(cache.lengths.max()) if news.longest is None else news.longest
        return Columns(prefix, at, slots, at)

    def behind(self, x: Tensor, *, causal: bool, first: int = 0) -> Columns:
        """Embedded masks and drafted tokens [B, Q, d], `first` columns behind what is committed."""
        at = self.cache.lengths[:, None] + first + torch.arange(x.shape[1], device=x.device)
        return Columns(x, at, at, at if causal else at[:, -1:].expand_as(at))

    def read(self, *columns: Columns) -> Tensor:
        """One forward. -> final states [B, Q, d] of all columns, one part behind the other"""
        x, positions, slots, last = (torch.cat(part, 1) for part in zip(*columns, strict=True))
        cache = self.cache
        cache.slots = slots
        cache.span = min(cache.longest + self.network.config.block, cache.padding)
        keys = torch.arange(cache.span, device=x.device)
        mask = (keys <= last[:, :, None])[:, None]  # [B, 1, Q, span]
        return self.network(x, positions, mask, cache)
