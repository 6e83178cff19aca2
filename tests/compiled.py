"""C++ that tests compile, once for each state of its sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
CACHE = Path(tempfile.gettempdir()) / f"specdiff-tests-{os.getuid()}"

Unit = tuple[Path, list[str]]  # a file and its own options


def compiled(
    name: str,
    units: Sequence[Unit],
    options: Sequence[str],
    linking: Sequence[str],
    headers: Sequence[Path],
) -> Path:
    """The shared library of some files, `name` in a folder of its own that is kept.

    headers: what the files include of ours.
    """
    state = hashlib.sha256(repr((name, units, options, linking, sys.version)).encode())
    for path in (*(source for source, _ in units), *headers):
        state.update(path.read_bytes())
    folder = CACHE / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / name

    def compile_unit(unit: Unit) -> Path:
        source, own = unit
        output = folder / f"{source.name}.o"
        command = [COMPILER, *options, *own, "-x", "c++", "-c", source, "-o", output]
        subprocess.run(command, check=True)
        return output

    with FileLock(folder / "lock"):
        if not library.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_unit, units))
            part = library.with_suffix(".part")
            subprocess.run([COMPILER, "-shared", *linking, *objects, "-o", part], check=True)
            part.rename(library)
    return library
