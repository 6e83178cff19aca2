"""Published results of SpecDiff (arXiv 2408.05636), and measurements of the same rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..drafters import Autoregressive
from ..drafters.sedd import SEDD
from ..loop.decoder import Decoder
from ..loop.fast_layers import accelerate
from ..loop.sampling import Sampling
from ..loop.target import Target
from .controlled import Controlled, chance_for_share
from .experiments import Grid, Show, once, run
from .harness import Condition
from .kept import Kept
from .methods import PLAIN, Decode, Method, Models, ours
from .shapes import random_drafter, random_target


class Published(NamedTuple):
    """A row of Table 2, or of the appendix (LM1B)."""

    task: str
    target: str
    method: str  # "standard": GPT-2 drafts token by token; "specdiff": SEDD drafts
    k: int
    alpha: float
    speedup: float


PUBLISHED = [
    Published(task, target, *row)
    for task, target, *rows in (
        ("summarise", "gpt2-xl", ("standard", 5, 0.80, 2.95), ("specdiff", 40, 0.89, 7.59)),
        ("summarise", "gpt-neo-2.7b", ("standard", 5, 0.81, 4.50), ("specdiff", 40, 0.91, 8.73)),
        ("continue", "gpt2-xl", ("standard", 5, 0.76, 3.16), ("specdiff", 45, 0.89, 4.79)),
        ("continue", "gpt-neo-2.7b", ("standard", 5, 0.77, 3.38), ("specdiff", 45, 0.92, 5.50)),
        ("short", "gpt2-xl", ("standard", 5, 0.69, 1.70), ("specdiff", 30, 0.87, 2.35)),
        ("short", "gpt-neo-2.7b", ("standard", 5, 0.81, 2.47), ("specdiff", 30, 0.86, 3.25)),
    )
    for row in rows
]  # fmt: skip
ROLES = ("standard", "specdiff")  # roles of the drafters in Table 2
TASKS = tuple(dict.fromkeys(row.task for row in PUBLISHED))


def table2(
    models: Models,
    drafter: str,
    standard: str | None,
    grid: Grid,
    k: int | None,
    steps: int | None = None,
    *,
    kept: Kept | None = None,
    show: Show = lambda cases: None,
) -> dict[str, Any]:
    """Measure plain, standard speculative and SpecDiff's decoding on the paper's tasks, at its K.

    Args:
        models: the target.
        drafter: a drafter for `load_drafter`.
        standard: folder of an autoregressive drafter (GPT-2 in the paper); None: left out.
        grid: tasks, corpus and sizes. Its methods are ignored.
        k, steps: K and T of SpecDiff; None: the paper's K, and the drafter's default T.
        kept, show: as in `run`.

    Returns:
        as `run`, with the published rows. The name is "appendix" if "short" is the only task.

    Raises:
        ValueError: a task is not in the paper, or as `run`.
    """
    check_tasks(grid.tasks)
    cases: list[dict[str, Any]] = []
    for task in grid.tasks:
        (own,) = {row.k for row in PUBLISHED if row.task == task and row.method == "specdiff"}
        methods = [Method(drafter, k or own, steps)]
        if standard is not None:
            methods.insert(0, Method(standard, 5))
        part = replace(grid, methods=methods, tasks=[task])
        roles = dict(zip([method.label for method in methods], ROLES[-len(methods) :], strict=True))
        found = run(part, models, kept=kept, show=show)["cases"]
        cases += [{**case, "role": roles.get(case["method"])} for case in found]
    return {
        "name": "appendix" if list(grid.tasks) == ["short"] else "table2",
        "target": models.label,
        "stand_in": stand_in(models.label, drafter, grid.corpus),
        "repetitions": grid.repetitions,
        "cases": cases,
        "published": [called(row, models.label) for row in PUBLISHED if row.task in grid.tasks],
    }


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise ValueError for a task that is not in the paper."""
    if unknown := set(tasks) - set(TASKS):
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {', '.join(unknown)}")


def called(row: Published, target: str) -> dict[str, Any]:
    """A published row as a dict, with the target's name spelt as in the measurement."""
    return {**row._asdict(), "target": target if target.lower() == row.target else row.target}


def stand_in(target: str, drafter: str, corpus: str | None) -> str | None:
    """One line that lists the replacements for the paper's models and texts."""
    parts = []
    if target.lower() not in {row.target for row in PUBLISHED}:
        parts.append(f"{target} in place of the fine-tuned GPT-2 XL and GPT-Neo 2.7B")
    if "sedd" not in Path(drafter).name.lower():
        parts.append(f"the drafter {Path(drafter).name} in place of a fine-tuned SEDD-small")
    if corpus is not None:
        parts.append(f"texts of {Path(corpus).name} in place of the paper's")
    return "; ".join(parts) or None


def figure2(
    models: Models,
    drafter: str,
    grid: Grid,
    k: int,
    *,
    kept: Kept | None = None,
    show: Show = lambda cases: None,
) -> dict[str, Any]:
    """Measure speed-up and alpha for each T of the grid. Arguments as in `table2`."""
    content = run(replace(grid, methods=[Method(drafter, k)]), models, kept=kept, show=show)
    return {
        **content, "name": "figure2", "stand_in": stand_in(models.label, drafter, grid.corpus)
    }  # fmt: skip


