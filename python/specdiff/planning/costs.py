"""Costs: what rounds of a pair of models cost on a machine, measured once and kept in files."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdiff_kernels import Draft

from ..download import home_folder
from ..files import stamped, write_atomically
from ..loop.chooser import Wanted
from ..loop.decoder import Decoder
from ..loop.drafter import Drafter, Draws, News
from ..loop.sampling import Sampling
from ..loop.session import Session

KS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # lengths of drafts that are tried
STEPS = (1, 2, 4, 8, 16)
ROUNDS = 240  # of all plans together, while costs are measured
TURNS = 8  # least rounds of each plan
TOKENS = 64  # of each text that is decoded for the measurement
PATIENCE = 30.0  # seconds after which no plan is measured again
ALIKE = 32.0  # examined tokens under one T that weigh as much as those under all T
NEAR = 8.0  # examined tokens of a position that weigh as much as the position before it
PRIOR = 24.0  # most examined tokens that the prior counts for


class Plan(NamedTuple):
    """One way to spend a round."""

    k: int  # tokens drafted; 0: none
    steps: int  # T; 0: the drafter takes none


PLAIN = Plan(0, 0)


@dataclass(frozen=True)
class Costs:
    """Costs of rounds of a pair of models on a machine, and the acceptance seen meanwhile.

    Attributes:
        batch: rows decoded together.
        plans: the measured plans: (0, 0), then pairs of K and T.
        draft: seconds that each plan's drafting takes.
        verify: seconds of the rest of its round, with all K tokens drafted. They depend on K only.
        examined: for each T, how often position 1, 2, ... was examined, which means that all
            positions before it were accepted.
        accepted: for each T, how often its token was accepted. A missing token was not accepted.
        share: for each T, the share of wanted tokens that were drafted.
        first: extra seconds of a text's first draft, in which the drafter reads the prompt. About 0
            if it reads prompts as they are admitted.
    """

    batch: int
    plans: list[Plan]
    draft: list[float]
    verify: list[float]
    examined: dict[int, list[int]] = field(default_factory=dict)
    accepted: dict[int, list[int]] = field(default_factory=dict)
    share: dict[int, float] = field(default_factory=dict)
    first: float = 0.0

    def save(self, path: Path) -> None:
        """Write a JSON file, the whole file or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Costs:
        """Read what `save` wrote.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            fields = json.loads(path.read_text())
            fields["plans"] = [Plan(*plan) for plan in fields["plans"]]
            for name in ("examined", "accepted", "share"):
                fields[name] = {int(steps): value for steps, value in fields[name].items()}
            costs = cls(**fields)
            costs.check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no costs ({error}): remove it") from error
        return costs

    def check(self) -> None:
        """Raise ValueError unless every plan, and plain decoding among them, has finite costs."""
        if PLAIN not in self.plans:
            raise ValueError("plans: expected plain decoding, (0, 0), among them")
        for name in ("draft", "verify"):
            costs = getattr(self, name)
            if len(costs) != len(self.plans) or not all(map(math.isfinite, costs)):
                raise ValueError(f"{name}: expected {len(self.plans)} finite numbers, got {costs}")

    def rest(self, plan: Plan, share: float) -> float:
        """Seconds of a plan's round without its drafting, if that share of K is drafted."""
        plain = self.verify[self.plans.index(PLAIN)]
        return plain + share * (self.verify[self.plans.index(plan)] - plain)

    def acceptances(self, steps: int, most: int) -> list[tuple[float, float]]:
        """Prior of positions 1 .. most under T steps: its mean, and the tokens it counts for.

        The acceptance under one T is shrunk towards that under all T. Otherwise, among many T with
        few tokens each, the best would be the luckiest. A position that was hardly examined is
        taken to be like the one before it.
        """
        prior, mean, weight = [], 0.5, 2.0
        for i in range(most):
            n, a = (
                {T: seen[i] if i < len(seen) else 0 for T, seen in counts.items()}
                for counts in (self.examined, self.accepted)
            )
            mean = (sum(a.values()) + weight * mean) / (sum(n.values()) + weight)
            own = (a.get(steps, 0) + ALIKE * mean) / (n.get(steps, 0) + ALIKE)
            prior.append((own, min(sum(n.values()) + 2.0, PRIOR)))
            weight = NEAR
        return prior


def count(
    wanted: Sequence[int],
    accepted: Sequence[int],
    examined_at: list[Any],
    accepted_at: list[Any],
) -> None:
    """Add a round, row by row: which positions were examined, and accepted."""
    for most, passed in zip(wanted, accepted, strict=True):
        for i in range(min(passed + 1, most)):
            examined_at[i] += 1
            accepted_at[i] += i < passed


