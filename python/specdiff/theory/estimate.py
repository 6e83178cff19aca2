"""Estimates of a run's expected rejections, made while it decodes.

Position n of the emitted text is *examined* if a drafted token was judged there; a bonus token is
not examined. Let F be everything known before position n is judged, including the distributions of
drafter and target there. Let A_n say whether the position is examined (F determines it), and R_n
whether its token is rejected. Let c_n = P(R_n = 1 | F), which is TV(p_n, q_n) under the token rule.
Then

    E sum_n A_n c_n = E sum_n A_n R_n

since E[A_n (R_n - c_n) | F] = 0. So sum_n A_n c_n is unbiased for the expected rejections of *this*
way of decoding, however K is chosen, as long as the choice depends on the past only.

If every position is examined, both sums are also unbiased for sum_n E_{x<n ~ p} TV_n
(`expected_rejections`), since the emitted text follows p. With bonus tokens they are not: see
`run_counts`. Drafted tokens after a rejected one do not count: they are not part of the text, and
their distributions follow prefixes of q. Means (a sum divided by the examined positions) are ratios
of two unbiased sums: consistent, but not unbiased.

Variance: each A_n c_n has at most the variance of A_n R_n, since it is the expectation of A_n R_n
given F. This does not extend to the sums in general, because a rejection may lead to texts of less
TV. If every position is examined, it does hold for sum_n (1 - q_n(x_n) / p_n(x_n))+ over the
*emitted* tokens: see `rejected_given_token`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RejectionEstimate:
    """Totals over the examined positions of a run.

    Attributes:
        examined: number of examined positions.
        rejected: number of rejected tokens.
        expected: sum of the rejection probabilities c; an estimate of the expected `rejected`.
        variance: sum of c (1 - c), an estimate of the variance of rejected - expected.

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
            chance: floats [B, K], P(rejection) of each drafted position given its past. With a
                recorded distribution it is `row_divergence(target_logits, draft_logits).tv`; for a
                one-hot draft, 1 - p of the drafted token. Positions not examined are ignored.
            accepted: integers [B], as `verify` returns them.
            drafted: integers [B], the length of each draft; None: K.

        Raises:
            ValueError: shapes do not match, or a chance at an examined position is outside [0, 1].
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
        """Mean rejection probability of the examined positions; 0 if there are none."""
        return self.expected / self.examined if self.examined else 0.0

    @property
    def deviation(self) -> float:
        """(rejected - expected) / sqrt(variance), or 0 if the variance is 0.

        It is about standard normal if the verifier rejects as often as the distributions imply.
        """
        return (self.rejected - self.expected) / self.variance**0.5 if self.variance else 0.0


def examined(accepted: Tensor, K: int, drafted: Tensor | None = None) -> Tensor:
    """Mask of the drafted positions that were judged: the accepted ones and the rejected one.

    Args:
        accepted: integers [B].
        K: number of drafted positions, the result's columns.
        drafted: integers [B], the length of each draft; None: K.

    Returns:
        bool [B, K].

    Raises:
        ValueError: shapes do not match, or not 0 <= accepted <= drafted <= K.

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
    """(1 - q(x) / p(x))+: the probability that the emitted token x came from a rejection.

    x is emitted with probability min(p, q)(x) by acceptance and (p - q)+(x) by rejection. So this
    is P(R_n = 1 | F, x_n = x), and its mean over x ~ p is TV(p, q). If every position is examined,
    then given the whole text the R_n are independent with these probabilities, because the two
    cases above multiply over n. Hence their sum over the text is E[sum R_n | text], and its
    variance is at most that of sum R_n (Rao-Blackwell).

    Args:
        p, q: distributions [..., V].
        token: int64 [...], the emitted tokens; p(x) > 0.

    Returns:
        floats [...], usable as `chance` of `RejectionEstimate.count`.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> [rejected_given_token(p, q, torch.tensor(x)).item() for x in (0, 1)]
        [0.5, 0.0]
    """
    here = token[..., None]
    return (1 - q.gather(-1, here) / p.gather(-1, here)).clamp(min=0)[..., 0]
