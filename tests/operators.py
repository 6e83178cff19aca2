"""Which of PyTorch's operators a piece of code calls, ours among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Names of the operators called while it lasts, such as "specdiff.verify.default".

    results: what ours returned. Others' are not kept, as PyTorch detaches what somebody holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.results: list[tuple[str, Any]] = []

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        if self.names[-1].startswith("specdiff."):
            self.results.append((self.names[-1], result))
        return result
