"""Verification: what is accepted, what is emitted instead, and what is not even read."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from specdiff_kernels import (
    DistributionError,
    Draft,
    Status,
    Verified,
    check_status,
    row_distribution,
    verify,
)
from specdiff_kernels.reference.numerics import probability, weights
from tests.enumeration import first_word, probabilities

from .helpers import LAST_WORD, assert_same, i64, one_hot_draft, recorded_draft
from .interpreter import sized

pytestmark = pytest.mark.usefixtures("implementation")
NAN, INF = float("nan"), float("inf")


def words(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def lists(verified: Verified) -> list:
    assert not verified.bias.any()  # the rules here are exact
    return [field.tolist() for field in verified[:3]]


def distribution_of(logits) -> list[float]:
    distribution = row_distribution(logits[None])
    return (weights(logits[None], distribution)[0].double() / distribution.total.double()).tolist()


def outcome_distribution(target, draft, V):
    """Exact P(accept) of a K = 1 draft and the distribution of the token emitted after a
    rejection."""

    def asked(accept, last):
        n = len(last)
        repeated = draft._replace(
            tokens=draft.tokens.expand(n, 1),
            tau=draft.tau.expand(n, 1),
            rows=draft.rows.expand(n, 1),
        )
        return verify(target.expand(n, 2, V), repeated, words=torch.stack((accept, last), 1))

    accepted = first_word(lambda word: asked(word, torch.zeros_like(word)).accepted < 1, 1)[0]
    rejected = probabilities(
        lambda word: asked(torch.full_like(word, LAST_WORD), word).emitted[:, 0], 1, V
    )[0]
    return Fraction(accepted, 2**64), rejected


def test_acceptance_and_residual_are_leviathans():
    """P(accept x) = min(1, p(x) / q(x)); the residual is (p - q)+ normalised."""
    torch.manual_seed(0)
    V = 5
    p_logits, q_logits = torch.randn(2, V), torch.randn(1, V)
    p, q = distribution_of(p_logits[0]), distribution_of(q_logits[0])
    excess = [max(a - b, 0) for a, b in zip(p, q, strict=True)]
    for x in range(V):
        draft = recorded_draft(torch.tensor([[x]]), q_logits, row_distribution(q_logits))
        accept, residual = outcome_distribution(p_logits[None], draft, V)
        assert float(accept) == pytest.approx(min(1, p[x] / q[x]), abs=1e-14)
        if accept < 1:
            assert [float(r) for r in residual] == pytest.approx(
                [e / sum(excess) for e in excess], abs=1e-14
            )


def test_one_hot_residual_is_the_target_without_x():
    torch.manual_seed(1)
    p_logits = torch.randn(2, 4)
    p = distribution_of(p_logits[0])
    accept, residual = outcome_distribution(p_logits[None], one_hot_draft(torch.tensor([[2]])), 4)
    without = [0 if v == 2 else p[v] / (1 - p[2]) for v in range(4)]
    assert float(accept) == pytest.approx(p[2], abs=1e-14)
    assert [float(r) for r in residual] == pytest.approx(without, abs=1e-14)


def prefix_chances(target, draft, K):
    """h_i of the block rule: exact P(a prefix of i tokens is accepted | no longer one was)."""
    column = torch.arange(K + 1)

    def misses(word):
        longer = torch.where(column > torch.arange(K)[:, None], LAST_WORD, 0)
        longer[torch.arange(K), torch.arange(K)] = word
        shown = draft._replace(**{n: getattr(draft, n).expand(K, K) for n in FIELDS})
        result = verify(target.expand(K, K + 1, -1), shown, rule="block", words=longer)
        return result.accepted < torch.arange(1, K + 1)

    return [edge / 2**64 for edge in first_word(misses, K)]


FIELDS = ("tokens", "tau", "rows")


@pytest.mark.parametrize("one_hot", [False, True])
def test_block_rule_is_sun_et_als(one_hot):
    """h_i = S_i / (S_i + 1 - P_i), h_K = P_K; the last word draws from (P_i p - q)+."""
    for seed in range(sized(2, interpreted=1)):
        torch.manual_seed(seed)
        V, K = 5, 3
        p_logits, pool = torch.randn(1, K + 1, V), torch.randn(K, V)
        tokens = torch.randint(0, V, (1, K))
        draft = (
            one_hot_draft(tokens)
            if one_hot
            else recorded_draft(tokens, pool, row_distribution(pool))
        )
        p = [distribution_of(row) for row in p_logits[0]]
        q = [[float(v == x) for v in range(V)] if one_hot else distribution_of(row)
             for x, row in zip(tokens[0].tolist(), pool, strict=True)]  # fmt: skip
        P = [1.0]
        for i, x in enumerate(tokens[0].tolist()):
            P.append(min(1.0, P[-1] * p[i][x] / q[i][x]))
        excess = [[max(P[i] * a - b, 0) for a, b in zip(p[i], q[i], strict=True)] for i in range(K)]
        S = [sum(row) for row in excess]
        h = [1.0 if P[i] == 1 else S[i] / (S[i] + 1 - P[i]) for i in range(1, K)] + [P[K]]
        for i, have in enumerate(prefix_chances(p_logits, draft, K)):
            if 1.0 not in h[i + 1 :]:
                assert have == pytest.approx(h[i], abs=1e-13)
        for i in range(K):  # accept i tokens and no more, if there is a way
            if 1.0 not in h[i:] and (i == 0 or h[i - 1] > 0):
                distribution = distribution_behind(p_logits, draft, K, i, V)
                assert distribution == pytest.approx([e / S[i] for e in excess[i]], abs=1e-13)


def distribution_behind(target, draft, K, accepted, V) -> list[float]:
    """Distribution of the token that the block rule emits behind so many accepted ones."""

    def behind(last):
        n = len(last)
        fixed = torch.full((n, K + 1), LAST_WORD)
        fixed[:, accepted - 1 if accepted else K] = 0
        fixed[:, -1] = last
        shown = draft._replace(**{f: getattr(draft, f).expand(n, K) for f in FIELDS})
        result = verify(target.expand(n, -1, -1), shown, rule="block", words=fixed)
        assert (result.accepted == accepted).all()
        return result.emitted[:, accepted]

    return [float(share) for share in probabilities(behind, 1, V)[0]]


def test_block_rule_accepts_at_least_as_many():
    """Expected accepted tokens over every draft, exactly; strictly more somewhere."""
    V, K = 3, 2
    gains = []
    for seed in range(sized(2, interpreted=1)):
        torch.manual_seed(seed)
        target_table, pool = torch.randn(1 + V, V), torch.randn(1 + V, V)
        distribution = row_distribution(pool)
        p, q = ([distribution_of(row) for row in rows] for rows in (target_table, pool))
        token_mean = block_mean = 0.0
        for x, y in ((x, y) for x in range(V) for y in range(V)):
            chance = q[0][x] * q[1 + x][y]
            a, b = min(1, p[0][x] / q[0][x]), min(1, p[1 + x][y] / q[1 + x][y])
            token_mean += chance * (a + a * b)
            target = target_table[torch.tensor([0, 1 + x, 0])][None]
            draft = Draft(torch.tensor([[x, y]]), torch.zeros(1, 2).int(),
                          torch.tensor([[0, 1 + x]]), pool, distribution)  # fmt: skip
            h1, h2 = prefix_chances(target, draft, K)
            block_mean += chance * (2 * h2 + (1 - h2) * h1)
        gains.append(block_mean - token_mean)
    assert min(gains) > -1e-12 and max(gains) > 1e-3


def test_block_rule_reads_no_further_than_a_prefix_with_a_chance():
    """A drafted token of probability 0 leaves none; what stands before it may be accepted."""
    target = torch.tensor([[[0.0, 0.0], [0.0, -INF], [NAN, NAN], [INF, 0.0]]])
    pool = torch.zeros(3, 2)
    draft = recorded_draft(torch.tensor([[0, 1, 0]]), pool, row_distribution(pool))
    result = verify(target, draft, rule="block", words=words([0, 0, 0, LAST_WORD]))
    assert lists(result) == [[1], [[0, 0, -1, -1]], [0]]
    reached = verify(target, draft._replace(tokens=torch.tensor([[0, 0, 0]])), rule="block",
                     words=words([0, 0, 0, 0]))  # fmt: skip
    assert lists(reached) == [[0], [[-1] * 4], [Status.NAN]]
    bonus = target[:, [0, 0, 3]]
    taken = recorded_draft(torch.tensor([[0, 0]]), pool[:2], row_distribution(pool[:2]))
    assert verify(bonus, taken, rule="block", words=words([0, 0, 0])).status.item() == (
        Status.POS_INF
    )


@pytest.mark.parametrize("change", [{"lengths": i64(3)}, {"tokens": i64(9)[None]},
                                    {"rows": i64(7)[None]}])  # fmt: skip
def test_block_rule_has_the_token_rules_faults(change):
    pool = torch.zeros(1, 2)
    draft = recorded_draft(i64(0)[None], pool, row_distribution(pool))._replace(**change)
    results = [verify(torch.zeros(1, 2, 2), draft, rule=rule, words=words([0, 0]))
               for rule in ("token", "block")]  # fmt: skip
    assert_same(*results)
    assert results[0].status.item() == Status.TOKEN


def test_equal_distributions_accept_every_word():
    """p = q bitwise: u q < p for every u < 1."""
    logits = torch.randn(1, 3, 100)
    pool = logits[0, :2]
    draft = recorded_draft(torch.tensor([[5, 7]]), pool, row_distribution(pool))
    result = verify(logits, draft, words=words([LAST_WORD, LAST_WORD, 0]))
    assert result.accepted.tolist() == [2]


def test_impossible_tokens_are_never_accepted():
    """p(x) = 0, even at u = 0; the residual then starts at the first token with p > q."""
    target = torch.tensor([[[-INF, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    pool = torch.zeros(1, 3)
    for draft in (
        recorded_draft(torch.tensor([[0]]), pool, row_distribution(pool)),
        one_hot_draft(torch.tensor([[0]])),
    ):
        assert lists(verify(target, draft, words=words([0, 0]))) == [[0], [[1, -1]], [0]]


def test_recorded_token_without_weight_is_a_fault():
    """q(x) = 0 cannot have been drawn: nothing is emitted on such a record."""
    pool = torch.tensor([[-INF, 0.0]])
    draft = recorded_draft(torch.tensor([[0]]), pool, row_distribution(pool))
    result = verify(torch.zeros(1, 2, 2), draft, words=words([0, 0]))
    assert lists(result) == [[0], [[-1, -1]], [Status.DRAFT]]
    with pytest.raises(DistributionError):
        check_status(result.status)


def test_empty_residual_falls_back_to_the_target():
    """q gives x one unit of 2^62, p none: x is rejected, yet every p(v) - q(v) rounds to 0."""
    V = 2**18 + 1
    target, pool = torch.zeros(1, 2, V), torch.zeros(1, V)
    target[..., 5], pool[0, 5] = -INF, -30.0
    distribution = row_distribution(pool)
    assert distribution.total.item() == 2**62 + 1
    result = verify(
        target, recorded_draft(i64(5)[None], pool, distribution), words=words([0, LAST_WORD])
    )
    assert lists(result) == [[0], [[V - 1, -1]], [0]]
    only = torch.tensor([[[0.0], [0.0]]])  # V = 1: nothing is left without x
    hot = one_hot_draft(torch.tensor([[0]]))
    assert lists(verify(only, hot, words=words([LAST_WORD, LAST_WORD])))[1] == [[0, 0]]


def test_bonus_follows_the_last_drafted_token():
    target = torch.tensor([[[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]])
    result = verify(target, one_hot_draft(torch.tensor([[0, 1]])), 0.0, words=words([0, 0, 0]))
    assert lists(result) == [[2], [[0, 1, 0]], [0]]


@pytest.mark.parametrize("K", [0, 1])
def test_short_drafts(K):
    """K = 0 is plain sampling; its words are those of a bonus token."""
    torch.manual_seed(3)
    logits = torch.randn(4, K + 1, 50)
    draft = one_hot_draft(torch.zeros(4, K, dtype=torch.int64))
    result = verify(logits, draft, seed=i64(1, 2, 3, 4), round=i64(0, 0, 0, 0))
    assert (result.emitted[:, 0] >= 0).all()
    assert (result.accepted <= K).all()


def test_ragged_lengths():
    """Positions beyond a row's length are neither read nor checked."""
    target = torch.zeros(3, 3, 2)
    target[..., 1] = 50
    target[0, 1:], target[1, 2:] = NAN, NAN
    tokens = torch.tensor([[-1, 99], [1, -5], [1, 1]])
    draft = one_hot_draft(tokens, lengths=i64(0, 1, 2))
    result = verify(target, draft, words=torch.zeros(3, 3, dtype=torch.int64))
    assert lists(result) == [[0, 1, 2], [[1, -1, -1], [1, 1, -1], [1, 1, 1]], [0, 0, 0]]


