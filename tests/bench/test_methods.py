"""Methods: how they are named, and that each decodes the target's text."""

from __future__ import annotations

import pytest
import torch

from specdiff import Decoder, Sampling, Stats
from specdiff.bench.methods import Method, counting, make, ours, parse, spread, until
from tests.tiny import tiny_network

PROMPTS = [[5, 6, 7, 5, 6]]


def test_names():
    assert parse("plain") == Method("plain")
    assert parse("block-diffusion,k=auto,steps=auto,rule=block") == Method(
        "block-diffusion", "auto", "auto", "block"
    )
    assert parse("sedd,steps=auto").k is None  # which --k may fill
    assert parse("assisted,model=a/b,k=5") == Method("assisted", 5, model="a/b")
    assert parse("models/sedd-small").label == "sedd-small"
    tree = parse("parallel,tree=16")
    assert (tree.tree, tree.label) == (16, "parallel tree 16")
    assert tree.rule_for(Sampling(1.0)) == "token" != parse("parallel").rule_for(Sampling(1.0))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("parallel,k=0", "k must be auto or at least 1"),
        ("parallel,K=2", "expected options k=, steps=, rule=, model= or tree=, got 'K=2'"),
        ("parallel,tree=0", "tree must be at least 1, got 0"),
        ("parallel,tree=auto", "tree must be at least 1, got auto"),
        ("parallel,k=auto,tree=4", "a tree needs a number k, or none"),
        ("transformers-lookup,tree=4", "only a number k"),
        ("plain,k=2", "plain decoding takes no options"),
        ("assisted,k=2", "model=FOLDER is for 'assisted'"),
        ("parallel,model=x", "'assisted', and only for it"),
        ("transformers-lookup,k=auto", "only a number k"),
        ("sedd,k=4,steps=auto", "steps=auto of 'sedd' needs k=auto, got k=4: .* give a number"),
        ("", "expected a name, then options"),
        ("parallel,eagle", "got 'eagle'; each method has a --method of its own"),
        ("parallel,rule=best", "rule must be one of token, block, greedy, coupled, got 'best'"),
        ("parallel,rule=lenient", "rule must be one of token, block, greedy, coupled, got 'lenie"),
    ],
)
def test_names_that_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse(text)


def test_methods_that_results_could_not_tell_apart_are_refused():
    with pytest.raises(ValueError, match="a/draft and b/draft would both be called 'draft'"):
        spread([parse("a/draft"), parse("b/draft")], [2], [])
    with pytest.raises(ValueError, match="a/x and b/y would both be called 'assisted'"):
        spread([parse("assisted,model=a/x"), parse("assisted,model=b/y")], [2], [])
    assert len(spread([parse("a/draft"), parse("./a/draft/,k=3")], [2], [])) == 2


def test_a_planner_chooses_k_and_steps():
    with pytest.raises(ValueError, match="steps=auto of 'sedd' needs k=auto"):
        spread([parse("sedd")], [4, "auto"], ["auto"])
    with pytest.raises(ValueError, match="got k=None"):
        spread([parse("sedd,steps=auto")], [], [])
    assert spread([parse("sedd")], ["auto"], ["auto"])[0].steps == "auto"


def test_spread():
    """Each K and T for those that say none; each method once."""
    given = [parse(text) for text in ("plain", "parallel", "sedd", "sedd,k=3", "transformers")]
    labels = [(m.name, m.k, m.steps) for m in spread(given, [2, 4], [1, 2])]
    assert labels == [
        ("plain", None, None),
        ("parallel", 2, None), ("parallel", 4, None),
        ("sedd", 2, 1), ("sedd", 2, 2), ("sedd", 4, 1), ("sedd", 4, 2),
        ("sedd", 3, 1), ("sedd", 3, 2),
        ("transformers", None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["plain", "transformers", "transformers-lookup,k=3", "assisted,k=3", "prompt-lookup,k=2",
     "prompt-lookup,k=auto", "tiny-llama,k=2", "tiny-llama,k=2,rule=block"],
)  # fmt: skip
def test_each_decodes_the_greedy_text(text, models, folder):
    text = text.replace("tiny-llama", str(folder)).replace("assisted", f"assisted,model={folder}")
    new, stats = make(parse(text), models, Sampling(), 1)(PROMPTS, 20, 0)
    plain = Decoder(models.target).generate(PROMPTS, max_new_tokens=20)
    assert new == plain.new_tokens
    assert stats.tokens == len(new[0]) and 0 < stats.target_forwards <= stats.tokens
    if "assisted" in text or "tiny" in text:  # the target itself drafts
        assert stats.target_forwards < stats.tokens


def test_trees_decode_the_greedy_text(models, tmp_path):
    V = models.target.vocab_size
    tiny_network("parallel", torch.arange(0, V, 2), vocab=V).save(tmp_path)
    plain = Decoder(models.target).generate(PROMPTS, max_new_tokens=20)
    for options in ("tree=6", "k=2,tree=6"):
        decode = make(parse(f"{tmp_path},{options}"), models, Sampling(), 1)
        assert decode(PROMPTS, 20, 0)[0] == plain.new_tokens
    assert [m.k for m in spread([parse("parallel,tree=4")], [2, 4], [])] == [None]


def test_assisted_generation_samples_with_its_seed(models, folder):
    decode = make(parse(f"assisted,model={folder},k=2"), models, Sampling(1.0), 1)
    assert decode(PROMPTS, 12, 1)[0] == decode(PROMPTS, 12, 1)[0] != decode(PROMPTS, 12, 2)[0]
    with pytest.raises(ValueError, match="one sequence at a time"):
        decode([*PROMPTS, *PROMPTS], 12, 1)


def test_plain_transformers_takes_batches(models):
    prompts = [[5, 6], [9, 8, 7, 9, 8]]
    new, stats = make(parse("transformers"), models, Sampling(), 2)(prompts, 9, 0)
    assert new == Decoder(models.target).generate(prompts, max_new_tokens=9).new_tokens
    assert stats.row_forwards == 2 * stats.target_forwards


@pytest.mark.parametrize("name", ["plain-compiled", "plain-captured"])
def test_what_needs_a_gpu_says_so(name, models):
    with pytest.raises(ValueError, match="GPU"):
        make(parse(name), models, Sampling(), 1)


def test_padding_behind_the_end_is_cut():
    assert until([4, 2, 0, 0], 2) == [4, 2]
    assert until([4, 3, 1], [7, 3]) == [4, 3]
    assert until([4, 3], None) == [4, 3]


def test_forwards_are_counted_while_asked_for(models):
    stats = Stats()
    with counting(models.untouched, stats):
        models.untouched(models.untouched.dummy_inputs["input_ids"])
    models.untouched(models.untouched.dummy_inputs["input_ids"])
    assert stats.target_forwards == 1


def test_a_calls_options_outdo_the_methods_own(models):
    """As where a method captures graphs, and stages are to be looked at one by one."""
    decode = ours(Decoder(models.target), Sampling(), look_every=4)
    assert decode(PROMPTS, 8, 0, look_every=1)[0] == decode(PROMPTS, 8, 0)[0]
    assert decode(PROMPTS, 8, 0, look_every=1)[1].seconds["target"] > 0
    assert decode(PROMPTS, 8, 0)[1].seconds["target"] == 0
