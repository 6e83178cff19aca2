"""PyTorch's demands on the ops: opcheck, `torch.compile` without graph breaks, fake tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from specdiff_kernels import (
    Draft,
    Lenience,
    Pages,
    Reveal,
    Tree,
    build_tree,
    cached_attention,
    commit,
    denoise_step,
    row_distribution,
    row_divergence,
    sample,
    skinny_linear,
    verify,
    verify_tree,
)
from specdiff_kernels.ops.build_tree import OP as BUILD_TREE
from specdiff_kernels.ops.row_divergence import BACKWARD

from .helpers import installed

B, K, V = 2, 3, 9
NO_WORKSPACE = (cached_attention, commit, row_divergence, skinny_linear)

OVERLOADS = sorted(
    name.removeprefix("specdiff::") + ("" if name.endswith(".out") else ".default")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("specdiff::")
)


def test_every_op_has_both_overloads():
    ops = ("build_tree", "cached_attention", "commit", "denoise_step", "row_divergence",
           "row_divergence_backward", "row_distribution", "sample", "skinny_linear",
           "verify", "verify_tree")  # fmt: skip
    assert sorted(f"{op}.{form}" for op in ops for form in ("default", "out")) == OVERLOADS


def every_call() -> Iterator[partial]:
    """Each public op, once with nothing that may be left out, once with all of it."""
    torch.manual_seed(0)
    pool, target = torch.randn(B * K, V), torch.randn(B, K + 1, V)
    rows, column = torch.arange(B * K), torch.arange(V)
    row, per_row = torch.arange(B), torch.zeros(B * K, dtype=torch.int64)
    forced = {"backend": "reference"}

    def truncation(N: int) -> dict:
        return {"temperature": torch.full((N,), 0.9), "top_k": 5, "top_p": 0.9, "min_p": 0.01}

    yield partial(row_distribution, pool)
    yield partial(row_distribution, pool, **truncation(B * K), **forced)

    distribution = row_distribution(pool)
    yield partial(sample, pool, distribution, words=rows)
    yield partial(sample, pool, distribution, seed=rows, round=per_row, slot=per_row, position=rows,
                  draft_ids=column, **forced)  # fmt: skip

    masked = Draft.masked(B, K, pool)
    step = partial(denoise_step, step=0)
    yield partial(step, masked, Reveal.all(), words=torch.arange(B * K * 2).view(B, K, 2),
                  entropies=True)  # opcheck takes no NaN for equal  # fmt: skip
    reduced = masked._replace(draft_ids=column, lengths=torch.full((B,), K))
    yield partial(step, reduced, Reveal.sedd(0.5), **truncation(B), seed=row, round=row,
                  position=row, pool_rows=rows.view(B, K), entropies=True, **forced)  # fmt: skip

    tokens = rows.view(B, K)
    guess = Draft(tokens, torch.zeros(B, K).int(), torch.full((B, K), -1))
    yield partial(verify, target, guess, words=torch.arange(B * (K + 1)).view(B, K + 1))
    drawn = guess._replace(rows=tokens, logits=pool, distribution=distribution, draft_ids=column,
                           lengths=reduced.lengths)  # fmt: skip
    yield partial(verify, target, drawn, **truncation(B), rule="coupled", seed=row, round=row,
                  position=row, **forced)  # fmt: skip
    yield partial(verify, target, drawn, rule="lenient", seed=row, round=row,
                  lenience=Lenience("ensemble", torch.full((B,), 0.5).double()))  # fmt: skip

    behind = torch.tensor([[-1, -1, 1]] * B)
    guesses = Tree.guesses(torch.tensor([[1, 2, 1]] * B), behind)
    yield partial(verify_tree, target, guesses, words=torch.arange(B * (K + 1)).view(B, K + 1))
    recorded = guesses._replace(rows=rows.view(B, K)[:, [0, 0, 1]], logits=pool,
                                distribution=distribution, draft_ids=column)  # fmt: skip
    yield partial(verify_tree, target, recorded, **truncation(B), rule="coupled", seed=row,
                  round=row, position=row, **forced)  # fmt: skip
    warm = torch.full((B,), 0.9)
    yield partial(tree, pool, K, 4, None, False, None, None, warm, None, None, None,
                  None, None, None, None, None)  # fmt: skip
    yield partial(tree, pool, K, 4, torch.tensor([-1, -1, 0, 1]), True, row + 1, column, warm,
                  row + 5, warm, warm / 9, torch.arange(4 * B).view(B, 4), row, row, row,
                  "reference")  # fmt: skip

    lengths, emitted = torch.ones(B).long(), torch.tensor([[7, 5, -1, -1], [7, 8, 9, 5]])
    path = torch.tensor([[0, 2, 3, 5]] * B)
    pages, others = (Pages.empty(B, 4, 4 * B, block_size=2) for _ in range(2))
    pages.reserve(torch.full((B,), 7))
    others.reserve(torch.full((B,), 7))
    paged = [torch.randn(4 * B, 2, 2, 4), torch.randn(4 * B, 2, 1, 3).bfloat16()]
    ends = {"stop_tokens": torch.tensor([8]), "limit": lengths + 2, "finished": lengths < 0}
    yield partial(commit, lengths, emitted)
    yield partial(commit, lengths, emitted, pages=pages)
    yield partial(commit, lengths, emitted, path=path, caches=[torch.randn(B, 2, 8, 4)])
    yield partial(commit, lengths, emitted, **ends, pages=others, release=True, path=path,
                  caches=paged, **forced)  # fmt: skip

    yield partial(skinny_linear, pool, target[0])
    yield partial(skinny_linear, pool, target[0], torch.ones(K + 1), **forced)

    query, cache = torch.randn(B, K, 4, V), torch.randn(B, 2, 8, V)
    blocks, sinks = torch.randn(9, 2, 2, V), torch.zeros(4)
    yield partial(cached_attention, query, cache, cache.flip(0), lengths)
    yield partial(cached_attention, query, blocks, blocks.flip(0), lengths, first=row, sinks=sinks,
                  tables=torch.arange(4 * B).view(B, 4).int(), parents=torch.full((B, K), -1),
                  scale=0.5, window=2, softcap=3.0, **forced)  # fmt: skip

    drafted = row_divergence, pool, pool[:, :K], torch.arange(K), torch.ones(B * K)
    yield partial(row_divergence, pool, pool.flip(0))
    yield partial(*drafted, **forced)
    statistics, up = torch.ones(B * K, 8).double(), [torch.ones(B * K)] * 4
    yield partial(slope, pool, pool.flip(0), None, torch.ones(B * K), statistics, *up, None)
    yield partial(slope, *drafted[1:], statistics, *up, "reference")


def tree(*args, out: tuple | None = None) -> tuple:
    """build_tree, whose `out` form has no name in Python."""
    if out is None:
        return BUILD_TREE.packet(*args)
    BUILD_TREE.packet.out(*args, *out)
    return out


def slope(*args, out: Tensor | None = None) -> Tensor:
    """The backward pass of row_divergence."""
    if out is None:
        return BACKWARD.packet(*args)
    BACKWARD.packet.out(*args, out)
    return out


class Recorder(TorchDispatchMode):
    """Records the arguments that the dispatcher is given, as they were before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple]] = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "specdiff":
            self.calls[str(func).removeprefix("specdiff.")].append(deepcopy(args))
        return func(*args, **(kwargs or {}))


