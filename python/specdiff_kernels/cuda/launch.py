"""A call of a native op: on the current stream, with a workspace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import scratch
from . import native


def stream_of(device: torch.device) -> tuple[int, int]:
    """(device, its current stream); zeros where kernels are emulated on a CPU."""
    if device.type != "cuda":
        return 0, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def fault() -> str | None:
    """Why the kernels cannot run on the current GPU: an old driver, or no code for it."""
    try:
        return native.fault(torch.cuda.current_device() if torch.cuda.is_available() else 0) or None
    except RuntimeError as error:  # not even a device
        return str(error)


def launch(
    op: Callable[[list[int], tuple[int, int, int]], None],
    arguments: list[int],
    logits: Tensor,
    rows: int,
    workspace: Tensor | None,
) -> None:
    """Run `op` with the workspace that was passed in, or a new one for `rows` logits."""
    device, V = logits.device, logits.shape[-1]
    workspace = scratch(workspace, native.workspace_size(rows, V), rows, V, device)
    op(arguments, (*stream_of(device), workspace.data_ptr()))
