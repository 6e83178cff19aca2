"""One reverse step of absorbing-state diffusion, row by row."""

from __future__ import annotations

from torch import Tensor

from ..arguments import pack
from ..inputs import DenoiseStepInputs
from ..types import Pending
from . import native
from .launch import launch


def denoise_step(
    inputs: DenoiseStepInputs, *, out: Pending, workspace: Tensor | None = None
) -> None:
    launch(native.denoise_step, pack(inputs, out), inputs.logits, out.tokens.numel(), workspace)
