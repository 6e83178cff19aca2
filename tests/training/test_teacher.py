"""The teacher's states: the model's own, on disk and off, whole after any interruption."""

from __future__ import annotations

import io
import shutil
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModelForCausalLM

from specdiff.drafters.network import DraftConfig, DraftNetwork
from specdiff.training.conversations import Conversations
from specdiff.training.distillation import Distillation, evaluate, fit_linear
from specdiff.training.objective import Objective
from specdiff.training.recipe import Recipe
from specdiff.training.teacher import BATCH, Body, Teacher, cached_states
from specdiff.training.trainer import Trainer
from tests.tiny import ALIKE, FAMILIES, tiny_model

from .conftest import SIZE, TEXTS, VOCAB

LAYERS = [(), (1, 2)]


def own_states(model, tokens: Tensor, layers) -> Tensor:
    """One text [S] by the model's whole forward, with hooks of this test's. -> [S, (n + 1) d]"""
    kept: dict[int, Tensor] = {}
    hooks = [
        model.model.layers[i - 1].register_forward_hook(
            lambda module, args, out, i=i: kept.update({i: out})
        )
        for i in layers
    ]
    with torch.no_grad():
        last = model(tokens[None], output_hidden_states=True).hidden_states[-1]
    for hook in hooks:
        hook.remove()
    return torch.cat((*(kept[i] for i in layers), last), -1)[0]


def each(model, conversations, layers) -> list[Tensor]:
    """States that should be stored of each conversation."""
    return [
        own_states(model, tokens[: length - 1], layers)
        for tokens, length in zip(conversations.tokens, conversations.length, strict=True)
    ]


def quiet() -> Progress:
    return Progress(console=Console(quiet=True))


def store(model, conversations, path: Path, **more) -> np.ndarray:
    return cached_states(model, conversations, path, quiet(), **more)


def within_f16(stored: Tensor, want: Tensor) -> bool:
    """Rounding to f16 moves a number by up to 2^-11 of it, or by 2^-25 where f16 is subnormal. An
    fp32 sum of 64 numbers of size up to 35 errs by up to 64 * 35 * 2^-24 = 1.3e-4, and batches of
    other shapes sum in another order."""
    return bool(((stored - want).abs() <= 2**-11 * want.abs() + 2**-25 + 1.3e-4).all())


@pytest.mark.parametrize("layers", LAYERS)
def test_stored_states_are_the_models_own(model, conversations, tmp_path, layers):
    """Of all conversations, one behind the other, in their order, each without its last token."""
    states = store(model, conversations, tmp_path / "states.npy", layers=layers)
    count = conversations.length - 1
    assert count.unique().numel() > 5
    assert states.shape == (int(count.sum()), (len(layers) + 1) * SIZE)
    assert states.dtype == np.float16
    parts = torch.from_numpy(states.astype(np.float32)).split(count.tolist())
    for stored, want in zip(parts, each(model, conversations, layers), strict=True):
        assert within_f16(stored, want)
    assert [path.name for path in tmp_path.iterdir()] == ["states.npy"]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("cached", [True, False])
def test_states_of_rows_end_in_zeros(model, conversations, tmp_path, layers, cached):
    states = store(model, conversations, tmp_path / "states.npy", layers=layers) if cached else None
    teacher = Teacher(model, conversations, torch.arange(VOCAB), states, layers=layers)
    rows = torch.tensor([40, 3, 17, 3])
    longest = int(conversations.length[rows].max())
    every = each(model, conversations, layers)
    for S in (longest, longest - 1, 7):
        got = teacher.states(rows, S)
        assert got.shape == (4, S, (len(layers) + 1) * SIZE) and got.dtype == torch.float32
        for row, of_row in zip(rows.tolist(), got, strict=True):
            n = min(S, len(every[row]))
            assert within_f16(of_row[:n], every[row][:n])
            assert (of_row[n:] == 0).all()


def test_streams_that_f16_cannot_hold_are_cut_off(conversations, tmp_path):
    model = tiny_model("llama", vocab=VOCAB, seed=1).requires_grad_(False)
    model.model.embed_tokens.weight[5, 3] = 1e5
    model.model.embed_tokens.weight[5, 4] = -1e5
    few = Conversations(*(part[:8].clone() for part in conversations))
    few.tokens[:, 1] = 5
    states = store(model, few, tmp_path / "states.npy", layers=(1,))
    assert np.isfinite(states).all()
    assert states.max() == 60000 and states.min() == -60000  # which f16 has


