"""`specdiff train`: its file, its folder, a kill at any moment, and several processes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoTokenizer
from transformers.utils import logging

from specdiff import Target
from specdiff.drafters import load_drafter
from specdiff.drafters.ddit import DDiT, DDiTConfig
from specdiff.drafters.network import DraftNetwork
from specdiff.training.config import Answers, DenoiserShape, PrefixShape, Recipe, Texts, load_run
from specdiff.training.conversations import Conversations, split
from specdiff.training.held_out import messages
from specdiff.training.run import interruptible
from specdiff.training.run import train as train_run

from .conftest import BLOCK, PARALLEL, SEDD, VOCAB, save_target, train, write

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.fixture
def other_precision() -> Iterator[None]:
    """Accelerate has one precision a process, until it is made to forget it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def losses(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["parallel", "block-diffusion", "eagle"])
def test_the_command_makes_a_drafter(folder, model, tmp_path, kind):
    config = write(folder, f"{kind}.toml", PARALLEL.replace('"parallel"', f'"{kind}"'))
    result = train(config, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "evaluation.json").read_text())
    assert figures["steps"] == 12 and len(figures[f"K = {BLOCK}"]["acceptance"]) == BLOCK
    assert [line["step"] for line in losses(tmp_path)] == list(range(12))
    drafter = load_drafter(tmp_path, Target(model))
    assert drafter.kind == kind and drafter.network.config.draft_vocab_size == 30


@pytest.mark.parametrize("cached", ["true", "false"])
def test_a_drafter_that_reads_layers(folder, model, tmp_path, other_precision, cached):
    """With the target in bf16; the folder goes on with the same file, and with no other."""
    text = PARALLEL.replace("[data]", f"target_layers = [1, 2]\n[data]\ncache_states = {cached}")
    config = write(folder, "layers.toml", f'{text}precision = "bf16"\n')
    for more in (["--minutes", 0], []):
        result = train(config, "--out", tmp_path, *more)
        assert result.exit_code == 0, result.output
        assert ("take 0.0 GB in" in result.stderr) == (cached == "true" and bool(more))
    assert "resuming at step 1" in result.stderr
    assert (tmp_path / "states.npy").exists() == (cached == "true")
    drafter = load_drafter(tmp_path, Target(model))
    assert drafter.network.config.target_layers == (1, 2)
    for old, new, message in (
        ("[1, 2]", "[2]", "was made with drafter"),
        ('precision = "bf16"', "", "was made with precision 'bf16', not None"),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        changed = write(folder, "changed.toml", config.read_text().replace(old, new))
        refused = train(changed, "--out", tmp_path)
        assert refused.exit_code == 2 and message in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("eagle", "target_layers = [1]", "leave out target_layers and head_rank, got [1] and 0"),
        ("eagle", "head_rank = 4", "leave out target_layers and head_rank, got [] and 4"),
        ("parallel", "target_layers = [2, 1]", "from 1 to target_layer_count = 2, got [2, 1]"),
        ("parallel", "target_layers = [3]", "from 1 to target_layer_count = 2, got [3]"),
        ("parallel", "head_rank = -1", "head_rank must be at least 0, got -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_kept(
    folder, tmp_path, kind, line, message
):
    text = PARALLEL.replace('"parallel"', f'"{kind}"').replace("[data]", f"{line}\n[data]")
    refused = train(write(folder, "sizes.toml", text), "--out", tmp_path)
    assert refused.exit_code == 2 and message in " ".join(refused.output.split()), refused.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["sedd", "mdlm"])
