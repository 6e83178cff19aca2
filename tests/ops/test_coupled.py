"""Coupled draws: the race of exponential variates, and a text that no draft can change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdiff_kernels import Status, row_distribution, sample, verify
from specdiff_kernels.reference.numerics import exponential, weights
from tests.enumeration import first_word, patterns

from .helpers import assert_same, i64, one_hot_draft
from .interpreter import sized

pytestmark = pytest.mark.usefixtures("implementation")
NODES = 48


def laguerre() -> tuple[list[int], list[float]]:
    """Words whose exponential variates are the nodes of Gauss-Laguerre quadrature, and weights."""
    nodes, shares = np.polynomial.laguerre.laggauss(NODES)
    units = [round(float(np.exp(-node)) * 2**53) for node in nodes]
    return [max(unit - 1, 0) << 11 for unit in units], shares.tolist()


@pytest.mark.parametrize("V", [2, 3, 5])
def test_a_row_races_by_its_distribution(V):
    """P(token 0 wins) = e(0) / Z to 1e-12.

    For each variate of token 0 the op itself says from which word on another token beats it, the
    rest being out of the race; the mean over token 0 is a quadrature.
    """
    torch.manual_seed(V)
    row = torch.randn(1, 1, V).sort(descending=True).values  # token 0 the likeliest
    e = weights(row[0], row_distribution(row[0]))[0].tolist()
    words, shares = laguerre()
    n = NODES * (V - 1)
    other = torch.arange(1, V).repeat(NODES)
    nothing = one_hot_draft(torch.zeros(n, 0, dtype=torch.int64))
    given = torch.zeros(n, 1, V, dtype=torch.int64)  # word 0: a variate too large to win
    given[:, 0, 0] = patterns(words).repeat_interleave(V - 1)

    def loses(word: torch.Tensor) -> torch.Tensor:
        raced = given.scatter(2, other[:, None, None], word[:, None, None])
        rows = row.expand(n, 1, V)
        return verify(rows, nothing, rule="coupled", words=raced).emitted[:, 0] == other

    edges = first_word(loses, n)  # a larger word is a smaller variate
    survives = np.array([edge / 2**64 for edge in edges]).reshape(NODES, V - 1).prod(1)
    assert survives @ np.array(shares) == pytest.approx(e[0] / sum(e), abs=1e-12)


@pytest.mark.parametrize("keyed", [True, False])
def test_no_draft_changes_the_text(keyed):
    """Emitted tokens are those of K = 0 at each position, up to the first that was not drafted."""
    torch.manual_seed(1)
    B, K, V = 6, 4, 30
    target = torch.randn(B, K + 1, V) * 2
    seed, position = torch.arange(B) - 3, torch.arange(B) * 100
    noise = torch.randint(-(2**63), 2**63 - 1, (B, K + 1, V))
    none = one_hot_draft(torch.zeros(B, 0, dtype=torch.int64))

    def random(i: int, n: int) -> dict:
        if keyed:
            return {"seed": seed, "position": position + i}
        return {"words": noise[:, i : i + n].contiguous()}

    plain = torch.stack(
        [verify(target[:, i : i + 1], none, rule="coupled", **random(i, 1)).emitted[:, 0]
         for i in range(K + 1)], 1
    )  # fmt: skip
    wrong = torch.rand(B, K) < 0.3
    tokens = (plain[:, :K] + wrong) % V
    lengths = torch.tensor([4, 4, 3, 2, 1, 0])
    draft = one_hot_draft(tokens, lengths=lengths)
    result = verify(target, draft, rule="coupled", **random(0, K + 1))
    for b in range(B):
        right = (tokens[b] == plain[b, :K]).tolist()[: int(lengths[b])]
        n = right.index(False) if False in right else len(right)
        assert result.accepted[b] == n
        assert result.emitted[b].tolist() == plain[b, : n + 1].tolist() + [-1] * (K - n)


def test_drafts_by_the_same_noise_agree():
    """P(match) is sum_x 1 / sum_y max(p_y / p_x, q_y / q_x); independent draws agree far less.

    The bound is 4.5 standard deviations.
    """
    torch.manual_seed(2)
    N, V = sized(4000, interpreted=150), 12
    p_row, noise = torch.randn(1, V), torch.randn(1, V)
    q_row = p_row + 0.4 * noise
    p, q = p_row[0].double().softmax(0), q_row[0].double().softmax(0)
    ratios = torch.maximum(p / p[:, None], q / q[:, None])  # [x, y]
    match = (1 / ratios.sum(1)).sum().item()
    position = torch.arange(N)
    key = {"seed": torch.full((N,), 7), "position": position}
    drawn = [
        sample(row.expand(N, V), row_distribution(row.expand(N, V)), **key)
        for row in (p_row, q_row)
    ]
    share = (drawn[0] == drawn[1]).double().mean().item()
    allowed = 4.5 * (match * (1 - match) / N) ** 0.5
    assert abs(share - match) < allowed
    apart = sample(
        q_row.expand(N, V), row_distribution(q_row.expand(N, V)), seed=key["seed"], round=position
    )
    assert (drawn[0] == apart).double().mean().item() < match - allowed
    counts = torch.bincount(drawn[0], minlength=V).double() / N
    assert ((counts - p).abs() < 4.5 * (p * (1 - p) / N).sqrt()).all()


def test_a_reduced_vocabulary_races_with_its_own_ids():
    torch.manual_seed(3)
    ids = i64(0, 3, 4, 9, 11)
    small = torch.randn(20, 5)
    full = torch.full((20, 12), float("-inf"))
    full[:, ids] = small
    key = {"seed": torch.arange(20), "position": torch.arange(20) * 5}
    tokens = sample(small, row_distribution(small), draft_ids=ids, **key)
    assert torch.equal(tokens, sample(full, row_distribution(full), **key))


def test_one_word_for_each_token_and_position():
    """Tokens 2 n and 2 n + 1 share a Philox block, no more; the round is no part of the key."""
    row = torch.zeros(1, 64)
    distribution = row_distribution(row)
    winners = [
        sample(row, distribution, seed=i64(5), position=i64(at), round=i64(r)).item()
        for at in range(40)
        for r in (0, 9)
    ]
    assert winners[::2] == winners[1::2] and len(set(winners)) > 20


def test_ends_of_the_word():
    """The largest word makes E = 0, which wins; among equals the lowest index does."""
    row = torch.tensor([[0.0, -9.0, 5.0, float("-inf")]])
    distribution = row_distribution(row)
    for words, token in [((0, -1, 0, -1), 1), ((-1, -1, -1, -1), 0), ((0, 0, 0, 0), 2)]:
        assert sample(row, distribution, position=i64(0), words=i64(*words)[None]).item() == token
    assert (exponential(i64(0, 1, -1)) >= 0).all() and exponential(i64(-1)).item() == 0
    assert exponential(i64(0)).item() == pytest.approx(53 * np.log(2), rel=1e-15)


def test_greedy_and_truncated_rows():
    torch.manual_seed(4)
    N = sized(50, interpreted=10)
    logits = torch.randn(N, 40)
    key = {"seed": torch.arange(N), "position": torch.arange(N)}
    assert torch.equal(sample(logits, row_distribution(logits, 0.0), **key), logits.argmax(-1))
    distribution = row_distribution(logits, top_k=3)
    kept = weights(logits, distribution) > 0
    assert kept.gather(1, sample(logits, distribution, **key)[:, None]).all()


@pytest.mark.parametrize(("token", "status"), [(-1, Status.TOKEN), (2, Status.TOKEN)])
def test_faults(token, status):
    target = torch.zeros(1, 2, 2)
    draft = one_hot_draft(i64(token)[None])
    key = {"seed": i64(0), "position": i64(0)}
    result = verify(target, draft, rule="coupled", **key)
    assert result.status.item() == status and (result.emitted == -1).all()
    target[0, 0, 0] = float("nan")
    assert verify(target, draft, rule="coupled", **key).status.item() == Status.NAN
    with pytest.raises(ValueError, match=r"position: expected an integer, or .* got None"):
        verify(target, draft, rule="coupled", seed=i64(0), round=i64(0))
    with pytest.raises(ValueError, match="the coupled rule compares tokens and uses no q"):
        verify(target, draft, rule="coupled", record="final", **key)
    assert_same(
        verify(target[:, :1], one_hot_draft(i64()[None]), rule="coupled", **key),
        verify(target[:, :1], one_hot_draft(i64()[None]), rule="token", seed=i64(0), round=i64(0)),
    )
