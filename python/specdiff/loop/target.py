"""Target: a Hugging Face causal language model that decodes ragged rows over a RowCache.

One forward takes [B, Q] tokens, each row at its own position. Models run unmodified: they are given
masks and positions, or an attention function by its name. GPT-Neo is the exception. It derives
masks from shapes and has no attention interface, so its attention is replaced.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from ..download import target_folder
from ..models import load_causal, load_tokenizer
from . import attention, fast_layers
from .arguments import token_ids, whole_number
from .cache import PagedRowCache, RowCache, Window
from .fast_module import has_global_hooks
from .recorder import Recorder
from .trees import seen_by

SUPPORTED = ("gemma", "gpt2", "gpt_neo", "llama", "mistral", "qwen2")


class Target:
    """A causal language model, seen as tokens -> logits and hidden states over a RowCache.

    Args:
        model: of a model type in SUPPORTED, on one device. It is put into eval mode. A GPT-Neo
            model keeps working by itself: the replaced attention acts only on Target's own masks.
        attention: "flash" (flash-attn's kernel for caches), "flex" (FlexAttention), "cached"
            (`specdiff_kernels.cached_attention`), "sdpa" or "eager", set by
            `model.set_attn_implementation`. None, if the model has sdpa: on a GPU the first of
            flash, flex and sdpa that is installed and knows the dtype, on a CPU "cached" if the
            model is accelerated; else the model's own. The model used by itself then computes as
            with sdpa. GPT-Neo has its own alone.
        compile: whether forwards go through `torch.compile`, made for any sizes. The model itself
            stays as it is.
        tokenizer: of the model. A `Decoder` uses it unless it is given another; the forwards do
            not.

    Raises:
        ValueError, TypeError: this is no causal model with an lm head in one place, or one that
            cannot decode ragged rows here, or not with this attention; the message says why.

    Example:
        >>> target = Target(AutoModelForCausalLM.from_pretrained(folder))
        >>> cache = target.new_cache(batch=1, capacity=64)
        >>> logits, hidden = target.forward(torch.tensor([[1, 2, 3]]), cache)
    """

    prefill_chunk = 512  # tokens of a prompt that one forward reads

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: str | None = None,
        compile: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        head = head_of(model)
        check_supported(model)
        self.attention = set_attention(model, attention)
        self.model = model.eval()
        self.tokenizer: Any = tokenizer
        self.vocab_size: int = head.weight.shape[0]
        self.hidden_size: int = model.config.hidden_size
        self.layer_count: int = model.config.num_hidden_layers
        self.context_limit: int = model.config.max_position_embeddings
        windowed = model.config.model_type in ("mistral", "qwen2")
        self.window: int | None = model.config.sliding_window if windowed else None
        self.boolean_mask = self.attention == "sdpa" or model.config.model_type == "gpt_neo"
        if model.config.model_type == "gpt_neo":
            take_over_gpt_neo(model)
        self.recorder = Recorder(model)
        body = model.base_model
        self.cache_argument = cache_argument(model)
        if compile:  # a hook that comes later is not seen
            self.recorder.watch(range(1, self.layer_count + 1))
        self.body = torch.compile(body, dynamic=True) if compile else body
        # attention that needs no mask is given one all the same, so that transformers makes none
        self.no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        accelerate: bool = True,
        attention: str | None = None,
        compile: bool = False,
    ) -> Target:
        """A target and its tokenizer, by name or from a local folder of safetensors.

        Args:
            name_or_path: a key of `specdiff.download.MODELS`, fetched if need be, or a Hugging Face
                folder.
            dtype: of the weights.
            device: None: a GPU if torch can use one, else the CPU.
            accelerate: on a CPU, swap the linear layers by `accelerate`.
            attention, compile: as of the constructor.

        Raises:
            ValueError: neither a known name nor a usable folder; or as the constructor.
            FetchError: see `specdiff.fetch`.

        Example:
            >>> target = Target.load("smollm2-135m")
            >>> prompt = target.tokenizer("Once upon a time").input_ids
            >>> Decoder(target).generate(prompt, max_new_tokens=8).texts
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = target_folder(name_or_path)
        tokenizer = load_tokenizer(folder)
        model: Any = load_causal(folder, dtype).to(torch.device(device))  # type: ignore[arg-type]
        if accelerate:
            fast_layers.accelerate(model)
        return cls(model, attention=attention, compile=compile, tokenizer=tokenizer)

    @property
    def head(self) -> Any:
        """The lm head."""
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return stop_tokens(self.model)

    @property
    def inconsistency(self) -> str | None:
        """Why the logits of a token may be off by a rounding from those that it gets alone, in
        another batch or after another draft; None: they are the same bits.

        They are the same on a CPU where every layer is accelerated: then greedy text, and coupled
        text, is that of plain decoding to the last token.

        Example:
            >>> Target(accelerate(model)).inconsistency
        """
        if self.device.type != "cpu":
            return f"the model is on {self.device}, not on a CPU"
        if self.body is not self.model.base_model:
            return "forwards are compiled"
        if computes_more(self.model):
            return f"the forward of {type(self.model).__name__} is its own, or has hooks"
        return fast_layers.left_to_torch(self.model, self.recorder.layers)

    def new_cache(
        self, batch: int, capacity: int, *, block_size: int | None = None, blocks: int | None = None
    ) -> RowCache:
        """An empty cache for `batch` rows of up to `capacity` tokens; paged if given a block size.

        See `RowCache` and `PagedRowCache`. A forward that brings padding beyond the capacity is
        exact for the tokens within it, but with flash-attn: there, count the padding in.
        """
        layers = self.model.config.num_hidden_layers
        if block_size is None and blocks is not None:
            raise ValueError(f"blocks={blocks} needs a block_size: without one the cache is dense")
        if block_size is None:
            return RowCache(layers, batch, capacity, self.device)
        block_size = whole_number("block_size", block_size, 1)
        blocks = None if blocks is None else whole_number("blocks", blocks, 1)
        cache = PagedRowCache(
            layers, batch, capacity, self.device, block_size=block_size, blocks=blocks
        )
        # flash-attn reads blocks of a multiple of 256 positions where they lie
        in_place = self.attention == "flash" and block_size % 256 == 0
        cache.window.gathers = not in_place and self.attention != "cached"
        return cache

    def forward(
        self,
        tokens: Tensor,
        cache: RowCache,
        *,
        layers: Sequence[int] = (),
        parents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits and states of new tokens, each row continuing at its own length.

        Keys and values are written at lengths[b] .. lengths[b] + Q - 1; `cache.lengths` is left as
        it is, since only the caller knows how many of the tokens will stand.

        Args:
            tokens: i64 [B, Q].
            cache: as made by `new_cache`.
            layers: whose residual streams are wanted, too; counted from 1, after the embedding.
            parents: i64 [B, Q], if the tokens are a tree: number of the token that each is behind,
                below its own; -1: it is behind the row's text so far. A token sees that text and
                its path, and no other new token. Keys and values of token q are written at
                lengths[b] + q. Not with flash-attn.

        Returns:
            logits [B, Q, V] and states [B, Q, (n + 1) d] in the model's dtype: the streams behind
            the n layers, in this order, and last the input of the lm head, side by side.

        Raises:
            ValueError: the model has no such layer, or the attention knows no trees.
        """
        if parents is not None and self.attention == "flash":
            raise ValueError(
                "flash-attn's kernel for caches knows no trees: load the target with "
                'attention="flex" or attention="sdpa"'
            )
        if computes_more(self.model):
            return self._whole(tokens, cache, None, layers, parents)
        states = self.hidden(tokens, cache, layers=layers, parents=parents)
        return self.head(states[..., -self.hidden_size :]), states

    def hidden(
        self,
        tokens: Tensor,
        cache: RowCache,
        start: int | None = None,
        *,
        layers: Sequence[int] = (),
        parents: Tensor | None = None,
    ) -> Tensor:
        """`forward` without the lm head: the states alone. `start`: see RowCache.prepare."""
        if computes_more(self.model):
            return self._whole(tokens, cache, start, layers, parents)[1]
        inputs = self._inputs(tokens, cache, start, parents)
        self.recorder.want(layers)
        last = self.body(**inputs).last_hidden_state
        streams = self.recorder.take()
        return torch.cat((*streams, last), -1) if streams else last

    def _whole(
        self,
        tokens: Tensor,
        cache: RowCache,
        start: int | None,
        layers: Sequence[int],
        parents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`forward` by the model's own, where that may be more than body and lm head."""
        inputs, thread = self._inputs(tokens, cache, start, parents), get_ident()
        last: list[Tensor] = []  # what the lm head is given

        def heard(module: Any, given: tuple[Any, ...]) -> None:
            if get_ident() == thread:  # others may decode with this model
                last.append(given[0])

        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            inputs["logits_to_keep"] = 0  # of all tokens
        hook = self.head.register_forward_pre_hook(heard)
        try:
            self.recorder.want(layers)
            out = self.model(**inputs)
            streams = self.recorder.take()
        finally:
            hook.remove()
        logits = out[0] if isinstance(out, tuple) else out.logits
        if len(last) != 1 or not logits.shape[:2] == last[0].shape[:2] == tokens.shape:
            raise ValueError(
                f"the forward of {type(self.model).__name__} must call its lm head once and return "
                f"logits of all {tokens.shape[1]} tokens, got {len(last)} calls and logits of "
                f"shape {list(logits.shape)}: drafters read the states, and verification all rows"
            )
        return logits, torch.cat((*streams, last[0]), -1)

    def _inputs(
        self, tokens: Tensor, cache: RowCache, start: int | None, parents: Tensor | None
    ) -> dict[str, Any]:
        """Arguments of the model, or of its body, for new tokens [B, Q]."""
        positions, _ = cache.prepare(tokens.shape[1], start, parents)
        if self.attention in attention.OVER_ROWS:
            visible: dict[str, Any] = {"attention_mask": self.no_mask, "window": cache.window}
        else:
            visible = {"attention_mask": self._masks(cache.window)}
        return {
            "input_ids": tokens,
            "position_ids": positions.clamp(max=self.context_limit - 1),  # padding may run past it
            "use_cache": True,
            self.cache_argument: cache,
            **visible,
        }

    def prefill(
        self,
        tokens: Tensor,
        counts: Tensor,
        cache: RowCache,
        *,
        layers: Sequence[int] = (),
        heard: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """Read prompts into an empty cache, in chunks of `prefill_chunk`, without computing logits.

        Args:
            tokens: i64 [B, N], right-padded.
            counts: i64 [B], how many of each row to read, at most N. They become `cache.lengths`.
            cache: an empty cache.
            layers: as of `forward`.
            heard: is called after each chunk of n tokens, with the number of its first token and
                the states BEFORE that and each later one, and behind the last:
                [B, n + 1, (layers + 1) d]. Nothing comes before token 0: zeros.
        """
        longest = int(counts.max())
        width = (len(layers) + 1) * self.hidden_size
        before = torch.zeros(len(tokens), 1, width, dtype=self.dtype, device=self.device)
        for start in range(0, longest, self.prefill_chunk):
            cache.set_lengths(torch.full_like(counts, start), start, room=counts)
            chunk = tokens[:, start : min(start + self.prefill_chunk, longest)]
            states = self.hidden(chunk, cache, start, layers=layers)
            if heard is not None:
                states = torch.cat((before, states), 1)
                heard(start, states)
                before = states[:, -1:]
        cache.set_lengths(counts, longest)

    def _masks(self, window: Window) -> Tensor | dict[str, Tensor]:
        """Key j is visible to a query at position t iff j <= t, and t - window < j if a layer has
        a window; in a tree, of the new keys those on its path. -> [B, 1, Q, span], of each kind of
        layer if there are several."""
        keys: Tensor = torch.arange(window.span, device=window.positions.device)
        queries = window.positions[:, None, :, None]
        seen = keys <= queries
        if window.parents is not None:
            number = keys - window.lengths[:, None]  # among the new tokens, [B, span]
            Q = window.positions.shape[1]
            new, there = ((number >= 0)[:, None, None], (number < Q)[:, None, None])
            number = number.clamp(0, Q - 1)
            path = seen_by(window.parents).gather(2, number[:, None].expand(-1, Q, -1))
            seen = torch.where(new, path[:, None] & there, seen)
            keys = torch.where(new, window.positions.gather(1, number)[:, None, None], keys)
        if self.window is None:
            return self._mask(seen)
        near = self._mask(seen & (keys > queries - self.window))
        if self.model.config.model_type == "mistral":
            return near
        return {"full_attention": self._mask(seen), "sliding_attention": near}

    def _mask(self, visible: Tensor) -> Tensor:
        """As the model's attention takes it."""
        if self.boolean_mask:
            return visible
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(visible, dtype=self.dtype).masked_fill(~visible, lowest)


def head_of(model: Any) -> Any:
    """The lm head of a model. Raises unless this is a whole Hugging Face model in one place."""
    if isinstance(model, (str, Path)):
        raise TypeError(
            f"model must be a Hugging Face model, got {model!r}: specdiff.Target.load takes a name "
            "or a folder"
        )
    if hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"model is a {type(model).__name__}, whose adapters are not supported: pass "
            "model.merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config"):
        raise ValueError(
            f"model is a {type(model).__name__} that puts a prompt or a prefix before the text, "
            "which is not supported"
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a Hugging Face model, got a {type(model).__name__}; of a wrapper, pass "
            "the model inside"
        )
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no lm head: load the model with AutoModelForCausalLM"
        )
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(
            f"the lm head is a {type(head).__name__} without a weight of its own: put the layer "
            "that it wraps in its place"
        )
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1 or "meta" in places:
        raise ValueError(
            f"the model's weights lie on {' and '.join(sorted(places))} (meta: offloaded): load "
            "all of them onto one device, without device_map"
        )
    return head


def computes_more(model: PreTrainedModel) -> bool:
    """Whether a model's forward may be more than its body and its lm head: that of somebody's own
    class or a replaced one, or one with hooks."""
    kind = type(model)
    return bool(
        "forward" in vars(model)
        or model._forward_hooks
        or model._forward_pre_hooks
        or has_global_hooks()
        or kind.__call__ is not nn.Module.__call__
        or not is_transformers(kind.forward)
    )


@cache
def is_transformers(function: Any) -> bool:
    """Whether a function, and each that it wraps, was written in transformers."""
    home = str(Path(transformers.__file__).parent)
    while function is not None:
        if not function.__code__.co_filename.startswith(home):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def check_supported(model: PreTrainedModel) -> None:
    """Raise ValueError, with the reason and the way out, if Target cannot decode with `model`."""
    config = model.config
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model type {kind!r} is an encoder-decoder; a target must be causal")
    if kind not in SUPPORTED:
        raise ValueError(
            f"model type {kind!r} is not supported: ragged rollback needs attention over an own "
            "key/value cache, without recurrent state, that takes a mask and positions for each "
            f"row, and is tested for {', '.join(SUPPORTED)}"
        )
    if getattr(config, "add_cross_attention", False):
        raise ValueError(f"this {kind} model has cross-attention; a target must be decoder-only")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in fast_layers.LENGTH_DEPENDENT:
        raise ValueError(
            f"rope type {rope!r} rescales positions by the longest row of the batch, so a row's "
            "text would depend on its batch mates"
        )


def cache_argument(model: PreTrainedModel) -> str:
    """Name of the model's argument for its cache. transformers renamed it in 5.24."""
    parameters = inspect.signature(model.base_model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def set_attention(model: PreTrainedModel, wanted: str | None) -> str:
    """Give the model the attention that was asked for, or the best one. -> its name"""
    if wanted not in (None, *attention.NAMES):
        raise ValueError(f"attention must be one of {', '.join(attention.NAMES)}, got {wanted!r}")
    if model.config.model_type == "gpt_neo":
        if wanted not in (None, "eager"):
            raise ValueError(
                f"gpt_neo has no attention interface, so attention {wanted!r} cannot be set: "
                "leave it out"
            )
        return "eager"
    accelerated = fast_layers.is_accelerated(model)
    name = attention.choose(model, accelerated) if wanted is None else wanted
    if name not in attention.NAMES:
        raise ValueError(
            f"attention implementation {name!r} takes no per-row mask: pass attention='sdpa', or "
            "load the model with attn_implementation='sdpa'"
        )
    if name == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError("attention 'flash' needs flash-attn: pip install flash-attn, or take flex")
    if attention.NAMES[name] != model.config._attn_implementation:
        model.set_attn_implementation(attention.NAMES[name])
    return name


def take_over_gpt_neo(model: Any) -> None:
    """Make GPT-Neo's attention obey a boolean mask [B, 1, Q, span] instead of its own triangle.

    The original slices its triangle by key length - query length, which is one offset for all
    rows. Masks of any other kind still go to the original, so plain use of the model is unchanged.
    """
    for block in model.base_model.h:
        attention = block.attn.attention
        if type(attention) is GPTNeoSelfAttention:
            attention.__class__ = RaggedGPTNeoAttention  # which can be pickled; the fields stay


class RaggedGPTNeoAttention(GPTNeoSelfAttention):
    """Queries and keys are not scaled: GPT-Neo has no 1/sqrt(D)."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is None or attention_mask.dtype != torch.bool:
            return super()._attn(query, key, value, attention_mask)
        visible = attention_mask  # [B, 1, Q, span], a prefix of each row, or a path of a tree
        if self.attention_type == "local":
            place = visible.cumsum(-1)  # of each key among those that the query sees, itself last
            visible = visible & (place > place[..., -1:] - self.config.window_size)
        scores = query.float() @ key.float().transpose(-1, -2)
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = self.attn_dropout(scores.softmax(-1).to(value.dtype))
        return weights @ value, weights


def stop_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """End-of-sequence ids from generation_config, else from config; () if there are none."""
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = model.config.eos_token_id
    if eos is None:
        return ()
    return token_ids("eos_token_id of the model", eos if isinstance(eos, (list, tuple)) else [eos])
