"""The public ops, one file each: checks, schema, fake. The work is done by a backend."""

from .commit import commit
from .row_law import row_law
from .sample import sample
from .skinny_linear import skinny_linear
from .verify import verify

__all__ = ["commit", "row_law", "sample", "skinny_linear", "verify"]
