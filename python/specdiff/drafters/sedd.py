"""SEDD and MDLM: absorbing-state diffusion over the whole text drafts K tokens in T reverse steps.

This is the drafter of SpecDiff (2408.05636). K masks follow the committed text, and each step
reveals some of them, in any order of `schedule`. SEDD: 2310.16834; MDLM: 2406.07524.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdiff_kernels import Draft, denoise_step

from ..loop.drafter import Drafter, Draws, News, check_length
from ..loop.sampling import RowSampling, Sampling
from .ddit import DDiT, Modulation
from .noise import times
from .schedule import ORDERS, schedule

DEFAULT_STEPS = 2
HOT_STARTS = (None, "entangled", "recycled")


class SEDD(Drafter):
    """Drafts with a DDiT network that reads the end of the text and K masks.

    The network reads at most the last `network.config.length - K` tokens, at positions from 0 on.
    Keys and values are not cached, because attention is bidirectional.

    Args:
        network: a network with the target's vocabulary. It is put into eval mode.
        block: K, the default number of tokens drafted per round.
        steps: T, forwards of the network per round.
        order: order of the reveals, see `schedule`; None: "analytic".
        hot_start: treatment of the drafted tokens after a rejected one. None: all are masked again.
            "entangled": tokens that an examined token was conditioned on stay with their recorded
            distributions, and every record is used in verification. "recycled": all stay, without
            distributions, and only the free positions after them are drafted.
        draft_sampling: sampling parameters of the draft; None: the target's. Any choice is exact.
            Low temperatures often accept more, because positions sampled at once are incoherent.
        backend: backend of the ops; None chooses one.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> decoder = Decoder(target, SEDD.from_pretrained(folder), k=8)
    """

    orders: tuple[str, ...] = ORDERS

    def __init__(
        self,
        network: DDiT,
        *,
        block: int = 8,
        steps: int = DEFAULT_STEPS,
        order: str | None = None,
        hot_start: str | None = None,
        draft_sampling: Sampling | None = None,
        backend: str | None = None,
    ) -> None:
        config = network.config
        if not 1 <= block < config.length:
            raise ValueError(f"block must be in [1, length = {config.length}), got {block}")
        if order is not None and order not in self.orders:
            raise ValueError(f"order must be one of {', '.join(self.orders)}, got {order!r}")
        if hot_start not in HOT_STARTS:
            raise ValueError(f"hot_start must be one of {HOT_STARTS}, got {hot_start!r}")
        if hot_start == "entangled" and order == "confidence":
            raise ValueError(
                "hot_start 'entangled' does not work with order 'confidence', where sampled tokens "
                "decide which positions are revealed: use hot_start 'recycled' or None"
            )
        self.network = network.eval().requires_grad_(False)
        self.vocab_size: int | None = network.vocab_size
        self.block = block
        self.most: int = config.length - 1
        self.order = order or self.orders[0]
        self.hot_start = hot_start
        self.draft_sampling = draft_sampling
        self.backend = backend
        self.tables: dict[int, list[Modulation]] = {}
        self.steps = steps

    @property
    def steps(self) -> int:
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        """Set T. The schedule's modulations are computed once."""
        if steps not in self.tables:
            sigmas = [self.network.config.noise.sigma(t) for t, _ in times(steps)]
            self.tables[steps] = self.network.modulations(sigmas)
        self._steps, self.table = steps, self.tables[steps]

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> SEDD:
        """Load a checkpoint such as louaaron/sedd-small from a local folder, in fp32 on the CPU.

        Args:
            folder: see `DDiT.from_pretrained`.
            options: arguments of the constructor.

        Raises:
            ValueError: the folder holds no usable checkpoint, or an option is out of range.

        Example:
            >>> SEDD.from_pretrained("sedd-small", block=40, steps=8)
        """
        return cls(DDiT.from_pretrained(folder), **options)

    def start(self, batch: int, capacity: int, sampling: RowSampling) -> None:
        device = self.table[0].final.device
        self.sampling = self.draft_sampling or sampling
        self.text = torch.zeros(batch, capacity + 1, dtype=torch.int64, device=device)
        self.counts = torch.zeros(batch, dtype=torch.int64, device=device)
        self.previous: Draft | None = None

    def forget(self, rows: list[int]) -> None:
        self.counts[rows] = 0
        if self.previous is not None:
            tokens = self.previous.tokens.clone()
            tokens[rows] = -1
            self.previous = self.previous._replace(tokens=tokens)

    @torch.no_grad()
    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        network = self.network
        check_length(self, k)
        self._append(news)
        B = len(lengths)
        pool = self.table[0].final.new_empty(B * k, network.vocab_size + 1)
        logits = pool[:, : network.vocab_size]  # without the mask's column
        draft = Draft.masked(B, k, logits, lengths=lengths, entangled=self.hot_start == "entangled")
        if self.hot_start is not None and self.previous is not None:
            draft = carry_over(self.previous, draft, news.counts)
        wanted = torch.arange(k, device=lengths.device) < lengths[:, None]
        for number, reveal in enumerate(schedule(self.order, self.steps, k, network.config.noise)):
            masked = wanted & (draft.tokens < 0)
            if not masked.any():
                break
            states = self._denoise(draft.tokens, self.table[number])
            fill(pool, masked, network.head(states[masked]))
            draft = denoise_step(
                draft,
                reveal,
                number,
                *self.sampling.parameters,
                entropies=number == 0,
                **draws._asdict(),
                backend=self.backend,
            )
        # also if the last steps had nothing left to reveal
        self.previous = draft._replace(final_step=self.steps - 1)
        return self.previous

    def _append(self, news: News) -> None:
        """Write committed tokens into `text`, and padding into its last column."""
        column = torch.arange(news.tokens.shape[1], device=self.counts.device)
        at = self.counts[:, None] + column
        spare = self.text.shape[1] - 1
        self.text.scatter_(1, at.where(column < news.counts[:, None], spare), news.tokens)
        self.counts += news.counts

    def _denoise(self, tokens: Tensor, modulation: Modulation) -> Tensor:
        """One forward over each row's last tokens and draft. i64 [B, K] -> states [B, K, d]"""
        B, K = tokens.shape
        window = self.counts.clamp(max=self.network.config.length - K)  # [B]
        column = torch.arange(int(window.max()) + K, device=tokens.device)  # [N]
        source = (self.counts - window)[:, None] + column
        text = self.text.gather(1, source.clamp(max=self.text.shape[1] - 1))
        place = column - window[:, None]  # position in the draft, [B, N]
        drafted = tokens.where(tokens >= 0, self.network.mask_id)
        drafted = drafted.gather(1, place.clamp(0, K - 1))
        real = place < K
        padding = None if bool(real.all()) else real  # flash-attn runs only without a mask
        states = self.network(text.where(place < 0, drafted), modulation, padding)
        at = window[:, None] + torch.arange(K, device=tokens.device)
        return states.gather(1, at[..., None].expand(B, K, states.shape[-1]))


