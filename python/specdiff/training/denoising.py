"""Denoising: a DDiT learns the distributions of masked tokens, as SEDD (2310.16834) or MDLM
(2406.07524).

At a time t every token of a text is masked with probability 1 - alpha(t), and the network says what
stood there. Both losses bound the text's negative log-likelihood, in nats a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..drafters.ddit import DDiT, Modulation
from .corpora import TokenRows
from .seeds import generator

FIRST_TIME = 1e-3  # least time asked about, as in the public code of SEDD and MDLM
HELD_OUT_TEXTS = 64


class Denoising(nn.Module):
    """A training task: the score entropy of a time-conditioned DDiT, or MDLM's loss of another.

    Args:
        network: what learns. It stays in the mode it is in.
        texts: [N, length], rows of tokens.
        held_out: [M, length], those of `held_out_loss`.
        seed: of times and masks.

    Raises:
        ValueError: rows longer than the network is made for.
    """

    def __init__(
        self,
        network: DDiT,
        texts: TokenRows | Tensor,
        held_out: TokenRows | Tensor,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if texts.shape[1] > network.config.length:
            raise ValueError(
                f"texts must have at most length = {network.config.length} columns, "
                f"got {texts.shape[1]}"
            )
        self.network, self.texts, self.held_out, self.seed = network, texts, held_out, seed
        self.rows = torch.arange(len(texts))
        self.lengths = torch.full((len(texts),), texts.shape[1])

    def forward(self, chosen: Tensor, step: int, progress: float) -> Tensor:
        """Mean loss of rows i64 [B], at times and with masks of this step. -> f32 []"""
        chosen = chosen.cpu()  # where DDP has moved it from
        return self.loss(self.network, self.texts[chosen], chosen, step)

    def loss(self, network: DDiT, texts: Tensor, keys: Tensor, step: int) -> Tensor:
        """texts: [B, L]; keys: i64 [B], what each row's random numbers follow from"""
        u = torch.stack(
            [
                torch.rand(1 + texts.shape[1], generator=generator(self.seed, step, key))
                for key in keys.tolist()
            ]
        )  # [B, 1 + L]
        times = FIRST_TIME + (1 - FIRST_TIME) * u[:, 0]
        noise = network.config.noise
        alpha = torch.tensor([noise.alpha(t) for t in times.tolist()])
        return denoising_loss(network, texts.long(), times.tolist(), u[:, 1:] >= alpha[:, None])

    @torch.no_grad()
    def held_out_loss(self, network: DDiT) -> float:
        """The loss of held-out rows, at fixed times and masks."""
        texts = self.held_out[:HELD_OUT_TEXTS]
        losses = [
            float(self.loss(network, part, keys, -1)) * len(part)
            for part, keys in zip(texts.split(8), torch.arange(len(texts)).split(8), strict=True)
        ]
        return sum(losses) / len(texts)


def denoising_loss(network: DDiT, texts: Tensor, times: list[float], masked: Tensor) -> Tensor:
    """Mean over rows of the sum over masked positions of rate times loss, in nats a token. -> []

    With r = 1 / (exp(sigma) - 1), log score = l + log r - log V and m = mean of exp(l), the score
    entropy of a masked position (2310.16834, eq. 5, times sigma') is
        sigma' (sum of scores - r log score[x] + r (log r - 1)) = sigma' r (m - l[x] + log V - 1),
    and MDLM's loss (2406.07524, eq. 10) is sigma' r (log sum of exp(l) - l[x]), the same at m = 1.

    Args:
        network: time-conditioned networks are SEDD's, others MDLM's.
        texts: i64 [B, L].
        times: B of them, in (0, 1].
        masked: bool [B, L].
    """
    config, device = network.config, network.vocab_embed.embedding.device
    texts, masked = texts.to(device), masked.to(device)
    sigma = torch.tensor([config.noise.sigma(t) for t in times], device=device)
    slope = torch.tensor([config.noise.sigma_rate(t) for t in times], device=device)
    states = network(texts.masked_fill(masked, network.mask_id), modulation_of(network, times))
    with torch.autocast(device.type, enabled=False):  # bf16 is too coarse for logits
        asked = states[masked].to(network.vocab_embed.embedding.dtype)
        logits = network.head(asked)[:, : network.vocab_size].float()  # [N, V]
    total = logits.logsumexp(-1)
    log_mean = total - math.log(network.vocab_size)
    truth = logits.gather(1, texts[masked][:, None])[:, 0]
    if config.time_conditioned:
        loss = log_mean.exp() - truth + math.log(network.vocab_size) - 1
    else:
        loss = total - truth
    rate = (slope / sigma.expm1())[:, None].expand_as(masked)[masked]
    return (rate * loss).sum() / texts.numel()


def modulation_of(network: DDiT, times: list[float]) -> Modulation:
    """Each row its own noise level: blocks [blocks, 6, B, 1, d], final [2, B, 1, d]."""
    table = network.modulations([network.config.noise.sigma(t) for t in times])
    if not network.config.time_conditioned:
        return table[0]
    blocks = torch.stack([entry.blocks for entry in table], 2)
    final = torch.stack([entry.final for entry in table], 1)
    return Modulation(blocks[..., None, :], final[..., None, :])
