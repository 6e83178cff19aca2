"""Per-row lengths after a round: stop tokens, limits, rollback."""

from __future__ import annotations

from typing import Any

import specdiff_kernels._C as _C

from ..arguments import commit_arguments
from ..types import Committed


def commit(*args: Any, out: Committed) -> None:
    _C.commit(commit_arguments(*args, out=out))