def test_the_command_makes_a_denoiser(folder, model, tmp_path, kind):
    config = write(folder, f"{kind}.toml", SEDD.replace('"sedd"', f'"{kind}"'))
    result = train(config, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["tokens_per_forward"] >= 1 and figures["held_out_loss"] > 0
    drafter = load_drafter(tmp_path, Target(model))
    assert drafter.network.config.time_conditioned == (kind == "sedd")
    again = train(config, "--out", tmp_path)
    assert json.loads(again.stdout.splitlines()[-1]) == figures  # nothing was left to do


def test_transformers_shows_no_bars_of_its_own(folder, tmp_path):
    logging.enable_progress_bar()
    assert train(write(folder, "quiet.toml", PARALLEL), "--out", tmp_path).exit_code == 0
    assert not logging.is_progress_bar_enabled()


def test_a_run_begins_at_another_drafter(folder, tmp_path):
    first = train(write(folder, "first.toml", PARALLEL), "--out", folder / "first")
    assert first.exit_code == 0, first.output
    text = PARALLEL.replace("block = 4", 'block = 8\ninitial = "first"').replace(
        "learning_rate = 1e-2", "learning_rate = 0.0"
    )
    result = train(write(folder, "second.toml", text), "--out", tmp_path)
    assert result.exit_code == 0, result.output
    old, new = (load_file(f / "model.safetensors") for f in (folder / "first", tmp_path))
    assert new["offset"].shape[0] == 7 and torch.equal(new["offset"][:3], old["offset"])
    assert torch.equal(new["embed_out.weight"], old["embed_out.weight"])


def test_a_head_is_added_to_a_drafter_that_has_none(folder, tmp_path):
    """It begins without effect: W = 0, and factors of a standard deviation of 0.01."""
    first = train(write(folder, "plain.toml", PARALLEL), "--out", folder / "plain")
    assert first.exit_code == 0, first.output
    text = PARALLEL.replace("block = 4", 'block = 4\nhead_rank = 6\ninitial = "plain"')
    run = load_run(write(folder, "headed.toml", text))
    still = replace(run.training, learning_rate=0.0, head_learning_rate=0.0)
    train_run(replace(run, training=still), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["head.out.weight"].shape == (30, 6) and not weights["head.out.weight"].any()
    for factor in ("token", "state", "mix"):
        assert 0.006 < weights[f"head.{factor}.weight"].float().std() < 0.014
    figures = [
        json.loads((out / "evaluation.json").read_text()) for out in (folder / "plain", tmp_path)
    ]
    assert figures[1]["K = 4"]["acceptance"] == pytest.approx(
        figures[0]["K = 4"]["acceptance"], abs=1e-2
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses_and_weights(folder, tmp_path):
    """SIGKILL between two checkpoints."""
    config = write(folder, "killed.toml", PARALLEL.replace("steps = 12", "steps = 300"))
    straight, out = tmp_path / "straight", tmp_path / "killed"
    threads = ["--threads", "1"]  # bits may depend on their number
    result = train(config, "--out", straight, *threads)
    assert result.exit_code == 0, result.output
    command = [sys.executable, "-m", "specdiff", "train", str(config), "--out", str(out), *threads]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = out / "losses.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 10):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1].decode()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    result = train(config, "--out", out, *threads)
    assert result.exit_code == 0 and "resuming at step" in result.stderr, result.output
    assert losses(out) == losses(straight)
    weights = [(f / "model.safetensors").read_bytes() for f in (straight, out)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes_train_as_one(folder, tmp_path):
    """Under torchrun: the same batches; sums of fp32 in another order, so losses to 1e-4."""
    config = write(folder, "two.toml", PARALLEL.replace("accumulate = 2", "accumulate = 1"))
    alone = train(config, "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "-m", "specdiff", "train", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    want, have = losses(tmp_path / "alone"), losses(tmp_path / "two")
    assert [line["step"] for line in have] == list(range(12))
    for a, b in zip(want, have, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


def test_minutes_stop_a_run_that_can_go_on(folder, tmp_path):
    config = write(folder, "minutes.toml", PARALLEL)
    result = train(config, "--out", tmp_path, "--minutes", 0)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["steps"] == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch = 4", "batch = 8", "was made with batch = 4"),
        ("held_out = 0.2", "held_out = 0.3", "was made with data"),
        ("anchors = 4", "anchors = 5", "was made with objective"),
        ("heads = 2", "heads = 4", "was made with drafter"),
        ('"answers.npz"', '"others.npz"', "was made with conversations"),
        ('target = "target"', 'target = "merged"', "was made with target"),
    ],
)
def test_a_folder_belongs_to_one_run(folder, tmp_path, model, conversations, old, new, message):
    arrays = {name: part.numpy() for name, part in conversations._asdict().items()}
    arrays["tokens"] = (arrays["tokens"] + 1) % VOCAB
    np.savez(folder / "others.npz", **arrays)
    merged = copy.deepcopy(model)  # as where a LoRA is merged: the head is the old one
    merged.model.layers[0].self_attn.q_proj.weight += 0.01
    merged.save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(folder / "target").save_pretrained(folder / "merged")
    first = write(folder, "minutes.toml", PARALLEL)
    assert train(first, "--out", tmp_path, "--minutes", 0).exit_code == 0
    refused = train(write(folder, "changed.toml", PARALLEL.replace(old, new)), "--out", tmp_path)
    assert refused.exit_code == 2 and message in " ".join(refused.output.split())


def test_conversations_on_held_out_prompts_are_not_trained_on(
    folder, tmp_path, model, conversations
):
    """Whatever their answers are, losses and weights stay the same."""
    words = ["Write", "a", "poem", "about", "memory", "."]
    assert "Write a poem about memory." in messages("held-out")
    ids = dict(zip(words, range(10, 16), strict=True))
    save_target(
        model,
        ids | {f"w{i}": i for i in range(VOCAB) if i not in ids.values()},
        folder / "speaking",
    )
    rows, outs = torch.arange(5, 60, 5), []
    for seed in range(2):
        tokens, prompt_length, length = (part.clone() for part in conversations)
        generator = torch.Generator().manual_seed(seed)
        tokens[rows] = torch.randint(3, VOCAB, tokens[rows].shape, generator=generator)
        tokens[rows, :6], prompt_length[rows] = torch.arange(10, 16), 6
        data = Conversations(tokens, prompt_length, length)
        assert set(rows.tolist()) <= set(split(data, 0.2)[0].tolist())
        np.savez(folder / f"{seed}.npz", **{k: v.numpy() for k, v in data._asdict().items()})
        text = PARALLEL.replace('"target"', '"speaking"').replace("answers.npz", f"{seed}.npz")
        result = train(write(folder, f"{seed}.toml", text), "--out", tmp_path / str(seed))
        assert result.exit_code == 0, result.output
        assert (
            "skipping 11 conversations whose prompts are held out for benchmarks" in result.stderr
        )
        outs.append(tmp_path / str(seed))
    assert losses(outs[0]) == losses(outs[1])
    weights = [(out / "model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1]
    kept = json.loads((outs[1] / "settings.json").read_text())
    assert kept.pop("left_out") == 11  # as in a folder of a version that trained on them
    (outs[1] / "settings.json").write_text(json.dumps(kept))
    refused = train(folder / "1.toml", "--out", outs[1])
    assert refused.exit_code == 2 and "was made with left_out None, not 11" in refused.output


@pytest.mark.parametrize("what", ["tokens", "kind"])
def test_a_denoiser_begins_at_one_of_its_kind(folder, tmp_path, what):
    """It is refused before the training, not after."""
    tokens = VOCAB + (what == "tokens")
    network = DDiT(DDiTConfig(tokens, 32, 1, 2, 16, 40, time_conditioned=what == "tokens"))
    network.save_pretrained(folder / what)
    text = SEDD.replace('"sedd"', f'"sedd"\ninitial = "{what}"')
    refused = train(write(folder, f"{what}.toml", text), "--out", tmp_path)
    said = " ".join(refused.output.split())
    assert refused.exit_code == 2 and f"with {tokens} tokens; expected kind 'sedd' with" in said


def test_muon_is_for_distillation(folder):
    config = write(folder, "muon.toml", SEDD + 'matrices = "muon"\n')
    with pytest.raises(ValueError, match=r"training\.matrices must be 'adamw' for .* 'sedd'"):
        load_run(config)


def test_an_objective_is_for_distillation(folder):
    config = write(folder, "objective.toml", SEDD + "\n[objective]\nanchors = 3\n")
    with pytest.raises(ValueError, match=r"drafter\.kind = 'sedd' takes no \[objective\]"):
        load_run(config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_can_be_read(config):
    run = load_run(config)
    assert isinstance(run.training, Recipe)
    assert (type(run.drafter), type(run.data)) in (
        (PrefixShape, Answers),
        (DenoiserShape, Texts),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["parallel", "block-diffusion", "eagle", "sedd", "mdlm"])
def test_training_on_a_gpu(folder, model, tmp_path, kind):
    """In bf16, with FlexAttention's block masks, from the start and from a checkpoint."""
    text = SEDD if kind in ("sedd", "mdlm") else PARALLEL
    text = text.replace('"parallel"', f'"{kind}"').replace('"sedd"', f'"{kind}"')
    config = write(folder, f"gpu-{kind}.toml", f'{text}precision = "bf16"\n')
    command = [sys.executable, "-m", "specdiff", "train", str(config), "--out", str(tmp_path)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "false"}
    for more in (["--minutes", "0"], []):
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert "resuming at step 1" in done.stderr
    assert all(line["loss"] > 0 for line in losses(tmp_path))
    assert load_drafter(tmp_path, Target(model.to("cpu"))).vocab_size == VOCAB


# --- better than another, interrupted, averaged ---


def test_a_drafter_is_written_only_if_it_is_better(folder, tmp_path):
    """Trained longer, it is better than after no step at all; than itself it is not."""
    short = write(folder, "short.toml", PARALLEL.replace("steps = 12", "steps = 1"))
    longer = write(folder, "longer.toml", PARALLEL.replace("steps = 12", "steps = 60"))
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert train(short, "--out", first).exit_code == 0
    result = train(longer, "--out", second, "--better-than", first)
    assert result.exit_code == 0, result.output
    gain = json.loads(result.stdout.splitlines()[-1])["gain"]
    assert gain["tokens"] > 2 * gain["standard_error"] > 0 and "written" in result.stderr
    assert (second / "model.safetensors").is_file()
    result = train(longer, "--out", third, "--better-than", second)
    gain = json.loads(result.stdout.splitlines()[-1])["gain"]
    assert gain["tokens"] == pytest.approx(0, abs=1e-3)  # fp16 on disk
    assert "not written, as the gain is within two standard errors" in result.stderr
    assert not (third / "model.safetensors").exists()
    assert (third / "checkpoint.safetensors").is_file() and (third / "evaluation.json").is_file()


def test_ctrl_c_ends_a_run_as_a_limit_of_minutes_does(folder, tmp_path):
    """At the end of its step: what was learnt is judged and written before the interrupt reaches
    the caller, and the same call goes on."""
    config = load_run(write(folder, "c.toml", PARALLEL))
    stepped = []

    def interrupt(optimizer, *_):
        stepped.append(id(optimizer))
        if stepped[0] == stepped[-1] and stepped.count(stepped[0]) == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    hook = register_optimizer_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run(config, tmp_path / "a")
    hook.remove()
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text())["steps"] == 5
    assert (tmp_path / "a" / "model.safetensors").is_file()
    assert signal.getsignal(signal.SIGINT) is before
    assert train_run(config, tmp_path / "a")["steps"] == 12
    train_run(config, tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_second_ctrl_c_stops_at_once():
    """By the handler that was there before, which is Python's own where nobody changed it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interruptible(Console(stderr=True)) as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_runs_of_one_start_are_averaged(folder, tmp_path):
    start = tmp_path / "start"
    assert train(write(folder, "start.toml", PARALLEL), "--out", start).exit_code == 0
    text = PARALLEL.replace('kind = "parallel"', f'kind = "parallel"\ninitial = "{start}"')
    runs = []
    for seed in (1, 2):
        config = write(folder, f"s{seed}.toml", text + f"seed = {seed}\n")
        runs.append(tmp_path / f"{seed}")
        assert train(config, "--out", runs[-1]).exit_code == 0
    mean = tmp_path / "mean"
    result = train(config, "--average", *runs, "--out", mean, "--better-than", start)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["average"] == [str(run) for run in runs] and "gain" in figures
    assert not (mean / "states.npy").exists() and not (mean / "losses.jsonl").exists()
    assert (mean / "model.safetensors").exists() == (
        figures["gain"]["tokens"] > 2 * figures["gain"]["standard_error"]
    )
    assert train(config, "--average", *runs, "--out", mean).exit_code == 0
    drafters = [DraftNetwork.load(path) for path in (*runs, mean)]
    for one, other, both in zip(*(d.parameters() for d in drafters), strict=True):
        torch.testing.assert_close(both, (one + other) / 2, rtol=1e-3, atol=1e-4)  # fp16


@pytest.mark.parametrize(
    "options", [("--better-than", "elsewhere"), ("--average", "elsewhere", "elsewhere")]
)
def test_a_denoiser_is_not_compared(folder, tmp_path, options):
    result = train(write(folder, "sedd.toml", SEDD), "--out", tmp_path, *options)
    assert result.exit_code == 2
    assert "is for drafters that read the target's states" in " ".join(result.stderr.split())
