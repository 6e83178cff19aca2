"""A decoder layer in one call: as exact as torch's, and a token's bits are its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specdiff_kernels import pack_weight
from specdiff_kernels.ops.decoder_layer import (
    ACTIVATIONS,
    DecoderLayer,
    GatedMlp,
    LayerCall,
    Linear,
    Norm,
    decoder_layer,
    gated_mlp,
    row_norm,
)
from specdiff_kernels.reference import decoder_layer as reference

from . import layers
from .attention import threads
from .conftest import ON_CPU, forced
from .layers import (
    EPSILON,
    Shape,
    assert_error_at_most_twice_that_of_torch,
    dependences,
    in_steps,
    layer_of,
    run,
    tokens_of,
)
from .products import NAN, rms

NORMS = [("rms", 0.0), ("rms", 1.0), ("layer", 0.0)]
GRID = {
    "hidden": (24, 40, 300, 576),
    "inner": (16, 40, 300, 700),
    "groups": (1, 2, 3),
    "kv_heads": (1, 2, 3),
    "size": (8, 20, 64),
    "norm": NORMS,
    "biases": (False, True),
    "joined": (False, True),
    "gate": (False, True),
    "activation": ACTIVATIONS,
    "rotary": (0, 6, "all"),
    "window": (None, None, 3, 70),
    "softcap": (None, None, 2.0),
    "dtype": (torch.float32, torch.bfloat16),
    "B": (1, 2, 3),
    "Q": (1, 5, 40),
    "lengths": (0, 1, 63, 257, 300),
    "first": (False, False, True),
    "block": (None, 1, 5, 16),
    "packed": (False, True),
    "parts": (False, True),
}


def sampled(count: int) -> list[dict[str, Any]]:
    """Points of the grid: in each column every value as often as any other."""
    draw = random.Random(0)
    columns = {}
    for name, values in GRID.items():
        column = [values[i % len(values)] for i in range(count)]
        draw.shuffle(column)
        columns[name] = column
    points: list[dict[str, Any]] = []
    for i in range(count):
        point = {name: column[i] for name, column in columns.items()}
        point["norm"], point["offset"] = point["norm"]
        point["rotary"] = point["size"] if point["rotary"] == "all" else point["rotary"]
        point["lengths"] = (point["lengths"], *draw.sample(GRID["lengths"], point.pop("B") - 1))
        points.append(point)
    return points


LLAMA = Shape(300, 700, 3, 2, 20, rotary=20)
GPT2 = Shape(
    576, 300, 1, 3, 64, "layer", biases=True, joined=True, gate=False, activation="gelu_tanh",
    rotary=0,
)  # fmt: skip
GEMMA = Shape(
    40, 1000, 2, 1, 16, offset=1.0, activation="gelu_tanh", rotary=6, window=70, softcap=2.0,
    dtype=torch.bfloat16,
)  # fmt: skip
TINY = Shape(9, 5, 1, 1, 2, rotary=2, biases=True, activation="gelu")
CASES = {
    "llama": (LLAMA, 5, (0, 64, 257)),
    "gpt2": (GPT2, 9, (300, 1)),
    "gemma": (GEMMA, 40, (63, 100)),
    "tiny": (TINY, 5, (3, 0)),
    "one token": (replace(LLAMA, gate=False, activation="relu"), 1, (500,)),
}


@pytest.fixture(params=ON_CPU)
def implementation(request):
    with forced(request.param):
        yield request.param


# --- the formula ---------------------------------------------------------------------------------


def assert_point_is_exact(point: dict[str, Any]) -> None:
    options = dict(point)
    block, packed, parts, Q, lengths, first = (
        options.pop(name) for name in ("block", "packed", "parts", "Q", "lengths", "first")
    )
    shape = Shape(**options)
    tokens = tokens_of(shape, Q, lengths, first=first)
    result = run(decoder_layer, layer_of(shape, packed=packed), tokens, block=block, parts=parts)
    assert_error_at_most_twice_that_of_torch(result, layer_of(shape, packed=False), tokens)


@pytest.mark.parametrize("point", sampled(30), ids=str)
def test_error_is_at_most_twice_that_of_torch(point, implementation):
    assert_point_is_exact(point)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_with_large_and_small_values(activation, gate, implementation):
    shape = Shape(activation=activation, gate=gate)
    tokens = tokens_of(shape, 5, (3, 9))
    for scale in (1e-3, 1.0, 30.0):
        layer, lying = (layer_of(shape, packed=packed) for packed in (True, False))
        for made in (layer, lying):
            made.mlp_norm.weight.mul_(scale)
        result = run(decoder_layer, layer, tokens)
        assert_error_at_most_twice_that_of_torch(result, lying, tokens)


def test_rotation_may_be_the_same_for_all_rows(implementation):
    tokens = tokens_of(LLAMA, 3, (2, 7))
    layer = layer_of(LLAMA, packed=True)
    shared = tokens._replace(rotation=tuple(part[:1].contiguous() for part in tokens.rotation))
    repeated = tokens._replace(rotation=tuple(part[:1].repeat(2, 1, 1) for part in tokens.rotation))
    have, want = run(decoder_layer, layer, shared), run(decoder_layer, layer, repeated)
    assert all(torch.equal(a, b) for a, b in zip(have[:3], want[:3], strict=True))


def rounded(of: Callable[[Tensor], Tensor], name: str) -> Any:
    """An implementation with one of a layer's parts changed."""

    def changed(layer: DecoderLayer, call: LayerCall) -> Tensor | None:
        part = getattr(layer, name)
        return decoder_layer(
            replace(layer, **{name: part._replace(weight=of(part.weight))}, native=None), call
        )

    return changed


