"""Reads contents, the JSON files of `specdiff bench`, for figures, report and terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Content = dict[str, Any]
Case = dict[str, Any]
PLAIN = "plain"
BESIDE = ("rule", "batch", "context", "prompts", "new_tokens")  # settings besides K and T
FIELDS = {"command", "machine", "date", "name", "target", "stand_in", "repetitions", "cases"}
SETTINGS = {"k": "K", "steps": "T", "rule": "rule", "batch": "batch", "context": "context"}


def load(file: Path) -> Any:
    """What a JSON file holds. Raises ValueError if it is no JSON in UTF-8."""
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON in UTF-8: {error}; move or remove it") from error


def is_content(found: Any) -> bool:
    """Whether this is what a finished `specdiff bench` writes."""
    return (
        isinstance(found, dict)
        and found.keys() >= FIELDS
        and str(found["command"]).startswith("specdiff bench")
        and isinstance(found["cases"], list)
    )


def measured(content: Content) -> list[Case]:
    """The cases that were not refused."""
    return [case for case in content["cases"] if case["refused"] is None]


def groups(cases: Iterable[Case], *names: str) -> dict[tuple[Any, ...], list[Case]]:
    """Group cases by their values of `names`, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        found.setdefault(tuple(case[name] for name in names), []).append(case)
    return found


def values(cases: Iterable[Case], name: str) -> list[Any]:
    """The distinct values of `name` in these cases, in order, without None."""
    return list(dict.fromkeys(case[name] for case in cases if case[name] is not None))


def set_apart(cases: Iterable[Case], names: Sequence[str]) -> list[str]:
    """The other settings in which cases with the same `names` differ."""
    return [
        setting
        for setting in SETTINGS
        if setting not in names
        and any(len({case[setting] for case in own}) > 1 for own in groups(cases, *names).values())
    ]


def sections(content: Content) -> list[list[Case]]:
    """The cases of each target, task and temperature."""
    return list(groups(content["cases"], "target", "task", "temperature").values())


def inner(content: Content) -> list[str]:
    """The settings other than K and T that vary within a section."""
    return [name for name in BESIDE if any(len(values(own, name)) > 1 for own in sections(content))]


def heading(content: Content, own: Sequence[Case]) -> str:
    """Heading of a section: task, temperature, and settings that distinguish it from others."""
    every = content["cases"]
    parts = [own[0]["target"]] if len(values(every, "target")) > 1 else []
    parts += [own[0]["task"], manner(own[0]["temperature"])]
    for name in BESIDE:
        if name not in inner(content) and len(values(every, name)) > 1 and values(own, name):
            parts.append(f"{worded(name)} = {plain_number(values(own, name)[0])}")
    return ", ".join(parts)


def worded(name: str) -> str:
    return SETTINGS.get(name, name.replace("_", " "))


def manner(temperature: float) -> str:
    return f"temperature {temperature:g}" if temperature else "greedy"


def said(case: Case, names: Iterable[str]) -> list[str]:
    """The settings that a case has, in words such as "K = 4"."""
    return [f"{SETTINGS[name]} = {plain_number(case[name])}" for name in names
            if case[name] is not None]  # fmt: skip


def plain_number(value: Any) -> str:
    """Text of a value: means of counts rounded, words unchanged, empty for None."""
    return "" if value is None else f"{value:.0f}" if isinstance(value, float) else str(value)


def times(spread: dict[str, float]) -> str:
    """A speed-up with its 20th and 80th percentile, if these are known."""
    if spread["p20"] == spread["p80"]:
        return f"{spread['median']:.2f}x"
    return f"{spread['median']:.2f}x ({spread['p20']:.2f}-{spread['p80']:.2f})"


def failed(case: Case) -> bool:
    return case["check"] is not None and not case["check"]["passed"]


def check(case: Case) -> str:
    """The result of a case's check in words, such as "identical 16/16"."""
    found = case["check"]
    if found is None:
        return ""
    if found["kind"] == "identical":
        text = f"identical {found['identical']}/{found['texts']}"
        return f"DIFFERS, {text}" if failed(case) else text
    text = "distribution BROKEN" if failed(case) else "distribution"
    return text if found["z"] is None else f"{text}, z = {found['z']:.1f}"


def machine(content: Content) -> str:
    """The measuring machine in a few words."""
    known = content["machine"]
    parts = [known["gpu"]["name"]] if known.get("gpu") else []
    return ", ".join([*parts, known["processor"]["model name"], f"{known['cores']} cores"])


def setup(content: Content) -> str:
    """The machine and all else that figures depend on, in one line."""
    known = content["machine"]
    parts = [machine(content), known["torch_cpu_capability"], f"threads: {known['threads']}",
             f"Python {known['python']}"]  # fmt: skip
    parts += [f"{name} {version}" for name, version in known["packages"].items()]
    return ", ".join(parts)


def fastest(cases: Iterable[Case]) -> Case | None:
    """The case with the largest median speed-up, of those besides plain decoding that have one."""
    found = [c for c in cases if c["method"] != PLAIN and c["speedup"] and not failed(c)]
    return max(found, key=lambda case: case["speedup"]["median"], default=None)
