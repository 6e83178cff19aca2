"""`--help` of every command, in terminals of any width."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, typer
from typer.testing import CliRunner
from specdiff.cli.main import app

def walk(command, path):
    names = [name for p in command.params for name in p.opts if name.startswith("--")]
    yield path, names, CliRunner().invoke(app, [*path, "--help"]).stdout
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, [*path, name])

print(json.dumps(list(walk(typer.main.get_command(app), []))))
"""


@pytest.mark.parametrize("columns", [40, 79, 80, 200])
def test_option_names_are_whole(columns):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "COLUMNS": f"{columns}"},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert len(found) > 10 and any(path == ["bench", "run"] for path, *_ in found)
    for path, names, shown in found:
        words = shown.split()
        assert all(name in words for name in names), (path, set(names) - set(words))
