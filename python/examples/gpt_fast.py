"""A decoder in the manner of gpt-fast: a Llama in plain PyTorch, and speculative decoding of ragged
batches with `specdiff_kernels` and nothing else.

    python gpt_fast.py --model FOLDER --draft SMALLER --prompt "Once upon" --prompt "The sky is"
    python gpt_fast.py --model FOLDER --prompt-ids 1,2,3 --prompt-ids 4,5 --temperature 0.8

A folder is a Hugging Face checkpoint of type llama: config.json, *.safetensors, tokenizer.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from specdiff_kernels import Draft, RowLaw, check_status, commit, row_law, sample, verify


def read_config(folder: Path) -> SimpleNamespace:
    """config.json by its own names, with what older ones leave out."""
    c = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    rope = getattr(c, "rope_parameters", None) or getattr(c, "rope_scaling", None) or {}
    kind = getattr(c, "model_type", None), rope.get("rope_type", rope.get("type", "default"))
    if kind != ("llama", "default"):
        raise ValueError(
            f"{folder}: expected model type and rope type ('llama', 'default'), got {kind}; "
            "specdiff.Target decodes more kinds"
        )
    c.rope_theta = rope.get("rope_theta") or getattr(c, "rope_theta", 10000.0)
    c.head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    eos = getattr(c, "eos_token_id", None)
    c.stop_tokens = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return c


class DenseCache:
    """Keys and values [B, H, span, D] of each layer, written in place.

    What lies behind a row's length is stale: it is masked, and overwritten next, so that to roll a
    row back is to give it a smaller length.
    """

    def __init__(self, model: Transformer, rows: int, span: int) -> None:
        c, self.span = model.config, span  # positions of a row that attention is shown
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
    """What every layer of a forward reads."""

    positions: Tensor  # i64 [B, Q], of the new tokens
    cos: Tensor  # [B, 1, Q, D], of the angles by which queries and keys are turned
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
    """Turn the pairs (i, i + D / 2) of [B, heads, Q, D]."""
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
    """A Llama whose parameters have the checkpoint's names, without "model." before them."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def hidden(self, tokens: Tensor, positions: Tensor, cache: DenseCache) -> Tensor:
        """Tokens [B, Q] at positions [B, Q], each row at its own. -> [B, Q, hidden]"""
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
        """-> logits [B, Q, V]"""
        return self.lm_head(self.hidden(tokens, positions, cache))


def load(folder: Path, device: str = "cpu") -> Transformer:
    """A Hugging Face checkpoint's weights, in the dtype they are stored in."""
    with torch.device("meta"):
        model = Transformer(read_config(folder))
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file, device)
    weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    weights.setdefault("lm_head.weight", weights["embed_tokens.weight"])  # if they are tied
    model.load_state_dict(weights, assign=True)
    return model.eval()


def prefill(model: Transformer, text: Tensor, longest: int) -> DenseCache:
    """Read the first `longest` columns of a text [B, S], into a cache with room for all of it."""
    cache = DenseCache(model, *text.shape)
    positions = torch.arange(longest, device=text.device).expand(len(text), -1)
    model.hidden(text[:, :longest], positions, cache)
    return cache


class Drafter:
    """A smaller model drafts token by token. Each token is recorded: `verify` gets the logits and
    the law that it was drawn from.
    """

    def __init__(self, model: Transformer, text: Tensor, longest: int) -> None:
        self.model, self.cache = model, prefill(model, text, longest)

    def draft(
        self, text: Tensor, lengths: Tensor, k: int, temperature: float, seed: Tensor, round: Tensor
    ) -> Draft:
        """K tokens behind text [B, S], of which the cache has read lengths [B] but perhaps one."""
        B, device = len(text), text.device
        # if all of the last draft was accepted, the model has not seen its last token
        at = (lengths[:, None] + torch.tensor([-1, 0], device=device)).clamp(min=0)
        new, tokens, logits, laws = text.gather(1, at), [], [], []
        for i in range(k):
            logits.append(self.model(new, at, self.cache)[:, -1])  # [B, V]
            laws.append(row_law(logits[i], temperature))
            slot = torch.full_like(seed, i)
            tokens.append(sample(logits[i], laws[i], seed=seed, round=round, slot=slot))
            new = tokens[i][:, None].clamp(min=0)  # -1 where logits have no law; verify says so
            at = lengths[:, None] + i + 1
        return Draft(
            tokens=torch.stack(tokens, 1),
            tau=torch.arange(k, dtype=torch.int32, device=device).expand(B, k),  # in this order
            rows=torch.arange(k * B, device=device).view(k, B).T,  # (b, i) is row i B + b below
            logits=torch.cat(logits),
            law=RowLaw(*map(torch.cat, zip(*laws, strict=True))),
        )


