"""Recorder: the residual stream behind chosen layers of a model, kept while a forward runs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


class Recorder:
    """Keeps the residual stream behind chosen layers of the next forward.

    Layers are counted from 1, after the embedding: that of layer i is what Hugging Face calls
    `hidden_states[i]`, before the final norm. The model runs unmodified, with a hook on each layer
    that was ever asked for; the hooks go when the recorder does. Forwards of other threads are left
    alone.

    Args:
        model: a causal language model whose layers stand in one list.

    Example:
        >>> recorder = Recorder(model)
        >>> recorder.want([2, 4])
        >>> model(torch.tensor([[1, 2, 3]]))
        >>> of_2, of_4 = recorder.take()
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = layers_of(model)
        self._kept: dict[int, Tensor] = {}  # shared with the hooks; its keys are what is wanted
        self._thread = [0]  # whose forward is kept
        self._hooks: dict[int, RemovableHandle] = {}
        weakref.finalize(self, remove, self._hooks)

    def want(self, layers: Iterable[int]) -> None:
        """Have the next forward keep these, in this order. Raises ValueError as `watch` does."""
        wanted = tuple(layers)
        self.watch(wanted)
        self._kept.clear()
        self._kept.update(dict.fromkeys(wanted, Tensor()))
        self._thread[0] = threading.get_ident()

    def take(self) -> list[Tensor]:
        """The streams [B, Q, d] that were wanted; the next forward keeps none."""
        taken = list(self._kept.values())
        self._kept.clear()
        return taken

    def watch(self, layers: Iterable[int]) -> None:
        """Put hooks on layers; `torch.compile` sees only those that stand there before it runs.

        Raises:
            ValueError: the model has no such layer.
        """
        for layer in layers:
            if not 1 <= layer <= len(self.layers):
                raise ValueError(
                    f"layers: expected numbers from 1 to {len(self.layers)}, which the target has, "
                    f"got {layer}"
                )
            if layer not in self._hooks:
                hook = partial(keep, self._kept, self._thread, layer)
                self._hooks[layer] = self.layers[layer - 1].register_forward_hook(hook)


def keep(
    kept: dict[int, Tensor], thread: list[int], layer: int, module: Any, args: Any, output: Any
) -> None:
    """The hook of a layer, whose output is its stream, or a tuple that begins with it."""
    if layer in kept and (torch.compiler.is_compiling() or thread[0] == threading.get_ident()):
        kept[layer] = output if isinstance(output, Tensor) else output[0]


def remove(hooks: dict[int, RemovableHandle]) -> None:
    for hook in hooks.values():
        hook.remove()


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a model's layers. Raises ValueError if there is none."""
    count = model.config.num_hidden_layers
    for child in model.base_model.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ValueError(
        f"{type(model).__name__} keeps its {count} layers in no list of their own: no states of "
        "layers can be read from it"
    )
