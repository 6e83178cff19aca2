"""Train a BlockDiffusion drafter by distilling the target on text that the target wrote.

For random anchors t of an answer, a block of K masks behind token t learns the target's law at each
of its positions (soft labels, cross-entropy on masked positions: the MDLM objective with one noise
level per block). In a quarter of the blocks a random left part is already revealed, as in the later
steps of a multi-step draft. Late in training the loss turns towards total variation, which is what
verification charges for.

    python -m specdiff.train --target FOLDER --data data/smollm2_samples.npz --out FOLDER
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .drafters.block_diffusion import (
    BlockDiffusionConfig,
    BlockDiffusionNetwork,
    principal_axes,
    write_atomically,
)

REVEALED_SHARE = 0.25  # of blocks that start with a random left part revealed
POSITION_DECAY = 0.8  # weight of position i is decay^i: a token counts only if all before it stand
VARIATION_FROM = 0.6  # share of training after which total variation enters the loss
VARIATION_WEIGHT = 0.5  # its weight at the end
HIDDEN_BATCH = 16
RIDGE = 1e-3  # relative to the inputs' mean square, which is 1


class Conversations(NamedTuple):
    """Token sequences: tokens[i, prompt_length[i]:length[i]] is the target's own answer."""

    tokens: Tensor  # i64 [N, S]
    prompt_length: Tensor  # i64 [N]
    length: Tensor  # i64 [N]


@dataclass(frozen=True)
class Recipe:
    """What decides a training run, bit for bit on one machine with one thread count.

    Args:
        steps: optimiser steps.
        batch: conversations in a step.
        anchors: blocks per conversation.
        learning_rate: peak, reached after the share `warmup` of the steps; then cosine to zero.
        weight_decay: of matrices.
        held_out: share of conversations never trained on.
        seed: of weights, split, batches and anchors.
    """

    steps: int = 4000
    batch: int = 4
    anchors: int = 64
    learning_rate: float = 1e-3
    warmup: float = 0.04
    weight_decay: float = 0.05
    held_out: float = 0.05
    seed: int = 0


class Blocks(NamedTuple):
    """Masked blocks behind random anchors of a batch; A blocks of K per conversation."""

    positions: Tensor  # i64 [B, A, K], of each block token
    revealed: Tensor  # i64 [B, A], how many of them are given
    weight: Tensor  # f32 [B, A, K], 0 where nothing is to be learnt


class Teacher:
    """The target's embeddings, and its last hidden states for every position of the data."""

    def __init__(self, model: Any, hidden: np.ndarray, draft_ids: Tensor) -> None:
        self.embedding = model.get_input_embeddings().weight.detach()
        self.output = model.get_output_embeddings().weight.detach()
        self.hidden = hidden  # f16 [N, S, d], the lm head's input
        self.draft_output = self.output[draft_ids].contiguous()  # [Vd, d]

    def states(self, rows: Tensor, longest: int) -> Tensor:
        """-> f32 [B, longest, d]"""
        return torch.from_numpy(self.hidden[rows.numpy(), :longest]).float()


def load_conversations(path: Path) -> Conversations:
    """Read an .npz with tokens [N, S], prompt_length [N] and length [N]; nothing is unpickled."""
    with np.load(path, allow_pickle=False) as data:
        missing = [name for name in Conversations._fields if name not in data]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; data/README.md has the format")
        fields = (torch.from_numpy(data[name].astype(np.int64)) for name in Conversations._fields)
        return Conversations(*fields)


def frequent_ids(data: Conversations, count: int, vocab_size: int, always: list[int]) -> Tensor:
    """The `count` most frequent tokens of the answers, ties to the lower id, sorted. i64 [count]"""
    columns = torch.arange(data.tokens.shape[1])
    answer = (columns >= data.prompt_length[:, None]) & (columns < data.length[:, None])
    counts = torch.bincount(data.tokens[answer], minlength=vocab_size)
    counts[always] = counts.max() + 1
    return counts.sort(descending=True, stable=True).indices[:count].sort().values


def split(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Conversations to train on, and those held out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(count * share))
    return order[held:], order[:held]


