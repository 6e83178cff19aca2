"""The fixtures of `specdiff bench`'s tests."""

from __future__ import annotations

from tests.bench.conftest import corpus, folder, models, one_thread  # noqa: F401
