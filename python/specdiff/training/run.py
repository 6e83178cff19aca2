"""Runs a training: from its settings to a drafter's folder."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..download import target_folder
from ..drafters.ddit import DDiT, DDiTConfig
from ..drafters.network import DraftConfig, DraftNetwork
from ..drafters.sedd import MDLM, SEDD
from ..files import digest, keep_settings, model_digest, naming, read_lines, write_atomically
from ..loop.decoder import Decoder
from ..loop.sampling import Sampling
from ..loop.target import Target, stop_tokens
from ..models import load_causal, load_tokenizer
from .config import PATHS, Answers, DenoiserShape, PrefixShape, Texts, TrainingRun, of
from .conversations import (
    Conversations,
    check_tokens,
    frequent_ids,
    load_conversations,
    split,
    without,
)
from .corpora import load_rows, prepare_rows, read_texts
from .denoising import Denoising
from .distillation import Distillation, evaluate, fit_linear, judge
from .held_out import held_out_prompts
from .improvement import Gain, average, gain
from .teacher import Teacher, cached_states
from .trainer import Trainer, make_accelerator

CHECKPOINT, LOSSES, EVALUATION = "checkpoint.safetensors", "losses.jsonl", "evaluation.json"
PROMPTS, PROMPT_LENGTH, CONTINUATION = 16, 32, 32  # for trying a denoiser's drafts


class Job(NamedTuple):
    """A task, and the functions specific to its kind of drafter."""

    task: Any
    begin: Any  # () -> None, initialises the weights of a new run
    figures: Any  # network -> dict, quality of its drafts on held-out text
    save: Any  # (network, folder) -> None
    compare: Any = None  # (network, folder of another) -> Gain; None: not defined


@contextmanager
def own_matmul_precision() -> Iterator[None]:
    """Leave torch's precision of fp32 products, a setting of the process, as it was found."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@own_matmul_precision()
def train(
    run: TrainingRun,
    out: Path,
    *,
    minutes: float | None = None,
    better_than: Path | None = None,
    average: tuple[Path, Path] | None = None,
) -> dict[str, Any]:
    """Train a drafter, or resume its training. Every process of a launch must call it.

    `out` gets the drafter (config.json, model.safetensors), checkpoint.safetensors, losses.jsonl
    (a line for each step), evaluation.json, and caches computed from the data. After `minutes`, or
    on Ctrl-C, the run stops after its current step and writes all of these. A second Ctrl-C, or one
    before the first step or after the last, stops it at once. The same call resumes after each.

    Args:
        run: see `load_run`.
        out: output folder. If it holds an unfinished training of the same run, that is resumed.
        minutes: time limit; the next call resumes. None: train to the last step.
        better_than: folder of a drafter for the same target. The new drafter is written only if its
            gain in tokens per forward on held-out conversations exceeds two standard errors.
        average: folders of two drafters that were trained separately from the same start. Nothing
            is trained; the drafter is the mean of their weights.

    Returns:
        quality of the drafts on held-out text, as in evaluation.json. It is empty in all processes
        but the first.

    Raises:
        ValueError: data or weights do not fit, or the folder belongs to another run.
        FloatingPointError: the loss is not finite.
        KeyboardInterrupt: Ctrl-C was pressed. It is raised when all is written.

    Example:
        >>> train(load_run("configs/smollm2-135m-parallel.toml"), Path("out"))
    """
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(run.training)
    console = Console(stderr=True, quiet=not accelerator.is_main_process)
    if better_than is not None:
        check_comparable(run, "better_than")
        check_layers(run, better_than)  # rather now than after the training
    if average is not None:
        return averaged(run, out, average, better_than, accelerator, console)
    over = lambda: minutes is not None and time.monotonic() - began > 60 * minutes
    with resumable(out / CHECKPOINT, console):
        with progress_bars(console) as progress:
            job = prepare(run, out, accelerator, progress)
            trainer, interrupted = steps(job, run, out, accelerator, progress, over)
        figures = {}
        if accelerator.is_main_process:
            about = {"steps": trainer.step}
            figures = finish(job, trainer.network, about, out, better_than, console)
        if interrupted:
            raise KeyboardInterrupt
    return figures


