"""Divergences of two rows' distributions: as exact as torch's fp32, with the gradients of their
formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdiff_kernels import (
    RowDivergence,
    backends,
    row_distribution,
    row_divergence,
    sample,
    verify,
)
from specdiff_kernels.ops.row_divergence import BACKWARD, OP

from .conftest import ON_CPU, forced
from .helpers import recorded_draft

NAN, INF = float("nan"), float("inf")
TRAINED = ("tv", "kl", "reverse_kl", "draft_entropy")
# V, D (None: all of them)
SIZES = [(1, None), (31, None), (31, 7), (1024, 1024), (1025, 40), (50257, None), (50257, 8192)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("implementation")


@pytest.fixture(params=ON_CPU)
def implementation(request):
    with forced(request.param):
        yield request.param


def plain(target, draft, ids=None, temperature=1.0) -> RowDivergence:
    """The formulas, in the dtype of the logits."""
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None].to(target.dtype)
    all_p, log_q = (target / temperature).log_softmax(-1), (draft / temperature).log_softmax(-1)
    log_p = all_p if ids is None else all_p[:, ids]
    return RowDivergence(
        (log_q.exp() - log_p.exp()).clamp(min=0).sum(-1),
        expected(log_p, log_p - log_q),
        expected(log_q, log_q - log_p),
        -expected(all_p, all_p),
        -expected(log_q, log_q),
    )


def expected(log_p, x):
    """sum of p x, where 0 times anything is 0"""
    return torch.where(log_p == -INF, 0.0, log_p.exp() * x).sum(-1)


def inputs(V, D=None, N=6, scale=4.0, distance=1.0, dtype=torch.float32):
    """Target, draft, ids: a draft that is like the target, but for noise."""
    random = torch.Generator().manual_seed(V + (D or 0))
    target = torch.randn(N, V, generator=random) * scale
    ids = None if D is None else torch.randperm(V, generator=random)[:D].sort().values
    draft = target if ids is None else target[:, ids]
    draft = draft + distance * torch.randn(draft.shape, generator=random) + 3
    return target.to(dtype), draft.to(dtype), ids


def gradient(function, target, draft, ids, temperature, **weights):
    """Of a weighted sum of outputs, with respect to the draft's logits."""
    draft = draft.detach().requires_grad_()
    row = function(target, draft, ids, temperature)
    total = sum((weight * getattr(row, name)).sum() for name, weight in weights.items())
    return torch.autograd.grad(total, draft)[0]


def rms(x):
    return x.double().square().mean().sqrt()


def assert_as_exact_as_torch(have, plainly, exact, ulp=2.0**-23):
    """At most twice torch's error, root mean square; one ulp of the result is allowed anyway."""
    assert rms(have - exact) <= 2 * rms(plainly - exact) + ulp * rms(exact)


# --- values ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("V", "D"), SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor([0.3, 0.5, 0.8, 1.0, 1.5, 3.0])])
def test_error_is_at_most_twice_that_of_torch(V, D, dtype, temperature):
    target, draft, ids = inputs(V, D, dtype=dtype)
    have = row_divergence(target, draft, ids, temperature)
    plainly = plain(target.float(), draft.float(), ids, temperature)
    exact = plain(target.double(), draft.double(), ids, temperature)
    for one, other, truth in zip(have, plainly, exact, strict=True):
        assert one.dtype == torch.float32 and one.shape == (len(target),)
        assert_as_exact_as_torch(one, other, truth)


@pytest.mark.parametrize("scale", [0.0, 0.01, 30.0, 1000.0])
@pytest.mark.parametrize("distance", [0.0, 1e-3, 100.0])
def test_flat_and_peaked_rows(scale, distance):
    target, draft, _ = inputs(3000, scale=scale, distance=distance)
    have = row_divergence(target, draft)
    plainly, exact = plain(target, draft), plain(target.double(), draft.double())
    for one, other, truth in zip(have, plainly, exact, strict=True):
        # what is added up is of the order of 1, whatever the sum
        assert rms(one - truth) <= 2 * rms(other - truth) + 2.0**-23 * max(rms(truth), 1e-3)


