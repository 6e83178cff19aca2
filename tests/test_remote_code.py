"""No code of a folder runs and no pickle in it is opened, whatever loads it, whoever says "y"."""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, dynamic_module_utils
from typer.testing import CliRunner

import specdiff.hf
from specdiff import Target
from specdiff.bench.methods import Models, make, parse
from specdiff.cli.main import app
from specdiff.download import convert, progress_bar
from specdiff.drafters import load_drafter, network
from specdiff.drafters.ddit import DDiT, DDiTConfig
from specdiff.drafters.sedd import SEDD
from specdiff.loop.sampling import Sampling
from specdiff.models import LOCAL
from specdiff.training.corpora import read_prompts, read_texts
from tests.gguf_files import write_gguf
from tests.tiny import tiny_model, tiny_network

ROOT = Path(__file__).parents[1]
CODE = """
open({marker!r}, "w").close()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Mine(PretrainedConfig):
    model_type = "mine"
class Words(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}
HOSTILE = {"model_type": "mine", "auto_map": AUTO_MAP}
UNKNOWN = {"model_type": "mine"}
SEDD_FIELDS = {"graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}
PREFIX_FIELDS = {"model_type": next(iter(network.KINDS))}

Plant = Callable[..., Path]


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.fixture(autouse=True)
def says_yes(monkeypatch, tmp_path) -> None:
    """To every question; what would run is copied to a place of this test's own."""
    monkeypatch.setattr(builtins, "input", lambda prompt="": "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def plant(tmp_path, marker, tiny_tokenizer) -> Plant:
    """A folder with code, a pickle that is code, and files that point to both."""

    def make_folder(
        config: dict[str, Any] | None = None,
        folder: Path = tmp_path / "bad",
        tokenizer_class: str = "Words",
    ) -> Path:
        folder.mkdir(exist_ok=True)
        code = CODE.format(marker=str(marker))
        for file in ("mine.py", "custom_generate/generate.py", f"{folder.name}.py"):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(code)
        tiny_tokenizer.save_pretrained(folder)
        words = json.loads((folder / "tokenizer_config.json").read_text())
        words |= {
            "tokenizer_class": tokenizer_class,
            "auto_map": {"AutoTokenizer": [None, "mine.Words"]},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(words))
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        torch.save(Bomb(marker), folder / "pytorch_model.bin")
        return folder

    return make_folder


@pytest.fixture
def good(tmp_path, tiny_tokenizer) -> Path:
    """A target."""
    tiny_model("llama", vocab=len(tiny_tokenizer)).save_pretrained(tmp_path / "good")
    tiny_tokenizer.save_pretrained(tmp_path / "good")
    return tmp_path / "good"


@pytest.fixture
def target() -> Target:
    return Target(tiny_model("llama"))


def refused(folder: Path, rest: str) -> Any:
    """Raises an error that names the folder."""
    return pytest.raises(ValueError, match=rf"{re.escape(str(folder))} holds no usable {rest}")


def unread(folder: Path, rest: str) -> Any:
    return pytest.raises(ValueError, match=f"cannot be read from {re.escape(str(folder))}: {rest}")


# --- the trap is a trap


@pytest.mark.parametrize("trust", [{"trust_remote_code": True}, {}], ids=["trusted", "answered"])
@pytest.mark.parametrize("auto", [AutoConfig, AutoTokenizer])
def test_the_code_runs_where_it_may(plant, marker, auto, trust):
    """Where it is trusted, and where nothing is said and "y" is answered."""
    auto.from_pretrained(plant(HOSTILE if auto is AutoConfig else UNKNOWN), **trust)
    assert marker.exists()


def test_the_pickle_runs_where_it_is_opened(plant, marker):
    torch.load(plant() / "pytorch_model.bin", weights_only=False)
    assert marker.exists()


# --- every way to load


def generate(model: Any, folder: Path) -> None:
    ids = torch.tensor([[1, 2]])
    model.generate(ids, custom_generate=specdiff.hf.generate, drafter=str(folder), max_length=4)


WAYS: dict[str, tuple[dict[str, Any], Callable[[Path, Target], object]]] = {
    "target": (HOSTILE, lambda folder, target: Target.load(folder)),
    "tokenizer": (UNKNOWN, lambda folder, target: Target.load(folder)),
    "drafter": (HOSTILE, load_drafter),
    "specdiff.hf": (HOSTILE, lambda folder, target: generate(target.model, folder)),
    "SEDD": (HOSTILE | SEDD_FIELDS, load_drafter),
    "SEDD.from_pretrained": (HOSTILE, lambda folder, target: SEDD.from_pretrained(folder)),
    "prefix": (HOSTILE | PREFIX_FIELDS, load_drafter),
    "bench": (
        HOSTILE,
        lambda folder, target: Models(str(folder), torch.float32, torch.device("cpu")),
    ),
    "bench, a drafter": (
        HOSTILE,
        lambda folder, target: make(
            parse(f"{folder},k=2"), SimpleNamespace(target=target), Sampling(), 1
        ),
    ),
    "bench, an assistant": (
        HOSTILE,
        lambda folder, target: make(
            parse(f"assisted,model={folder}"),
            SimpleNamespace(untouched=target.model, dtype=target.dtype, device=target.device),
            Sampling(),
            1,
        ),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_by_name(plant, marker, target, way):
    fields, load = WAYS[way]
    folder = plant(fields)
    with refused(folder, r".*; expected config\.json"):
        load(folder, target)
    assert not marker.exists()


@pytest.mark.parametrize("load", [Target.load, load_drafter], ids=["target", "drafter"])
def test_the_error_tells_what_is_wrong(plant, target, load):
    folder = plant(HOSTILE)
    with refused(folder, r".*: it needs its own code \(auto_map\), which is never run; expected"):
        load(folder, target) if load is load_drafter else load(folder)


@pytest.mark.parametrize("kind", ["sedd", "parallel"])
@pytest.mark.parametrize("part", ["target", "initial"])
def test_training(plant, marker, good, tmp_path, monkeypatch, kind, part):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    bad = plant({"target": HOSTILE, "initial": HOSTILE | PREFIX_FIELDS}[part])
    tokens, two = np.arange(48).reshape(8, 6), np.full(8, 2)
    np.savez(tmp_path / "answers.npz", tokens=tokens, prompt_length=two, length=3 * two)
    data = 'texts = "stdlib"' if kind == "sedd" else 'conversations = "answers.npz"'
    initial = f'initial = "{bad}"' if part == "initial" else ""
    (tmp_path / "run.toml").write_text(
        f'target = "{bad if part == "target" else good}"\n'
        f'[drafter]\nkind = "{kind}"\n{initial}\n[data]\n{data}\n[training]\nsteps = 1\n'
    )
    arguments = ["train", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, input="y\n")
    assert done.exit_code == 2 and f"{bad} holds no usable" in " ".join(done.stderr.split())
    assert not marker.exists()


def test_the_command_line(plant, marker, good, tmp_path):
    """In a process of its own, with "y" on its standard input."""
    bad = plant(HOSTILE)
    command = [sys.executable, "-m", "specdiff", "generate", "--prompt", "the", "--threads", "1"]
    command += ["--target", str(good), "--drafter", str(bad)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "COLUMNS": "1000"}
    done = subprocess.run(
        command, input="y\n", capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 2, done.stderr
    said = f"error: {bad} holds no usable causal language model: it needs its own code"
    assert said in done.stderr.splitlines()[-1]
    assert "Do you wish" not in done.stdout + done.stderr
    assert not marker.exists()


def test_a_known_model_with_code_is_loaded_without_it(plant, marker, good, tiny_tokenizer):
    """As of models that transformers took over: the folder's code is left alone."""
    config = json.loads((good / "config.json").read_text())
    folder = plant(config | {"auto_map": AUTO_MAP}, good, "PreTrainedTokenizerFast")
    loaded = Target.load(folder)
    model, tokenizer = loaded.model, loaded.tokenizer
    drafter = load_drafter(folder, loaded)
    assert type(model).__module__.startswith("transformers.models.llama")
    assert type(drafter.model.model) is type(model)
    assert tokenizer("fox")["input_ids"] == tiny_tokenizer("fox")["input_ids"]
    assert not marker.exists()


def test_a_denoiser_with_code_is_loaded_without_it(plant, marker, target, tmp_path):
    sizes = dict(tokens=50, hidden_size=16, blocks=1, heads=2, cond_dim=8, length=16)
    DDiT(DDiTConfig(**sizes)).save_pretrained(tmp_path / "sedd")
    config = json.loads((tmp_path / "sedd" / "config.json").read_text())
    folder = plant(config | HOSTILE, tmp_path / "sedd")
    assert isinstance(load_drafter(folder, target), SEDD)
    assert not marker.exists()


def test_the_conversion_reads_no_code_beside_the_gguf(plant, marker, tmp_path, tiny_tokenizer):
    model = tiny_model("llama", vocab=len(tiny_tokenizer), tie_word_embeddings=True)
    folder = plant(HOSTILE)
    write_gguf(folder / "tiny.gguf", model, tiny_tokenizer)
    with progress_bar() as progress, refused(folder, r".*auto_map.*tiny\.gguf"):
        convert(folder / "tiny.gguf", tmp_path / "converted", progress)
    assert not marker.exists()


def test_nothing_else_loads():
    """Only two files ask transformers to load something, and without code."""
    found = set()
    for file in [*(ROOT / "python").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name | ast.alias):
                assert ast.unparse(node) not in ("pickle", "dill", "pipeline"), file
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.hub.load"), file
            if re.fullmatch(r"(transformers\.)?Auto\w+\.from_pretrained", called):
                found.add((file.name, called.partition(".")[0]))
                assert "**LOCAL" in map(ast.unparse, node.keywords), (file, node.lineno)
    assert found == {
        ("models.py", "AutoModelForCausalLM"),
        ("models.py", "AutoTokenizer"),
        ("download.py", "AutoTokenizer"),
    }
    assert LOCAL["trust_remote_code"] is False


# --- pickles


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    weights = tiny_model("llama").state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    torch.save(weights, folder / "adapter_model.bin")


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def named_by_index(folder: Path, index: str = "model.safetensors.index.json") -> None:
    only_pickled(folder)
    names = dict.fromkeys(tiny_model("llama").state_dict(), "pytorch_model.bin")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def named_by_config(folder: Path) -> None:
    only_pickled(folder)
    change_config(folder, transformers_weights="adapter_model.bin")


def named_by_config_and_index(folder: Path) -> None:
    named_by_index(folder, "other.safetensors.index.json")
    change_config(folder, transformers_weights="other.safetensors.index.json")


def named_by_another_config(folder: Path) -> None:
    named_by_config(folder)
    (folder / "config.json").rename(folder / "config.4.0.0.json")
    fields = {"model_type": "llama", "configuration_files": ["config.4.0.0.json"]}
    (folder / "config.json").write_text(json.dumps(fields))


def in_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def kernel_for_attention(folder: Path) -> None:
    change_config(folder, _attn_implementation={"": "someone/kernel"})


DETOURS = {
    only_pickled: "model.safetensors found in directory",
    named_by_index: r"model\.safetensors\.index\.json names pytorch_model\.bin as weights",
    named_by_config: r"config\.json names adapter_model\.bin as weights",
    named_by_config_and_index: r"other\..*index\.json names pytorch_model\.bin as weights",
    named_by_another_config: r"config\.json names adapter_model\.bin as weights",
    in_an_adapter: r"adapters \(adapter_config\.json\) are not supported",
    kernel_for_attention: "someone/kernel.*code on Hugging Face's hub: remove it",
}


@pytest.mark.parametrize("lead", DETOURS, ids=lambda lead: lead.__name__)
def test_detours_are_refused(tmp_path, target, monkeypatch, tiny_tokenizer, lead):
    """Weights that torch would read without a word, and code that is not in the folder."""
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("a pickle was opened"))
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    lead(folder)
    for load in (Target.load, lambda folder: load_drafter(folder, target)):
        with refused(folder, f".*{DETOURS[lead]}"):
            load(folder)


def test_shards_of_safetensors_are_read(tmp_path, target):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    drafter = load_drafter(tmp_path, target)
    assert torch.equal(drafter.model.model.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("kind", ["sedd", "prefix"])
def test_our_own_drafters_read_no_pickle(plant, marker, target, tmp_path, kind):
    """Where nothing but their safetensors is missing."""
    folder = tmp_path / kind
    if kind == "sedd":
        sizes = dict(tokens=50, hidden_size=16, blocks=1, heads=2, cond_dim=8, length=16)
        DDiT(DDiTConfig(**sizes)).save_pretrained(folder)
    else:
        tiny_network("parallel", torch.arange(50)).save(folder)
    plant(None, folder)
    load_drafter(folder, target)
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    with refused(folder, r".*model\.safetensors"):
        load_drafter(folder, target)
    assert not marker.exists()


# --- data sets


def test_scripts_of_data_sets_are_refused(plant, marker, tmp_path):
    folder = plant(None, tmp_path / "copy")  # which has a copy.py
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(folder / "train-00000.parquet")
    for read in (
        lambda: read_texts("openwebtext", "train", path=folder),
        lambda: read_texts("lm1b", "held_out", path=folder),
        lambda: read_prompts("cnn_dailymail", "train", path=folder),
    ):
        with unread(folder, ".*script"):
            read()
    assert not marker.exists()


def test_pickles_of_data_sets_are_refused(marker, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    torch.save(Bomb(marker), tmp_path / "1.pth")
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        tar.add(tmp_path / "1.pth", "1.pth")
    with unread(folder, ".*webdataset, not as"):
        read_texts("openwebtext", "train", path=folder)
    assert not marker.exists()


def test_a_package_that_runs_scripts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(ValueError, match=r"datasets 3\.6\.0 may run code .*expected 4\.0 or later"):
        read_texts("openwebtext", "train", path=tmp_path)
