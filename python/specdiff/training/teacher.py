"""The target as a teacher: its embeddings, and its states at every position of its texts.

A state is the drafter's input from the target: the residual streams after some of its layers,
followed by the lm head's input, concatenated.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from ..files import naming, read_text, write_atomically
from ..loop.recorder import Recorder
from .conversations import Conversations

BATCH = 4  # conversations per forward; more exceed a CPU's caches
LARGEST = 60000.0  # largest number stored; f16 ends at 65504
SAVE_EVERY = 10.0  # seconds of computation that an interruption can lose


class Teacher:
    """The target's embeddings, states and conversations, for distillation.

    Args:
        model: the target, a Hugging Face causal language model.
        conversations: conversations written by the target.
        draft_ids: i64 [D], tokens that the drafter can draft.
        states: f16 [sum(length - 1), (n + 1) d] from `cached_states`; None: computed on demand.
        layers: n layers whose residual streams are part of a state, counted from 1, ascending.
        dtype: dtype of that computation, see `Body`.

    Raises:
        ValueError: the model does not have these layers.
    """

    def __init__(
        self,
        model: Any,
        conversations: Conversations,
        draft_ids: Tensor,
        states: np.ndarray | None = None,
        *,
        layers: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device = model.device
        self.conversations, self.cached = conversations, states
        self.count = conversations.length - 1  # states of each; the last token needs none
        self.start = self.count.cumsum(0) - self.count  # index of the first state
        self.body = Body(model, layers, dtype) if states is None else None
        self.embedding = model.get_input_embeddings().weight.detach()  # [V, d]
        self.output = model.get_output_embeddings().weight.detach()  # [V, d]
        self.draft_output = self.output[draft_ids.to(self.device)].contiguous()  # [D, d]

    def drafting(self, draft_ids: Tensor) -> Teacher:
        """The same teacher for another draft vocabulary."""
        teacher = copy.copy(self)
        teacher.draft_output = self.output[draft_ids.to(self.device)].contiguous()
        return teacher

    def states(self, rows: Tensor, longest: int) -> Tensor:
        """States of the conversations `rows`, i64 [B], at their first `longest` positions.

        -> f32 [B, longest, (n + 1) d], zero from each conversation's last token on
        """
        count = self.count[rows].clamp(max=longest)
        if self.body is not None:
            states = self.body(self.conversations.tokens[rows, :longest].to(self.device)).float()
            outside = torch.arange(longest) >= count[:, None]
            return states.masked_fill_(outside[..., None].to(self.device), 0.0)
        assert self.cached is not None
        found = np.zeros((len(rows), longest, self.cached.shape[1]), np.float16)
        for into, start, n in zip(found, self.start[rows].tolist(), count.tolist(), strict=True):
            into[:n] = self.cached[start : start + n]
        return torch.from_numpy(found).to(self.device).float()


class Body:
    """A target without its lm head. It computes states without logits, cache or gradients.

    Args:
        model: the target.
        layers: layers whose residual streams are returned before the lm head's input, see
            `Recorder`.
        dtype: dtype of weights and computation; None: the model's. For another dtype the weights
            are copied, and the model is left unchanged.

    Raises:
        ValueError: the model does not have these layers.

    Example:
        >>> body = Body(model, [2, 4], torch.bfloat16)
        >>> body(torch.tensor([[1, 2, 3]])).shape  # [1, 3, 3 d]
    """

    def __init__(
        self, model: Any, layers: Sequence[int] = (), dtype: torch.dtype | None = None
    ) -> None:
        base = model.base_model
        self.base = base if dtype is None or dtype == base.dtype else in_dtype(base, dtype)
        self.layers = tuple(layers)
        self.recorder = Recorder(self.base) if self.layers else None
        if self.recorder is not None:
            self.recorder.watch(self.layers)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """States of tokens i64 [B, S]. -> [B, S, (n + 1) d]

        Padding must be on the right. Then no token attends to it, and the causal mask is enough.
        """
        if self.recorder is not None:
            self.recorder.want(self.layers)
        with torch.autocast(tokens.device.type, enabled=False):
            last = self.base(tokens, use_cache=False).last_hidden_state
        return last if self.recorder is None else torch.cat((*self.recorder.take(), last), -1)


def in_dtype(module: nn.Module, dtype: torch.dtype) -> Any:
    """A copy with parameters of another dtype. Buffers such as rotary frequencies are unchanged."""
    made = {id(p): nn.Parameter(p.detach().to(dtype), False) for p in module.parameters()}
    return copy.deepcopy(module, made)


def cached_states(
    model: Any,
    conversations: Conversations,
    path: Path,
    progress: Progress,
    *,
    layers: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> np.ndarray:
    """The states of all conversations, read from a file or computed into it.

    Conversation i has length[i] - 1 states, because the last token needs none. The file holds them
    conversation by conversation.

    An interrupted computation is resumed: PATH.partial has the states so far, and PATH.progress the
    number of conversations.

    Args:
        model: the target.
        conversations: conversations written by the target.
        path: the .npy file.
        progress: shows a bar and, above it, the size of the file.
        layers, dtype: see `Body`.

    Returns:
        f16 [sum(length - 1), (n + 1) d], memory-mapped. Numbers are clamped to +-60000.

    Raises:
        ValueError: `path` holds other states, or its disk has too little space.

    Example:
        >>> states = cached_states(model, conversations, Path("out/states.npy"), Progress())
    """
    width = (len(layers) + 1) * model.config.hidden_size
    shape = (int((conversations.length - 1).sum()), width)
    if not path.exists():
        compute_states(Body(model, layers, dtype), conversations, path, shape, progress)
    try:
        states = np.load(path, mmap_mode="r", allow_pickle=False)
        got = f"{states.dtype} of shape {states.shape}"
    except Exception as error:  # numpy raises many kinds
        states, got = None, f"a damaged file ({error})"
    if states is None or (states.shape, states.dtype) != (shape, np.float16):
        raise ValueError(
            f"states in {path} must be float16 of shape {shape}, got {got}: delete the file to "
            "compute them again"
        )
    return states


def compute_states(
    body: Body,
    conversations: Conversations,
    path: Path,
    shape: tuple[int, int],
    progress: Progress,
) -> None:
    """Compute the file of `cached_states`, longest conversations first."""
    partial = path.with_name(f"{path.name}.partial")
    marker = path.with_name(f"{path.name}.progress")
    count = conversations.length - 1
    start = count.cumsum(0) - count
    order = count.argsort(descending=True, stable=True)
    done = 0
    if marker.exists() and is_store(partial, shape):
        with suppress(ValueError):  # damaged: from the start
            done = int(read_text(marker))
    size = 2 * shape[0] * shape[1]
    progress.console.print(
        f"the target's states of {shape[0]:,} tokens take {size / 1e9:.1f} GB in {path}",
        markup=False,
        soft_wrap=True,
    )
    if done == 0:
        marker.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
        check_room(path.parent, size)
        with naming(partial):
            np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    else:
        check_room(path.parent, size - 512 * partial.stat().st_blocks)
    begin = partial.stat().st_size - size  # after the header
    tokens = int(count[order[:done]].sum())
    task = progress.add_task("the target's states, tokens", total=shape[0], completed=tokens)
    with naming(partial), partial.open("r+b") as file:
        saved = time.monotonic()
        try:
            for rows in order[done:].split(BATCH):
                longest = int(count[rows].max())
                states = body(conversations.tokens[rows, :longest].to(body.base.device))
                states = states.float().clamp(-LARGEST, LARGEST).half().cpu()
                for row, of_row in zip(rows.tolist(), states, strict=True):
                    file.seek(begin + 2 * shape[1] * int(start[row]))
                    file.write(of_row[: int(count[row])].numpy().tobytes())
                done, tokens = done + len(rows), tokens + int(count[rows].sum())
                if time.monotonic() - saved >= SAVE_EVERY:
                    keep(file, marker, done)
                    saved = time.monotonic()
                progress.update(task, completed=tokens)
        except KeyboardInterrupt:
            keep(file, marker, done)
            raise
        sync(file)
    os.replace(partial, path)
    marker.unlink(missing_ok=True)


def is_store(path: Path, shape: tuple[int, int]) -> bool:
    """Whether the file exists and can hold states of this shape."""
    if not path.exists():
        return False
    try:
        store = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # damaged: numpy raises many kinds
        return False
    return (store.shape, store.dtype) == (shape, np.float16)


def check_room(folder: Path, needed: int) -> None:
    """Raise ValueError if a folder's disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"the target's states need {needed:,} bytes in {folder}, where {free:,} are free: use "
            "another --out, fewer conversations, or data.cache_states = false, which computes the "
            "states in every step"
        )


def keep(file: Any, marker: Path, done: int) -> None:
    """Flush the states so far to disk, and note the number of their conversations."""
    sync(file)
    write_atomically(marker, str(done).encode())


def sync(file: Any) -> None:
    """Flush a file to disk."""
    file.flush()
    os.fsync(file.fileno())
