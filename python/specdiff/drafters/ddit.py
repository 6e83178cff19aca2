"""DDiT: the denoising transformer of SEDD (2310.16834). It loads SEDD's public checkpoints.

It is a bidirectional transformer over a text with masks. The noise level enters through adaLN (DiT
2212.09748): the shift, scale and gate of every layer depend on sigma only. A sampler with a fixed
schedule computes them once. An adaLN is then a plain LayerNorm with weight and bias from a table.
MDLM (2406.07524) uses the same network with sigma = 0 throughout.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..files import write_atomically
from .network import rotate
from .noise import Geometric, LogLinear

FREQUENCIES = 128  # number of sigma's sinusoids; a cosine and a sine each
BASE = 10000.0  # for sigma's sinusoids and for the rotary positions
NORM_EPS = 1e-5
NOISES = {"loglinear": LogLinear, "geometric": Geometric}
INV_FREQ = "rotary_emb.inv_freq"  # stored in the public checkpoints, though the width determines it


@dataclass(frozen=True)
class DDiTConfig:
    """Shape of a DDiT and the noise schedule of its training, as stored in config.json.

    The defaults are those of sedd-small. sedd-medium has 24 blocks of width 1024 with 16 heads.

    Args:
        tokens: V, the vocabulary without the mask. The mask's id is V.
        hidden_size: width, a multiple of 2 * `heads`.
        blocks, heads: number of transformer blocks, and of heads in each.
        cond_dim: width of the embedding of sigma.
        length: maximum number of columns in training.
        time_conditioned: if False, sigma is 0 at all times, as in MDLM.
        noise: noise schedule.

    Raises:
        ValueError: a size is out of range.
    """

    tokens: int = 50257
    hidden_size: int = 768
    blocks: int = 12
    heads: int = 12
    cond_dim: int = 128
    length: int = 1024
    time_conditioned: bool = True
    noise: LogLinear | Geometric = field(default_factory=LogLinear)

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden_size", "blocks", "heads", "cond_dim", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * heads = {2 * self.heads}, "
                f"got {self.hidden_size}"
            )


class Modulation(NamedTuple):
    """All adaLN outputs at one sigma. A gain is the norm's weight times (1 + scale)."""

    blocks: Tensor  # [blocks, 6, d]: shift, gain, gate of the attention, then of the mlp
    final: Tensor  # [2, d]: shift, gain


class Embedding(nn.Module):
    """Embedding of V tokens and the mask."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(rows, width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding)


class SigmaMap(nn.Module):
    """Maps a noise level to the vector that all adaLN layers read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, sigmas: Sequence[float]) -> Tensor:
        """S noise levels -> [S, cond_dim]"""
        return F.silu(self.mlp(sinusoids(sigmas).to(next(self.parameters()))))


def sinusoids(sigmas: Sequence[float]) -> Tensor:
    """cos, then sin, of sigma * BASE^(-i / 128), i = 0 .. 127. -> fp64 [S, 256]"""
    exponents = torch.arange(FREQUENCIES, dtype=torch.float64, device="cpu") / FREQUENCIES
    levels = torch.tensor(sigmas, dtype=torch.float64, device="cpu")
    angles = levels[:, None] * BASE**-exponents
    return torch.cat((angles.cos(), angles.sin()), 1)


class Rotary(nn.Module):
    """Tables of cosines and sines of rotary positions, [length, 1, 1, D].

    The width determines them, so an `inv_freq` in a state dict is ignored.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        positions = torch.arange(length, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, frequencies(width)).repeat(1, 2)[:, None, None]
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self.register_load_state_dict_pre_hook(drop_inv_freq)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, 1, 1, D] for embedded columns [B, N, d], in their dtype."""
        columns = x.shape[1]
        return self.cos[:columns].to(x.dtype), self.sin[:columns].to(x.dtype)


def frequencies(width: int) -> Tensor:
    """Rotary frequencies BASE^(-2 i / D) of a head of this width. -> fp64 [D / 2]"""
    return BASE ** -(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)


def drop_inv_freq(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}inv_freq", None)


