"""Verification of a draft in one launch, or in two where the device has no room for all rows."""

from __future__ import annotations

from torch import Tensor

from ..arguments import pack
from ..inputs import VerifyInputs
from ..types import Verified
from . import native
from .launch import launch


def verify(inputs: VerifyInputs, *, out: Verified, workspace: Tensor | None = None) -> None:
    launch(native.verify, pack(inputs, out), inputs.target_logits, out.emitted.numel(), workspace)
