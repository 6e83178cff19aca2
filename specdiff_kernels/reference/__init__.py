"""The specification: every op by its equations, in plain PyTorch, on any device."""

from .commit import commit
from .denoise_step import denoise_step
from .row_distribution import row_distribution
from .row_divergence import row_divergence, row_divergence_backward
from .sample import sample
from .skinny_linear import skinny_linear
from .verify import verify

__all__ = [
    "commit",
    "denoise_step",
    "row_distribution",
    "row_divergence",
    "row_divergence_backward",
    "sample",
    "skinny_linear",
    "verify",
    "workspace_size",
]


def workspace_size(rows: int, V: int) -> int:
    """No workspace is taken."""
    return 0
