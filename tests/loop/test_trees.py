"""Decoding with trees: what a node is given does not depend on the rest of its tree, and the text
is that of plain decoding."""

from __future__ import annotations

import random

import pytest
import torch

from specdiff import Decoder, Sampling, Target, accelerate
from specdiff.drafters.prompt_lookup import MOST, History, PromptLookup
from specdiff.loop.drafter import Drafter
from specdiff.loop.trees import behind_root, depths_of, growth_of, seen_by
from specdiff.planning.adaptive import AdaptiveK
from specdiff_kernels import Draft, Tree, commit, row_distribution
from tests.tiny import (
    ALIKE,
    DRAFTERS,
    FAMILIES,
    PROMPTS,
    block_diffusion,
    parallel,
    tiny_model,
    tiny_network,
)

EVERY = (*FAMILIES, *ALIKE)
CACHES = ({}, {"block_size": 5}, {"block_size": 16})
GROWERS = {name: DRAFTERS[name] for name in ("parallel", "block-diffusion", "prompt-lookup")}
LENGTH, NODES = 60, 11


def random_parents(draw: random.Random, B: int, Q: int) -> torch.Tensor:
    """Of the root and Q - 1 nodes behind it, [B, Q]; many are longer than the tiny windows."""
    choices = [[(q - 1, q - 1, draw.randrange(q)) for q in range(1, Q)] for _ in range(B)]
    return torch.tensor([[-1, *map(draw.choice, row)] for row in choices])


def path_to(parents: list[int], node: int) -> list[int]:
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def accelerated(family: str) -> Target:
    return Target(accelerate(tiny_model(family)))


TARGETS = {
    "cached": accelerated,
    "own": lambda family: Target(tiny_model(family)),
    "sdpa": lambda family: Target(tiny_model(family), attention="sdpa"),
    "eager": lambda family: Target(tiny_model(family), attention="eager"),
    "flex": lambda family: Target(tiny_model(family), attention="flex"),
}


@pytest.mark.parametrize("kind", CACHES, ids=str)
@pytest.mark.parametrize("attention", TARGETS)
@pytest.mark.parametrize("family", EVERY)
@torch.inference_mode()
def test_a_node_is_read_as_its_path_would_be(family, attention, kind):
    """Also after a path was accepted, whose entries then lie behind each other. Bit for bit where
    the target says so."""
    if (family == "gpt_neo") != (attention == "own") and attention != "cached":
        pytest.skip("GPT-Neo has its own attention alone, and others have it by name")
    if attention == "flex" and (family != "mistral" or kind):
        pytest.skip("on a CPU it is slow, and makes no difference between these")
    target = TARGETS[attention](family)
    draw, B = random.Random(family + attention), 3
    texts = torch.tensor([[draw.randrange(50) for _ in range(LENGTH)] for _ in range(B)])
    counts = torch.tensor([4, 17, 9])
    cache = target.new_cache(B, LENGTH + NODES, **kind)
    target.prefill(texts, counts, cache)
    rows = [row[:n].tolist() for row, n in zip(texts, counts.tolist(), strict=True)]
    for _ in range(3):
        parents = random_parents(draw, B, NODES)
        tokens = torch.tensor([[draw.randrange(50) for _ in range(NODES)] for _ in range(B)])
        lengths = torch.tensor([len(row) for row in rows])
        cache.set_lengths(lengths, int(lengths.max()))
        logits, states = target.forward(tokens, cache, parents=parents)
        chosen = torch.full((B, NODES), -1)
        for b, row in enumerate(rows):
            for node in range(NODES):
                path = path_to(parents[b].tolist(), node)
                fresh = target.new_cache(1, LENGTH)
                read = torch.tensor([row + tokens[b, path].tolist()])
                expected, own = target.forward(read, fresh)
                if target.inconsistency is None:
                    assert torch.equal(logits[b, node], expected[0, -1])
                    assert torch.equal(states[b, node], own[0, -1])
                else:
                    torch.testing.assert_close(logits[b, node], expected[0, -1])
            path = path_to(parents[b].tolist(), draw.randrange(NODES))
            chosen[b, : len(path)] = torch.tensor(path)
            row += tokens[b, path].tolist()
        emitted = torch.where(chosen >= 0, 0, -1)
        result = commit(lengths, emitted, path=chosen, caches=cache.stores(), pages=cache.pages)
        assert result.lengths.tolist() == [len(row) for row in rows]


