"""Speculative decoding that samples exactly from the target: models, drafters, cache and loop.

The ops it is built on are in `specdiff_kernels`, which knows nothing of models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adaptive import AdaptiveK
    from .cache import PagedRowCache, RowCache
    from .decoder import Decoder, Generation, generate
    from .models import FetchError, fetch, load_target
    from .planner import Costs, Planner, measure
    from .sampling import Sampling
    from .session import Session
    from .stats import Stats, Step
    from .target import Target

_HOMES = {
    "AdaptiveK": "adaptive",
    "PagedRowCache": "cache",
    "RowCache": "cache",
    "Decoder": "decoder",
    "Generation": "decoder",
    "generate": "decoder",
    "FetchError": "models",
    "fetch": "models",
    "load_target": "models",
    "Costs": "planner",
    "Planner": "planner",
    "measure": "planner",
    "Sampling": "sampling",
    "Session": "session",
    "Stats": "stats",
    "Step": "stats",
    "Target": "target",
}

__all__ = [
    "AdaptiveK",
    "Costs",
    "Decoder",
    "FetchError",
    "Generation",
    "PagedRowCache",
    "Planner",
    "RowCache",
    "Sampling",
    "Session",
    "Stats",
    "Step",
    "Target",
    "fetch",
    "generate",
    "load_target",
    "measure",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `specdiff --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'specdiff' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