class Block(nn.Module):
    """Bidirectional attention and a tanh-GELU mlp, each with an adaLN before and a gate after."""

    def __init__(self, config: DDiTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(d, NORM_EPS, bias=False)
        self.attn_qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d, NORM_EPS, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d)
        )
        self.adaLN_modulation = zeroed(nn.Linear(config.cond_dim, 6 * d))

    def modulation(self, condition: Tensor) -> Tensor:
        """[S, cond_dim] -> [S, 6, d]"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, 1)
        gain1, gain2 = self.norm1.weight * (1 + scale1), self.norm2.weight * (1 + scale2)
        return torch.stack((shift1, gain1, gate1, shift2, gain2, gate2), 1)

    def forward(
        self, x: Tensor, modulation: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        B, N, d = x.shape
        shift1, gain1, gate1, shift2, gain2, gate2 = modulation
        normed = adaptive_norm(x, gain1, shift1)
        qkv = self.attn_qkv(normed).view(B, N, 3, self.heads, -1)
        q, k = rotate(qkv[:, :, :2], rotation).unbind(2)  # each [B, N, H, D]
        mixed = attend(q, k, qkv[:, :, 2], mask)
        x = torch.addcmul(x, gate1, self.attn_out(mixed.reshape(B, N, d)))
        normed = adaptive_norm(x, gain2, shift2)
        return torch.addcmul(x, gate2, self.mlp(normed))


class OutputLayer(nn.Module):
    """The last adaLN and the head. `forward` applies the adaLN, `DDiT.head` the head."""

    def __init__(self, config: DDiTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm_final = nn.LayerNorm(d, NORM_EPS, bias=False)
        self.linear = zeroed(nn.Linear(d, config.tokens + 1))
        self.adaLN_modulation = zeroed(nn.Linear(config.cond_dim, 2 * d))

    def modulation(self, condition: Tensor) -> Tensor:
        """[S, cond_dim] -> [S, 2, d]"""
        shift, scale = self.adaLN_modulation(condition).chunk(2, 1)
        return torch.stack((shift, self.norm_final.weight * (1 + scale)), 1)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, gain = modulation
        return adaptive_norm(x, gain, shift)


def adaptive_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm of [B, N, d] with gain and shift [d] for all rows, or [B, 1, d] for each row."""
    if gain.ndim == 1:
        return F.layer_norm(x, gain.shape, gain, shift, NORM_EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), gain)


