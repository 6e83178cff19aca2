"""Saves a benchmark's figures in this repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from specdiff.bench.machine import slug, write

RESULTS = Path(__file__).parent / "results"


def save(
    name: str,
    content: dict[str, Any],
    device: torch.device | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Save figures as <folder>/<machine>/<name>.json, where a GPU counts as the machine."""
    return write(folder / slug(device) / f"{name}.json", content)
