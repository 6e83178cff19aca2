"""Checks, while Triton's interpreter runs, which writes a GPU's threads may see of each other.

The interpreter runs a program as one thread, and programs one after another, so that a missing
barrier changes nothing there. Here each access to global memory is held against the rules:

- a word that a program wrote is read by it only behind a barrier, as another of its threads may
  have written it. So is a word that it read written, or updated, as another may yet have to read
  it; but a place in tiles of one shape is always the same thread's;
- a word that another program of the same launch wrote, or will write, is touched only if that
  program came to a barrier behind its access, then to an atomic operation that releases, and this
  one has since been to one of the same word that acquires. Atomic operations may meet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

Place = tuple[tuple[int, ...], int]  # shape of a tile, and which element
Times = dict[int, dict[tuple[int, Place], int]]  # address -> program, place -> barriers before it


class Race(AssertionError):
    """Two accesses that nothing orders."""


class Accesses:
    """Of one launch: who read, wrote and updated each word, and behind how many barriers."""

    def __init__(self) -> None:
        self.reads: Times = defaultdict(dict)
        self.writes: Times = defaultdict(dict)
        self.updates: Times = defaultdict(dict)  # atomic
        self.released: dict[int, dict[int, int]] = defaultdict(dict)  # address -> by whom -> when
        self.seen: dict[int, dict[int, int]] = defaultdict(dict)  # program -> of whom -> until when
        self.barriers: dict[int, int] = defaultdict(int)
        self.program = 0

    def check(self, address: int, earlier: Times, what: str, here: Place | None = None) -> None:
        """here: the place whose thread comes after itself in any case."""
        for (program, place), barriers in earlier[address].items():
            if program == self.program:
                ordered = place == here or self.barriers[program] > barriers
            else:
                ordered = self.seen[self.program].get(program, 0) > barriers
            if not ordered:
                raise Race(f"program {self.program} after {program}: {what}")

    def read(self, address: int, place: Place) -> None:
        self.check(address, self.writes, "reads what was written")
        self.check(address, self.updates, "reads what was updated")
        self.reads[address][self.program, place] = self.barriers[self.program]

    def write(self, address: int, place: Place) -> None:
        if any(program != self.program for program, _ in self.writes[address]):
            self.check(address, self.writes, "writes what was written")
        self.check(address, self.updates, "writes what was updated")
        self.check(address, self.reads, "writes what was read", place)
        self.writes[address][self.program, place] = self.barriers[self.program]

    def update(self, address: int, place: Place, acquires_and_releases: bool) -> None:
        self.check(address, self.writes, "updates what was written")
        self.check(address, self.reads, "updates what was read", place)
        # what it releases includes itself
        barriers = self.barriers[self.program]
        self.updates[address][self.program, place] = barriers - acquires_and_releases
        if acquires_and_releases:
            mine, there = self.seen[self.program], self.released[address]
            for program, known in there.items():
                mine[program] = max(mine.get(program, 0), known)
            there.update(mine)
            there[self.program] = barriers


@contextmanager
def watching(*, barriers: bool = True, orders: bool = True) -> Iterator[None]:
    """Raise Race where two accesses are not ordered. Mutants: no barriers; only relaxed atomics."""
    from triton.runtime import interpreter

    native, builder = interpreter._interpreter, interpreter.interpreter_builder
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    launch = Accesses()

    def touched(addresses: Any, mask: Any) -> list[tuple[int, Place]]:
        places = np.flatnonzero(mask).tolist()
        words = addresses.ravel()[places].tolist()
        return [(word, (addresses.shape, place)) for word, place in zip(words, places, strict=True)]

    class Watched:
        def __getattr__(self, name):
            return getattr(native, name)

        def load(self, addresses, mask, *rest):
            for address, place in touched(addresses, mask):
                launch.read(address, place)
            return native.load(addresses, mask, *rest)

        def store(self, addresses, value, mask):
            for address, place in touched(addresses, mask):
                launch.write(address, place)
            return native.store(addresses, value, mask)

        def atomic_rmw(self, operation, addresses, value, mask, semantics):
            both = orders and semantics == native.MEM_SEMANTIC.ACQUIRE_RELEASE
            for address, place in touched(addresses, mask):
                launch.update(address, place, both)
            return native.atomic_rmw(operation, addresses, value, mask, semantics)

    def begin_launch(x, y, z):
        launch.__init__()
        set_grid_dim(x, y, z)

    def begin_program(x, y, z):
        launch.program = x
        set_grid_idx(x, y, z)

    def meet():
        launch.barriers[launch.program] += barriers

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_interpreter", Watched())
        monkeypatch.setattr(builder, "set_grid_dim", begin_launch)
        monkeypatch.setattr(builder, "set_grid_idx", begin_program)
        monkeypatch.setattr(builder, "create_barrier", meet)
        yield
