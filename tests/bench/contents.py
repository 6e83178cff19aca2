"""Contents as `specdiff bench` writes them, with made up figures."""

from __future__ import annotations

from typing import Any

MACHINE = {
    "processor": {"cpu family": "25", "model name": "Some CPU <x86> & Co"},
    "cores": 2,
    "torch_cpu_capability": "AVX2",
    "threads": 2,
    "python": "3.11.9",
    "packages": {"specdiff-kernels": "0.1.0", "torch": "2.9.0"},
}
FIGURES = (
    "tokens_per_second", "speedup", "tokens_per_forward", "alpha", "alpha_k", "acceptance",
    "ms_per_forward", "peak_mb", "ceiling", "check",
)  # fmt: skip


def content(name: str, cases: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "machine": MACHINE,
        "date": "2026-11-28",
        "name": name,
        "command": f"specdiff bench run --target smollm2-135m --sweep {name}",
        "target": "smollm2-135m",
        "stand_in": None,
        "repetitions": 3,
        "cases": cases,
        "published": [],
        **more,
    }


def spread(median: float, share: float = 0.1) -> dict[str, float]:
    return {"median": median, "p20": median * (1 - share), "p80": median * (1 + share)}


def case(method: str = "block-diffusion", speedup: float = 1.2, **more: Any) -> dict[str, Any]:
    """Of a drafter, or of plain decoding; `more` replaces fields."""
    plain = method == "plain"
    k, steps = more.pop("k", None if plain else 4), more.pop("steps", None)
    alpha, temperature = more.pop("alpha", None if plain else 0.25), more.get("temperature", 0.0)
    distribution = {
        "kind": "distribution",
        "passed": True,
        "texts": 16,
        "identical": None,
        "z": 0.7,
    }
    same = {"kind": "identical", "passed": True, "texts": 16, "identical": 16, "z": None}
    drafted = None if plain else k if isinstance(k, int) else 4
    return {
        "target": "smollm2-135m",
        "task": "chat",
        "method": method,
        "k": k,
        "steps": steps,
        "rule": None if plain else "token",
        "temperature": temperature,
        "batch": 1,
        "context": 39.2,
        "prompts": 16,
        "new_tokens": 32,
        "emitted": 512,
        "tokens_per_second": spread(28 * speedup, 0.04),
        "speedup": spread(1, 0) if plain else spread(speedup),
        "tokens_per_forward": 1.0 if plain else 1 + alpha * drafted,
        "alpha": alpha,
        "alpha_k": None if plain else alpha * drafted,
        "acceptance": None if plain else [alpha + 0.4 / (i + 2) for i in range(drafted)],
        "ms_per_forward": {
            "draft": 0.0 if plain else 3.0 * (steps if isinstance(steps, int) else 1),
            "target": 33.0,
            "verify": 0.0 if plain else 0.4,
            "commit": 0.1,
            "host": 0.3,
        },
        "peak_mb": 12.3,
        "ceiling": None,
        "check": distribution if temperature else same,
        "refused": None,
        **more,
    }


def refused(reason: str, **more: Any) -> dict[str, Any]:
    return {**case(**more), **dict.fromkeys(FIGURES), "refused": reason}


def methods() -> dict[str, Any]:
    """Two tasks, greedy and not; four ways to draft; one case refused, one that fails its check."""
    cases = []
    for task, easier in (("chat", 0.0), ("summary", 0.3)):
        for temperature in (0.0, 1.0):
            own = {"task": task, "temperature": temperature, "context": 39.2 + 1000 * easier}
            harder = easier - 0.15 * temperature
            cases += [
                case("plain", 1.0, **own),
                case("block-diffusion", 1.12 + harder, k=4, steps=1, **own),
                case("block-diffusion", 1.05 + harder, k="auto", steps="auto", **own,
                     ceiling={"speedup": 1.3 + harder}),
                case("parallel", 1.22 + harder, **own),
                case("prompt-lookup", 1.0 + 2 * harder, k=8, alpha=0.08, **own),
            ]  # fmt: skip
    cases.append(refused("the drafter has <no> weights & no vocabulary", method="sedd", steps=4))
    cases[-2]["check"] = {
        "kind": "distribution",
        "passed": False,
        "texts": 16,
        "identical": None,
        "z": 5.1,
    }
    return content("methods", cases)


