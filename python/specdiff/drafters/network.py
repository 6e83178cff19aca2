"""DraftNetwork: a small transformer over committed tokens, followed by masks.

It reads the target's embeddings and hidden states, of the last layer or of several layers. A few
million parameters are therefore enough. Committed tokens attend causally and keep their keys and
values. Masks attend to the committed tokens, and to each other as `BlockDiffusion` or
`ParallelDrafter` defines. In an `Eagle`, drafted tokens follow instead of masks.
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
from ..loop.cache import Entries, OpenCache
from ..loop.decoder_layers import LAYERS, Family, Shape
from .head import SequentialHead, scaled

KINDS = {  # model_type in config.json -> name
    "specdiff_block_diffusion": "block-diffusion",
    "specdiff_parallel": "parallel",
    "specdiff_eagle": "eagle",
}
Mask = Tensor | BlockMask  # bool [B, 1, Q, S], True where a query attends to a key


@dataclass(frozen=True)
class DraftConfig:
    """Shape of a draft network, as stored in config.json.

    Args:
        kind: kind of drafter: "block-diffusion", "parallel" or "eagle".
        target_vocab_size: rows of the target's embedding.
        target_hidden_size: columns of the target's embedding.
        draft_vocab_size: number of target tokens that can be drafted.
        hidden_size: width, a multiple of 2 * `heads`.
        layers, heads, intermediate_size: of the transformer.
        block: maximum draft length.
        k: default draft length; None: `block`.
        steps: default number of reverse steps of `BlockDiffusion`.
        rope_theta, norm_eps: as in Llama.
        target_layers: layers of the target whose residual streams the network reads, in ascending
            order, counted from 1 after the embedding. The lm head's input is always read, comes
            last and is not listed. Not for an eagle, which must predict the states that it reads.
        target_layer_count: number of the target's layers; required with `target_layers`.
        head_rank: rank of the `SequentialHead`; 0: no head. Not for an eagle, which reads the
            drafted tokens anyway.
        head_state: whether the head reads the network's state besides the token before.

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
        least = {"hidden_size": 1, "heads": 1, "block": 1, "layers": 0, "intermediate_size": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} must be at least {number}, got {getattr(self, name)}")
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
                "an eagle reads only the state that it predicts, and no sequential head: leave out "
                f"target_layers and head_rank, got {list(self.target_layers)} and "
                f"{self.head_rank}"
            )

    def _check_layers(self) -> None:
        layers, count = self.target_layers, self.target_layer_count
        if not layers:
            return
        if count is None:
            raise ValueError(f"target_layers {list(layers)} also need a target_layer_count")
        ascending = all(a < b for a, b in itertools.pairwise(layers))
        if not ascending or layers[0] < 1 or layers[-1] > count:
            raise ValueError(
                f"target_layers must be ascending, from 1 to target_layer_count = {count}, "
                f"got {list(layers)}"
            )

    @property
    def causal(self) -> bool:
        """Whether the last committed token's column predicts the next token."""
        return self.kind != "block-diffusion"

    def masks(self, k: int) -> int:
        """Number of masks for a draft of k tokens: k; k - 1 if parallel; 0 for an eagle."""
        return {"block-diffusion": k, "parallel": k - 1, "eagle": 0}[self.kind]


class Cache(Protocol):
    """Storage for keys and values."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v of new columns [B, H, Q, D]; return those they attend to [B, H, S, D]."""


class PrefixCache(OpenCache):
    """Keys and values of every layer, updated in place. Each row has its own length.

    A block is written directly after its prefix, and the next tokens overwrite it. Entries beyond a
    row's length are visible to that block only. The last slot is for padding.
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
        self.slots = self.lengths[:, None]  # [B, Q], slots that the next forward writes to
        self.limits = self.slots  # [B, Q], end of the slots that its columns attend to
        self.longest = 0  # at least the largest length
        self.span = 0  # number of slots that the next forward reads

    def part(self, rows: slice) -> PrefixCache:
        """The cache of some rows, sharing its memory."""
        part = copy(self)
        part.store = [(keys[rows], values[rows]) for keys, values in self.store]
        part.lengths = self.lengths[rows]
        return part

    def entries(self, layer: int, x: Tensor, heads: int, size: int) -> Entries | None:
        if self.slots.shape != x.shape[:2]:
            return None
        keys, values = self.store[layer]
        return Entries(self.slots, keys, values, None, self.lengths, self.limits)

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
        self.index, self.heads, self.head_size = index, config.heads, d // config.heads
        self.attention_norm = nn.RMSNorm(d, config.norm_eps)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.mlp_norm = nn.RMSNorm(d, config.norm_eps)
        self.gate_up = nn.Linear(d, 2 * f, bias=False)
        self.activation = nn.SiLU()
        self.down = nn.Linear(f, d, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Mask,
        cache: Cache | None,
    ) -> Tensor:
        """Named as transformers' layers name their arguments. [B, Q, d] -> [B, Q, d]"""
        x = hidden_states
        B, Q, d = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, Q, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, Q, D]
        cos, sin = (part[:, None] for part in position_embeddings)
        q, k = (rotate(part, (cos, sin)).to(v.dtype) for part in (q, k))  # v has autocast's dtype
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        mixed = attend(q, k, v, attention_mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, Q, d))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(self.activation(gate) * up)