class MDLM(SEDD):
    """Drafts with a network trained as MDLM.

    Its outputs are normalised, so masked positions are revealed at the rate of the noise only.
    Arguments as in `SEDD`; the default order is "ancestral".
    """

    orders = tuple(order for order in ORDERS if order not in ("analytic", "euler"))


def fill(pool: Tensor, masked: Tensor, logits: Tensor) -> None:
    """Write the logits of `masked` positions, bool [B, K], to their rows of pool [B K, V + 1]."""
    if len(logits) == len(pool):
        pool.copy_(logits)
    else:
        pool[masked.flatten()] = logits


def carry_over(old: Draft, new: Draft, counts: Tensor) -> Draft:
    """Move the uncommitted tokens of the last draft to their positions in the new draft.

    If the draft is entangled, the kept tokens are those that an examined token was conditioned on,
    which means those revealed in an earlier step than some examined token. They keep their recorded
    distributions until they are examined. Otherwise all tokens are kept, without distributions.
    The tau of kept tokens becomes -1: revealed before the first step.

    Args:
        old: the last draft.
        new: the new draft, fully masked. Logits of recorded tokens are copied to its pool.
        counts: i64 [B], tokens committed since the last draft: the accepted ones and one more.
    """
    B, k = new.tokens.shape
    width = old.tokens.shape[1]
    source = torch.arange(k, device=counts.device) + counts[:, None]  # [B, k]
    kept = (source < width) & (counts[:, None] > 0)
    source = source.clamp(max=width - 1)
    tokens, tau, rows = (x.gather(1, source) for x in old[:3])
    kept &= tokens >= 0
    recorded = torch.zeros_like(kept)
    if new.entangled and old.lengths is not None:
        examined = torch.minimum(counts, old.lengths)[:, None]
        seen = torch.arange(width, device=counts.device) < examined
        kept &= (tau < old.tau.where(seen, -1).amax(1, keepdim=True)) | (tau < 0)
        recorded = kept & (rows >= 0)
    places = torch.arange(B * k, device=counts.device).view(B, k)
    for to, of in zip(pool_of(new), pool_of(old), strict=True):
        to[places[recorded]] = of[rows[recorded]]
    rows = places.where(recorded, -1)
    return new._replace(
        tokens=tokens.where(kept, new.tokens),
        tau=torch.full_like(tau, -1).where(kept, new.tau),
        rows=rows.where(kept, new.rows),
    )


def pool_of(draft: Draft) -> list[Tensor]:
    """A draft's logits and the fields of their distributions, R rows each."""
    return [x for x in (draft.logits, *(draft.distribution or ())) if x is not None]
