"""Cases that are kept as they come, so that a command that was stopped goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .machine import description, slug, write

CONDITION = ("target", "task", "temperature", "batch", "context", "prompts", "new_tokens")


class Kept:
    """A file of results in the making, beside the place where the whole of it will lie.

    Args:
        folder: of all results; the file lies in the machine's own folder there.
        name: of the file.
        command: what makes it. What another command, or another machine, began is begun anew.
        device: that is measured.

    Example:
        >>> kept = Kept(Path("results"), "methods", "specdiff bench run")
        >>> kept.add(compare(models, condition, methods))
        >>> kept.finish({"name": "methods", "cases": kept.cases})
    """

    def __init__(
        self, folder: Path, name: str, command: str, device: torch.device | None = None
    ) -> None:
        self.path = folder / slug(device) / f"{name}.json"
        self.part = self.path.with_name(f".{name}.begun.json")
        self.name, self.command = name, command
        self.cases: list[dict[str, Any]] = []
        if self.part.exists():
            begun = json.loads(self.part.read_text())
            if begun["command"] == command and begun.get("machine") == description():
                self.cases = begun["cases"]

    def find(self, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Cases measured before under the condition of the wanted ones; none, and they are
        forgotten, if the weights of a drafter have changed since."""
        same = lambda case: all(case[name] == wanted[0][name] for name in CONDITION)
        found = [case for case in self.cases if same(case)]
        weights = {(case["method"], case.get("weights")) for case in found}
        if all((case["method"], case["weights"]) in weights for case in wanted):
            return found
        self.cases = [case for case in self.cases if not same(case)]
        return []

    def add(self, cases: list[dict[str, Any]]) -> None:
        self.cases += cases
        write(self.part, {"command": self.command, "cases": self.cases})

    def finish(self, content: dict[str, Any]) -> Path:
        """Write the whole file."""
        write(self.path, {"command": self.command, **content})
        self.part.unlink(missing_ok=True)
        return self.path