def zeroed(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Bidirectional attention of [B, N, H, D]; mask: bool [B, 1, 1, N]. -> [B, N, H, D]"""
    if flash_fits(q, mask) and (flash := flash_attention()) is not None:
        return flash(q, k, v)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def flash_fits(q: Tensor, mask: Tensor | None) -> bool:
    return mask is None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


@functools.cache
def flash_attention() -> Callable[..., Tensor] | None:
    """flash_attn's kernel, or None if the optional package is not installed."""
    try:
        return importlib.import_module("flash_attn").flash_attn_func
    except ImportError:
        return None


class DDiT(nn.Module):
    """Denoiser: maps a text with masks to outputs l for every token at every position.

    l is the output before SEDD's scaling. The score of token v at a masked position is exp(l_v) /
    (V (exp(sigma) - 1)), and p(v) = softmax(l)_v over the V tokens. Weights are initialised as in
    the public code: adaLN and head are zero.

    Parameters have the names of the public checkpoints louaaron/sedd-small and sedd-medium.

    Args:
        config: shape and noise schedule.

    Example:
        >>> network = DDiT.from_pretrained(folder).eval()
        >>> steps = times(8)
        >>> table = network.modulations([network.config.noise.sigma(t) for t, _ in steps])
        >>> states = network(tokens, table[0])
        >>> logits = network.head(states[tokens == network.mask_id])
    """

    def __init__(self, config: DDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_embed = Embedding(config.tokens + 1, config.hidden_size)
        self.sigma_map = SigmaMap(config.cond_dim)
        self.rotary_emb = Rotary(config.hidden_size // config.heads, config.length)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.output_layer = OutputLayer(config)

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens that can be drafted: all but the mask."""
        return self.config.tokens

    @property
    def mask_id(self) -> int:
        """V, the mask's id and its column in `head`, the last."""
        return self.config.tokens

    def modulations(self, sigmas: Sequence[float]) -> list[Modulation]:
        """The adaLN outputs that `forward` needs at each noise level. They depend on the weights.

        Args:
            sigmas: total noise at each reverse step. Without time conditioning only their number
                matters, and all entries of the result are equal.

        Returns:
            one Modulation per sigma, in the network's dtype.
        """
        known = sigmas if self.config.time_conditioned else [0.0]
        condition = self.sigma_map(known)
        layers = cast(Iterable[Block], self.blocks)
        entries = [layer.modulation(condition) for layer in layers]  # each [S, 6, d]
        blocks = torch.stack(entries, 1)
        final = self.output_layer.modulation(condition)
        table = [Modulation(*entry) for entry in zip(blocks, final, strict=True)]
        return table if self.config.time_conditioned else table * len(sigmas)

    def forward(self, tokens: Tensor, modulation: Modulation, mask: Tensor | None = None) -> Tensor:
        """Final states of tokens. `head` maps them to logits.

        Args:
            tokens: i64 [B, N], N <= `config.length`. Masked positions hold `mask_id`.
            modulation: an entry of `modulations`.
            mask: bool [B, N], True for real columns, False for padding. Every row needs a real
                column. None: all columns are real. States of padding are arbitrary.

        Returns:
            [B, N, d], after the last norm.

        Raises:
            ValueError: more than `config.length` columns.
        """
        columns, length = tokens.shape[1], self.config.length
        if columns > length:
            raise ValueError(
                f"tokens must have at most length = {length} columns, got {columns}: "
                "drop the first ones"
            )
        visible = None if mask is None else mask[:, None, None]  # [B, 1, 1, N]
        x = self.vocab_embed(tokens)
        rotation = self.rotary_emb(x)
        for block, entry in zip(self.blocks, modulation.blocks, strict=True):
            x = block(x, entry, rotation, visible)
        return self.output_layer(x, modulation.final)

    def head(self, states: Tensor) -> Tensor:
        """Final states [..., d] -> l [..., V + 1]. Ignore the last column, the mask's."""
        return self.output_layer.linear(states)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors atomically, in the public checkpoints' format."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        tensors[INV_FREQ] = frequencies(self.config.hidden_size // self.config.heads).float()
        config = json.dumps(config_fields(self.config), indent=2) + "\n"
        write_atomically(folder / "model.safetensors", save(tensors, {"format": "pt"}))
        write_atomically(folder / "config.json", config.encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DDiT:
        """Load a folder of a public checkpoint, or from `save_pretrained`, as fp32 on the CPU.

        Args:
            folder: holds config.json and model.safetensors. Pickled weights are never read.

        Raises:
            ValueError: the folder holds no absorbing-state DDiT, or a damaged one. The message
                gives the cause.

        Example:
            >>> DDiT.from_pretrained(snapshot_download("louaaron/sedd-small"))
        """
        folder = Path(folder)
        try:
            config = read_config(json.loads((folder / "config.json").read_text()))
            tensors = load_file(folder / "model.safetensors")
            with torch.device("meta"):
                network = cls(config)
            # copies, so that no weight is a view of the file
            owned = {k: v.to(torch.float32, copy=True) for k, v in tensors.items()}
            network.load_state_dict(owned, assign=True)
        except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no usable DDiT: {error}; expected config.json and "
                "model.safetensors (pickled weights are not read), as in louaaron/sedd-small or as "
                "written by save_pretrained"
            ) from error
        return network


def read_config(fields: dict[str, Any]) -> DDiTConfig:
    """Parse the nested config.json of the public checkpoints. Raises ValueError, TypeError.

    Two keys are additions here: `model.time_conditioning`, and `noise.eps`, which is always 1e-3 in
    the public checkpoints.
    """
    try:
        graph, noise, model = fields["graph"]["type"], fields["noise"], fields["model"]
        if graph != "absorb":
            raise ValueError(
                f"graph.type must be 'absorb', got {graph!r}: other graphs have no mask token to "
                "reveal"
            )
        if not model["scale_by_sigma"]:
            raise ValueError(
                "model.scale_by_sigma must be true, got false: the outputs would be scores, but "
                "the reverse steps here expect logits"
            )
        return DDiTConfig(
            tokens=fields["tokens"],
            hidden_size=model["hidden_size"],
            blocks=model["n_blocks"],
            heads=model["n_heads"],
            cond_dim=model["cond_dim"],
            length=model["length"],
            time_conditioned=model.get("time_conditioning", True),
            noise=read_noise(noise),
        )
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}") from error


def read_noise(fields: dict[str, Any]) -> LogLinear | Geometric:
    kind = fields["type"]
    if kind == "loglinear":  # the public checkpoints also have sigma_min and sigma_max, unused
        return LogLinear(fields.get("eps", LogLinear.eps))
    if kind == "geometric":
        return Geometric(fields["sigma_min"], fields["sigma_max"])
    raise ValueError(f"noise.type must be one of {', '.join(NOISES)}, got {kind!r}")


def config_fields(config: DDiTConfig) -> dict[str, Any]:
    """The fields of config.json, with the `dropout` that the public code requires."""
    kind = next(name for name, noise in NOISES.items() if isinstance(config.noise, noise))
    return {
        "tokens": config.tokens,
        "graph": {"type": "absorb"},
        "noise": {"type": kind, **asdict(config.noise)},
        "model": {
            "type": "ddit",
            "hidden_size": config.hidden_size,
            "cond_dim": config.cond_dim,
            "length": config.length,
            "n_blocks": config.blocks,
            "n_heads": config.heads,
            "scale_by_sigma": True,
            "dropout": 0.1,
            "time_conditioning": config.time_conditioned,
        },
    }
