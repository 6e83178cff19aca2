"""A Llama in plain PyTorch, for batches whose rows have different lengths.

The cache is written in place. Weights come from a Hugging Face checkpoint: config.json and
*.safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


def read_config(folder: Path) -> SimpleNamespace:
    """Read config.json, with defaults for keys that older files lack."""
    c = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    rope = getattr(c, "rope_parameters", None) or getattr(c, "rope_scaling", None) or {}
    kind = getattr(c, "model_type", None), rope.get("rope_type", rope.get("type", "default"))
    if kind != ("llama", "default"):
        raise ValueError(
            f"{folder}: expected model type and rope type ('llama', 'default'), got {kind}: use "
            "specdiff.Target, which supports more models"
        )
    c.rope_theta = rope.get("rope_theta") or getattr(c, "rope_theta", 10000.0)
    c.head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    eos = getattr(c, "eos_token_id", None)
    c.stop_tokens = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return c


class DenseCache:
    """Keys and values [B, H, span, D] of each layer, written in place.

    Entries after a row's length are stale: they are masked and will be overwritten. So a row is
    rolled back by giving it a smaller length.
    """

    def __init__(self, model: Transformer, rows: int, span: int) -> None:
        c, self.span = model.config, span  # number of positions that attention reads
        states = model.norm.weight.new_zeros(
            c.num_hidden_layers, 2, rows, c.num_key_value_heads, span, c.head_dim
        )
        self.layers = [tuple(layer) for layer in states]

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, H, Q, D] at positions [B, Q]; return keys and values [B, H, span, D]."""
        at = positions[:, None, :, None].expand_as(k)
        keys, values = self.layers[layer]
        return keys.scatter_(2, at, k), values.scatter_(2, at, v)


class Inputs(NamedTuple):
    """Inputs shared by all layers of a forward."""

    positions: Tensor  # i64 [B, Q], of the new tokens
    cos: Tensor  # [B, 1, Q, D], cosines of the rotary angles
    sin: Tensor
    visible: Tensor  # bool [B, 1, Q, span]
    cache: DenseCache


class RMSNorm(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(c.hidden_size)), c.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.float() * scale).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: SimpleNamespace, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, Q, D]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, inputs), rotate(k, inputs)
        keys, values = inputs.cache.update(self.layer, inputs.positions, k, v)
        y = F.scaled_dot_product_attention(q, keys, values, inputs.visible, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor, inputs: Inputs) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of x [B, heads, Q, D]."""
    a, b = x.chunk(2, -1)
    return x * inputs.cos + torch.cat([-b, a], -1) * inputs.sin


class SwiGLU(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: SimpleNamespace, layer: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c), RMSNorm(c)
        self.self_attn, self.mlp = Attention(c, layer), SwiGLU(c)

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A Llama. Parameters have the checkpoint's names without the prefix "model."."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def hidden(self, tokens: Tensor, positions: Tensor, cache: DenseCache) -> Tensor:
        """Final states of tokens [B, Q] at positions [B, Q]. -> [B, Q, hidden]"""
        c, device = self.config, tokens.device
        half = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=device) / c.head_dim)
        angle = positions[:, None, :, None] * torch.cat([half, half])  # [B, 1, Q, D]
        visible = torch.arange(cache.span, device=device) <= positions[:, None, :, None]
        x = self.embed_tokens(tokens)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, Inputs(positions, cos, sin, visible, cache))
        return self.norm(x)

    def forward(self, tokens: Tensor, positions: Tensor, cache: DenseCache) -> Tensor:
        """Logits of tokens [B, Q] at positions [B, Q]. -> [B, Q, V]"""
        return self.lm_head(self.hidden(tokens, positions, cache))


def load(folder: Path, device: str = "cpu") -> Transformer:
    """Load a Hugging Face checkpoint in its stored dtype."""
    with torch.device("meta"):
        model = Transformer(read_config(folder))
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file, device)
    weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    weights.setdefault("lm_head.weight", weights["embed_tokens.weight"])  # if they are tied
    model.load_state_dict(weights, assign=True)
    return model.eval()
