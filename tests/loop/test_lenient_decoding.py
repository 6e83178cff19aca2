"""The loop under the lenient rule: greedy text untouched, and everything spent is counted."""

from __future__ import annotations

import pytest
import torch

import specdiff.hf
from specdiff import Decoder, Sampling, Target, generate
from specdiff.drafters import Autoregressive
from specdiff_kernels import Lenience, Verified
from tests.operators import Operators
from tests.tiny import tiny_model

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 4, 5], [3]]
LENIENCES = [Lenience("lenience", 0.3), Lenience("additive", 0.01), Lenience("ensemble", 0.5)]


@pytest.fixture(scope="module")
def drafter():
    return Autoregressive(tiny_model("llama", seed=2))


def spent(decoder: Decoder, **options) -> tuple[float, list[float]]:
    """The bias that the stats of a run count, and the biases that `verify` returned."""
    with Operators() as called:
        counted = decoder.generate(PROMPTS, **options).stats.bias
    results = [result for name, result in called.results if name == "specdiff.verify.default"]
    return counted, [Verified(*result).bias.sum().item() for result in results]


@pytest.mark.parametrize("lenience", LENIENCES, ids=str)
def test_greedy_text_is_plain_decodings(target, drafter, lenience):
    plain = Decoder(target).generate(PROMPTS, max_new_tokens=20)
    got = Decoder(target, drafter, 3, "lenient", lenience=lenience).generate(
        PROMPTS, max_new_tokens=20
    )
    assert got.new_tokens == plain.new_tokens and got.stats.bias == 0


@pytest.mark.parametrize("lenience", LENIENCES, ids=str)
def test_stats_count_what_was_spent(target, drafter, lenience):
    exact = Decoder(target, drafter, 3)
    lenient = Decoder(target, drafter, 3, "lenient", lenience=lenience)
    options = {"max_new_tokens": 20, "sampling": Sampling(0.8), "seed": 1}
    counted, biases = spent(exact, **options)
    assert counted == 0 == sum(biases) and biases
    counted, biases = spent(lenient, **options)
    assert counted == pytest.approx(sum(biases), rel=1e-12) and counted > 0.01
    counted, biases = spent(lenient, **options, look_every=4)
    assert counted == pytest.approx(sum(biases), rel=1e-12) and len(biases) % 4 == 0 < len(biases)


def test_rows_may_differ_in_lenience(target, drafter):
    """The first row is as lenient as can be, the others exact."""
    amounts = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    decoder = Decoder(target, drafter, 3, "lenient", lenience=Lenience("ensemble", amounts))
    options = {"max_new_tokens": 20, "sampling": Sampling(1.0), "seed": 1}
    got = decoder.generate(PROMPTS, **options)
    exact = Decoder(target, drafter, 3).generate(PROMPTS, **options)
    assert got.new_tokens[1:] == exact.new_tokens[1:]
    assert got.new_tokens[0] != exact.new_tokens[0] and got.stats.bias > 0


def test_generate_in_one_call_and_in_transformers(target, drafter):
    how = {"rule": "lenient", "lenience": Lenience("ensemble", 0.2)}
    got = generate(target, drafter, PROMPTS[0], k=3, max_new_tokens=12, sampling=Sampling(1.0),
                   seed=5, **how)  # fmt: skip
    model = target.model
    out = model.generate(
        torch.tensor(PROMPTS[:1]), custom_generate=specdiff.hf.generate, drafter=drafter, k=3,
        max_new_tokens=12, do_sample=True, top_k=0, seed=5, return_dict_in_generate=True,
        **how,
    )  # fmt: skip
    assert out.sequences.tolist() == got.sequences
    assert out.stats.bias == got.stats.bias > 0


def test_what_is_refused(target, drafter):
    with pytest.raises(ValueError, match="lenience: rule 'lenient' needs one, got None"):
        Decoder(target, drafter, 3, "lenient")
    with pytest.raises(ValueError, match=r"only rule 'lenient' takes one, .* under rule 'block'"):
        Decoder(target, drafter, 3, "block", lenience=LENIENCES[0])
    with pytest.raises(ValueError, match=r"expected a number in \(0, 1\] for 'lenience', got 1.5"):
        generate(Target(tiny_model("llama")), drafter, PROMPTS, rule="lenient",
                 lenience=Lenience("lenience", 1.5))  # fmt: skip
