"""Files that are read or written whole, digests, and folders tied to one set of settings."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def read_text(path: Path) -> str:
    """A file's text: UTF-8, with or without a byte-order mark. Every line ends in "\\n".

    Raises:
        ValueError: the file is not UTF-8.
    """
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8: line {line} has the byte {data[error.start]:#04x}; convert or "
            "remove it"
        ) from error


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without their ends.

    Only newline characters end a line. The separators at which `str.splitlines` also splits, such
    as U+2028, belong to the text.

    Raises:
        ValueError: the file is not UTF-8.
    """
    *lines, last = read_text(path).split("\n")
    return [*lines, last] if last else lines


def read_json(path: Path, way_out: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file holds no JSON object. The message ends in the way out.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): {way_out}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {content!r:.40}: {way_out}")
    return content


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name this file in the operating system's errors, which may name none or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in the same folder, then move it into place."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # unique to this writer
    with naming(path):
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
        ValueError: the folder was made with other settings, of which the message names the first,
            or its settings.json is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not file.exists():
        write_atomically(file, (json.dumps(settings, indent=2) + "\n").encode())
        return
    before = read_json(file, "delete what the folder holds to begin anew, or use another folder")
    for name, value in json.loads(json.dumps(settings)).items():  # turns tuples into lists
        if before.get(name) != value:
            where, then, now = first_difference(name, before.get(name), value)
            raise ValueError(
                f"{folder} was made with {where} {then!r}, not {now!r}: use the same settings "
                "again, or another folder"
            )


def first_difference(name: str, then: Any, now: Any) -> tuple[str, Any, Any]:
    """Where two different values differ, as in "drafter.heads", and what stands there in each."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            if then.get(key) != now.get(key):
                return first_difference(f"{name}.{key}", then.get(key), now.get(key))
    return name, then, now


def stamped(name: str) -> list[Any]:
    """[name]; for a folder, its path and the size and modification time of each file."""
    folder = Path(name)
    if not folder.is_dir():
        return [name]
    files = sorted(file for file in folder.iterdir() if file.is_file())
    stats = [(file.name, file.stat()) for file in files]
    return [str(folder.resolve()), *([n, s.st_size, s.st_mtime_ns] for n, s in stats)]
