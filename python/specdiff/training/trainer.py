"""Training loop on accelerate: AdamW or Muon, warmup, cosine, clipping, averaged weights.

A step depends only on the seed and its number. A killed run therefore resumes from its last
checkpoint with exactly the same losses. One process or many see the same batches.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..drafters.head import SequentialHead
from ..files import write_atomically
from .recipe import Recipe

POOL = 16  # number of batches that are sorted by length together
MOMENTS = {  # optimiser -> keys of a parameter's state
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


class Task(Protocol):
    """A training task. Its forward is the loss of the texts chosen for a step.

    Attributes:
        network: the network to train, average and save.
        rows: i64 [N], texts to choose from.
        lengths: i64 [N], lengths of these texts.
    """

    network: nn.Module
    rows: Tensor
    lengths: Tensor

    def __call__(self, chosen: Tensor, step: int, progress: float) -> Tensor: ...

    def held_out_loss(self, network: Any) -> float: ...


def choose(rows: Tensor, lengths: Tensor, recipe: Recipe, step: int) -> Tensor:
    """Texts for a step. -> i64 [batch]"""
    epoch, place = divmod(step, len(rows) // recipe.batch)
    return rows[batches_of(lengths, recipe, epoch)[place]]


@functools.lru_cache(maxsize=1)  # for the current epoch
def batches_of(lengths: Tensor, recipe: Recipe, epoch: int) -> Tensor:
    """Shuffled batches of an epoch, each of texts of similar length. Left-over texts are dropped.

    -> i64 [batches, batch], indices into `lengths`
    """
    count = len(lengths) // recipe.batch
    shuffle = np.random.default_rng([recipe.seed, epoch])
    order = torch.from_numpy(shuffle.permutation(len(lengths)))[: count * recipe.batch]
    pools = [pool[lengths[pool].argsort(stable=True)] for pool in order.split(POOL * recipe.batch)]
    return torch.cat(pools).view(count, recipe.batch)[shuffle.permutation(count)]


class Trainer:
    """Trains a task. Every process of a launch must make the same trainer.

    Args:
        task: a `Task` module. Its network is trained in place.
        recipe: training settings.
        accelerator: None: made from the recipe.

    Raises:
        ValueError: the processes cannot share the batch evenly, or it exceeds the number of texts.

    Example:
        >>> trainer = Trainer(task, Recipe(steps=100))
        >>> while trainer.step < 100:
        ...     loss = trainer.train_step()
        >>> trainer.network.save(folder)
    """

    def __init__(self, task: Any, recipe: Recipe, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator or make_accelerator(recipe)
        parts = recipe.accumulate * self.accelerator.num_processes
        if recipe.batch % parts or recipe.batch > len(task.rows):
            raise ValueError(
                f"training.batch must be a multiple of accumulate x processes = {parts} and at "
                f"most the {len(task.rows)} texts to train on, got {recipe.batch}"
            )
        self.task, self.recipe, self.step = task, recipe, 0
        self.module, *self.optimizers = self.accelerator.prepare(
            task, *make_optimizers(task.network, recipe)
        )
        self.average = AveragedModel(task.network, multi_avg_fn=decaying_average(recipe.ema))
        self.average.requires_grad_(False)

    @property
    def network(self) -> Any:
        """The averaged network, the result of a run."""
        return self.average.module

    def train_step(self) -> float:
        """One optimiser step. Returns its loss, the mean over the whole batch.

        Raises:
            FloatingPointError: the loss or its gradient is not finite. The weights are unchanged.
        """
        recipe, accelerator = self.recipe, self.accelerator
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(self.step, group["full"])
        chosen = choose(self.task.rows, self.task.lengths, recipe, self.step)
        *parts, last = chosen.view(recipe.accumulate, accelerator.num_processes, -1)
        with accelerator.no_sync(self.module):  # gradients are reduced once
            loss = sum(map(self.backward, parts), torch.zeros((), device=accelerator.device))
        loss = accelerator.reduce(loss + self.backward(last), "mean").item()
        self.check("loss", loss)
        length = accelerator.clip_grad_norm_(self.module.parameters(), recipe.clip)
        self.check("gradient's norm", float(length))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update_parameters(self.task.network)
        self.step += 1
        return loss

    def backward(self, part: Tensor) -> Tensor:
        """Add the gradient of this process's row of i64 [processes, n]. -> its share of the loss"""
        progress = self.step / self.recipe.steps
        loss = self.module(part[self.accelerator.process_index], self.step, progress)
        loss = loss / self.recipe.accumulate
        self.accelerator.backward(loss)
        return loss.detach()

    def agree(self, wanted: bool) -> bool:
        """Whether `wanted` is True in any process."""
        flag = torch.tensor(float(wanted), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def check(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} of step {self.step} is {value}: lower training.learning_rate = "
                f"{self.recipe.learning_rate} or training.clip = {self.recipe.clip}; the last "
                "checkpoint is from an earlier step"
            )

    def optimizer_of(self, parameter: Tensor) -> torch.optim.Optimizer:
        """The optimiser of a parameter."""
        return next(
            wrapped.optimizer
            for wrapped in self.optimizers
            if any(p is parameter for group in wrapped.param_groups for p in group["params"])
        )

    def save(self, path: Path) -> None:
        """Write weights, averaged weights and the optimisers' state as one safetensors file."""
        if not self.accelerator.is_main_process:
            return
        tensors = {}
        averaged = dict(self.network.named_parameters())
        for name, parameter in self.task.network.named_parameters():
            tensors[f"network.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = averaged[name].detach()
            optimizer = self.optimizer_of(parameter)
            for key in MOMENTS[type(optimizer)]:
                tensors[f"optimizer.{key}.{name}"] = optimizer.state[parameter][key]
        about = {"step": str(self.step), "recipe": json.dumps(asdict(self.recipe))}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        write_atomically(path, save(tensors, about))

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint written by `save`.

        Raises:
            ValueError: the file is not a checkpoint, or has another recipe or network.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            theirs = json.loads(about["recipe"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a training checkpoint: {error!r}; remove it to begin again"
            ) from error
        ours = asdict(self.recipe)
        if changed := [f"{k} = {theirs.get(k)}" for k in ours if ours[k] != theirs.get(k)]:
            raise ValueError(
                f"{path} was made with {', '.join(changed)}: use the same settings, or another "
                "folder"
            )
        averaged = dict(self.network.named_parameters())
        for name, parameter in self.task.network.named_parameters():
            saved = tensors.get(f"network.{name}")
            if saved is None or saved.shape != parameter.shape:
                raise ValueError(
                    f"{path} is from another network ({name} differs): use another folder"
                )
            parameter.data.copy_(saved)
            averaged[name].data.copy_(tensors[f"average.{name}"])
            optimizer = self.optimizer_of(parameter)
            optimizer.state[parameter] = {
                key: tensors[f"optimizer.{key}.{name}"].to(parameter.device)
                for key in MOMENTS[type(optimizer)]
            }
        self.step = int(about["step"])
        self.average.n_averaged.fill_(self.step)


def make_optimizers(network: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The optimisers of all weights, by the recipe. A group's peak learning rate is `full`."""
    weights = list(network.parameters())
    heads = {m.out.weight for m in network.modules() if isinstance(m, SequentialHead)}
    linear = {m.weight for m in network.modules() if isinstance(m, nn.Linear)} - heads
    rest = [p for p in weights if p not in linear and p not in heads]

    def group(chosen: list[Tensor], rate: float | None, decay: float) -> dict[str, Any]:
        rate = recipe.learning_rate if rate is None else rate
        return {"params": chosen, "lr": rate, "full": rate, "weight_decay": decay}

    decay = recipe.weight_decay
    matrices = group([p for p in weights if p in linear], None, decay)
    others = [
        group([p for p in rest if p.ndim > 1], recipe.vector_learning_rate, decay),
        group([p for p in rest if p.ndim <= 1], recipe.vector_learning_rate, 0.0),
        group([p for p in weights if p in heads], recipe.head_learning_rate, 0.0),
    ]
    muon = recipe.matrices == "muon"
    adamw = torch.optim.AdamW(
        others if muon else [matrices, *others], betas=(0.9, 0.95), fused=True
    )
    if not muon:
        return [adamw]
    return [adamw, torch.optim.Muon([matrices], momentum=0.95, adjust_lr_fn="match_rms_adamw")]


def decaying_average(decay: float) -> Callable[..., None]:
    """Update rule of the weights' moving average: new weights count 1 - decay, more at first."""

    def update(average: list[Tensor], new: list[Tensor], count: Tensor | int) -> None:
        n = float(count)
        torch._foreach_lerp_(average, new, 1 - min(decay, (1 + n) / (10 + n)))

    return update


def make_accelerator(recipe: Recipe) -> Accelerator:
    """An Accelerator for the devices and processes of this launch."""
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # the first process prepares data
    return Accelerator(mixed_precision=recipe.precision, kwargs_handlers=[patience])
