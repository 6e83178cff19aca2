"""`verify`: accept a prefix of a draft and emit one token more, exactly by the target's
distribution; or, if that is asked for, with a bias that is returned."""

from __future__ import annotations

from torch import Tensor

from ..checks import (
    PLAIN,
    check_increasing,
    check_shape,
    columns,
    device_of,
    kind_of,
    random_key,
)
from ..fields import Sizes
from ..inputs import VerifyInputs
from ..lenience import check_lenience
from ..records import choose_record
from ..types import Draft, Lenience, Verified
from . import record_check
from .registry import Op

OP = Op("verify", VerifyInputs, Verified, workspace=True)


def verify(
    target_logits: Tensor,
    draft: Draft,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    *,
    rule: str = "token",
    record: str | None = None,
    lenience: Lenience | None = None,
    seed: int | Tensor | None = None,
    round: int | Tensor | None = None,
    position: int | Tensor | None = None,
    words: Tensor | None = None,
    check: bool = False,
    backend: str | None = None,
    out: Verified | None = None,
    workspace: Tensor | None = None,
) -> Verified:
    """Verify K drafted tokens of each sequence against the target's logits.

    Rule "token" (Leviathan et al. 2211.17192, Algorithm 1): left to right, drafted token x is
    accepted iff u q(x) < p(x); at the first rejection one token is drawn from (p - q)+. Rows after
    it are not read. Rule "block" (Sun et al. 2403.10444, Algorithm 2) judges prefixes as a whole
    and accepts at least as many on average; it reads every row of a prefix that has a chance.
    If nothing was rejected, one token more is drawn from the target's distribution behind the
    draft. Emitted tokens follow the target's distribution exactly. Where no recorded q may be used,
    q is one-hot at x.

    Rule "coupled": token y = argmax_v log p(v) + Gumbel noise keyed by the sequence's seed, the
    absolute position and v alone; drafted tokens are accepted while they equal y. The text is,
    token for token, what K = 0 gives with the same seed, whatever was drafted.

    Rule "lenient" (Yin et al. 2411.00841) accepts x iff u q(x) < p'(x), where `lenience` says how
    p' exceeds p, and is the token rule in all else. It is biased, and returns by how much: at an
    examined position the distribution of the emitted token is sum_v (min(q(v), p'(v)) - p(v))+ away
    from the target's in total variation, which is what its rejections become fewer by.

    Args:
        target_logits: [B, K + 1, V] f32, bf16 or f16, any strides with contiguous rows; row i is
            the target's distribution of drafted token i, row K that of the bonus token. V < 2^19.
        draft: Draft of [B, K] tokens. K = 0 is plain sampling.
        temperature, top_k, top_p, min_p: of the target's distribution, a number or a tensor [B];
            see `row_distribution`. Temperature 0 accepts the longest prefix equal to the argmax;
            greedy and sampled sequences may be mixed.
        rule: "token", "block", "coupled", "lenient", or "greedy", which means temperature 0.
        record: which recorded q count: "running-max", "final", "one-hot" or "entangled"; None is
            the strongest that keeps the distribution, given how the draft came about. See
            docs/losslessness.md.
        lenience: Lenience(kind, amount) for rule "lenient" alone, which needs it: "lenience",
            "additive" or "ensemble", and a number or an f64 tensor [B]. Temperature 0 stays exact.
        seed, round: i64 [B]; a sequence's own seed and its count of verification rounds. An integer
            `seed` gives each sequence its own, by `row_seeds`; an integer `round` is that of all.
            Rule "greedy" and a temperature that is the number 0 need neither.
        position: i64 [B] or an integer, absolute position of the first drafted token; in place of
            `round` under the coupled rule.
        words: i64 [B, K + 1] random words in place of seed and round: one for each acceptance,
            the last for the token that ends the round. Coupled: [B, K + 1, V], one for each token.
        check: whether records are compared with the logits that they point at, for use while a
            drafter is written. A sequence with a record that does not fit gets the status RECORD;
            with a recorded token of no weight, DRAFT. This holds behind a rejection too. The
            comparison is in plain PyTorch and takes far longer than the op. The environment
            variable SPECDIFF_CHECK=1, set before the import, asks it of all calls.
            docs/integrating.md says what it cannot see.
        backend, out, workspace: as in `row_distribution`.

    Returns:
        Verified(accepted i64 [B], emitted i64 [B, K + 1] padded with -1, status i32 [B],
        bias f64 [B]): bias is summed over the examined positions; 0 under all rules but "lenient".

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range, a record that
            would bias the output, or a lenience without its rule, or the rule without it.
        BackendError: a forced backend cannot run.

    Example:
        >>> target = torch.tensor([[[0.0, 9.0], [9.0, 0.0]]])
        >>> draft = Draft.guesses(torch.tensor([[1]]))
        >>> verify(target, draft, 0.9, seed=7, round=0).emitted.tolist()
        [[1, 0]]
    """
    check_draft(draft)
    chosen = choose_record(draft, rule, record)
    check_lenience(rule, lenience)
    if position is not None and rule != "coupled":
        raise ValueError(f"position: only the coupled rule takes one, got one under {rule!r}")
    device = device_of("target_logits", target_logits)
    if target_logits.ndim != 3 or target_logits.shape[1] == 0:
        raise ValueError(
            "target_logits: expected shape [B, K+1, V] with K >= 0, got "
            f"{list(target_logits.shape)}" + ", no positions" * (target_logits.ndim == 3)
        )
    B, positions, V = target_logits.shape
    if draft.tokens.shape[1] != positions - 1:
        K = draft.tokens.shape[1]
        raise ValueError(
            f"target_logits: expected shape [B, K+1={K + 1}, V], got {list(target_logits.shape)}; "
            f"it needs a row for each of the draft's K={K} tokens, and one more for the token "
            "behind them"
        )
    sizes: Sizes = {"B": B, "K": positions - 1, "K1": positions, "V": V}
    if draft.logits is not None:
        sizes["R"] = draft.logits.shape[0]
    sizes["Vd"] = columns("draft.draft_ids", draft.draft_ids, V, device)
    sizes["words"] = (B, positions, V) if rule == "coupled" else (B, positions)
    if rule == "greedy":
        temperature = 0.0
    if words is None and rule == "coupled":
        seed, position = random_key(B, temperature, seed=seed, position=position)
    elif words is None:
        seed, round = random_key(B, temperature, seed=seed, round=round)
    inputs = OP.check(
        sizes,
        device,
        target_logits,
        draft,
        rule,
        chosen,
        lenience,
        (temperature, top_k, top_p, min_p),
        (words, seed, round, position),
    )
    if draft.draft_ids is not None:
        check_increasing("draft.draft_ids", draft.draft_ids, V)
    verified = OP(inputs, sizes, device, backend, out, workspace)
    if check or record_check.OF_ALL_CALLS:
        record_check.refuse_records(inputs.draft, V, verified)
    return verified


def check_draft(draft: Draft) -> None:
    """Raise unless it is a draft of tokens [B, K] whose logits [R, Vd] come with their
    distribution."""
    if not isinstance(draft, Draft):
        raise TypeError(
            f"draft: expected a Draft, got {kind_of(draft)}; Draft.guesses(tokens) makes one of "
            "tokens alone"
        )
    tokens, logits = draft.tokens, draft.logits
    if type(tokens) not in PLAIN or tokens.ndim != 2:
        check_shape("draft.tokens", tokens, (None, None), ("B", "K"))
    if (logits is None) != (draft.distribution is None):
        raise ValueError(
            "draft: expected logits and distribution together, or neither; got one of them"
        )
    if logits is not None and (type(logits) not in PLAIN or logits.ndim != 2):
        check_shape("draft.logits", logits, (None, None), ("R", "Vd"))
