"""`python -m specdiff_kernels`: which backends run here, and why not."""

from __future__ import annotations

import platform

import torch

from . import __version__
from .backends import NAMES, ORDER, available_backends


def report() -> str:
    """Versions, then a line for each device and backend."""
    lines = [
        f"specdiff-kernels {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    ]
    devices = [device for device in ORDER if device == "cpu" or torch.cuda.is_available()]
    for device in devices:
        for name, reason in available_backends(device).items():
            lines.append(f"{device:>5}  {name:<{max(map(len, NAMES))}}  {reason or 'available'}")
    if available_backends()["cpp"] is None:
        from . import _C

        lines.append(f"cpp uses {_C.isa()} of {', '.join(_C.supported_isas())}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
