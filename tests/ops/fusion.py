"""Whether the fused multiply-adds in PTX are those of the exact distribution, and no others."""

from __future__ import annotations

import re
import struct
from collections import Counter

from specdiff_kernels.reference.numerics import EXP2

FUSED = re.compile(r"\bfma\.(\S+)\s+([^;]+);")
MOVED = re.compile(r"\bmov\.[bf]32\s+(%\w+), (0f[0-9A-Fa-f]{8});")
# sm_100 on: two numbers in one register, and operations on both
TWICE = re.compile(r"\bmov\.b64\s+(%\w+), \{(%\w+), \2\};")


def immediate(x: float) -> str:
    """A number as PTX writes it."""
    return "0f" + struct.pack(">f", x).hex().upper()


def fusion_fault(ptx: str, *, weighs: bool | None = True) -> str | None:
    """None if each weight takes exactly the fused multiply-adds that docs/numerics.md writes: two
    for its exponent, then Horner's five, all with the fraction as a factor.

    weighs: whether there must be weights at all; None: there may be.
    """
    functions = re.split(r"^\.(?:visible )?\.?(?:entry|func)", ptx, flags=re.M)
    seen = 0
    for text in functions:
        found = FUSED.findall(text)
        if kinds := {kind for kind, _ in found} - {"rn.f32", "rn.f32x2"}:
            return f"fma.{', fma.'.join(sorted(kinds))}"
        if re.search(r"\bmad\.\S*f(?:32|64)", text):
            return "mad"
        constants = dict(MOVED.findall(text))
        constants |= {x: constants[y] for x, y in TWICE.findall(text) if y in constants}
        calls = [
            [constants.get(x, x).upper() for x in re.split(r",\s*", operands)]
            for kind, operands in found
            for _ in range(2 if kind == "rn.f32x2" else 1)
        ]
        addends = Counter(call[3] for call in calls)
        steps = [immediate(c).upper() for c in EXP2[1:]]
        weights = addends[steps[0]]
        for step in steps:
            if addends[step] != weights:
                return f"{addends[step]} additions of {step} for {weights} weights"
        # the fraction of a weight is a factor of all its steps: a result that is used five times,
        # unless two are taken out of one register and put into others
        results = Counter(call[0] for call in calls)
        factors = Counter(f for call in calls if call[3] in steps for f in set(call[1:3]))
        fractions = [x for x, uses in factors.items() if results[x] and uses == 5]
        if len(fractions) != weights and "fma.rn.f32x2" not in text:
            return f"{len(fractions)} fractions for {weights} weights"
        if len(calls) != 7 * weights:
            return f"{len(calls)} fused multiply-adds for {weights} weights"
        seen += weights
    if weighs is not None and bool(seen) != weighs:
        return f"{seen} weights"
    return None
