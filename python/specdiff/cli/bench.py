"""`specdiff bench`: measure decoding methods, reproduce the paper's tables, draw the results."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console

from .options import (
    SETTINGS,
    Dtype,
    NoAccelerate,
    Threads,
    Type,
    Where,
    at_least,
    placed,
    user_errors,
)

if TYPE_CHECKING:
    import torch

    from ..bench.experiments import Grid
    from ..bench.kept import Kept
    from ..bench.methods import Models

AUTO = "auto"
PLACES = ("results", "name")  # options without effect on the figures
app = typer.Typer(
    help="Measure complete decoding runs and write JSON files. A run whose text differs from "
    "plain decoding's is not counted.",
    **SETTINGS,
)

Targets = Annotated[list[str], typer.Option("--target", help="A known model's name, or a folder.")]
Methods = Annotated[
    list[str],
    typer.Option(
        "--method",
        help="plain, plain-compiled, plain-captured; transformers, transformers-lookup,k=10, "
        "assisted,model=FOLDER; or a drafter, as in `specdiff generate`. A drafter may be "
        "followed by ,k= ,steps= ,rule=.",
    ),
]
Tasks = Annotated[str, typer.Option("--task", help="chat, held-out, summarise, continue or short.")]
Corpus = Annotated[
    str | None,
    typer.Option(help="Texts to use instead of the task's: sotu, stdlib, or a folder."),
]
CorpusPath = Annotated[Path | None, typer.Option(help="A local copy of the task's corpus.")]
Temperatures = Annotated[str, typer.Option("--temperature", help="0 is greedy.")]
Ks = Annotated[
    str | None, typer.Option("--k", help="Draft length; or auto. A method's own ,k= wins.")
]
Steps = Annotated[
    str | None, typer.Option("--steps", help="Reverse steps; or auto. A method's own wins.")
]
Batch = Annotated[str, typer.Option(help="Sequences decoded in one batch.")]
Contexts = Annotated[
    str | None, typer.Option("--context", help="Prompt length in tokens; default: the task's.")
]
Tokens = Annotated[int | None, typer.Option(help="New tokens; default: the task's number.")]
Count = Annotated[int, typer.Option("--prompts", help="Prompts of each task.")]
Repetitions = Annotated[int, typer.Option(help="How often to measure each case.")]
Results = Annotated[Path, typer.Option(help="Results go to a subfolder named after the machine.")]
Name = Annotated[str | None, typer.Option(help="File name; default: the varied options.")]
Context = Annotated[int | None, typer.Option(help="Prompt length in tokens.")]


@dataclass(frozen=True)
class Size:
    """Options of what is decoded in each case."""

    tokens: Tokens = None
    prompts: Count = 16
    repetitions: Repetitions = 3
    corpus: Corpus = None
    corpus_path: CorpusPath = None

    def __post_init__(self) -> None:
        positive(tokens=self.tokens, prompts=self.prompts, repetitions=self.repetitions)


@dataclass(frozen=True)
class Place:
    """Options of where decoding runs, and where its results go."""

    results: Results = Path("results")
    name: Name = None
    device: Where = None
    dtype: Type = Dtype.float32
    threads: Threads = None

    def kept(self, name: str, invoked: typer.Context, device: torch.device) -> Kept:
        """The file of results: under the name that was given, or else under this one."""
        from ..bench.kept import Kept

        if self.name and self.name != Path(self.name).name:
            raise ValueError(f"--name must be a file's name without folders, got {self.name!r}")
        try:  # rather now than after all has been measured
            self.results.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--results must be a folder, got {self.results}: {error.strerror}"
            ) from error
        return Kept(self.results, self.name or name, typed(invoked), device)


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the fields of Size and Place as options, in place of a parameter for all."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        own = get_type_hints(groups[parameter.name], include_extras=True)
        parameters += [
            parameter.replace(name=field.name, default=field.default, annotation=own[field.name])
            for field in fields(groups[parameter.name])
        ]

    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(run)["__signature__"] = inspect.Signature(parameters)
    return run


@app.command("run")
@user_errors()
@with_groups
def run_grid(
    invoked: typer.Context,
    target: Targets = ["smollm2-135m"],  # noqa: B006
    method: Methods = [  # noqa: B006
        "transformers",
        "prompt-lookup",
        "block-diffusion",
        "parallel",
        "eagle",
    ],
    task: Tasks = "chat",
    temperature: Temperatures = "0,1",
    k: Ks = None,
    steps: Steps = None,
    batch: Batch = "1",
    context: Contexts = None,
    *,
    size: Size,
    place: Place,
    no_accelerate: NoAccelerate = False,
) -> None:
    """Compare methods with plain decoding. Options take comma-separated values; all combinations
    are measured."""
    from ..bench.experiments import Grid, run
    from ..bench.methods import parse

    grid = Grid(
        [parse(text) for text in method],
        names(task),
        temperatures(temperature),
        [] if k is None else counts("--k", k, auto=True),
        [] if steps is None else counts("--steps", steps, auto=True),
        counts("--batch", batch),
        [None] if context is None else counts("--context", context),
        size.tokens, size.prompts, size.repetitions, size.corpus, size.corpus_path,
    )  # fmt: skip
    check(grid, target)
    where, kind = placed(place.device, place.dtype, place.threads)
    kept = place.kept(grid.kind, invoked, where)
    found = each(target, where, kind, not no_accelerate)
    finish(kept, [run(grid, models, kept=kept, show=show) for models in found])


@app.command()
@user_errors()
@with_groups
def table2(
    invoked: typer.Context,
    target: Targets = ["smollm2-135m"],  # noqa: B006
    drafter: Annotated[str, typer.Option(help="As in `specdiff generate`.")] = "block-diffusion",
    standard: Annotated[
        str | None, typer.Option(help="Folder of an autoregressive drafter such as GPT-2.")
    ] = None,
    task: Tasks = "summarise,continue",
    temperature: Temperatures = "1",
    k: Annotated[
        int | None, typer.Option("--k", help="Draft length; default: the paper's 30, 40, 45.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Reverse steps; default: the drafter's own.")
    ] = None,
    context: Context = None,
    *,
    size: Size,
    place: Place,
    no_accelerate: NoAccelerate = False,
) -> None:
    """Reproduce Table 2 of SpecDiff; with --task short, the rows of its appendix."""
    from ..bench.experiments import Grid
    from ..bench.methods import DRAFTERS, Method, check_method
    from ..bench.paper import check_tasks
    from ..bench.paper import table2 as measure

    grid = Grid(
        [], names(task), temperatures(temperature),
        contexts=[context], tokens=size.tokens, count=size.prompts, repetitions=size.repetitions,
        corpus=size.corpus, path=size.corpus_path,
    )  # fmt: skip
    positive(k=k, steps=steps, context=context)
    check_tasks(grid.tasks)
    check(grid, target)
    check_method(Method(drafter, k, steps), "--drafter", DRAFTERS)
    if standard is not None:
        check_method(Method(standard), "--standard", DRAFTERS)
    where, kind = placed(place.device, place.dtype, place.threads)
    kept = place.kept("appendix" if grid.tasks == ["short"] else "table2", invoked, where)
    found = each(target, where, kind, not no_accelerate)
    finish(
        kept, [measure(m, drafter, standard, grid, k, steps, kept=kept, show=show) for m in found]
    )


@app.command()
@user_errors()
@with_groups
def figure2(
    invoked: typer.Context,
    target: Targets = ["smollm2-135m"],  # noqa: B006
    drafter: Annotated[str, typer.Option(help="A drafter with reverse steps.")] = "block-diffusion",
    k: Annotated[int, typer.Option("--k", help="Draft length; the paper has 40.")] = 40,
    steps: Annotated[
        str, typer.Option(help="Numbers of reverse steps T to measure.")
    ] = "1,2,4,8,16,32",
    task: Tasks = "summarise",
    temperature: Temperatures = "1",
    context: Context = None,
    *,
    size: Size,
    place: Place,
    no_accelerate: NoAccelerate = False,
) -> None:
    """Reproduce Figure 2 of SpecDiff: speed-up and acceptance alpha against T."""
    from ..bench.experiments import Grid
    from ..bench.methods import DRAFTERS, Method, check_method
    from ..bench.paper import figure2 as measure

    grid = Grid(
        [], names(task), temperatures(temperature),
        steps=counts("--steps", steps), contexts=[context], tokens=size.tokens,
        count=size.prompts, repetitions=size.repetitions, corpus=size.corpus, path=size.corpus_path,
    )  # fmt: skip
    positive(k=k, context=context)
    check(grid, target)
    check_method(Method(drafter, k), "--drafter", DRAFTERS)
    where, kind = placed(place.device, place.dtype, place.threads)
    kept = place.kept("figure2", invoked, where)
    found = each(target, where, kind, not no_accelerate)
    finish(kept, [measure(models, drafter, grid, k, kept=kept, show=show) for models in found])


@app.command()
@user_errors()
@with_groups
def controlled(
    invoked: typer.Context,
    target: Annotated[list[str], typer.Option(help="gpt2-xl or gpt-neo-2.7b.")] = ["gpt2-xl"],  # noqa: B006
    task: Tasks = "summarise,continue,short",
    steps: Annotated[
        str, typer.Option(help="Numbers of reverse steps T of SEDD-small to measure.")
    ] = "1,2,4,8",
    context: Annotated[int, typer.Option(help="Prompt length in tokens.")] = 128,
    tokens: Annotated[int, typer.Option(help="New tokens of each prompt.")] = 256,
    prompts: Count = 4,
    repetitions: Repetitions = 3,
    layers: Annotated[
        int | None, typer.Option(help="Layers of every model, to save memory or time.")
    ] = None,
    *,
    place: Place,
) -> None:
    """Measure Table 2's models with random weights, at the acceptance that Table 2 reports. Costs
    are real; drafts are made up."""
    from ..bench.paper import Shape, check_tasks
    from ..bench.paper import controlled as measure
    from ..bench.shapes import check_shapes

    positive(context=context, tokens=tokens, prompts=prompts, repetitions=repetitions)
    T = counts("--steps", steps)
    check_tasks(names(task))
    check_shapes(target, layers, context)
    where, kind = placed(place.device, place.dtype, place.threads)
    kept = place.kept("controlled", invoked, where)
    contents = [
        measure(
            Shape(one, kind, where, layers), names(task), T, context=context, tokens=tokens,
            count=prompts, repetitions=repetitions, kept=kept, show=show,
        )
        for one in target
    ]  # fmt: skip
    finish(kept, contents)


@app.command()
@user_errors()
def report(
    results: Annotated[Path, typer.Argument(help="A folder of results, or one file.")],
    out: Annotated[Path, typer.Option(help="File for the page.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Also write the figures to this folder.")
    ] = None,
) -> None:
    """Write one self-contained HTML page with the tables and figures of all results in a folder."""
    from ..bench.figures import draw
    from ..bench.page import report as write

    if figures is not None and figures.is_file():
        raise ValueError(f"--figures must be a folder, got the file {figures}")
    contents = read(results)
    write([content for _, content in contents], out)
    typer.echo(out)
    if figures is not None:
        for name, content in contents:
            for path in draw(content, figures, name):
                typer.echo(path)


def read(results: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read results of `specdiff bench`, as (name, content); other files of a folder are skipped.

    The name is the file's. If several folders hold a file of that name, the folder's name precedes.
    """
    from ..bench.reading import is_content, load

    if not results.exists():
        raise ValueError(f"{results} does not exist: give a folder of results, or one file")
    files = [results] if results.is_file() else sorted(results.rglob("[!.]*.json"))
    found = [(file, content) for file in files if is_content(content := load(file))]
    stems = Counter(file.stem for file, _ in found)
    contents = [
        (file.stem if stems[file.stem] == 1 else f"{file.parent.name}_{file.stem}", content)
        for file, content in found
    ]
    if not contents:
        raise ValueError(
            f"{results} holds no results of `specdiff bench`: make some with `specdiff bench run`"
        )
    return contents