class Probe:
    """Asks for one plan after another, as a Planner would."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.plan = PLAIN

    def start(self, batch: int) -> None:
        self.batch = batch

    def forget(self, rows: Sequence[int]) -> None:
        pass

    def want(self, most: int) -> Wanted:
        return Wanted([self.plan.k] * self.batch, self.plan.k, self.plan.steps or None)

    def update(
        self, wanted: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]
    ) -> None:
        self.wanted, self.drafted, self.accepted = wanted, drafted, accepted

    def withhold(self, draft: Draft) -> Draft:
        return draft


class Guesses(Drafter):
    """Drafts as many tokens as it may, whatever they are."""

    block = 1

    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        return Draft.guesses(lengths.new_zeros(len(lengths), k), lengths)


def measure(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    batch: int = 1,
    sampling: Sampling | None = None,
    ks: Sequence[int] | None = None,
    steps: Sequence[int] = STEPS,
) -> Costs:
    """Decode with one plan after another, each several times, and note what rounds cost.

    It takes some seconds with a small model; after half a minute no plan is measured again. Of the
    times of a plan the median counts, and no more than that of a longer draft or of more steps.

    Args:
        decoder: with a drafter; its k does not matter.
        prompts: token ids of texts like those to come, which are begun one after another; None: the
            target's first token alone.
        batch: rows, as many as the planner will see.
        sampling: None is temperature 1.
        ks: the K to measure, as far as the drafter can; None: some up to 8 or the drafter's block.
        steps: the T to measure up to each K, if the drafter takes steps.

    Raises:
        ValueError: no drafter, or no K that it can draft in so many steps.

    Example:
        >>> costs = measure(Decoder(Target(model), PromptLookup()))
        >>> costs.save(Path("costs.json"))
    """

    drafter = decoder.drafter
    if drafter is None:
        raise ValueError("decoder: expected one with a drafter, got plain decoding")
    most = min(drafter.most or KS[-1], decoder.target.context_limit // 4)
    if ks is None:
        ks = [k for k in KS if k <= max(8, drafter.block)]
    taken = (0,) if drafter.steps is None else steps
    plans = [Plan(k, T) for k in ks for T in taken if T <= k <= most]
    if not plans:
        raise ValueError(
            f"nothing to measure: this drafter drafts 1 to {most} tokens, in no more steps; got "
            f"ks={list(ks)}, steps={list(steps)}"
        )
    before = drafter.steps
    probe = Probe(max(plan.k for plan in plans))
    own = decoder.replace(k=probe)
    if prompts is not None and not prompts:
        raise ValueError("prompts must hold at least one prompt, got none; None: the first token")
    if prompts is None:
        bos = decoder.target.model.config.bos_token_id
        prompts = [[min(bos or 0, decoder.target.vocab_size - 1)]]
    prompts = [prompt[: decoder.target.context_limit // 2] for prompt in prompts]
    sampling = sampling or Sampling(1.0)
    try:
        costs = probed(own, probe, [PLAIN, *plans], prompts, batch, sampling)
    finally:
        if before is not None:
            drafter.steps = before
    if not all(map(math.isfinite, costs.verify)):
        # it hardly ever drafts as much as it may: what rounds cost then is seen with guesses
        guesses = Decoder(decoder.target, Guesses(), probe, backend=decoder.settings.backend)
        widths = [PLAIN, *(Plan(k, 0) for k in dict.fromkeys(plan.k for plan in plans))]
        seen = probed(guesses, probe, widths, prompts, batch, sampling)
        by_k = dict(zip((plan.k for plan in widths), seen.verify, strict=True))
        costs = replace(costs, verify=[by_k[plan.k] for plan in costs.plans])
    return costs


def probed(
    decoder: Decoder,
    probe: Probe,
    plans: list[Plan],
    prompts: Sequence[Sequence[int]],
    batch: int,
    sampling: Sampling,
) -> Costs:
    """Costs of plans, in rounds that take turns, and what was accepted under each T."""
    longest = max(map(len, prompts))
    # the first round brings a token, and a draft is of one less than may still come
    room = min(decoder.target.context_limit - longest, max(TOKENS, 2 * probe.most + 2))
    session = decoder.open(batch, longest + room, sampling=sampling, stop_tokens=())
    draft: dict[Plan, list[float]] = {plan: [] for plan in plans}
    rest: dict[int, list[float]] = {plan.k: [] for plan in plans}
    asked, drafted = (dict.fromkeys((plan.steps for plan in plans[1:]), 0) for _ in range(2))
    examined = {plan.steps: [0] * probe.most for plan in plans[1:]}
    accepted = {plan.steps: [0] * probe.most for plan in plans[1:]}
    texts, first, begun = itertools.cycle(prompts), plans[-1], [math.inf]
    start = time.monotonic()
    for turn in range(1 + max(TURNS, ROUNDS // len(plans))):  # the first warms up
        if turn > 1 and time.monotonic() - start > PATIENCE:
            break
        for plan in plans:
            if session.left() <= probe.most:
                for place in range(batch):
                    session.abort(place)
                    session.admit([list(next(texts))], first=place, max_new_tokens=room, seed=turn)
                probe.plan = first
                begun.append(timed(session)[0])  # in which the drafter reads the prompts
            probe.plan = plan
            seconds = timed(session)
            if turn == 0:
                continue
            draft[plan].append(seconds[0])
            if max(probe.drafted) == plan.k:
                rest[plan.k].append(seconds[1])
            if plan != PLAIN:
                count(probe.wanted, probe.accepted, examined[plan.steps], accepted[plan.steps])
                asked[plan.steps] += sum(probe.wanted)
                drafted[plan.steps] += sum(probe.drafted)
    drafting = {
        p: min(median(draft[q]) for q in plans if q.k >= p.k and q.steps >= p.steps) for p in plans
    }
    round = {k: median(seconds) if seconds else math.inf for k, seconds in rest.items()}
    return Costs(
        batch,
        plans,
        [drafting[p] for p in plans],
        [min(round[k] for k in round if k >= p.k) for p in plans],
        examined,
        accepted,
        {steps: drafted[steps] / max(1, asked[steps]) for steps in asked},
        max(0.0, min(begun) - drafting[first]),
    )


def timed(session: Session) -> tuple[float, float]:
    """Seconds of a round's draft, and of the rest of it."""
    drafted = session.stats.seconds["draft"]
    start = time.perf_counter()
    session.step()
    whole = time.perf_counter() - start
    drafted = session.stats.seconds["draft"] - drafted
    return drafted, whole - drafted


