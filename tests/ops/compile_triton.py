"""Compiles Triton's kernels for a GPU that need not be there, and prints what was found in them.

    python -m tests.ops.compile_triton 90 [--fuse]     (without TRITON_INTERPRET)

The ops are called as anyone calls them; in place of each launch the kernel is compiled, so what
is looked at is what would run. --fuse lets the compiler fuse, to show that it would be seen.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from specdiff_kernels import (
    Draft,
    Lenience,
    Pages,
    Reveal,
    backends,
    commit,
    denoise_step,
    row_distribution,
    sample,
    use_backend,
    verify,
)
from specdiff_kernels.lenience import KINDS

from .fusion import fusion_fault

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
B, K, V = 2, 8, 50257
ODD, EVEN, SMALL = (V, 128256, 32000)


class NoDriver:
    """As much of a GPU as compiling needs."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def look_at(compiled: Any) -> dict[str, Any]:
    """Finds instructions that must not be in a kernel, in its PTX and its cubin."""
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [BINARIES / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "kernel": compiled.metadata.name,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
        "fusion_fault": fusion_fault(ptx, weighs=None),
        "maxima": sorted(set(re.findall(r"\bmax\.(?:\w+\.)?f32", ptx))),
        "approximate": sorted(set(re.findall(r"\b\S*(?:\.approx|div\.full)\S*", ptx))),
        "flushing": sorted(set(re.findall(r"\b\S+\.ftz\S*", ptx))),
    }


