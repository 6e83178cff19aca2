"""Tiny random models of every supported family, and drafters for them, built from configs: no
download.

Weights are large enough for the models to have opinions, so that greedy texts do not collapse.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from specdiff import Target
from specdiff.drafters import Autoregressive, BlockDiffusion, Eagle, ParallelDrafter, PromptLookup
from specdiff.drafters.network import DraftConfig, DraftNetwork

FAMILIES = ("gpt2", "gpt_neo", "llama")  # that differ in what the loop has to do
ALIKE = ("gemma", "mistral", "qwen2")  # as Llama, but for their masks, heads and norms
LLAMAS = {
    "llama": (LlamaForCausalLM, {}),
    "gemma": (GemmaForCausalLM, {"num_key_value_heads": 1, "head_dim": 8}),
    "mistral": (MistralForCausalLM, {"sliding_window": 5}),
    "qwen2": (
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 4, 5], [3]]
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def tiny_model(
    family: str, *, vocab: int = 50, context: int = 64, seed: int = 0, dtype=torch.float32, **more
) -> PreTrainedModel:
    """Two layers of width 32. Those that have windows see 5 tokens: GPT-Neo's and Qwen2's second
    layer, and both of Mistral's."""
    scale = {"initializer_range": 0.3, "vocab_size": vocab, **NO_IDS, **more}
    torch.manual_seed(seed)
    if family == "gpt2":
        config = GPT2Config(n_positions=context, n_embd=32, n_layer=2, n_head=4, **scale)
        return GPT2LMHeadModel(config).to(dtype).eval()
    if family == "gpt_neo":
        config = GPTNeoConfig(
            max_position_embeddings=context,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
            **scale,
        )
        return GPTNeoForCausalLM(config).to(dtype).eval()
    make, own = LLAMAS[family]
    config = make.config_class(
        max_position_embeddings=context,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        **{"num_key_value_heads": 2, **own, **scale},
    )
    return make(config).to(dtype).eval()


def tiny_network(
    kind: str,
    draft_ids: torch.Tensor,
    *,
    vocab: int = 50,
    layers: int = 1,
    block: int = 4,
    **more: Any,
) -> DraftNetwork:
    """A drafter's network for `tiny_model`s. Every parameter is random and of weight, so that every
    input matters to the output."""
    config = DraftConfig(
        kind,
        target_vocab_size=vocab,
        target_hidden_size=32,
        draft_vocab_size=len(draft_ids),
        hidden_size=16,
        layers=layers,
        heads=2,
        intermediate_size=32,
        block=block,
        **more,
    )
    network = DraftNetwork(config, draft_ids)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return network


def block_diffusion(target: Target) -> BlockDiffusion:
    """Random weights: it drafts from all even tokens, 4 at most, in one step."""
    return BlockDiffusion(tiny_network("block-diffusion", torch.arange(0, 50, 2)), target)


def parallel(target: Target) -> ParallelDrafter:
    return ParallelDrafter(tiny_network("parallel", torch.arange(0, 50, 2)), target)


def eagle(target: Target) -> Eagle:
    return Eagle(tiny_network("eagle", torch.arange(0, 50, 2)), target)


DRAFTERS = {
    "prompt-lookup": lambda target: PromptLookup(),
    "autoregressive": lambda target: Autoregressive(tiny_model("gpt2", seed=5)),
    "itself": lambda target: Autoregressive(target.model),
    "block-diffusion": block_diffusion,
    "parallel": parallel,
    "eagle": eagle,
}