def check(grid: Grid, targets: list[str]) -> None:
    """Raise ValueError for what can be told to fail before a target is loaded."""
    from ..bench.methods import check_labels
    from ..download import MODELS, target_folder

    grid.check()
    check_labels((Path(name).name, name) for name in targets)
    for name in targets:
        if name not in MODELS:
            target_folder(name)


def positive(**given: int | None) -> None:
    """Raise ValueError for an option that is given and below 1."""
    for option, value in given.items():
        if value is not None:
            at_least(1, f"--{option}", value)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def temperatures(text: str) -> list[float]:
    """Parse comma-separated temperatures."""
    from ..loop.sampling import Sampling

    try:
        return [Sampling(float(part)).temperature for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            "--temperature must be comma-separated numbers, each 0 (greedy) or positive, got "
            f"{text!r}"
        ) from error


def counts(option: str, text: str, auto: bool = False) -> list[Any]:
    """Parse comma-separated whole numbers of at least 1; "auto" too if that is allowed."""
    try:
        found: list[Any] = [part if auto and part == AUTO else int(part) for part in names(text)]
        if all(count == AUTO or count >= 1 for count in found):
            return found
    except ValueError:
        pass
    more = f", or {AUTO}" if auto else ""
    raise ValueError(
        f"{option} must be comma-separated whole numbers of at least 1{more}, got {text!r}"
    )


