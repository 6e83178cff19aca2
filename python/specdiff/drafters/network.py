"""DraftNetwork: a small transformer of committed tokens with masks behind them.

It reads the target's own embeddings and its states, the last one or those of several layers, so a
few million parameters do.
Committed tokens attend to what came before them and keep their keys and values; masks see the
committed tokens and each other as their drafter says: `BlockDiffusion` or `ParallelDrafter`. In an
`Eagle` no masks follow, but the drafted tokens themselves.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..files import write_atomically
from .head import SequentialHead, scaled

KINDS = {  # model_type in config.json -> name
    "specdiff_block_diffusion": "block-diffusion",
    "specdiff_parallel": "parallel",
    "specdiff_eagle": "eagle",
}
Mask = Tensor | BlockMask  # bool [B, 1, Q, S], True where a query sees a key


@dataclass(frozen=True)
class DraftConfig:
    """Shape of a drafter; what config.json holds.

    Args:
        kind: "block-diffusion", "parallel" or "eagle", the drafter that it is for.
        target_vocab_size: rows of the target's embedding.
        target_hidden_size: its columns.
        draft_vocab_size: how many target tokens can be drafted.
        hidden_size: width, a multiple of `heads` with an even quotient.
        layers, heads, intermediate_size: of the transformer.
        block: most tokens in a draft.
        k: tokens in a draft unless told otherwise; None: `block`.
        steps: reverse steps that `BlockDiffusion` takes unless told otherwise.
        rope_theta, norm_eps: as in Llama.
        target_layers: layers of the target whose residual streams it reads, counted from 1, after
            the embedding, in ascending order. The lm head's input always comes last and is not
            listed. Not of an eagle, which has to stand in for what it reads.
        target_layer_count: layers that the target has; given with `target_layers`.
        head_rank: of the `SequentialHead`; 0: none. Not of an eagle, which knows the tokens.
        head_state: whether that reads the network's state, and not the token before alone.

    Raises:
        ValueError: a size is out of range.
    """

    kind: str
    target_vocab_size: int
    target_hidden_size: int
    draft_vocab_size: int
    hidden_size: int = 576
    layers: int = 1
    heads: int = 9
    intermediate_size: int = 1536
    block: int = 4
    k: int | None = None
    steps: int = 1
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    target_layers: tuple[int, ...] = ()
    target_layer_count: int | None = None
    head_rank: int = 0
    head_state: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_layers", tuple(self.target_layers))  # a list in JSON
        if self.kind not in KINDS.values():
            raise ValueError(f"kind must be one of {', '.join(KINDS.values())}, got {self.kind!r}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * heads = {2 * self.heads}, "
                f"got {self.hidden_size}"
            )
        if self.k is not None and not 1 <= self.k <= self.block:
            raise ValueError(f"k must be in [1, block = {self.block}], got {self.k}")
        if not 1 <= self.steps <= self.block:
            raise ValueError(f"steps must be in [1, block = {self.block}], got {self.steps}")
        if not 0 < self.draft_vocab_size <= self.target_vocab_size:
            raise ValueError(
                f"draft_vocab_size must be in [1, target_vocab_size = {self.target_vocab_size}], "
                f"got {self.draft_vocab_size}"
            )
        if self.head_rank < 0:
            raise ValueError(f"head_rank must be at least 0, got {self.head_rank}")
        self._check_layers()
        if self.kind == "eagle" and (self.target_layers or self.head_rank):
            raise ValueError(
                "an eagle predicts the one state that it reads and knows the tokens before: leave "
                f"out target_layers and head_rank, got {list(self.target_layers)} and "
                f"{self.head_rank}"
            )

    def _check_layers(self) -> None:
        layers, count = self.target_layers, self.target_layer_count
        if not layers:
            return
        if count is None:
            raise ValueError(f"target_layers {list(layers)} need a target_layer_count beside them")
        ascending = all(a < b for a, b in itertools.pairwise(layers))
        if not ascending or layers[0] < 1 or layers[-1] > count:
            raise ValueError(
                f"target_layers must be ascending, from 1 to target_layer_count = {count}, "
                f"got {list(layers)}"
            )

    @property
    def causal(self) -> bool:
        """Whether the last committed token's own column says what comes next."""
        return self.kind != "block-diffusion"

    def masks(self, k: int) -> int:
        """Masks in a draft of k tokens. `ParallelDrafter` drafts the first one without, `Eagle`
        all."""
        return {"block-diffusion": k, "parallel": k - 1, "eagle": 0}[self.kind]


class Cache(Protocol):
    """Where keys and values go and come from."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take those of new columns [B, H, Q, D]; return those that they may see, [B, H, S, D]."""


