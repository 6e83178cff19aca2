"""Every backend gives the reference's bits: random shapes, dtypes, strides and parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdiff_kernels import (
    Draft,
    Lenience,
    Reveal,
    commit,
    denoise_step,
    row_distribution,
    sample,
    use_backend,
    verify,
)
from tests import emulator
from tests.enumeration import first_word

from .conftest import CUDA, IMPLEMENTATIONS, ON_CPU, TRITON, forced
from .helpers import LAST_WORD, assert_same
from .interpreter import sized

EXAMPLES = int(os.environ.get("SPECDIFF_EXAMPLES", "300"))
INTERPRETED = EXAMPLES if torch.cuda.is_available() else EXAMPLES // 20
NATIVE = [*ON_CPU[1:], *CUDA]
INF, NAN = float("inf"), float("nan")


@dataclass
class Case:
    """Inputs of one round over all ops."""

    target: Tensor  # [B, K + 1, V]
    drafted: Tensor  # [B K, Vd]
    draft_ids: Tensor | None
    parameters: dict[str, Tensor | None]  # [B]
    words: Tensor | None  # [B, K + 1], coupled [B, K + 1, V]
    draft_words: Tensor  # [B K]
    tau: Tensor
    rows: Tensor
    lengths: Tensor | None
    rule: str
    record: dict  # what the draft says of itself
    damage: Tensor | None  # tokens [B, K] in place of the sampled ones
    lenience: Lenience | None = None


def embed_in_frame(logits: Tensor) -> Tensor:
    """The same logits as a view of a larger tensor, at an odd offset, between NaNs."""
    B, positions, V = logits.shape
    frame = torch.full((B, positions + 2, V + 7), NAN, dtype=logits.dtype)
    frame[:, 1:-1, 3 : V + 3] = logits
    return frame[:, 1:-1, 3 : V + 3]


@st.composite
def cases(draw) -> Case:
    pick = lambda *options: draw(st.sampled_from(options))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    V = draw(st.one_of(st.integers(1, 80), st.sampled_from([1024, 1025, 2049, 5000])))
    B, K = draw(st.integers(1, 4)), draw(st.integers(0, 5))
    base = torch.randn(B, K + 1, V, generator=random) * pick(0.0, 0.1, 1.0, 4.0, 20.0)
    target = base.to(pick(torch.float32, torch.bfloat16, torch.float16))
    if pick(True, False, False):
        target[torch.rand(target.shape, generator=random) < 0.4] = -INF
    if pick(True, False, False, False):
        at = [draw(st.integers(0, size - 1)) for size in target.shape]
        target[tuple(at)] = pick(NAN, -NAN, INF)
    if pick(True, False):
        target = embed_in_frame(target)
    ids = None
    if pick(True, False):
        kept = torch.randperm(V, generator=random)[: draw(st.integers(1, V))]
        ids = kept.sort().values
    seen = base[:, :K].reshape(B * K, V)
    drafted = seen if ids is None else seen[:, ids]
    drafted = drafted + torch.randn(drafted.shape, generator=random) * pick(0.0, 0.5, 3.0)
    uniform = lambda: torch.rand(B, generator=random)
    parameters = {
        "temperature": torch.tensor([pick(0.0, 0.3, 1.0, 1.7, 2.0**95) for _ in range(B)]),
        "top_k": pick(None, torch.randint(0, V + 2, (B,), generator=random)),
        "top_p": pick(None, uniform() * 0.99 + 0.01),
        "min_p": pick(None, uniform() * 0.3, torch.ones(B)),
    }
    word = lambda *shape: torch.randint(-(2**63), 2**63 - 1, shape, generator=random)
    rule = pick("token", "token", "block", "block", "greedy", "coupled", "lenient", "lenient")
    lenience = None
    if rule == "lenient":
        amount = uniform().double() if pick(True, False) else uniform().round().double()
        if pick(True, False, False, False):
            amount[draw(st.integers(0, B - 1))] = pick(NAN, -0.5, 1.5, INF, 1e-310)
        lenience = Lenience(pick("lenience", "additive", "ensemble"), amount)
    rows = torch.arange(B * K).view(B, K)
    rows = rows.masked_fill(torch.rand(rows.shape, generator=random) < 0.3, -1)
    return Case(
        target,
        drafted.to(pick(torch.float32, torch.bfloat16)),
        ids,
        parameters,
        pick(None, word(B, K + 1, V) if rule == "coupled" else word(B, K + 1)),
        word(B * K),
        torch.randint(0, 3, (B, K), generator=random, dtype=torch.int32),
        rows,
        pick(None, torch.randint(0, K + 1, (B,), generator=random)),
        rule,
        pick(
            {},
            {"value_dependent": True},
            {"value_dependent": True, "final_step": 1},
            {"entangled": True},
        ),
        pick(None, None, torch.randint(-1, V + 1, (B, K), generator=random)),
        lenience,
    )


@contextmanager
def cut_into_tiles(V: int, number: int) -> Iterator[None]:
    """Triton's tiles made smaller, so that short rows have some."""
    arguments = pytest.importorskip("specdiff_kernels.triton.arguments")
    tile = max(16, 1 << (-(-V // number) - 1).bit_length())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(arguments, "TILE", tile)
        yield


def repeat(parameters: dict[str, Tensor | None], times: int) -> dict[str, Tensor | None]:
    return {k: v if v is None else v.repeat_interleave(times) for k, v in parameters.items()}


def run(case: Case) -> list:
    """Outputs of every op, in the order in which a round calls them."""
    B, positions, V = case.target.shape
    K = positions - 1
    target_distribution = row_distribution(
        case.target.reshape(-1, V), **repeat(case.parameters, positions)
    )
    distribution = row_distribution(case.drafted, **repeat(case.parameters, K))
    tokens = sample(case.drafted, distribution, words=case.draft_words, draft_ids=case.draft_ids)
    seed, round = torch.arange(B) * 2**40 - 3, torch.arange(B)
    keyed = sample(
        case.drafted,
        distribution,
        seed=seed.repeat_interleave(K),
        round=round.repeat_interleave(K),
        slot=torch.arange(B * K),
    )
    raced = sample(
        case.drafted,
        distribution,
        seed=seed.repeat_interleave(K),
        position=torch.arange(B * K),
        draft_ids=case.draft_ids,
    )
    drafted = tokens.view(B, K) if case.damage is None else case.damage
    if case.rule == "coupled" and case.damage is None:
        drafted = raced.view(B, K)
    draft = Draft(drafted, case.tau, case.rows, case.drafted, distribution, case.draft_ids,
                  case.lengths, **case.record)  # fmt: skip
    random = {"seed": seed, "round": round}
    if case.words is not None:
        random = {"words": case.words}
    elif case.rule == "coupled":
        random = {"seed": seed, "position": torch.arange(B) * K}
    verified = verify(case.target, draft, **case.parameters, rule=case.rule,
                      lenience=case.lenience, **random)  # fmt: skip
    committed = commit(
        torch.arange(B), verified.emitted, stop_tokens=torch.arange(0, V, 3),
        limit=torch.arange(B) + K,
    )  # fmt: skip
    return [target_distribution, distribution, (tokens, keyed, raced), verified, committed]


@pytest.mark.parametrize("implementation", NATIVE)
@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases())
def test_same_bits(implementation, case):
    check_same_bits(implementation, case)


@pytest.mark.parametrize("implementation", [emulator.NAME])
@settings(max_examples=EXAMPLES // 4, deadline=None)
@given(case=cases(), device=st.sampled_from(range(4)))
def test_same_bits_by_emulated_cuda(implementation, case, device):
    with emulator.on_device(device):
        check_same_bits(implementation, case)


@pytest.mark.parametrize("implementation", [TRITON])
@settings(max_examples=INTERPRETED, deadline=None)
@given(case=cases(), tiles=st.sampled_from([1, 3, 8]))
def test_same_bits_by_triton(implementation, case, tiles):
    with cut_into_tiles(case.target.shape[-1], tiles):
        check_same_bits(implementation, case)


def check_same_bits(implementation: str, case: Case) -> None:
    with use_backend("reference"):
        expected = run(case)
    with forced(implementation):
        result = run(case)
    for a, b in zip(expected, result, strict=True):
        if hasattr(a, "_fields"):
            assert_same(a, b)
        else:
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("rule", ["token", "block", "coupled", "lenient"])
@pytest.mark.parametrize("V", [50257, 50258, 151936])
def test_same_bits_at_full_size(implementation, V, rule):
    skip_if_interpreted(implementation)
    random = torch.Generator().manual_seed(V)
    target = torch.randn(2, 4, V, generator=random).mul(3).bfloat16()
    drafted = target[:, :3].reshape(6, V) + torch.randn(6, V, generator=random)
    words = torch.randint(-(2**63), 2**63 - 1, (2, 4), generator=random)
    case = Case(
        target, drafted, None,
        {"temperature": torch.tensor([0.8, 1.3]), "top_k": torch.tensor([0, 500]),
         "top_p": torch.tensor([1.0, 0.9]), "min_p": None},
        None if rule == "coupled" else words, words[:, :3].flatten(),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.arange(6).view(2, 3), None, rule, {}, None,
        Lenience("ensemble", torch.tensor([0.2, 0.9]).double()) if rule == "lenient" else None,
    )  # fmt: skip
    with use_backend("reference"):
        expected = run(case)
    with forced(implementation):
        result = run(case)
    assert_same(expected[0], result[0])
    assert_same(expected[3], result[3])


def skip_if_interpreted(implementation: str) -> None:
    with forced(implementation):
        if implementation == "triton" and sized(1, interpreted=0) == 0:
            pytest.skip("minutes under Triton's interpreter; run with --full-sizes")


@pytest.mark.parametrize("implementation", [TRITON])
def test_same_bits_of_a_whole_vocabulary_by_triton(implementation):
    """Untruncated, so that it can be interpreted."""
    random = torch.Generator().manual_seed(3)
    target = torch.randn(1, 2, 50257, generator=random).mul(3).bfloat16()
    pool = target[0, :1] + torch.randn(1, 50257, generator=random)
    token = (pool - target[0, :1]).argmax().view(1, 1)
    nothing = torch.zeros_like(token)
    words = torch.tensor([[LAST_WORD, 2**61]])  # rejected, then a draw from the residual
    results = []
    for name in ("reference", implementation):
        with forced(name):
            draft = Draft(token, nothing.int(), nothing, pool, row_distribution(pool))
            results.append((draft.distribution, verify(target, draft, words=words)))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)
    assert results[0][1].accepted.item() == 0


@dataclass
class Denoising:
    """Inputs of one reverse step."""

    draft: Draft
    reveal: Reveal
    options: dict


@st.composite
def denoisings(draw) -> Denoising:
    pick = lambda *options: draw(st.sampled_from(options))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    V = draw(st.one_of(st.integers(1, 80), st.sampled_from([1024, 1025, 2049])))
    B, K = draw(st.integers(1, 3)), draw(st.integers(0, 6))
    R = B * K + pick(0, 2)
    pool = torch.randn(R, V + 3, generator=random) * pick(0.0, 1.0, 5.0, 20.0)
    pool += pick(0.0, -8.0, 30.0)
    pool = pool.to(pick(torch.float32, torch.bfloat16, torch.float16))
    pool[:, V:] = NAN  # columns that are no tokens
    if pick(True, False, False):
        pool[torch.rand(pool.shape, generator=random) < 0.3] = -INF
    if R and pick(True, False, False, False):
        pool[draw(st.integers(0, R - 1)), draw(st.integers(0, V - 1))] = pick(NAN, INF)
    ids = torch.randperm(V + 50, generator=random)[:V].sort().values
    integers = lambda low, high, *shape: torch.randint(low, high, shape, generator=random)
    draft = Draft.masked(
        B,
        K,
        pool[:, :V],
        draft_ids=pick(None, ids),
        lengths=pick(None, integers(0, K + 1, B)),
    )
    revealed = torch.rand((B, K), generator=random) < pick(0.0, 0.4)
    draft = draft._replace(
        tokens=draft.tokens.masked_fill(revealed, 7),
        tau=draft.tau.masked_fill(revealed, 2),
        rows=draft.rows.masked_fill(revealed, 1),
    )
    rate = draw(st.floats(0, 2))
    reveal = pick(
        Reveal.all(),
        Reveal.chunk(*sorted((draw(st.integers(0, K)), draw(st.integers(0, K))))),
        Reveal.mdlm(min(rate, 1.0)),
        Reveal.sedd(pick(rate, torch.rand(B, generator=random, dtype=torch.float64))),
        Reveal.first_hitting(),
        Reveal.lowest_entropy(draw(st.integers(0, K))),
        Reveal.highest_confidence(draw(st.integers(0, K))),
    )
    coupled = pick(False, False, True)
    per_position = 1 + V if coupled else 2
    options = {
        "temperature": torch.tensor([pick(0.0, 0.5, 1.0) for _ in range(B)]),
        "top_k": pick(None, None, integers(0, V + 2, B)),
        "top_p": pick(None, None, torch.rand(B, generator=random) * 0.99 + 0.01),
        "entropies": pick(False, True),
        "pool_rows": torch.randperm(R, generator=random)[: B * K].view(B, K),
        "position": integers(0, 1000, B) if coupled else None,
    }
    if pick(True, False):
        options["words"] = integers(-(2**63), 2**63 - 1, B, K, per_position)
    else:
        options |= {"seed": integers(-(2**63), 2**63 - 1, B), "round": integers(0, 9, B)}
    return Denoising(draft, reveal, options)


def tensors_of(draft: Draft) -> list[Tensor]:
    entropy = [] if draft.entropy is None else [draft.entropy.nan_to_num(-1.0)]
    return [draft.tokens, draft.tau, draft.rows, *draft.distribution, *entropy]


@pytest.mark.parametrize("implementation", NATIVE)
@settings(max_examples=EXAMPLES, deadline=None)
@given(case=denoisings())
def test_same_bits_of_a_reverse_step(implementation, case):
    check_same_step(implementation, case)


@pytest.mark.parametrize("implementation", [emulator.NAME])
@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(case=denoisings(), device=st.sampled_from(range(4)))
def test_same_bits_of_a_reverse_step_by_emulated_cuda(implementation, case, device):
    with emulator.on_device(device):
        check_same_step(implementation, case)


@pytest.mark.parametrize("implementation", [TRITON])
@settings(max_examples=INTERPRETED * 2, deadline=None)
@given(case=denoisings(), tiles=st.sampled_from([1, 3, 8]))
def test_same_bits_of_a_reverse_step_by_triton(implementation, case, tiles):
    with cut_into_tiles(case.draft.logits.shape[-1], tiles):
        check_same_step(implementation, case)


def check_same_step(implementation: str, case: Denoising) -> None:
    with use_backend("reference"):
        expected = tensors_of(denoise_step(case.draft, case.reveal, 3, **case.options))
    with forced(implementation):
        result = tensors_of(denoise_step(case.draft, case.reveal, 3, **case.options))
    assert len(result) == len(expected)
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b), (case.reveal, a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize(
    "reveal",
    [Reveal.all(), Reveal.sedd(0.5), Reveal.lowest_entropy(3), Reveal.highest_confidence(3)],
    ids=lambda reveal: reveal.order.name,
)
def test_same_bits_of_a_reverse_step_at_full_size(implementation, reveal):
    skip_if_interpreted(implementation)
    random = torch.Generator().manual_seed(2)
    pool = torch.randn(12, 50258, generator=random).mul(3).bfloat16()
    draft = Draft.masked(2, 6, pool[:, :50257])
    options = {
        "temperature": torch.tensor([0.8, 1.0]), "top_p": torch.tensor([0.9, 1.0]),
        "entropies": True, "seed": torch.tensor([1, 2]), "round": torch.tensor([0, 5]),
    }  # fmt: skip
    with use_backend("reference"):
        expected = tensors_of(denoise_step(draft, reveal, 0, **options))
    with forced(implementation):
        result = tensors_of(denoise_step(draft, reveal, 0, **options))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("implementation", NATIVE)
def test_threads_do_not_matter(implementation):
    logits = torch.randn(64, 5000)
    before = torch.get_num_threads()
    try:
        with forced(implementation):
            torch.set_num_threads(1)
            one = row_distribution(logits, top_p=0.9)
            torch.set_num_threads(3)
            assert_same(row_distribution(logits, top_p=0.9), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("top_k", [None, 700])
def test_same_residual_to_the_unit(implementation, top_k):
    """The words at which the drawn token changes shift by some 2^5 for each unit of 2^60."""
    random = torch.Generator().manual_seed(7)
    V, seen = 3000, torch.tensor([300, 1200, 2100, 2900])
    target = torch.randn(1, 2, V, generator=random)
    pool = target[0, :1] + torch.randn(1, V, generator=random)
    token = (pool - target[0, :1]).argmax(-1)[None]

    def boundaries():
        distribution = row_distribution(pool)
        rows = torch.zeros(len(seen), 1, dtype=torch.int64)
        draft = Draft(token.expand(len(seen), 1), rows.int(), rows, pool, distribution)

        def behind(last):
            words = torch.stack((torch.full_like(last, -1), last), 1)
            drawn = verify(target.expand(len(seen), 2, V), draft, top_k=top_k, words=words)
            return drawn.emitted[:, 0] >= seen

        return first_word(behind, len(seen))

    with use_backend("reference"):
        expected = boundaries()
    with forced(implementation):
        assert boundaries() == expected