def test_rows_behind_the_first_rejection_are_not_read():
    target = torch.tensor([[[0.0, -INF], [NAN, NAN], [INF, 0.0]]])
    draft = one_hot_draft(torch.tensor([[1, 1]]))
    assert lists(verify(target, draft, words=words([0, 0, 0]))) == [[0], [[0, -1, -1]], [0]]


@pytest.mark.parametrize(
    ("row", "status"),
    [([NAN, 0.0], Status.NAN), ([INF, 0.0], Status.POS_INF), ([-INF, -INF], Status.EMPTY)],
)
def test_a_fault_silences_its_row_alone(row, status):
    target = torch.zeros(2, 2, 2)
    target[..., 1] = 50
    target[1, 1] = torch.tensor(row)
    result = verify(target, one_hot_draft(torch.tensor([[1], [1]])), words=words([0, 0], [0, 0]))
    assert lists(result) == [[1, 0], [[1, 1], [-1, -1]], [0, status]]


@pytest.mark.parametrize("token", [-1, 2, 2**40])
def test_ids_outside_the_vocabulary(token):
    result = verify(torch.zeros(1, 2, 2), one_hot_draft(i64(token)[None]), words=words([0, 0]))
    assert lists(result) == [[0], [[-1, -1]], [Status.TOKEN]]


