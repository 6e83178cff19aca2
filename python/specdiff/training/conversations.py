"""Conversations to distil from: read, checked, split; and the tokens that are frequent in them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = "part-*.npz"  # of a folder, as `specdiff sample-target` writes them


class Conversations(NamedTuple):
    """Token sequences: tokens[i, prompt_length[i]:length[i]] is the target's own answer."""

    tokens: Tensor  # i64 [N, S]
    prompt_length: Tensor  # i64 [N]
    length: Tensor  # i64 [N]


def load_conversations(path: str | Path) -> Conversations:
    """Read conversations in the format of data/README.md; nothing is unpickled.

    Args:
        path: an .npz file with the integer arrays tokens [N, S], prompt_length [N] and length [N],
            or a folder of files part-*.npz, which are joined in the order of their names. Parts
            may differ in S; behind its length a row holds 0.

    Returns:
        Conversations, all i64 and on the CPU.

    Raises:
        ValueError: no such file or no part in the folder, an array is missing or of another shape
            or kind, or a row breaks 0 < prompt_length < length <= S.

    Example:
        >>> data = load_conversations("data/smollm2_samples.npz")
        >>> answer = data.tokens[0, data.prompt_length[0] : data.length[0]]
    """
    path = Path(path)
    files = sorted(path.glob(PARTS)) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(
            f"expected {path} to be an .npz file or a folder of {PARTS} files, found neither: make "
            "one with `specdiff sample-target`"
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
    """One .npz, checked."""
    try:
        with np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in Conversations._fields if name in data}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is not an .npz file that can be read: {error}") from error
    if missing := [name for name in Conversations._fields if name not in arrays]:
        raise ValueError(f"{file} lacks {', '.join(missing)}; data/README.md has the format")
    for name, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} in {file} must hold integers, got {array.dtype}")
    shapes = [arrays[name].shape for name in Conversations._fields]
    if len(shapes[0]) != 2 or shapes[1:] != [shapes[0][:1]] * 2:
        raise ValueError(
            f"{file} must have tokens [N, S], prompt_length [N] and length [N], got the shapes "
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
    """The `count` most frequent tokens of the answers, ties to the lower id.

    Args:
        data: whose answers are counted.
        count: how many, at most vocab_size.
        vocab_size: of the target; every token lies below it.
        always: tokens that are among them however rare, such as the end of a turn.

    Returns:
        i64 [count], sorted.

    Raises:
        ValueError: count is out of range, or a token lies outside the vocabulary.

    Example:
        >>> frequent_ids(data, 8192, 49152, always=[2]).shape
        torch.Size([8192])
    """
    if not max(1, len(set(always))) <= count <= vocab_size:
        raise ValueError(
            f"count must be in [{max(1, len(set(always)))}, vocab_size = {vocab_size}], got {count}"
        )
    if int(data.tokens.max()) >= vocab_size:
        raise ValueError(
            f"data has token {int(data.tokens.max())}, outside the vocabulary [0, {vocab_size}): "
            "was it sampled from another target?"
        )
    columns = torch.arange(data.tokens.shape[1])
    answer = (columns >= data.prompt_length[:, None]) & (columns < data.length[:, None])
    counts = torch.bincount(data.tokens[answer], minlength=vocab_size)
    counts[always] = counts.max() + 1
    return counts.sort(descending=True, stable=True).indices[:count].sort().values


def split(data: Conversations, share: float) -> tuple[Tensor, Tensor]:
    """Conversations to train on, and those held out: no prompt is on both sides.

    Which prompts are held out follows from a hash of their tokens and the share alone: one that is
    held out from some data is held out from all. The default share of 1/32 is the prompts whose
    sha256, over their tokens as little-endian uint16 (int32 if there are larger ones), begins with
    a byte below 8.

    Args:
        data: with at least 2 different prompts.
        share: of all hashes, held out, in [0, 1); of the data's prompts at least one, never all.

    Returns:
        two disjoint i64 tensors of indices, in ascending order, which together are all.

    Raises:
        ValueError: too few prompts, or share is out of range.

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
            "conversations must have at least 2 different prompts, to train on one and hold out "
            f"one, got {len(known)}"
        )
    first, *_, last = sorted(known)
    out = [x for x in known if (x < share * 2**64 or x == first) and x != last]
    held_out = sorted(row for x in out for row in known[x])
    rows = torch.ones(len(data.length), dtype=torch.bool)
    rows[held_out] = False
    return rows.nonzero()[:, 0], torch.tensor(held_out)


def prompt_hash(tokens: Tensor) -> int:
    """The first 64 bits of the sha256 that `split` goes by. i64 [n] -> an int in [0, 2^64)"""
    dtype = "<u2" if int(tokens.max()) < 1 << 16 else "<i4"
    digest = hashlib.sha256(tokens.numpy().astype(dtype).tobytes()).digest()
    return int.from_bytes(digest[:8], "big")


def without(prompts: Collection[tuple[int, ...]], data: Conversations, rows: Tensor) -> Tensor:
    """The conversations that have none of some prompts.

    Args:
        prompts: token ids, as `specdiff.training.held_out.held_out_prompts` gives them.
        data: all conversations.
        rows: i64 [n], indices of those that are asked about.

    Returns:
        i64 [m], what stays of `rows`, in its order.

    Raises:
        ValueError: nothing stays.

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
            "conversations must have prompts that are not held out for benchmarks, to train on, "
            "got none: sample others with `specdiff sample-target`"
        )
    return torch.tensor(kept)
