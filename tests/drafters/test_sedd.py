"""SEDD and MDLM drafters with random weights: what they read, what they record, what they keep."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from specdiff import AdaptiveK, Decoder, Sampling, Target
from specdiff.drafters import Draws, News, load_drafter
from specdiff.drafters.ddit import DDiT, DDiTConfig
from specdiff.drafters.noise import LogLinear, ancestral_rate, times
from specdiff.drafters.schedule import ORDERS, schedule
from specdiff.drafters.sedd import MDLM, SEDD
from specdiff.planning.costs import Costs, Plan
from specdiff.planning.planner import Planner
from specdiff_kernels import DistributionError, Order, row_distribution
from tests.tiny import tiny_model

V, LENGTH, K = 50, 24, 4
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 4, 5], [3]]


@pytest.fixture(scope="module")
def network() -> DDiT:
    """Every parameter is random and of weight, so that every input matters to the output."""
    torch.manual_seed(0)
    network = DDiT(DDiTConfig(V, hidden_size=16, blocks=2, heads=2, cond_dim=8, length=LENGTH))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.4)
    return network


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model("gpt2", vocab=V))


@pytest.fixture(scope="module")
def plain(target):
    return Decoder(target).generate(PROMPTS, max_new_tokens=30).new_tokens


def logits_of(network: DDiT, text: list[int], draft: list[int], sigma: float) -> torch.Tensor:
    """One forward over one text, without window or batch. -> [K, V]"""
    tokens = torch.tensor([text + [V if t < 0 else t for t in draft]])
    states = network(tokens, network.modulations([sigma])[0])
    return network.head(states)[0, -len(draft) :, :V]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("order", ["analytic", "left-to-right", "entropy", "first-hitting"])
def test_draft_equals_fresh_forwards(network, order, steps):
    """Ragged news, a text beyond the window: each record is a forward over the last tokens with
    the drafted ones of earlier steps revealed."""
    drafter = SEDD(network, block=K, steps=steps, order=order)
    drafter.start(3, 60, Sampling(temperature=0.9))
    texts: list[list[int]] = [[], [], []]
    generator = torch.Generator().manual_seed(1)
    sigmas = [LogLinear().sigma(t) for t, _ in times(steps)]
    for turn, counts in enumerate([[3, 22, 1], [1, 5, 2], [4, 0, 1]]):
        news = torch.randint(V, (3, max(counts)), generator=generator)
        texts = [text + row[:n].tolist() for text, row, n in zip(texts, news, counts, strict=True)]
        lengths = torch.tensor([min(K, 9 * n) for n in counts])
        draws = Draws(torch.tensor([1, 2, 3]), torch.full((3,), turn))
        with torch.inference_mode():
            draft = drafter.draft(News(news, torch.tensor(counts), None), K, lengths, draws)
        assert draft.final_step in (steps - 1, None)
        for b in (b for b in range(3) if counts[b]):
            assert draft.tau[b].min() >= 0 and draft.tau[b].max() < steps
            for i in range(K):
                step = int(draft.tau[b, i])
                seen = draft.tokens[b].where(draft.tau[b] < step, -1).tolist()
                window = texts[b][-(LENGTH - K) :]
                with torch.inference_mode():
                    want = logits_of(network, window, seen, sigmas[step])[i]
                row = draft.rows[b, i]
                torch.testing.assert_close(draft.logits[row], want, atol=1e-4, rtol=1e-4)
                distribution = row_distribution(draft.logits[row][None], 0.9)
                assert all(
                    have[row] == field[0]
                    for have, field in zip(draft.distribution, distribution, strict=True)
                )
        assert (draft.tokens[lengths == 0] == -1).all()


@pytest.mark.parametrize("hot_start", [None, "entangled", "recycled"])
@pytest.mark.parametrize("order", ORDERS)
def test_greedy_text_is_plain_decodings(network, target, plain, order, hot_start):
    if (order, hot_start) == ("confidence", "entangled"):
        with pytest.raises(ValueError, match="does not work with order 'confidence'"):
            SEDD(network, order=order, hot_start=hot_start)
        return
    for drafts in (None, Sampling(temperature=0.7)):
        drafter = SEDD(network, order=order, steps=3, hot_start=hot_start, draft_sampling=drafts)
        got = Decoder(target, drafter, K).generate(PROMPTS, max_new_tokens=30)
        assert got.new_tokens == plain


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", [SEDD, MDLM])
def test_coupled_text_is_plain_decodings(network, target, kind, steps):
    """At temperature 1, whatever the drafter, K, T and the batch."""
    sampling = Sampling(temperature=1.0)
    options = {"max_new_tokens": 20, "sampling": sampling}
    want = Decoder(target, rule="coupled").generate(PROMPTS, seed=[5, 6, 7], **options).new_tokens
    for k in (1, 6):
        decoder = Decoder(target, kind(network, steps=steps), k, "coupled")
        assert decoder.generate(PROMPTS, seed=[5, 6, 7], **options).new_tokens == want
        assert decoder.generate(PROMPTS[1], seed=[6], **options).new_tokens == want[1:2]


class Remembers(SEDD):
    """Keeps all drafts and what was said of them."""

    def start(self, batch, capacity, sampling):
        super().start(batch, capacity, sampling)
        self.drafts = []

    def draft(self, news, k, lengths, draws):
        draft = super().draft(news, k, lengths, draws)
        self.drafts.append((draft, news.counts.clone()))
        return draft


def test_what_entangled_drafts_keep(network, target):
    """Tokens that an examined one was conditioned on come back, in place, with their record; they
    stay until they are examined."""
    drafter = Remembers(network, order="first-hitting", steps=K, hot_start="entangled")
    sampling = Sampling(temperature=1.5)
    Decoder(target, drafter, K).generate(PROMPTS[:2], max_new_tokens=40, sampling=sampling)
    kept = again = 0
    for (old, _), (new, counts) in zip(drafter.drafts, drafter.drafts[1:], strict=False):
        assert old.entangled and new.entangled
        for b, shift in enumerate(counts.tolist()):
            if not shift or not new.lengths[b]:
                continue
            latest = old.tau[b, : min(shift, int(old.lengths[b]))].max()
            for i in range(old.tokens.shape[1] - shift):
                at = i + shift
                must = old.tokens[b, at] >= 0 and (old.tau[b, at] < max(latest, 0))
                if not must:
                    assert new.tau[b, i] >= 0 or i >= new.lengths[b]  # drawn anew
                    continue
                kept += 1
                again += int(old.tau[b, at]) < 0
                assert new.tokens[b, i] == old.tokens[b, at] and new.tau[b, i] == -1
                row, before = new.rows[b, i], old.rows[b, at]
                assert torch.equal(new.logits[row], old.logits[before])
                assert new.distribution.total[row] == old.distribution.total[before]
    assert kept > 20 and again > 0


def test_recycled_tokens_are_bare_guesses(network, target):
    drafter = Remembers(network, order="analytic", steps=2, hot_start="recycled")
    sampling = Sampling(temperature=1.5)
    Decoder(target, drafter, K).generate(PROMPTS[:1], max_new_tokens=20, sampling=sampling)
    seen = 0
    for (old, _), (new, counts) in zip(drafter.drafts, drafter.drafts[1:], strict=False):
        shift, wanted = int(counts[0]), int(new.lengths[0])
        left = int(old.lengths[0]) - shift
        if left > 0:
            assert torch.equal(new.tokens[0, :left], old.tokens[0, shift : shift + left])
            assert (new.rows[0, :left] == -1).all() and (new.rows[0, left:wanted] >= 0).all()
            seen += left
    assert seen > 10


class Copying(DDiT):
    """Thinks that a token is most likely the one behind it, where that one is known."""

    def forward(self, tokens, modulation, mask=None):
        return torch.nn.functional.one_hot(tokens.roll(-1, 1), self.mask_id + 1).float()

    def head(self, states):
        return 3 * states * (torch.arange(self.mask_id + 1) < self.mask_id)


class Forgets(SEDD):
    """Says that it keeps entangled tokens, and masks them again."""

    def draft(self, *args):
        return super().draft(*args)._replace(entangled=True)


@pytest.mark.parametrize(
    ("kind", "hot_start"), [(SEDD, None), (SEDD, "entangled"), (SEDD, "recycled"), (Forgets, None)]
)
def test_sampled_text_follows_the_targets_distribution(kind, hot_start):
    """Chi-squared of three tokens over 3 ids, 8000 texts, false alarm 1e-5; a mutant fails it."""
    N, V = 8000, 3
    small = Target(tiny_model("gpt2", vocab=V, seed=3, initializer_range=0.15))
    copying = Copying(DDiTConfig(V, hidden_size=4, blocks=1, heads=1, cond_dim=4, length=LENGTH))
    drafter = kind(copying, order="first-hitting", steps=3, hot_start=hot_start)
    options = {"max_new_tokens": 4, "sampling": Sampling(temperature=1.0), "seed": range(N)}
    got = Decoder(small, drafter, 3).generate([[1]] * N, **options).new_tokens
    counts = Counter(tuple(row[:3]) for row in got)
    distribution = text_distribution(small, V)
    chance = chisquare(
        [counts[text] for text in distribution], [N * p for p in distribution.values()]
    ).pvalue
    assert (chance > 1e-5) == (kind is SEDD), chance


class Peeks(Planner):
    """Withholds drafted zeros, and what is behind them."""

    def withhold(self, draft):
        wanted = (draft.tokens != 0).long().cumprod(1).sum(1)
        return draft._replace(lengths=torch.minimum(draft.lengths, wanted))


@pytest.mark.parametrize("kind", [Planner, Peeks])
def test_sampled_text_under_a_planner_follows_the_targets_distribution(kind):
    """The same test; K and T change from round to round."""
    N, V = 8000, 3
    small = Target(tiny_model("gpt2", vocab=V, seed=3, initializer_range=0.15))
    copying = Copying(DDiTConfig(V, hidden_size=4, blocks=1, heads=1, cond_dim=4, length=LENGTH))
    plans = [Plan(0, 0), Plan(1, 1), Plan(2, 1), Plan(3, 1), Plan(3, 3)]
    # rounds without draft and with K = 1 look dear, so that longer drafts are made
    costs = Costs(N, plans, [0, 0, 0, 0, 0.1], [9, 9, 1, 1, 1])
    planner, used = kind(costs), []
    want = planner.want
    planner.want = lambda most: used.append(want(most)) or used[-1]
    options = {"max_new_tokens": 4, "sampling": Sampling(temperature=1.0), "seed": range(N)}
    got = Decoder(small, SEDD(copying), planner).generate([[1]] * N, **options).new_tokens
    assert any(wanted.width > 1 for wanted in used)
    counts = Counter(tuple(row[:3]) for row in got)
    distribution = text_distribution(small, V)
    chance = chisquare(
        [counts[text] for text in distribution], [N * p for p in distribution.values()]
    ).pvalue
    assert (chance > 1e-5) == (kind is Planner), chance


def text_distribution(target: Target, V: int) -> dict[tuple, float]:
    distribution: dict[tuple, float] = {(): 1.0}
    for _ in range(3):
        rows = torch.tensor([[1, *text] for text in distribution])
        with torch.inference_mode():
            chances = target.model(rows).logits[:, -1].double().softmax(-1).tolist()
        distribution = {
            (*text, v): p * chances[n][v] for n, (text, p) in enumerate(distribution.items())
            for v in range(V)
        }  # fmt: skip
    return distribution


def test_load_drafter(network, target, tmp_path):
    network.save_pretrained(tmp_path)
    drafter = load_drafter(tmp_path, target, steps=3)
    assert type(drafter) is SEDD and drafter.steps == 3 and drafter.vocab_size == V
    assert torch.equal(
        drafter.network.output_layer.linear.weight, network.output_layer.linear.weight
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["time_conditioning"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(load_drafter(tmp_path, target)) is MDLM
    assert SEDD.from_pretrained(tmp_path, block=5).block == 5
    other = Target(tiny_model("gpt2", vocab=V + 1))
    with pytest.raises(ValueError, match="must share the target's tokenizer"):
        Decoder(other, SEDD(network))


def test_a_network_without_a_distribution_is_an_error(network, target):
    class Broken(DDiT):
        def head(self, states):
            return super().head(states) * float("nan")

    broken = Broken(network.config)
    with pytest.raises(DistributionError, match="the drafter's logits: sequence 0"):
        Decoder(target, SEDD(broken), 3).generate([1, 2])


def test_schedules():
    noise = LogLinear()
    for order in ORDERS:
        reveals = schedule(order, 4, 10, noise)
        assert len(reveals) == 4 and reveals[-1].order is Order.ALL
        assert schedule(order, 1, 10, noise) == [reveals[-1]]
    sizes = [reveal.number for reveal in schedule("entropy", 4, 10, noise)[:-1]]
    assert sizes == [2, 3, 2]
    chunks = [(r.lo, r.hi) for r in schedule("left-to-right", 3, 10, noise)[:-1]]
    assert chunks == [(0, 3), (3, 6)]
    t, s = times(4)[1]
    assert schedule("ancestral", 4, 10, noise)[1].rate == ancestral_rate(noise, t, s)
    with pytest.raises(ValueError, match="order must be one of analytic, euler"):
        schedule("random", 2, 4, noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": LENGTH}, r"block must be in \[1, length = 24\), got 24"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"order": "random"}, "order must be one of analytic"),
        ({"hot_start": "warm"}, "hot_start must be one of"),
    ],
)
def test_bad_arguments_are_named(network, options, message):
    with pytest.raises(ValueError, match=message):
        SEDD(network, **options)
    with pytest.raises(ValueError, match="order must be one of ancestral"):
        MDLM(network, order="analytic")


@pytest.mark.parametrize("k", [K, AdaptiveK(K)], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("order", ["analytic", "left-to-right"])
def test_a_row_of_a_batch_is_the_row_alone(network, target, order, k):
    """Though rows end, and shorten their drafts, at different times."""
    options = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.5)}
    decoder = Decoder(target, SEDD(network, order=order, steps=2), k)
    rows = decoder.generate(PROMPTS, seed=[4, 5, 6], **options).new_tokens
    for b, prompt in enumerate(PROMPTS):
        assert decoder.generate(prompt, seed=[4 + b], **options).new_tokens == rows[b : b + 1]


@pytest.mark.parametrize("record", ["final", "one-hot"])
def test_records_to_the_end_of_the_row(network, target, record):
    """The last round has no room for a draft, whatever record was asked for."""
    decoder = Decoder(target, SEDD(network), K, record=record)
    for n in (1, 2, 7):
        assert len(decoder.generate([1, 2], max_new_tokens=n).new_tokens[0]) == n


def test_rows_of_one_length_need_no_mask(network, target):
    """So that flash-attn may be used where it is installed."""
    masks = []

    class Watched(DDiT):
        def forward(self, tokens, modulation, mask=None):
            masks.append(mask)
            return super().forward(tokens, modulation, mask)

    for prompts in ([[1, 2, 3]], [[1, 2], [3, 4]], [[1, 2, 3], [4]]):
        masks.clear()
        decoder = Decoder(target, SEDD(Watched(network.config), steps=1), 2)
        next(decoder.stream(prompts, max_new_tokens=4))
        assert len(masks) == 1
        assert (masks[0] is None) == (len({len(row) for row in prompts}) == 1)


def test_sedd_takes_another_number_of_steps(network):
    """As if it had been made with it."""
    changed, made = SEDD(network, steps=2), SEDD(network, steps=5)
    changed.steps = 5
    assert changed.steps == 5
    for a, b in zip(changed.table, made.table, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
