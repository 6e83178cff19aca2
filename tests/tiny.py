"""Tiny random GPT-2, GPT-Neo and Llama models, built from configs: no download.

Weights are large enough for the models to have opinions, so that greedy texts do not collapse.
"""

from __future__ import annotations

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

FAMILIES = ("gpt2", "gpt_neo", "llama")
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def tiny_model(
    family: str, *, vocab: int = 50, context: int = 64, seed: int = 0, dtype=torch.float32, **more
) -> PreTrainedModel:
    """Two layers of width 32; GPT-Neo's second one sees a window of 5 tokens only."""
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
    config = LlamaConfig(
        max_position_embeddings=context,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        **scale,
    )
    return LlamaForCausalLM(config).to(dtype).eval()
