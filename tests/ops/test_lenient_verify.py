"""The lenient rule: exact at the edges, counted where it is not, refused where it is not meant."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from specdiff_kernels import (
    DistributionError,
    Draft,
    Lenience,
    Status,
    check_status,
    row_distribution,
    sample,
    verify,
)
from specdiff_kernels.reference.numerics import weights

from .helpers import LAST_WORD, assert_same, i64, one_hot_draft, recorded_draft
from .interpreter import sized

pytestmark = pytest.mark.usefixtures("implementation")
INF, NAN = float("inf"), float("nan")
EXACT = [Lenience("lenience", 1.0), Lenience("additive", 0.0), Lenience("ensemble", 1.0)]
LENIENT = [Lenience("lenience", 0.5), Lenience("additive", 0.2), Lenience("ensemble", 0.6)]


def a_round(B: int, K: int, V: int, *, reduced: bool = False) -> tuple[torch.Tensor, Draft, dict]:
    """Greedy and sampled sequences, ragged drafts, some positions of which are bare guesses."""
    random = torch.Generator().manual_seed(V)
    normal = lambda *shape: torch.randn(shape, generator=random)
    integers = lambda low, high, *shape: torch.randint(low, high, shape, generator=random)
    ids = torch.arange(V)[:: 2 if reduced else 1]
    target = normal(B, K + 1, V)
    pool = target[:, :K].reshape(B * K, V)[:, ids] + normal(B * K, len(ids))
    distribution = row_distribution(pool, backend="reference")
    drawn = sample(pool, distribution, words=integers(-(2**63), 2**63 - 1, B * K), draft_ids=ids,
                   backend="reference")  # fmt: skip
    rows = torch.arange(B * K).view(B, K)
    rows = rows.masked_fill(torch.rand(B, K, generator=random) < 0.3, -1)
    draft = Draft(
        drawn.view(B, K), torch.zeros(B, K).int(), rows, pool, distribution,
        ids if reduced else None, integers(0, K + 1, B),
    )  # fmt: skip
    temperature = torch.where(torch.rand(B, generator=random) < 0.3, 0.0, 0.8)
    return (
        target,
        draft,
        {"temperature": temperature, "words": integers(-(2**63), 2**63 - 1, B, K + 1)},
    )


def distributions(
    target: torch.Tensor, draft: Draft, b: int, i: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """p and q of one position, f64 [V]; q is 1 at a bare guess."""
    V = target.shape[-1]
    distribution = row_distribution(target[b, i][None], 0.8, backend="reference")
    p = weights(target[b, i][None], distribution)[0].double() / distribution.total.double()
    q = torch.zeros(V, dtype=torch.float64)
    r = int(draft.rows[b, i])
    if r < 0:
        q[draft.tokens[b, i]] = 1
        return p, q
    ids = torch.arange(V) if draft.draft_ids is None else draft.draft_ids
    row = type(draft.distribution)(*(field[r : r + 1] for field in draft.distribution))
    q[ids] = weights(draft.logits[r : r + 1], row)[0].double() / row.total.double()
    return p, q


def raised(p: torch.Tensor, q: torch.Tensor, lenience: Lenience) -> torch.Tensor:
    kind, a = lenience
    more = {"lenience": p / a, "additive": p + a, "ensemble": (1 - a) * q + a * p}[kind]
    return torch.where(p > 0, torch.maximum(p, more), 0)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("lenience", EXACT, ids=str)
def test_the_edges_are_the_token_rule(lenience, reduced):
    target, draft, options = a_round(sized(40, interpreted=8), 3, 50, reduced=reduced)
    want = verify(target, draft, **options)
    assert_same(verify(target, draft, rule="lenient", lenience=lenience, **options), want)
    assert not want.bias.any() and want.accepted.any()


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("lenience", LENIENT, ids=str)
def test_bias_and_acceptance_are_yin_et_als(lenience, reduced):
    """sum_v (min(q, p') - p)+ over the examined positions: within V 2^-60 for each position's
    integers, 2^-50 for p and q, whose quotients are rounded differently here."""
    target, draft, options = a_round(sized(40, interpreted=20), 3, 50, reduced=reduced)
    result = verify(target, draft, rule="lenient", lenience=lenience, **options)
    seen = set()
    for b, (accepted, length) in enumerate(
        zip(result.accepted.tolist(), draft.lengths.tolist(), strict=True)
    ):
        want = 0.0
        for i in range(min(accepted + 1, length)):
            p, q = distributions(target, draft, b, i)
            p = torch.eye(50)[p.argmax()].double() if options["temperature"][b] == 0 else p
            high, x = raised(p, q, lenience), draft.tokens[b, i]
            want += float((torch.minimum(q, high) - p).clamp(min=0).sum())
            u = ((options["words"][b, i].item() >> 11) & (2**53 - 1)) * 2.0**-53
            assert (u * q[x] < high[x]) == (i < accepted)
            seen.add((i < accepted, bool(u * q[x] < p[x])))
        assert result.bias[b].item() == pytest.approx(want, abs=1e-13)
    assert (True, False) in seen  # accepted by leniency alone
    assert (result.bias > 0).any()


@pytest.mark.parametrize("lenience", LENIENT, ids=str)
def test_greedy_rows_are_left_alone(lenience):
    """There p is 0 or 1, and so is p'."""
    target, draft, options = a_round(sized(40, interpreted=8), 3, 20)
    options["temperature"] = torch.zeros(len(target))
    guess = draft._replace(tokens=target[:, :3].argmax(-1), rows=draft.rows * 0 - 1)
    for one in (draft, guess):
        want = verify(target, one, **options)
        assert_same(verify(target, one, rule="lenient", lenience=lenience, **options), want)
    assert torch.equal(want.accepted, draft.lengths)


@pytest.mark.parametrize("lenience", LENIENT, ids=str)
def test_impossible_tokens_are_never_accepted(lenience):
    """p(x) = 0, as logits have it or as truncation leaves it, even at u = 0."""
    target = torch.tensor([[[-INF, 0.0, 0.5, -9.0], [0.0] * 4]]).repeat(2, 1, 1)
    pool = torch.zeros(2, 4)
    tokens = i64(0, 3)[:, None]
    for draft in (recorded_draft(tokens, pool, row_distribution(pool)), one_hot_draft(tokens)):
        result = verify(target, draft, top_k=2, rule="lenient", lenience=lenience,
                        words=torch.zeros(2, 2, dtype=torch.int64))  # fmt: skip
        assert result.accepted.tolist() == [0, 0]
        assert set(result.emitted[:, 0].tolist()) <= {1, 2}


@pytest.mark.parametrize(
    ("kind", "bad"),
    [("lenience", (0.0, 1.1, NAN)), ("additive", (-0.1, NAN, -INF)),
     ("ensemble", (-0.1, 1.1, NAN))],
)  # fmt: skip
def test_an_amount_out_of_range_silences_its_row_alone(kind, bad):
    target, draft, options = a_round(4, 2, 9)
    amount = torch.tensor([0.5, *bad], dtype=torch.float64)
    result = verify(target, draft, rule="lenient", lenience=Lenience(kind, amount), **options)
    alone = verify(target, draft, rule="lenient", lenience=Lenience(kind, 0.5), **options)
    assert result.status.tolist() == [Status.OK] + [Status.PARAMETER] * 3
    assert result.bias.tolist() == [alone.bias[0].item(), 0, 0, 0]
    assert torch.equal(result.emitted[0], alone.emitted[0]) and (result.emitted[1:] == -1).all()
    with pytest.raises(DistributionError, match="an amount of lenience in"):
        check_status(result.status)


def test_rows_have_amounts_of_their_own():
    B = sized(20, interpreted=6)
    target, draft, options = a_round(B, 3, 30)
    amount = torch.linspace(0.1, 1, B, dtype=torch.float64)
    result = verify(target, draft, rule="lenient", lenience=Lenience("ensemble", amount), **options)
    for b in range(0, B, 5):
        alone = Lenience("ensemble", amount[b].item())
        other = verify(target, draft, rule="lenient", lenience=alone, **options)
        for field, want in zip(result, other, strict=True):
            assert torch.equal(field[b], want[b])


def test_an_amount_may_be_a_fraction():
    target, draft, options = a_round(4, 2, 9)
    have, want = (
        verify(target, draft, rule="lenient", lenience=Lenience("additive", amount), **options)
        for amount in (Fraction(1, 8), 0.125)
    )
    assert_same(have, want)


def test_a_faulty_row_spends_nothing():
    """The fault lies behind a position that has spent."""
    target = torch.tensor([[[0.0, 1.0], [NAN, 0.0]]])
    draft = one_hot_draft(i64(0)[None])
    options = {"rule": "lenient", "lenience": Lenience("ensemble", 0.0), "words": i64(0, 0)[None]}
    result = verify(target, draft, **options)
    assert (result.status.item(), result.bias.item()) == (Status.NAN, 0.0)
    target[0, 1, 0] = 0.0
    assert verify(target, draft, **options).bias.item() == pytest.approx(
        1 - target[0, 0].double().softmax(0)[0].item(), abs=2e-7
    )  # the weights' relative error is 1.83e-7


def test_ids_that_the_target_does_not_have_spend_nothing():
    """Compiled code does not look at them beforehand. q is 1/2 at both ids, p 1/4 at all tokens."""
    pool = torch.zeros(1, 2)
    draft = recorded_draft(i64(0)[None], pool, row_distribution(pool), draft_ids=i64(0, 10**10))
    torch._dynamo.reset()
    result = torch.compile(verify, backend="eager", fullgraph=True)(
        torch.zeros(1, 2, 4), draft, rule="lenient", lenience=Lenience("additive", 0.1),
        words=i64(0, 0)[None],
    )  # fmt: skip
    assert (result.status.item(), result.accepted.item()) == (Status.OK, 1)
    assert result.bias.item() == pytest.approx(0.1, abs=1e-15)


def test_rows_behind_the_first_rejection_spend_nothing():
    """They are not even read."""
    target = torch.tensor([[[0.0, -INF], [NAN, NAN]]])
    draft = one_hot_draft(i64(1)[None])
    result = verify(target, draft, rule="lenient", lenience=LENIENT[0], words=i64(0, 0)[None])
    assert [field.tolist() for field in result] == [[0], [[0, -1]], [Status.OK], [0.0]]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"rule": "lenient"}, ValueError, "lenience: rule 'lenient' needs one, got None; pass"),
        ({"lenience": LENIENT[0]}, ValueError,
         r"lenience: only rule 'lenient' takes one, got Lenience\(.*\) under rule 'token'"),
        ({"rule": "block", "lenience": EXACT[0]}, ValueError, "under rule 'block'"),
        ({"rule": "lenient", "lenience": 0.5}, TypeError, "lenience: expected a Lenience, got flo"),
        ({"rule": "lenient", "lenience": Lenience("more", 1.0)}, ValueError,
         "lenience.kind: expected one of lenience, additive, ensemble, got 'more'"),
        ({"rule": "lenient", "lenience": Lenience("lenience", 0.0)}, ValueError,
         r"lenience.amount: expected a number in \(0, 1\] for 'lenience', got 0.0"),
        ({"rule": "lenient", "lenience": Lenience("ensemble", NAN)}, ValueError,
         r"lenience.amount: expected a number in \[0, 1\] for 'ensemble', got nan"),
        ({"rule": "lenient", "lenience": Lenience("additive", "1")}, ValueError,
         "lenience.amount: expected a number >= 0 for 'additive', got '1'"),
        ({"rule": "lenient", "lenience": Lenience("additive", torch.zeros(1))}, TypeError,
         "lenience.amount: expected dtype float64, got float32"),
        ({"rule": "lenient", "lenience": Lenience("additive", torch.zeros(2).double())}, ValueError,
         "lenience.amount: expected shape"),
        ({"rule": "lenient", "lenience": LENIENT[0], "position": i64(0)}, ValueError,
         "position: only the coupled rule takes one"),
    ],
)  # fmt: skip
def test_what_is_refused(how, error, message):
    draft = one_hot_draft(i64(0)[None])
    with pytest.raises(error, match=message):
        verify(torch.zeros(1, 2, 2), draft, words=i64(LAST_WORD, 0)[None], **how)
