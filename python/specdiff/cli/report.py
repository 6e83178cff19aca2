"""Output of the command line: live text, then figures as a table or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..loop.decoder import Tokenizer
    from ..loop.stats import Stats, Step
    from ..planning.costs import Plan
    from ..planning.predictions import Need, Prediction

DRAFTED = "green"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoded from an incomplete character


@dataclass(frozen=True)
class DecodedRun:
    """Result of decoding one batch: the new tokens of each row, counts and times."""

    new_tokens: list[list[int]]
    stats: Stats


def median_run(runs: Sequence[DecodedRun]) -> DecodedRun:
    """The run of median speed. All figures shown then belong to one run."""
    return sorted(runs, key=lambda run: run.stats.tokens_per_second)[len(runs) // 2]


def figures(
    run: DecodedRun,
    text: str | list[str],
    baseline: DecodedRun | None = None,
    *,
    same: bool = False,
) -> dict[str, Any]:
    """Figures of a run, as printed by --json.

    Args:
        run: the run with the drafter.
        text: the text of each prompt, or of the only prompt.
        baseline: the run by plain decoding; None: not measured.
        same: whether both runs must give the same text. If False, `identical` is None.
    """
    stats = run.stats
    speed = stats.tokens_per_second
    base_speed = baseline.stats.tokens_per_second if baseline else None
    return {
        "text": text,
        "tokens": stats.tokens,
        "target_forwards": stats.target_forwards,
        "tokens_per_forward": stats.tokens_per_forward,
        "acceptance": stats.acceptance,
        "bias": stats.bias,
        "bias_per_token": stats.bias / stats.tokens if stats.tokens else 0.0,
        "stage_ms": stats.stage_ms,
        "tokens_per_second": speed,
        "baseline_tokens_per_second": base_speed,
        # without drafts both runs are alike, and their ratio is noise
        "speedup": speed / base_speed if base_speed and stats.drafted else None,
        "identical": run.new_tokens == baseline.new_tokens if baseline and same else None,
    }


def table(
    run: DecodedRun,
    baseline: DecodedRun | None,
    result: dict[str, Any],
    *,
    drafts: bool = True,
    budget: bool = False,
) -> Table:
    """The figures as a table, one column per run.

    Args:
        result: `figures` of the runs.
        drafts: whether drafts were asked for.
        budget: whether to show the total variation spent by a lenient rule.
    """
    runs = [run] if baseline is None else [run, baseline]
    title = {True: "text identical to plain decoding", False: "text DIFFERS from plain decoding"}
    shown = Table(title=title.get(result["identical"]), title_style="bold")
    shown.add_column("")
    shown.add_column("with drafts" if drafts else "plain", justify="right")
    if baseline is not None:
        shown.add_column("plain", justify="right")

    columns = [r.stats for r in runs]
    shown.add_row("tokens", *(f"{s.tokens}" for s in columns))
    shown.add_row("target forwards", *(f"{s.target_forwards}" for s in columns))
    shown.add_row("tokens per target forward", *(f"{s.tokens_per_forward:.2f}" for s in columns))
    if run.stats.acceptance:
        shares = " ".join(f"{100 * share:.0f}" for share in run.stats.acceptance)
        shown.add_row("conditional acceptance, %", shares)
    if budget:
        shown.add_row("total variation spent", f"{result['bias']:.4f}")
        shown.add_row("... per token", f"{result['bias_per_token']:.4f}")
        if result["bias"] > 0:
            shown.caption = "the text no longer follows the target's distribution exactly"
    for stage in run.stats.stage_ms:
        shown.add_row(f"{stage} ms", *(f"{s.stage_ms[stage]:.1f}" for s in columns))
    shown.add_row("tokens/s", *(f"{s.tokens_per_second:.1f}" for s in columns))
    if result["speedup"] is not None:
        shown.add_row("speed-up", f"{result['speedup']:.2f}x", "1.00x")
    elif baseline is not None:
        shown.add_row("speed-up", "no draft made", "1.00x")
    if drafts and not run.stats.drafted:
        shown.caption = "no draft was made: none was expected to pay, or the drafter had none"
    return shown


def plans_table(rows: Sequence[Prediction], measured: dict[Plan, float]) -> Table:
    """Table of predicted and measured speed-ups of plans, best first, with a bar for each."""
    shown = Table(title="speed-up over plain decoding, costs in plain rounds", title_style="bold")
    for heading in ("K", "T", "draft", "rest", "tokens", "predicted", "measured"):
        shown.add_column(heading, justify="right")
    shown.add_column("", no_wrap=True)
    longest = max([row.speed_up for row in rows] + list(measured.values()))
    for row in rows:
        k, steps = row.plan
        seen = measured.get(row.plan)
        shown.add_row(
            str(k) if k else "plain",
            str(steps or "-"),
            f"{row.draft:.2f}",
            f"{row.verify:.2f}",
            f"{row.tokens:.2f}",
            f"{row.speed_up:.2f}x",
            "" if seen is None else f"{seen:.2f}x",
            bar(row.speed_up if seen is None else seen, longest),
            style="bold" if k == 0 else None,
        )
    return shown


def bar(value: float, longest: float, width: int = 14) -> str:
    eighths = round(8 * width * value / longest)
    return "\N{FULL BLOCK}" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def needs_table(wanted: Sequence[Need]) -> Table:
    """Table of the acceptance, or the draft cost, needed for each speed-up."""
    shown = Table(title="needed for a speed-up", title_style="bold")
    shown.add_column("speed-up", justify="right")
    shown.add_column("acceptance, at the present draft cost")
    shown.add_column("draft cost, at the present acceptance")
    for need in wanted:
        alpha, price = need.acceptance, need.draft_cost
        shown.add_row(
            f"{need.wanted:g}x",
            "unreachable even at 100 %"
            if alpha is None
            else f"{100 * alpha[0]:.0f} %, {named(alpha[1])}",
            "unreachable even if free"
            if price is None
            else f"{price[0]:.2f} plain rounds, {named(price[1])}",
        )
    return shown


def named(plan: Plan) -> str:
    return f"K = {plan.k}" + (f", T = {plan.steps}" if plan.steps else "")


class TextStream:
    """Streaming detokenizer of one row. It returns characters only when they are complete.

    It decodes a short window of tokens, because a token's text depends on the tokens before it.

    Example:
        >>> stream = TextStream(tokenizer)
        >>> "".join(map(stream.push, tokens)) + stream.flush() == tokenizer.decode(tokens)
        True
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start = self.read = 0  # the window's first token; tokens returned as text

    def push(self, token: int) -> str:
        self.tokens.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """The rest of the text, after the last token."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        known = self._decode(self.tokens[self.start : self.read])
        text = self._decode(self.tokens[self.start :])
        if len(text) <= len(known) or (text.endswith(UNFINISHED) and not final):
            return ""
        self.start, self.read = self.read, len(self.tokens)
        return text[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class LiveText:
    """Prints steps to a console: a single row live, several rows each when finished.

    Accepted draft tokens have another colour than the target's tokens.
    """

    def __init__(self, console: Console, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
        self.console = console
        self.prompts = prompts
        self.streams = [TextStream(tokenizer) for _ in prompts]
        self.pieces: list[list[tuple[str, str | None]]] = [[] for _ in prompts]
        self.done = [False] * len(prompts)

    def __call__(self, step: Step) -> None:
        for b, tokens in enumerate(step.tokens):
            for i, token in enumerate(tokens):
                style = DRAFTED if i < step.accepted[b] else None
                self.pieces[b].append((self.streams[b].push(token), style))
            over = step.finished[b] and not self.done[b]
            if over:
                self.done[b] = True
                self.pieces[b].append((self.streams[b].flush() + "\n", None))
            if over and len(self.prompts) > 1:
                self.console.rule(Text(f"{b + 1}: {self.prompts[b]}"), align="left")
            if over or len(self.prompts) == 1:
                for piece, style in self.pieces[b]:
                    self.console.out(piece, style=style, end="", highlight=False)
                self.pieces[b].clear()

    def legend(self) -> None:
        """Explain the colours, if the console has any."""
        if self.console.color_system and not self.console.no_color:
            self.console.print(
                f"[{DRAFTED}]drafted and accepted[/], the rest by the target", highlight=False
            )
