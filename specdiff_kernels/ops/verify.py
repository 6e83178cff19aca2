"""`verify`: accept a prefix of a draft and emit one token more, exactly by the target's
distribution; or, if that is asked for, with a bias that is returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..lenience import KINDS, check_lenience
from ..records import RULES, Record, choose_record
from ..types import Draft, Lenience, RowDistribution, Verified
from .checks import (
    INT64,
    check_distribution,
    check_increasing,
    check_logits,
    check_random,
    check_tensor,
    check_workspace,
    contiguous,
    device_of,
    per_row,
    plain_number,
)
from .registry import Outputs, define


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
    seed: Tensor | None = None,
    round: Tensor | None = None,
    position: Tensor | None = None,
    words: Tensor | None = None,
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
        seed, round: i64 [B]; a sequence's own seed and its count of verification rounds.
        position: i64 [B], absolute position of the first drafted token; in place of `round` under
            the coupled rule.
        words: i64 [B, K + 1] random words in place of seed and round: one for each acceptance,
            the last for the token that ends the round. Coupled: [B, K + 1, V], one for each token.
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
        >>> draft = Draft(torch.tensor([[1]]), torch.zeros(1, 1).int(), torch.tensor([[-1]]))
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> verify(target, draft, 0.0, seed=zero, round=zero).emitted.tolist()
        [[1, 0]]
    """
    device = device_of("target_logits", target_logits)
    target_logits = check_logits("target_logits", target_logits, (None, None, None), device)
    B, positions, V = target_logits.shape
    if positions == 0:
        raise ValueError("target_logits: expected [B, K + 1, V] with K >= 0, got no positions")
    draft = check_draft(draft, B, positions - 1, V, device)
    chosen = choose_record(draft, rule, record)
    check_lenience(rule, lenience)
    if position is not None and rule != "coupled":
        raise ValueError(f"position: only the coupled rule takes one, got one under {rule!r}")
    if rule == "coupled":
        check_random(B, device, (B, positions, V), words, seed=seed, position=position)
    else:
        check_random(B, device, (B, positions), words, seed=seed, round=round)
    args = (
        target_logits,
        draft.tokens,
        draft.tau,
        draft.rows,
        draft.logits,
        *(draft.distribution or (None,) * len(RowDistribution._fields)),
        draft.draft_ids,
        draft.lengths,
        draft.final_step or 0,
        RULES.index(rule),
        int(chosen),
        *((-1, None) if lenience is None else as_inputs(lenience, B, device)),
        per_row("temperature", 0.0 if rule == "greedy" else temperature, B, device),
        per_row("top_k", top_k, B, device),
        per_row("top_p", top_p, B, device),
        per_row("min_p", min_p, B, device),
        *contiguous(seed, round, position, words),
        backend,
    )
    check_workspace(workspace, out, device)
    if out is not None:
        OP.into(*args, workspace, *out)
        return out
    return Verified(*OP.functional(*args))


def as_inputs(lenience: Lenience, B: int, device: torch.device) -> tuple[int, Tensor]:
    """The number of its kind, and its amounts f64 [B]."""
    kind, amount = list(KINDS).index(lenience.kind), lenience.amount
    if not isinstance(amount, Tensor):
        amount = plain_number(amount, float)
        return kind, torch.full((B,), amount, dtype=torch.float64, device=device)
    check_tensor("lenience.amount", amount, (B,), (torch.float64,), device)
    return kind, amount.contiguous()


def check_draft(draft: Draft, B: int, K: int, V: int | None, device: torch.device) -> Draft:
    """The draft with contiguous fields, or an error that names the field at fault.

    V: the target's vocabulary; None: not known here.
    """
    if not isinstance(draft, Draft):
        raise TypeError(f"draft: expected a Draft, got {type(draft).__name__}")
    check_tensor("draft.tokens", draft.tokens, (B, K), INT64, device)
    check_tensor("draft.tau", draft.tau, (B, K), (torch.int32,), device)
    check_tensor("draft.rows", draft.rows, (B, K), INT64, device)
    if draft.lengths is not None:
        check_tensor("draft.lengths", draft.lengths, (B,), INT64, device)
    logits, distribution, ids = draft.logits, draft.distribution, draft.draft_ids
    if ids is not None:
        check_tensor("draft.draft_ids", ids, (None,), INT64, device)
    if (logits is None) != (distribution is None):
        raise ValueError(
            "draft: expected logits and distribution together, or neither; got one of them"
        )
    if logits is not None and distribution is not None:
        Vd = V if ids is None else ids.shape[0]
        logits = check_logits("draft.logits", logits, (None, Vd), device)
        distribution = check_distribution(
            "draft.distribution", distribution, logits.shape[0], device
        )
    if ids is not None:
        check_increasing("draft.draft_ids", ids, V or 2**31)
    tokens, tau, rows, ids, lengths = contiguous(
        draft.tokens, draft.tau, draft.rows, ids, draft.lengths
    )
    return draft._replace(
        tokens=tokens,
        tau=tau,
        rows=rows,
        logits=logits,
        distribution=distribution,
        draft_ids=ids,
        lengths=lengths,
    )


def _outputs(target_logits: Tensor, *_: Any) -> Outputs:
    B, positions = target_logits.shape[:2]
    return [
        ([B], torch.int64),
        ([B, positions], torch.int64),
        ([B], torch.int32),
        ([B], torch.float64),
    ]


def _call(function: Callable[..., None], target_logits: Tensor, *args: Any, out: Any) -> None:
    logits, distribution = args[3], args[4:9]
    distributions = None if logits is None else RowDistribution(*distribution)
    draft = Draft(
        args[0], args[1], args[2], logits, distributions, args[9], args[10], final_step=args[11]
    )
    rule, record = RULES[args[12]], Record(args[13])
    lenience = None if args[15] is None else Lenience(list(KINDS)[args[14]], args[15])
    function(target_logits, draft, rule, record, lenience, *args[16:], out=Verified(*out))


OP = define(
    "verify",
    "Tensor target_logits, Tensor tokens, Tensor tau, Tensor rows, Tensor? draft_logits, "
    "Tensor? max, Tensor? scale, Tensor? threshold, Tensor? total, Tensor? distribution_status, "
    "Tensor? draft_ids, Tensor? lengths, SymInt final_step, int rule, int record, "
    "int lenience, Tensor? amount, "
    "Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
    "Tensor? seed, Tensor? round, Tensor? position, Tensor? words",
    Verified._fields,
    _outputs,
    _call,
    workspace=True,
)
