"""Drafters: they propose the tokens that a target verifies.

`load_drafter` loads one by name or from a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import digest, read_json
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

SHIPPED = {  # name -> folder of weights shipped with specdiff; the first is the default
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
    """Load a drafter for `target`, with its device and dtype, accelerated if the target is.

    Only local files are read. Code in a folder is never run.

    Args:
        name_or_path: "parallel", "eagle" or "block-diffusion" (shipped for SmolLM2-135M-Instruct),
            "prompt-lookup", or a folder. A folder holds a trained drafter of these kinds, a SEDD or
            MDLM checkpoint, or a causal language model with the target's vocabulary.
        steps: reverse steps of a diffusion drafter; None: its default.
        backend: backend of the ops; None chooses one.

    Raises:
        ValueError: the drafter is unknown, the folder holds no usable drafter, or `steps` is given
            but the drafter has none.

    Example:
        >>> decoder = Decoder(target, load_drafter("prompt-lookup", target))
    """
    if name_or_path == "prompt-lookup":
        refuse_steps(steps, "prompt-lookup")
        return PromptLookup()
    folder = drafter_folder(name_or_path)
    config = folder / "config.json"
    if not config.is_file():
        name = repr(str(name_or_path))
        known = folder.is_dir()
        fault = f"drafter {name} has no config.json" if known else f"unknown drafter {name}"
        raise ValueError(f"{fault}; expected {CHOICES}")
    fields = read_json(config, f"expected {CHOICES}")
    kind = KINDS.get(str(fields.get("model_type")))
    if kind == "block-diffusion":
        return BlockDiffusion.load(folder, target, steps=steps, backend=backend)
    if kind is not None:
        refuse_steps(steps, f"a drafter of kind {kind!r}")
        causal: type[ParallelDrafter | Eagle] = Eagle if kind == "eagle" else ParallelDrafter
        return causal.load(folder, target, backend=backend)
    if "graph" in fields and "noise" in fields:  # a SEDD config
        return load_ddit(folder, target, steps, backend)
    refuse_steps(steps, "an autoregressive drafter")
    model: Any = load_causal(folder, target.dtype)
    model = model.to(target.device)
    return Autoregressive(
        accelerate(model) if is_accelerated(target.model) else model, backend=backend
    )


def load_ddit(folder: Path, target: Target, steps: int | None, backend: str | None) -> Drafter:
    """Load a SEDD or MDLM drafter with the target's device and dtype."""
    from .ddit import DDiT
    from .sedd import DEFAULT_STEPS, MDLM, SEDD

    network = DDiT.from_pretrained(folder).to(target.device, target.dtype)
    kind = SEDD if network.config.time_conditioned else MDLM
    return kind(network, steps=DEFAULT_STEPS if steps is None else steps, backend=backend)


def drafter_folder(name_or_path: str | Path) -> Path:
    """Folder of a drafter: a shipped one by its name, else the given path."""
    own = SHIPPED.get(str(name_or_path))
    return Path(name_or_path) if own is None else Path(__file__).parents[1] / "weights" / own


def weights_digest(name_or_path: str | Path) -> str | None:
    """Digest of a drafter's weights, 12 hexadecimal digits; None if it has no model.safetensors.

    Published figures carry the digest, so that they can be matched with the shipped weights.

    Example:
        >>> weights_digest("prompt-lookup") is None
        True
    """
    file = drafter_folder(name_or_path) / "model.safetensors"
    return digest(file.read_bytes())[:12] if file.is_file() else None


def refuse_steps(steps: int | None, what: str) -> None:
    if steps is not None:
        raise ValueError(f"steps are for diffusion drafters only; {what} has none: leave them out")
