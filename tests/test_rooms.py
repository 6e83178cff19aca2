"""Rooms of python/specdiff: imports go downwards, also those inside functions, without a circle.

No package of either library hides a submodule behind something else of its name.
"""

from __future__ import annotations

import ast
import symtable
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "python" / "specdiff"
KERNELS = Path(__file__).parents[1] / "python" / "specdiff_kernels"
PACKAGES = [path.parent for top in (ROOT, KERNELS) for path in top.rglob("__init__.py")]
LEVELS = [
    {"files", "models", "theory"},
    {"download"},
    {"loop"},
    {"drafters"},
    {"planning"},
    {"training", "hf", "one_call"},
    {"bench"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def modules() -> dict[str, Path]:
    files = (path for path in ROOT.rglob("*.py") if path.name != "__main__.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def imports(name: str, source: str, known: set[str]) -> Iterator[str]:
    """Modules of the package that one of them imports at run time."""
    tree = ast.parse(source)
    seen_by_checkers = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and names(node.test)
    ]
    hidden = {id(inner) for node in seen_by_checkers for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in hidden:
            continue
        parts = [] if node.level == 0 else name.split(".")[: -node.level]
        parts += node.module.split(".") if node.module else []
        if node.level == 0 and parts.pop(0) != "specdiff":
            continue
        for alias in node.names:
            for found in (".".join([*parts, alias.name]), ".".join(parts)):
                if found in known or f"{found}.__init__" in known:
                    yield found if found in known else f"{found}.__init__"
                    break


def names(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def room(name: str) -> str:
    return name.split(".")[0]


GRAPH = {
    name: set(imports(name, path.read_text(), set(modules())))
    for name, path in modules().items()
    if name != "__init__"
}


def test_every_room_has_a_level():
    assert {room(name) for name in GRAPH} == set(LEVEL)
    assert sum(map(len, GRAPH.values())) > 100  # the walk finds them


def test_imports_go_downwards():
    up = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if room(other) != room(name) and LEVEL[room(other)] >= LEVEL[room(name)]
    ]
    assert up == []


def test_there_is_no_circle():
    TopologicalSorter(GRAPH).prepare()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from ..drafters import load_drafter", ["drafters.__init__"]),
        ("def f():\n    from ..drafters.sedd import SEDD", ["drafters.sedd"]),
        ("from . import attention", ["loop.attention"]),
        ("from specdiff.cli.main import app", ["cli.main"]),
        ("if TYPE_CHECKING:\n    from ..drafters import load_drafter", []),
        ("from torch import Tensor", []),
    ],
)
def test_the_walk_sees_what_it_has_to(line, found):
    assert list(imports("loop.session", line, set(modules()))) == found


# --- names of submodules -------------------------------------------------------------------------


def submodules(package: Path) -> set[str]:
    files = {path.stem for pattern in ("*.py", "*.pyi") for path in package.glob(pattern)}
    return (files | {path.parent.name for path in package.glob("*/__init__.py")}) - {"__init__"}


def exported(source: str) -> set[str]:
    """Attributes of a package that are no submodules, by its __init__: those that it binds or lists
    in __all__."""
    table = symtable.symtable(source, "__init__", "exec")
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_local()}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (node.level, node.module) == (1, None):
            own -= {alias.name for alias in node.names if alias.asname in (None, alias.name)}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            own |= set(ast.literal_eval(node.value))
    return own


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_no_attribute_hides_a_submodule(package):
    assert exported((package / "__init__.py").read_text()) & submodules(package) == set()


def test_the_packages_are_found():
    assert {"specdiff", "theory", "specdiff_kernels", "ops", "cuda"} <= {p.name for p in PACKAGES}
    assert {"ops", "types", "_C"} <= submodules(KERNELS)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from .verify import verify", {"verify"}),
        ("from . import verify", set()),
        ("from . import checks as verify", {"verify"}),
        ("from .. import verify", {"verify"}),
        ("import verify", {"verify"}),
        ("def verify(): ...", {"verify"}),
        ("class verify: ...", {"verify"}),
        ("verify: int = 3", {"verify"}),
        ("if TYPE_CHECKING:\n    from .verify import verify", {"verify"}),
        ("def f():\n    verify = 3", {"f"}),
        ("verify.verify", set()),
    ],
)
def test_a_hidden_submodule_is_seen(source, found):
    assert exported(source) == found


def test_what_is_made_on_first_use_counts():
    assert exported("__all__ = ['verify']\ndef __getattr__(name): ...") >= {"verify"}