def steps(
    job: Job,
    run: TrainingRun,
    out: Path,
    accelerator: Accelerator,
    progress: Progress,
    over: Callable[[], bool],
) -> tuple[Trainer, bool]:
    """Train to the last step, until `over`, or until Ctrl-C. -> trainer, whether it was Ctrl-C"""
    console, checkpoint = progress.console, out / CHECKPOINT
    goes_on = checkpoint.exists()
    if not goes_on:
        job.begin()
    # here all processes get the first one's weights
    trainer = Trainer(job.task, run.training, accelerator)
    if goes_on:
        trainer.resume(checkpoint)
        console.print(f"resuming at step {trainer.step}")
    else:
        console.print(f"held-out loss {job.task.held_out_loss(trainer.network):.4f}")
    log = Log(out / LOSSES, trainer.step, enabled=accelerator.is_main_process)
    bar = progress.add_task("training", total=run.training.steps, completed=trainer.step)
    with interruptible(console) as interrupted:
        while trainer.step < run.training.steps:
            log.write(trainer.step, trainer.train_step())
            progress.update(bar, completed=trainer.step)
            if trainer.step % run.training.save_every == 0:
                trainer.save(checkpoint)
                held_out = job.task.held_out_loss(trainer.network)
                console.print(
                    f"step {trainer.step}  loss {log.mean():.4f}  held-out {held_out:.4f}"
                )
            if trainer.agree(over() or interrupted()):
                break
        trainer.save(checkpoint)
    return trainer, interrupted()


@contextmanager
def resumable(checkpoint: Path, console: Console) -> Iterator[None]:
    """Say on Ctrl-C where the run will go on."""
    try:
        yield
    except KeyboardInterrupt:
        where = f"from {checkpoint}" if checkpoint.exists() else "with the files made so far"
        said = f"stopped; the same command goes on {where}"
        console.print(said, markup=False, soft_wrap=True)
        raise


