"""Saves cases as they are measured, so that a stopped command can resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .machine import description, slug, write
from .reading import load

CONDITION = ("target", "task", "temperature", "batch", "context", "prompts", "new_tokens")


class Kept:
    """An unfinished result file, next to the final one.

    Args:
        folder: folder of all results. The file goes to the machine's subfolder.
        name: file name.
        command: the measuring command. Cases of another command or machine are not resumed.
        device: the measured device.

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
            begun = load(self.part)
            if begun["command"] == command and begun.get("machine") == description():
                self.cases = begun["cases"]

    def find(self, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved cases under the condition of the wanted cases.

        If a drafter's weights have changed since, they are dropped, and the result is empty.
        """
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
        """Write the final file and remove the unfinished one."""
        write(self.path, {"command": self.command, **content})
        self.part.unlink(missing_ok=True)
        return self.path