@pytest.mark.parametrize("name", ["attention_norm", "output", "gate", "up", "down"])
def test_parts_of_fewer_bits_are_found(name):
    """A weight that is rounded to 13 bits of fraction, so that its products are off by some 2^-15;
    fp32's are off by some 2^-24 sqrt(K)."""

    def fewer(x: Tensor) -> Tensor:
        return (x.view(torch.int32) + 2**9 & -(2**10)).view(torch.float32)

    tokens = tokens_of(LLAMA, 5, (3, 70))
    layer = layer_of(LLAMA, packed=False)
    assert_error_at_most_twice_that_of_torch(run(decoder_layer, layer, tokens), layer, tokens)
    with pytest.raises(AssertionError):
        assert_error_at_most_twice_that_of_torch(
            run(rounded(fewer, name), layer, tokens), layer, tokens
        )


# --- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_bits_depend_on_nothing_else(case, first, implementation):
    shape, Q, lengths = CASES[case]
    assert dependences(decoder_layer, shape, tokens_of(shape, Q, lengths, first=first)) == set()


@pytest.mark.parametrize("case", CASES)
def test_threads_do_not_matter(case, implementation):
    """To the bit; but in the reference, whose products are torch's."""
    shape, Q, lengths = CASES[case]
    tokens = tokens_of(shape, Q, lengths)
    if implementation != "reference":
        assert dependences(decoder_layer, shape, tokens, ("threads",)) == set()
        return
    with threads(3):
        result = run(decoder_layer, layer_of(shape, packed=True), tokens)
    assert_error_at_most_twice_that_of_torch(result, layer_of(shape, packed=False), tokens)


def test_a_prompt_is_read_as_token_by_token(implementation):
    shape = Shape(40, 24, 1, 2, 8, norm="layer", biases=True)
    tokens, layer = tokens_of(shape, 300, (0,)), layer_of(shape, packed=True)
    whole = run(decoder_layer, layer, tokens)
    assert_error_at_most_twice_that_of_torch(whole, layer_of(shape, packed=False), tokens)
    for step in (1, 299):
        steps = in_steps(decoder_layer, layer, tokens, step)
        assert all(torch.equal(a, b) for a, b in zip(steps, whole[:3], strict=True)), step