def test_bad_entries_of_lengths_and_rows():
    draft = one_hot_draft(torch.zeros(2, 1, dtype=torch.int64), lengths=i64(2, -1))
    result = verify(torch.zeros(2, 2, 2), draft, words=words([0, 0], [0, 0]))
    assert result.status.tolist() == [Status.TOKEN, Status.TOKEN]
    pool = torch.zeros(1, 2)
    draft = recorded_draft(torch.tensor([[0]]), pool, row_distribution(pool))._replace(
        rows=i64(7)[None]
    )
    result = verify(torch.zeros(1, 2, 2), draft, words=words([0, 0]))
    assert result.status.tolist() == [Status.TOKEN]


def test_running_max_and_value_dependence_choose_one_hot():
    """A position drawn in an earlier step than one before it is checked as a bare guess."""
    torch.manual_seed(4)
    B = sized(64, interpreted=10)
    target, pool = torch.randn(B, 3, 8), torch.randn(2 * B, 8)
    tokens = torch.randint(0, 8, (B, 2))
    recorded = recorded_draft(tokens, pool, row_distribution(pool))
    rows = torch.arange(2 * B).view(B, 2)
    late_first = torch.tensor([[1, 0]], dtype=torch.int32).expand(B, 2)
    random = torch.randint(-(2**63), 2**63 - 1, (B, 3))
    by_rule = verify(target, recorded._replace(tau=late_first), words=random)
    by_hand = verify(
        target, recorded._replace(rows=torch.stack((rows[:, 0], rows[:, 1] * 0 - 1), 1)),
        words=random,
    )  # fmt: skip
    assert_same(by_rule, by_hand)
    dependent = verify(target, recorded._replace(value_dependent=True), words=random)
    assert_same(dependent, verify(target, recorded, record="one-hot", words=random))
    assert not torch.equal(dependent.accepted, verify(target, recorded, words=random).accepted)


