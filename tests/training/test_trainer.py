"""The training loop: what a step does follows from the seed and its number alone."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from specdiff.training.distillation import Distillation
from specdiff.training.objective import Objective
from specdiff.training.recipe import Recipe
from specdiff.training.trainer import Trainer, batches_of, choose, decaying_average, make_optimizers

from .conftest import TEXTS

RECIPE = Recipe(steps=20, batch=8, learning_rate=1e-2, ema=0.8)
MUON = dataclasses.replace(RECIPE, matrices="muon", vector_learning_rate=2e-2)
HEAD = {"head_rank": 5}


@pytest.fixture
def new_trainer(teacher, new_network):
    def make(recipe: Recipe = RECIPE, **more) -> Trainer:
        rows, network = torch.arange(TEXTS), new_network("parallel", **more)
        objective = Objective(anchors=6)
        return Trainer(Distillation(network, teacher, rows[16:], rows[:16], objective), recipe)

    return make


@pytest.mark.parametrize(
    ("recipe", "more"), [(RECIPE, {}), (RECIPE, HEAD), (MUON, HEAD)], ids=["", "head", "muon, head"]
)
def test_resumed_training_has_the_same_losses_and_weights(new_trainer, tmp_path, recipe, more):
    straight = new_trainer(recipe, **more)
    want = [straight.train_step() for _ in range(7)]
    first = new_trainer(recipe, **more)
    got = [first.train_step() for _ in range(4)]
    first.save(tmp_path / "checkpoint.safetensors")
    second = new_trainer(recipe, **more)
    second.resume(tmp_path / "checkpoint.safetensors")
    assert got + [second.train_step() for _ in range(3)] == want
    for a, b in zip(straight.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_what_cannot_be_resumed_is_refused(new_trainer, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    trainer = new_trainer()
    trainer.train_step()
    trainer.save(path)
    with pytest.raises(ValueError, match=r"was made with seed = 0: use the same settings"):
        new_trainer(dataclasses.replace(RECIPE, seed=1)).resume(path)
    tensors = load_file(path)
    about = {"step": "1", "recipe": json.dumps(dataclasses.asdict(RECIPE))}
    save_file({k: v for k, v in tensors.items() if k != "network.mask"}, path, about)
    with pytest.raises(ValueError, match=r"is from another network \(mask differs\)"):
        new_trainer().resume(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a training checkpoint"):
        new_trainer().resume(path)


def test_accumulated_steps_are_those_of_the_whole_batch(new_trainer):
    """Up to the rounding of fp32 sums in another order: AdamW divides small gradients by their own
    size, so weights may differ by a little of a step's length, 0.01, and losses far less."""
    whole, parts = new_trainer(), new_trainer(dataclasses.replace(RECIPE, accumulate=4))
    for _ in range(5):
        assert whole.train_step() == pytest.approx(parts.train_step(), rel=1e-4)


def test_a_batch_follows_from_the_step(conversations):
    rows, recipe = torch.arange(3, TEXTS), Recipe(batch=6, seed=4)
    lengths = conversations.length[rows]
    per_epoch = len(rows) // 6
    epoch = [choose(rows, lengths, recipe, step) for step in range(per_epoch)]
    assert torch.equal(choose(rows, lengths, recipe, 2), epoch[2])
    seen = torch.cat(epoch)
    assert len(seen.unique()) == len(seen) == 6 * per_epoch and (seen >= 3).all()
    spread = max(int(conversations.length[batch].diff().abs().max()) for batch in epoch)
    assert spread <= 8  # neighbours by length, of lengths 15 to 30
    assert not torch.equal(choose(rows, lengths, recipe, per_epoch), epoch[0])


def test_no_text_is_left_out_for_its_length():
    """Texts that fill no batch are left out by chance, also where one pool holds all."""
    rows, recipe = torch.arange(20), Recipe(batch=16, seed=1)
    chosen = torch.cat([choose(rows, torch.arange(20), recipe, epoch) for epoch in range(30)])
    assert len(chosen.unique()) == 20


def test_an_epoch_is_shuffled_once(new_trainer):
    batches_of.cache_clear()
    trainer = new_trainer()
    for _ in range(7):  # 6 are an epoch
        trainer.train_step()
    assert batches_of.cache_info().misses == 2


def test_a_gradient_that_is_not_finite_is_an_error(new_trainer):
    """With a finite loss: no weight may see it."""
    trainer = new_trainer()
    weight = trainer.task.network.embed_out.weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="the gradient's norm of step 0 is"):
        trainer.train_step()
    assert torch.equal(weight, before)


def test_averaged_weights(new_trainer):
    """The decay rises from 1/10 towards its value, so that the beginning is soon forgotten."""
    trainer = new_trainer(dataclasses.replace(RECIPE, ema=0.5))
    weight = trainer.task.network.embed_out.weight
    want = weight.detach().clone()
    for n in range(12):
        trainer.train_step()
        if n == 0:
            want = weight.detach().clone()  # the first update copies
        else:
            want += (1 - min(0.5, (1 + n) / (10 + n))) * (weight.detach() - want)
    torch.testing.assert_close(trainer.network.embed_out.weight, want)
    weights = [torch.zeros(2)]
    decaying_average(0.0)(weights, [torch.ones(2)], 50)
    assert torch.equal(weights[0], torch.ones(2))


