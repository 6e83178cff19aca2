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

import torch

logger = logging.getLogger("specdiff_kernels")

# in order of preference on each device
ORDER = {"cpu": ("cpp", "reference"), "cuda": ("reference",)}
NAMES = ("cpp", "reference")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here."""


@cache
def load(name: str) -> ModuleType | Exception:
    """The backend's module, or the error that keeps it from loading."""
    try:
        return importlib.import_module(f"specdiff_kernels.{name}")
    except (ImportError, BackendError) as error:
        return error


def check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise BackendError(f"{source} is {name!r}; expected one of {', '.join(NAMES)}")
    return name


def reason_against(name: str, device: str) -> str | None:
    """Why backend `name` cannot run on `device`; None if it can."""
    if name not in ORDER.get(device, ("reference",)):
        return f"it does not run on {device} tensors"
    module = load(name)
    if isinstance(module, BackendError):
        return str(module)
    if isinstance(module, Exception):
        return f"it did not load ({module}); reinstall with: pip install --force-reinstall ."
    return None


def available_backends(device: str = "cpu") -> dict[str, str | None]:
    """Every backend of this version with None if it can run on `device`, else why not.

    Example:
        >>> available_backends()["reference"] is None
        True
    """
    return {name: reason_against(name, device) for name in NAMES}


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
def find(op: str, device: str, forced: str | None) -> Callable[..., None]:
    """The function that runs `op` on a type of device; the choice is made once.

    Raises:
        BackendError: no backend, or not the one asked for, runs there.
    """
    if forced is not None:
        if reason := reason_against(forced, device):
            raise BackendError(f"backend {forced!r} was asked for, but {reason}")
        return getattr(load(forced), op)
    skipped: dict[str, str] = {}
    for candidate in ORDER.get(device, ("reference",)):
        if isinstance(fault := load(candidate), BackendError):
            raise fault  # a wrong setting is no reason to fall back
        reason = reason_against(candidate, device)
        if reason is None:
            for failed, why in skipped.items():
                logger.warning("backend %s is not used for %s: %s", failed, op, why)
            return getattr(load(candidate), op)
        skipped[candidate] = reason
    raise BackendError(f"no backend runs on {device} tensors: {skipped}")


def implementation(op: str, device: torch.device, name: str | None) -> Callable[..., None]:
    """The function that runs `op` on `device`, with the backend asked for or the best one."""
    return find(op, device.type, requested(name))
