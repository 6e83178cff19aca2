"""`commit`: new lengths, blocks given back, a tree's path made contiguous."""

from __future__ import annotations

import torch

import specdiff_kernels._C as _C

from ..arguments import pack_commit
from ..inputs import CommitInputs
from ..types import Committed


def commit(inputs: CommitInputs, *, out: Committed) -> None:
    _C.commit(pack_commit(inputs, out), torch.get_num_threads())
