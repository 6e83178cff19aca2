"""Configuration of a training run: one TOML file.

    target = "smollm2-135m"        # a known model, or a Hugging Face folder

    [drafter]                      # PrefixShape or DenoiserShape, by kind
    kind = "parallel"

    [data]                         # Answers or Texts, by kind
    conversations = "../data/smollm2_samples.npz"

    [objective]                    # Objective; not for "sedd" and "mdlm"
    divergence = "mix"

    [training]                     # Recipe
    steps = 4000

Missing keys have their defaults. Paths are relative to the file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..files import read_text
from .objective import Objective
from .recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
PATHS = ("initial", "conversations", "texts", "path")  # keys whose values are files or folders


@dataclass(frozen=True)
class PrefixShape:
    """Shape of a drafter that reads the target's states. See `DraftConfig` for the other fields.

    Args:
        kind: "block-diffusion", "parallel" or "eagle".
        initial: folder of a drafter with the initial weights; all sizes but `block` must be equal.
            None: start at the best linear prediction.
        k: default draft length; None: `block`.
        draft_vocab_size: number of tokens that can be drafted: the most frequent ones of the data.
        target_layers: layers of the target whose states are read besides the last one, counted from
            1, in ascending order; not for an eagle.
        head_rank, head_state: shape of the `SequentialHead`; head_rank 0: no head.
    """

    kind: str
    initial: str | None = None
    block: int = 8
    k: int | None = None
    hidden_size: int = 576
    layers: int = 1
    heads: int = 9
    intermediate_size: int = 1536
    draft_vocab_size: int = 8192
    target_layers: tuple[int, ...] = ()
    head_rank: int = 0
    head_state: bool = True


@dataclass(frozen=True)
class DenoiserShape:
    """Shape of a DDiT with the target's vocabulary. See `DDiTConfig` for the other fields.

    Args:
        kind: "sedd", or "mdlm", which is not conditioned on time.
        initial: folder of a checkpoint with the initial weights, such as sedd-small. Its shape
            replaces the one given here. None: random weights.
    """

    kind: str
    initial: str | None = None
    hidden_size: int = 768
    blocks: int = 12
    heads: int = 12
    cond_dim: int = 128
    length: int = 1024


@dataclass(frozen=True)
class Answers:
    """Training data written by the target.

    Args:
        conversations: file or folder, see `load_conversations`.
        held_out: share of prompts whose conversations are not trained on, see `split`; in [0, 1).
        cache_states: keep the target's states on disk, at 2 bytes a number, instead of computing
            them in every step. See docs/training.md.
    """

    conversations: str
    held_out: float = 1 / 32
    cache_states: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")


@dataclass(frozen=True)
class Texts:
    """Training data of arbitrary texts, cut into rows of tokens.

    Args:
        texts: a corpus or a folder, see `read_texts`.
        path: folder with the files of a named corpus, to avoid the network.
        length: tokens per row; None: the drafter's length.
        max_tokens: maximum number of training tokens; at most a tenth as many are held out. None:
            no limit.
    """

    texts: str
    path: str | None = None
    length: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class TrainingRun:
    """Settings of a training run."""

    target: str
    drafter: PrefixShape | DenoiserShape
    data: Answers | Texts
    objective: Objective
    training: Recipe


SHAPES: dict[str, tuple[type[Any], type[Any]]] = {
    "block-diffusion": (PrefixShape, Answers),
    "parallel": (PrefixShape, Answers),
    "eagle": (PrefixShape, Answers),
    "sedd": (DenoiserShape, Texts),
    "mdlm": (DenoiserShape, Texts),
}


def load_run(path: str | Path) -> TrainingRun:
    """Read a training run's file.

    Raises:
        ValueError: the file is missing or is not TOML, or a key is unknown, missing or out of
            range.

    Example:
        >>> run = load_run("configs/smollm2-135m-parallel.toml")
    """
    path = Path(path)
    try:
        tables = tomllib.loads(read_text(path))
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror}; expected a TOML file, see docs/training.md"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    try:
        return read_run(tables, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_run(tables: dict[str, Any], folder: Path) -> TrainingRun:
    known = [field.name for field in fields(TrainingRun)]
    if unknown := set(tables) - set(known):
        raise ValueError(
            f"unknown table or key {', '.join(sorted(unknown))}; expected {', '.join(known)}"
        )
    for name in known[1:]:
        if not isinstance(tables.get(name, {}), dict):
            raise ValueError(f"{name} must be a table, [{name}], got {tables[name]!r}")
    kind = tables.get("drafter", {}).get("kind")
    if not isinstance(kind, str) or kind not in SHAPES:
        raise ValueError(f"drafter.kind must be one of {', '.join(SHAPES)}, got {kind!r}")
    if "target" not in tables:
        raise ValueError('target is missing: expected target = "smollm2-135m" or a folder')
    checked("target", tables["target"], str)
    shape, data = SHAPES[kind]
    if shape is DenoiserShape and "objective" in tables:
        raise ValueError(f"drafter.kind = {kind!r} takes no [objective]: remove the table")
    training = section(Recipe, "training", tables, folder)
    if shape is DenoiserShape and training.matrices != "adamw":
        raise ValueError(
            f"training.matrices must be 'adamw' for drafter.kind = {kind!r}, got "
            f"{training.matrices!r}: remove the key"
        )
    return TrainingRun(
        resolve(tables["target"], folder),
        section(shape, "drafter", tables, folder),
        section(data, "data", tables, folder),
        section(Objective, "objective", tables, folder),
        training,
    )


def section(kind: type[T], name: str, tables: dict[str, Any], folder: Path) -> T:
    """Read a table into a dataclass."""
    table, hints = tables.get(name, {}), get_type_hints(kind)
    if unknown := set(table) - set(hints):
        raise ValueError(
            f"unknown {name}.{', '.join(sorted(unknown))}; expected {', '.join(hints)}"
        )
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in table:
            if field.default is MISSING:
                raise ValueError(f"{name}.{field.name} is missing")
            continue
        value = checked(f"{name}.{field.name}", table[field.name], hints[field.name])
        values[field.name] = resolve(value, folder) if field.name in PATHS else value
    with of(f"[{name}]"):
        return kind(**values)


@contextmanager
def of(setting: str) -> Iterator[None]:
    """Begin a ValueError's message with the setting that it is about, such as "[drafter]"."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{setting} {error}") from error


def checked(name: str, value: Any, hint: Any) -> Any:
    """Check a value against its field's type. An int may stand for a float, a list for a tuple."""
    if get_origin(hint) is tuple:
        part = get_args(hint)[0]
        if type(value) is not list or any(type(x) is not part for x in value):
            raise ValueError(f"{name} must be a list of {part.__name__}, got {value!r}")
        return tuple(value)
    expected = plain_types(hint)
    if float in expected and type(value) is int:
        value = float(value)
    if type(value) not in expected:
        names = " or ".join(t.__name__ for t in expected)
        raise ValueError(f"{name} must be {names}, got {value!r}")
    return value


def plain_types(hint: Any) -> list[type]:
    """The types that a field allows, without None."""
    parts = get_args(hint) if get_origin(hint) is not None else (hint,)
    return [part for part in parts if part is not type(None)]


def resolve(name: str, folder: Path) -> str:
    """The path relative to the TOML file's folder if it exists, else the name unchanged."""
    beside = folder / name
    return str(beside) if beside.exists() else name
