"""Attention over a cache: as exact as torch's, and a query's bits are its own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from specdiff_kernels import cached_attention

from .attention import (
    assert_error_at_most_twice_that_of_torch,
    dependences,
    formula,
    inputs,
    over_threads,
    padded,
    paged,
    reads_all,
    split,
    visible,
)
from .conftest import ON_CPU, forced
from .helpers import i64
from .products import NAN

GRID = {
    "B": (1, 2, 3),
    "Q": (1, 2, 5, 9, 17, 33),
    "G": (1, 3, 4),
    "H": (1, 2, 3),
    "D": (1, 8, 20, 64, 80, 256),
    "lengths": (0, 1, 63, 64, 65, 255, 256, 257, 600),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "window": (None, None, 1, 7, 64, 300),
    "softcap": (None, None, 0.7, 20.0),
    "scale": (None, 0.3),
    "sinks": (False, False, True),
    "tree": (False, True),
    "padding": (0, 0, 5, 100),
    "block": (None, None, 1, 5, 16),
}


def sampled(count: int) -> list[dict[str, Any]]:
    """Points of the grid: in each column every value as often as any other. Of three rows, two
    have other lengths."""
    draw = random.Random(0)
    columns = {}
    for name, values in GRID.items():
        column = [values[i % len(values)] for i in range(count)]
        draw.shuffle(column)
        columns[name] = column
    points = [{name: column[i] for name, column in columns.items()} for i in range(count)]
    for point in points:
        others = draw.sample(GRID["lengths"], point["B"] - 1)
        point["lengths"] = (point["lengths"], *others)
    return points


GROUPED = {"B": 3, "Q": 9, "G": 3, "H": 2, "D": 20, "lengths": (0, 64, 257)}
TREE = {"B": 2, "Q": 6, "G": 2, "H": 1, "D": 64, "lengths": (63, 300), "tree": True}
PROMPT = {"B": 1, "Q": 300, "G": 1, "H": 1, "D": 8, "lengths": (0,)}
WIDE = {"B": 2, "Q": 5, "G": 1, "H": 3, "D": 256, "lengths": (1, 255)}
CASES = {"grouped": GROUPED, "tree": TREE, "prompt": PROMPT, "wide": WIDE}
OPTIONS = {
    "plain": {},
    "short window": {"window": 4},
    "window": {"window": 70},
    "soft cap and sinks": {"softcap": 2.0, "sinks": True},
    "bf16": {"dtype": torch.bfloat16},
    "f16, first": {"dtype": torch.float16, "first": True},
}


@pytest.fixture(params=ON_CPU)
def implementation(request):
    with forced(request.param):
        yield request.param


def made(case: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Arguments; `first` is in the middle of the entries before the queries."""
    options = case | options
    first = options.pop("first", False)
    arguments = inputs(**options)
    return arguments | ({"first": arguments["lengths"] // 2} if first else {})


# --- the formula ---------------------------------------------------------------------------------


def assert_point_is_exact(point: dict[str, Any]) -> None:
    options = dict(point)
    padding, block = options.pop("padding"), options.pop("block")
    arguments = inputs(**options)
    if padding:
        arguments = padded(arguments, padding)
    if block:
        arguments = paged(arguments, block)
    assert_error_at_most_twice_that_of_torch(cached_attention(**arguments), arguments)


@pytest.mark.parametrize("point", sampled(24), ids=str)
def test_error_is_at_most_twice_that_of_torch(point, implementation):
    assert_point_is_exact(point)


@pytest.mark.parametrize(
    ("point", "options"),
    [
        ((1, 33, 4, 2, 1, (1,)), {"scale": 0.3, "softcap": 20.0, "dtype": torch.bfloat16}),
        ((1, 17, 1, 3, 1, (1,)), {"scale": 0.3, "softcap": 20.0, "tree": True}),
        ((2, 5, 1, 2, 8, (0, 65)), {"window": 7, "softcap": 20.0}),
        ((2, 5, 3, 2, 256, (600, 1)), {"window": 64, "scale": 0.3}),
        ((1, 2, 3, 3, 256, (255,)), {"scale": 0.3, "dtype": torch.float16}),
    ],
    ids=str,
)
def test_error_of_small_capped_scores_and_of_large_ones(point, options, implementation):
    """Where s / softcap is small, tanh is nearly s / softcap; and scores of many terms, 30 and
    more, whose error exp multiplies."""
    arguments = inputs(*point, **options)
    assert_error_at_most_twice_that_of_torch(cached_attention(**arguments), arguments)


def test_keys_or_values_of_fewer_bits_are_found():
    arguments = inputs(2, 9, 3, 2, 64, (64, 257))
    for name in ("keys", "values"):
        rounded = arguments | {name: arguments[name].half().float()}
        with pytest.raises(AssertionError):
            assert_error_at_most_twice_that_of_torch(
                cached_attention(**rounded, backend="reference"), arguments
            )


def test_one_seen_entry_is_copied(implementation):
    """Its weight is 1."""
    arguments = inputs(2, 4, 3, 2, 20, (0, 65), window=1, dtype=torch.bfloat16)
    result = cached_attention(**arguments)
    for b, length in enumerate((0, 65)):
        own = arguments["values"][b, :, length : length + 4].float().transpose(0, 1)
        assert torch.equal(result[b], own.repeat_interleave(3, 1))


def test_large_scores(implementation):
    """exp(score) would overflow, and exp(score - largest) underflows."""
    arguments = inputs(1, 5, 2, 1, 64, (300,), scale=40.0, sinks=True)
    assert_error_at_most_twice_that_of_torch(cached_attention(**arguments), arguments)
    alone = inputs(1, 1, 1, 1, 8, (9,), scale=-1e5)
    assert_error_at_most_twice_that_of_torch(cached_attention(**alone), alone)


def test_a_sink_takes_weight(implementation):
    arguments = inputs(1, 3, 2, 1, 8, (70,))
    without = cached_attention(**arguments)
    none = cached_attention(**arguments, sinks=torch.full((2,), -torch.inf))
    assert torch.allclose(none, without, rtol=1e-5, atol=1e-6)
    most = cached_attention(**arguments, sinks=torch.tensor([-torch.inf, 80.0]))
    assert torch.equal(most[:, :, 0], none[:, :, 0]) and most[:, :, 1].abs().max() < 1e-20


# --- bits ----------------------------------------------------------------------------------------


LONG = ("plain", "window")  # options of the prompt, which the reference reads for seconds


@pytest.mark.parametrize(
    ("case", "options"), [(c, o) for c in CASES for o in OPTIONS if c != "prompt" or o in LONG]
)
def test_bits_depend_on_nothing_else(case, options, implementation):
    assert dependences(cached_attention, made(CASES[case], **OPTIONS[options])) == set()


@pytest.mark.parametrize("window", [None, 6])
def test_a_prompt_padded_on_the_left_has_its_own_bits(window, implementation):
    """Queries of the padding are in the same call, and their entries in the cache."""
    arguments = inputs(2, 20, 2, 1, 8, (0, 0), window=window)
    expected = cached_attention(**arguments)
    behind = padded(arguments, 7)
    for name in ("keys", "values"):
        behind[name] = behind[name].nan_to_num(3.0)
    behind["query"] = torch.cat([torch.ones(2, 7, 2, 8), arguments["query"]], 1)
    result = cached_attention(**behind | {"lengths": i64(0, 0)})
    assert torch.equal(result[:, 7:], expected) and not result[:, :7].any()


@pytest.mark.parametrize("case", CASES)
def test_threads_do_not_matter(case, implementation):
    """To the bit; but in the reference, whose products are torch's."""
    arguments = made(CASES[case])
    three, one = over_threads(cached_attention, arguments)
    if implementation == "reference":
        for result in (three, one):
            assert_error_at_most_twice_that_of_torch(result, arguments)
    else:
        assert torch.equal(three, one)


def parts(count):
    """Where n seen slots lie if they are cut into `count` parts."""
    return split(lambda a, seen: torch.arange(len(seen)) * count(a) // len(seen))


MUTANTS = {
    "queries": parts(lambda a: a["query"].shape[1]),
    "rows": parts(lambda a: a["B"]),
    "padding": split(lambda a, seen: seen // 64),
    "siblings": split(lambda a, seen: (seen - seen[0]) // 4),
    "pages": split(
        lambda a, seen: (
            (seen - seen[0]) // (a["keys"].shape[1] if a.get("tables") is not None else 64)
        )
    ),
    "unseen": reads_all,
}


@pytest.mark.parametrize("dependence", MUTANTS)
def test_wrong_implementations_are_found(dependence):
    """Each has sums whose parts follow one thing more; the last gives unseen values the weight 0,
    where a NaN stays one."""
    case = TREE if dependence == "siblings" else GROUPED
    found = dependences(MUTANTS[dependence], made(case))
    assert found == {dependence} or (dependence == "unseen" and dependence in found)


@pytest.mark.parametrize("case", [GROUPED, TREE])
def test_a_right_implementation_in_parts_is_not_found(case):
    fixed = split(lambda a, seen: torch.arange(len(seen)) // 64)
    assert dependences(fixed, made(case)) == set()
    assert_error_at_most_twice_that_of_torch(fixed(**made(case)), made(case))


def test_parts_by_threads_are_found():
    three, one = over_threads(parts(lambda a: torch.get_num_threads()), made(GROUPED))
    assert not torch.equal(three, one)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [1, 7, 8, 17, 64])
@pytest.mark.parametrize("block", [None, 5])
def test_views_between_sentinels(D, block, implementation):
    """Nothing outside the inputs is read, and nothing outside the result is written."""
    arguments = inputs(2, 5, 2, 2, D, (3, 66), tree=True, sinks=True)
    if block:
        arguments = paged(arguments, block)
    expected = cached_attention(**arguments)
    assert expected.isfinite().all()
    framed = dict(arguments)
    for name in ("query", "keys", "values", "sinks"):
        x = arguments[name]
        frame = torch.full([n + 2 for n in x.shape], NAN, dtype=x.dtype)
        inside = frame[tuple(slice(1, -1) for _ in x.shape)]
        framed[name] = inside.copy_(x)
    frame = torch.full((4, *expected.shape[1:]), NAN)
    before = {name: x.clone() for name, x in framed.items()}
    result = cached_attention(**framed, out=frame[1:3])
    assert result.data_ptr() == frame[1].data_ptr() and torch.equal(result, expected)
    assert frame[0].isnan().all() and frame[3].isnan().all()
    for name, x in framed.items():
        assert torch.equal(x.nan_to_num(99.0), before[name].nan_to_num(99.0)), name


def test_dimensions_that_are_not_contiguous_are_copied(implementation):
    arguments = inputs(2, 3, 2, 2, 20, (3, 66), tree=True)
    turned = {
        name: arguments[name].mT.contiguous().mT for name in ("query", "keys", "values", "parents")
    }
    assert turned["keys"].stride(-1) != 1
    assert torch.equal(cached_attention(**arguments | turned), cached_attention(**arguments))


@pytest.mark.parametrize("block", [None, 5])
def test_rows_may_share_memory(block, implementation):
    """A cache of one row for all, and blocks that several rows hold."""
    arguments = inputs(1, 4, 2, 2, 8, (70,))
    arguments = paged(arguments, block) if block else arguments
    alone = cached_attention(**arguments)
    shared = {
        name: x.expand(3, *x.shape[1:])
        for name, x in arguments.items()
        if not (block and name in ("keys", "values"))
    }
    assert torch.equal(cached_attention(**arguments | shared), alone.expand(3, -1, -1, -1))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("block", [None, 5])
@pytest.mark.parametrize("tree", [False, True])
def test_queries_may_lie_beyond_the_capacity(tree, block, window, implementation):
    """Of a dense cache of S slots, or of tables of M blocks: what exists is seen."""
    arguments = inputs(7, 4, 2, 1, 8, (20,) * 7, window=window, tree=tree)
    arguments = paged(arguments, block) if block else arguments
    for name in ("keys", "values"):
        arguments[name] = arguments[name].nan_to_num(0.5)
    S = 27 if block is None else 30
    arguments["lengths"] = i64(S - 4, S - 3, S - 1, S, S + 3, 2**40, 2**63 - 1)
    result = cached_attention(**arguments)
    assert result.isfinite().all()
    assert_error_at_most_twice_that_of_torch(result, arguments)
    sees = visible(arguments).any(-1)
    assert bool(sees[-1].any()) == (window is None)
    assert not result[~sees].any()


def test_lengths_below_zero_count_as_zero(implementation):
    arguments = inputs(2, 3, 1, 2, 8, (0, 0))
    wrong = arguments | {"lengths": i64(-1, -(2**63))}
    assert torch.equal(cached_attention(**wrong), cached_attention(**arguments))
    low = arguments | {"first": i64(-5, -(2**63))}
    assert torch.equal(cached_attention(**low), cached_attention(**arguments))


def test_the_largest_window_is_none(implementation):
    """Also where the first entry seen is so far away that no query sees any."""
    arguments = inputs(2, 3, 1, 2, 8, (0, 70), first=i64(2**63 - 1, 5))
    result = cached_attention(**arguments, window=2**63 - 1)
    assert torch.equal(result, cached_attention(**arguments))
    assert not result[0].any() and result[1].all()


def test_parents_that_are_none_count_as_the_root(implementation):
    arguments = inputs(1, 5, 2, 1, 8, (20,), tree=True)
    right, wrong = i64(-1, -1, 1, -1, -1)[None], i64(0, -2, 1, 2**62, 4)[None]
    expected = cached_attention(**arguments | {"parents": right})
    assert torch.equal(cached_attention(**arguments | {"parents": wrong}), expected)


@pytest.mark.parametrize("wrong", [-1, -(2**31), 2**31 - 1, "blocks"])
def test_blocks_that_do_not_exist_are_not_seen(wrong, implementation):
    """As if their positions were left out; also a query's own."""
    arguments = paged(inputs(2, 4, 2, 1, 8, (20, 23)), 5)
    tables = arguments["tables"].clone()
    tables[0, 1] = tables[1, 4] = len(arguments["keys"]) if wrong == "blocks" else wrong
    tables[1, 5] = -1  # with all of row 1's queries but two
    arguments["tables"] = tables
    result = cached_attention(**arguments)
    assert visible(arguments)[1, 0].sum() == 20
    assert_error_at_most_twice_that_of_torch(result, arguments)
    arguments["tables"] = torch.full_like(tables, -1)
    assert not cached_attention(**arguments).any()


def test_nothing_seen_gives_zeros(implementation):
    """Padding queries before the first entry."""
    arguments = inputs(2, 5, 2, 1, 20, (0, 3), sinks=True, first=i64(2, 100))
    result = cached_attention(**arguments)
    assert not result[0, :2].any() and not result[1].any()
    assert (result[0, 2:] != 0).all()
    assert torch.equal(formula(arguments, torch.float64) == 0, result == 0)


def test_empty(implementation):
    for B, Q, G, H in [(0, 2, 1, 1), (2, 0, 1, 1), (2, 3, 0, 1)]:
        query, keys = torch.zeros(B, Q, G * H, 8), torch.zeros(B, H, 7, 8)
        lengths = torch.zeros(B, dtype=torch.int64)
        assert cached_attention(query, keys, keys, lengths).shape == query.shape
    query, lengths = torch.ones(2, 3, 2, 8), i64(0, 1)
    slotless = torch.zeros(2, 1, 0, 8)
    assert not cached_attention(query, slotless, slotless, lengths).any()
    pool = torch.zeros(0, 4, 1, 8)
    tables = torch.zeros(2, 3, dtype=torch.int32)
    assert not cached_attention(query, pool, pool, lengths, tables=tables).any()
    assert not cached_attention(query, pool, pool, lengths, tables=tables[:, :0]).any()


def test_numbers_of_other_kinds(implementation):
    """Integers are floats too, and NumPy's numbers are numbers."""
    np = pytest.importorskip("numpy")
    arguments = inputs(1, 3, 1, 1, 8, (20,))
    expected = cached_attention(**arguments, scale=2.0, softcap=3.0, window=9)
    for scale, softcap, window in [(2, 3, np.int64(9)), (np.float32(2), np.float64(3), 9)]:
        have = cached_attention(**arguments, scale=scale, softcap=softcap, window=window)
        assert torch.equal(have, expected)


# --- mistakes ------------------------------------------------------------------------------------

GOOD = inputs(2, 3, 2, 2, 8, (4, 9))
POOL = torch.zeros(5, 4, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 3, 8)}, ValueError, r"^query: expected shape \[B, Q, G\*H, D\]"),
        ({"query": GOOD["query"].double()}, TypeError, "^query: expected dtype float32, got float"),
        ({"query": GOOD["query"][:1]}, ValueError, r"^keys: expected shape \[B=1, H, S, D=8\]"),
        ({"query": GOOD["query"][..., :7]}, ValueError, r"^keys: expected .* D=7\], got \[2, 2, "),
        ({"query": GOOD["query"][:, :, :3]}, ValueError, "^query: expected a multiple of the"),
        ({"keys": GOOD["keys"][:, :, 1:]}, ValueError, r"^values: expected shape \[B=2, H=2, S=14"),
        ({"keys": GOOD["keys"].double()}, TypeError, "^keys: expected dtype float32, bfloat16, f"),
        ({"keys": GOOD["keys"].half()}, TypeError, "^values: expected dtype float16, got float32"),
        ({"lengths": i64(1)}, ValueError, r"^lengths: expected shape \[B=2\], got \[1\]"),
        ({"lengths": i64(1, 2).int()}, TypeError, "^lengths: expected dtype int64, got int32"),
        ({"first": i64(1, 2, 3)}, ValueError, r"^first: expected shape \[B=2\], got \[3\]"),
        ({"parents": i64(1, 2)}, ValueError, r"^parents: expected shape \[B=2, Q=3\], got \[2\]"),
        ({"sinks": torch.zeros(2)}, ValueError, r"^sinks: expected shape \[G\*H=4\], got \[2\]"),
        ({"tables": torch.zeros(2, 2).int()}, ValueError, "^query: expected a multiple of .* H=15"),
        (
            {"keys": POOL, "values": POOL, "tables": torch.zeros(1, 2).int()},
            ValueError,
            r"^tables: expected shape \[B=2, M\], got \[1, 2\]",
        ),
        (
            {"keys": POOL, "values": POOL, "tables": torch.zeros(2, 2).long()},
            TypeError,
            "^tables: expected dtype int32, got int64",
        ),
        (
            {"keys": POOL[:, :0], "values": POOL[:, :0], "tables": torch.zeros(2, 2).int()},
            ValueError,
            "^keys: expected a block_size of at least 1, got 0",
        ),
        ({"window": 0}, ValueError, r"^window: expected an integer in \[1, 2\^63\), got 0"),
        ({"window": 2.0}, ValueError, r"^window: expected an integer in \[1, 2\^63\), got 2.0"),
        ({"softcap": 0.0}, ValueError, r"^softcap: expected a number in \[2\^-126, .*, got 0.0"),
        ({"softcap": NAN}, ValueError, r"^softcap: expected a number in \[2\^-126, .* got nan"),
        ({"scale": "a"}, ValueError, r"^scale: expected a number in \(-2\^128, 2\^128\), got 'a'"),
        ({"scale": torch.inf}, ValueError, "^scale: expected a number in .*, got inf"),
        ({"out": torch.zeros(2, 3, 4, 9)}, ValueError, r"^out: expected shape \[B=2, Q=3, G\*H=4,"),
        ({"out": GOOD["query"]}, ValueError, "^out: expected memory of its own, got some of query"),
        ({"out": torch.zeros(2, 3, 8, 4).mT}, ValueError, "^out: expected contiguous memory, got"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        cached_attention(**GOOD | change, backend="reference")


@pytest.mark.parametrize("D", [0, 257])
def test_a_head_that_is_too_wide_is_named(D):
    query, keys = torch.zeros(1, 1, 1, D), torch.zeros(1, 1, 1, D)
    with pytest.raises(ValueError, match=rf"^query: expected a D in \[1, 256\], got {D}"):
        cached_attention(query, keys, keys, i64(0))


@pytest.mark.parametrize("name", ["query", "keys", "values", "sinks"])
def test_there_is_no_derivative(name):
    arguments = inputs(1, 2, 1, 1, 8, (5,), sinks=True)
    want = cached_attention(**arguments, backend="reference")
    arguments[name] = arguments[name].clone().requires_grad_()
    message = rf"^{name}: .* without gradient, .* use torch.nn.functional.scaled_dot_product_atten"
    with pytest.raises(ValueError, match=message):
        cached_attention(**arguments, backend="reference")
    with torch.no_grad():
        assert torch.equal(cached_attention(**arguments, backend="reference"), want)
