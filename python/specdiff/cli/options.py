"""Options and error reporting shared by the commands of `specdiff`."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..download import FetchError

if TYPE_CHECKING:
    import torch

# in a narrow terminal rich's table of options would cut their names, which plain text does not
RICH = "rich" if shutil.get_terminal_size().columns >= 80 else None
SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": RICH,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
WAYS_OUT = {  # of the operating system's errors
    errno.ENOENT: "check the path",
    errno.EEXIST: "name a folder",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name a path through folders only",
    errno.EACCES: "change its permissions, or name another path",
    errno.EROFS: "name a path on another disk",
    errno.ENOSPC: "free some space, or name a path on another disk",
    errno.EDQUOT: "free some space, or name a path on another disk",
}


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


NoAccelerate = Annotated[
    bool, typer.Option("--no-accelerate", help="On a CPU: use torch's linear layers.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's.")]
Where = Annotated[Device | None, typer.Option("--device", help="Default: cuda if available.")]
Type = Annotated[Dtype, typer.Option("--dtype", help="Data type of the target's weights.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """Print errors that the user can fix in one line, and exit with code 2."""
    try:
        yield
    except BrokenPipeError:  # as of `| head`: typer ends quietly
        raise
    except (ValueError, OSError, FetchError, FloatingPointError) as error:
        fail(error)
    except RuntimeError as error:
        from specdiff_kernels import BackendError

        if not isinstance(error, BackendError):
            raise
        fail(error)


def fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {' '.join(said(error).split())}", err=True)
    raise typer.Exit(2) from error


def said(error: Exception) -> str:
    """The message of an error; the operating system's gets its file first, and a way out."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    parts = [error.filename, error.strerror, WAYS_OUT.get(error.errno or 0)]
    return ": ".join(str(part) for part in parts if part is not None)


def placed(
    device: Device | None, dtype: Dtype, threads: int | None = None
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for models. Also sets torch's threads and silences transformers.

    Raises:
        ValueError: --device cuda without a usable GPU.
    """
    import torch

    quiet(threads)
    gpu = torch.cuda.is_available()
    if device is Device.cuda and not gpu:
        raise ValueError("--device cuda: torch found no usable GPU; use --device cpu")
    where = device.value if device is not None else "cuda" if gpu else "cpu"
    return torch.device(where), getattr(torch, dtype.value)


def at_least(least: int, option: str, given: int) -> None:
    if given < least:
        raise ValueError(f"{option} must be at least {least}, got {given}")


def set_threads(threads: int) -> None:
    """Set torch's CPU threads, at most as many as there are. Raises ValueError below 1."""
    import torch

    at_least(1, "--threads", threads)
    there = cores()
    if threads > there:
        typer.echo(f"--threads {threads}: this machine has {there}, which are used", err=True)
    torch.set_num_threads(min(threads, there))


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quiet(threads: int | None) -> None:
    """Silence transformers and, unless None, set the number of CPU threads."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads is not None:
        set_threads(threads)
