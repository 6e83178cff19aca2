"""Fused kernels for speculative decoding with a diffusion drafter: the ops and their values.

    from specdiff_kernels import Draft, Reveal, commit, denoise_step, row_distribution, sample,
    verify

`python -m specdiff_kernels` prints which backends run here.
"""

from importlib import metadata

from .backends import BackendError, available_backends, use_backend, workspace_size
from .corrections import Correction
from .fields import MAX_VOCABULARY
from .lenience import check_lenience
from .ops.build_tree import build_tree
from .ops.cached_attention import cached_attention
from .ops.commit import commit
from .ops.denoise_step import denoise_step
from .ops.row_distribution import row_distribution
from .ops.row_divergence import row_divergence
from .ops.sample import sample
from .ops.skinny_linear import pack_weight, skinny_linear
from .ops.verify import verify
from .ops.verify_tree import verify_tree
from .pages import Pages
from .records import RECORDS, RULES, Record, check_names, choose_record
from .reveal import Order, Reveal
from .seeds import row_seeds
from .trees import Tree, VerifiedTree
from .types import (
    Committed,
    DistributionError,
    Draft,
    Lenience,
    PackedWeight,
    Purpose,
    RowDistribution,
    RowDivergence,
    Status,
    Verified,
    check_status,
)

try:
    __version__ = metadata.version("specdiff-kernels")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"

__all__ = [
    "MAX_VOCABULARY",
    "RECORDS",
    "RULES",
    "BackendError",
    "Committed",
    "Correction",
    "DistributionError",
    "Draft",
    "Lenience",
    "Order",
    "PackedWeight",
    "Pages",
    "Purpose",
    "Record",
    "Reveal",
    "RowDistribution",
    "RowDivergence",
    "Status",
    "Tree",
    "Verified",
    "VerifiedTree",
    "available_backends",
    "build_tree",
    "cached_attention",
    "check_lenience",
    "check_names",
    "check_status",
    "choose_record",
    "commit",
    "denoise_step",
    "pack_weight",
    "row_distribution",
    "row_divergence",
    "row_seeds",
    "sample",
    "skinny_linear",
    "use_backend",
    "verify",
    "verify_tree",
    "workspace_size",
]