def finish(
    job: Job,
    network: Any,
    about: dict[str, Any],
    out: Path,
    better_than: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Evaluate a drafter, and write it unless `better_than` forbids it."""
    figures = {**about, **job.figures(network)}
    for name, measured in figures.items():
        if isinstance(measured, dict) and "acceptance" in measured:
            by_position = " ".join(f"{chance:.3f}" for chance in measured["acceptance"])
            console.print(f"acceptance by position, {name}: {by_position}")
    written = True
    if better_than is not None:
        gain: Gain = job.compare(network, better_than)
        figures["gain"] = {"over": str(better_than), **gain._asdict()}
        written = gain.sure
        said = "written" if written else "not written, as the gain is within two standard errors"
        console.print(
            f"{gain.tokens:+.4f} tokens per forward over {better_than}, standard error "
            f"{gain.standard_error:.4f}: {said}"
        )
    if written:
        job.save(network, out)
    write_atomically(out / EVALUATION, (json.dumps(figures, indent=2) + "\n").encode())
    return figures


def averaged(
    run: TrainingRun,
    out: Path,
    folders: tuple[Path, Path],
    better_than: Path | None,
    accelerator: Accelerator,
    console: Console,
) -> dict[str, Any]:
    """Average two drafters, evaluate the mean and write it. Only the first process works."""
    if not accelerator.is_main_process:
        return {}
    check_comparable(run, "average")
    # only the held-out conversations of the data are read
    run = replace(run, data=replace(run.data, cache_states=False))  # type: ignore[arg-type]
    first, second = (DraftNetwork.load(folder) for folder in folders)
    mean = average(first, second)
    with progress_bars(console) as progress:
        job = prepare(run, out, accelerator, progress)
    if job.task.network.config != mean.config:
        raise ValueError(
            f"the drafters in {folders[0]} and {folders[1]} do not have the run's shape: expected "
            f"{job.task.network.config}, got {mean.config}"
        )
    about = {"average": [str(folder) for folder in folders]}
    return finish(job, mean.to(job.task.teacher.device), about, out, better_than, console)


def check_comparable(run: TrainingRun, option: str) -> None:
    """Raise ValueError unless the run's drafter is evaluated by the target's distributions."""
    if not isinstance(run.drafter, PrefixShape):
        raise ValueError(
            f"{option} is for drafters that read the target's states, got drafter.kind = "
            f"{run.drafter.kind!r}: omit it"
        )


def check_layers(run: TrainingRun, folder: Path) -> None:
    """Raise ValueError unless a folder's drafter reads the same layers of the target as the run's.

    Both are judged by the same states.
    """
    theirs = list(DraftNetwork.load(folder).config.target_layers)
    ours = list(run.drafter.target_layers)  # type: ignore[union-attr]
    if theirs != ours:
        raise ValueError(
            f"the drafter in {folder} reads target layers {theirs}, the run's drafter {ours}: "
            "expected the same layers"
        )


@contextmanager
def interruptible(console: Console) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed. A second Ctrl-C interrupts."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)
        console.print("stopping after this step; press Ctrl-C again to stop at once")

    # only the main thread gets signals
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class Log:
    """losses.jsonl: {"step": n, "loss": x} for each step.

    Args:
        path: path of the file. Lines of `step` and later steps are dropped.
        step: the next step.
        enabled: if False, nothing is written.
    """

    def __init__(self, path: Path, step: int, *, enabled: bool) -> None:
        self.recent: list[float] = []
        self.file = None
        if enabled:
            old = read_lines(path) if path.exists() else []
            kept = "".join(f"{line}\n" for line in old[:step])
            write_atomically(path, kept.encode())
            self.file = path.open("a")

    def write(self, step: int, loss: float) -> None:
        self.recent.append(loss)
        if self.file is not None:
            with naming(Path(self.file.name)):
                self.file.write(json.dumps({"step": step, "loss": loss}) + "\n")
                self.file.flush()

    def mean(self) -> float:
        """Mean loss since the last call."""
        mean, self.recent = sum(self.recent) / max(1, len(self.recent)), []
        return mean


def prepare(run: TrainingRun, out: Path, accelerator: Accelerator, progress: Progress) -> Job:
    """Prepare the job on this process's device. The first process computes the cached files."""
    folder = target_folder(run.target)
    model: Any = load_causal(folder, torch.float32)
    model.to(accelerator.device).requires_grad_(False)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(run.training.seed)  # for random weights
    if run.training.precision == "bf16":
        torch.set_float32_matmul_precision("high")  # for the teacher and the logits
    with accelerator.main_process_first():
        if isinstance(run.drafter, PrefixShape) and isinstance(run.data, Answers):
            return distillation(run, run.drafter, run.data, model, tokenizer, out, progress)
        if isinstance(run.drafter, DenoiserShape) and isinstance(run.data, Texts):
            return denoising(run, run.drafter, run.data, model, tokenizer, out)
    raise ValueError(f"{type(run.drafter).__name__} cannot be trained on {type(run.data).__name__}")


def settings(run: TrainingRun, model: Any) -> dict[str, Any]:
    """Settings that a folder's run depends on, except the recipe and paths."""
    parts = {"drafter": run.drafter, "data": run.data, "objective": run.objective}
    said = {
        name: {k: v for k, v in asdict(part).items() if k not in PATHS}
        for name, part in parts.items()
    }
    return {**said, "target": model_digest(model)}


def distillation(
    run: TrainingRun,
    shape: PrefixShape,
    data: Answers,
    model: Any,
    tokenizer: Any,
    out: Path,
    progress: Progress,
) -> Job:
    initial = None if shape.initial is None else DraftNetwork.load(shape.initial)
    vocab_size, width = model.get_input_embeddings().weight.shape
    ends = list(stop_tokens(model))
    check_draft_vocabulary(shape, vocab_size, len(set(ends)), initial)
    sizes = {k: v for k, v in asdict(shape).items() if k != "initial"}
    if shape.target_layers:
        sizes["target_layer_count"] = model.config.num_hidden_layers
    with of("[drafter]"):
        config = DraftConfig(target_vocab_size=vocab_size, target_hidden_size=width, **sizes)
    conversations = load_conversations(data.conversations)
    check_tokens(conversations, vocab_size)
    written = digest(*(part.numpy().tobytes() for part in conversations))
    free, held_out = split(conversations, data.held_out)
    precision = run.training.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows = without(held_out_prompts(tokenizer), conversations, free)
    left_out = len(free) - len(rows)
    seed = run.training.seed
    generator = torch.Generator().manual_seed(seed)
    if initial is not None:
        network = DraftNetwork(config, initial.draft_ids)
        if network.head is not None:
            network.head.initialise(generator)  # kept if the initial drafter has no head
        with of(f"drafter.initial = {shape.initial}:"):
            network.adopt(initial)
    else:
        learnt = Conversations(*(part[rows] for part in conversations))
        chosen = frequent_ids(learnt, shape.draft_vocab_size, vocab_size, ends)
        network = DraftNetwork(config, chosen)
    own = {
        "conversations": written,
        "left_out": left_out or None,
        "precision": None if precision == "no" else precision,  # precision of the states
    }
    keep_settings(out, {**settings(run, model), **own})
    if left_out:
        progress.console.print(
            f"skipping {left_out} conversations whose prompts are held out for benchmarks"
        )
    of_layers: Any = {"layers": config.target_layers, "dtype": dtype}
    states = None
    if data.cache_states:
        states = cached_states(model, conversations, out / "states.npy", progress, **of_layers)
    teacher = Teacher(model, conversations, network.draft_ids, states, **of_layers)
    network.to(teacher.device)
    task = Distillation(network, teacher, rows, held_out, run.objective, seed=seed)

    def begin() -> None:
        if initial is None:
            network.initialise(teacher.embedding, generator)
            fit_linear(network, teacher, rows)

    def figures(network: DraftNetwork) -> dict[str, Any]:
        lengths = sorted({config.k or config.block, config.block})
        return {f"K = {k}": evaluate(network, teacher, held_out, k) for k in lengths}

    def compare(network: DraftNetwork, folder: Path) -> Gain:
        other = DraftNetwork.load(folder).to(teacher.device)
        block = min(config.block, other.config.block)
        theirs = other.config.target_vocab_size, other.config.target_hidden_size
        if theirs != (vocab_size, width):
            raise ValueError(
                f"the drafter in {folder} is for a target with {theirs[0]} tokens of width "
                f"{theirs[1]}, the run's target has {vocab_size} of width {width}: compare with a "
                "drafter for the same target"
            )
        before = judge(other, teacher.drafting(other.draft_ids), held_out, block).tokens()
        return gain(before, judge(network, teacher, held_out, block).tokens())

    return Job(task, begin, figures, DraftNetwork.save, compare)


def check_draft_vocabulary(
    shape: PrefixShape, vocab_size: int, ends: int, initial: DraftNetwork | None
) -> None:
    """Raise ValueError unless the target has as many tokens as are to be drafted."""
    size = shape.draft_vocab_size
    unset = ", the default" if size == PrefixShape.draft_vocab_size else ""
    if initial is not None and size != initial.config.draft_vocab_size:
        raise ValueError(
            f"drafter.draft_vocab_size must be {initial.config.draft_vocab_size}, as in "
            f"drafter.initial = {shape.initial}, got {size}{unset}: set it under [drafter]"
        )
    if initial is None and not max(1, ends) <= size <= vocab_size:
        raise ValueError(
            f"drafter.draft_vocab_size must be from {max(1, ends)}, the tokens that end a text, to "
            f"{vocab_size}, all tokens of the target, got {size}{unset}: set it under [drafter]"
        )


def denoising(
    run: TrainingRun, shape: DenoiserShape, data: Texts, model: Any, tokenizer: Any, out: Path
) -> Job:
    network = new_denoiser(shape, model.get_input_embeddings().weight.shape[0])
    length = data.length or network.config.length
    if length > network.config.length:
        raise ValueError(
            f"data.length must be at most the drafter's length, {network.config.length}, got "
            f"{length}"
        )
    keep_settings(out, settings(run, model))
    rows = {}
    for part, share in (("train", 1.0), ("held_out", 0.1)):
        most = None if data.max_tokens is None else max(length, round(share * data.max_tokens))
        with of(f"data.texts = {data.texts}:"):
            texts = read_texts(data.texts, part, path=data.path)
            folder = prepare_rows(texts, tokenizer, length, out / part, max_tokens=most)
        rows[part] = load_rows(folder)
    task = Denoising(network, rows["train"], rows["held_out"], seed=run.training.seed)
    drafter = SEDD if network.config.time_conditioned else MDLM

    def figures(network: DDiT) -> dict[str, Any]:
        prompts = rows["held_out"][:PROMPTS, :PROMPT_LENGTH].tolist()
        decoder = Decoder(Target(model), drafter(network, block=4, steps=2))
        with torch.no_grad():
            result = decoder.generate(
                prompts, max_new_tokens=CONTINUATION, sampling=Sampling(1.0), seed=0
            )
        return {
            "held_out_loss": task.held_out_loss(network),
            "tokens_per_forward": result.stats.tokens_per_forward,
        }

    return Job(task, lambda: None, figures, DDiT.save_pretrained)


def new_denoiser(shape: DenoiserShape, tokens: int) -> DDiT:
    """A DDiT with random weights, or with a checkpoint's if kind and vocabulary size match."""
    conditioned = shape.kind == "sedd"
    if shape.initial is None:
        sizes = {k: v for k, v in asdict(shape).items() if k not in ("kind", "initial")}
        with of("[drafter]"):
            return DDiT(DDiTConfig(tokens=tokens, time_conditioned=conditioned, **sizes))
    network = DDiT.from_pretrained(shape.initial)
    config = network.config
    if (config.tokens, config.time_conditioned) != (tokens, conditioned):
        kind = "sedd" if config.time_conditioned else "mdlm"
        raise ValueError(
            f"drafter.initial = {shape.initial} is of kind {kind!r} with {config.tokens} tokens; "
            f"expected kind {shape.kind!r} with the target's {tokens} tokens"
        )
    return network
