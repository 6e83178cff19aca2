"""The target as a teacher: its embeddings, and its last hidden state at every position."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from ..files import write_atomically
from .conversations import Conversations

BATCH = 16  # conversations in a forward that fills the cache


class Teacher:
    """What a drafter learns from.

    Args:
        model: the target, a Hugging Face causal language model.
        conversations: what it wrote.
        draft_ids: i64 [D], tokens that the drafter can draft.
        states: f16 [N, S, d], the lm head's input at every position, as `cached_states` reads it;
            None: it is computed whenever it is asked for.
    """

    def __init__(
        self,
        model: Any,
        conversations: Conversations,
        draft_ids: Tensor,
        states: np.ndarray | None = None,
    ) -> None:
        self.base = model.base_model
        self.device = model.device
        self.conversations, self.cached = conversations, states
        self.embedding = model.get_input_embeddings().weight.detach()  # [V, d]
        self.output = model.get_output_embeddings().weight.detach()  # [V, d]
        self.draft_output = self.output[draft_ids.to(self.device)].contiguous()  # [D, d]

    def states(self, rows: Tensor, longest: int) -> Tensor:
        """The lm head's input at the first `longest` positions. i64 [B] -> f32 [B, longest, d]"""
        if self.cached is not None:
            return torch.from_numpy(self.cached[rows.numpy(), :longest]).to(self.device).float()
        tokens = self.conversations.tokens[rows, :longest].to(self.device)
        return last_states(self.base, tokens).float()


@torch.no_grad()
def last_states(base: Any, tokens: Tensor) -> Tensor:
    """i64 [B, S] -> [B, S, d]; padding stands behind the tokens, where nothing sees it"""
    with torch.autocast(tokens.device.type, enabled=False):
        return base(tokens, use_cache=False).last_hidden_state


def cached_states(
    model: Any, conversations: Conversations, path: Path, progress: Progress
) -> np.ndarray:
    """The lm head's input at every position, f16 [N, S, d], from `path` or computed into it.

    An interrupted computation continues where it stopped: rows go in order of length, and
    PATH.progress counts the batches that PATH.partial holds.

    Raises:
        ValueError: `path` holds states of another shape.
    """
    shape = (*conversations.tokens.shape, model.config.hidden_size)
    if not path.exists():
        compute_states(model, conversations, path, shape, progress)
    states = np.load(path, mmap_mode="r", allow_pickle=False)
    if states.shape != shape:
        raise ValueError(f"states in {path} must be {shape}, got {states.shape}: delete it")
    return states


def compute_states(
    model: Any,
    conversations: Conversations,
    path: Path,
    shape: tuple[int, ...],
    progress: Progress,
) -> None:
    partial, marker = (
        path.with_name(f"{path.name}.partial"),
        path.with_name(f"{path.name}.progress"),
    )
    done = int(marker.read_text()) if marker.exists() and partial.exists() else 0
    mode: Any = "r+" if done else "w+"
    store = np.lib.format.open_memmap(partial, mode=mode, dtype=np.float16, shape=shape)
    batches = conversations.length.argsort(stable=True).split(BATCH)
    task = progress.add_task("the target's states", total=len(batches), completed=done)
    for number, rows in enumerate(batches[done:], done + 1):
        S = int(conversations.length[rows].max())
        states = last_states(model.base_model, conversations.tokens[rows, :S].to(model.device))
        store[rows.numpy(), :S] = states.half().cpu().numpy()
        store.flush()
        write_atomically(marker, str(number).encode())
        progress.update(task, completed=number)
    os.replace(partial, path)
    marker.unlink()
