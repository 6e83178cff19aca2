"""Models of published shapes with random weights, to measure cost.

They are the models of SpecDiff (2408.05636), Table 2: the targets GPT-2 XL and GPT-Neo 2.7B, the
drafter SEDD-small, and GPT-2 as the baseline drafter. A forward takes as long as with trained
weights, but its output is meaningless. Acceptance must therefore be set, see `Controlled`. Nothing
is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from ..drafters import Autoregressive
from ..drafters.ddit import DDiT, DDiTConfig
from ..drafters.sedd import SEDD
from ..loop.target import Target

STD = 0.02  # of random weights, as in GPT-2

# config.json of openai-community/gpt2-xl and EleutherAI/gpt-neo-2.7B, without end-of-text tokens
TARGETS: dict[str, PretrainedConfig] = {
    "gpt2-xl": GPT2Config(
        vocab_size=50257, n_positions=1024, n_embd=1600, n_layer=48, n_head=25, eos_token_id=None
    ),
    "gpt-neo-2.7b": GPTNeoConfig(
        vocab_size=50257,
        max_position_embeddings=2048,
        hidden_size=2560,
        num_layers=32,
        num_heads=20,
        attention_types=[[["global", "local"], 16]],
        window_size=256,
        eos_token_id=None,
    ),
}
# louaaron/sedd-small: 169,627,218 parameters; openai-community/gpt2: 124,439,808
DRAFTERS: dict[str, DDiTConfig | PretrainedConfig] = {
    "sedd-small": DDiTConfig(
        tokens=50257, hidden_size=768, blocks=12, heads=12, cond_dim=128, length=1024
    ),
    "gpt2": GPT2Config(
        vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, eos_token_id=None
    ),
}


def random_target(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    layers: int | None = None,
) -> PreTrainedModel:
    """A model of a target's shape with random weights, allocated directly on its device.

    Its greedy text depends on positions only. The best logit is far from the second, in every dtype
    and for any number of tokens in a forward.

    Args:
        name: a key of TARGETS.
        dtype, device: of the weights. fp32 takes 6.2 GB for GPT-2 XL, 10.6 GB for GPT-Neo 2.7B.
        seed: seed of the weights.
        layers: number of layers, for small machines; None: all. Figures with fewer layers are not
            those of the shape: say so when you give them.

    Raises:
        ValueError: the name is unknown, or the shape has fewer layers.

    Example:
        >>> target = Target(random_target("gpt2-xl", dtype=torch.bfloat16, device="cuda"))
    """
    return random_model(cut("target", TARGETS, name, layers), dtype, torch.device(device), seed)


def random_drafter(
    name: str, target: Target, *, layers: int | None = None, seed: int = 0
) -> SEDD | Autoregressive:
    """A drafter of a published shape with random weights, with the target's device and dtype.

    SEDD has its default K and T. `Decoder` takes another K; `steps` sets another T.

    Args:
        name: a key of DRAFTERS.
        target: a target with the drafters' vocabulary of 50257 tokens.
        layers, seed: as in `random_target`.

    Raises:
        ValueError: as `random_target`.

    Example:
        >>> drafter = random_drafter("sedd-small", target)
        >>> drafter.steps = 1
    """
    config = cut("drafter", DRAFTERS, name, layers)
    if not isinstance(config, DDiTConfig):
        return Autoregressive(random_model(config, target.dtype, target.device, seed))
    network: Any = allocate(config, target.dtype, target.device)
    fill(network, seed)
    return SEDD(network)


def cut(what: str, shapes: Mapping[str, Any], name: str, layers: int | None) -> Any:
    """The configuration of a shape, cut to its first `layers` layers."""
    if name not in shapes:
        raise ValueError(f"{what} must be one of {', '.join(shapes)}, got {name!r}")
    config = copy.deepcopy(shapes[name])
    if layers is None:
        return config
    most = config.blocks if isinstance(config, DDiTConfig) else config.num_hidden_layers
    if not 1 <= layers <= most:
        raise ValueError(f"layers must be in [1, {most}] for {name}, got {layers}")
    if isinstance(config, DDiTConfig):
        return replace(config, blocks=layers)
    config.num_hidden_layers = layers
    if isinstance(config, GPTNeoConfig):
        config.attention_layers = config.attention_layers[:layers]
        config.attention_types = [[config.attention_layers, 1]]
    return config


def check_shapes(targets: Sequence[str], layers: int | None, context: int) -> None:
    """Raise ValueError for an unknown target, or a shape without so many layers or positions."""
    for name in targets:
        most = cut("--target", TARGETS, name, layers).max_position_embeddings
        if context >= most:
            raise ValueError(f"--context must be below {name}'s {most} tokens, got {context}")
    for name in DRAFTERS:
        cut("drafter", DRAFTERS, name, layers)


def allocate(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Allocate a model of this configuration, with uninitialised weights."""
    with torch.device(device), no_init_weights():
        if isinstance(config, DDiTConfig):
            with default_dtype(dtype):
                network = DDiT(config)
            return network.to(device, dtype)  # its position tables are on the CPU
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fill(model: nn.Module, seed: int) -> torch.Generator:
    """Set matrices to N(0, 0.02^2), norm weights to 1, biases to 0. -> the generator used"""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, STD, generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))
    return generator


def random_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """A GPT-2 or GPT-Neo whose best token is determined by the position.

    With random logits, the best two of 50257 differ by only a twentieth of the best. Rounding would
    sometimes swap them, and forwards of 1 and of K + 1 tokens would disagree. Scaling the head does
    not help, because errors grow with it. Here the residual stream is mostly one row of the tied
    embedding: every position embedding is twice the row of some token. That token's logit is twice
    the logit of the token read, and several times all others. Rows have standard deviation 1. The
    layers' last matrices are scaled as in GPT-2, so all layers together add less than that. The
    last norm scales logits to the size in trained models, the best to about 28.
    """
    model = allocate(config, dtype, device)
    generator = fill(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("c_proj.weight", "out_proj.weight")):  # in attention and mlp
                parameter.div_((2 * config.num_hidden_layers) ** 0.5)
        rows, positions = model.transformer.wte.weight, model.transformer.wpe.weight
        rows.div_(STD)
        told = torch.randint(len(rows), (len(positions),), generator=generator, device=rows.device)
        positions.copy_(2 * rows[told])
        model.transformer.ln_f.weight.fill_(32 / rows.shape[1])
    return model.eval().requires_grad_(False)