LAYERS[Layer] = Family(
    lambda layer: Shape(layer.head_size, layer.head_size**-0.5, layer.index), "attention_norm",
    ("qkv",), "out", "mlp_norm", "gate_up", "gate_up", "activation", "down",
)  # fmt: skip


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
    """The network without the target's embeddings, which callers pass in.

    Args:
        config: shape.
        draft_ids: i64 [draft_vocab_size], target ids of the draft vocabulary, strictly increasing.

    Raises:
        ValueError: `draft_ids` do not fit.
    """

    draft_ids: Tensor

    def __init__(self, config: DraftConfig, draft_ids: Tensor) -> None:
        super().__init__()
        if draft_ids.shape != (config.draft_vocab_size,) or (draft_ids.diff() <= 0).any():
            raise ValueError(
                f"draft_ids must be {config.draft_vocab_size} strictly increasing token ids, "
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
        """Initialise the weights. The residual stream's axes are principal axes of `embedding`.

        `hidden_in` and the layers' outputs are initially zero. The output is then a linear function
        of the last token only.

        Args:
            embedding: [V, target_hidden_size], the target's embedding.
            generator: random number generator on the CPU.
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
        """Embed committed tokens. -> [..., d]

        Args:
            embedded: [..., target_d], the tokens' target embeddings.
            states: [..., (n + 1) target_d], the target's states before each token, concatenated:
                those of the n target layers, then the lm head's input. After the committed tokens,
                `Eagle` passes `embed_out` of its own states as the lm head's input.
        """
        width = self.config.target_hidden_size
        each = scaled(states.unflatten(-1, (-1, width))).flatten(-2)
        return self.embed_in(scaled(embedded)) + self.hidden_in(each)

    def embed_masks(self, anchor: Tensor, count: int) -> Tensor:
        """Embed the first `count` masks after a committed token.

        Args:
            anchor: [..., d], `embed_prefix` of the committed token.

        Returns:
            [..., count, d]
        """
        return anchor[..., None, :] + self.mask + self.offset[:count]

    def embed_revealed(self, embedded: Tensor) -> Tensor:
        """Embed drafted tokens [..., count, target_d], without target states. -> [..., count, d]"""
        return self.embed_in(scaled(embedded)) + self.offset[: embedded.shape[-2]]

    def forward(
        self, x: Tensor, positions: Tensor, mask: Mask, cache: Cache | None = None
    ) -> Tensor:
        """Embedded columns -> final states.

        Args:
            x: [B, Q, d].
            positions: i64 [B, Q].
            mask: bool [B, 1, Q, S], True where a query attends to a key, or a FlexAttention block
                mask.
            cache: storage for keys and values; None: columns attend to each other only, S = Q.

        Returns:
            [B, Q, d]; logits follow by `embed_out`, the target's output embedding and `bias`.
        """
        config = self.config
        turn = frequencies(config.hidden_size // config.heads, config.rope_theta, x.device)
        angles = (positions[..., None] * turn).repeat(1, 1, 2)  # fp32 in every dtype
        rotation = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, mask, cache)
        return x

    @torch.no_grad()
    def adopt(self, other: DraftNetwork) -> None:
        """Copy the weights of another network of the same width and vocabulary.

        The other network may have shorter drafts: its last mask then initialises the further masks.
        It may be of another kind: mask i of a parallel draft corresponds to mask i + 1 of a block,
        and an eagle has no masks. Target states that it does not read get zero weights. A head that
        it lacks is left unchanged.

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
                    f"the initial network's {name} must be {list(mine.shape)}, got {shape}: use "
                    "the same width, layers, target and draft_vocab_size in both"
                )
            mine.copy_(theirs)

    def _states_of(self, other: DraftNetwork) -> Tensor:
        """The other's `hidden_in` for the states that this network reads.

        It is zero for layers that the other network does not read.
        """
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
        """Load a network written by `save`, as fp32 on the CPU.

        Raises:
            ValueError: the folder holds no draft network, or a damaged one.
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
                "model.safetensors as written by `specdiff train`"
            ) from error
        return network


@functools.cache
def frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """Rotary frequencies theta^(-2 i / D) of a head of this width. -> f32 [D / 2]"""
    return theta ** -(torch.arange(0, width, 2, device=device) / width)


def principal_axes(moments: Tensor, count: int) -> Tensor:
    """The `count` leading eigenvectors of a symmetric [d, d], as columns [d, min(count, d)]."""
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :count]