def test_a_layer_that_is_used_again_has_no_memory_of_others(implementation):
    """Neither a larger call, nor one with NaN, leaves anything behind."""
    shape, Q, lengths = CASES["llama"]
    layer, tokens = layer_of(shape, packed=True), tokens_of(shape, Q, lengths)
    before = run(decoder_layer, layer, tokens)
    for size in (8, 20):
        other = replace(GEMMA, size=size, hidden=600, kv_heads=3)
        large = tokens_of(other, 40, (300, 3))
        large.x.fill_(NAN)
        run(decoder_layer, layer_of(other, packed=True), large)
        after = run(decoder_layer, layer, tokens)
        assert all(torch.equal(a, b) for a, b in zip(after[:3], before[:3], strict=True))


@contextmanager
def in_place_of(name: str, mutant: Callable[..., Tensor]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, name, mutant)
        yield


def mutant(name: str, of: Callable[..., Tensor]) -> Any:
    """The reference with one of its functions replaced."""

    def run_mutant(layer: DecoderLayer, call: LayerCall) -> Tensor | None:
        with in_place_of(name, of), forced("reference"):
            return decoder_layer(layer, call)

    return run_mutant


LINEAR, BY_TOKEN, PUT = reference.linear, reference.by_token, reference.put


def split_by(count: Callable[[Tensor, Any], int]) -> Callable[..., Tensor]:
    """Products whose K is cut into so many parts, that are then added."""

    def linear(x: Tensor, of: Any) -> Tensor:
        weight = of.weight
        if not isinstance(weight, Tensor):
            weight = weight.packs.transpose(1, 2).flatten(0, 1)[: weight.rows]
        parts = [
            LINEAR(a.contiguous(), of._replace(weight=w.contiguous(), bias=None))
            for a, w in zip(
                x.tensor_split(count(x, of), -1), weight.tensor_split(count(x, of), 1), strict=True
            )
            if a.shape[-1]
        ]
        return sum(parts) if of.bias is None else sum(parts) + of.bias

    return linear


def of_the_call(of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Norms, too, divide by the root mean square of all tokens."""
    return BY_TOKEN(of, x / x.square().mean().sqrt())


def by_masks(of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Other tokens count 0 times, where a NaN stays one."""
    return BY_TOKEN(of, x) + 0 * x.sum()


def put_beside(store: Tensor, new: Tensor, call: LayerCall) -> None:
    PUT(store, new, call._replace(slots=call.slots + 1))
    PUT(store, new, call)


MUTANTS = {
    "queries": mutant("linear", split_by(lambda x, of: min(x.shape[1], 4))),
    "rows": mutant("linear", split_by(lambda x, of: len(x))),
    "packs": mutant("linear", split_by(lambda x, of: 1 + isinstance(of.weight, Tensor))),
    "threads": mutant("linear", split_by(lambda x, of: torch.get_num_threads())),
    "unseen": mutant("by_token", by_masks),
    "queries, rows, unseen": mutant("by_token", of_the_call),
}


@pytest.mark.parametrize("dependence", MUTANTS)
def test_wrong_implementations_are_found(dependence):
    shape, Q, lengths = CASES["llama"]
    tokens = tokens_of(shape, Q, lengths)
    found = dependences(MUTANTS[dependence], shape, tokens, tuple(layers.PAIRS))
    assert found - {"threads"} == {*dependence.split(", ")} - {"threads"}
    assert "threads" in found or dependence != "threads"


def test_entries_beside_their_slots_are_found():
    tokens = tokens_of(TINY, 2, (3,))
    for block in (None, 5):
        with pytest.raises(AssertionError, match="keys"):
            run(mutant("put", put_beside), layer_of(TINY, packed=True), tokens, block=block)


def test_a_call_in_two_parts_that_rounds_between_them_is_found():
    def parts(layer: DecoderLayer, call: LayerCall) -> Tensor | None:
        if call.before and not call.after:
            decoder_layer(layer, call)
            call.query.copy_(call.query.bfloat16())
            return None
        return decoder_layer(layer, call)

    shape, Q, lengths = CASES["llama"]
    with forced("reference"):
        assert dependences(parts, shape, tokens_of(shape, Q, lengths)) == {"parts"}


# --- norms ---------------------------------------------------------------------------------------


def norm_of(kind: str, offset: float, d: int, *, bias: bool) -> Norm:
    draw = torch.Generator().manual_seed(d)
    weight, shift = torch.randn(2, d, generator=draw)
    return Norm(kind, weight, shift if bias else None, EPSILON, offset)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "offset"), [*NORMS, ("layer", 1.0)])
