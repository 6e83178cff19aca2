"""Verification of a draft in one launch, or in two where the device has no room for all rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arguments import verify_arguments
from ..types import Verified
from . import native
from .launch import launch


def verify(
    target_logits: Tensor, *args: Any, out: Verified, workspace: Tensor | None = None
) -> None:
    B, rows, V = target_logits.shape
    arguments = verify_arguments(target_logits, *args, out=out)
    launch(native.verify, arguments, target_logits.device, B * rows, V, workspace)