def test_a_small_distance_keeps_its_digits():
    """Its error is below half an ulp of 1, which 1 - sum min(p, q) in fp32 cannot be."""
    target, _, _ = inputs(5000)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    draft = target + 1e-5 * noise
    exact = plain(target.double(), draft.double()).tv
    assert (exact < 1e-5).all()
    naive = 1 - torch.minimum(target.softmax(-1), draft.softmax(-1)).sum(-1)
    assert rms(row_divergence(target, draft).tv - exact) < 2.0**-25 < rms(naive - exact)


@pytest.mark.parametrize("V", [1, 31, 50257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_distribution_is_no_distance_from_itself(V, dtype):
    target, _, _ = inputs(V, dtype=dtype)
    row = row_divergence(target, target.clone(), None, 0.7)
    for distance in (row.tv, row.kl, row.reverse_kl):
        assert (distance == 0).all()
    assert torch.equal(row.target_entropy, row.draft_entropy)
    slope = gradient(row_divergence, target, target.clone(), None, 0.7, tv=1, kl=1, reverse_kl=1)
    # V differences of two probabilities of the largest p, an ulp each
    assert slope.abs().max() < 2.0**-21


def test_distance_is_the_rate_at_which_verification_rejects(implementation):
    """Over 2000 rounds, of four distributions: within 4.5 standard deviations."""
    target, draft, ids = inputs(12, 8, N=4, scale=1.0)
    rows = torch.arange(4).repeat(2000)
    logits, distribution = draft[rows], row_distribution(draft[rows])
    random = torch.randint(-(2**63), 2**63 - 1, (len(rows), 3), generator=torch.Generator())
    tokens = sample(logits, distribution, words=random[:, 0], draft_ids=ids)[:, None]
    proposed = recorded_draft(tokens, logits, distribution, draft_ids=ids)
    targets = torch.stack([target[rows], target[rows]], 1)
    accepted = verify(targets, proposed, words=random[:, 1:].contiguous()).accepted
    rate = accepted.view(2000, 4).double().mean(0)
    chance = 1 - row_divergence(target, draft, ids).tv
    assert ((rate - chance).abs() < 4.5 * (chance * (1 - chance) / 2000).sqrt()).all()


# --- gradients ---


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("V", "D"), SIZES[1:])
def test_gradient_is_as_exact_as_that_of_torch(V, D, dtype, name):
    """Against autograd of the plain expression in fp64; bf16 and f16 round the result."""
    target, draft, ids = inputs(V, D, dtype=dtype)
    have = gradient(row_divergence, target, draft, ids, 0.8, **{name: 1.5})
    assert have.dtype == dtype
    plainly = gradient(plain, target.float(), draft.float(), ids, 0.8, **{name: 1.5})
    exact = gradient(plain, target.double(), draft.double(), ids, 0.8, **{name: 1.5})
    ulp = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    # f16 has nothing below 2^-24
    smallest = 2.0**-25 if dtype == torch.float16 else 0.0
    assert rms(have - exact) <= 2 * rms(plainly - exact) + ulp * rms(exact) + smallest


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("temperature", [2.0**-95, 2.0**-80, 2.0**-66, 2.0**80, 2.0**95])
def test_gradients_at_extreme_temperatures(temperature, name):
    """Logits and temperature times a power of two: the same distributions, and a gradient over
    it."""
    target, draft, ids = inputs(1030, 300)
    scaled = (target * temperature, draft * temperature, ids, temperature)
    have = gradient(row_divergence, *scaled, **{name: 1.5}).double() * temperature
    plainly = gradient(plain, target, draft, ids, 1.0, **{name: 1.5})
    exact = gradient(plain, target.double(), draft.double(), ids, 1.0, **{name: 1.5})
    assert_as_exact_as_torch(have, plainly, exact)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gradient_is_the_slope_of_the_value(data):
    """Along a random direction: the difference quotient of the fp64 formula."""
    V = data.draw(st.integers(2, 70))
    D = data.draw(st.none() | st.integers(1, V))
    scale, temperature = data.draw(st.floats(0, 5)), data.draw(st.floats(0.25, 4))
    weights = {name: data.draw(st.sampled_from([0.0, 1.0, -2.5])) for name in TRAINED[1:]}
    target, draft, ids = inputs(V, D, N=2, scale=scale)
    slope = gradient(row_divergence, target, draft, ids, temperature, **weights)
    step = torch.randn(draft.shape, generator=torch.Generator().manual_seed(1)).double() * 1e-4

    def value(logits):
        row = plain(target.double(), logits, ids, temperature)
        return sum((weight * getattr(row, name)).sum() for name, weight in weights.items())

    quotient = (value(draft.double() + step) - value(draft.double() - step)) / 2
    assert abs((slope * step).sum() - quotient) < 1e-4 * 1e-3 * (1 + rms(slope) * V)


def test_formulas_pass_gradcheck():
    """The formulas that the tests call exact, by torch's own check."""
    target, draft, ids = (x if x is None or x.dtype == torch.int64 else x.double()
                          for x in inputs(9, 5, N=2, scale=1.0))  # fmt: skip
    draft.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: plain(target, q, ids, 0.6)[:3], draft)


