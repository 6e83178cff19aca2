"""`check_drafter`: it finds drafters whose tokens do not follow their records, and no others."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from specdiff_kernels import (
    DistributionError,
    Draft,
    Reveal,
    denoise_step,
    row_distribution,
    sample,
)
from specdiff_kernels.testing import check_drafter, fp32_gumbel, tails

B, K, V = 500, 3, 12
DRAFTS = 20
TABLE = 1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(0))  # after each token
LEFT = torch.tensor([0, 2, 3, 5, 8, 9, 11])  # a drafter's vocabulary


def one_by_one(
    seed: int, heat: float = 0.8, recorded: float = 0.8, slots=range(K), ids=None, **sampling
) -> Draft:
    """An autoregressive drafter."""
    token = torch.arange(B) % V
    tokens, logits, distributions = [], [], []
    for slot in slots:
        logits.append(TABLE[token] if ids is None else TABLE[token][:, ids])
        drawn = row_distribution(logits[-1], heat, **sampling)
        token = sample(logits[-1], drawn, seed=seed, round=0, slot=slot, draft_ids=ids)
        distributions.append(row_distribution(logits[-1], recorded, **sampling))
        tokens.append(token)
    return Draft.sequential(torch.stack(tokens, 1), logits, distributions, draft_ids=ids)


def in_steps(reveal: Reveal, seed: int, entangled: bool = False) -> Draft:
    """A diffusion drafter: its rows depend on what has been revealed."""
    pool = torch.empty(B * K, V)
    draft = Draft.masked(B, K, pool, entangled=entangled)
    for step, last in enumerate((False, False, True)):
        seen = torch.where(draft.tokens < 0, V - 1, draft.tokens).sum(-1, keepdim=True)
        masked = (draft.tokens < 0).flatten()
        rows = TABLE[((seen + torch.arange(K)) % V).flatten()]
        pool[masked] = rows[masked]
        reveals = Reveal.all() if last else reveal
        draft = denoise_step(draft, reveals, step, 0.9, seed=seed, round=0)
    return draft


def ragged(seed: int) -> Draft:
    """Lengths that follow the distributions, and tokens that follow nothing behind them."""
    draft = one_by_one(seed)
    lengths = 1 + (TABLE[torch.arange(B) % V].max(-1).values > 2).long()
    behind = torch.arange(K) >= lengths[:, None]
    return draft._replace(lengths=lengths, tokens=draft.tokens.masked_fill(behind, -1))


HONEST = {
    "one by one": one_by_one,
    "top-p": partial(one_by_one, top_p=0.8),
    "top-k, min-p": partial(one_by_one, top_k=4, min_p=0.05),
    "greedy": partial(one_by_one, heat=0.0, recorded=0.0),
    "reduced vocabulary": partial(one_by_one, ids=LEFT),
    "one step": partial(in_steps, Reveal.chunk(0, 0)),
    "in any order": partial(in_steps, Reveal.first_hitting()),
    "in any order, entangled": partial(in_steps, Reveal.first_hitting(), entangled=True),
    "by entropy": partial(in_steps, Reveal.lowest_entropy(1)),
    "by confidence": partial(in_steps, Reveal.highest_confidence(1)),
    "ragged": ragged,
}


def columns_swapped(seed: int) -> Draft:
    """Two of the head's columns stand for each other's tokens."""
    draft = one_by_one(seed)
    token = draft.tokens
    swapped = torch.where(token == 4, 7, torch.where(token == 7, 4, token))
    return draft._replace(tokens=swapped)


def row_before(seed: int) -> Draft:
    draft = one_by_one(seed)
    return draft._replace(rows=draft.rows[:, [0, 0, 1]])


def withheld(seed: int, unlikely: bool = True) -> Draft:
    """The last token is left out if it came out unlikely, or as a certain one."""
    draft = one_by_one(seed)
    rows = draft.logits[draft.rows[:, -1]].softmax(-1)
    chance = rows.gather(1, draft.tokens[:, -1:])[:, 0]
    out = chance < 0.1 if unlikely else draft.tokens[:, -1] == 3
    return draft._replace(lengths=K - out.long())


def dropped(seed: int) -> Draft:
    """The same, of a draft that holds no row whose token was left out."""
    draft = withheld(seed)
    kept = draft.lengths == K
    return draft._replace(**{f: getattr(draft, f)[kept] for f in ("tokens", "tau", "rows")},
                          lengths=None)  # fmt: skip


def flags_left_out(seed: int) -> Draft:
    """Confident tokens were kept first, which the draft does not tell."""
    draft = in_steps(Reveal.highest_confidence(1), seed)
    return draft._replace(value_dependent=False, final_step=None)


MUTANTS = {
    "hotter than recorded": (partial(one_by_one, recorded=0.75), "rank"),
    "colder than recorded": (partial(one_by_one, recorded=0.85), "rank"),
    "two columns swapped": (columns_swapped, "token"),
    "columns in another order": (
        lambda seed: (d := one_by_one(seed))._replace(tokens=(d.tokens + 1) % V),
        "rank",
    ),
    "the row of the position before": (row_before, "rank"),
    "an unlikely token withheld": (withheld, "rank"),
    "a certain token withheld": (partial(withheld, unlikely=False), "token"),
    "drafts with an unlikely token dropped": (dropped, "rank"),
    "one noise for all positions": (partial(one_by_one, slots=[0] * K), "pair"),
    "one noise for all drafts": (lambda seed: one_by_one(7), "token"),
    "what confidence decided": (flags_left_out, "rank"),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_drafters_pass(name):
    report = check_drafter(HONEST[name], drafts=DRAFTS)
    assert report.passed, report


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name):
    mutant, what = MUTANTS[name]
    report = check_drafter(mutant, drafts=DRAFTS)
    assert report.failures(what), report


def test_fp32_gumbel_noise_is_found():
    """By two drafts, whose sequences share a row of logits."""
    row, N = tails.tail()[None], 16_384
    zeros, distribution = torch.zeros(N, 1, dtype=torch.int64), row_distribution(row)

    def draft(seed: int, sampler) -> Draft:
        torch.manual_seed(seed)
        tokens = sampler(row.expand(N, -1))[:, None]
        return Draft(tokens, zeros.int(), zeros, row, distribution)

    def exact(logits: torch.Tensor) -> torch.Tensor:
        return logits[0].double().softmax(-1).multinomial(N, replacement=True)

    assert check_drafter(partial(draft, sampler=exact), drafts=2).passed
    assert check_drafter(partial(draft, sampler=fp32_gumbel), drafts=2).failures("rare")


def guesses(seed: int) -> Draft:
    return Draft.guesses(torch.ones(B, K, dtype=torch.int64))


def changed(seed: int) -> Draft:
    draft = one_by_one(seed)
    draft.logits[5] /= 2
    return draft


def too_long(seed: int) -> Draft:
    return one_by_one(seed, slots=range(K + seed % 2))


# drafts that nothing can be said of, and what is
ANSWERS = {
    "draft: expected a Draft, got Tensor": lambda seed: torch.ones(B, K),
    "draft: expected records that `verify` may use, got 4 drafts without; bare guesses": guesses,
    "draft row 5 has no distribution: the distribution recorded for a drafted token is": changed,
    r"draft: expected as many .* got \[K, V\] of \[3, 12\], \[4, 12\]; set lengths": too_long,
    "draft.rows: expected rows of 1500 logits, got 1509": lambda seed: (
        draft := one_by_one(seed)
    )._replace(rows=draft.rows + 10),
}


@pytest.mark.parametrize("message", ANSWERS)
def test_drafts_that_cannot_be_compared(message):
    with pytest.raises((ValueError, TypeError, DistributionError), match=message):
        check_drafter(ANSWERS[message], drafts=4)
    with pytest.raises(ValueError, match="drafts: expected an integer >= 1, got 0"):
        check_drafter(ANSWERS[message], drafts=0)


def test_a_token_of_no_weight_is_a_failure():
    report = check_drafter(lambda seed: one_by_one(seed, top_k=2, recorded=0.7), drafts=2)
    assert report.passed  # too few to tell a temperature
    draft = one_by_one(3, top_k=2)
    for more in (1, V):  # a token that was cut off, and none of the drafter's
        wrong = draft._replace(tokens=draft.tokens + more)
        report = check_drafter(lambda seed, wrong=wrong: wrong, drafts=1)
        assert {f.p_value for f in report.failures("rank")} == {0.0}