def test_reduced_vocabulary_equals_its_full_expansion():
    """q over draft_ids is q over V with -inf everywhere else."""
    torch.manual_seed(5)
    ids = i64(1, 4, 5, 9)
    pool = torch.randn(60, 4)
    full = torch.full((60, 12), -INF)
    full[:, ids] = pool
    tokens = ids[torch.randint(0, 4, (20, 3))]
    target = torch.randn(20, 4, 12)
    random = torch.randint(-(2**63), 2**63 - 1, (20, 4))
    small = recorded_draft(tokens, pool, row_distribution(pool), draft_ids=ids)
    large = recorded_draft(tokens, full, row_distribution(full))
    assert_same(verify(target, small, words=random), verify(target, large, words=random))


def test_greedy_and_sampled_rows_in_one_batch():
    torch.manual_seed(6)
    target = torch.randn(2, 3, 30)
    tokens = target[:, :2].argmax(-1)
    draft = one_hot_draft(tokens)
    random = words([LAST_WORD] * 3, [LAST_WORD] * 3)
    result = verify(target, draft, torch.tensor([0.0, 1.0]), words=random)
    assert result.accepted.tolist() == [2, 0]
    assert result.emitted[0].tolist() == target[0].argmax(-1).tolist()
    assert_same(
        verify(target, draft, rule="greedy", words=random),
        verify(target, draft, 0.0, words=random),
    )


def test_truncated_targets_emit_kept_tokens_only():
    torch.manual_seed(7)
    B = sized(200, interpreted=10)
    target, pool = torch.randn(B, 2, 40), torch.randn(B, 40)
    distribution = row_distribution(target[:, 0], top_k=3)
    kept = weights(target[:, 0], distribution) > 0
    draft = recorded_draft(torch.randint(0, 40, (B, 1)), pool, row_distribution(pool))
    zero = torch.zeros(B, dtype=torch.int64)
    result = verify(target, draft, top_k=3, seed=torch.arange(B), round=zero)
    assert kept.gather(1, result.emitted[:, :1]).all()


