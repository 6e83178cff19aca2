"""Random numbers that follow from a key, not from what was drawn before."""

from __future__ import annotations

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """Random numbers, on the CPU, that depend on nothing but these integers."""
    word = np.random.SeedSequence([k % 2**64 for k in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word))
