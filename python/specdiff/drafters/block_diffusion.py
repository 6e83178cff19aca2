"""BlockDiffusion: a masked diffusion model drafts a whole block of tokens in T reverse steps.

Absorbing-state diffusion (SEDD 2310.16834, MDLM 2406.07524) under a causal prefix: committed tokens
attend to what came before and keep their keys and values; a block of K masks sees the prefix and
itself in both directions. It reads the target's own embeddings and its last hidden state, so a few
million parameters do. Chunks are revealed from left to right, hence every position records its law.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from specdiff_kernels import Draft, Reveal, denoise_step

from ..cpu import accelerate, is_accelerated, restore
from ..sampling import Sampling
from ..schedule import chunk
from ..target import Target
from .base import Draws, News, check_draft_laws

MODEL_TYPE = "specdiff_block_diffusion"


@dataclass(frozen=True)
class BlockDiffusionConfig:
    """Shape of a drafter; what config.json holds.

    Args:
        target_vocab_size: rows of the target's embedding.
        target_hidden_size: its columns.
        draft_vocab_size: how many target tokens can be drafted.
        hidden_size: width, a multiple of `heads` with an even quotient.
        layers, heads, intermediate_size: of the transformer.
        block: most tokens in a draft.
        steps: reverse steps that `BlockDiffusion` takes unless told otherwise.
        rope_theta, norm_eps: as in Llama.
    """

    target_vocab_size: int
    target_hidden_size: int
    draft_vocab_size: int
    hidden_size: int = 576
    layers: int = 1
    heads: int = 9
    intermediate_size: int = 1536
    block: int = 4
    steps: int = 1
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * heads = {2 * self.heads}, "
                f"got {self.hidden_size}"
            )
        if not 1 <= self.steps <= self.block:
            raise ValueError(f"steps must be in [1, block = {self.block}], got {self.steps}")
        if not 0 < self.draft_vocab_size <= self.target_vocab_size:
            raise ValueError(
                f"draft_vocab_size must be in [1, target_vocab_size = {self.target_vocab_size}], "
                f"got {self.draft_vocab_size}"
            )


class PrefixCache:
    """Keys and values of every layer, in place, with a length of its own for each row.

    A block is written right behind its prefix, where the next tokens overwrite it; entries beyond
    a row's length are never visible to anything else. The last slot takes padding.
    """

    def __init__(self, config: BlockDiffusionConfig, batch: int, capacity: int, like: Tensor):
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

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, D] at `slots`; return views [B, H, span, D]."""
        index = self.slots[:, None, :, None].expand_as(k)
        keys, values = self.store[layer]
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        return keys[:, :, : self.span], values[:, :, : self.span]


