"""`commit`: new lengths, blocks given back, a tree's path made contiguous."""

from __future__ import annotations

from ..arguments import pack_commit
from ..inputs import CommitInputs
from ..types import Committed
from . import native
from .launch import stream_of


def commit(inputs: CommitInputs, *, out: Committed) -> None:
    native.commit(pack_commit(inputs, out), (*stream_of(inputs.lengths.device), 0))
