"""Conversations to distil from: load, check and split them, and count their tokens."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = "part-*.npz"  # files written by `specdiff sample-target`


class Conversations(NamedTuple):
    """Token sequences. tokens[i, prompt_length[i]:length[i]] is the target's answer."""

    tokens: Tensor  # i64 [N, S]
    prompt_length: Tensor  # i64 [N]
    length: Tensor  # i64 [N]


def load_conversations(path: str | Path) -> Conversations:
    """Load conversations in the format of data/README.md. Nothing is unpickled.

    Args:
        path: an .npz file with the integer arrays tokens [N, S], prompt_length [N] and length [N],
            or a folder of files part-*.npz, which are joined in the order of their names. Parts
            may differ in S. Rows are padded with 0.

    Returns:
        the conversations, i64 on the CPU.

    Raises:
        ValueError: the file is missing, the folder has no part, an array is missing or has another
            shape or dtype, or a row violates 0 < prompt_length < length <= S.

    Example:
        >>> data = load_conversations("data/smollm2_samples.npz")
        >>> answer = data.tokens[0, data.prompt_length[0] : data.length[0]]
    """
    path = Path(path)
    files = sorted(path.glob(PARTS)) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(
            f"{path} is neither an .npz file nor a folder of {PARTS} files: make one with "
            "`specdiff sample-target`"
        )
    parts = [read_part(file) for file in files]
    longest = max(part.tokens.shape[1] for part in parts)
    tokens = [F.pad(part.tokens, (0, longest - part.tokens.shape[1])) for part in parts]
    return Conversations(
        torch.cat(tokens),
        torch.cat([part.prompt_length for part in parts]),
        torch.cat([part.length for part in parts]),
    )


def read_part(file: Path) -> Conversations:
    """Load and check one .npz file."""
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no zip archive, or its end is missing")
        with np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in Conversations._fields if name in data}
    except Exception as error:  # numpy raises many kinds
        raise ValueError(
            f"{file} is not a readable .npz file: {error}; remove it, and make it again with "
            "`specdiff sample-target`"
        ) from error
    if missing := [name for name in Conversations._fields if name not in arrays]:
        raise ValueError(f"{file} lacks {', '.join(missing)}; see data/README.md for the format")
    for name, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} in {file} must hold integers, got {array.dtype}")
    shapes = [arrays[name].shape for name in Conversations._fields]
    if len(shapes[0]) != 2 or shapes[1:] != [shapes[0][:1]] * 2:
        raise ValueError(
            f"{file} must have tokens [N, S], prompt_length [N] and length [N], got shapes "
            f"{', '.join(map(str, shapes))}"
        )
    part = Conversations(
        *(torch.from_numpy(arrays[name].astype(np.int64)) for name in Conversations._fields)
    )
    good = (part.prompt_length > 0) & (part.prompt_length < part.length)
    good &= part.length <= part.tokens.shape[1]
    if not good.all():
        i = int(good.logical_not().nonzero()[0])
        raise ValueError(
            f"conversation {i} in {file} must have 0 < prompt_length < length <= S, got "
            f"{part.prompt_length[i]}, {part.length[i]} and {part.tokens.shape[1]}"
        )
    return part


def frequent_ids(data: Conversations, count: int, vocab_size: int, always: list[int]) -> Tensor:
    """The `count` most frequent tokens of the answers. Ties go to the lower id.

    Args:
        data: conversations; only their answers are counted.
        count: number of tokens to return, at most vocab_size.
        vocab_size: the target's; all ids must be below it.
        always: tokens to include however rare, such as the end of a turn.

    Returns:
        i64 [count], sorted.

    Raises:
        ValueError: count is out of range, or a token is outside the vocabulary.

    Example:
        >>> frequent_ids(data, 8192, 49152, always=[2]).shape
        torch.Size([8192])
    """
    if not max(1, len(set(always))) <= count <= vocab_size:
        raise ValueError(
            f"count must be in [{max(1, len(set(always)))}, vocab_size = {vocab_size}], got {count}"
        )
    check_tokens(data, vocab_size)
    columns = torch.arange(data.tokens.shape[1])
    answer = (columns >= data.prompt_length[:, None]) & (columns < data.length[:, None])
    counts = torch.bincount(data.tokens[answer], minlength=vocab_size)
    counts[always] = counts.max() + 1
    return counts.sort(descending=True, stable=True).indices[:count].sort().values


def check_tokens(data: Conversations, vocab_size: int) -> None:
    """Raise ValueError if a token is outside the target's vocabulary."""
    if int(data.tokens.max()) >= vocab_size:
        raise ValueError(
            f"data has token {int(data.tokens.max())}, outside the vocabulary [0, {vocab_size}): "
            "was it sampled from another target?"
        )


def split(data: Conversations, share: float) -> tuple[Tensor, Tensor]:
    """Split conversations into training and held-out ones, so that no prompt is in both.

    A hash of a prompt's tokens and the share alone decide: a prompt held out from one data set is
    held out from all. At the default share of 1/32, a prompt is held out if the first byte of its
    sha256 is below 8. The hash is over the tokens as little-endian uint16 (int32 if an id is
    larger).

    Args:
        data: conversations with at least 2 different prompts.
        share: share of hashes to hold out, in [0, 1). At least one prompt is held out, never all.

    Returns:
        the indices of both sides: two disjoint i64 tensors, ascending, which together are all.

    Raises:
        ValueError: there are too few prompts, or share is out of range.

    Example:
        >>> rows, held_out = split(load_conversations("answers"), 1 / 32)
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}")
    known: dict[int, list[int]] = {}
    for row, (tokens, length) in enumerate(zip(data.tokens, data.prompt_length, strict=True)):
        known.setdefault(prompt_hash(tokens[:length]), []).append(row)
    if len(known) < 2:
        raise ValueError(
            "conversations must have at least 2 different prompts, one to train on and one to hold "
            f"out, got {len(known)}: sample more with `specdiff sample-target`"
        )
    first, *_, last = sorted(known)
    out = [x for x in known if (x < share * 2**64 or x == first) and x != last]
    held_out = sorted(row for x in out for row in known[x])
    rows = torch.ones(len(data.length), dtype=torch.bool)
    rows[held_out] = False
    return rows.nonzero()[:, 0], torch.tensor(held_out)


def prompt_hash(tokens: Tensor) -> int:
    """The first 64 bits of the sha256 that `split` uses. i64 [n] -> an int in [0, 2^64)"""
    dtype = "<u2" if int(tokens.max()) < 1 << 16 else "<i4"
    digest = hashlib.sha256(tokens.numpy().astype(dtype).tobytes()).digest()
    return int.from_bytes(digest[:8], "big")


def without(prompts: Collection[tuple[int, ...]], data: Conversations, rows: Tensor) -> Tensor:
    """Remove the conversations with given prompts.

    Args:
        prompts: token ids, as from `specdiff.training.held_out.held_out_prompts`.
        data: all conversations.
        rows: i64 [n], indices to filter.

    Returns:
        i64 [m], the remaining indices in their order.

    Raises:
        ValueError: no index remains.

    Example:
        >>> rows = without(held_out_prompts(tokenizer), data, rows)
    """
    kept = [
        row
        for row in rows.tolist()
        if tuple(data.tokens[row, : data.prompt_length[row]].tolist()) not in prompts
    ]
    if not kept:
        raise ValueError(
            "all prompts of the conversations are held out for benchmarks: sample others with "
            "`specdiff sample-target`"
        )
    return torch.tensor(kept)