READINGS = {  # readings of the paper's alpha -> conditional acceptance of each token
    "share": chance_for_share,  # alpha K of K tokens are accepted, as the paper writes
    "each": lambda alpha, k: alpha,  # as in Leviathan et al. (2211.17192)
}
DRAFTERS = {"standard": "gpt2", "specdiff": "sedd-small"}
MEMORY_SHARE = 0.75  # of the machine's memory for a target and its copies; drafters need the rest
SET = (
    "random weights of the models' shapes; drafted tokens are accepted with a set probability. "
    "share: alpha K of K tokens are accepted; each: every token with probability alpha"
)


class Shape:
    """A target of a published shape with random weights, used like `Models`.

    On a CPU its linear layers are accelerated, by packed copies if the memory suffices.

    Args:
        name, dtype, device, layers: as in `random_target`.
    """

    def __init__(
        self, name: str, dtype: torch.dtype, device: torch.device, layers: int | None = None
    ) -> None:
        model: Any = random_target(name, dtype=dtype, device=device, layers=layers)
        room = MEMORY_SHARE * physical_memory()
        self.packed = device.type != "cpu" or 2 * model.get_memory_footprint() < room
        self.target = Target(accelerate(model, packed=self.packed))
        self.name, self.device, self.layers = name, device, layers
        self.label = name if layers is None else f"{name}, {layers} layers"

    @property
    def stand_in(self) -> str:
        return SET if self.packed else f"{SET}; {self.label} without packed copies of its weights"


def physical_memory() -> int:
    """Physical memory of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def controlled(
    shape: Shape,
    tasks: Sequence[str],
    steps: Sequence[int],
    *,
    context: int,
    tokens: int,
    count: int,
    repetitions: int,
    kept: Kept | None = None,
    show: Show = lambda cases: None,
) -> dict[str, Any]:
    """Measure the rows of Table 2 with models of its shapes, at the acceptance that it reports.

    SEDD-small drafts K tokens in T steps; GPT-2 drafts five tokens one by one. Their tokens are
    replaced by tokens that are accepted with a set probability, see `Controlled`. Decoding is
    greedy.

    Args:
        shape: the target.
        tasks: tasks to take K and alpha from. The prompts are random tokens.
        steps: numbers of reverse steps T of SEDD.
        context, tokens, count: prompt length, number of new tokens, number of prompts.
        kept, show: as in `run`.

    Raises:
        ValueError: a task is not in the paper, or the texts do not fit the target's context.
    """
    check_tasks(tasks)
    prompts = random_prompts(shape.target.vocab_size, count, context)
    plain = Decoder(shape.target)
    texts = {
        tuple(prompt): plain.generate(prompt, max_new_tokens=tokens).sequences[0]
        for prompt in prompts
    }
    drafters = {
        name: random_drafter(name, shape.target, layers=shape.layers) for name in DRAFTERS.values()
    }
    cases: list[dict[str, Any]] = []
    rows = [row for row in PUBLISHED if row.target == shape.name and row.task in tasks]
    for task in dict.fromkeys(row.task for row in rows):
        own = {DRAFTERS[row.method]: row for row in rows if row.task == task}
        methods = [
            Method(f"{drafter}, {reading}", row.k, T)
            for drafter, row in own.items()
            for reading in READINGS
            for T in (steps if drafter == "sedd-small" else [None])
        ]
        condition = Condition(task, 0.0, 1, prompts, tokens)
        make = partial(make_controlled, own, drafters, texts)
        found = once(kept, show, shape, condition, methods, repetitions=repetitions, make=make)
        roles = {drafter: row.method for drafter, row in own.items()}
        cases += [{**c, "role": roles.get(c["method"].partition(", ")[0])} for c in found]
    return {
        "name": "controlled",
        "target": shape.label,
        "stand_in": shape.stand_in,
        "repetitions": repetitions,
        "cases": cases,
        "published": [row._asdict() for row in rows],
    }


def random_prompts(vocab: int, count: int, context: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (count, context), generator=generator).tolist()


def make_controlled(
    rows: dict[str, Published],
    drafters: dict[str, SEDD | Autoregressive],
    texts: dict[tuple[int, ...], list[int]],
    method: Method,
    shape: Shape,
    sampling: Sampling,
    batch: int,
) -> Decode:
    """Prepare plain decoding, or a drafter with set acceptance."""
    if method.name == PLAIN:
        return ours(Decoder(shape.target), sampling)
    name, _, reading = method.name.partition(", ")
    row, drafter = rows[name], drafters[name]
    if isinstance(drafter, SEDD) and isinstance(method.steps, int):
        drafter = SEDD(drafter.network, steps=method.steps)  # one network for every T
    chance = READINGS[reading](row.alpha, row.k)
    return ours(Decoder(shape.target, Controlled(drafter, texts, chance), row.k), sampling)
