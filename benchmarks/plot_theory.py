"""Draws the figures of docs/theory.md that need only specdiff.theory: nothing is timed.

    pip install matplotlib
    python benchmarks/plot_theory.py            # writes docs/figures/*.png and *.svg

The same matplotlib version gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from specdiff import theory
from specdiff.bench.figures import STYLE, save
from specdiff.theory import LENIENT_RULES, Pair

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
LENGTHS = {1: "#56b4e9", 3: "#009e73", 7: "#e69f00", 15: "#d55e00"}  # K: colour
MARKS = {"lenience": ("#0072b2", "o"), "additive": ("#e69f00", "s"), "ensemble": ("#009e73", "^")}
STRICTNESS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)  # at the marked points
NAMES = {"lenience": "min(1, p / (l q))", "additive": "min(1, (p + ε) / q)",
         "ensemble": "min(1, 1 - w + w p / q)"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the figures")
    draw(parser.parse_args().out)


def draw(folder: Path, chains: int = 16) -> None:
    """Write both figures to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        save(tokens_per_round(chains), folder / "tokens_per_round")
        save(lenient_rules(), folder / "lenient_rules")


# --- tokens per round -----------------------------------------------------------------------------


def tokens_per_round(chains: int) -> Figure:
    """Tokens per round. Curves: constant acceptance 1 - TV. Marks: random Markov chains, exact."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    tv = np.linspace(0, 1, 201)
    families = {"o": (even, "Markov chains"), "^": (patchy, "Markov chains with hard stretches")}
    for K, colour in reversed(LENGTHS.items()):
        curve = [theory.tokens_per_round_at(1 - x, K) for x in tv]
        axes.plot(tv, curve, color=colour, label=f"K = {K}")
        for mark, (family, _) in families.items():
            pairs = [family(seed, (seed + 0.5) / chains) for seed in range(chains)]
            x, y = zip(*(long_run(pair, K) for pair in pairs), strict=True)
            axes.plot(x, y, mark, color=colour, markersize=6, markeredgecolor="white", zorder=3,
                      clip_on=False)  # fmt: skip
    axes.plot([], [], color="grey", label="the same TV at each token")
    for mark, (_, label) in families.items():
        axes.plot([], [], mark, color="grey", markersize=6, label=label)
    axes.set(
        xlim=(0, 1), ylim=(1, 17), yscale="log",
        xlabel="mean total variation of target and drafter, a token",
        ylabel="tokens per target forward",
    )  # fmt: skip
    ticks = [1, 2, 4, 8, 16]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="upper right")
    return figure


def even(seed: int, share: float, V: int = 6) -> Pair:
    """q = (1 - s) p + s r after each token, with s around `share` for each token and r random."""
    noise = torch.Generator().manual_seed(seed)
    p, r = torch.randn(2, V + 1, V, generator=noise).double().mul(2.5).softmax(-1)
    s = (share + 0.35 * torch.randn(V + 1, 1, generator=noise).double()).clamp(0, 1)
    q = (1 - s) * p + s * r
    return Pair.markov(p[0], p[1:], q[0], q[1:])


def patchy(seed: int, share: float) -> Pair:
    """Two groups of four tokens with rare changes between them. The drafter is right in one group.

    share: share of the text in the other group.
    """
    noise = torch.Generator().manual_seed(seed)
    easy, hard, guess = torch.randn(3, 4, generator=noise).double().mul(1.5).softmax(-1)
    leave = 0.06

    def row(first: float, distribution: Tensor) -> Tensor:
        return torch.cat((first * easy, (1 - first) * distribution))

    in_easy, in_hard = 1 - leave * share, leave * (1 - share)
    p = torch.stack([row(in_easy, hard)] * 5 + [row(in_hard, hard)] * 4)
    q = torch.stack([row(in_easy, hard)] * 5 + [row(in_hard, guess)] * 4)
    return Pair.markov(p[0], p[1:], q[0], q[1:])


def long_run(pair: Pair, K: int, N: int = 150) -> tuple[float, float]:
    """Mean TV and tokens per round over tokens N + 1 .. 2 N."""
    tv = float(theory.tv_by_position(pair, 2 * N)[N:].mean())
    rounds = [theory.run_counts(pair, n, K).rounds for n in (N, 2 * N)]
    return tv, N / (rounds[1] - rounds[0])


# --- lenient rules --------------------------------------------------------------------------------


def lenient_rules() -> Figure:
    """Left: bias against rejections for a pair of distributions. Right: bias against strictness."""
    p, q = distributions()
    tv = float(theory.total_variation(p, q))
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    line, parameters = figure.subplots(1, 2)
    line.fill_between([0, tv], [tv, 0], color="grey", alpha=0.15, linewidth=0)
    line.text(0.3 * tv, 0.25 * tv, "no rule gets here", ha="center", color="#555555")
    line.plot([0, tv], [tv, 0], color="black", linewidth=1, label="bias + P(rejection) = TV")
    for name, (colour, mark) in MARKS.items():
        curve = [theory.outcome(p, q, accepts(name, p, q, s)) for s in np.linspace(0, 1, 101)]
        parameters.plot(np.linspace(0, 1, 101), [float(o.bias) for o in curve], color=colour,
                        label=f"{name}: {NAMES[name]}")  # fmt: skip
        marked = [theory.outcome(p, q, accepts(name, p, q, s)) for s in STRICTNESS]
        bias = [float(o.bias) for o in marked]
        line.plot([float(o.rejection) for o in marked], bias, mark, color=colour, markersize=8,
                  markerfacecolor="none", markeredgewidth=1.6, label=name,
                  clip_on=False)  # fmt: skip
        parameters.plot(STRICTNESS, bias, mark, color=colour, markersize=7, clip_on=False)
    b = [accepts("lenience", p, q, s) for s in STRICTNESS]
    rejection = [1 - float((x * q).sum()) for x in b]
    unmended = [float(theory.total_variation(p, x * q + r * p))
                for x, r in zip(b, rejection, strict=True)]  # fmt: skip
    line.plot(rejection, unmended, "x", color="#d55e00", clip_on=False,
              label="lenience, then a draw from p")  # fmt: skip
    line.set(xlim=(0, 1.3 * tv), ylim=(0, 1.55 * tv), xlabel="P(rejection), a token",
             ylabel="bias: TV(emitted, target), a token")  # fmt: skip
    parameters.set(xlim=(0, 1), ylim=(0, 1.55 * tv), ylabel="bias, a token",
                   xlabel="strictness: l, 1 - ε or w   (1 is the exact rule)")  # fmt: skip
    line.legend(loc="upper right")
    parameters.legend(loc="upper right")
    return figure


def accepts(name: str, p: Tensor, q: Tensor, strictness: float) -> Tensor:
    rule, exact, most = LENIENT_RULES[name]
    return rule(p, q, most + strictness * (exact - most))


def distributions(V: int = 10) -> tuple[Tensor, Tensor]:
    """A distribution over V tokens and a noisy copy."""
    noise = torch.Generator().manual_seed(4)
    logits, off = 1.5 * torch.randn(2, V, generator=noise).double()
    return logits.softmax(-1), (logits + off).softmax(-1)


if __name__ == "__main__":
    main()
