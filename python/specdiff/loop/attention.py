"""Attention over ragged rows, for transformers' attention interface.

A model is given these functions by name (`model.set_attn_implementation`), and each forward brings
the cache's `Window` as a keyword argument; without one, as in plain use of the model, they are
transformers' sdpa. SDPA itself needs nothing of this: it takes the mask that `Target` makes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specdiff_kernels import cached_attention
from specdiff_kernels.ops.decoder_layer import MOST_COLUMNS

from .cache import Window
from .trees import seen_by

# "flash" in a name is transformers' own
FLASH, FLEX, CACHED = "specdiff_fa", "specdiff_flex", "specdiff_cached"
NAMES = {"flash": FLASH, "flex": FLEX, "cached": CACHED, "sdpa": "sdpa", "eager": "eager"}
OVER_ROWS = ("flash", "flex", "cached")  # which need no mask, but the cache's window
FLEX_LEAST = 16  # columns of a head, on a GPU
HALF = (torch.float16, torch.bfloat16)


def ragged(attend: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """A function for transformers: `attend` where a forward brings a window, else its sdpa."""

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        window: Window | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if window is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        scaling, sliding_window = options.get("scaling"), options.get("sliding_window")
        return attend(query, key, value, window, scaling, sliding_window), None

    return attention


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """flash-attn's `flash_attn_with_kvcache`: no mask, only the keys that a row has.

    query [B, Hq, Q, D]; key and value [B, H, span, D], or the pools [blocks, block_size, H, D] of
    a paged cache. -> [B, Q, Hq, D]
    """
    lengths = (window.lengths + query.shape[2]).clamp(max=window.span)
    tables = None if window.gathers else window.tables
    if tables is None:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    # the last query sees all keys of its row, the one before it one less, and so on
    return load_flash()(
        query.transpose(1, 2),
        key,
        value,
        cache_seqlens=lengths.int(),
        block_table=tables,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
    )


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """PyTorch's FlexAttention, compiled on a GPU: blocks of keys that no query sees are not read.

    query [B, Hq, Q, D]; key and value [B, H, span, D]. -> [B, Q, Hq, D]
    """
    attend, make_mask = load_flex(query.device.type)
    if sliding_window not in window.cached:
        sizes = len(query), None, query.shape[2], key.shape[2]
        visible = visible_from(window, sliding_window)
        window.cached[sliding_window] = make_mask(visible, *sizes, device=query.device)
    mixed = attend(
        query,
        key,
        value,
        block_mask=window.cached[sliding_window],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return mixed.transpose(1, 2)


def cached_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    window: Window | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`specdiff_kernels.cached_attention`, for transformers; its sdpa where a gradient is wanted,
    or a mask is another than that of causal attention.

    query [B, Hq, Q, D]; key and value [B, H, span, D], or the pools [blocks, block_size, H, D] of
    a paged cache. -> [B, Q, Hq, D]
    """
    B, _, Q, D = query.shape
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    tables = first = parents = None
    if window is not None and not learns:
        lengths, tables, parents = window.lengths, window.tables, window.parents
    else:
        causal = getattr(module, "is_causal", True) and options.get("is_causal") is not False
        fits = causal and not learns and query.is_cpu and D == value.shape[3] <= MOST_COLUMNS
        known = key.shape[2]
        seen = rows_seen(attention_mask, B, Q, known, sliding_window) if fits else None
        if seen is None:
            more = {"scaling": scaling, "sliding_window": sliding_window, **options}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        lengths, first = seen
    mixed = cached_attention(
        query.transpose(1, 2).float(), key, value, lengths, tables=tables, first=first,
        parents=parents, sinks=s_aux, scale=scaling, window=sliding_window, softcap=softcap,
    )  # fmt: skip
    return mixed.to(query.dtype), None


