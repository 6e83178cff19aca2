"""Theory of speculative decoding: expected rejections, tokens per round, speed-up and bias.

The formulas are those of Yin et al. (arXiv 2411.00841) and Leviathan et al. (2211.17192), computed
in float64 and each tested against enumeration. docs/theory.md states them.
"""

from .chains import (
    Pair,
    RunCounts,
    batch_rejections,
    conditional_acceptances,
    expected_rejections,
    residual,
    run_counts,
    total_variation,
    tv_by_position,
)
from .estimate import RejectionEstimate, examined, rejected_given_token
from .lenient import (
    LENIENT_RULES,
    LenientRun,
    Outcome,
    additive,
    ensemble,
    ensemble_weight,
    lenience,
    lenient_run,
    outcome,
    parameter_for,
)
from .speed import (
    BestPlan,
    best_length,
    best_plan,
    needed_acceptance,
    needed_draft_cost,
    speed_up,
    tokens_per_round,
    tokens_per_round_at,
)

__all__ = [
    "LENIENT_RULES",
    "BestPlan",
    "LenientRun",
    "Outcome",
    "Pair",
    "RejectionEstimate",
    "RunCounts",
    "additive",
    "batch_rejections",
    "best_length",
    "best_plan",
    "conditional_acceptances",
    "ensemble",
    "ensemble_weight",
    "examined",
    "expected_rejections",
    "lenience",
    "lenient_run",
    "needed_acceptance",
    "needed_draft_cost",
    "outcome",
    "parameter_for",
    "rejected_given_token",
    "residual",
    "run_counts",
    "speed_up",
    "tokens_per_round",
    "tokens_per_round_at",
    "total_variation",
    "tv_by_position",
]
