"""C++ backend for CPUs: hands addresses and sizes to the native module `_C`."""

from .commit import commit
from .row_law import row_law
from .sample import sample
from .verify import verify

__all__ = ["commit", "row_law", "sample", "verify"]