def test_gradients_of_a_row_sum_to_nothing():
    """A constant added to all draft logits changes no distribution."""
    for V, D in SIZES:
        target, draft, ids = inputs(V, D)
        for name in TRAINED:
            slope = gradient(row_divergence, target, draft, ids, 1.0, **{name: 1.0}).double()
            assert (slope.sum(-1).abs() <= 2.0**-20 * slope.abs().sum(-1) + 2.0**-22).all(), name


def test_upstream_gradients_are_those_of_each_row():
    target, draft, ids = inputs(100, 30)
    up = torch.tensor([1.0, 0.0, -2.0, 0.5, 0.0, 3.0])
    each = gradient(row_divergence, target, draft, ids, 1.0, kl=1.0)
    torch.testing.assert_close(
        gradient(row_divergence, target, draft, ids, 1.0, kl=up), up[:, None] * each
    )
    assert (gradient(row_divergence, target, draft, ids, 1.0, kl=up)[up == 0] == 0).all()


def test_entropy_of_the_target_has_no_gradient():
    target, draft, _ = inputs(10)
    row = row_divergence(target, draft.requires_grad_())
    assert not row.target_entropy.requires_grad
    assert all(getattr(row, name).requires_grad for name in TRAINED)
    row.kl.sum().backward()
    assert draft.grad is not None


def test_strides_of_the_draft_are_kept_by_its_gradient():
    target, draft, _ = inputs(40)
    want = gradient(row_divergence, target, draft, None, 1.0, kl=1)
    wide = torch.zeros(6, 50).requires_grad_()
    with torch.no_grad():
        wide[:, 3:43] = draft
    row_divergence(target, wide[:, 3:43]).kl.sum().backward()
    assert torch.equal(wide.grad[:, 3:43], want) and (wide.grad[:, 43:] == 0).all()
    turned = draft.T.contiguous().requires_grad_()
    row_divergence(target, turned.T).kl.sum().backward()
    assert torch.equal(turned.grad.T, want)


# --- infinities, faults ---


