"""Drafters: what proposes the tokens that a target verifies.

`load_drafter` finds one by name or by the folder of its weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import digest
from ..loop.drafter import Drafter, Draws, News
from ..loop.fast_layers import accelerate, is_accelerated
from ..loop.target import Target
from ..models import load_causal
from .autoregressive import Autoregressive
from .block_diffusion import BlockDiffusion
from .eagle import Eagle
from .network import KINDS
from .parallel import ParallelDrafter
from .prompt_lookup import PromptLookup

SHIPPED = {  # name -> folder of weights that come with specdiff; the default is the first
    "parallel": "smollm2-135m-parallel",
    "eagle": "smollm2-135m-eagle",
    "block-diffusion": "smollm2-135m-block-diffusion",
}
CHOICES = f"{', '.join(map(repr, SHIPPED))}, 'prompt-lookup', or a folder with a drafter"

__all__ = [
    "Autoregressive",
    "BlockDiffusion",
    "Drafter",
    "Draws",
    "Eagle",
    "News",
    "ParallelDrafter",
    "PromptLookup",
    "drafter_folder",
    "load_drafter",
    "weights_digest",
]


def load_drafter(
    name_or_path: str | Path,
    target: Target,
    *,
    steps: int | None = None,
    backend: str | None = None,
) -> Drafter:
    """A drafter for `target`, on its device, in its dtype, accelerated if its model is.

    Reads local files only.

    Args:
        name_or_path: "parallel", "eagle" or "block-diffusion", which are shipped for
            SmolLM2-135M-Instruct, "prompt-lookup", or a folder that holds a trained drafter of
            these kinds, a SEDD or MDLM checkpoint, or any causal language model with the target's
            vocabulary.
        steps: reverse steps of a diffusion drafter; None is its own default.
        backend: of the ops; None chooses.

    Raises:
        ValueError: no such drafter, a folder that holds no usable one, or `steps` given to one
            without steps. Code that a folder brings along is never run.

    Example:
        >>> decoder = Decoder(target, load_drafter("prompt-lookup", target))
    """
    if name_or_path == "prompt-lookup":
        refuse_steps(steps, "prompt-lookup")
        return PromptLookup()
    folder = drafter_folder(name_or_path)
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"unknown drafter {str(name_or_path)!r}; expected {CHOICES}")
    fields = json.loads(config.read_text())
    kind = KINDS.get(fields.get("model_type"))
    if kind == "block-diffusion":
        return BlockDiffusion.load(folder, target, steps=steps, backend=backend)
    if kind is not None:
        refuse_steps(steps, f"a drafter of kind {kind!r}")
        causal: type[ParallelDrafter | Eagle] = Eagle if kind == "eagle" else ParallelDrafter
        return causal.load(folder, target, backend=backend)
    if "graph" in fields and "noise" in fields:  # as the configurations of SEDD have
        return load_ddit(folder, target, steps, backend)
    refuse_steps(steps, "an autoregressive drafter")
    model: Any = load_causal(folder, target.dtype)
    model = model.to(target.device)
    return Autoregressive(
        accelerate(model) if is_accelerated(target.model) else model, backend=backend
    )


def load_ddit(folder: Path, target: Target, steps: int | None, backend: str | None) -> Drafter:
    """A SEDD or MDLM drafter, on the target's device and in its dtype."""
    from .ddit import DDiT
    from .sedd import DEFAULT_STEPS, MDLM, SEDD

    network = DDiT.from_pretrained(folder).to(target.device, target.dtype)
    kind = SEDD if network.config.time_conditioned else MDLM
    return kind(network, steps=DEFAULT_STEPS if steps is None else steps, backend=backend)


def drafter_folder(name_or_path: str | Path) -> Path:
    """Where a drafter lies: one that comes with specdiff, by its name, or a folder as it is."""
    own = SHIPPED.get(str(name_or_path))
    return Path(name_or_path) if own is None else Path(__file__).parents[1] / "weights" / own


def weights_digest(name_or_path: str | Path) -> str | None:
    """What tells a drafter's weights apart, 12 hexadecimal digits; None: it has none in one file.

    Published figures carry it, so that they can be held against the weights that are shipped.

    Example:
        >>> weights_digest("prompt-lookup") is None
        True
    """
    file = drafter_folder(name_or_path) / "model.safetensors"
    return digest(file.read_bytes())[:12] if file.is_file() else None


def refuse_steps(steps: int | None, what: str) -> None:
    if steps is not None:
        raise ValueError(f"steps belong to a diffusion drafter; {what} has none")