@pytest.mark.parametrize("d", [1, 7, 16, 31, 64, 300, 1000])
def test_a_norm_is_exact_and_a_rows_own(d, kind, offset, bias, implementation):
    norm = norm_of(kind, offset, d, bias=bias)
    x = torch.randn(2, 5, d, generator=torch.Generator().manual_seed(d)) * 3 + 1
    result = row_norm(x, norm)
    exact, by_torch = layers.normed(x.double(), norm), layers.normed(x, norm)
    assert rms(result - exact) <= 2 * rms(by_torch - exact) + 2.0**-23 * rms(exact)
    assert result.shape == x.shape
    for b in range(2):
        for q in range(5):
            assert torch.equal(row_norm(x[b, q].clone(), norm), result[b, q])
    x[0, 2] = NAN
    others = torch.arange(10) != 2
    assert torch.equal(row_norm(x, norm).view(10, d)[others], result.view(10, d)[others])


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_threads_do_not_matter_to_a_norm(kind, implementation):
    norm, x = norm_of(kind, 0.0, 576, bias=True), torch.randn(300, 576)
    with threads(1):
        one = row_norm(x, norm)
    with threads(3):
        assert torch.equal(row_norm(x, norm), one)
    assert torch.equal(row_norm(x[:0], norm), x[:0])


def test_views_between_sentinels(implementation):
    """Nothing outside a row and the norm's weights is read."""
    for d in (1, 5, 8, 17, 33):
        norm, x = norm_of("layer", 0.0, d, bias=True), torch.randn(3, d)
        frame = torch.full((3, d + 2), NAN)
        frame[0, 1:-1], frame[1, 1:-1] = norm.weight, norm.bias
        inside = norm._replace(weight=frame[0, 1:-1], bias=frame[1, 1:-1])
        around = torch.full((5, d), NAN)
        around[1:4] = x
        assert torch.equal(row_norm(around[1:4], inside), row_norm(x, norm))


def test_tokens_that_see_as_far_as_they_are_told(implementation):
    """As in a block that is denoised: all of it. The end of a token's own entries changes nothing,
    and a longer reach is that of a token that stands so much later in the cache."""
    shape = Shape(hidden=40, inner=48)
    layer, tokens = layer_of(shape, packed=True), tokens_of(shape, 5, (70, 3))
    chain = run(decoder_layer, layer, tokens)
    own = tokens.positions + 1
    assert torch.equal(run(decoder_layer, layer, tokens, limits=own)[0], chain[0])
    whole = own[:, -1:].expand(-1, 5).contiguous()
    block = run(decoder_layer, layer, tokens, limits=whole, block=16)
    assert torch.equal(block[0][:, -1], chain[0][:, -1])
    assert not torch.isclose(block[0][:, 0], chain[0][:, 0]).all()
    with forced("reference"):
        expected = run(decoder_layer, layer, tokens, limits=whole)[0]
    torch.testing.assert_close(block[0], expected, rtol=1e-5, atol=1e-5)


# --- gated MLPs ----------------------------------------------------------------------------------

WIDTHS = [(9, 5, 9), (40, 300, 24), (576, 700, 576)]  # of inputs, between, of outputs


def mlp_of(
    widths: tuple[int, int, int],
    *,
    packed: bool,
    biases: bool = True,
    activation: str = "silu",
    dtype: torch.dtype = torch.float32,
) -> GatedMlp:
    draw = torch.Generator().manual_seed(0)

    def linear(N: int, K: int) -> Linear:
        weight = (torch.randn(N, K, generator=draw) * K**-0.5).to(dtype)
        bias = torch.randn(N, generator=draw) if biases else None
        return Linear(pack_weight(weight) if packed else weight, bias)

    K, inner, N = widths
    return GatedMlp(linear(inner, K), linear(inner, K), linear(N, inner), activation)


