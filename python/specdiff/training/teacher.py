"""The target as a teacher: its embeddings, and its states at every position of its texts.

A state is what a drafter reads: the residual streams behind some of the target's layers, and last
the lm head's input, side by side.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from ..files import write_atomically
from ..loop.recorder import Recorder
from .conversations import Conversations

BATCH = 4  # conversations in a forward; more of them fall out of a CPU's caches
LARGEST = 60000.0  # that is stored; f16 ends at 65504
SAVE_EVERY = 10.0  # seconds of computation that are lost at most


class Teacher:
    """What a drafter learns from.

    Args:
        model: the target, a Hugging Face causal language model.
        conversations: what it wrote.
        draft_ids: i64 [D], tokens that the drafter can draft.
        states: f16 [sum(length - 1), (n + 1) d], as `cached_states` reads them; None: they are
            computed whenever they are asked for.
        layers: n layers whose residual streams are read, too; counted from 1, in ascending order.
        dtype: of that computation, see `Body`.

    Raises:
        ValueError: the model has no such layer.
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
        self.count = conversations.length - 1  # states of each; the last token's predicts nothing
        self.start = self.count.cumsum(0) - self.count  # where they begin
        self.body = Body(model, layers, dtype) if states is None else None
        self.embedding = model.get_input_embeddings().weight.detach()  # [V, d]
        self.output = model.get_output_embeddings().weight.detach()  # [V, d]
        self.draft_output = self.output[draft_ids.to(self.device)].contiguous()  # [D, d]

    def drafting(self, draft_ids: Tensor) -> Teacher:
        """The same teacher for a drafter of other tokens."""
        teacher = copy.copy(self)
        teacher.draft_output = self.output[draft_ids.to(self.device)].contiguous()
        return teacher

    def states(self, rows: Tensor, longest: int) -> Tensor:
        """States of conversations at their first `longest` positions.

        i64 [B] -> f32 [B, longest, (n + 1) d], zeros from each one's last token on
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
    """A target up to its lm head, for the states alone: without logits, cache and gradients.

    Args:
        model: the target.
        layers: whose residual streams are wanted beside the lm head's input, see `Recorder`.
        dtype: of the weights and of what is computed; None: the model's own. Another one is that
            of a copy, which leaves the model as it is.

    Raises:
        ValueError: the model has no such layer.

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
        """i64 [B, S] -> [B, S, (n + 1) d]; padding stands behind the tokens, where nothing sees
        it, so that attention needs no mask but its own triangle"""
        if self.recorder is not None:
            self.recorder.want(self.layers)
        with torch.autocast(tokens.device.type, enabled=False):
            last = self.base(tokens, use_cache=False).last_hidden_state
        return last if self.recorder is None else torch.cat((*self.recorder.take(), last), -1)


def in_dtype(module: nn.Module, dtype: torch.dtype) -> Any:
    """A copy with parameters of another dtype. Buffers, such as rotary frequencies, stay exact."""
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
    """The states of all conversations, from a file, or computed into it.

    Conversation i has length[i] - 1 states, as the last token's predicts nothing. They stand one
    behind the other, conversation by conversation.

    An interrupted computation goes on where it stopped: PATH.partial has the states so far, and
    PATH.progress says of how many conversations.

    Args:
        model: the target.
        conversations: what it wrote.
        path: of the file, .npy.
        progress: where the bar is drawn, and above it what the file takes.
        layers, dtype: see `Body`.

    Returns:
        f16 [sum(length - 1), (n + 1) d], mapped into memory; numbers beyond 60000 are cut off.

    Raises:
        ValueError: `path` holds other states, or its disk has too little room.

    Example:
        >>> states = cached_states(model, conversations, Path("out/states.npy"), Progress())
    """
    width = (len(layers) + 1) * model.config.hidden_size
    shape = (int((conversations.length - 1).sum()), width)
    if not path.exists():
        compute_states(Body(model, layers, dtype), conversations, path, shape, progress)
    states = np.load(path, mmap_mode="r", allow_pickle=False)
    if (states.shape, states.dtype) != (shape, np.float16):
        raise ValueError(
            f"states in {path} must be float16 of shape {shape}, got {states.dtype} of shape "
            f"{states.shape}: delete it, and they are computed again"
        )
    return states


def compute_states(
    body: Body,
    conversations: Conversations,
    path: Path,
    shape: tuple[int, int],
    progress: Progress,
) -> None:
    """Write the file of `cached_states`, the longest conversations first."""
    partial = path.with_name(f"{path.name}.partial")
    marker = path.with_name(f"{path.name}.progress")
    count = conversations.length - 1
    start = count.cumsum(0) - count
    order = count.argsort(descending=True, stable=True)
    done = int(marker.read_text()) if marker.exists() and is_store(partial, shape) else 0
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
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    else:
        check_room(path.parent, size - 512 * partial.stat().st_blocks)
    begin = partial.stat().st_size - size  # behind the header
    tokens = int(count[order[:done]].sum())
    task = progress.add_task("the target's states, tokens", total=shape[0], completed=tokens)
    with partial.open("r+b") as file:
        saved = time.monotonic()
        for rows in order[done:].split(BATCH):
            states = body(conversations.tokens[rows, : int(count[rows].max())].to(body.base.device))
            states = states.float().clamp(-LARGEST, LARGEST).half().cpu()
            for row, of_row in zip(rows.tolist(), states, strict=True):
                file.seek(begin + 2 * shape[1] * int(start[row]))
                file.write(of_row[: int(count[row])].numpy().tobytes())
            done, tokens = done + len(rows), tokens + int(count[rows].sum())
            if time.monotonic() - saved >= SAVE_EVERY:
                sync(file)
                write_atomically(marker, str(done).encode())
                saved = time.monotonic()
            progress.update(task, completed=tokens)
        sync(file)
    os.replace(partial, path)
    marker.unlink(missing_ok=True)


def is_store(path: Path, shape: tuple[int, int]) -> bool:
    """Whether a file is there that states of this shape can be written into."""
    if not path.exists():
        return False
    store = np.load(path, mmap_mode="r", allow_pickle=False)
    return (store.shape, store.dtype) == (shape, np.float16)


def check_room(folder: Path, needed: int) -> None:
    """Raise ValueError if a folder's disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"the target's states need {needed:,} bytes in {folder}, where {free:,} are free: "
            "take another --out, fewer conversations, or data.cache_states = false, which computes "
            "them again in every step"
        )


def sync(file: Any) -> None:
    """Have a file's bytes on the disk."""
    file.flush()
    os.fsync(file.fileno())
