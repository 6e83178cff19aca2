"""Distillation: its masks hide what they must, its loss is what it says, and it learns."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from specdiff import Sampling, Target
from specdiff.drafters import BlockDiffusion, Draws, News, ParallelDrafter
from specdiff.drafters import network as network_module
from specdiff.drafters.head import scaled
from specdiff.drafters.network import DraftConfig, DraftNetwork
from specdiff.drafters.schedule import chunk
from specdiff.training.conversations import Conversations
from specdiff.training.distillation import (
    Batch,
    Distillation,
    draft_length,
    draft_lengths,
    draft_logits,
    evaluate,
    fit_linear,
    make_drafts,
)
from specdiff.training.groups import Groups, forward_groups, sample_groups
from specdiff.training.objective import DIVERGENCES, Objective
from specdiff.training.recipe import Recipe
from specdiff.training.teacher import Teacher
from specdiff.training.trainer import Trainer
from tests.tiny import tiny_network

from .conftest import BLOCK, SIZE, TEXTS, VOCAB

KINDS = ("block-diffusion", "parallel", "eagle")
HEAD = {"head_rank": 5}
VARIANTS = {  # name -> kind, what else the network has
    **{kind: (kind, {}) for kind in KINDS},
    "block-diffusion, head": ("block-diffusion", HEAD),
    "parallel, head": ("parallel", HEAD),
    "parallel, head of tokens": ("parallel", {**HEAD, "head_state": False}),
}
RECIPE = Recipe(steps=60, batch=8, learning_rate=1e-2, ema=0.9)


def new_task(network, teacher, **objective) -> Distillation:
    rows = torch.arange(TEXTS)
    return Distillation(network, teacher, rows[16:], rows[:16], Objective(anchors=6, **objective))


def inputs(kind):
    """A network where everything matters, two texts, and three groups behind each."""
    network = tiny_network(kind, torch.arange(VOCAB), vocab=VOCAB, layers=2)
    generator = torch.Generator().manual_seed(0)
    embedded, before = torch.randn(2, 2, 12, SIZE, generator=generator)
    revealed = torch.tensor([[0, 2, 0], [1, 3, 0]]) * (kind == "block-diffusion")
    return network, embedded, before, Groups(torch.tensor([[0, 5, 5], [3, 7, 11]]), revealed)


@torch.no_grad()
def alone(network, embedded, before, anchor, revealed):
    """States of one group, in a forward over its own text, cut off at its anchor, and itself."""
    config = network.config
    if config.kind == "eagle":
        return one_by_one(network, embedded, before[: anchor + 1], anchor)
    M = config.masks(BLOCK)
    text = network.embed_prefix(embedded[: anchor + 1], before[: anchor + 1])
    masks = network.embed_masks(text[-1], M)
    given = F.pad(embedded[anchor + 1 :], (0, 0, 0, M))[:M]
    masks[:revealed] = network.embed_revealed(given)[:revealed]
    x = torch.cat((text, masks))[None]
    columns = x.shape[1]
    mask = torch.ones(columns, columns, dtype=torch.bool).tril()  # as in any language model
    if config.kind == "block-diffusion":
        mask[anchor + 1 :] = True
    return network(x, torch.arange(columns)[None], mask[None, None])[0, anchor + 1 :]


def one_by_one(network, embedded, states, anchor):
    """A forward over everything for each token, which its predecessor's prediction goes with."""
    out, embedded = [], torch.cat((embedded, embedded[-1:].expand(BLOCK, -1)))
    for end in range(anchor + 1, anchor + BLOCK + 1):
        x = network.embed_prefix(embedded[:end], states)
        mask = torch.ones(end, end, dtype=torch.bool).tril()[None, None]
        out.append(network(x[None], torch.arange(end)[None], mask)[0, -1])
        states = torch.cat((states, network.embed_out(out[-1])[None]))
    return torch.stack(out[1:])


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention is compiled on a GPU; its block mask means the same without."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    network_module.compiled_flex_attention.cache_clear()
    yield
    network_module.compiled_flex_attention.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flex", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_group_equals_running_its_position_alone(kind, flex, uncompiled):
    network, embedded, before, groups = inputs(kind)
    with torch.no_grad():
        states = forward_groups(network, embedded, before, groups, BLOCK, flex=flex).groups
    for b in range(2):
        for a in range(3):
            anchor, revealed = int(groups.anchor[b, a]), int(groups.revealed[b, a])
            want = alone(network, embedded[b], before[b], anchor, revealed)
            torch.testing.assert_close(states[b, a], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_group_may_not_see_changes_nothing(kind):
    network, embedded, before, groups = inputs(kind)

    def states(embedded, before):
        with torch.no_grad():
            return forward_groups(network, embedded, before, groups, BLOCK).groups[0]

    base = states(embedded, before)
    for a in range(3):
        anchor, known = int(groups.anchor[0, a]), int(groups.revealed[0, a])
        if kind == "eagle":
            known = BLOCK - 1  # tokens, not states
        later, unknown = embedded.clone(), before.clone()
        later[:, anchor + 1 + known :] = 7
        unknown[:, anchor + 1 :] = 7  # the state at the anchor itself is not known either
        assert torch.allclose(states(later, unknown)[a], base[a], atol=1e-5)
        for changed in ((1, 0), (0, 1)):  # the anchor's token, the state before it
            inputs_ = [embedded.clone(), before.clone()]
            inputs_[changed.index(1)][:, anchor] += 1
            assert not torch.allclose(states(*inputs_)[a], base[a], atol=1e-3)
    if kind != "parallel":
        given = embedded.clone()
        given[:, 6] += 1  # a revealed token of the group behind column 5
        assert not torch.allclose(states(given, before)[1], base[1], atol=1e-3)


def head_of(network, embedded, states):
    """W C silu(A n(E[x]) + B n(s)), in fp32 as in training."""
    head = network.head
    if head is None:
        return 0.0
    unit = lambda x: x / x.square().mean(-1, keepdim=True).sqrt()
    inner = unit(embedded) @ head.token.weight.T
    if head.state is not None:
        inner = inner + unit(states) @ head.state.weight.T
    return F.silu(inner) @ head.mix.weight.T @ head.out.weight.T


@pytest.mark.parametrize(("kind", "more"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@torch.no_grad()
def test_loss_by_its_definition(kind, more, divergence, teacher):
    """Text by text, draft by draft, position by position, in fp64.

    A logit is a sum of 32 fp32 products of size up to 10, whose rounding, at most 32 * 10 * 2^-24 =
    2e-5, moves a term of the loss by as much; the loss is of size 1, and the test allows 1e-4.
    """
    network = tiny_network(kind, torch.arange(VOCAB), vocab=VOCAB, **more)
    floor = 0.4  # between 0.7^2 and 0.7^3
    task = new_task(
        network,
        teacher,
        divergence=divergence,
        position_decay=0.7,
        position_floor=floor,
        tv_from=0.5,
    )
    distribution = lambda x: F.linear(x, teacher.output).double().softmax(-1)

    def draw(states, before):
        logits = F.linear(network.embed_out(states), teacher.output, network.bias)
        return (logits + head_of(network, teacher.embedding[before], states)).double().softmax(-1)

    chosen, progress, total = torch.tensor([3, 20, 41]), 0.75, 0.0
    for K in draft_lengths(network.config):
        batch = task.batch(chosen, 5, 6, K)
        drafts = make_drafts(network, teacher, batch)
        want = 0.0
        for b in range(3):
            first, last = int(batch.first[b]), int(batch.length[b]) - 2
            for a in range(6):
                known = int(batch.groups.revealed[b, a])
                for i in range(K):
                    column = int(batch.groups.anchor[b, a]) + i
                    if column > last or i < known or (kind != "block-diffusion" and i == 0):
                        continue
                    p = distribution(batch.states[b, column])
                    q = draw(drafts.states[b, a, i], batch.tokens[b, column])
                    reached = sum(k > i for k in (1, 2, 4)) / 3
                    weight = max(0.7 ** (i - known), floor) / reached / 6
                    want += weight * value(divergence, p, q, 0.25)
            if kind != "block-diffusion":  # the first position, everywhere in the answer
                for column in range(first, last + 1):
                    p = distribution(batch.states[b, column])
                    q = draw(drafts.text[b, column], batch.tokens[b, column])
                    want += value(divergence, p, q, 0.25) / (last + 1 - first)
        want /= 3 * sum(max(0.7**i, floor) for i in range(BLOCK))
        assert task.loss(network, batch, progress).item() == pytest.approx(want, rel=1e-4)
        total += want
    assert total > 0


@pytest.mark.parametrize(
    ("drafter", "steps"), [(ParallelDrafter, 1), (BlockDiffusion, 1), (BlockDiffusion, 2)]
)
@pytest.mark.parametrize("more", [{}, HEAD, {**HEAD, "head_state": False}], ids=str)
@torch.no_grad()
def test_logits_are_those_of_the_drafter(drafter, steps, more, model, teacher):
    """A text is learnt by the distributions from which a drafter that drew it has drawn."""
    network = tiny_network(drafter.kind, torch.arange(VOCAB), vocab=VOCAB, **more)
    block_steps = {"steps": steps} if drafter is BlockDiffusion else {}
    drafts = drafter(network, Target(model), **block_steps)
    committed = teacher.conversations.tokens[:3, :9]
    hidden = teacher.states(torch.arange(3), 9)
    before = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
    nine, seed = torch.full((3,), 9), torch.tensor([1, 2, 3])
    drafts.start(3, 30, Sampling(1.0))
    news = News(committed, nine, before)
    draft = drafts.draft(news, BLOCK, torch.full((3,), BLOCK), Draws(seed, torch.zeros_like(seed)))
    text = torch.cat((committed, draft.tokens), 1)
    states = torch.cat((hidden, torch.zeros(3, BLOCK, SIZE)), 1)
    for step in range(steps):
        lo, hi = chunk(BLOCK, steps, step)
        groups = Groups(torch.full((3, 1), 8), torch.full((3, 1), lo))
        batch = Batch(text, states, nine, nine + BLOCK, groups, BLOCK)
        made = make_drafts(network, teacher, batch)
        logits = draft_logits(network, teacher, made.states, made.before)[:, 0, lo:hi]
        have = draft.logits.view(3, BLOCK, VOCAB)[:, lo:hi]
        torch.testing.assert_close(have, logits, rtol=1e-4, atol=1e-4)


class Wide(Teacher):
    """States of two layers, here noise, beside those of the last."""

    def states(self, rows, longest):
        last = super().states(rows, longest)[..., -SIZE:]
        noise = torch.randn(*last.shape[:2], 2 * SIZE, generator=torch.Generator().manual_seed(1))
        return torch.cat((noise, last), -1)


@pytest.mark.parametrize("kind", ["block-diffusion", "parallel"])
def test_states_of_layers_are_read_and_the_last_is_the_lm_head_s(kind, model, teacher):
    """Where those of layers are without effect, all is as without them; then they have one."""
    wide = Wide(model, teacher.conversations, torch.arange(VOCAB))
    narrow_network = tiny_network(kind, torch.arange(VOCAB), vocab=VOCAB)
    network = tiny_network(
        kind, torch.arange(VOCAB), vocab=VOCAB, target_layers=(1, 2), target_layer_count=2
    )
    network.adopt(narrow_network)
    for change in (lambda network, teacher: None, partial(fit_linear, rows=torch.arange(TEXTS))):
        change(network, wide)
        change(narrow_network, teacher)
        with torch.no_grad():
            have = new_task(network, wide).held_out_loss(network)
            want = new_task(narrow_network, teacher).held_out_loss(narrow_network)
        assert have == pytest.approx(want, rel=1e-5)
        both = (evaluate(network, wide, torch.arange(8), BLOCK),
                evaluate(narrow_network, teacher, torch.arange(8), BLOCK))  # fmt: skip
        assert both[0]["acceptance"] == pytest.approx(both[1]["acceptance"], rel=1e-4)
    network.hidden_in.weight.data[:, 0] += 1
    assert new_task(network, wide).held_out_loss(network) != pytest.approx(want, rel=1e-3)


def value(divergence, p, q, w) -> float:
    kl, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    tv = (p - q).abs().sum() / 2
    by_name = {"kl": kl, "reverse_kl": reverse, "tv": tv, "mix": (1 - w) * kl + w * tv}
    return float(by_name[divergence])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_learns(kind, divergence, teacher, new_network):
    """The held-out loss falls, and more is accepted on held-out text than of an untrained draft."""
    task = new_task(new_network(kind), teacher, divergence=divergence)
    untrained = task.held_out_loss(task.network)
    before = evaluate(task.network, teacher, task.held_out, BLOCK)
    trainer = Trainer(task, RECIPE)
    while trainer.step < RECIPE.steps:
        trainer.train_step()
    after = evaluate(trainer.network, teacher, task.held_out, BLOCK)
    assert task.held_out_loss(trainer.network) < 0.9 * untrained
    assert after["acceptance"][0] > before["acceptance"][0] + 0.05
    assert after["tokens_per_forward"][-1] > before["tokens_per_forward"][-1] + 0.05
    assert 1 < after["tokens_per_forward"][-1] < BLOCK + 1


class Chain(Teacher):
    """Each token has two successors, of probability 1/2: all that is to be known of a distribution
    is the token before. A state is that token, and so is an embedding."""

    def __init__(self, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        next_ = torch.stack(
            [torch.randperm(tokens, generator=generator)[:2] for _ in range(tokens)]
        )
        rows = [torch.randint(tokens, (TEXTS,), generator=generator)]
        for _ in range(29):
            side = torch.randint(2, (TEXTS,), generator=generator)
            rows.append(next_[rows[-1], side])
        thirty = torch.full((TEXTS,), 30)
        self.conversations = Conversations(torch.stack(rows, 1), thirty // 10, thirty)
        self.device = torch.device("cpu")
        self.embedding = torch.eye(tokens)
        self.output = torch.full((tokens, tokens), -8.0).scatter(1, next_, 0.0).T.contiguous()
        self.draft_output = self.output

    def states(self, rows, longest):
        return self.embedding[self.conversations.tokens[rows, :longest]]


@pytest.mark.parametrize(
    ("kind", "matrices"),
    [("block-diffusion", "adamw"), ("parallel", "adamw"), ("parallel", "muon")],
)
def test_a_head_learns_what_masks_cannot_know(kind, matrices):
    """Behind the first position there are four and more tokens for a mask to choose from, of which
    the token before leaves two: without it only 1/2 of a distribution can be met, and less farther
    on, but for tokens that share a successor; with it all."""
    teacher, acceptance = Chain(24), []
    for rank in (0, 16):
        config = DraftConfig(kind, 24, 24, 24, 32, 1, 2, 64, BLOCK, head_rank=rank)
        network = DraftNetwork(config, torch.arange(24))
        network.initialise(teacher.embedding, torch.Generator().manual_seed(0))
        task = new_task(network, teacher)
        recipe = dataclasses.replace(
            RECIPE, steps=100, matrices=matrices, head_learning_rate=5e-2, hold=0.5
        )
        trainer = Trainer(task, recipe)
        while trainer.step < recipe.steps:
            trainer.train_step()
        figures = evaluate(trainer.network, teacher, task.held_out, BLOCK)
        acceptance.append(torch.tensor(figures["acceptance"]))
    assert (acceptance[0][1:] < 0.55).all() and (acceptance[1][1:] > 0.65).all()


def test_anchors_and_revealed_parts(conversations):
    first, last = conversations.prompt_length - 1, conversations.length - 2
    generators = [torch.Generator().manual_seed(i) for i in range(TEXTS)]
    groups = sample_groups(first, last, 50, BLOCK, generators, revealing=True)
    assert (groups.anchor >= first[:, None]).all() and (groups.anchor <= last[:, None]).all()
    assert (groups.anchor == first[:, None]).any() and (groups.anchor == last[:, None]).any()
    assert set(groups.revealed.unique().tolist()) == {0, 1, 2, 3}
    assert 0.15 < (groups.revealed > 0).float().mean() < 0.35
    generators = [torch.Generator().manual_seed(i) for i in range(TEXTS)]
    alike = sample_groups(first, last, 50, BLOCK, generators, revealing=False)
    assert torch.equal(alike.anchor, groups.anchor) and (alike.revealed == 0).all()


def test_groups_depend_on_the_seed_the_step_and_the_text_alone(teacher, new_network):
    task = new_task(new_network("parallel"), teacher)
    together = task.batch(torch.tensor([5, 9]), 3, 6, 4)
    single = task.batch(torch.tensor([9]), 3, 6, 4)
    assert torch.equal(together.groups.anchor[1:], single.groups.anchor)
    later = task.batch(torch.tensor([9]), 4, 6, 4)
    assert not torch.equal(later.groups.anchor, single.groups.anchor)
    config = dataclasses.replace(task.network.config, block=16, k=5)
    assert {draft_length(config, 0, step) for step in range(40)} == {4, 5, 8, 16}


@pytest.mark.parametrize("kind", KINDS)
def test_linear_start_is_the_best_linear_prediction(kind, teacher, new_network, conversations):
    """No other linear map of token and state comes closer to the next state."""
    network = new_network(kind)
    fit_linear(network, teacher, torch.arange(TEXTS))
    states = teacher.states(torch.arange(TEXTS), conversations.tokens.shape[1])
    t = torch.arange(1, states.shape[1])
    inside = (t >= 2) & (t < conversations.length[:, None] - 1)  # that are stored
    token = F.embedding(conversations.tokens[:, 1:], teacher.embedding)[inside]
    before = states[:, :-1][inside]
    with torch.no_grad():
        made = network.embed_out(network.embed_prefix(token, before))
        constant = torch.linalg.lstsq(teacher.draft_output, network.bias[:, None]).solution[:, 0]
        made = made + constant  # which the output's bias stands for
    x = torch.cat((scaled(token), scaled(before)), 1)
    x = F.pad(x, (0, 1), value=1.0).double()
    y = states[:, 1:][inside].double()
    best = x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    error, least = ((made - y) ** 2).mean(), ((best - y) ** 2).mean()
    assert least <= error < 1.02 * least < 0.9 * y.var()


def test_the_share_of_tv():
    share = lambda progress, **more: Objective(tv_weight=0.8, **more).share_of_tv(progress)
    assert [share(x, tv_from=0.6) for x in (0, 0.6, 0.8, 1)] == pytest.approx([0, 0, 0.4, 0.8])
    assert [share(x, tv_from=0.6, tv_ramp=0.1) for x in (0.6, 0.65, 0.7, 1)] == pytest.approx(
        [0, 0.4, 0.8, 0.8]
    )
    assert [share(x, tv_from=0.6, tv_ramp=0.0) for x in (0.59, 0.6, 1)] == [0, 0.8, 0.8]
    assert [share(x, tv_from=0.0, tv_ramp=0.0) for x in (0.0, 0.5)] == [0.8, 0.8]


@pytest.mark.parametrize(
    "field",
    [
        {"divergence": "js"},
        {"position_decay": 1.5},
        {"position_floor": -0.1},
        {"tv_from": -1.0},
        {"tv_ramp": 1.1},
        {"anchors": 0},
    ],
)
def test_bad_objectives(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))} must be"):
        Objective(**field)