def typed(invoked: typer.Context) -> str:
    """The invoked command line with all defaults, without the options in PLACES."""
    # invoked.params is in the order of the command line
    declared = [str(option.name) for option in invoked.command.params]
    options = {name: invoked.params.get(name) for name in declared if name not in PLACES}
    return given(str(invoked.info_name), **options)


def given(command: str, **options: Any) -> str:
    """The command line with these options."""
    words = ["specdiff bench", command]
    for option, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one is not False:
                said = "" if one is True else f" {one.value if isinstance(one, Enum) else one}"
                words.append(f"--{option.replace('_', '-')}{said}")
    return " ".join(words)


def each(
    targets: list[str], device: torch.device, dtype: torch.dtype, fast: bool
) -> Iterator[Models]:
    """Load the targets one by one, so that only one is in memory."""
    from ..bench.methods import Models

    for name in targets:
        yield Models(name, dtype, device, fast)


def show(cases: list[dict[str, Any]]) -> None:
    from ..bench.terminal import table

    content = {"name": "measured", "stand_in": None, "cases": cases}
    Console(width=max(110, Console().width)).print(table(content))


def finish(kept: Kept, contents: list[dict[str, Any]]) -> None:
    """Write one file with the results of all targets."""
    from ..bench.figures import FIGURES

    cases = [case for content in contents for case in content["cases"]]
    targets = ", ".join(content["target"] for content in contents)
    said = dict.fromkeys(part for c in contents for part in (c["stand_in"] or "").split("; "))
    stand_in = "; ".join(filter(None, said)) or None
    whole = {**contents[0], "target": targets, "stand_in": stand_in, "cases": cases}
    if kept.name in FIGURES:  # otherwise the name says what is varied
        whole["name"] = kept.name
    if "published" in whole:
        rows = [row for content in contents for row in content["published"]]
        whole["published"] = [row for n, row in enumerate(rows) if row not in rows[:n]]
    typer.echo(kept.finish(whole))
