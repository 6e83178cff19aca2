"""The harness: turns, figures, and cases without figures where a text is not the target's."""

from __future__ import annotations

import pytest
import torch

from specdiff import Sampling
from specdiff.bench import harness, machine
from specdiff.bench.harness import (
    FIGURES,
    Condition,
    Setting,
    TimedRun,
    ceiling,
    compare,
    figures,
    pooled,
    quantiles,
    take_turns,
)
from specdiff.bench.methods import Method, make, parse
from specdiff.loop.stats import Stats

PROMPTS = [[5, 6, 7], [9, 8, 9, 8], [40], [3, 4]]


def fixed(name, log=None, seconds=1.0):
    """A setting that emits three tokens a prompt."""

    def decode(prompts, tokens, seed, **options):
        if log is not None:
            log.append((name, len(prompts), tokens, seed))
        return [[1, 2, 3] for _ in prompts], Stats(tokens=3 * len(prompts), row_forwards=3)

    return Setting(name, decode)


def test_settings_take_turns():
    log = []
    settings = [fixed(name, log) for name in "abc"]
    take_turns(settings, [[[1]], [[2], [3]]], 7, repetitions=2)
    assert log[:3] == [("a", 1, 4, 0), ("b", 1, 4, 0), ("c", 1, 4, 0)]  # warming up
    order = "".join(name for name, *_ in log[3:])
    assert order == "abcbcacababc"
    assert [entry[1:] for entry in log[3:] if entry[0] == "b"] == [
        (1, 7, 0), (2, 7, 1), (1, 7, 2), (2, 7, 3)
    ]  # fmt: skip
    assert [len(setting.runs) for setting in settings] == [4, 4, 4]


def stats(tokens, forwards, drafted, accepted_at, examined_at, draft=0.0, target=0.0):
    made = Stats(forwards, forwards, tokens, drafted, sum(accepted_at))
    made.examined_at, made.accepted_at = list(examined_at), list(accepted_at)
    made.seconds.update(draft=draft, target=target)
    return made


def test_figures_by_hand():
    plain, own = fixed("plain"), fixed("own")
    plain.runs = [TimedRun([[0] * 10], 2.0, stats(10, 10, 0, [], [], target=1.0)) for _ in range(2)]
    own.runs = [
        TimedRun([[0] * 10], 1.0, stats(10, 6, 12, [3, 1], [6, 3], draft=0.2, target=0.6)),
        TimedRun([[0] * 10], 0.5, stats(10, 5, 10, [4, 1, 0], [5, 4, 1], draft=0.1, target=0.5)),
    ]
    found = figures(own, plain, own.runs)
    assert found["emitted"] == 20 and found["tokens_per_forward"] == 20 / 11
    assert found["speedup"] == pytest.approx(quantiles([2.0, 4.0]))
    assert found["tokens_per_second"]["median"] == 15
    assert found["alpha"] == 9 / 22 and found["alpha_k"] == 9 / 11
    assert found["acceptance"] == [7 / 11, 2 / 7, 0.0]
    ms = found["ms_per_forward"]
    assert ms["draft"] == pytest.approx(300 / 11) and ms["target"] == pytest.approx(1100 / 11)
    assert ms["host"] == pytest.approx(1000 * (1.5 - 1.4) / 11)
    whole = figures(plain, plain, plain.runs)
    assert whole["alpha"] is None and whole["speedup"]["median"] == 1
    # E / (c + v), by hand
    rounds = (300 / 11 + 1100 / 11) / 100
    assert ceiling(found, whole)["speedup"] == pytest.approx(20 / 11 / rounds)