def batch_rows(rows: Tensor, length: Tensor, recipe: Recipe, step: int) -> Tensor:
    """Conversations of a step: every epoch is shuffled, then neighbours of like length meet."""
    per_epoch = max(1, len(rows) // recipe.batch)
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    order = rows[torch.randperm(len(rows), generator=generator)]
    pools = [pool[length[pool].argsort()] for pool in order.split(16 * recipe.batch)]
    batches = list(torch.cat(pools).split(recipe.batch))[:per_epoch]
    return batches[torch.randperm(len(batches), generator=generator)[place]]


def sample_blocks(
    data: Conversations, rows: Tensor, anchors: int, block: int, generator: torch.Generator
) -> Blocks:
    """Stratified anchors t in [prompt_length - 1, length - 2]; the block covers t+1 .. t+K."""
    first, length = data.prompt_length[rows] - 1, data.length[rows]
    share = torch.rand(len(rows), anchors, generator=generator)
    share = (torch.arange(anchors) + share) / anchors
    t = first[:, None] + (share * (length - 1 - first)[:, None]).long()  # [B, A]
    positions = t[..., None] + 1 + torch.arange(block)
    some = torch.rand(t.shape, generator=generator) < REVEALED_SHARE
    revealed = torch.randint(1, block, t.shape, generator=generator) if block > 1 else some.long()
    revealed = revealed * some * (block > 1)
    offset = torch.arange(block) - revealed[..., None]
    weight = torch.where(offset >= 0, POSITION_DECAY ** offset.clamp(min=0), 0.0)
    weight = weight * (positions < length[:, None, None])
    return Blocks(positions, revealed, weight)


def forward_blocks(
    network: BlockDiffusionNetwork, tokens: Tensor, hidden: Tensor, blocks: Blocks, teacher: Teacher
) -> Tensor:
    """One forward over the prefix [B, S] and all blocks. -> draft logits [B, A, K, Vd]"""
    B, S = tokens.shape
    A, K = blocks.positions.shape[1:]
    embedded = F.embedding(tokens, teacher.embedding)
    before = F.pad(hidden, (0, 0, 1, 0))[:, :S]  # the state before each token; zero for the first
    prefix = network.embed_prefix(embedded, before)
    at = blocks.positions.clamp(max=S - 1).flatten(1)  # [B, A * K]
    given = embedded.gather(1, at[..., None].expand(-1, -1, embedded.shape[-1]))
    last = blocks.positions[..., :1] - 1  # [B, A, 1], the anchors
    anchor = prefix.gather(1, last.expand(-1, -1, prefix.shape[-1]))
    block = network.embed_block(given.view(B, A, K, -1), blocks.revealed[..., None], anchor)
    x = torch.cat((prefix, block.flatten(1, 2)), 1)
    column = torch.arange(S).expand(B, S)
    positions = torch.cat((column, blocks.positions.flatten(1)), 1)
    states = network(x, positions, training_mask(S, blocks.positions))[:, S:]
    logits = F.linear(network.embed_out(states), teacher.draft_output, network.bias)
    return logits.view(B, A, K, -1)


def training_mask(S: int, positions: Tensor) -> Tensor:
    """Causal among prefix columns; a block sees its prefix and itself. -> bool [B, 1, Q, Q]"""
    B, A, K = positions.shape
    column = torch.arange(S)
    last = torch.cat((column.expand(B, S), (positions[..., :1] - 1).expand(B, A, K).flatten(1)), 1)
    group = torch.cat((torch.full((S,), -1), torch.arange(A).repeat_interleave(K)))
    same = (group == group[:, None]) & (group >= 0)
    mask = same.expand(B, -1, -1).clone()
    mask[:, :, :S] = column <= last[..., None]
    return mask[:, None]


def distillation_loss(logits: Tensor, target: Tensor, weight: Tensor, variation: float) -> Tensor:
    """Weighted mean over rows of (1 - w) CE(p, q) + w TV(p, q).

    Args:
        logits: [N, Vd] of the drafter.
        target: [N, Vd] logits of the target over the same tokens.
        weight: [N].
        variation: w in [0, 1].
    """
    p = target.softmax(-1)
    loss = F.cross_entropy(logits, p, reduction="none")
    if variation > 0:
        distance = (p - logits.softmax(-1)).abs().sum(-1) / 2
        loss = (1 - variation) * loss + variation * distance
    return (loss * weight).sum() / weight.sum()


def step_loss(
    network: BlockDiffusionNetwork,
    data: Conversations,
    teacher: Teacher,
    rows: Tensor,
    anchors: int,
    generator: torch.Generator,
    variation: float = 0.0,
) -> Tensor:
    """Loss of one batch of conversations, on blocks drawn from `generator`."""
    S = int(data.length[rows].max())
    hidden = teacher.states(rows, S)
    blocks = sample_blocks(data, rows, anchors, network.config.block, generator)
    logits = forward_blocks(network, data.tokens[rows, :S], hidden, blocks, teacher)
    used = blocks.weight > 0
    row = torch.arange(len(rows))[:, None, None].expand_as(used)[used]
    with torch.no_grad():  # the law of position t comes from the state before it
        target = hidden[row, blocks.positions[used] - 1] @ teacher.draft_output.T
    return distillation_loss(logits[used], target, blocks.weight[used], variation)


@torch.no_grad()
def fit_linear(
    network: BlockDiffusionNetwork, data: Conversations, teacher: Teacher, rows: Tensor
) -> None:
    """Start at the best linear prediction of the next state, by ridge regression.

    h[t] from the token x[t], the state h[t-1] and a constant: in closed form, in one pass over
    `rows`, which spares the gradient steps from random weights to there. The network's stream then
    runs along the principal axes of the states, scaled to a root mean square of about 1.
    """
    d = network.config.target_hidden_size
    gram = torch.zeros(2 * d + 1, 2 * d + 1, dtype=torch.float64)
    cross, moments = gram.new_zeros(2 * d + 1, d), gram.new_zeros(d, d)
    for part in rows[data.length[rows].argsort()].split(HIDDEN_BATCH):
        tokens, hidden = data.tokens[part], teacher.states(part, int(data.length[part].max()))
        t = torch.arange(1, hidden.shape[1])
        inside = (t >= data.prompt_length[part, None] - 1) & (t < data.length[part, None])
        token = F.embedding(tokens[:, t], teacher.embedding)[inside]
        x = torch.cat((network.scaled(token), network.scaled(hidden[:, :-1][inside])), 1)
        x, y = F.pad(x, (0, 1), value=1.0), hidden[:, 1:][inside]
        gram, cross, moments = gram + x.T @ x, cross + x.T @ y, moments + y.T @ y
    count = gram[-1, -1]
    weight = torch.linalg.solve(gram + RIDGE * count * torch.eye(2 * d + 1), cross).float()
    axes = principal_axes(moments.float(), network.config.hidden_size)
    size = (moments.trace() / d / count).sqrt().float()
    kept = axes.shape[1]
    network.embed_in.weight.zero_()[:kept] = (weight[:d] @ axes / size).T
    network.hidden_in.weight.zero_()[:kept] = (weight[d : 2 * d] @ axes / size).T
    network.mask.zero_()[:kept] = weight[-1] @ axes / size
    network.embed_out.weight.zero_()[:, :kept] = axes * size


@torch.no_grad()
def evaluate(
    network: BlockDiffusionNetwork,
    data: Conversations,
    teacher: Teacher,
    rows: Tensor,
    *,
    anchors: int = 16,
    seed: int = 0,
) -> dict[str, list[float] | float]:
    """One-step drafts on given conversations, against the target's law over its whole vocabulary.

    Returns:
        acceptance: mean of sum_x min(p(x), q(x)) per position, on the data's own prefix;
        greedy_match: how often the argmaxes agree, per position;
        tokens_per_forward, greedy_tokens_per_forward: 1 + the mean number of leading tokens
        accepted, from the two above, multiplied along each block.
    """
    generator = torch.Generator().manual_seed(seed)
    block = network.config.block
    overlap, match, valid = [], [], []
    for chosen in rows[data.length[rows].argsort()].split(4):
        S = int(data.length[chosen].max())
        hidden = teacher.states(chosen, S)
        blocks = sample_blocks(data, chosen, anchors, block, generator)
        blocks = blocks._replace(revealed=torch.zeros_like(blocks.revealed))
        inside = blocks.positions < data.length[chosen][:, None, None]
        logits = forward_blocks(network, data.tokens[chosen, :S], hidden, blocks, teacher)
        at = blocks.positions.clamp(max=S - 1) - 1
        row = torch.arange(len(chosen))[:, None, None].expand_as(at)
        target = hidden[row, at] @ teacher.output.T  # [B, A, K, V]
        p = (target[..., network.draft_ids] - target.logsumexp(-1, keepdim=True)).exp()
        overlap.append(torch.minimum(p, logits.softmax(-1)).sum(-1).flatten(0, 1))
        match.append((network.draft_ids[logits.argmax(-1)] == target.argmax(-1)).flatten(0, 1))
        valid.append(inside.flatten(0, 1))
    a, g, mask = torch.cat(overlap), torch.cat(match).float(), torch.cat(valid)  # [blocks, K]
    count = mask.sum(0).clamp(min=1)
    return {
        "acceptance": ((a * mask).sum(0) / count).tolist(),
        "greedy_match": ((g * mask).sum(0) / count).tolist(),
        "tokens_per_forward": 1 + float((a * mask).cumprod(1).sum(1).mean()),
        "greedy_tokens_per_forward": 1 + float((g * mask).cumprod(1).sum(1).mean()),
    }


def hidden_states(
    model: PreTrainedModel, data: Conversations, path: Path, progress: Progress
) -> np.ndarray:
    """The lm head's input at every position, f16 [N, S, d], from `path` or computed into it.

    An interrupted computation continues where it stopped: rows go in order of length, and
    PATH.progress counts the batches that PATH.partial holds.
    """
    shape = (*data.tokens.shape, model.config.hidden_size)
    if not path.exists():
        partial, marker = (
            path.with_name(path.name + ".partial"),
            path.with_name(path.name + ".progress"),
        )
        done = int(marker.read_text()) if marker.exists() and partial.exists() else 0
        mode = "r+" if done else "w+"
        store = np.lib.format.open_memmap(partial, mode=mode, dtype=np.float16, shape=shape)
        batches = data.length.argsort(stable=True).split(HIDDEN_BATCH)
        task = progress.add_task("hidden states", total=len(batches), completed=done)
        for number, rows in enumerate(batches[done:], done + 1):
            S = int(data.length[rows].max())
            with torch.inference_mode():
                out = model.base_model(data.tokens[rows, :S], use_cache=False).last_hidden_state
            store[rows.numpy(), :S] = out.half().numpy()
            store.flush()
            write_atomically(marker, str(number).encode())
            progress.update(task, completed=number)
        os.replace(partial, path)
        marker.unlink()
    hidden = np.load(path, mmap_mode="r", allow_pickle=False)
    if hidden.shape != shape:
        raise ValueError(f"hidden states in {path} must be {shape}, got {hidden.shape}; delete it")
    return hidden


class Trainer:
    """AdamW with warmup, cosine and clipping; a checkpoint continues with the very same losses.

    Args:
        network: trained in place.
        data, teacher: what to learn, and from whom.
        recipe: everything else.

    Example:
        >>> trainer = Trainer(network, data, teacher, Recipe(steps=100))
        >>> while trainer.step < 100:
        ...     loss = trainer.train_step()
    """

    def __init__(
        self, network: BlockDiffusionNetwork, data: Conversations, teacher: Teacher, recipe: Recipe
    ) -> None:
        self.network, self.data, self.teacher, self.recipe = network, data, teacher, recipe
        self.train_rows, self.held_rows = split(len(data.length), recipe.held_out, recipe.seed)
        matrices = [p for p in network.parameters() if p.ndim > 1]
        others = [p for p in network.parameters() if p.ndim <= 1]
        groups: list[dict] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.step = 0

    def train_step(self) -> float:
        """One optimiser step; returns its loss."""
        recipe, step = self.recipe, self.step
        share = step / recipe.steps
        warm = min(1.0, (step + 1) / max(1, recipe.warmup * recipe.steps))
        rate = recipe.learning_rate * warm * (1 + math.cos(math.pi * share)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        variation = VARIATION_WEIGHT * max(0.0, (share - VARIATION_FROM) / (1 - VARIATION_FROM))
        rows = batch_rows(self.train_rows, self.data.length, recipe, step)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        loss = step_loss(
            self.network, self.data, self.teacher, rows, recipe.anchors, generator, variation
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def held_out_loss(self, conversations: int = 16) -> float:
        """Distillation loss (cross-entropy) on fixed blocks of held-out conversations."""
        rows = self.held_rows[:conversations]
        losses = []
        for part in rows[self.data.length[rows].argsort()].split(4):
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                loss = step_loss(self.network, self.data, self.teacher, part, 16, generator)
            losses.append(loss.item())
        return sum(losses) / len(losses)

    def save(self, path: Path) -> None:
        """Write weights and optimiser state to one safetensors file, atomically."""
        tensors = {f"network.{k}": v.detach() for k, v in self.network.named_parameters()}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        recipe = json.dumps(asdict(self.recipe))
        write_atomically(path, save(tensors, {"step": str(self.step), "recipe": recipe}))

    def resume(self, path: Path) -> None:
        """Continue from `save`.

        Raises:
            ValueError: the checkpoint was made with another recipe or another network.
        """
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if json.loads(metadata["recipe"]) != asdict(self.recipe):
            raise ValueError(
                f"{path} was made with {metadata['recipe']}, not with "
                f"{json.dumps(asdict(self.recipe))}: repeat its options, or use another folder"
            )
        for name, parameter in self.network.named_parameters():
            saved = tensors.get(f"network.{name}")
            if saved is None or saved.shape != parameter.shape:
                raise ValueError(
                    f"{path} is of another network, {name} differs: use another folder"
                )
            parameter.data.copy_(saved)
            self.optimizer.state[parameter] = {
                key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step = int(metadata["step"])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    target: Annotated[Path, typer.Option(help="Folder of the target, a Hugging Face model.")],
    data: Annotated[Path, typer.Option(help="Conversations (.npz), see data/README.md.")],
    out: Annotated[Path, typer.Option(help="Folder for the drafter and its checkpoint.")],
    hidden: Annotated[
        Path | None, typer.Option(help="Cache of hidden states; default: inside OUT.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of the whole run.")] = Recipe.steps,
    minutes: Annotated[float, typer.Option(help="Stop after this long; rerun to go on.")] = 60,
    batch: Annotated[int, typer.Option(help="Conversations per step.")] = Recipe.batch,
    anchors: Annotated[int, typer.Option(help="Blocks per conversation.")] = Recipe.anchors,
    learning_rate: Annotated[float, typer.Option(help="Peak.")] = Recipe.learning_rate,
    seed: Annotated[int, typer.Option(help="Of weights, split and batches.")] = Recipe.seed,
    block: Annotated[int, typer.Option(help="K, the longest draft.")] = BlockDiffusionConfig.block,
    draft_vocab: Annotated[int, typer.Option(help="Tokens that can be drafted.")] = 8192,
    hidden_size: Annotated[int, typer.Option(help="Width of the drafter.")] = 576,
    layers: Annotated[int, typer.Option(help="Layers of the drafter.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train a block-diffusion drafter for a target, or continue an interrupted training."""
    began = time.monotonic()
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    conversations = load_conversations(data)
    model = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, use_safetensors=True, local_files_only=True
    ).eval()
    vocab_size, target_size = model.get_input_embeddings().weight.shape
    eos = model.config.eos_token_id
    always = eos if isinstance(eos, list) else [eos]
    draft_ids = frequent_ids(conversations, draft_vocab, vocab_size, always)
    config = BlockDiffusionConfig(
        target_vocab_size=vocab_size,
        target_hidden_size=target_size,
        draft_vocab_size=draft_vocab,
        hidden_size=hidden_size,
        layers=layers,
        heads=hidden_size // 64,
        intermediate_size=round(hidden_size * 8 / 3),
        block=block,
    )
    recipe = Recipe(
        steps=steps, batch=batch, anchors=anchors, learning_rate=learning_rate, seed=seed
    )
    console = Console()
    checkpoint = out / "checkpoint.safetensors"
    with Progress(console=console) as progress:
        cache = hidden or out / "hidden.npy"
        teacher = Teacher(model, hidden_states(model, conversations, cache, progress), draft_ids)
        network = BlockDiffusionNetwork(config, draft_ids)
        network.initialise(teacher.embedding, torch.Generator().manual_seed(seed))
        trainer = Trainer(network, conversations, teacher, recipe)
        if checkpoint.exists():
            trainer.resume(checkpoint)
            console.print(f"continuing at step {trainer.step}")
        else:
            fit_linear(network, conversations, teacher, trainer.train_rows)
            console.print(f"linear start: held-out loss {trainer.held_out_loss():.4f}")
        task = progress.add_task("training", total=steps, completed=trainer.step)
        recent: list[float] = []
        while trainer.step < steps and time.monotonic() - began < 60 * minutes:
            recent.append(trainer.train_step())
            progress.update(task, completed=trainer.step)
            if trainer.step % 50 == 0:
                mean, recent = sum(recent) / len(recent), []
                console.print(f"step {trainer.step}  loss {mean:.4f}")
            if trainer.step % 200 == 0:
                trainer.save(checkpoint)
                console.print(f"held-out loss {trainer.held_out_loss():.4f}")
        trainer.save(checkpoint)
    network.save(out)
    figures = evaluate(network, conversations, teacher, trainer.held_rows)
    write_atomically(out / "evaluation.json", (json.dumps(figures, indent=2) + "\n").encode())
    console.print_json(json.dumps(figures))


if __name__ == "__main__":
    app()