class Planted(Drafter):
    """Random trees in which the path of known texts is hidden, or a part of it."""

    vocab_size, block, grows = None, 6, True

    def __init__(self, texts: list[list[int]], seed: int = 0) -> None:
        self.texts, self.draw_ = texts, random.Random(seed)

    def start(self, batch, capacity, sampling):
        self.lengths = [0] * batch

    def draft(self, news, k, lengths, draws):
        return Draft.guesses(lengths.new_zeros(len(lengths), k), lengths)

    def tree(self, news, k, growth, lengths, draws):
        tokens, parents = [], []
        for b, more in enumerate(news.counts.tolist()):
            self.lengths[b] += more
            right, row, behind = {-1: 0}, [], []  # how much of the text nodes on its path have
            for n in range(growth.nodes):
                parent = self.draw_.choice([-1, *(i for i, t in enumerate(row) if t >= 0)])
                depth = len(path_to(behind, parent)) if parent >= 0 else 0
                used = {t for t, p in zip(row, behind, strict=True) if p == parent}
                at = self.lengths[b] + right.get(parent, 0)
                token = next(t for t in range(50) if t not in used)
                if parent in right and at < len(self.texts[b]) and self.draw_.random() < 0.7:
                    token = self.texts[b][at]
                    if token not in used:
                        right[n] = right[parent] + 1
                if token in used or depth >= int(lengths[b]):
                    token, parent = -1, -1
                    right.pop(n, None)
                row.append(token)
                behind.append(parent)
            tokens.append(row)
            parents.append(behind)
        return Tree.guesses(torch.tensor(tokens), torch.tensor(parents))


@pytest.mark.parametrize("kind", CACHES, ids=str)
@pytest.mark.parametrize("rule", ["greedy", "coupled"])
@pytest.mark.parametrize("family", EVERY)
def test_text_is_that_of_plain_decoding(family, rule, kind):
    """Ragged rows, each with a tree of its own, of which much is accepted."""
    target, sampling = accelerated(family), Sampling(0.0 if rule == "greedy" else 1.0)
    options = {"max_new_tokens": 24, "sampling": sampling, "seed": [3, 1, 4], "stop_tokens": (7,)}
    plain = Decoder(target, rule=rule).generate(PROMPTS, **options)
    decoder = Decoder(target, Planted(plain.sequences), 6, rule, tree=9)
    result = decoder.generate(PROMPTS, **options, **kind)
    assert result.new_tokens == plain.new_tokens
    assert result.stats.tokens_per_forward > 1.5
    assert result.stats.accepted <= result.stats.drafted


@pytest.mark.parametrize("name", GROWERS)
@pytest.mark.parametrize("rule", ["greedy", "coupled"])
def test_drafters_grow_trees(name, rule):
    target, sampling = accelerated("llama"), Sampling(0.0 if rule == "greedy" else 1.0)
    options = {"max_new_tokens": 30, "sampling": sampling, "seed": 5}
    plain = Decoder(target, rule=rule).generate(PROMPTS, **options)
    for nodes in (1, 4, 12):
        decoder = Decoder(target, GROWERS[name](target), 4, rule, tree=nodes)
        assert decoder.generate(PROMPTS, **options).new_tokens == plain.new_tokens
    assert decoder.replace(tree=3).settings.tree.nodes == 3