@torch.inference_mode()
def generate(
    target: Transformer,
    prompts: list[list[int]],
    new_tokens: int,
    *,
    draft_model: Transformer | None = None,
    k: int = 4,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[list[list[int]], float]:
    """Continue ragged prompts together, each as if it were alone.

    Args:
        target: the model whose law the texts follow.
        prompts: token ids, at least one in each.
        new_tokens: most that are added to a prompt; fewer where a stop token comes first.
        draft_model: with the same vocabulary; None: one token a forward.
        k: tokens drafted in a round.
        temperature: 0 is greedy.
        seed: row b draws with seed + b.

    Returns:
        prompt and new tokens of each row, and how many tokens a target forward brought it.

    Example:
        >>> generate(load(Path("llama")), [[1, 2, 3], [4, 5]], 8, draft_model=load(Path("tiny")))
    """
    device, B, longest = target.norm.weight.device, len(prompts), max(map(len, prompts))
    k = 0 if draft_model is None else k
    text = torch.zeros(B, longest + new_tokens + k + 1, dtype=torch.int64, device=device)
    for row, prompt in zip(text, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    cache = prefill(target, text, longest)
    drafter = None if draft_model is None else Drafter(draft_model, text, longest)
    # a cache holds all tokens of a row but the last, so that every round is alike
    start = lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    limit, seeds, round = start + new_tokens, seed + torch.arange(B, device=device), start * 0
    finished = torch.zeros_like(start, dtype=torch.bool)
    stops = torch.tensor(target.config.stop_tokens, dtype=torch.int64, device=device)
    none = text[:, :0]
    draft = Draft(none, none.int(), none)
    while not finished.all():
        if drafter is not None:
            draft = drafter.draft(text, lengths, k, temperature, seeds, round)
        tokens = torch.cat([text.gather(1, lengths[:, None]), draft.tokens.clamp(min=0)], 1)
        positions = lengths[:, None] + torch.arange(k + 1, device=device)  # [B, K + 1]
        logits = target(tokens, positions, cache)  # [B, K + 1, V]
        _, emitted, status = verify(logits, draft, temperature, seed=seeds, round=round)
        check_status(status.masked_fill(finished, 0), "sequence")
        text.scatter_(1, positions + 1, emitted)  # stale behind the new length, as in the cache
        round += ~finished
        lengths, _, finished = commit(
            lengths, emitted, stop_tokens=stops, limit=limit, finished=finished
        )
    texts = [row[: n + 1] for row, n in zip(text.tolist(), lengths.tolist(), strict=True)]
    return texts, float((lengths - start).sum() / round.sum())


def token_ids(text: str) -> list[int]:
    return [int(token) for token in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint's folder")
    parser.add_argument("--draft", type=Path, help="one of a smaller model, which drafts")
    parser.add_argument("--prompt", action="append", default=[], help="may be given repeatedly")
    parser.add_argument("--prompt-ids", action="append", default=[], type=token_ids)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--k", type=int, default=4, help="tokens drafted in a round")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.prompt and not args.prompt_ids:
        parser.error("expected a --prompt or --prompt-ids")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    file = args.model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file)) if file.exists() else None
    if args.prompt and tokenizer is None:
        parser.error(f"--prompt needs {file}; without it pass --prompt-ids")
    encoded = [tokenizer.encode(text).ids for text in args.prompt] if tokenizer else []
    texts, rate = generate(
        load(args.model, device),
        args.prompt_ids + encoded,
        args.new_tokens,
        draft_model=load(args.draft, device) if args.draft else None,
        k=args.k,
        temperature=args.temperature,
        seed=args.seed,
    )
    for text in texts:
        print(tokenizer.decode(text) if tokenizer else ",".join(map(str, text)))
    print(f"{rate:.2f} tokens per target forward")


if __name__ == "__main__":
    main()
