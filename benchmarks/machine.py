"""The file that keeps a benchmark's figures in this repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdiff.bench.machine import description, driver, gpu, processor, slug, write

__all__ = ["RESULTS", "description", "driver", "gpu", "processor", "save", "slug", "write"]

RESULTS = Path(__file__).parent / "results"


def save(name: str, content: dict[str, Any]) -> Path:
    """Keep figures as results/<machine>/<name>.json."""
    return write(RESULTS / slug() / f"{name}.json", content)
