"""benchmarks/prove_text.py finds texts equal that are, and each difference; it resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specdiff import Target, accelerate
from specdiff.bench.kept import Kept
from specdiff.drafters import Autoregressive, PromptLookup
from tests.loop.test_trees import Planted
from tests.tiny import PROMPTS, tiny_model, tiny_network

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import prove_text
    from prove_text import SETTINGS, Setting, compare, decode, first_difference, prove

NEW = 12


class Counting(Target):
    """The mutant: logits depend on how many tokens a forward has."""

    def forward(self, tokens, cache, **options):
        logits, states = super().forward(tokens, cache, **options)
        shift = torch.linspace(0, 1, logits.shape[-1])
        return logits + (tokens.shape[1] - 1) * shift, states


def compared(kind: type[Target], setting: Setting) -> dict:
    """With a drafter that is often right: a model like the target's."""
    target, like = kind(accelerate(tiny_model("llama"))), tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in like.parameters():
            parameter += 0.04 * torch.randn(parameter.shape, generator=generator)
    plain = decode(target, None, PROMPTS, NEW, setting.plain)
    drafter = Autoregressive(like) if setting.tree is None else Planted(plain_texts(plain))
    return compare(target, drafter, PROMPTS, NEW, setting, plain)


def plain_texts(new: list[list[int]]) -> list[list[int]]:
    return [[*prompt, *more] for prompt, more in zip(PROMPTS, new, strict=True)]


# chains and trees; a Planted knows rows of one batch alone
KINDS = [s for s in SETTINGS[::5] if s.tree is None] + [
    replace(s, batch=len(PROMPTS), k=6) for s in SETTINGS if s.tree is not None and s.batch == 4
]


@pytest.mark.parametrize("setting", KINDS, ids=str)
def test_texts_are_equal_unless_logits_depend_on_the_tokens_beside(setting):
    case = compared(Target, setting)
    assert case["equal"] == case["tokens"] == NEW * len(PROMPTS)
    assert case["differences"] == [] and 0 < case["accepted"] < case["drafted"]
    mutant = compared(Counting, setting)
    assert mutant["equal"] < mutant["tokens"] == case["tokens"]
    for found in mutant["differences"]:
        assert 0 <= found["token"] < NEW and found["gap"] > 0


def test_seeds_of_sampled_texts_are_their_own():
    """Else one text would be compared many times; and a greedy one knows no seed."""
    target = Target(tiny_model("llama"))
    for temperature, kinds in ((1.0, 4), (0.0, 1)):
        texts = decode(target, None, [PROMPTS[0]] * 4, NEW, Setting(temperature))
        assert len({tuple(text) for text in texts}) == kinds


def test_where_texts_part():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == first_difference([1, 2, 3], [1, 2]) == 2


def test_a_stopped_proof_resumes(tmp_path, monkeypatch):
    """What was compared is not decoded again, but by other code."""
    target, settings = Target(tiny_model("llama")), [Setting(t, 4) for t in (0.0, 1.0)]
    decoded, stop_at = [], [settings[1]]

    def spy(*args):
        setting = next(arg for arg in args if isinstance(arg, Setting))
        if setting in stop_at:
            raise KeyboardInterrupt
        decoded.append(setting)
        return decode(*args)

    def run():
        kept = Kept(tmp_path, "text", "python benchmarks/prove_text.py")
        return prove(target, PromptLookup(), PROMPTS, NEW, kept, settings)

    monkeypatch.setattr(prove_text, "decode", spy)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert decoded == [settings[0].plain, settings[0], settings[1].plain]
    stop_at.clear()
    cases = run()
    assert decoded[3:] == [settings[1]]
    assert [case["setting"] for case in cases] == [str(setting) for setting in settings]
    assert run() == cases and len(decoded) == 4
    monkeypatch.setattr(prove_text, "code_digest", lambda: "other")
    assert [case["equal"] for case in run()] == [case["equal"] for case in cases]
    assert len(decoded) == 8


@pytest.fixture
def small(tmp_path, tiny_tokenizer, monkeypatch) -> Path:
    """The script's target is a tiny one, and its results go here."""
    folder = tmp_path / "model"
    tiny_model("llama", vocab=290, context=1024).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    monkeypatch.setattr(prove_text, "TARGET", str(folder))
    drafter = tmp_path / "drafter"
    tiny_network("parallel", torch.arange(0, 290, 2), vocab=290, block=8).save(drafter)
    monkeypatch.setattr(prove_text, "DRAFTER", str(drafter))
    monkeypatch.setattr(prove_text, "weights_digest", lambda name: "tiny")
    monkeypatch.setattr(prove_text, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return tmp_path / "results"


@pytest.mark.parametrize("kind", [Target, Counting])
def test_the_exit_status_says_whether_texts_differ(small, kind, monkeypatch):
    monkeypatch.setattr(prove_text, "Target", kind)
    with pytest.raises(SystemExit) as ended:
        prove_text.main(tokens=11, prompts=2, threads=1)
    (file,) = small.glob("*/*.json")
    content = json.loads(file.read_text())
    assert content["tokens"] == 2 * 6 * len(SETTINGS) and len(content["cases"]) == len(SETTINGS)
    assert (content["equal"] == content["tokens"]) == (kind is Target)
    assert ended.value.code == (0 if kind is Target else 1)


def test_settings_are_named_apart():
    names = {str(setting) for setting in SETTINGS} | {str(setting.plain) for setting in SETTINGS}
    assert len(names) == len(SETTINGS) + 2
    assert str(replace(SETTINGS[0], block_size=16)) == "greedy, K = 4, batch 1, paged"
