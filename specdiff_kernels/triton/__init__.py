"""Triton backend for GPUs; on a CPU it runs under Triton's interpreter."""

from .arguments import workspace_size
from .commit import commit
from .denoise_step import denoise_step
from .row_distribution import row_distribution
from .sample import sample
from .verify import verify

__all__ = ["commit", "denoise_step", "row_distribution", "sample", "verify", "workspace_size"]
