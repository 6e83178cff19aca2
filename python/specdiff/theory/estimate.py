"""The expected rejections of a run, estimated while it decodes.

Position n of the emitted text is *examined* if a drafted token was judged there: not if the token
is a bonus. Let F be all that happened before position n is judged, the distributions of drafter and
target there included, A_n whether it is examined (settled by F), R_n whether its token is rejected,
and c_n = P(R_n = 1 | F), under the token rule TV(p_n, q_n). Then

    E sum_n A_n c_n = E sum_n A_n R_n

since E[A_n (R_n - c_n) | F] = 0. So what this module sums is unbiased for the expected rejections
of *this* way of decoding, whatever decides K, as long as it decides by the past.

If every position is examined, both are unbiased for sum_n E_{x<n ~ p} TV_n as well, since the
emitted text follows p: `expected_rejections`. With bonus tokens they are not: `run_counts`.
Drafted tokens behind a rejected one are no part of the text, and their distributions follow
prefixes of q: they do not count. Means (a sum divided by the examined positions) are ratios of two
    unbiased
sums: consistent, not unbiased.

Variance: by itself each A_n c_n has at most that of A_n R_n, being its expectation given F. That
says nothing of the sums in general, where a rejection may lead to texts of less TV. If every
position is examined it does hold of sum_n (1 - q_n(x_n) / p_n(x_n))+ over the *emitted* tokens,
see `rejected_given_token`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RejectionEstimate:
    """Totals over the examined positions of a run.

    Attributes:
        examined: how many positions.
        rejected: how many of their tokens were rejected, the 0/1 outcomes.
        expected: sum of their chances of rejection; estimates the expected `rejected`.
        variance: sum of c (1 - c), the variance that rejected - expected has by itself.

    Example:
        >>> estimate = RejectionEstimate()
        >>> tv = torch.tensor([[0.25, 0.5, 0.5]])
        >>> estimate.count(tv, accepted=torch.tensor([1]))  # the third one was not examined
        >>> estimate.examined, estimate.rejected, estimate.expected, estimate.mean
        (2, 1, 0.75, 0.375)
    """

    examined: int = 0
    rejected: int = 0
    expected: float = 0.0
    variance: float = 0.0

    def count(self, chance: Tensor, accepted: Tensor, drafted: Tensor | None = None) -> None:
        """Add a round of B sequences.

        Args:
            chance: floats [B, K], P(rejection) of each drafted position given what came before it.
                A recorded distribution: `row_divergence(target_logits, draft_logits).tv`; one-hot:
                1 - p of the drafted token. What was not examined may be anything.
            accepted: integers [B], as `verify` returns them.
            drafted: integers [B], tokens of each draft; None: K.

        Raises:
            ValueError: shapes that do not match, or a chance outside [0, 1] at an examined
                position.
        """
        judged = examined(accepted, chance.shape[-1], drafted)
        if chance.shape != judged.shape:
            raise ValueError(
                f"chance: expected shape {list(judged.shape)}, a row for each entry of accepted, "
                f"got {list(chance.shape)}"
            )
        c = chance.double()[judged]
        if not ((c >= 0) & (c <= 1)).all():
            raise ValueError(f"chance: expected probabilities in [0, 1], got {c.tolist()}")
        self.examined += int(judged.sum())
        self.rejected += int(judged.sum() - accepted.sum())
        self.expected += float(c.sum())
        self.variance += float((c * (1 - c)).sum())

    @property
    def mean(self) -> float:
        """Mean chance of rejection of an examined position, 0 if there were none."""
        return self.expected / self.examined if self.examined else 0.0

    @property
    def deviation(self) -> float:
        """(rejected - expected) / sqrt(variance): about standard normal of a verifier that
        rejects as often as the distributions say; 0 without variance."""
        return (self.rejected - self.expected) / self.variance**0.5 if self.variance else 0.0


def examined(accepted: Tensor, K: int, drafted: Tensor | None = None) -> Tensor:
    """Which drafted positions were judged: the accepted ones and the one that was rejected.

    Args:
        accepted: integers [B].
        K: positions of the result.
        drafted: integers [B], tokens of each draft; None: K.

    Returns:
        bool [B, K].

    Raises:
        ValueError: shapes that do not match, more tokens drafted than K, or more accepted than
            drafted.

    Example:
        >>> examined(torch.tensor([0, 2]), 3).int().tolist()
        [[1, 0, 0], [1, 1, 1]]
    """
    most = torch.full_like(accepted, K) if drafted is None else drafted
    if accepted.ndim != 1 or most.shape != accepted.shape:
        raise ValueError(
            "accepted and drafted: expected integers [B], got shapes "
            f"{list(accepted.shape)} and {list(most.shape)}"
        )
    if ((accepted < 0) | (accepted > most) | (most > K)).any():
        raise ValueError(
            f"accepted and drafted: expected 0 <= accepted <= drafted <= {K}, got "
            f"{accepted.tolist()} and {most.tolist()}"
        )
    return torch.arange(K, device=accepted.device) < (accepted + 1).minimum(most)[:, None]


def rejected_given_token(p: Tensor, q: Tensor, token: Tensor) -> Tensor:
    """(1 - q(x) / p(x))+: that a rejection brought the emitted token x.

    x is emitted with probability min(p, q)(x) by acceptance and (p - q)+(x) by rejection, so this
    is P(R_n = 1 | F, x_n = x); its mean over x ~ p is TV(p, q). Given the whole text, when every
    position is examined, the R_n are independent with these chances (the two cases above multiply
    over n). So the sum of these over the text is E[sum R_n | text], and its variance is at most
    that of sum R_n (Rao-Blackwell).

    Args:
        p, q: distributions [..., V].
        token: int64 [...], emitted, so that p(x) > 0.

    Returns:
        floats [...]; a `chance` for `RejectionEstimate.count` as well.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> [rejected_given_token(p, q, torch.tensor(x)).item() for x in (0, 1)]
        [0.5, 0.0]
    """
    here = token[..., None]
    return (1 - q.gather(-1, here) / p.gather(-1, here)).clamp(min=0)[..., 0]
