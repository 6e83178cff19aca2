"""Copies of objects that may keep a state, for calls that may turn out never to have been made.

`copy.deepcopy` shares functions, and with them what they close over. A copy made here shares
nothing that a call can change, but for globals and the attributes of classes.
"""

from __future__ import annotations

import copy
import random
import re
from collections import deque
from enum import Enum
from functools import partial
from logging import Logger
from pathlib import PurePath
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# what no call changes
SHARED = (
    NoneType, bool, int, float, complex, str, bytes, range, slice, type, ModuleType, Enum,
    re.Pattern, PurePath, Logger, np.generic, torch.dtype, torch.device, PreTrainedModel,
    PreTrainedTokenizerBase,
)  # fmt: skip
FROZEN = {
    ("tokenizers", "Tokenizer"), ("xgrammar", "CompiledGrammar"), ("xgrammar", "TokenizerInfo"),
}  # fmt: skip
GENERATORS = (
    random.Random, np.random.Generator, np.random.BitGenerator, np.random.RandomState, np.ndarray,
)  # fmt: skip
Known = dict[int, tuple[Any, Any]]  # by its address, an object and its copy


class Uncopyable(TypeError):
    """Something keeps a state that cannot be copied; the message names its type."""


def copied(value: Any, known: Known | None = None) -> Any:
    """A copy of an object and of all that it keeps; what is shared in it stays shared in the copy.

    What has a method `fork`, as grammar matchers have, is forked. Models and tokenizers are not
    copied.

    Raises:
        Uncopyable: a generator, a lock, an open file and the like.

    Example:
        >>> calls = [1]
        >>> copied(lambda: calls)() is calls
        False
    """
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)][1]
    kind = type(value)
    if isinstance(value, SHARED) or (kind.__module__.partition(".")[0], kind.__name__) in FROZEN:
        return value

    def noted(new: Any) -> Any:
        known[id(value)] = value, new
        return new

    if callable(getattr(kind, "fork", None)):
        if (new := value.fork()) is value:
            raise Uncopyable(f"a {kind.__name__} whose fork() returns itself")
        return noted(new)
    if isinstance(value, torch.Generator):
        return noted(value.clone_state())
    if isinstance(value, Tensor):
        return noted(value.detach().clone().requires_grad_(value.requires_grad))
    if isinstance(value, GENERATORS) or hasattr(kind, "__deepcopy__"):
        return noted(copy.deepcopy(value))
    if isinstance(value, FunctionType):
        return function_copied(value, known)
    if isinstance(value, MethodType):
        return noted(MethodType(value.__func__, copied(value.__self__, known)))
    if isinstance(value, BuiltinFunctionType):  # also a method of a builtin object
        owner = value.__self__
        own = owner is not None and not isinstance(owner, ModuleType)
        return noted(getattr(copied(owner, known), value.__name__) if own else value)
    if isinstance(value, partial):
        parts = (copied(part, known) for part in (value.func, value.args, value.keywords))
        function, args, keywords = parts
        return noted(kind(function, *args, **keywords))
    if isinstance(value, (tuple, frozenset)):
        items = [copied(item, known) for item in value]
        return noted(tuple.__new__(kind, items) if isinstance(value, tuple) else kind(items))
    if isinstance(value, (list, deque, dict, set)):
        return container_copied(value, known)
    return object_copied(value, known)


def container_copied(value: Any, known: Known) -> Any:
    new = copy.copy(value)  # of its own class, with attributes, a default, a longest length
    known[id(value)] = value, new
    if isinstance(new, dict):
        for key in list(new):
            new[key] = copied(new[key], known)
    elif isinstance(new, set):
        items = [copied(item, known) for item in new]
        new.clear()
        new.update(items)
    else:
        for i, item in enumerate(new):
            new[i] = copied(item, known)
    return new


def function_copied(function: FunctionType, known: Known) -> FunctionType:
    """The function over copies of what it closes over, of its defaults and its attributes."""
    closure = function.__closure__ or ()
    if not (closure or function.__defaults__ or function.__kwdefaults__ or vars(function)):
        return function
    fresh = [cell for cell in closure if id(cell) not in known]
    for cell in fresh:  # another function may close over it, too
        known[id(cell)] = cell, CellType()
    cells = tuple(known[id(cell)][1] for cell in closure)
    code, name = function.__code__, function.__name__
    new = FunctionType(code, function.__globals__, name, None, cells or None)
    known[id(function)] = function, new  # before its cells are filled: it may close over itself
    for cell in fresh:
        try:
            content = cell.cell_contents
        except ValueError:  # nothing was assigned yet
            continue
        known[id(cell)][1].cell_contents = copied(content, known)
    new.__defaults__ = copied(function.__defaults__, known)
    new.__kwdefaults__ = copied(function.__kwdefaults__, known)
    vars(new).update(copied(vars(function), known))
    return new


def object_copied(value: Any, known: Known) -> Any:
    """An object of a class that is written in Python, with its attributes and slots."""
    kind = type(value)
    try:
        new = object.__new__(kind)
    except TypeError as error:  # its memory is laid out by native code
        raise Uncopyable(f"a {kind.__name__}") from error
    known[id(value)] = value, new
    names = [name for base in kind.__mro__ for name in slots_of(base) if hasattr(value, name)]
    for name in names:
        object.__setattr__(new, name, copied(getattr(value, name), known))
    if hasattr(value, "__dict__"):
        vars(new).update((name, copied(item, known)) for name, item in vars(value).items())
    return new


def slots_of(kind: type) -> list[str]:
    """Names of the attributes for which a class itself sets places aside."""
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    private = [name.startswith("__") and not name.endswith("__") for name in names]
    owner = kind.__name__.lstrip("_")
    return [
        f"_{owner}{name}" if mangled else name
        for name, mangled in zip(names, private, strict=True)
        if name not in ("__dict__", "__weakref__")
    ]
