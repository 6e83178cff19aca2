"""One reverse step of absorbing-state diffusion, row by row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arguments import denoise_step_arguments
from ..types import Pending
from . import native
from .launch import launch


def denoise_step(logits: Tensor, *args: Any, out: Pending, workspace: Tensor | None = None) -> None:
    arguments = denoise_step_arguments(logits, *args, out=out)
    rows = out.tokens.numel()
    launch(native.denoise_step, arguments, logits.device, rows, logits.shape[-1], workspace)
