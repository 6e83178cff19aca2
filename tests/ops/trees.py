"""Random trees and what judges them: shared by tests of `verify_tree` and `build_tree`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdiff_kernels import _C, Tree, VerifiedTree, row_distribution, verify_tree

from .conftest import ON_CPU, forced

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=ON_CPU)
def implementation(request):
    """As the fixture of all ops, without backends that have no trees."""
    with forced(request.param):
        yield request.param


def on_each_isa(call: Callable[[], Any]) -> Iterator[Any]:
    """What a call gives by C++ on each instruction set of this processor."""
    for isa in _C.supported_isas():
        with forced(f"cpp-{isa}"):
            yield call()


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Dice:
    """Random choices by a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def pick(self, *options: Any) -> Any:
        return options[self.below(len(options))]

    def chance(self, p: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < p

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def words(self, *shape: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, shape, generator=self.generator)

    def logits(self, x: Tensor) -> Tensor:
        """In some precision, sometimes with tokens of no weight, sometimes with strided rows."""
        x = x.to(self.pick(*DTYPES))
        if self.chance(0.3):
            x[self.uniform(*x.shape) < 0.4] = -INF
        if self.chance(0.5):
            frame = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 7), NAN).to(x.dtype)
            frame[..., 1:-1, 3:-4] = x
            x = frame[..., 1:-1, 3:-4]
        return x

    def sampling(self, B: int, V: int) -> dict[str, Any]:
        """Parameters, each left out, a number for all, or one for each row."""
        k = torch.randint(0, V + 2, (B,), generator=self.generator)
        p, least = self.uniform(B) * 0.99 + 0.01, self.uniform(B) * 0.3
        heat = torch.tensor([self.pick(0.0, 0.3, 1.0, 1.7) for _ in range(B)])
        options = {
            "temperature": self.pick(None, 0.7, 0.0, heat, heat),
            "top_k": self.pick(None, None, None, int(k[0]), k),
            "top_p": self.pick(None, None, None, float(p[0]), p),
            "min_p": self.pick(None, None, None, float(least[0]), least),
        }
        return {name: value for name, value in options.items() if value is not None}

    def parents(self, N: int) -> list[int]:
        """Of a random shape: bushy ones, chains, and what is between them."""
        kind = self.pick("bush", "chain", "any", "any")
        if kind == "chain":
            return list(range(-1, N - 1))
        least = 3 if kind == "bush" else N
        return [max(-1, n - 1 - self.below(min(n, least) + 1)) for n in range(N)]


@dataclass
class Case:
    """Inputs of `verify_tree`."""

    target: Tensor
    tree: Tree
    options: dict[str, Any]

    def verified(self, **change: Any) -> VerifiedTree:
        return verify_tree(self.target, self.tree, **self.options | change)

    def row(self, b: int) -> Case:
        """A sequence alone."""
        tree = self.tree._replace(
            **{name: getattr(self.tree, name)[b : b + 1] for name in ("tokens", "parents", "rows")}
        )
        options = {
            name: value[b : b + 1] if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return replace(self, target=self.target[b : b + 1], tree=tree, options=options)


def a_case(seed: int, V: int, rule: str, damaged: bool = False) -> Case:
    """A tree whose recorded siblings come from rows close to the target's.

    damaged: some entries are replaced by such as no tree has.
    """
    dice = Dice(seed)
    B, N = 1 + dice.below(3), dice.pick(0, 1, 3, 6, 9, 12)
    base = dice.normal(B, N + 1, V) * dice.pick(0.0, 1.0, 3.0, 9.0)
    ids = torch.arange(V)
    if dice.chance(0.4):
        ids = torch.randperm(V, generator=dice.generator)[: 1 + dice.below(V)].sort().values
    pool = base.flatten(0, 1)[:, ids]
    pool = dice.logits(pool + dice.normal(*pool.shape) * dice.pick(0.0, 0.5, 2.0))
    replacement, recorded = dice.chance(0.3), dice.pick(0.0, 0.6, 1.0, 1.0)
    sampling = dice.sampling(B, V)
    if rule == "greedy":
        sampling.pop("temperature", None)
    drafting = {} if dice.chance(0.5) else sampling
    spread = {name: x.repeat_interleave(N + 1) if isinstance(x, Tensor) else x
              for name, x in drafting.items()}  # fmt: skip
    distribution = row_distribution(pool, **spread, backend="reference")
    chances = (dice.pick(1, 3) * pool.float()).softmax(-1).nan_to_num()
    tokens, parents = torch.full((B, N), -1), torch.full((B, N), -1)
    rows = torch.full((B, N), -1)
    for b in range(B):
        for n, parent in enumerate(dice.parents(N)):
            parents[b, n] = parent
            missing = dice.chance(0.08) or (parent >= 0 and tokens[b, parent] < 0)
            row = b * (N + 1) + parent + 1
            weights = chances[row] + 1e-9
            is_recorded = dice.chance(recorded)
            if not replacement:
                taken = tokens[b, :n][(parents[b, :n] == parent) & (tokens[b, :n] >= 0)]
                weights[torch.isin(ids, taken)] = 0
            if missing or not weights.any():
                continue
            likeliest = weights.argmax() if dice.chance(0.5) else None
            column = torch.multinomial(weights, 1, generator=dice.generator)[0]
            tokens[b, n] = ids[column if likeliest is None else likeliest]
            rows[b, n] = row if is_recorded else -1
    if damaged and N:
        field = dice.pick(tokens, parents, rows)
        field[dice.below(B), dice.below(N)] = dice.pick(-(2**63), 2**63 - 1, -2, -1, 0, N, V, 2**32)
    target = dice.logits(base)
    if dice.chance(0.15):
        target[dice.below(B), dice.below(N + 1), dice.below(V)] = dice.pick(NAN, INF)
    tree = Tree(tokens, parents, rows)
    if recorded or dice.chance(0.5):
        ids_or_none = None if len(ids) == V and dice.chance(0.8) else ids
        tree = tree._replace(logits=pool, distribution=distribution, draft_ids=ids_or_none)
    options = {**sampling, "rule": rule, **a_key(dice, B, N, V, rule)}
    return Case(target, tree._replace(replacement=replacement), options)


def a_key(dice: Dice, B: int, N: int, V: int, rule: str) -> dict[str, Tensor]:
    """Explicit words, or a seed and what goes with it."""
    if dice.chance(0.4):
        return {"words": dice.words(B, N + 1, V) if rule == "coupled" else dice.words(B, N + 1)}
    count = torch.randint(0, 1000, (B,), generator=dice.generator)
    return {"seed": dice.words(B), "position" if rule == "coupled" else "round": count}