def test_pooled_is_a_sum():
    runs = [TimedRun([[1]], 1.0, stats(5, 3, 6, [2], [3], draft=0.5)) for _ in range(2)]
    whole = pooled(runs)
    assert (whole.tokens, whole.drafted, whole.accepted_at, whole.examined_at) == (10, 12, [4], [6])
    assert whole.seconds["draft"] == 1.0
    assert runs[0].stats.accepted_at == [2]  # untouched


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_compare(models, temperature):
    condition = Condition("chat", temperature, 2, PROMPTS, 10)
    methods = [parse("prompt-lookup,k=2"), parse("nonsense"), parse("transformers")]
    cases = compare(models, condition, methods, repetitions=2)
    assert [case["method"] for case in cases] == [
        "plain",
        "prompt-lookup",
        "nonsense",
        "transformers",
    ]
    plain, lookup, nonsense, theirs = cases
    assert (plain["rule"], theirs["rule"]) == (None, None)
    assert lookup["rule"] == ("block" if temperature else "token")
    assert "unknown drafter 'nonsense'" in nonsense["refused"]
    assert all(nonsense[name] is None for name in FIGURES)
    for case in (plain, lookup, theirs):
        assert case["refused"] is None and case["check"]["passed"]
        assert case["emitted"] == 2 * sum(len(PROMPTS) * [10]) or temperature
        assert case["prompts"] == 4 and case["batch"] == 2 and case["target"] == "tiny-llama"
    assert plain["speedup"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert lookup["check"]["kind"] == ("distribution" if temperature else "identical")
    assert lookup["ceiling"]["speedup"] > 0 and theirs["ms_per_forward"] is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_method_that_is_not_exact_has_no_figures(models, temperature):
    """At temperature 0 one that samples; at temperature 1 one that is greedy."""

    def wrong(method, models, sampling, batch):
        other = Sampling(0.0 if temperature else 2.0)
        return make(method, models, sampling if method.name == "plain" else other, batch)

    condition = Condition("chat", temperature, 1, PROMPTS, 24)
    cases = compare(models, condition, [parse("prompt-lookup,k=2")], repetitions=3, make=wrong)
    assert cases[0]["refused"] is None
    assert cases[1]["refused"] == cases[1]["check"]["reason"] and not cases[1]["check"]["passed"]
    assert all(cases[1][name] is None for name in FIGURES)


def test_nothing_is_a_speedup_over_plain_decoding_that_is_not_exact(models):
    """Here it is greedy in place of sampled; the others are right."""

    def wrong(method, models, sampling, batch):
        return make(method, models, Sampling() if method.name == "plain" else sampling, batch)

    condition = Condition("chat", 1.0, 1, PROMPTS, 24)
    methods = [parse("prompt-lookup,k=2"), parse("nonsense")]
    plain, lookup, nonsense = compare(models, condition, methods, repetitions=3, make=wrong)
    assert lookup["check"]["passed"] and lookup["refused"] == f"plain: {plain['refused']}"
    assert "unknown drafter 'nonsense'" in nonsense["refused"]
    assert all(case[name] is None for case in (plain, lookup) for name in FIGURES)


def test_a_batch_without_prompts(models):
    with pytest.raises(
        ValueError, match=r"batch must be in \[1, 4\], the number of prompts, got 5"
    ):
        compare(models, Condition("chat", 0.0, 5, PROMPTS, 4), [])


def test_stages_are_looked_at_once_more_on_a_gpu():
    """There the host looks every few rounds; stages have no times but in runs of their own."""
    seen = []

    def decode(prompts, tokens, seed, **options):
        seen.append(options)
        return [[1]], stats(1, 1, 0, [], [], target=1.0)

    setting = Setting("x", decode)
    setting.runs = [TimedRun([[1]], 1.0, stats(1, 1, 0, [], [], target=1.0))]
    condition = Condition("chat", 0.0, 1, [[1], [2]], 1)
    assert harness.staged(setting, condition, torch.device("cpu")) is setting.runs
    assert len(harness.staged(setting, condition, torch.device("cuda"))) == 2
    assert seen == [{"look_every": 1, "capture": False}] * 2


@pytest.mark.parametrize("before", [0, 1 << 22])
def test_peak_memory(before):
    """Whatever was held or freed before, and what is freed inside counts for nothing."""
    for count in (before, 1 << 20, 1 << 20):
        with machine.peak_memory(torch.device("cpu")) as peak:
            for _ in range(3):
                torch.ones(count)
        assert peak.megabytes == 4 * count / 1e6


def test_peaks_do_not_depend_on_the_order_of_methods(models):
    """Memory that one method has freed is not there for the next one."""
    condition = Condition("chat", 0.0, 1, PROMPTS[:1], 24)
    large, small = parse("prompt-lookup,k=8"), parse("prompt-lookup,k=1")
    orders = ([large, small], [small, large])
    first, second = (compare(models, condition, methods) for methods in orders)
    peaks = [{case["k"]: case["peak_mb"] for case in cases} for cases in (first, second)]
    assert peaks[0] == peaks[1] and 0 < peaks[0][None] <= peaks[0][1] < peaks[0][8]


def test_plain_decoding_is_added_once(models):
    condition = Condition("chat", 0.0, 1, PROMPTS[:1], 4)
    cases = compare(models, condition, [Method("plain"), parse("prompt-lookup,k=1")])
    assert [case["method"] for case in cases] == ["plain", "prompt-lookup"]
