"""One thread, as for the loop's tests."""

from __future__ import annotations

from tests.loop.conftest import one_thread  # noqa: F401
