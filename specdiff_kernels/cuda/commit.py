"""What stands of a round: lengths, blocks given back, a tree's path made contiguous."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arguments import commit_arguments
from ..types import Committed
from . import native
from .launch import stream_of


def commit(lengths: Tensor, *args: Any, out: Committed) -> None:
    arguments = commit_arguments(lengths, *args, out=out)
    native.commit(arguments, (*stream_of(lengths.device), 0))
