"""One thread for the loop's tests, whose models are tiny; a flash-attn that needs no GPU."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from specdiff.loop import attention


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@torch.inference_mode()
def flash_by_hand(
    q, k, v, *, cache_seqlens, block_table, softmax_scale, causal, window_size
) -> torch.Tensor:
    """flash_attn_with_kvcache as flash-attn documents it, row by row and query by query.

    q [B, Q, Hq, D]; k, v [B, S, H, D], or with a table [blocks, size, H, D].
    """
    assert causal and cache_seqlens.dtype == torch.int32
    assert block_table is None or block_table.dtype == torch.int32
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    out = torch.empty_like(q)
    for b, length in enumerate(cache_seqlens.tolist()):
        keys, values = (
            x[b] if block_table is None else x[block_table[b].long()].flatten(0, 1) for x in (k, v)
        )
        assert length <= len(keys)
        for i in range(q.shape[1]):
            end = length - q.shape[1] + i + 1
            start = 0 if window_size[0] < 0 else max(0, end - 1 - window_size[0])
            for head in range(q.shape[2]):
                own = head * k.shape[2] // q.shape[2]
                scores = keys[start:end, own] @ q[b, i, head]
                scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
                out[b, i, head] = (scale * scores).softmax(0) @ values[start:end, own]
    return out


@pytest.fixture
def flash_attn(monkeypatch):
    """Installed, and made of plain PyTorch."""
    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_with_kvcache = flash_by_hand
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    attention.load_flash.cache_clear()
    yield
    attention.load_flash.cache_clear()
