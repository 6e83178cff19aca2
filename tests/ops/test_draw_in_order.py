"""One call draws what as many `denoise_step`s would, each after a correction of its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specdiff_kernels import Draft, Reveal, denoise_step, pack_weight
from specdiff_kernels.corrections import Correction
from specdiff_kernels.ops import draw_in_order as module
from specdiff_kernels.ops.draw_in_order import draw_in_order

from .conftest import ON_CPU, forced
from .helpers import assert_same, i64
from .products import rms

VOCABULARY, DRAWN, RANK = 50, 37, 20
IDS = torch.arange(VOCABULARY)[torch.arange(VOCABULARY) % 4 != 1][:DRAWN]
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "temperature 1": (1.0,),
    "cold": (0.4,),
    "greedy": (0.0,),
    "truncated": (0.8, 9, 0.9, 0.02),
    "per row": (torch.tensor([0.0, 0.7, 1.0]), i64(0, 5, 0)),
}


@pytest.fixture(params=ON_CPU)
def implementation(request):
    with forced(request.param):
        yield request.param


def case(
    B: int = 3, K: int = 5, *, inner: bool = True, lo: int = 0, hi: int = 5, packed: Any = None
):
    """A masked draft, a correction that matters, and the tokens before it."""
    random = torch.Generator().manual_seed(10 * B + K)
    normal = lambda *shape: torch.randn(shape, generator=random)
    draft = Draft.masked(B, K, normal(B * K, DRAWN), draft_ids=IDS, lengths=K - torch.arange(B) % 3)
    weight: Any = 2 * normal(DRAWN, RANK)
    if packed is not None:
        weight = pack_weight(weight, packed)
    state = normal(B, hi - lo, RANK) if inner else None
    correction = Correction(normal(VOCABULARY, RANK), state, weight)
    return draft, correction, torch.randint(VOCABULARY, (B,), generator=random)


def fresh(draft: Draft) -> Draft:
    assert draft.logits is not None
    return draft._replace(logits=draft.logits.clone())


def values_of(weight: Any) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    return weight.packs.transpose(1, 2).flatten(0, 1)[: weight.rows].float()


def corrected(
    draft: Draft, correction: Correction, i: int, before: Tensor, lo: int, dtype
) -> Tensor:
    """Logits of position i as they should be, [B, Vd]."""
    code = correction.codes[before].to(dtype)
    if correction.inner is not None:
        code = code + correction.inner[:, i - lo].to(dtype)
    pool = draft.logits.view(*draft.tokens.shape, -1)
    return pool[:, i].to(dtype) + F.linear(F.silu(code), values_of(correction.weight).to(dtype))


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("form", ["plain", "f32", "bf16", "no inner", "one row", "second half"])
def test_it_is_as_many_steps(implementation, parameters, form):
    B = 1 if form == "one row" else 3
    sampling = tuple(
        x[:B].contiguous() if isinstance(x, Tensor) else x for x in PARAMETERS[parameters]
    )
    lo, hi = (2, 5) if form == "second half" else (0, 4)
    packed = {"f32": torch.float32, "bf16": torch.bfloat16}.get(form)
    draft, correction, anchor = case(B, inner=form != "no inner", lo=lo, hi=hi, packed=packed)
    keys = dict(seed=7, round=3)
    if lo:
        draft = denoise_step(draft, Reveal.chunk(0, lo), 0, *sampling, **keys)
    start = fresh(draft)
    result = draw_in_order(draft, correction, anchor, lo, hi, *sampling, entropies=lo == 0, **keys)
    errors, allowed = [], []
    expected = start._replace(logits=result.logits)
    for i in range(lo, hi):
        before = anchor if i == 0 else result.tokens[:, i - 1].clamp(min=0)
        exact = corrected(start, correction, i, before, lo, torch.float64)
        have = result.logits.view(B, 5, -1)[:, i]
        errors.append(rms(have - exact))
        in_fp32 = corrected(start, correction, i, before, lo, torch.float32)
        allowed.append(2 * rms(in_fp32 - exact) + 2.0**-23 * rms(exact))
        expected = denoise_step(
            expected, Reveal.chunk(i, i + 1), i, *sampling, entropies=i == lo == 0, **keys
        )
    assert all(error <= bound for error, bound in zip(errors, allowed, strict=True))
    for name in ("tokens", "tau", "rows"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    assert (result.final_step, result.coupled) == (expected.final_step, expected.coupled)
    assert_same(result.distribution, expected.distribution)
    assert (result.entropy is None) == (lo > 0)
    if lo == 0:
        assert torch.equal(result.entropy.isnan(), expected.entropy.isnan())
        assert torch.equal(result.entropy.nan_to_num(), expected.entropy.nan_to_num())
    untouched = [i for i in range(5) if not lo <= i < hi]
    pools = (x.logits.view(B, 5, -1)[:, untouched] for x in (result, start))
    assert torch.equal(*pools)


@pytest.mark.parametrize("draws", ["words", "coupled", "coupled words"])
def test_random_words_and_coupled_draws_are_the_steps_own(draws):
    B, K = 3, 5
    shape = (B, K, 2 if draws == "words" else 1 + DRAWN)
    words = torch.randint(-(2**63), 2**63 - 1, shape, generator=torch.Generator().manual_seed(1))
    keys: dict[str, Any] = {"words": words} if "words" in draws else {"seed": 7}
    if "coupled" in draws:
        keys["position"] = i64(4, 0, 9)
    if draws == "coupled":
        keys["round"] = 2
    draft, correction, anchor = case(B, K)
    results = []
    for backend in ("cpp", "reference"):
        results.append(
            draw_in_order(fresh(draft), correction, anchor, 0, K, backend=backend, **keys)
        )
    one, other = results
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-4)
    assert torch.equal(one.tokens, other.tokens) and one.coupled == other.coupled
    plain = draw_in_order(fresh(draft), correction, anchor, 0, K, seed=1, round=1)
    assert not torch.equal(one.tokens, plain.tokens)


def test_the_single_call_is_what_runs(monkeypatch):
    draft, correction, anchor = case()
    keys = dict(seed=7, round=3)
    stepwise = draw_in_order(fresh(draft), correction, anchor, 0, 5, backend="reference", **keys)
    monkeypatch.setattr(module, "denoise_step", None)
    fused = draw_in_order(fresh(draft), correction, anchor, 0, 5, backend="cpp", **keys)
    assert torch.equal(fused.tokens, stepwise.tokens)


def test_who_looks_on_sees_each_step():
    """Logits of another dtype, and calls that something watches, go step by step."""
    draft, correction, anchor = case()
    keys = dict(seed=7, round=3)
    expected = draw_in_order(fresh(draft), correction, anchor, 0, 5, **keys)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        watched = draw_in_order(fresh(draft), correction, anchor, 0, 5, **keys)
    assert sum("denoise_step" in name for name in seen) == 5
    assert torch.equal(watched.tokens, expected.tokens)
    halves = Correction(correction.codes.bfloat16(), None, correction.weight.bfloat16())
    half = fresh(draft)._replace(logits=draft.logits.bfloat16())
    assert (draw_in_order(half, halves, anchor, 0, 5, **keys).tokens[0] >= 0).all()


def test_threads_do_not_matter():
    draft, correction, anchor = case(B=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(draw_in_order(fresh(draft), correction, anchor, 0, 5, seed=1, round=1))
    finally:
        torch.set_num_threads(before)
    one, two = results
    assert torch.equal(one.logits, two.logits) and torch.equal(one.tokens, two.tokens)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_token_without_a_code_is_an_error(backend):
    draft, correction, anchor = case()
    few = correction._replace(codes=correction.codes[:20])
    with pytest.raises(IndexError):
        draw_in_order(draft, few, anchor.clamp(max=19), 0, 5, seed=1, round=1, backend=backend)
    with pytest.raises(IndexError):
        draw_in_order(draft, correction, anchor - 99, 0, 5, seed=1, round=1, backend=backend)


def test_wrong_shapes_are_named():
    draft, correction, anchor = case()
    call = lambda **changed: draw_in_order(
        draft, correction._replace(**changed), anchor, 0, 5, seed=1, round=1
    )
    with pytest.raises(ValueError, match=r"correction.inner: expected shape \[B=3, positions=5, "):
        call(inner=torch.zeros(3, 4, RANK))
    with pytest.raises(ValueError, match=r"correction.weight: expected \[Vd, r\] = \[37, 20\]"):
        call(weight=torch.zeros(DRAWN, RANK + 1))
    with pytest.raises(ValueError, match=r"correction.codes: expected shape \[V, r\]"):
        call(codes=torch.zeros(RANK))
    with pytest.raises(ValueError, match=r"0 <= lo < hi <= K = 5, got 4 and 4"):
        draw_in_order(draft, correction, anchor, 4, 4, seed=1, round=1)
    with pytest.raises(TypeError, match="anchor: expected dtype int64"):
        draw_in_order(draft, correction, anchor.int(), 0, 5, seed=1, round=1)
    with pytest.raises(ValueError, match=r"draft.logits: .* got None"):
        draw_in_order(draft._replace(logits=None, distribution=None), correction, anchor, 0, 5)


@pytest.mark.parametrize("what", ["fp16 weight", "strided codes", "strided inner", "bf16 codes"])
def test_what_native_code_cannot_read_goes_step_by_step(what, monkeypatch):
    draft, correction, anchor = case(inner=True)
    keys = dict(seed=7, round=3)
    expected = draw_in_order(fresh(draft), correction, anchor, 0, 5, backend="reference", **keys)
    monkeypatch.setattr(module, "fused", lambda *_: pytest.fail)
    codes, inner, weight = correction
    changed = {
        "fp16 weight": correction._replace(weight=weight.half()),
        "strided codes": correction._replace(codes=codes.T.contiguous().T),
        "strided inner": correction._replace(
            inner=inner.transpose(0, 1).contiguous().transpose(0, 1)
        ),
        "bf16 codes": correction._replace(codes=codes.bfloat16()),
    }[what]
    if what == "fp16 weight":  # PyTorch has no product of the two
        with pytest.raises(RuntimeError, match="dtype"):
            draw_in_order(fresh(draft), changed, anchor, 0, 5, **keys)
        return
    result = draw_in_order(fresh(draft), changed, anchor, 0, 5, **keys)
    if what != "bf16 codes":
        assert torch.equal(result.tokens, expected.tokens)