@pytest.mark.parametrize("tree", [5, (-1, -1, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sequential_head_grows_trees_in_half_precision(dtype, tree):
    target = Target(tiny_model("llama", dtype=dtype))
    drafter = type(parallel(target))(
        tiny_network("parallel", torch.arange(50), head_rank=5), target
    )
    decoder = Decoder(target, drafter, 4, tree=tree)
    result = decoder.generate(PROMPTS, max_new_tokens=20, sampling=Sampling(1.0))
    assert [len(row) for row in result.new_tokens] == [20] * 3
    assert result.stats.drafted > 0


@pytest.mark.parametrize("tree", [8, (-1, -1, 0, 0, 1, 2)], ids=str)
@pytest.mark.parametrize("head_rank", [0, 5])
def test_sampled_text_follows_the_target(tree, head_rank):
    """The second token behind a prompt, over many seeds, against the exact distribution. A chain's
    records under a walk, or a tree whose residual is forgotten, would be off by far more."""
    target = Target(accelerate(tiny_model("llama", vocab=50, initializer_range=0.15)))
    network = tiny_network("parallel", torch.arange(0, 50, 2), head_rank=head_rank)
    decoder = Decoder(target, type(parallel(target))(network, target), 4, tree=tree)
    rows, prompt = 600, [3, 1, 4]
    sampling = Sampling(1.0)
    result = decoder.generate([prompt] * rows, max_new_tokens=2, sampling=sampling,
                              seed=list(range(rows)))  # fmt: skip
    with torch.inference_mode():
        cache = target.new_cache(1, 8)
        first = target.forward(torch.tensor([prompt]), cache)[0][0, -1].softmax(-1)
        second = torch.zeros(50)
        for token in range(50):
            cache = target.new_cache(1, 8)
            row = target.forward(torch.tensor([[*prompt, token]]), cache)[0][0, -1].softmax(-1)
            second += first[token] * row
    for place, p in enumerate((first.double(), second.double())):
        counts = torch.bincount(
            torch.tensor([row[place] for row in result.new_tokens]), minlength=50
        )
        expected = rows * p
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < 49 + 5 * (2 * 49) ** 0.5  # 49 degrees of freedom, five standard deviations


def test_prompt_lookup_grows_all_that_followed():
    """The longest n-gram's latest continuation first, then its earlier ones, then shorter ones'."""
    history = History(2)
    for token in (1, 2, 3, 4, 1, 2, 5, 9, 2, 7, 1, 2):
        history.append(token)
    assert list(history.proposals(2)) == [[5, 9], [3, 4], [7, 1], [5, 9], [3, 4]]
    assert history.tree(9, 2) == ([5, 9, 3, 4, 7, 1], [-1, 0, -1, 2, -1, 4])
    assert history.tree(3, 2) == ([5, 9, 3], [-1, 0, -1])
    assert history.tree(9, 0) == ([], [])
    for token in (8, 8, 8):  # where continuations share their beginning
        history.append(token)
    assert history.tree(9, 3) == ([8, 8], [-1, 0])


def test_prompt_lookup_does_not_read_a_whole_text_again():
    """In a text of one token every place is an occurrence, and none adds a node."""
    history = History(3)
    for _ in range(3000):
        history.append(5)
    assert len(list(history.proposals(8))) == 3 * MOST
    assert history.tree(16, 4) == ([5] * 4, [-1, 0, 1, 2])


def test_who_is_behind_whom():
    tree = Tree.guesses(torch.tensor([[7, 8, 9, -1]]), torch.tensor([[-1, 0, -1, 2]]))
    parents = behind_root(tree)
    assert parents.tolist() == [[-1, 0, 1, 0, 0]]
    assert depths_of(parents).tolist() == [[0, 1, 2, 1, 1]]
    empty = Tree.guesses(tree.tokens[:, :0], tree.parents[:, :0])
    assert behind_root(empty).tolist() == [[-1]] and empty.depths.shape == (1, 0)
    seen = seen_by(parents)[0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "rule", "error", "message"),
    [
        (4, "block", ValueError, "rule 'block' judges chains alone"),
        (4, "lenient", ValueError, "rule 'lenient' judges chains alone"),
        (0, "token", ValueError, "at least 1 node, got 0"),
        ((), "token", ValueError, "at least 1 place, got none"),
        ((-1, 1), "token", ValueError, "parent of place 1 must be -1 .* got 1"),
        ((-1, "0"), "token", ValueError, "parent of place 1 .* got '0'"),
        ((-1, 0), "greedy", ValueError, "drawn for rule 'token' alone, got rule 'greedy'"),
        ("abc", "token", TypeError, "a number of nodes, or the parent of each place, got 'abc'"),
        (2.5, "token", TypeError, "got 2.5"),
    ],
)
def test_trees_that_there_are_not(tree, rule, error, message):
    with pytest.raises(error, match=message):
        growth_of(tree, rule)


class Same(Drafter):
    """The same tree for each row."""

    vocab_size, block, grows = None, 4, True

    def __init__(self, *tree: object) -> None:
        self.tree_ = tree

    def draft(self, news, k, lengths, draws):
        raise AssertionError("asked for a chain")

    def tree(self, news, k, growth, lengths, draws):
        parts = [torch.tensor([part] * len(lengths)) for part in self.tree_]
        return Tree.guesses(*parts) if len(parts) > 1 else parts[0]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (([1, 2],), "must be a Tree, got a Tensor: Tree.guesses makes one"),
        (([1, 2], [1, -1]), "parent of node 0 in row 0 must be -1 .* got 1"),
        (([1, 2], [-1, 9]), "parent of node 1 in row 0 must be -1 .* got 9"),
        (([1, 2], [-1, -5]), "parent of node 1 in row 0 must be -1 .* got -5"),
        ((list(range(7)), [-1] * 7), r"tokens \[3, 7\] .* 3 rows of at most 6 nodes"),
        (([1, 1], [-1, -1]), "siblings of a tree are equal though"),
    ],
)
@pytest.mark.parametrize("look_every", [1, 2])
def test_a_drafter_that_grows_no_tree(tree, message, look_every):
    decoder = Decoder(accelerated("llama"), Same(*tree), rule="greedy", tree=6)
    with pytest.raises((ValueError, TypeError), match=message):
        decoder.generate(PROMPTS, max_new_tokens=20, look_every=look_every)


