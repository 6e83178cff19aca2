"""Speculative decoding that samples exactly from the target: models, drafters, cache and loop.

The ops it is built on are in `specdiff_kernels`, which knows nothing of models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adaptive import AdaptiveK
    from .cache import RowCache
    from .decoder import Decoder, Generation, Stats, Step, generate
    from .models import FetchError, fetch, load_target
    from .sampling import Sampling
    from .target import Target

_HOMES = {
    "AdaptiveK": "adaptive",
    "RowCache": "cache",
    "Decoder": "decoder",
    "Generation": "decoder",
    "Stats": "decoder",
    "Step": "decoder",
    "generate": "decoder",
    "FetchError": "models",
    "fetch": "models",
    "load_target": "models",
    "Sampling": "sampling",
    "Target": "target",
}

__all__ = [
    "AdaptiveK",
    "Decoder",
    "FetchError",
    "Generation",
    "RowCache",
    "Sampling",
    "Stats",
    "Step",
    "Target",
    "fetch",
    "generate",
    "load_target",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `specdiff --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'specdiff' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
