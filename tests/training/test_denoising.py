"""Denoising: the losses of SEDD and MDLM by their formulas, and that they make a better drafter."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from specdiff import Decoder, Sampling, Target
from specdiff.drafters.ddit import DDiT, DDiTConfig
from specdiff.drafters.noise import Geometric, LogLinear
from specdiff.drafters.sedd import MDLM, SEDD
from specdiff.training.denoising import Denoising, denoising_loss, modulation_of
from specdiff.training.recipe import Recipe
from specdiff.training.trainer import Trainer

from .conftest import VOCAB

NOISES = (LogLinear(), Geometric(1e-2, 5.0))
TIMES = [0.9, 0.2, 0.55]


def new_network(conditioned: bool, noise=NOISES[0], *, random: bool = False) -> DDiT:
    torch.manual_seed(0)
    network = DDiT(DDiTConfig(VOCAB, 32, 2, 2, 16, 32, conditioned, noise))
    if random:  # adaLN and head begin at zero
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def rows(model, count: int, length: int = 24) -> torch.Tensor:
    """Text that the model sampled."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB, (count, 1), generator=generator)
    while tokens.shape[1] < length:
        p = model(tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat((tokens, p.multinomial(1, generator=generator)), 1)
    return tokens


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: type(noise).__name__)
@pytest.mark.parametrize("conditioned", [True, False], ids=["sedd", "mdlm"])
def test_loss_by_its_formula(conditioned, noise):
    """Position by position, from scores, as the papers have it.

    fp32 logits are sums of 32 products of size up to 10, rounded by at most 2e-5 of themselves.
    """
    network = new_network(conditioned, noise, random=True)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, VOCAB, (3, 7), generator=generator)
    masked = torch.rand(3, 7, generator=generator) < 0.6
    want = 0.0
    for b, t in enumerate(TIMES):
        sigma, slope = noise.sigma(t), noise.sigma_rate(t)
        alpha = noise.alpha(t)
        with torch.no_grad():
            entry = network.modulations([sigma])[0]
            corrupted = texts[b].masked_fill(masked[b], VOCAB)
            logits = network.head(network(corrupted[None], entry))[0].double()
        for row, x, hidden in zip(logits[:, :VOCAB], texts[b], masked[b], strict=True):
            if not hidden:
                continue
            if conditioned:
                log_s = row - math.log(math.exp(sigma) - 1) - math.log(VOCAB)
                r = 1 / (math.exp(sigma) - 1)
                want += slope * float(log_s.exp().sum() - r * log_s[x] + r * (math.log(r) - 1))
            else:  # alpha' = -alpha sigma'
                want += slope * alpha / (1 - alpha) * float(-row.log_softmax(-1)[x])
    with torch.no_grad():
        have = denoising_loss(network, texts, TIMES, masked).item()
    assert have == pytest.approx(want / texts.numel(), rel=1e-4)


def test_score_entropy_is_least_at_the_distribution():
    """Its gradient, averaged over what may stand there, vanishes at exp(l) / V = p alone."""
    p = torch.rand(VOCAB, generator=torch.Generator().manual_seed(0)).double()
    p /= p.sum()
    network = new_network(True).double()
    for logits, zero in ((p.log() + math.log(VOCAB), True), (p.log(), False)):
        network.output_layer.linear.bias.data = F.pad(logits, (0, 1))
        network.zero_grad()
        texts = torch.arange(VOCAB)[:, None]
        masked = torch.ones_like(texts, dtype=torch.bool)
        for x in range(VOCAB):
            (VOCAB * p[x] * denoising_loss(network, texts[x : x + 1], [0.5], masked[:1])).backward()
        gradient = network.output_layer.linear.bias.grad[:VOCAB]
        assert (gradient.abs().max() < 1e-5) == zero


@pytest.mark.parametrize("conditioned", [True, False], ids=["sedd", "mdlm"])
def test_rows_have_noise_levels_of_their_own(conditioned):
    network = new_network(conditioned, random=True)
    texts = torch.randint(0, VOCAB + 1, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = network(texts, modulation_of(network, TIMES))
        for b, t in enumerate(TIMES):
            entry = network.modulations([network.config.noise.sigma(t)])[0]
            alone = network(texts[b : b + 1], entry)
            torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditioned", [True, False], ids=["sedd", "mdlm"])
def test_it_learns(model, conditioned):
    """The held-out loss falls, and the target accepts more of a trained drafter's tokens."""
    text = rows(model, 160)
    task = Denoising(new_network(conditioned), text[32:], text[:32])
    untrained = task.held_out_loss(task.network)

    def drafted(network) -> float:
        drafter = (SEDD if conditioned else MDLM)(network, block=3, steps=1)
        decoder = Decoder(Target(model), drafter)
        prompts = text[:32, :12].tolist()
        run = decoder.generate(prompts, max_new_tokens=12, sampling=Sampling(1.0), seed=0)
        return run.stats.tokens_per_forward

    before = drafted(new_network(conditioned))
    trainer = Trainer(task, Recipe(steps=250, batch=16, learning_rate=5e-3, ema=0.9))
    while trainer.step < 250:
        trainer.train_step()
    assert task.held_out_loss(trainer.network) < untrained - 0.05
    assert drafted(trainer.network) > before + 0.05


@pytest.mark.parametrize("conditioned", [True, False], ids=["sedd", "mdlm"])
def test_loss_under_autocast(conditioned):
    """Logits and losses stay in fp32: bf16 states, of 8 bits, move them by less than 2^-6."""
    network = new_network(conditioned, random=True)
    texts = torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
    masked = torch.ones_like(texts, dtype=torch.bool)
    with torch.no_grad():
        want = denoising_loss(network, texts, TIMES, masked)
        with torch.autocast("cpu", torch.bfloat16):
            have = denoising_loss(network, texts, TIMES, masked)
    assert have.dtype == torch.float32 and have != want
    torch.testing.assert_close(have, want, rtol=2**-6, atol=0)


def test_rows_longer_than_the_network_are_refused():
    with pytest.raises(ValueError, match="texts must have at most length = 32 columns, got 33"):
        Denoising(new_network(True), torch.zeros(2, 33), torch.zeros(2, 33))
