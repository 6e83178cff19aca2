"""What stands of a round: lengths, blocks given back, a tree's path made contiguous."""

from __future__ import annotations

from typing import Any

import torch

import specdiff_kernels._C as _C

from ..arguments import commit_arguments
from ..types import Committed


def commit(*args: Any, out: Committed) -> None:
    _C.commit(commit_arguments(*args, out=out), torch.get_num_threads())
