"""PrefixDrafter: base class of the drafters with a DraftNetwork."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdiff_kernels import Correction, Draft, Reveal, Tree, build_tree, denoise_step
from specdiff_kernels.ops.draw_in_order import draw_in_order

from ..loop.drafter import Drafter, Draws, News
from ..loop.fast_layers import accelerate, is_accelerated, restore, weight_of
from ..loop.sampling import RowSampling
from ..loop.target import Target
from ..loop.trees import Growth
from .head import SequentialHead, scaled
from .network import DraftNetwork, PrefixCache

D = TypeVar("D", bound="PrefixDrafter")


class Columns(NamedTuple):
    """Columns that the network reads in one forward."""

    x: Tensor  # [B, Q, d]
    positions: Tensor  # i64 [B, Q]
    slots: Tensor  # i64 [B, Q], cache slots for their keys and values
    last: Tensor  # i64 [B, Q], the last slot that each column attends to


class PrefixDrafter(Drafter):
    """A drafter that reads committed tokens once and appends masks or drafted tokens.

    Args:
        network: a network of this class's `kind`. It is moved to the target's device and dtype, and
            accelerated iff the target's model is. Its packed weights are then rounded to bf16,
            which halves the memory traffic of drafting. Drafts stay exact: they record the
            distributions that they are drawn from.
        target: the target; the drafter reads its embeddings and states.
        backend: backend of the ops; None chooses one.

    Raises:
        ValueError: the network is of another kind, or for a target of another shape.
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
                f"got {config.kind!r}: use `load_drafter`, which picks the class"
            )
        embedding = target.model.get_input_embeddings().weight.detach()
        expected = (config.target_vocab_size, config.target_hidden_size)
        if embedding.shape != expected:
            raise ValueError(
                f"the drafter was trained for a target with embeddings {list(expected)}, "
                f"got {list(embedding.shape)}: load a drafter trained for this target"
            )
        if config.target_layer_count not in (None, target.layer_count):
            raise ValueError(
                f"the drafter was trained for a target with {config.target_layer_count} layers, "
                f"got {target.layer_count}: load a drafter trained for this target"
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
            self.codes = network.head.codes(embedding)  # [V, r]
        for module in (self.network, self.head, self.correction):
            if module is None:
                continue
            if is_accelerated(target.model):
                accelerate(module, bf16=True)
            else:
                restore(module)

    @classmethod
    def load(cls: type[D], folder: str | Path, target: Target, *, backend: str | None = None) -> D:
        """Load a trained drafter from a folder.

        Raises:
            ValueError: as the constructor and `DraftNetwork.load`.
        """
        return cls(DraftNetwork.load(folder), target, backend=backend)

    def start(self, batch: int, capacity: int, sampling: RowSampling) -> None:
        self.sampling = sampling
        self.cache = PrefixCache(self.network.config, batch, capacity, self.head.weight)

    def forget(self, rows: list[int]) -> None:
        self.cache.lengths[rows] = 0

    @torch.no_grad()
    def read(self, rows: slice, news: News) -> None:
        """Cache the keys and values of tokens committed to some rows."""
        cache = self.cache.part(rows)
        self.forward(cache, self.columns(cache, news))

    def commit(self, news: News) -> Columns:
        """Columns of newly committed tokens.

        Sets, for each row's newest token: `newest` i64 [B], its column; `anchor_token` i64 [B], its
        id; `anchor` [B, d], its embedding.
        """
        self.newest = (news.counts - 1).clamp(min=0)
        row = torch.arange(len(news.counts), device=self.newest.device)
        columns = self.columns(self.cache, news)
        self.anchor, self.anchor_token = columns.x[row, self.newest], news.tokens[row, self.newest]
        return columns

    def columns(self, cache: PrefixCache, news: News) -> Columns:
        """Columns of newly committed tokens, which become part of the cache's prefix."""
        if news.hidden is None:
            raise ValueError(f"news.hidden is None; {type(self).__name__} needs hidden states")
        embedded = F.embedding(news.tokens, self.embedding)
        prefix = self.network.embed_prefix(embedded, news.hidden.to(embedded.dtype))
        column = torch.arange(news.tokens.shape[1], device=prefix.device)
        at = cache.lengths[:, None] + column
        slots = at.where(column < news.counts[:, None], cache.padding)
        cache.lengths.add_(news.counts)  # in place, because a captured round reads it again
        cache.longest = int(cache.lengths.max()) if news.longest is None else news.longest
        return Columns(prefix, at, slots, at)

    def behind(self, x: Tensor, *, causal: bool, first: int = 0) -> Columns:
        """Columns of embedded masks and drafted tokens [B, Q, d].

        They start `first` positions after the committed tokens.
        """
        at = self.cache.lengths[:, None] + first + torch.arange(x.shape[1], device=x.device)
        return Columns(x, at, at, at if causal else at[:, -1:].expand_as(at))

    def forward(self, cache: PrefixCache, *columns: Columns) -> Tensor:
        """One forward over the concatenated columns. -> final states [B, Q, d]"""
        x, positions, slots, last = (torch.cat(part, 1) for part in zip(*columns, strict=True))
        cache.slots, cache.limits = slots, last + 1
        cache.span = min(cache.longest + self.network.config.block, cache.padding)
        keys = torch.arange(cache.span, device=x.device)
        mask = (keys <= last[:, :, None])[:, None]  # [B, 1, Q, span]
        return self.network(x, positions, mask, cache)

    def draw(
        self, draft: Draft, lo: int, hi: int, step: int, states: Tensor, draws: Draws
    ) -> Draft:
        """Reveal positions lo .. hi - 1, whose logits are in the pool.

        Without a sequential head they are revealed at once, in reverse step `step`. With a head
        they are revealed from left to right, each in its own step. The head's correction is added
        to the logits before a token is drawn, so the recorded distribution is the one drawn from.

        Args:
            states: [B, hi - lo, d], the network's states at these positions.
        """
        head, correction = self.network.head, self.correction
        if head is None or correction is None:
            reveal = Reveal.all() if hi - lo == draft.tokens.shape[1] else Reveal.chunk(lo, hi)
            return self.reveal(draft, reveal, step, draws, entropies=lo == 0)
        return draw_in_order(
            draft,
            self.corrections(head, correction, states),
            self.anchor_token,
            lo,
            hi,
            *self.sampling.parameters,
            entropies=lo == 0,
            **draws._asdict(),
            backend=self.backend,
        )

    def corrections(
        self, head: SequentialHead, correction: nn.Linear, states: Tensor
    ) -> Correction:
        """What the sequential head adds to the logits at positions with states [B, Q, d]."""
        inner = None if head.state is None else head.state(scaled(states))  # [B, Q, r]
        return Correction(self.codes, inner, weight_of(correction))

    @cached_property
    def wide_codes(self) -> Tensor:
        """`codes` in f32."""
        return self.codes.float()

    def grow(self, states: Tensor, growth: Growth, lengths: Tensor, draws: Draws) -> Tree:
        """A tree by the logits of positions with states [B, k, d]."""
        head, correction = self.network.head, self.correction
        logits, own = self.head(states), None
        if head is not None and correction is not None:
            _, inner, weight = self.corrections(head, correction, states)
            if isinstance(weight, Tensor) and weight.dtype is torch.float16:
                weight = weight.float()
            own = Correction(self.wide_codes, None if inner is None else inner.float(), weight)
            logits = logits.float()  # `build_tree` corrects no others
        likeliest = growth.shape is None
        parameters: Any = self.sampling.parameters
        keys: dict[str, Any] = {"seed": draws.seed, "round": draws.round}
        if likeliest:  # nothing is drawn, and a greedy row asks for likely tokens, too
            parameters, keys = self.sampling.without_greedy(), {}
        return build_tree(
            logits,
            growth.nodes,
            *parameters,
            shape=None if growth.shape is None else growth.shape.to(states.device),
            correction=own,
            anchor=self.anchor_token,
            draft_ids=self.network.draft_ids,
            lengths=lengths,
            **keys,
            backend=self.backend,
        )

    def reveal(
        self, draft: Draft, reveal: Reveal, step: int, draws: Draws, *, entropies: bool
    ) -> Draft:
        """`denoise_step` with the session's sampling parameters and random draws."""
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
        """A fully masked draft with the logits pool [B k, Vd]."""
        return Draft.masked(B, k, logits, draft_ids=self.network.draft_ids, lengths=lengths)

    def pool(self, draft: Draft) -> Tensor:
        """A draft's logits by position, [B, k, Vd]."""
        if draft.logits is None:
            raise ValueError("draft.logits is None: expected a draft made by `masked`")
        return draft.logits.view(*draft.tokens.shape, -1)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with frozen weights [out, in]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, False)
    return layer
