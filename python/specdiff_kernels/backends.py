"""Which implementation runs an op: forced, or the best that can take the tensors at hand."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .checks import as_device, integer

logger = logging.getLogger("specdiff_kernels")

# in order of preference on each device
ORDER = {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}
NAMES = ("cpp", "triton", "cuda", "reference")
REMEDIES = {
    "cpp": "reinstall with: pip install --force-reinstall .",
    "triton": "install it with: pip install triton",
    "cuda": "reinstall where nvcc is, with: SPECDIFF_CUDA=1 pip install --force-reinstall .",
    "reference": "reinstall with: pip install --force-reinstall .",
}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here."""


@cache
def load(name: str) -> ModuleType | Exception:
    """The backend's package, or the error that keeps it from loading.

    Its `FUNCTIONS` are those that it has, by name; `fault`, if there, says what is wrong with the
    device.
    """
    try:
        return importlib.import_module(f"specdiff_kernels.{name}")
    except (ImportError, BackendError) as error:
        return error


def function_of(name: str, op: str) -> Callable[..., Any]:
    module = load(name)
    if isinstance(module, Exception):
        raise module
    function: Callable[..., Any] = module.FUNCTIONS[op]
    return function


def functions_of(*ops: ModuleType) -> dict[str, Callable[..., Any]]:
    """A backend's `FUNCTIONS`, from the modules of its ops: each holds a function of its name."""
    names = {op.__name__.rpartition(".")[2]: op for op in ops}
    return {name: getattr(op, name) for name, op in names.items()}


def no_workspace(rows: int, V: int) -> int:
    """The `workspace_size` of a backend that takes none."""
    return 0


def check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise BackendError(f"{source} is {name!r}; expected one of {', '.join(NAMES)}")
    return name


def reason_against(name: str, device: str, op: str = "verify") -> str | None:
    """Why backend `name` cannot run `op` on `device`; None if it can."""
    if name == "triton" and device == "cpu":
        if not interprets_triton():
            return "it runs on cpu tensors under Triton's interpreter alone: set TRITON_INTERPRET=1"
        if reason := reason_against_interpreter():
            return reason
    elif name not in ORDER.get(device, ("reference",)):
        return f"it does not run on {device} tensors"
    module = load(name)
    if isinstance(module, BackendError):
        return str(module)
    if isinstance(module, Exception):
        return f"it did not load ({module}); {REMEDIES[name]}"
    if op not in module.FUNCTIONS:
        return f"it has no {op}"
    # what a module knows of the device alone: its driver may be too old
    return module.fault() if device == "cuda" and hasattr(module, "fault") else None


def interprets_triton() -> bool:
    """Whether Triton's kernels are interpreted, which is decided when they are loaded."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def reason_against_interpreter() -> str | None:
    """Why this Triton's interpreter would draw other tokens; None if it would not, or is absent."""
    try:
        from triton import __version__ as installed
    except ImportError:
        return None
    if tuple(map(int, installed.split(".")[:2])) >= (3, 9):
        return None
    return (
        f"Triton {installed}'s interpreter rounds a fused multiply-add twice: install triton>=3.9"
    )


def available_backends(device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Every backend of this version with None if it can run on `device`, else why not.

    Raises:
        ValueError: no device.

    Example:
        >>> available_backends()["reference"] is None
        True
    """
    kind = as_device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        return dict.fromkeys(NAMES, "torch finds no CUDA device")
    return {name: reason_against(name, kind) for name in NAMES}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for every op in the block. It is an error if it cannot run.

    Example:
        >>> with use_backend("reference"):
        ...     pass
    """
    token = _forced.set(check_name(name, "use_backend(name)"))
    try:
        yield
    finally:
        _forced.reset(token)


def requested(name: str | None) -> str | None:
    """The backend asked for by argument, then by use_backend, then by SPECDIFF_BACKEND."""
    if name is not None:
        return check_name(name, "backend")
    if (forced := _forced.get()) is not None:
        return forced
    if environment := os.environ.get("SPECDIFF_BACKEND"):
        return check_name(environment, "SPECDIFF_BACKEND")
    return None


@cache
def find(op: str, device: str, forced: str | None) -> Callable[..., Any]:
    """The function that runs `op` on a type of device; the choice is made once.

    Raises:
        BackendError: no backend, or not the one asked for, runs there.
    """
    if forced is not None:
        if reason := reason_against(forced, device, op):
            raise BackendError(f"backend {forced!r} was asked for, but {reason}")
        return function_of(forced, op)
    skipped: dict[str, str] = {}
    for candidate in ORDER.get(device, ("reference",)):
        if isinstance(fault := load(candidate), BackendError):
            raise fault  # a wrong setting is no reason to fall back
        reason = reason_against(candidate, device, op)
        if reason is None:
            for failed, why in skipped.items():
                logger.warning("backend %s is not used for %s: %s", failed, op, why)
            return function_of(candidate, op)
        skipped[candidate] = reason
    raise BackendError(f"no backend runs on {device} tensors: {skipped}")


def workspace_size(
    rows: int, V: int, *, device: str | torch.device = "cuda", backend: str | None = None
) -> int:
    """int64 words of scratch for an op over `rows` rows of V logits; 0: none is taken.

    `row_distribution` and `sample` work on N rows, `denoise_step` on B K, `verify` on B (K + 1). A
    workspace that is large enough may serve one call after another on the same stream; its contents
    need not be set.

    Raises:
        ValueError: rows or V is no integer of at least 0, or `device` no device.
        BackendError: no backend, or not the one asked for, runs there.

    Example:
        >>> workspace_size(9, 50257, device="cpu", backend="reference")
        0
    """
    rows, V = integer("rows", rows), integer("V", V)
    return find("workspace_size", as_device(device).type, requested(backend))(rows, V)


def implementation(op: str, device: torch.device, name: str | None) -> Callable[..., Any]:
    """The function that runs `op` on `device`, with the backend asked for or the best one."""
    return find(op, device.type, name if name in NAMES else requested(name))