class Stop(Exception):
    """An interruption."""


@contextmanager
def watched(
    model, most: int | None = None, stop: type[BaseException] = Stop
) -> Iterator[list[int]]:
    """How many texts each forward of a model has; the one behind `most` of them is interrupted."""
    seen: list[int] = []

    def before(module, args):
        if len(seen) == most:
            raise stop
        seen.append(len(args[0]))

    handle = model.base_model.register_forward_pre_hook(before)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("hours_pass", "stop"), [(True, Stop), (False, Stop), (False, KeyboardInterrupt)]
)
def test_an_interrupted_computation_goes_on(
    model, conversations, tmp_path, monkeypatch, hours_pass, stop
):
    """To the same bytes, from where it was last saved: after each forward, never, or on Ctrl-C."""
    monkeypatch.setattr(time, "monotonic", count(step=3600 * hours_pass).__next__)
    straight, path = tmp_path / "straight.npy", tmp_path / "states.npy"
    store(model, conversations, straight, layers=(1,))
    with watched(model, most=4, stop=stop), pytest.raises(stop):
        store(model, conversations, path, layers=(1,))
    assert not path.exists()
    with watched(model) as seen:
        store(model, conversations, path, layers=(1,))
    assert sum(seen) == TEXTS - 4 * BATCH * (hours_pass or stop is KeyboardInterrupt)
    assert path.read_bytes() == straight.read_bytes()
    with watched(model) as seen:
        store(model, conversations, path, layers=(1,))
    assert not seen and len(list(tmp_path.iterdir())) == 2


def test_a_begun_file_of_another_shape_is_begun_again(model, conversations, tmp_path):
    """Such as that of a version that stored padding, too."""
    path = tmp_path / "states.npy"
    np.lib.format.open_memmap(tmp_path / "states.npy.partial", "w+", np.float16, (TEXTS, 30, SIZE))
    (tmp_path / "states.npy.progress").write_text("2")
    with watched(model) as seen:
        store(model, conversations, path)
    assert sum(seen) == TEXTS


def test_it_says_what_it_takes_and_how_far_it_is(model, conversations, tmp_path):
    console = Console(file=io.StringIO(), width=40)
    with Progress(console=console) as progress:
        cached_states(model, conversations, tmp_path / "states.npy", progress)
    tokens = int((conversations.length - 1).sum())
    said = f"the target's states of {tokens:,} tokens take 0.0 GB in {tmp_path / 'states.npy'}\n"
    assert said in console.file.getvalue()
    assert (progress.tasks[0].completed, progress.tasks[0].total) == (tokens, tokens)


def test_too_little_room_is_refused(model, conversations, tmp_path, monkeypatch):
    usage, path = namedtuple("usage", "total used free"), tmp_path / "states.npy"
    needed = 2 * int((conversations.length - 1).sum()) * 3 * SIZE
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - free, free))
    with pytest.raises(ValueError) as refused:
        store(model, conversations, path, layers=(1, 2))
    said = str(refused.value)
    assert f"{needed:,} bytes in {tmp_path}, where {free:,} are free" in said
    for way_out in ("another --out", "fewer conversations", "data.cache_states = false"):
        assert way_out in said
    assert not list(tmp_path.iterdir())
    free = needed
    store(model, conversations, path, layers=(1, 2))