def mlp_formula(x: Tensor, mlp: GatedMlp, dtype: torch.dtype) -> Tensor:
    def linear(x: Tensor, of: Linear) -> Tensor:
        return F.linear(x, of.weight.to(dtype), None if of.bias is None else of.bias.to(dtype))

    activate = reference.ACTIVATE[mlp.activation]
    return linear(activate(linear(x.to(dtype), mlp.gate)) * linear(x.to(dtype), mlp.up), mlp.down)


def assert_mlp_is_exact(result: Tensor, x: Tensor, mlp: GatedMlp) -> None:
    exact, near = (mlp_formula(x, mlp, dtype) for dtype in (torch.float64, torch.float32))
    assert rms(result - exact) <= 2 * rms(near - exact) + 2.0**-23 * rms(exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_an_mlp_is_exact_and_a_rows_own(widths, activation, dtype, implementation):
    options = {"activation": activation, "biases": activation != "relu", "dtype": dtype}
    packed, lying = (mlp_of(widths, packed=packed, **options) for packed in (True, False))
    x = torch.randn(2, 9, widths[0], generator=torch.Generator().manual_seed(1)) * 3
    result = gated_mlp(x, packed)
    assert result.shape == (2, 9, widths[2])
    assert_mlp_is_exact(result, x, lying)
    assert torch.equal(gated_mlp(x, lying), result)
    for b, q in ((0, 0), (1, 3), (1, 8)):
        assert torch.equal(gated_mlp(x[b, q].clone(), packed), result[b, q])
    x[0, 2] = NAN
    others = torch.arange(18) != 2
    assert torch.equal(gated_mlp(x, packed).view(18, -1)[others], result.view(18, -1)[others])
    assert gated_mlp(x[:0], packed).shape == (0, 9, widths[2])


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_an_mlp_of_fewer_bits_is_found(name):
    mlp, x = mlp_of(WIDTHS[1], packed=False), torch.randn(2, 9, 40)
    part = getattr(mlp, name)
    fewer = (part.weight.view(torch.int32) + 2**9 & -(2**10)).view(torch.float32)
    changed = replace(mlp, **{name: part._replace(weight=fewer)})
    with pytest.raises(AssertionError):
        assert_mlp_is_exact(gated_mlp(x, changed), x, mlp)


def test_an_mlp_that_looks_at_all_rows_is_found():
    mlp, x = mlp_of(WIDTHS[1], packed=True), torch.randn(9, 40)
    with forced("reference"), in_place_of("by_token", of_the_call):
        assert not torch.equal(gated_mlp(x[3], mlp), gated_mlp(x, mlp)[3])


@pytest.mark.parametrize("implementation", ON_CPU[1:])
def test_threads_and_calls_before_do_not_matter_to_an_mlp(implementation):
    """But in the reference, whose products are torch's."""
    mlp, x = mlp_of(WIDTHS[2], packed=True), torch.randn(70, 576)
    shape, Q, lengths = CASES["gpt2"]
    with forced(implementation):
        with threads(1):
            one = gated_mlp(x, mlp)
        with threads(3):
            assert torch.equal(gated_mlp(x, mlp), one)
            run(decoder_layer, layer_of(shape, packed=True), tokens_of(shape, Q, lengths))
            assert torch.equal(gated_mlp(x[:9], mlp), one[:9])


def test_an_mlp_as_in_a_layer(implementation):
    """The same bits as a layer's, whose attention and norm are taken away."""
    layer, tokens = layer_of(TINY, packed=False), tokens_of(TINY, 5, (3,))
    layer.output.weight.zero_(), layer.output.bias.zero_()
    mlp = GatedMlp(layer.gate, layer.up, layer.down, layer.activation)
    expected = run(decoder_layer, layer, tokens).out
    result = gated_mlp(row_norm(tokens.x, layer.mlp_norm), mlp) + tokens.x
    assert torch.equal(result, expected)