PROMPTS = (  # that a pair is measured on
    "Explain why leaves change their colour in autumn.",
    "Write a short story about a lighthouse keeper and a storm.",
    "List five things to check before buying a used bicycle.",
    "How does a refrigerator work?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What are the main differences between cats and dogs as pets?",
)


def kept_costs(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    names: dict[str, str],
    *,
    batch: int = 1,
    sampling: Sampling | None = None,
    ks: Sequence[int] | None = None,
    steps: Sequence[int] = STEPS,
    again: bool = False,
) -> Costs:
    """`measure`, once for each pair, machine and way to decode: then from a file.

    Plans follow from the costs, and under sampling the text from the plans, so that costs that stay
    let the same seed give the same text.

    Args:
        decoder, prompts, batch, sampling, ks, steps: of `measure`.
        names: of `costs_file`.
        again: measure even so.
    """
    path = costs_file(decoder, names, batch=batch, sampling=sampling, ks=ks, steps=steps)
    if path.exists() and not again:
        try:
            return Costs.load(path)
        except ValueError as error:
            warnings.warn(f"{error}; measured anew", stacklevel=2)
    costs = measure(decoder, prompts, batch=batch, sampling=sampling, ks=ks, steps=steps)
    try:
        costs.save(path)
    except OSError as error:
        warnings.warn(f"costs are not kept, {path.parent}: {error.strerror}", stacklevel=2)
    return costs


def costs_file(
    decoder: Decoder,
    names: dict[str, str],
    *,
    batch: int = 1,
    sampling: Sampling | None = None,
    ks: Sequence[int] | None = None,
    steps: Sequence[int] = STEPS,
) -> Path:
    """Where the costs of a pair are kept, whether they have been measured or not.

    Args:
        decoder, batch, sampling, ks, steps: of `measure`.
        names: of the models, folders or known ones, and whatever else sets the costs apart.
    """
    key: dict[str, Any] = {
        "format": 2,
        **{name: stamped(value) for name, value in names.items()},
        "rule": [decoder.settings.rule, str(decoder.settings.lenience)],
        "record": decoder.settings.record,
        "batch": batch,
        "sampling": None if sampling is None else sampling.parameters,
        "ks": None if ks is None else list(ks),
        "steps": list(steps),
        "device": str(decoder.target.device),
        "dtype": str(decoder.target.dtype),
        "threads": torch.get_num_threads(),
        "machine": [platform.node(), platform.machine()],
        "settings": {
            k: v
            for k, v in os.environ.items()
            if k.startswith("SPECDIFF_") and k != "SPECDIFF_HOME"
        },
        "versions": [version("specdiff-kernels"), torch.__version__],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return home_folder() / "plans" / f"{digest[:32]}.json"