def steps(name: str = "steps") -> dict[str, Any]:
    """T from 1 to 8; T = 16 refused; a level for a planner and for a drafter without steps."""
    cases = []
    for temperature in (0.0, 1.0):
        own = {"temperature": temperature}
        cases.append(case("plain", 1.0, **own))
        for T in (4, 1, 2, 8):  # lines go by T all the same
            cases += [
                case("block-diffusion", 1.3 + 0.1 * T - 0.02 * T * T - 0.2 * temperature, steps=T,
                     alpha=0.5 - 0.3 / T - 0.05 * temperature, **own),
                case("mdlm", 1.5 + 0.05 * T - 0.02 * T * T - 0.2 * temperature, steps=T,
                     alpha=0.7 - 0.3 / T - 0.05 * temperature, **own),
            ]  # fmt: skip
        cases.append(case("block-diffusion", 1.55 - 0.2 * temperature, steps="auto", **own))
    cases.append(case("prompt-lookup", 0.95))
    cases.append(refused("no memory", method="mdlm", steps=16))
    return content(name, cases)


def lengths() -> dict[str, Any]:
    cases = [case("plain", 1.0)]
    for K in (1, 2, 4, 8, 16):
        cases.append(case("parallel", 1 + 0.05 * K - 0.004 * K * K, k=K, alpha=0.5 / K**0.4))
        cases.append(case("prompt-lookup", 1 + 0.01 * K, k=K, alpha=0.2 / K**0.5))
    return content("lengths", cases)


def batch() -> dict[str, Any]:
    cases = []
    for B in (1, 2, 4, 8):
        for temperature in (0.0, 1.0):
            own = {"batch": B, "temperature": temperature}
            cases.append(case("plain", 1.0, **own, tokens_per_second=spread(30 * B**0.8, 0.05)))
            gain = 1.4 - 0.1 * B - 0.1 * temperature
            cases.append(case("parallel", gain, **own,
                              tokens_per_second=spread(30 * B**0.8 * gain, 0.05)))  # fmt: skip
    return content("batch", cases)


def context() -> dict[str, Any]:
    """Two tasks, so two rows of panels."""
    cases = []
    for task in ("chat", "summary"):
        for tokens in (39.2, 130.4, 509.9, 1020.0):
            cases.append(case("plain", 1.0, context=tokens, task=task))
            cases.append(case("prompt-lookup", 0.9 + tokens / 1000, context=tokens, task=task, k=8))
    return content("context", cases)


def table2() -> dict[str, Any]:
    """One place as published, one with another target, one refused."""
    published = [
        {"task": "cnn-dailymail", "target": "some-xl", "method": method, "k": k, "alpha": alpha,
         "speedup": speedup}
        for method, k, alpha, speedup in (("standard", 10, 0.9, 3.1), ("specdiff", 40, 0.89, 7.59))
    ] + [{"task": "openwebtext", "target": "other-neo", "method": "specdiff", "k": 30,
          "alpha": 0.87, "speedup": 6.43}]  # fmt: skip
    here = {"task": "cnn-dailymail", "target": "some-xl", "temperature": 1.0}
    cases = [
        case("plain", 1.0, **here),
        case("mdlm", 1.75, k=40, steps=10, alpha=0.31, role="specdiff", **here),
        refused("no checkpoint", method="autoregressive", k=10, role="standard", **here),
        case("block-diffusion", 1.17, k=4, steps=1, task="openwebtext", role="specdiff"),
    ]
    return content("table2", cases, published=published,
                   stand_in="smollm2-135m <stands> in for other-neo & its drafter")  # fmt: skip