def record_launches(arch: int, fuse: bool) -> list[dict[str, Any]]:
    """From here on launches compile only. -> the list that each new kernel is appended to"""
    triton.runtime.driver.set_active(NoDriver(arch))
    original, found, seen = JITFunction.run, [], set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        options["enable_fp_fusion"] = fuse or options["enable_fp_fusion"]
        compiled = original(self, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            found.append(look_at(compiled))
        return compiled

    JITFunction.run = run
    return found


def options(truncated: bool) -> dict[str, Any]:
    return {"top_k": 50, "top_p": 0.9, "min_p": 0.01} if truncated else {}


def leniences(rule: str) -> list[Lenience | None]:
    return [Lenience(kind, 0.5) for kind in KINDS] if rule == "lenient" else [None]


def keys(rule: str = "token", width: int = V, words: bool = False) -> dict[str, torch.Tensor]:
    zero = torch.zeros(B, dtype=torch.int64)
    if words:
        shape = (B, K + 1, width) if rule == "coupled" else (B, K + 1)
        return {"words": torch.zeros(shape, dtype=torch.int64)}
    return {"seed": zero, "position" if rule == "coupled" else "round": zero}


def run_rows() -> None:
    zero = torch.zeros(B, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = torch.zeros(B, V, dtype=dtype)
        distribution = row_distribution(logits)
    row_distribution(logits, min_p=0.1)
    row_distribution(logits, **options(True))
    sample(logits, distribution, seed=zero, round=zero)
    sample(logits, distribution, words=zero, draft_ids=torch.arange(V))
    sample(logits, distribution, seed=zero, position=zero, draft_ids=torch.arange(V))
    sample(logits, distribution, position=zero, words=torch.zeros(B, V, dtype=torch.int64))


def run_commit(b: int = B, k: int = K, positions: int = 64, columns: int = 16) -> None:
    lengths = torch.zeros(b, dtype=torch.int64)
    emitted = torch.zeros(b, k + 1, dtype=torch.int64)
    path = torch.arange(k + 1).repeat(b, 1)
    commit(lengths, emitted)
    commit(lengths, emitted, stop_tokens=lengths, limit=lengths, finished=lengths.bool())
    pages = Pages.empty(b, columns, 3 * b, block_size=16)
    commit(lengths, emitted, pages=pages, release=True)
    for dtype, heads in ((torch.bfloat16, 8), (torch.float32, 1)):
        dense = [torch.zeros(b, heads, positions, 128, dtype=dtype) for _ in range(64)]
        commit(lengths, emitted, path=path, caches=dense)
        paged = [torch.zeros(3 * b, 16, heads, 128, dtype=dtype) for _ in range(64)]
        commit(lengths, emitted, path=path, caches=paged, pages=pages)
    commit(lengths, emitted, path=path, caches=[torch.zeros(b, 1, positions, 13).bool()])


def run_verify() -> None:
    zero = torch.zeros(B, K, dtype=torch.int64)
    for rule in ("token", "block", "coupled", "lenient"):
        for width, columns, truncated, words in (
            (ODD, None, False, False),
            (EVEN, SMALL, False, True),
            (EVEN, None, True, False),
        ):
            target = torch.zeros(B, K + 1, width, dtype=torch.bfloat16)
            pool = torch.zeros(B * K, columns or width, dtype=torch.bfloat16)
            ids = None if columns is None else torch.arange(columns)
            rows = torch.arange(B * K).view(B, K)
            draft = Draft(zero, zero.int(), rows, pool, row_distribution(pool), ids, zero[:, 0])
            for lenience in leniences(rule):
                verify(target, draft, rule=rule, lenience=lenience, **options(truncated),
                       **keys(rule, width, words))  # fmt: skip
        verify(target, Draft(zero, zero.int(), rows), rule=rule, lenience=leniences(rule)[-1],
               **keys(rule))  # fmt: skip


def run_denoise_step() -> None:
    pool = torch.zeros(B * K, V, dtype=torch.bfloat16)
    zero = torch.zeros(B, dtype=torch.int64)
    key = {"seed": zero, "round": zero}
    orders = (
        Reveal.all(), Reveal.chunk(0, 2), Reveal.mdlm(0.5), Reveal.sedd(0.5),
        Reveal.first_hitting(), Reveal.lowest_entropy(2), Reveal.highest_confidence(2),
    )  # fmt: skip
    for reveal in orders:
        denoise_step(Draft.masked(B, K, pool), reveal, 0, **key)
    draft = Draft.masked(B, K, pool, draft_ids=torch.arange(V), lengths=zero)
    denoise_step(draft, Reveal.all(), 0, position=zero, **options(True), **key)
    denoise_step(draft, Reveal.sedd(0.5), 0, position=zero, entropies=True, **key)
    words = torch.zeros(B, K, 2, dtype=torch.int64)
    denoise_step(draft, Reveal.mdlm(0.5), 0, entropies=True, words=words)


def run_again() -> None:
    """Calls that differ from earlier ones in nothing but numbers: a kernel serves them all."""
    zero = torch.zeros(K, dtype=torch.int64)
    for b, k in ((1, K), (16, K), (3, 12)):
        target = torch.zeros(b, k + 1, V, dtype=torch.bfloat16)
        pool = torch.zeros(b * k, V, dtype=torch.bfloat16)
        lengths = torch.zeros(b, dtype=torch.int64)
        tokens = torch.zeros(b, k, dtype=torch.int64)
        rows = torch.arange(b * k).view(b, k)
        draft = Draft(tokens, tokens.int(), rows, pool, row_distribution(pool), None, lengths)
        for rule in ("token", "block", "coupled", "lenient"):
            key = "position" if rule == "coupled" else "round"
            verify(target, draft, rule=rule, lenience=leniences(rule)[-1],
                   **{"seed": lengths, key: lengths})  # fmt: skip
        run_commit(b, k, positions=k + 1, columns=b)
    pool = torch.zeros(B * K, V, dtype=torch.bfloat16)
    key = {"seed": zero[:B], "round": zero[:B]}
    for step in (1, 5, 16):
        denoise_step(Draft.masked(B, K, pool), Reveal.chunk(step - 1, step), step, **key)
        denoise_step(Draft.masked(B, K, pool), Reveal.lowest_entropy(step), step, **key)


def main() -> None:
    arch, fuse = int(sys.argv[1]), "--fuse" in sys.argv
    backends.interprets_triton = lambda: True  # tensors on a CPU will do
    found = record_launches(arch, fuse)
    with use_backend("triton"):
        if fuse:
            row_distribution(torch.zeros(B, V))
        else:
            run_rows()
            run_commit()
            run_verify()
            run_denoise_step()
            kernels = len(found)
            run_again()
            assert len(found) == kernels, [kernel["kernel"] for kernel in found[kernels:]]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