def test_what_is_written_already_needs_no_room(model, conversations, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "monotonic", count(step=3600).__next__)
    usage = namedtuple("usage", "total used free")
    with watched(model, most=TEXTS // BATCH - 1), pytest.raises(Stop):
        store(model, conversations, tmp_path / "states.npy")
    size = 2 * int((conversations.length - 1).sum()) * SIZE
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, size // 2))
    store(model, conversations, tmp_path / "states.npy")


@pytest.mark.parametrize(
    "other",
    [
        np.zeros((TEXTS, 30, SIZE), np.float16),  # as a version stored them that kept padding
        np.zeros((5, SIZE), np.float16),
        np.zeros((5, SIZE), np.float32),
    ],
)
def test_other_states_are_refused(model, conversations, tmp_path, other):
    path = tmp_path / "states.npy"
    np.save(path, other)
    with pytest.raises(
        ValueError, match=r"must be float16 of shape .*, got .*: delete the file"
    ) as said:
        store(model, conversations, path)
    assert str(other.shape) in str(said.value) and str(path) in str(said.value)


def test_a_layer_that_is_not_there_is_refused(model, conversations, tmp_path):
    with pytest.raises(ValueError, match="expected numbers from 1 to 2, which the target has, got"):
        store(model, conversations, tmp_path / "states.npy", layers=(3,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES + ALIKE)
def test_bf16_computes_what_the_model_in_bf16_does(family, tmp_path):
    """Bit for bit as transformers loads it in bf16, and the model itself stays as it is.

    Beside fp32: a rounding to bf16 moves a number by up to 2^-8 of it. A layer makes 16 of them one
    behind the other (norms, products, the turn, the softmax, sums), so that two layers and the
    norms, were they independent, move a state by sqrt(40) 2^-8 = 2.5% of its length; the test
    allows the double.
    """
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    same = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(50, (3, 60), generator=torch.Generator().manual_seed(0))
    exact, half = Body(model, (1, 2)), Body(model, (1, 2), torch.bfloat16)
    got, want = half(tokens), exact(tokens)
    assert got.dtype == torch.bfloat16 and want.dtype == torch.float32
    assert torch.equal(got, Body(same, (1, 2))(tokens))
    for a, b in zip(got.float().split(32, -1), want.split(32, -1), strict=True):
        assert (a - b).norm() < 0.05 * b.norm()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_teacher_in_bf16_keeps_its_head(model, conversations):
    teacher = Teacher(model, conversations, torch.arange(VOCAB), dtype=torch.bfloat16)
    assert teacher.output.dtype == teacher.embedding.dtype == torch.float32
    states = teacher.states(torch.arange(4), 20)
    assert states.dtype == torch.float32 and torch.equal(states, states.bfloat16().float())


def networks(teacher, kind: str) -> tuple[DraftNetwork, DraftNetwork]:
    """One that reads layers, too, and one that does not; otherwise alike."""
    both = []
    for layers in ((1, 2), ()):
        shape = {"target_layers": layers, "target_layer_count": 2}
        config = DraftConfig(kind, VOCAB, SIZE, VOCAB, 32, 1, 2, 64, 4, **shape)
        network = DraftNetwork(config, torch.arange(VOCAB))
        network.initialise(teacher.embedding, torch.Generator().manual_seed(0))
        both.append(network)
    return both[0], both[1]


@pytest.mark.parametrize("kind", ["parallel", "block-diffusion"])
def test_the_linear_start_reads_the_last_state_alone(model, conversations, kind):
    """So a network that reads layers, too, starts as one that does not."""
    deep, plain = (
        Teacher(model, conversations, torch.arange(VOCAB), layers=x) for x in ((1, 2), ())
    )
    network, other = networks(deep, kind)
    rows = torch.arange(TEXTS)
    with torch.no_grad():
        network.hidden_in.weight.fill_(1.0)  # of which nothing may stay
    fit_linear(network, deep, rows)
    fit_linear(other, plain, rows)
    assert (network.hidden_in.weight[:, : 2 * SIZE] == 0).all()
    ours, theirs = dict(network.named_parameters()), dict(other.named_parameters())
    ours["hidden_in.weight"] = network.hidden_in.weight[:, 2 * SIZE :]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [
        Distillation(n, t, rows[16:], rows[:16], Objective(anchors=6)).held_out_loss(n)
        for n, t in ((network, deep), (other, plain))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # but for longer fp32 sums


@pytest.mark.parametrize("kind", ["parallel", "block-diffusion"])
def test_a_network_learns_from_layers(model, conversations, kind):
    teacher = Teacher(model, conversations, torch.arange(VOCAB), layers=(1, 2))
    network, _ = networks(teacher, kind)
    rows = torch.arange(TEXTS)
    task = Distillation(network, teacher, rows[16:], rows[:16], Objective(anchors=6))
    before = task.held_out_loss(network)
    trainer = Trainer(task, Recipe(steps=30, batch=8, learning_rate=1e-2, ema=0.0))
    while trainer.step < 30:
        trainer.train_step()
    assert task.held_out_loss(trainer.network) < before
    assert (trainer.network.hidden_in.weight[:, : 2 * SIZE] != 0).any()
    assert 1 < evaluate(trainer.network, teacher, rows[:16], 4)["tokens_per_forward"][-1] < 5
