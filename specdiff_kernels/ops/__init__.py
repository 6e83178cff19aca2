"""The public ops, one file each: checks, schema, fake. The work is done by a backend."""

from .commit import commit
from .denoise_step import denoise_step
from .row_distribution import row_distribution
from .row_divergence import row_divergence
from .sample import sample
from .skinny_linear import pack_weight, skinny_linear
from .verify import verify

__all__ = [
    "commit",
    "denoise_step",
    "pack_weight",
    "row_distribution",
    "row_divergence",
    "sample",
    "skinny_linear",
    "verify",
]