def rows_seen(
    mask: Tensor | None, B: int, Q: int, known: int, window: int | None
) -> tuple[Tensor, Tensor | None] | None:
    """Entries before the queries and the first entry seen of each row, i64 [B], from a mask of
    transformers'; None if it is another than that of causal attention with padding on the left.

    Args:
        mask: bool or float [B or 1, 1, Q, known], None for causal attention over all entries.
        known: entries of a row with those of the queries, and with room for more.
    """
    if mask is None:
        return torch.full((B,), known - Q), None
    results: dict[int | None, Any] = vars(mask).setdefault("specdiff_rows", {})
    if window not in results:  # a mask serves all layers of a forward
        results[window] = read_mask(mask, B, Q, known, window)
    seen: tuple[Tensor, Tensor | None] | None = results[window]
    return seen


def read_mask(
    mask: Tensor, B: int, Q: int, known: int, window: int | None
) -> tuple[Tensor, Tensor] | None:
    if mask.ndim != 4 or mask.shape[1:] != (1, Q, known):
        return None
    seen = mask[:, 0] if mask.dtype is torch.bool else mask[:, 0] >= 0  # hidden: far below 0
    first = seen.any(1).int().argmax(1)
    length = known - Q - int(seen[0, -1].flip(0).int().argmax())  # the last query sees itself last
    keys, queries = torch.arange(known), torch.arange(length, length + Q)[:, None]
    expected = (keys >= first[:, None, None]) & (keys <= queries)
    if window is not None:
        expected &= keys > queries - window
    if not torch.equal(seen, expected.expand_as(seen)):
        return None
    return torch.full((B,), length), first.expand(B).contiguous()


def visible_from(window: Window, sliding_window: int | None) -> Callable[..., Tensor]:
    """Whether query q of row b sees key k, as FlexAttention asks."""
    lengths, positions = window.lengths, window.positions

    def in_chain(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        position = lengths[b] + q
        seen = k <= position
        return seen if sliding_window is None else seen & (k > position - sliding_window)

    if window.parents is None:
        return in_chain
    path, last = seen_by(window.parents), positions.shape[1] - 1

    def in_tree(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        number = (k - lengths[b]).clamp(0, last)  # among the new tokens
        new = k >= lengths[b]
        seen = torch.where(new, path[b, q, number] & (k - lengths[b] <= last), True)
        at = torch.where(new, positions[b, number], k)
        return seen if sliding_window is None else seen & (at > positions[b, q] - sliding_window)

    return in_tree


@cache
def load_flash() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache


@cache
def load_flex(device: str) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """FlexAttention and the maker of its masks; on a CPU as plain PyTorch, which is slower."""
    from torch.nn.attention import flex_attention as flex

    if device == "cpu":
        return flex.flex_attention, flex.create_block_mask
    compiled = torch.compile(flex.flex_attention, dynamic=True)
    return compiled, torch.compile(flex.create_block_mask, dynamic=True)


def choose(model: PreTrainedModel, accelerated: bool = False) -> str:
    """The attention to decode ragged rows with: on a GPU flash-attn where it is installed and knows
    the dtype, else FlexAttention; that of this package with accelerated layers; else the model's
    own, if it takes masks."""
    own = model.config._attn_implementation
    for name, implementation in NAMES.items():
        if own == implementation and name not in ("sdpa", "eager"):
            return name
    if model.device.type == "cuda" and own == "sdpa":
        if importlib.util.find_spec("flash_attn") is not None and model.dtype in HALF:
            return "flash"
        return "flex" if head_size(model) >= FLEX_LEAST else "sdpa"
    return "cached" if own == "sdpa" and accelerated else own


def head_size(model: PreTrainedModel) -> int:
    """Columns of a head."""
    config = model.config
    size = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


AttentionInterface.register(FLASH, ragged(flash_attention))
AttentionInterface.register(FLEX, ragged(flex_attention))
AttentionInterface.register(CACHED, cached_attention_forward)
for name in (FLASH, FLEX, CACHED):
    AttentionMaskInterface.register(name, sdpa_mask)
