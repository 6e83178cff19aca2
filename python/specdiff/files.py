"""Atomic file writes, digests, and folders tied to one set of settings."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in the same folder, then move it into place."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # unique to this writer
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def model_digest(model: nn.Module) -> str:
    """A digest of the name, shape, dtype and first 256 values of every parameter."""
    said = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        said.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        said.update(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return said.hexdigest()


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write a folder's settings to settings.json, or check that they equal those already there.

    Raises:
        ValueError: the folder was made with other settings; the message names the first difference.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not file.exists():
        write_atomically(file, (json.dumps(settings, indent=2) + "\n").encode())
        return
    before = json.loads(file.read_text())
    for name, value in json.loads(json.dumps(settings)).items():  # turns tuples into lists
        if before.get(name) != value:
            raise ValueError(
                f"{folder} was made with {name} {before.get(name)!r}, not {value!r}: use the same "
                "settings again, or another folder"
            )


def stamped(name: str) -> list[Any]:
    """[name]; for a folder, its path and the size and modification time of each file."""
    folder = Path(name)
    if not folder.is_dir():
        return [name]
    files = sorted(file for file in folder.iterdir() if file.is_file())
    stats = [(file.name, file.stat()) for file in files]
    return [str(folder.resolve()), *([n, s.st_size, s.st_mtime_ns] for n, s in stats)]