def output_like(result):
    """Memory for `out`; of a draft also what only `out` needs."""
    out = tree_map_only(Tensor, torch.zeros_like, result)
    return out._replace(entropy=torch.zeros(B, K).double()) if isinstance(out, Draft) else out


@cache
def recorded() -> dict[str, list[tuple]]:
    """Arguments of each overload."""
    with Recorder() as recorder:
        for call in every_call():
            out = output_like(deepcopy(call)())
            takes_workspace = "backend" in call.keywords and call.func not in NO_WORKSPACE
            workspace = {"workspace": torch.zeros(1).long()} if takes_workspace else {}
            call(out=out, **workspace)
    return recorder.calls


def overload(name: str) -> torch._ops.OpOverload:
    op, form = name.split(".")
    return getattr(getattr(torch.ops.specdiff, op), form)


@pytest.mark.parametrize("name", OVERLOADS)
def test_opcheck(name):
    for args in recorded()[name]:
        torch.library.opcheck(
            overload(name),
            args,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("name", OVERLOADS)
def test_opcheck_sees_every_option_given_and_left_out(name):
    for i, argument in enumerate(overload(name)._schema.arguments):
        if isinstance(argument.type, torch.OptionalType):
            given = {args[i] is not None for args in recorded()[name]}
            assert given == {False, True}, argument.name


@pytest.mark.parametrize("name", OVERLOADS)
def test_no_op_is_differentiated_behind_autograd(name):
    """This check of opcheck is empty unless an input requires a gradient."""
    args = tree_map_only(
        Tensor, lambda x: x.requires_grad_(x.is_floating_point()), deepcopy(recorded()[name][-1])
    )
    torch.library.opcheck(overload(name), args, test_utils="test_autograd_registration")


@pytest.mark.parametrize("name", OVERLOADS)
def test_outputs_require_no_gradient(name):
    """But the divergences and their slopes, of which torch knows."""
    args, schema = deepcopy(recorded()[name][-1]), overload(name)._schema.arguments
    written = [
        x for x, a in zip(args, schema, strict=True) if a.alias_info and a.alias_info.is_write
    ]
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and not any(x is y for y in written):
            x.requires_grad_()
    outputs = tree_leaves((overload(name)(*args), written))
    learns = any(isinstance(x, Tensor) and x.requires_grad for x in outputs)
    known = ("row_divergence.default", "row_divergence_backward.default")
    assert learns == (name in known)


def test_distributions_of_logits_that_require_a_gradient_can_be_looked_at():
    logits = torch.randn(2, 9, requires_grad=True)
    assert row_distribution(logits).max.numpy().tolist() == logits.max(-1).values.tolist()


# --- torch.compile ---


def a_cache(form: str, B: int, K: int, M: int) -> tuple[Pages | None, Tensor | None, list[Tensor]]:
    """Pages, a tree's path and the caches that it moves."""
    path = torch.arange(0, 2 * (K + 1), 2).repeat(B, 1)
    if form == "dense":
        return None, None, []
    if form == "dense tree":
        return None, path, [torch.randn(B, heads, B + 2 * K + 3, 4) for heads in (2, 3)]
    pages = Pages.empty(B, M, B * M, block_size=2)
    if form == "pages":
        return pages, None, []
    return pages, path, [torch.randn(B * M, 2, 2, 4), torch.randn(B * M, 2, 2, 4).bfloat16()]


def an_input(form: str, B: int, K: int, V: int, M: int) -> tuple:
    torch.manual_seed(0)
    hidden, head, pool = torch.randn(B, K + 1, 8), torch.randn(V, 8), torch.randn(B * K, V)
    key = {"seed": torch.arange(B), "round": torch.zeros(B).long()}
    return hidden, head, pool, torch.arange(B) + 1, key, *a_cache(form, B, K, M)


def one_round(hidden, head, pool, lengths, key, pages, path, caches):
    """All ops: step numbers and counts that follow the sizes, steps in place, blocks reserved."""
    B, K = hidden.shape[0], hidden.shape[1] - 1
    missing = None if pages is None else pages.reserve(lengths + 2 * K + 1)
    draft = Draft.masked(B, K, pool)
    draft = denoise_step(draft, Reveal.chunk(0, K // 2), 0, entropies=True, **key)
    draft = denoise_step(draft, Reveal.highest_confidence(K // 2), 1, out=draft, **key)
    draft = denoise_step(draft, Reveal.all(), K + 1, 0.9, top_k=5, out=draft, **key)
    target = skinny_linear(hidden.flatten(0, 1), head).view(B, K + 1, -1)
    verified = verify(target, draft, rule="block", **key)
    committed = commit(lengths, verified.emitted, limit=lengths + 3, pages=pages,
                       release=pages is not None, path=path, caches=caches)  # fmt: skip
    bonus = sample(target[:, -1], row_distribution(target[:, -1]), **key)
    tree = build_tree(pool.view(B, K, -1), K, shape=torch.arange(K) - 1, **key)
    judged = verify_tree(target, tree, 0.9, **key)
    best = build_tree(pool.view(B, K, -1), 2 * K, top_p=0.9, lengths=lengths)
    distance = row_divergence(target[:, :-1].flatten(0, 1), pool)
    cache = hidden[:, None, :, :4], hidden[:, None, :, 4:]
    context = cached_attention(hidden.view(B, K + 1, 2, 4), *cache, lengths * 0, window=K)
    return (draft.tokens, draft.distribution, draft.entropy.nan_to_num(), verified, committed,
            bonus, missing, distance, context, tree[:3], judged, best[:3])  # fmt: skip


def assert_like_eager(compiled, *size) -> None:
    """The same results, and the same written in place."""
    mine = an_input(*size)
    theirs = deepcopy(mine)
    have, want = (compiled(*mine), mine), (one_round(*theirs), theirs)
    for x, y in zip(tree_leaves(have), tree_leaves(want), strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


# B, K, V, M; PyTorch takes dimensions that are equal in the first for the same
SIZES = [(5, 6, 11, 9), (3, 5, 13, 9), (2, 9, 30, 20), (7, 4, 8, 6), (2, 2, 2, 4)]


@pytest.mark.parametrize("form", ["dense", "pages", "dense tree", "paged tree"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_round_is_one_graph_for_all_sizes(backend, form):
    torch._dynamo.reset()
    compiled = torch.compile(one_round, fullgraph=True, dynamic=True, backend=backend)
    assert_like_eager(compiled, form, *SIZES[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in SIZES[1:]:
            assert_like_eager(compiled, form, *size)


def test_sizes_of_one_have_graphs_of_their_own():
    """PyTorch specialises 0 and 1, here of B and K; of V, blocks and columns likewise."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(one_round, fullgraph=True, dynamic=True, backend=counter)
    for count, size in enumerate([(1, 6, 11, 9), (5, 1, 11, 9)], 1):
        assert_like_eager(compiled, "dense", *size)
        assert counter.frame_count == count


def a_loss(target: Tensor, hidden: Tensor, head: Tensor, ids: Tensor | None) -> Tensor:
    """Of a drafter whose logits are hidden [N, 8] times head [D, 8]."""
    row = row_divergence(target, hidden @ head.T, ids, 0.7)
    return (row.tv + row.kl + 0.1 * row.reverse_kl - 0.01 * row.draft_entropy).mean()


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_is_one_graph_for_all_sizes(backend, reduced):
    torch._dynamo.reset()
    compiled = torch.compile(a_loss, fullgraph=True, dynamic=True, backend=backend)
    for i, (N, V, D) in enumerate([(5, 90, 40), (3, 33, 17), (7, 64, 50)]):
        torch.manual_seed(i)
        ids = torch.randperm(V)[:D].sort().values if reduced else None
        target, hidden = torch.randn(N, V), torch.randn(N, 8)
        heads = [torch.randn(D if reduced else V, 8).requires_grad_() for _ in range(2)]
        heads[1].data.copy_(heads[0].data)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            loss = compiled(target, hidden, heads[0], ids)
        want = a_loss(target, hidden, heads[1], ids)
        loss.backward(), want.backward()
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(heads[0].grad, heads[1].grad)


def test_a_target_that_is_trained_is_refused_by_the_compiler_too():
    compiled = torch.compile(row_divergence, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="target_logits: expected a tensor without gradient"):
        compiled(torch.zeros(2, 5, requires_grad=True), torch.zeros(2, 5))


def test_numbers_may_be_symbols():
    torch._dynamo.reset()
    compiled = torch.compile(row_distribution, fullgraph=True, dynamic=True, backend="eager")
    logits = torch.randn(3, 40)
    for i, (top_k, heat) in enumerate([(5, 0.5), (7, 0.25), (9, 2.0)]):
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            have = compiled(logits, heat, top_k)
        assert torch.equal(have.total, row_distribution(logits, heat, top_k).total)


def test_windows_may_be_symbols_and_scales_have_graphs_of_their_own():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(cached_attention, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for D, window, scale in [(5, 7, None), (5, 8, None), (5, 9, 0.5), (6, 9, None), (6, 8, 0.5)]:
        call = torch.randn(2, 3, 4, D), *torch.randn(2, 2, 2, 11, D), torch.tensor([4, 8])
        options = {"window": window, "scale": scale, "softcap": 2.0, "backend": "reference"}
        assert torch.equal(compiled(*call, **options), cached_attention(*call, **options))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 3, 3]


def test_a_cache_listed_twice_is_moved_once_by_compiled_code_too():
    torch._dynamo.reset()
    cache, path = torch.randn(1, 2, 9, 4), torch.tensor([[0, 2, 4]])
    before = cache.clone()
    compiled = torch.compile(commit, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([1]), torch.ones(1, 3).long(), path=path, caches=[cache, cache])
    assert torch.equal(cache[0, :, 1:4], before[0, :, [1, 3, 5]])


# --- fake tensors ---


@pytest.fixture
def no_memory(monkeypatch):
    """Nothing gets at a backend or an address."""

    def refuse(*args):
        raise AssertionError("memory was asked for")

    monkeypatch.setattr(Tensor, "data_ptr", refuse)
    with installed(cpp=None, reference=None, triton=None, cuda=None):
        yield


def described(result) -> list[tuple]:
    return [(x.shape, x.stride(), x.dtype) for x in tree_leaves(result) if isinstance(x, Tensor)]


def test_fakes_in_fakes_out(request):
    want = [described((result := call(), output_like(result))) for call in every_call()]
    request.getfixturevalue("no_memory")
    with FakeTensorMode():
        for call, like in zip(every_call(), want, strict=True):
            result = call()
            out = output_like(result)
            call(out=out)
            assert described((result, out)) == like
            tensors = [x for x in tree_leaves((result, out)) if isinstance(x, Tensor)]
            assert all(type(x) is FakeTensor for x in tensors)


def test_a_fake_cache_is_no_cache(no_memory):
    with FakeTensorMode():
        fake = torch.empty(B, 2, 8, 4)
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        commit(torch.zeros(B).long(), torch.ones(B, 1).long(), path=torch.zeros(B, 1).long(),
               caches=[fake])  # fmt: skip
