"""What drafters with a DraftNetwork share: it stands beside its target."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdiff_kernels import Draft, Reveal, denoise_step

from ..loop.drafter import Drafter, Draws, News
from ..loop.fast_layers import accelerate, is_accelerated, restore
from ..loop.sampling import RowSampling
from ..loop.target import Target
from .head import scaled
from .network import DraftNetwork, PrefixCache

D = TypeVar("D", bound="PrefixDrafter")


class Columns(NamedTuple):
    """Columns that one forward reads."""

    x: Tensor  # [B, Q, d]
    positions: Tensor  # i64 [B, Q]
    slots: Tensor  # i64 [B, Q], where their keys and values go
    last: Tensor  # i64 [B, Q], the last slot that each of them sees


class PrefixDrafter(Drafter):
    """A drafter that reads committed tokens once and puts masks or drafted tokens behind them.

    Args:
        network: of the class's own `kind`. It is moved to the target's device and dtype, and
            accelerated iff the target's model is; its packed weights are then rounded to bf16. That
            halves what a draft reads, and what it records is what it drew from, as ever.
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
        if config.target_layer_count not in (None, target.layer_count):
            raise ValueError(
                f"the drafter was trained for a target with {config.target_layer_count} layers, "
                f"got {target.layer_count}: load the drafter of this target"
            )
        self.target_layers = config.target_layers
        self.network = network.to(target.device, target.dtype).eval().requires_grad_(False)
        self.embedding = embedding
        self.vocab_size: int | None = config.target_vocab_size
        self.block = config.k or config.block
        self.most: int = config.block
        self.backend = backend
        output = target.head.weight.detach()[network.draft_ids]
        self.head = linear(output @ network.embed_out.weight, network.bias)  # d -> Vd
        self.correction: nn.Linear | None = None
        if network.head is not None:
            self.correction = linear(network.head.out.weight @ network.head.mix.weight)  # r -> Vd
            self.codes = network.head.token(scaled(embedding))  # [V, r]
        for module in (self.network, self.head, self.correction):
            if module is None:
                continue
            if is_accelerated(target.model):
                accelerate(module, bf16=True)
            else:
                restore(module)

    @classmethod
    def load(cls: type[D], folder: str | Path, target: Target, *, backend: str | None = None) -> D:
        """Read a trained drafter from a folder. Raises ValueError as the constructor and
        `DraftNetwork.load` do."""
        return cls(DraftNetwork.load(folder), target, backend=backend)

    def start(self, batch: int, capacity: int, sampling: RowSampling) -> None:
        self.sampling = sampling
        self.cache = PrefixCache(self.network.config, batch, capacity, self.head.weight)

    def forget(self, rows: list[int]) -> None:
        self.cache.lengths[rows] = 0

    def check(self, k: int) -> None:
        """Raise ValueError unless it can draft k tokens."""
        if not 1 <= k <= self.most:
            raise ValueError(f"k must be in [1, {self.most}] for this drafter, got {k}")

    @torch.no_grad()
    def read(self, rows: slice, news: News) -> None:
        """Keys and values of what was committed to some rows."""
        cache = self.cache.part(rows)
        self.forward(cache, self.columns(cache, news))

    def commit(self, news: News) -> Columns:
        """Columns of what was committed. `anchor` [B, d] becomes the embedding of the newest token
        of each row, `anchor_token` i64 [B] that token, `newest` [B] its column."""
        self.newest = (news.counts - 1).clamp(min=0)
        row = torch.arange(len(news.counts), device=self.newest.device)
        columns = self.columns(self.cache, news)
        self.anchor, self.anchor_token = columns.x[row, self.newest], news.tokens[row, self.newest]
        return columns

    def columns(self, cache: PrefixCache, news: News) -> Columns:
        """Those of news, which become part of a cache's prefix."""
        if news.hidden is None:
            raise ValueError(f"news.hidden is None; {type(self).__name__} needs hidden states")
        embedded = F.embedding(news.tokens, self.embedding)
        prefix = self.network.embed_prefix(embedded, news.hidden.to(embedded.dtype))
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

    def forward(self, cache: PrefixCache, *columns: Columns) -> Tensor:
        """One forward. -> final states [B, Q, d] of all columns, one part behind the other"""
        x, positions, slots, last = (torch.cat(part, 1) for part in zip(*columns, strict=True))
        cache.slots = slots
        cache.span = min(cache.longest + self.network.config.block, cache.padding)
        keys = torch.arange(cache.span, device=x.device)
        mask = (keys <= last[:, :, None])[:, None]  # [B, 1, Q, span]
        return self.network(x, positions, mask, cache)

    def draw(
        self, draft: Draft, lo: int, hi: int, step: int, states: Tensor, draws: Draws
    ) -> Draft:
        """Reveal positions lo .. hi - 1, whose logits lie in the pool.

        Without a sequential head they are revealed at once, in reverse step `step`. With one they
        are from left to right, each in a step of its own, and its correction is added to the logits
        before the token is drawn: the distribution that is recorded is that of the draw.

        Args:
            states: [B, hi - lo, d], the network's at these positions.
        """
        head, correction = self.network.head, self.correction
        if head is None or correction is None:
            reveal = Reveal.all() if hi - lo == draft.tokens.shape[1] else Reveal.chunk(lo, hi)
            return self.reveal(draft, reveal, step, draws, entropies=lo == 0)
        pool = self.pool(draft)
        inner = None if head.state is None else head.state(scaled(states))  # [B, hi - lo, r]
        for i in range(lo, hi):
            before = self.anchor_token if i == 0 else draft.tokens[:, i - 1].clamp(min=0)
            token = F.embedding(before, self.codes)  # [B, r]
            code = F.silu(token if inner is None else token + inner[:, i - lo])
            pool[:, i] += correction(code)
            draft = self.reveal(draft, Reveal.chunk(i, i + 1), i, draws, entropies=i == 0)
        return draft

    def reveal(
        self, draft: Draft, reveal: Reveal, step: int, draws: Draws, *, entropies: bool
    ) -> Draft:
        """`denoise_step` with what a session draws by."""
        return denoise_step(
            draft,
            reveal,
            step,
            *self.sampling.parameters,
            entropies=entropies,
            **draws._asdict(),
            backend=self.backend,
        )

    def masked(self, logits: Tensor, B: int, k: int, lengths: Tensor) -> Draft:
        """A draft without tokens over a pool [B k, Vd]."""
        return Draft.masked(B, k, logits, draft_ids=self.network.draft_ids, lengths=lengths)

    def pool(self, draft: Draft) -> Tensor:
        """A draft's logits by their places, [B, k, Vd]."""
        if draft.logits is None:
            raise ValueError("draft.logits is None; a draft that is drawn here has a pool")
        return draft.logits.view(*draft.tokens.shape, -1)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer of these weights [out, in], which learns nothing."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, False)
    return layer