def test_tokens_without_probability():
    """p: 1/2 1/2 0 0; q: 1/2 0 1/2 0, each distribution's zeros being logits of -inf."""
    target, draft = torch.tensor([[0.0, 0.0, -INF, -INF]]), torch.tensor([[0.0, -INF, 0.0, -INF]])
    row = row_divergence(target, draft)
    ln2 = torch.tensor(2.0).log().item()
    assert [x.item() for x in row] == pytest.approx([0.5, INF, INF, ln2, ln2])
    only_p = row_divergence(target, torch.tensor([[0.0, 0.0, 0.0, -INF]]))
    assert only_p.kl.item() == pytest.approx(torch.tensor(1.5).log().item())
    assert only_p.reverse_kl.item() == INF
    # a token that the drafter does not know is no token that it gives nothing
    known = row_divergence(target, torch.tensor([[0.0, 0.0]]), torch.tensor([0, 2]))
    assert known.kl.item() == pytest.approx(0) and known.reverse_kl.item() == INF


def test_a_small_probability_is_none_that_is_zero():
    """exp(-200) is 0 in fp32, but a token that p can reach and q cannot makes kl infinite."""
    low, never = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -INF]])
    assert row_divergence(low, never).kl.item() == INF
    assert row_divergence(never, low).reverse_kl.item() == INF
    assert row_divergence(never, never).kl.item() == 0
    masked = torch.tensor([[0.0, torch.finfo(torch.float32).min]])
    assert row_divergence(masked, low).kl.item() == 0


def test_what_is_infinite_adds_nothing_where_nobody_asks():
    target, draft, _ = inputs(20)
    target[:, 3], target[:, 7], draft[:, 7], draft[:, 9] = -INF, -INF, -INF, -INF
    row = row_divergence(target, draft)
    assert (row.reverse_kl == INF).all() and (row.kl == INF).all()
    asked = gradient(row_divergence, target, draft, None, 1.0, tv=1, draft_entropy=1, reverse_kl=0)
    wanted = gradient(row_divergence, target, draft, None, 1.0, tv=1, draft_entropy=1)
    assert torch.equal(asked, wanted) and asked.isfinite().all()
    assert (asked[:, [7, 9]] == 0).all() and (asked[:, [0, 3]] != 0).all()
    zero = gradient(row_divergence, target, draft, None, 1.0, tv=0, kl=0, reverse_kl=0)
    assert (zero == 0).all()
    assert gradient(row_divergence, target, draft, None, 1.0, reverse_kl=1).isnan().all()


def test_gradient_of_an_infinite_kl_is_that_of_its_finite_terms():
    target, draft, _ = inputs(20)
    draft[:, 4] = -INF
    slope = gradient(row_divergence, target, draft, None, 0.5, kl=1)
    p, q = (target.double() / 0.5).softmax(-1), (draft.double() / 0.5).softmax(-1)
    exact = torch.where(draft == -INF, 0.0, (q - p) / 0.5)
    torch.testing.assert_close(slope.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [[NAN], [INF], [NAN, INF], [-INF] * 20])