def test_offsets_beyond_32_bits():
    """Rows more than 2^31 elements apart; the pages between are never touched."""
    stride, V = 2**31 + 5, 40
    store = torch.empty(stride + 2 * V, dtype=torch.bfloat16)
    target = store.as_strided((1, 2, V), (0, stride, 1))
    target.copy_(torch.randn(1, 2, V))
    near = target.clone()
    draft = one_hot_draft(near[:, :1].argmax(-1))
    random = words([0, 12345])
    assert_same(verify(target, draft, words=random), verify(near, draft, words=random))
    pool = store.as_strided((2, V), (stride, 1))
    assert_same(row_distribution(pool), row_distribution(pool.clone()))


def test_views_out_and_untouched_inputs():
    torch.manual_seed(8)
    frame = torch.full((3, 6, 50), NAN)
    target = frame[:, 1:4, 5:37]
    target.copy_(torch.randn(3, 3, 32))
    pool = torch.randn(6, 32)
    draft = recorded_draft(torch.randint(0, 32, (3, 2)), pool, row_distribution(pool))
    random = torch.randint(-(2**63), 2**63 - 1, (3, 3))
    before = frame.clone()
    expected = verify(target.contiguous(), draft, words=random)
    out = Verified(*(torch.full_like(field, 77) for field in expected))
    assert verify(target, draft, words=random, out=out) is out
    assert_same(out, expected)
    assert torch.equal(frame.nan_to_num(), before.nan_to_num())
    assert probability(torch.ones(1), torch.ones(1)).item() == 1


GOOD = one_hot_draft(torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": i64(0)}, ValueError, r"draft.tokens: expected shape \[B, K\]"),
        ({"tau": i64(0)[None]}, TypeError, "draft.tau: expected dtype int32"),
        (
            {"logits": torch.zeros(1, 2)},
            ValueError,
            "draft: expected logits and distribution together",
        ),
        ({"lengths": i64(1, 1)}, ValueError, "draft.lengths: expected shape"),
        (
            {
                "logits": torch.zeros(1, 2),
                "distribution": row_distribution(torch.zeros(1, 2)),
                "draft_ids": i64(1, 1),
            },
            ValueError,
            "draft.draft_ids: expected strictly increasing",
        ),
        (
            {"logits": torch.zeros(1, 3), "distribution": row_distribution(torch.zeros(1, 3))},
            ValueError,
            "draft.logits: expected shape",
        ),
        (
            {
                "logits": torch.zeros(1, 2),
                "distribution": row_distribution(torch.zeros(1, 2))._replace(total=torch.ones(1)),
            },
            TypeError,
            "draft.distribution.total: expected dtype int64",
        ),
    ],
)
def test_bad_drafts_are_named(change, error, message):
    with pytest.raises(error, match=message):
        verify(torch.zeros(1, 2, 2), GOOD._replace(**change), words=words([0, 0]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rule": "tokens"}, ValueError, "rule: expected one of token, block, greedy"),
        ({"temperature": -1.0}, ValueError, "temperature: expected"),
        ({"words": words([0])}, ValueError, "words: expected shape"),
        ({"words": None}, ValueError, "seed: expected an integer, or a tensor"),
        (
            {"out": Verified(i64(0), i64(0, 0), i64(0), i64(0))},
            ValueError,
            "out.emitted: expected shape",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        verify(torch.zeros(1, 2, 2), GOOD, **{"words": words([0, 0]), **arguments})
    with pytest.raises(ValueError, match="no positions"):
        verify(torch.zeros(1, 0, 2), Draft(*(x[:, :0] for x in GOOD[:3])), words=words([0, 0]))


def test_an_accepted_draft_row_is_read_at_its_token_alone():
    """Its distribution came with the draft: whatever else became of the row does not matter."""
    torch.manual_seed(9)
    target = torch.randn(1, 3, 70)
    pool = target[0, :2].clone()
    tokens = torch.tensor([[3, 40]])
    draft = recorded_draft(tokens, pool, row_distribution(pool))
    random = words([LAST_WORD, LAST_WORD, 5])
    expected = verify(target, draft, words=random)
    assert expected.accepted.tolist() == [2]
    spoilt = torch.full_like(pool, NAN)
    spoilt.scatter_(1, tokens.T, pool.gather(1, tokens.T))
    assert_same(verify(target, draft._replace(logits=spoilt), words=random), expected)
