"""Settings: the choices of a Decoder that all its sessions share."""

from __future__ import annotations

from dataclasses import dataclass

from specdiff_kernels import Lenience

from .chooser import Chooser
from .drafter import Drafter
from .target import Target
from .trees import Growth


@dataclass(frozen=True)
class Settings:
    """How rounds are drafted and judged; `Decoder` makes and checks it.

    Attributes:
        target: the model whose distribution the text follows.
        drafter: proposes tokens; None: plain decoding.
        k: most tokens of a draft; 0 without a drafter.
        chooser: chooses the length of each draft, up to k; None: always k.
        tree: how trees are grown, k tokens deep at most; None: drafts are chains.
        rule, lenience, record, backend: arguments of `specdiff_kernels.verify`.
    """

    target: Target
    drafter: Drafter | None
    k: int
    chooser: Chooser | None
    tree: Growth | None
    rule: str
    lenience: Lenience | None
    record: str | None
    backend: str | None