class Layer(nn.Module):
    """Pre-norm attention with rotary positions, then SwiGLU."""

    def __init__(self, config: BlockDiffusionConfig, index: int) -> None:
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
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, cache: PrefixCache | None
    ) -> Tensor:
        B, Q, d = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, Q, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, Q, D]
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, Q, d))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding, half-rotation, of [B, H, Q, D] by cos, sin [B, 1, Q, D]."""
    cos, sin = rotation
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class BlockDiffusionNetwork(nn.Module):
    """The denoiser, without the target's embeddings, which callers pass in.

    Args:
        config: shape.
        draft_ids: i64 [draft_vocab_size], strictly increasing target ids.
    """

    draft_ids: Tensor
    frequencies: Tensor

    def __init__(self, config: BlockDiffusionConfig, draft_ids: Tensor) -> None:
        super().__init__()
        if draft_ids.shape != (config.draft_vocab_size,) or (draft_ids.diff() <= 0).any():
            raise ValueError(
                f"draft_ids must be {config.draft_vocab_size} strictly increasing ids, "
                f"got shape {tuple(draft_ids.shape)}"
            )
        d, target = config.hidden_size, config.target_hidden_size
        self.config = config
        self.embed_in = nn.Linear(target, d, bias=False)
        self.hidden_in = nn.Linear(target, d, bias=False)
        self.mask = nn.Parameter(torch.zeros(d))
        self.offset = nn.Parameter(torch.zeros(config.block, d))
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.embed_out = nn.Linear(d, target, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.draft_vocab_size))
        self.register_buffer("draft_ids", draft_ids.long())
        half = torch.arange(0, d // config.heads, 2) / (d // config.heads)
        self.register_buffer("frequencies", config.rope_theta**-half, persistent=False)

    @torch.no_grad()
    def initialise(self, embedding: Tensor, generator: torch.Generator | None = None) -> None:
        """Random weights; the stream's axes are the principal axes of `embedding`.

        `hidden_in` and what the layers add begin at zero, so the first output is a linear
        function of the last token alone.

        Args:
            embedding: [V, target_hidden_size] of the target.
            generator: of the random numbers.
        """
        scale = 0.4 / self.config.hidden_size**0.5
        for layer in self.layers:
            for name, weight in layer.named_parameters():
                if name.startswith(("out", "down")):
                    nn.init.zeros_(weight)
                elif weight.ndim == 2:
                    nn.init.normal_(weight, std=scale, generator=generator)
        nn.init.zeros_(self.hidden_in.weight)
        rows = embedding.float()
        axes = principal_axes(rows.T @ rows, self.config.hidden_size)
        self.embed_in.weight.zero_()[: axes.shape[1]] = axes.T
        self.embed_out.weight.zero_()[:, : axes.shape[1]] = axes / rows.norm(dim=1).mean()

    def embed_prefix(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Committed tokens [..., target_d], and the lm head input before each -> [..., d]"""
        return self.embed_in(self.scaled(embedded)) + self.hidden_in(self.scaled(hidden))

    def scaled(self, x: Tensor) -> Tensor:
        """[..., target_d] with a root mean square of 1 in each row."""
        return F.rms_norm(x, x.shape[-1:], eps=1e-12)

    def embed_block(self, embedded: Tensor, revealed: int | Tensor, anchor: Tensor) -> Tensor:
        """Embed a block: revealed tokens as themselves, masks as the last token that they follow.

        Args:
            embedded: [..., K, target_d]; only the revealed ones are used.
            revealed: how many on the left are known, int or i64 [..., 1].
            anchor: [..., d], the last committed token's `embed_prefix`.

        Returns:
            [..., K, d]
        """
        K = embedded.shape[-2]
        known = torch.arange(K, device=embedded.device) < revealed
        masks = anchor[..., None, :] + self.mask
        return (
            torch.where(known[..., None], self.embed_in(self.scaled(embedded)), masks)
            + self.offset[:K]
        )

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, cache: PrefixCache | None = None
    ) -> Tensor:
        """Embedded columns -> final states.

        Args:
            x: [B, Q, d].
            positions: i64 [B, Q].
            mask: bool [B, 1, Q, S], True where a query sees a key.
            cache: where keys and values go and come from; None: the columns themselves, S = Q.

        Returns:
            [B, Q, d]; `embed_out`, the target's output embedding and `bias` make logits of it.
        """
        angles = (positions[..., None] * self.frequencies).to(x.dtype).repeat(1, 1, 2)[:, None]
        rotation = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, rotation, mask, cache)
        return x

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (fp16, ids int32), each atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.half() for name, value in self.named_parameters()}
        tensors["draft_ids"] = self.draft_ids.int()
        config = {"model_type": MODEL_TYPE, **asdict(self.config)}
        write_atomically(folder / "model.safetensors", save(tensors, {"format": "pt"}))
        write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> BlockDiffusionNetwork:
        """Read what `save` wrote, as fp32 on the CPU.

        Raises:
            ValueError: the folder holds no drafter of this kind, or a damaged one.
        """
        folder = Path(folder)
        try:
            fields = json.loads((folder / "config.json").read_text())
            if fields.pop("model_type", None) != MODEL_TYPE:
                raise ValueError(f"model_type in config.json is not {MODEL_TYPE!r}")
            config = BlockDiffusionConfig(**fields)
            tensors = load_file(folder / "model.safetensors")
            network = cls(config, tensors["draft_ids"].long())
            network.load_state_dict(
                {k: v.float() for k, v in tensors.items() if k != "draft_ids"}
                | {"draft_ids": tensors["draft_ids"].long()}
            )
        except (OSError, TypeError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no usable block-diffusion drafter: {error}; expected config.json "
                "and model.safetensors as `python -m specdiff.train` writes them"
            ) from error
        return network