@pytest.mark.parametrize("side", ["target", "draft"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_a_distribution_is_nan_and_no_other_row(bad, side, dtype):
    target, draft, _ = inputs(20, dtype=dtype)
    good = row_divergence(target, draft)
    {"target": target, "draft": draft}[side][2, : len(bad)] = torch.tensor(bad)
    row = row_divergence(target, draft)
    others = torch.arange(6) != 2
    for have, want in zip(row, good, strict=True):
        assert have[2].isnan() and torch.equal(have[others], want[others])
    slope = gradient(row_divergence, target, draft, None, 1.0, tv=1.0)
    assert slope[2].isnan().all() and slope[others].isfinite().all()
    masked = gradient(row_divergence, target, draft, None, 1.0, tv=others.float())
    assert (masked[2] == 0).all()


def test_undrafted_tokens_may_be_what_is_wrong():
    target, draft, ids = inputs(20, 5)
    target[1, next(v for v in range(20) if v not in ids)] = NAN
    assert all(
        x[1].isnan() and x[[0, 2]].isfinite().all() for x in row_divergence(target, draft, ids)
    )


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF, 2.0**-96])
def test_a_bad_entry_of_a_temperature_makes_its_row_nan(bad):
    target, draft, _ = inputs(20)
    row = row_divergence(target, draft, None, torch.tensor([1.0, 1.0, bad, 1.0, 1.0, 1.0]))
    for have, want in zip(row, row_divergence(target, draft), strict=True):
        assert have.isnan().tolist() == [False, False, True, False, False, False]
        assert torch.equal(have[[0, 1, 3, 4, 5]], want[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("temperature", [2.0**-95, 2.0**-40, 2.0**40, 2.0**95])
def test_extreme_temperatures(temperature):
    """The largest logit alone, or all alike."""
    target, draft, _ = inputs(300)
    row = row_divergence(target, draft, None, temperature)
    if temperature < 1:
        differ = target.argmax(-1) != draft.argmax(-1)
        assert torch.equal(row.tv, differ.float()) and (row.draft_entropy == 0).all()
    else:
        assert (row.tv < 1e-9).all() and (row.kl.abs() < 1e-9).all()
        assert row.target_entropy.tolist() == pytest.approx([5.703782474656201] * 6)


@pytest.mark.parametrize("ids", [[0, 0, 1], [2, 1, 3], [-1, 0, 1], [5, 6, 20]])
def test_wrong_ids_that_nobody_could_look_at(ids):
    """Compiled code and GPUs do not check them beforehand; nothing outside the row is read."""
    target, _, _ = inputs(20)
    args = target, torch.zeros(6, 3), torch.tensor(ids), torch.ones(6), None
    assert all(x.isnan().all() for x in OP.packet(*args))


# --- company ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_in_any_company(dtype):
    target, draft, ids = inputs(2000, 300, N=5, dtype=dtype)
    together = row_divergence(target, draft, ids)
    slopes = gradient(row_divergence, target, draft, ids, 1.0, tv=1, reverse_kl=1)
    for i in range(5):
        one = slice(i, i + 1)
        for alone, all_rows in zip(row_divergence(target[one], draft[one], ids), together,
                                   strict=True):  # fmt: skip
            assert torch.equal(alone, all_rows[one])
        slope = gradient(row_divergence, target[one], draft[one], ids, 1.0, tv=1, reverse_kl=1)
        assert torch.equal(slope, slopes[one])


def test_threads_do_not_matter():
    target, draft, _ = inputs(30000, N=9)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            slope = gradient(row_divergence, target, draft, None, 1.0, tv=1, draft_entropy=1)
            results.append((*row_divergence(target, draft), slope))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("V", [1, 7, 16, 17, 1040])
def test_views_between_sentinels(V):
    """Nothing outside the rows is read, and nothing outside the results is written."""
    target, draft, _ = inputs(V)
    frame_p, frame_q = torch.full((8, V + 5), NAN), torch.full((8, V + 3), NAN)
    frame_p[1:7, 2 : V + 2], frame_q[1:7, 1 : V + 1] = target, draft
    want = row_divergence(target, draft)
    outs = [torch.full((8,), 7.0) for _ in want]
    out = RowDivergence(*(x[1:7] for x in outs))
    view = frame_p[1:7, 2 : V + 2], frame_q[1:7, 1 : V + 1]
    assert row_divergence(*view, out=out) is out
    for frame, have, expect in zip(outs, out, want, strict=True):
        assert torch.equal(have, expect) and frame[0] == 7 and frame[7] == 7
    assert torch.equal(
        gradient(row_divergence, *view, None, 1.0, kl=1),
        gradient(row_divergence, target, draft, None, 1.0, kl=1),
    )


def test_mixed_dtypes_and_repeated_rows():
    target, draft, _ = inputs(50, dtype=torch.bfloat16)
    want = row_divergence(target.float(), draft)
    for have, expect in zip(row_divergence(target, draft), want, strict=True):
        assert torch.equal(have, expect)
    repeated = row_divergence(target[:1].expand(6, -1), draft)
    assert torch.equal(repeated.tv[0], want.tv[0])


def test_no_rows():
    draft = torch.zeros(0, 5).requires_grad_()
    row = row_divergence(torch.zeros(0, 9), draft, torch.arange(5))
    assert all(x.shape == (0,) for x in row)
    row.tv.sum().backward()
    assert draft.grad.shape == (0, 5)


def test_backends_may_take_turns():
    """The backward pass of one takes what the forward pass of another has saved."""
    target, draft, ids = inputs(100, 60)
    args = target, draft, ids, torch.full((6,), 0.9)
    up = [torch.ones(6)] * 4
    slopes = [
        BACKWARD.packet(*args, OP.packet(*args, forward)[-1], *up, backward)
        for forward in ("reference", None)
        for backward in ("reference", None)
    ]
    for other in slopes[1:]:
        torch.testing.assert_close(other, slopes[0], rtol=1e-5, atol=1e-6)


def test_a_gpu_falls_back_to_the_reference(caplog):
    backends.find.cache_clear()
    for op in ("row_divergence", "row_divergence_backward"):
        function = backends.find(op, "cuda", None)
        assert function.__module__ == "specdiff_kernels.reference.row_divergence"
        assert f"is not used for {op}: it " in caplog.text
    backends.find.cache_clear()


# --- arguments ---


ROWS = torch.zeros(2, 8)
TRAINED_ROWS = torch.zeros(2, 8, requires_grad=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ROWS[0], ROWS), ValueError, r"^target_logits: expected shape \[N, V\], got \[8\]"),
        ((ROWS, ROWS[:1]), ValueError, r"^draft_logits: expected shape \[N=2, D=8\], got \[1, 8\]"),
        (
            (ROWS, ROWS[:, :5]),
            ValueError,
            r"^draft_logits: expected shape \[N=2, D=8\], got \[2, 5\]",
        ),
        ((ROWS, ROWS, torch.arange(3)), ValueError, r"^draft_logits: expected shape \[N=2, D=3\]"),
        ((ROWS.double(), ROWS), TypeError, "^target_logits: expected dtype float32, .* float64"),
        ((ROWS, ROWS.long()), TypeError, "^draft_logits: expected dtype float32, .* got int64"),
        ((ROWS, ROWS, torch.arange(8).int()), TypeError, "^draft_ids: expected dtype int64, got"),
        ((ROWS, ROWS, torch.arange(8) + 1), ValueError, r"^draft_ids: .* ids in \[0, 8\), got oth"),
        ((ROWS, ROWS, torch.zeros(8).long()), ValueError, "^draft_ids: expected strictly increasi"),
        ((ROWS, ROWS, None, 0.0), ValueError, r"^temperature: expected a number in \[.*, got 0.0"),
        ((ROWS, ROWS, None, -1), ValueError, "^temperature: expected a number in .*, got -1"),
        ((ROWS, ROWS, None, NAN), ValueError, "^temperature: expected a number in .*, got nan"),
        ((ROWS, ROWS, None, "1"), ValueError, "^temperature: expected a number in .*, got '1'"),
        ((ROWS, ROWS, None, torch.ones(3)), ValueError, r"^temperature: expected shape \[N=2\]"),
        ((TRAINED_ROWS, ROWS), ValueError, r"^target_logits: .*: pass target_logits.detach\(\)"),
        ((ROWS, ROWS, None, torch.ones(2, requires_grad=True)), ValueError, "^temperature: expec"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        row_divergence(*arguments)


def test_out_takes_no_gradient():
    out = row_divergence(ROWS, ROWS)
    with pytest.raises(ValueError, match=r"^out: expected None where draft_logits requires"):
        row_divergence(ROWS, TRAINED_ROWS, out=out)
    with torch.no_grad():
        row_divergence(TRAINED_ROWS, TRAINED_ROWS, out=out)
