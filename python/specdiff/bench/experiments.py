"""Experiments: measure a grid of conditions and methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from .harness import Condition, Measured, check_batch, compare, named
from .kept import Kept
from .methods import Method, Models, check_method, spread
from .tasks import TASKS, check_task, prompts

Show = Callable[[list[dict[str, Any]]], Any]
AXES = {"k": "lengths", "steps": "steps", "batch": "batch", "context": "context"}


@dataclass(frozen=True)
class Grid:
    """Values to vary. All combinations are measured.

    Attributes:
        methods: methods. Those without a K or T get each of `ks` and `steps`.
        tasks: keys of `specdiff.bench.tasks.TASKS`.
        contexts: prompt lengths in tokens; None: the task's.
        tokens: number of new tokens; None: the task's.
        count: number of prompts of each task.
    """

    methods: Sequence[Method]
    tasks: Sequence[str] = ("chat",)
    temperatures: Sequence[float] = (0.0,)
    ks: Sequence[int | str] = ()
    steps: Sequence[int | str] = ()
    batches: Sequence[int] = (1,)
    contexts: Sequence[int | None] = (None,)
    tokens: int | None = None
    count: int = 16
    repetitions: int = 3
    corpus: str | None = None
    path: Path | None = None

    @property
    def kind(self) -> str:
        """Subject of the figures: the axis that varies if there is only one, else the methods."""
        lengths = {"k": self.ks, "steps": self.steps, "batch": self.batches}
        varied = [axis for axis, values in {**lengths, "context": self.contexts}.items()
                  if len(values) > 1]  # fmt: skip
        return AXES[varied[0]] if len(varied) == 1 else "methods"

    def check(self) -> None:
        """Raise ValueError for what no target can be measured with. Nothing is loaded."""
        for method in spread(self.methods, self.ks, self.steps):
            check_method(method)
        for task in self.tasks:
            check_task(task, self.count, self.corpus, self.path)
        for batch in self.batches:
            check_batch(batch, self.count)

    def conditions(self, models: Models) -> list[Condition]:
        """All conditions of the grid. Raises ValueError if a task has too few prompts."""
        result = []
        for task, context in product(self.tasks, self.contexts):
            texts = prompts(
                task, models.tokenizer, self.count,
                corpus=self.corpus, path=self.path, context=context,
            )  # fmt: skip
            for temperature, batch in product(self.temperatures, self.batches):
                new = self.tokens or TASKS[task].tokens
                result.append(Condition(task, temperature, batch, texts, new))
        return result


def run(
    grid: Grid,
    models: Models,
    *,
    kept: Kept | None = None,
    show: Show = lambda cases: None,
) -> dict[str, Any]:
    """Measure a grid.

    Args:
        kept: stores the cases of each condition, and may hold some of an earlier run.
        show: called with the cases of each condition.

    Returns:
        name, target, repetitions and cases, in the format of the result files.

    Raises:
        ValueError: a condition or plain decoding is impossible.

    Example:
        >>> run(Grid([parse("parallel")], ks=[1, 2, 4]), models)["name"]
        'lengths'
    """
    methods = spread(grid.methods, grid.ks, grid.steps)
    cases: list[dict[str, Any]] = []
    for condition in grid.conditions(models):
        cases += once(kept, show, models, condition, methods, repetitions=grid.repetitions)
    return {
        "name": grid.kind,
        "target": models.label,
        "stand_in": None,
        "repetitions": grid.repetitions,
        "cases": cases,
    }


def once(
    kept: Kept | None,
    show: Show,
    models: Measured,
    condition: Condition,
    methods: Sequence[Method],
    **options: Any,
) -> list[dict[str, Any]]:
    """The cases of one condition, from `kept` or else by `compare`; stored and shown."""
    wanted = [named(models, condition, method) for method in methods]
    found = kept.find(wanted) if kept is not None else []
    if not found:
        found = compare(models, condition, methods, **options)
        if kept is not None:
            kept.add(found)
    show(found)
    return found