def principal_axes(moments: Tensor, count: int) -> Tensor:
    """The `count` leading eigenvectors of a symmetric [d, d], as columns [d, min(count, d)]."""
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :count]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in the same folder, then move it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class BlockDiffusion:
    """Drafts with a BlockDiffusionNetwork: k tokens in `steps` forwards.

    Step s reveals chunk s from left to right, so the law of a position never depends on a token
    revealed later and every draw is recorded with its law.

    Args:
        network: the denoiser. It is moved to the target's device and dtype, and accelerated iff the
            target's model is.
        target: whose embeddings it reads.
        steps: reverse steps T; None: the configuration's.
        backend: of the ops; None chooses.

    Raises:
        ValueError: `steps` out of range, or a target of another shape.

    Example:
        >>> decoder = Decoder(target, BlockDiffusion.load(folder, target))
    """

    needs_hidden = True
    capturable = True

    def __init__(
        self,
        network: BlockDiffusionNetwork,
        target: Target,
        *,
        steps: int | None = None,
        backend: str | None = None,
    ) -> None:
        config = network.config
        self.steps = config.steps if steps is None else steps
        if not 1 <= self.steps <= config.block:
            raise ValueError(f"steps must be in [1, block = {config.block}], got {self.steps}")
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
        self.block = config.block
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
    def load(
        cls,
        folder: str | Path,
        target: Target,
        *,
        steps: int | None = None,
        backend: str | None = None,
    ) -> BlockDiffusion:
        """Read a trained drafter from a folder. Raises ValueError as the constructor and `load`."""
        return cls(BlockDiffusionNetwork.load(folder), target, steps=steps, backend=backend)

    def start(self, batch: int, capacity: int, sampling: Sampling) -> None:
        self.sampling = sampling
        self.cache = PrefixCache(self.network.config, batch, capacity, self.head.weight)

    def forget(self, rows: list[int]) -> None:
        self.cache.lengths[rows] = 0

    @torch.no_grad()
    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        if not 1 <= k <= self.block:
            raise ValueError(f"k must be in [1, {self.block}] for this drafter, got {k}")
        if news.hidden is None:
            raise ValueError("news.hidden is None; a block-diffusion drafter needs hidden states")
        B = len(lengths)
        pool = self.head.weight.new_empty(B * k, self.head.out_features)
        ids = self.network.draft_ids
        draft = Draft.masked(B, k, pool, draft_ids=ids, lengths=lengths)
        steps = min(self.steps, k)
        for step in range(steps):
            lo, hi = chunk(k, steps, step)
            states = self._read(news if step == 0 else None, draft.tokens, lo)
            pool.view(B, k, -1)[:, lo:hi] = self.head(states[:, lo:hi])
            draft = denoise_step(
                draft,
                Reveal.chunk(lo, hi),
                step,
                *self.sampling.parameters,
                entropies=step == 0,
                **draws._asdict(),
                backend=self.backend,
            )
        if news.longest is None:
            check_draft_laws(draft)
        return draft

    def _read(self, news: News | None, tokens: Tensor, revealed: int) -> Tensor:
        """One forward over news, if any, and the block. -> states of the block [B, K, d]"""
        network, cache = self.network, self.cache
        B, K = tokens.shape
        columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # x, positions, slots, last seen
        if news is not None and news.hidden is not None:
            embedded = F.embedding(news.tokens, self.embedding)
            prefix = network.embed_prefix(embedded, news.hidden.to(embedded.dtype))
            newest = (news.counts - 1).clamp(min=0)
            self.anchor = prefix[torch.arange(B, device=tokens.device), newest]
            column = torch.arange(news.tokens.shape[1], device=tokens.device)
            at = cache.lengths[:, None] + column
            slots = at.where(column < news.counts[:, None], cache.padding)
            columns.append((prefix, at, slots, at))
            cache.lengths.add_(news.counts)  # in place: a captured round reads it again
            longest = news.longest
            cache.longest = int(cache.lengths.max()) if longest is None else longest
        embedded = F.embedding(tokens.clamp(min=0), self.embedding)
        block = network.embed_block(embedded, revealed, self.anchor)
        at = cache.lengths[:, None] + torch.arange(K, device=tokens.device)
        columns.append((block, at, at, at[:, -1:].expand(B, K)))
        x, positions, cache.slots, last = (
            torch.cat(part, 1) for part in zip(*columns, strict=True)
        )
        cache.span = min(cache.longest + K, cache.padding)
        keys = torch.arange(cache.span, device=tokens.device)
        mask = (keys <= last[:, :, None])[:, None]  # [B, 1, Q, span]
        return network(x, positions, mask, cache)[:, -K:]