def test_rate_rises_then_falls_to_nothing():
    recipe = Recipe(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates.index(max(rates)) == 9
    assert rates[50] == pytest.approx(0.5) and rates[-1] < 1e-3


def test_rate_is_held_then_falls_to_a_share():
    recipe = Recipe(steps=100, learning_rate=2.0, warmup=0.1, hold=0.6, final=0.25)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[4] == pytest.approx(1.0) and rates[9:61] == [2.0] * 52
    assert rates[61] < 2.0 and rates[80] == pytest.approx(2 * (0.25 + 0.75 / 2))
    assert rates[100] == pytest.approx(0.5) and sorted(rates[60:], reverse=True) == rates[60:]
    assert recipe.rate(80, 8.0) == pytest.approx(4 * rates[80])
    held = Recipe(steps=100, learning_rate=2.0, hold=1.0)
    assert held.rate(99) == 2.0


def names_of(optimizer, network) -> dict[tuple[float, float], set[str]]:
    """Learning rate and weight decay -> what they are of."""
    names = {p: name for name, p in network.named_parameters()}
    return {
        (group["lr"], group["weight_decay"]): {names[p] for p in group["params"]}
        for group in optimizer.param_groups
        if group["params"]
    }


def test_what_trains_which_weight(new_network):
    network = new_network("parallel", **HEAD)
    layer = [f"layers.0.{name}.weight" for name in ("qkv", "out", "gate_up", "down")]
    ends = ["embed_in.weight", "hidden_in.weight", "embed_out.weight"]
    head = ["head.token.weight", "head.state.weight", "head.mix.weight"]
    vectors = {"mask", "bias", "layers.0.attention_norm.weight", "layers.0.mlp_norm.weight"}
    recipe = Recipe(
        learning_rate=1e-4, vector_learning_rate=1e-3, head_learning_rate=5e-3, weight_decay=0.1
    )
    matrices = {(1e-4, 0.1): {*layer, *ends, *head}}
    others = {(1e-3, 0.1): {"offset"}, (1e-3, 0.0): vectors, (5e-3, 0.0): {"head.out.weight"}}
    (adamw,) = make_optimizers(network, recipe)
    assert type(adamw) is torch.optim.AdamW and names_of(adamw, network) == matrices | others
    adamw, muon = make_optimizers(network, dataclasses.replace(recipe, matrices="muon"))
    assert type(adamw) is torch.optim.AdamW and names_of(adamw, network) == others
    assert type(muon) is torch.optim.Muon and names_of(muon, network) == matrices
    assert [group["momentum"] for group in muon.param_groups] == [0.95]


def test_adamw_alone_has_one_rate_and_decays_matrices(new_network):
    """Without a head, a step of ours is that of plain AdamW, bit for bit."""
    ours, plain = new_network("parallel"), new_network("parallel")
    recipe = Recipe(learning_rate=1e-2, weight_decay=0.1)
    wide, narrow = ([p for p in plain.parameters() if (p.ndim > 1) == is_] for is_ in (True, False))
    groups = [{"params": wide}, {"params": narrow, "weight_decay": 0.0}]
    want = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    (have,) = make_optimizers(ours, recipe)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        have.step()
        want.step()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_first_step_is_as_long_as_its_rate_says(new_trainer):
    """AdamW's first step moves a weight by the rate, where its gradient is not about 0. Muon's is
    close to an orthogonal matrix, of elements of 0.2 times the rate in the root mean square: its
    coefficients bring singular values to between 0.7 and 1.2, all but the smallest."""
    recipe = dataclasses.replace(
        MUON, weight_decay=0.0, warmup=0.2, learning_rate=1e-3, head_learning_rate=3e-3
    )
    trainer = new_trainer(recipe, **HEAD)
    network = trainer.task.network
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    trainer.train_step()
    moved = {name: p.detach() - before[name] for name, p in network.named_parameters()}
    warm = 1 / 4  # the first of four steps
    assert float(moved["bias"].abs().max()) == pytest.approx(2e-2 * warm, rel=1e-3)
    assert float(moved["head.out.weight"].abs().max()) == pytest.approx(3e-3 * warm, rel=1e-3)
    stretch = torch.linalg.svdvals(moved["embed_out.weight"]) / (1e-3 * warm * 0.2 * 32**0.5)
    assert stretch.max() < 1.25 and stretch.median() > 0.65
    assert not moved["head.mix.weight"].any()  # whose gradient is 0 while the head's W is


def test_bf16_training_follows_fp32(new_trainer):
    """bf16 keeps 8 bits: the loss, a mean of many terms, stays within 2^-6 of fp32's."""
    exact = new_trainer()
    want = [exact.train_step() for _ in range(3)]
    AcceleratorState._reset_state()  # it keeps the first precision of a process
    rough = new_trainer(dataclasses.replace(RECIPE, precision="bf16"))
    have = [rough.train_step() for _ in range(3)]
    AcceleratorState._reset_state()
    assert have != want and have == pytest.approx(want, rel=2**-6)
    assert next(rough.network.parameters()).dtype == torch.float32


def test_a_loss_that_is_not_finite_stops_the_run(new_trainer):
    trainer = new_trainer()
    with torch.no_grad():
        trainer.task.network.bias[0] = float("nan")
    before = trainer.task.network.mask.clone()
    with pytest.raises(
        FloatingPointError, match=r"loss of step 0 is nan: lower training\.learning_rate"
    ):
        trainer.train_step()
    assert torch.equal(trainer.task.network.mask, before)


@pytest.mark.parametrize(
    "field",
    [
        {"steps": 0},
        {"batch": 6, "accumulate": 4},
        {"head_learning_rate": -1.0},
        {"vector_learning_rate": -1.0},
        {"matrices": "sgd"},
        {"hold": 1.5},
        {"final": -0.1},
        {"ema": 1.0},
        {"precision": "fp8"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_bad_recipes(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))} must be"):
        Recipe(**field)


def test_more_texts_than_there_are(new_trainer):
    with pytest.raises(ValueError, match="at most the 48 texts to train on, got 64"):
        new_trainer(dataclasses.replace(RECIPE, batch=64))