def test_a_tree_is_as_deep_as_was_asked_for():
    decoder = Decoder(accelerated("llama"), Same([1, 2, 3], [-1, 0, 1]), 2, "greedy", tree=6)
    with pytest.raises(ValueError, match=r"\[3, 3, 3\] tokens where \[2, 2, 2\] were wanted"):
        decoder.generate(PROMPTS, max_new_tokens=20)


@pytest.mark.parametrize("look_every", [1, 2])
def test_what_stands_behind_nothing_does_not_matter(look_every):
    target = accelerated("llama")
    plain = Decoder(target, rule="greedy").generate([1, 2], max_new_tokens=20)
    decoder = Decoder(target, Same([1, -1, 3], [-1, 77, -1]), 1, "greedy", tree=6)
    session = decoder.open(1, 40, look_every=look_every)
    session.admit([[1, 2]], max_new_tokens=20)
    while not session.done[0]:
        session.step()
    assert session.texts == plain.sequences


class Shared(Drafter):
    """One token, drawn for all rows from one row of logits."""

    vocab_size, block, grows = None, 4, True

    def draft(self, news, k, lengths, draws):
        raise AssertionError("asked for a chain")

    def tree(self, news, k, growth, lengths, draws):
        logits, zeros = torch.zeros(1, 50), torch.zeros(len(lengths), 1, dtype=torch.int64)
        token = torch.where(lengths[:, None] > 0, torch.randint(50, zeros.shape), -1)
        return Tree(token, zeros - 1, zeros, logits, row_distribution(logits, 1.0))


def test_rows_may_share_a_record():
    decoder = Decoder(accelerated("llama"), Shared(), tree=(-1,))
    result = decoder.generate(PROMPTS, max_new_tokens=9, sampling=Sampling(1.0))
    assert [len(row) for row in result.new_tokens] == [9] * 3


def test_what_does_not_go_with_a_tree():
    target = accelerated("llama")
    with pytest.raises(ValueError, match="Autoregressive drafts chains alone; leave tree out"):
        Decoder(target, DRAFTERS["autoregressive"](target), tree=4)
    lookup = Decoder(target, PromptLookup(), tree=(-1, -1))
    with pytest.raises(ValueError, match="prompt lookup draws none: give tree a number of nodes"):
        lookup.generate(PROMPTS, max_new_tokens=4)
    with pytest.raises(ValueError, match="k must be a number, got a AdaptiveK"):
        Decoder(target, parallel(target), AdaptiveK(), tree=4)
    with pytest.raises(ValueError, match="all records of a tree count"):
        Decoder(target, parallel(target), record="one-hot", tree=4)
    decoder = Decoder(target, parallel(target), tree=4)
    with pytest.raises(ValueError, match="process sees chains alone"):
        decoder.generate(PROMPTS, process=lambda texts, drafted, logits: logits)
    several = Decoder(target, block_diffusion(target), tree=4)
    several.drafter.steps = 2
    with pytest.raises(ValueError, match="one reverse step, got steps = 2"):
        several.generate(PROMPTS, max_new_tokens=4)
    with pytest.raises(NotImplementedError, match="drafts chains alone"):
        DRAFTERS["eagle"](target).tree(None, 1, None, None, None)
    assert Decoder(target, tree=4).settings.tree is None  # plain decoding has none
