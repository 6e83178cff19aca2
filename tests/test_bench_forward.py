"""What benchmarks/bench_forward.py says of its figures, on tiny models; no time matters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer

from specdiff import Target
from specdiff.loop.fast_layers import is_accelerated
from tests.tiny import tiny_model

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import bench_forward
    import tables
    from bench_forward import TOKENS, WAYS


class Alone(Target):
    """Logits depend on a token alone."""

    def forward(self, tokens, cache, *, layers=()):
        super().forward(tokens, cache, layers=layers)  # which writes to the cache
        return self.head.weight[tokens], torch.empty(0)


class Counting(Alone):
    """The mutant: in a forward of several tokens one bit of one logit of the last is another."""

    def forward(self, tokens, cache, *, layers=()):
        logits, states = super().forward(tokens, cache, layers=layers)
        if tokens.shape[1] > 1:
            logits.view(torch.int32)[0, -1, 7] ^= 1
        return logits, states


@pytest.mark.parametrize("kind", [Alone, Counting])
def test_same_bits_are_called_so_and_no_others(kind):
    targets = {"untouched": Alone(tiny_model("llama")), "accelerated": kind(tiny_model("llama"))}
    with bench_forward.console.capture() as said:
        found = bench_forward.measure_differences(targets, torch.arange(40))
    *_, untouched, accelerated = (
        x for x in said.get().splitlines() if "touched" in x or "acc" in x
    )
    assert "same bits" in untouched
    assert ("same bits" in accelerated) == (kind is Alone)
    assert (found["accelerated"]["alone_or_among_9"] == 0) == (kind is Alone)


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_read_once(tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    reading = bench_forward.Reading(Target(model))
    own = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert reading.count == sum(own.values()) == sum(map(len, reading.pieces))
    assert len(own) == len(model.state_dict()) - tied
    assert reading.times().keys() == {"all", "half"}


def test_each_round_begins_with_another_turn():
    order = []

    def turn(name):
        def run():
            order.append(name)
            return {"it": float(len(order))}

        return run

    ms = bench_forward.medians({name: turn(name) for name in "abc"}, rounds=4, dropped=1)
    assert "".join(order) == "abcbcacababc"
    assert ms["a", "it"] == 8  # of 6, 8 and 10, without the first round's 1


def test_what_is_measured_and_saved(tmp_path, tiny_tokenizer, monkeypatch):
    folder = tmp_path / "model"
    tiny_model("llama", vocab=290, context=512).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    saved, made = {}, []
    load = Target.load
    monkeypatch.setattr(Target, "load", lambda *a, **k: made.append(load(*a, **k)) or made[-1])
    monkeypatch.setattr(bench_forward, "save", lambda name, content: saved.update({name: content}))
    monkeypatch.setattr(bench_forward, "ROUNDS", 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with bench_forward.console.capture() as said:
        bench_forward.main(str(folder), 1, 20)
    assert [is_accelerated(target.model) for target in made] == [False, True, True]
    assert len({id(target.model) for target in made}) == len(WAYS)
    (content,) = saved.values()
    assert list(saved) == ["forward_1_model_prefix_20"]  # beside the published one
    assert f"--threads 1 --target {folder} --prefix 20" in content["command"]
    assert [(c["way"], c["tokens"]) for c in content["cases"]] == [
        (way, q) for way in WAYS for q in TOKENS
    ]
    assert [(c["way"], c["tokens"]) for c in content["prompt"]] == [(way, 512) for way in WAYS]
    assert content["differences"].keys() == WAYS.keys() and "draft" not in content
    assert content["reading_ms"] > 0 and content["reading_half_ms"] > 0
    assert f"instructions: {content['isa']} of the kernels" in " ".join(said.get().split())
    assert json.loads(json.dumps(content)) == content
    with pytest.raises(typer.BadParameter, match=r"--prefix must be at most 479 .*, got 480"):
        bench_forward.main(str(folder), 1, 480)


def test_the_published_table_has_its_figures():
    """All rows of docs' table are among what is measured."""
    layers = tables.result("skinny_linear_1")["cases"]
    assert {case["rows"] for case in layers} <= set(TOKENS)


@pytest.mark.parametrize("slow", [None, 33, "prompt"])
def test_it_says_where_acceleration_is_slower(slow):
    ms = {"untouched": 10.0, "accelerated": 5.0, "accelerated, bf16": 4.0}
    content = {
        "cases": [{"way": w, "tokens": q, "ms": ms[w]} for w in WAYS for q in TOKENS],
        "prompt": [{"way": w, "tokens": 1000, "ms": ms[w]} for w in WAYS],
    }
    for case in content["cases"] + content["prompt"]:
        if case["way"] == "accelerated" and case["tokens"] == (1000 if slow == "prompt" else slow):
            case["ms"] = 11.0
    first, *more = bench_forward.comparison(content)
    assert first.count("x") == len(TOKENS) + 1 and first.count("0.50x") >= len(TOKENS)
    what = {33: "33 new", "prompt": "a prompt of 1000"}.get(slow)
    warning = f"ACCELERATION IS SLOWER THAN UNTOUCHED: accelerated, {what} (1.10x)"
    assert more == ([] if slow is None else [warning])