class PrefixCache:
    """Keys and values of every layer, in place, with a length of its own for each row.

    A block is written right behind its prefix, where the next tokens overwrite it; entries beyond
    a row's length are never visible to anything else. The last slot takes padding.
    """

    def __init__(self, config: DraftConfig, batch: int, capacity: int, like: Tensor):
        shape = (
            batch,
            config.heads,
            capacity + config.block + 1,
            config.hidden_size // config.heads,
        )
        self.store = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.layers)]
        self.padding = shape[2] - 1
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.slots = self.lengths[:, None]  # [B, Q], where the next forward writes
        self.longest = 0  # at least the largest of them
        self.span = 0  # how many slots it reads

    def part(self, rows: slice) -> PrefixCache:
        """Some of the rows, in the same memory."""
        part = copy(self)
        part.store = [(keys[rows], values[rows]) for keys, values in self.store]
        part.lengths = self.lengths[rows]
        return part

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, D] at `slots`; return views [B, H, span, D]."""
        index = self.slots[:, None, :, None].expand_as(k)
        keys, values = self.store[layer]
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        return keys[:, :, : self.span], values[:, :, : self.span]


class Layer(nn.Module):
    """Pre-norm attention with rotary positions, then SwiGLU."""

    def __init__(self, config: DraftConfig, index: int) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.index, self.heads = index, config.heads
        self.attention_norm = nn.RMSNorm(d, config.norm_eps)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.mlp_norm = nn.RMSNorm(d, config.norm_eps)
        self.gate_up = nn.Linear(d, 2 * f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Mask, cache: Cache | None
    ) -> Tensor:
        B, Q, d = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, Q, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, Q, D]
        q, k = (rotate(part, rotation).to(v.dtype) for part in (q, k))  # v's is that of autocast
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        mixed = attend(q, k, v, mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, Q, d))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention of [B, H, Q, D] to [B, H, S, D]."""
    if isinstance(mask, BlockMask):
        return compiled_flex_attention()(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, mask)


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding, half-rotation, of [B, H, Q, D] by cos, sin [B, 1, Q, D]."""
    cos, sin = rotation
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class DraftNetwork(nn.Module):
    """The network, without the target's embeddings, which callers pass in.

    Args:
        config: shape.
        draft_ids: i64 [draft_vocab_size], strictly increasing target ids.

    Raises:
        ValueError: `draft_ids` do not fit.
    """

    draft_ids: Tensor

    def __init__(self, config: DraftConfig, draft_ids: Tensor) -> None:
        super().__init__()
        if draft_ids.shape != (config.draft_vocab_size,) or (draft_ids.diff() <= 0).any():
            raise ValueError(
                f"draft_ids must be {config.draft_vocab_size} strictly increasing ids, "
                f"got shape {tuple(draft_ids.shape)}"
            )
        d, target = config.hidden_size, config.target_hidden_size
        self.config = config
        self.embed_in = nn.Linear(target, d, bias=False)
        self.hidden_in = nn.Linear((len(config.target_layers) + 1) * target, d, bias=False)
        if config.kind != "eagle":
            self.mask = nn.Parameter(torch.zeros(d))
            self.offset = nn.Parameter(torch.zeros(config.masks(config.block), d))
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.embed_out = nn.Linear(d, target, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.draft_vocab_size))
        self.head: SequentialHead | None = None
        if config.head_rank:
            state = d if config.head_state else 0
            self.head = SequentialHead(target, state, config.head_rank, config.draft_vocab_size)
        self.register_buffer("draft_ids", draft_ids.long())

    @torch.no_grad()
    def initialise(self, embedding: Tensor, generator: torch.Generator | None = None) -> None:
        """Random weights; the stream's axes are the principal axes of `embedding`.

        `hidden_in` and what the layers add begin at zero, so the first output is a linear
        function of the last token alone.

        Args:
            embedding: [V, target_hidden_size] of the target.
            generator: of the random numbers, on the CPU.
        """
        scale = 0.4 / self.config.hidden_size**0.5
        for layer in self.layers:
            for name, weight in layer.named_parameters():
                if name.startswith(("out", "down")):
                    nn.init.zeros_(weight)
                elif weight.ndim == 2:
                    weight.copy_(scale * torch.randn(weight.shape, generator=generator))
        nn.init.zeros_(self.hidden_in.weight)
        if self.head is not None:
            self.head.initialise(generator)
        rows = embedding.float()
        axes = principal_axes(rows.T @ rows, self.config.hidden_size)
        self.embed_in.weight.zero_()[: axes.shape[1]] = axes.T
        self.embed_out.weight.zero_()[:, : axes.shape[1]] = axes / rows.norm(dim=1).mean()

    def embed_prefix(self, embedded: Tensor, states: Tensor) -> Tensor:
        """Tokens [..., target_d], and the target's states before each [..., (n + 1) target_d],
        those of layers and last the lm head's input, side by side -> [..., d]

        Behind the committed tokens, `Eagle` has `embed_out` of its own states for that input.
        """
        width = self.config.target_hidden_size
        each = scaled(states.unflatten(-1, (-1, width))).flatten(-2)
        return self.embed_in(scaled(embedded)) + self.hidden_in(each)

    def embed_masks(self, anchor: Tensor, count: int) -> Tensor:
        """The first `count` masks behind a committed token, which they start from.

        Args:
            anchor: [..., d], that token's `embed_prefix`.

        Returns:
            [..., count, d]
        """
        return anchor[..., None, :] + self.mask + self.offset[:count]

    def embed_revealed(self, embedded: Tensor) -> Tensor:
        """Drafted tokens [..., count, target_d], whose states are not known. -> [..., count, d]"""
        return self.embed_in(scaled(embedded)) + self.offset[: embedded.shape[-2]]

    def forward(
        self, x: Tensor, positions: Tensor, mask: Mask, cache: Cache | None = None
    ) -> Tensor:
        """Embedded columns -> final states.

        Args:
            x: [B, Q, d].
            positions: i64 [B, Q].
            mask: bool [B, 1, Q, S], True where a query sees a key, or FlexAttention's block mask.
            cache: where keys and values go and come from; None: the columns themselves, S = Q.

        Returns:
            [B, Q, d]; `embed_out`, the target's output embedding and `bias` make logits of it.
        """
        config = self.config
        turn = frequencies(config.hidden_size // config.heads, config.rope_theta, x.device)
        angles = (positions[..., None] * turn).repeat(1, 1, 2)[:, None]  # in fp32 for all dtypes
        rotation = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, mask, cache)
        return x

    @torch.no_grad()
    def adopt(self, other: DraftNetwork) -> None:
        """Take over the weights of another network of the same width and vocabulary.

        Its drafts may be shorter, whose last mask then stands for the further ones, and of another
        kind: mask i of a parallel draft is what mask i + 1 of a block is. An eagle has no masks.
        States that it does not read begin without effect; a head that it lacks stays as it is.

        Raises:
            ValueError: a weight has another shape.
        """
        weights = {**dict(other.named_parameters()), "draft_ids": other.draft_ids}
        if "offset" in weights and self.config.kind != "eagle":
            shift = other.config.masks(0) - self.config.masks(0)
            at = torch.arange(len(self.offset)) + shift
            weights["offset"] = other.offset[at.clamp(0, len(other.offset) - 1)]
        weights["hidden_in.weight"] = self._states_of(other)
        for name, mine in [*self.named_parameters(), ("draft_ids", self.draft_ids)]:
            theirs = weights.get(name)
            if theirs is None and name.startswith("head."):
                continue
            if theirs is None or theirs.shape != mine.shape:
                shape = None if theirs is None else list(theirs.shape)
                raise ValueError(
                    f"the initial network's {name} must be {list(mine.shape)}, got {shape}: give "
                    "both the same width, layers, target and draft_vocab_size"
                )
            mine.copy_(theirs)

    def _states_of(self, other: DraftNetwork) -> Tensor:
        """The other's `hidden_in` for the states that this network reads; zeros where it reads
        none of that layer."""
        width = other.config.target_hidden_size
        blocks = other.hidden_in.weight.split(width, 1)
        known = dict(zip((*other.config.target_layers, "last"), blocks, strict=True))
        nothing = torch.zeros_like(blocks[0])
        return torch.cat([known.get(x, nothing) for x in (*self.config.target_layers, "last")], 1)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (fp16, ids int32), each atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.half() for name, value in self.named_parameters()}
        tensors["draft_ids"] = self.draft_ids.int()
        config = asdict(self.config)
        kind = config.pop("kind")
        config = {"model_type": next(k for k, v in KINDS.items() if v == kind), **config}
        write_atomically(folder / "model.safetensors", save(tensors, {"format": "pt"}))
        write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> DraftNetwork:
        """Read what `save` wrote, as fp32 on the CPU.

        Raises:
            ValueError: the folder holds no drafter of this kind, or a damaged one.
        """
        folder = Path(folder)
        try:
            fields = json.loads((folder / "config.json").read_text())
            if (model_type := fields.pop("model_type", None)) not in KINDS:
                raise ValueError(
                    f"model_type must be one of {', '.join(KINDS)}, got {model_type!r}"
                )
            config = DraftConfig(KINDS[model_type], **fields)
            tensors = load_file(folder / "model.safetensors")
            network = cls(config, tensors["draft_ids"].long())
            network.load_state_dict(
                {k: v.float() for k, v in tensors.items() if k != "draft_ids"}
                | {"draft_ids": tensors["draft_ids"].long()}
            )
        except (OSError, TypeError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no usable drafter: {error}; expected config.json and "
                "model.safetensors as `specdiff train` writes them"
            ) from error
        return network


@functools.cache
def frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """Rotary frequencies theta^(-2 i / D) of a head of this width. -> f32 [D / 2]"""
    return theta ** -(torch.arange(0, width, 2, device=device) / width)


def principal_axes(moments: Tensor, count: int) -> Tensor:
    """The `count` leading eigenvectors of a symmetric [d, d], as columns [d, min(count, d)]."""
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :count]
