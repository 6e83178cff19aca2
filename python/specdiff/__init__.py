"""Speculative decoding that samples exactly from the target: models, drafters, cache and loop.

The ops are in `specdiff_kernels`, which does not depend on models.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from .download import FetchError, fetch
    from .loop.cache import PagedRowCache, RowCache
    from .loop.decoder import Decoder, Generation
    from .loop.fast_layers import accelerate, restore
    from .loop.sampling import Sampling
    from .loop.session import Session
    from .loop.stats import Stats, Step
    from .loop.target import Target
    from .one_call import generate
    from .planning.adaptive import AdaptiveK
    from .planning.costs import Costs, measure
    from .planning.planner import Planner

_HOMES = {
    "accelerate": "loop.fast_layers",
    "restore": "loop.fast_layers",
    "AdaptiveK": "planning.adaptive",
    "PagedRowCache": "loop.cache",
    "RowCache": "loop.cache",
    "Decoder": "loop.decoder",
    "Generation": "loop.decoder",
    "generate": "one_call",
    "FetchError": "download",
    "fetch": "download",
    "Costs": "planning.costs",
    "Planner": "planning.planner",
    "measure": "planning.costs",
    "Sampling": "loop.sampling",
    "Session": "loop.session",
    "Stats": "loop.stats",
    "Step": "loop.stats",
    "Target": "loop.target",
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
    "__version__",
    "accelerate",
    "fetch",
    "generate",
    "measure",
    "restore",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # for a type checker, any name would be there

    def __getattr__(name: str) -> Any:
        """Import on first use, so that `specdiff --help` does not wait for torch."""
        if name == "__version__":
            return version("specdiff-kernels")
        if name not in _HOMES:
            raise AttributeError(f"module 'specdiff' has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
