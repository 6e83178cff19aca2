"""What a type checker makes of a program that uses the installed packages."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
import specdiff
import specdiff_kernels
from specdiff import Decoder, Sampling, Target, generate
from specdiff.drafters import PromptLookup
from specdiff_kernels import Draft, Verified, verify

def decode(target: Target) -> list[list[int]]:
    decoder = Decoder(target, PromptLookup(), k=4)
    done = decoder.generate([1, 2], max_new_tokens=8, sampling=Sampling(0.7), stop_tokens=[2])
    for step in decoder.stream([[1], [2, 3]], seed=[1, 2]):
        print(step.tokens[0], done.stats.tokens_per_forward)
    return generate(target, "eagle", [1, 2]).new_tokens

def judge(logits: torch.Tensor, draft: Draft, seed: torch.Tensor) -> Verified:
    return verify(logits, draft, 0.7, seed=seed, round=seed)

version: str = specdiff.__version__ + specdiff_kernels.__version__
"""
WRONG = {  # line -> what mypy calls it
    "Decoder('smollm2', PromptLookup())": "arg-type",
    "decoder: Decoder; decoder.generate([1], temperature=0.7)": "call-arg",
    "decoder: Decoder; decoder.generate([1], max_new_tokens='8')": "arg-type",
    "specdiff.nothing": "attr-defined",
    "x: int = verify(torch.zeros(1), Draft(1, 2, 3))": "arg-type",
}


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_a_users_program_is_checked(tmp_path: Path) -> None:
    """The packages are found where they are installed, and their types are believed."""
    lines = [f"def wrong{n}() -> None: {line}" for n, line in enumerate(WRONG)]
    program = tmp_path / "program.py"
    program.write_text("\n".join([PROGRAM, *lines, ""]))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "program.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    first = PROGRAM.count("\n") + 2
    found = {}
    for error in errors:
        number, code = int(error.split(":")[1]), error.rsplit("[", 1)[-1].rstrip("]")
        found[number] = {*found.get(number, ()), code}
    expected = {first + n: code for n, code in enumerate(WRONG.values())}
    assert found.keys() == expected.keys(), done.stdout
    assert all(code in found[number] for number, code in expected.items()), done.stdout
