"""linear_divergence: the value and gradient of what it says, with a few rows of logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from specdiff.training.linear_divergence import ROWS, linear_divergence
from specdiff.training.objective import DIVERGENCES, Objective

WIDTH, RANK, TOKENS = 24, 6, 96
COUNT = 2 * ROWS + 37  # the last rows are fewer


@pytest.fixture(params=[RANK, 0], ids=["with a head", "without"])
def given(request) -> dict[str, torch.Tensor | None]:
    """Arguments; logits have a standard deviation of about 3."""
    generator = torch.Generator().manual_seed(0)
    rank = request.param

    def random(*shape: int, size: float = 1.0) -> torch.Tensor:
        return size * torch.randn(shape, generator=generator)

    return {
        "inputs": random(COUNT, WIDTH + rank),
        "target": random(COUNT, WIDTH),
        "weight": torch.rand(COUNT, generator=generator) / COUNT,
        "output": random(TOKENS, WIDTH, size=0.6),
        "learnt": random(TOKENS, rank, size=0.6) if rank else None,
        "bias": random(TOKENS),
    }


def value(divergence: str = "mix"):
    """At w = 0.3, if it is a mixture."""
    objective = Objective(divergence, tv_from=0.0, tv_weight=0.3, tv_ramp=0.0)
    return lambda rows: objective.value(rows, 0.5)


def plain(inputs, target, weight, output, learnt, bias, divergence="mix"):
    """By the definition, with all logits at once."""
    matrix = output if learnt is None else torch.cat((output, learnt), 1)
    p = F.linear(target, output).to(bias.dtype).log_softmax(-1)
    q = (F.linear(inputs, matrix).to(bias.dtype) + bias).log_softmax(-1)
    kl, reverse = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    tv = (p.exp() - q.exp()).abs().sum(-1) / 2
    each = {"kl": kl, "reverse_kl": reverse, "tv": tv, "mix": 0.7 * kl + 0.3 * tv}
    return (each[divergence] * weight).sum()


def differentiated(function, given, dtype=torch.float32) -> list[torch.Tensor]:
    """The value, and 0.25 of its gradients with respect to inputs, bias and what is learnt."""
    arguments = {k: v if v is None else v.to(dtype) for k, v in given.items()}
    leaves = [k for k in ("inputs", "bias", "learnt") if arguments[k] is not None]
    for name in leaves:
        arguments[name] = arguments[name].detach().requires_grad_()
    loss = function(**arguments)
    (0.25 * loss).backward()
    return [loss.detach(), *(arguments[name].grad for name in leaves)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_are_autograds(given, divergence):
    """In fp32: a logit adds 30 products of size 10, and rounds to 30 * 10 * 2^-24 = 2e-5 at worst,
    which moves a probability by the same share of itself; the test allows 2e-5 of the largest entry
    of each gradient."""
    have = differentiated(lambda **x: linear_divergence(**x, value=value(divergence)), given)
    want = differentiated(lambda **x: plain(**x, divergence=divergence), given, torch.float64)
    for a, b in zip(have, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5 * float(b.abs().max()))


def test_under_autocast_it_is_as_exact_as_autograd_there(given):
    """Products of bf16: the error to fp64 is at most twice that of plain autograd's, which rounds
    at the same places."""
    exact = differentiated(plain, given, torch.float64)
    errors = []
    for function in (lambda **x: linear_divergence(**x, value=value()), plain):
        with torch.autocast("cpu", torch.bfloat16):
            rough = differentiated(function, given)
        assert all(part.dtype == torch.float32 for part in rough)
        errors.append([float((a - b).norm()) for a, b in zip(rough, exact, strict=True)])
    for ours, plains, want in list(zip(*errors, exact, strict=True))[1:]:
        assert 0 < ours <= 2 * plains < 0.1 * float(want.norm())


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any op makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return out


def test_all_logits_are_never_there_at_once(given):
    for function, most in (
        (lambda **x: linear_divergence(**x, value=value()), ROWS * TOKENS),
        (plain, COUNT * TOKENS),
    ):
        with Largest() as largest:
            differentiated(function, given)
        assert largest.elements == most


def test_without_a_gradient_the_value_is_the_same(given):
    want, *_ = differentiated(lambda **x: linear_divergence(**x, value=value()), given)
    leaves = {k: v if v is None else v.clone().requires_grad_() for k, v in given.items()}
    with torch.no_grad():
        have = linear_divergence(**(leaves | {"target": given["target"]}), value=value())
    assert torch.equal(have, want) and not have.requires_grad
