"""Denoising: trains a DDiT as SEDD (2310.16834) or MDLM (2406.07524).

At a time t every token of a text is masked with probability 1 - alpha(t), and the network predicts
the masked tokens. Both losses bound the text's negative log-likelihood, in nats per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..drafters.ddit import DDiT, Modulation
from .corpora import TokenRows
from .seeds import generator

FIRST_TIME = 1e-3  # smallest time in training, as in the public code of SEDD and MDLM
HELD_OUT_TEXTS = 64


class Denoising(nn.Module):
    """Training task of a DDiT: score entropy if it is time-conditioned, else MDLM's loss.

    Args:
        network: the network to train. Its train/eval mode is left unchanged.
        texts: [N, length], rows of tokens to train on.
        held_out: [M, length], rows of tokens for `held_out_loss`.
        seed: seed of times and masks.

    Raises:
        ValueError: the rows are longer than the network's length.
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
        """Mean loss of the texts with indices i64 [B], at this step's times and masks. -> f32 []"""
        chosen = chosen.cpu()  # DDP has moved it to the device
        return self.loss(self.network, self.texts[chosen], chosen, step)

    def loss(self, network: DDiT, texts: Tensor, keys: Tensor, step: int) -> Tensor:
        """texts: [B, L]; keys: i64 [B], seeds of each row's random numbers"""
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
        """Loss on the held-out rows, at fixed times and masks."""
        texts = self.held_out[:HELD_OUT_TEXTS]
        losses = [
            float(self.loss(network, part, keys, -1)) * len(part)
            for part, keys in zip(texts.split(8), torch.arange(len(texts)).split(8), strict=True)
        ]
        return sum(losses) / len(texts)


def denoising_loss(network: DDiT, texts: Tensor, times: list[float], masked: Tensor) -> Tensor:
    """Mean over rows of the sum over masked positions of rate times loss, in nats per token. -> []

    Let r = 1 / (exp(sigma) - 1), log score = l + log r - log V, and m the mean of exp(l). The score
    entropy of a masked position (2310.16834, eq. 5, times sigma') is
        sigma' (sum of scores - r log score[x] + r (log r - 1)) = sigma' r (m - l[x] + log V - 1),
    and MDLM's loss (2406.07524, eq. 10) is sigma' r (log sum of exp(l) - l[x]), the same at m = 1.

    Args:
        network: SEDD if it is time-conditioned, else MDLM.
        texts: i64 [B, L].
        times: B times in (0, 1].
        masked: bool [B, L], True for masked positions.
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
    """Modulation with one noise level per row: blocks [blocks, 6, B, 1, d], final [2, B, 1, d]."""
    table = network.modulations([network.config.noise.sigma(t) for t in times])
    if not network.config.time_conditioned:
        return table[0]
    blocks = torch.stack([entry.blocks for entry in table], 2)
    final = torch.stack([entry.final for entry in table], 1)
    return Modulation(blocks[..., None, :], final[..., None, :])
