"""Captured: a function of the device's memory as a CUDA graph, captured once for each key."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Captured:
    """CUDA graphs of a function that reads and writes the same memory in every call.

    The first call for a key runs the function, because anything that is compiled or allocated on
    first use must not be captured. Then it is captured. Later calls replay the graph.

    Attributes:
        span: a session captures a round for each multiple of so many keys that it reads.

    Args:
        device: a CUDA device.

    Raises:
        ValueError: no CUDA device.

    Example:
        >>> x = torch.zeros(1, device="cuda")
        >>> captured = Captured(x.device)
        >>> captured("add", lambda: x.add_(1))
    """

    span = 256

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"capture needs a CUDA device, got a target on {device.type}")
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()  # nothing in it outlives a replay

    def forget(self) -> None:
        """Capture anew: the function reads other memory from now on."""
        self.graphs.clear()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, key: Hashable, function: Callable[[], Any]) -> None:
        """Run or replay the function of a key. It has no arguments and does not wait for the
        device."""
        if key in self.graphs:
            self.graphs[key].replay()
            return
        beside, current = torch.cuda.Stream(), torch.cuda.current_stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            function()
        current.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            function()
        self.graphs[key] = graph
