"""A small serving engine over a paged cache, with speculative decoding.

Requests are admitted, drafted, verified, committed, finished and replaced. Requests with a common
prefix share blocks.

    python paged_engine.py --model FOLDER --prompt-ids 1,2,3,4,5,6 --prompt-ids 1,2,3,4,9

Block tables, reference counts and free blocks are in a `specdiff_kernels.Pages` on the device. The
model is that of gpt_fast.py, with another cache.
"""

from __future__ import annotations

import argparse
from copy import copy
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from gpt_fast import token_ids
from llama import DenseCache, Transformer, load
from torch import Tensor

from specdiff_kernels import Draft, Pages, check_status, commit, verify


class PagedCache(DenseCache):
    """Keys and values [blocks + 1, block_size, H, D] of each layer, addressed by block tables.

    A table's -1 (no block) indexes the last block, which collects padding.
    """

    def __init__(self, model: Transformer, pages: Pages) -> None:
        c, self.pages = model.config, pages
        self.span = pages.tables.shape[1] * pages.block_size
        blocks = len(pages.references) + 1
        states = model.norm.weight.new_zeros(
            c.num_hidden_layers, 2, blocks, pages.block_size, c.num_key_value_heads, c.head_dim
        )
        self.layers = [tuple(layer) for layer in states]

    def row(self, b: int) -> PagedCache:
        """The same blocks, with the table of row b only."""
        row = copy(self)
        row.pages = self.pages._replace(tables=self.pages.tables[b : b + 1])
        return row

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        tables, size = self.pages.tables.long(), self.pages.block_size
        place = tables.gather(1, positions // size), positions % size  # each [B, Q]
        for pool, new in zip(self.layers[layer], (k, v), strict=True):
            pool[place] = new.transpose(1, 2)
        # a kernel for paged attention would read the pool directly; this gathers the rows
        keys, values = (pool[tables].flatten(1, 2).transpose(1, 2) for pool in self.layers[layer])
        return keys, values  # [B, H, span, D]


@dataclass
class Request:
    """A prompt, the number of new tokens wanted, and the text so far."""

    prompt: list[int]
    new_tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.text = list(self.prompt)
        # the cache holds all tokens but the last
        self.limit = len(self.prompt) - 1 + self.new_tokens


class Engine:
    """Decodes requests in a batch of `rows`. Each text is as if decoded alone.

    Args:
        model: the target.
        rows: maximum number of requests decoded together.
        blocks: number of blocks in the cache.
        block_size: positions per block.
        longest: maximum tokens of a request, prompt included.
        k: maximum tokens drafted per step.
        temperature: 0 is greedy.

    Example:
        >>> engine = Engine(model, rows=8, blocks=256, block_size=16, longest=512)
        >>> texts = engine.run([Request([1, 2, 3], new_tokens=64)])
    """

    def __init__(
        self,
        model: Transformer,
        *,
        rows: int,
        blocks: int,
        block_size: int,
        longest: int,
        k: int = 4,
        temperature: float = 0.0,
    ) -> None:
        self.model, self.k, self.temperature = model, k, temperature
        device = self.device = model.norm.weight.device
        columns = -(-(longest + k) // block_size)  # a forward may write k tokens of padding
        self.pages = Pages.empty(rows, columns, blocks, block_size, device)
        self.cache = PagedCache(model, self.pages)
        self.running: dict[int, Request] = {}  # row -> request
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths, self.limit, self.seed, self.round = (zeros.clone() for _ in range(4))
        self.finished = torch.ones_like(zeros, dtype=torch.bool)  # finished or free rows
        self.stops = torch.tensor(model.config.stop_tokens, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def run(self, requests: list[Request]) -> list[list[int]]:
        """Decode all requests, each as soon as there is room. -> texts

        Raises:
            ValueError: a request does not fit even an empty engine.
        """
        waiting = list(requests)
        while waiting or self.running:
            for b in range(len(self.finished)):
                if waiting and b not in self.running and self.admit(b, waiting[0]):
                    waiting.pop(0)
            if not self.running:
                raise ValueError(
                    f"requests: one of {waiting[0].limit + 1} tokens does not fit an engine of "
                    f"{len(self.pages.references)} blocks of {self.pages.block_size}, at most "
                    f"{self.pages.tables.shape[1]} in a row: use more blocks or a larger `longest`"
                )
            self.step()
        return [request.text for request in requests]

    def admit(self, b: int, request: Request) -> bool:
        """Read a prompt into row b, except a prefix shared with a running row. False: no room."""
        size, tables = self.pages.block_size, self.pages.tables
        prefixes = [(place, alike(other.text[:-1], request.prompt[:-1]))
                    for place, other in self.running.items()]  # fmt: skip
        source, prefix = max(prefixes, key=itemgetter(1), default=(b, 0))
        # reserve room for every row to grow to its limit
        growth = (-(-self.limit // size) - (tables >= 0).sum(1)).masked_fill(self.finished, 0)
        needed = -(-request.limit // size) - prefix // size + int(growth.sum())
        if request.limit + self.k > self.cache.span or needed > int(self.pages.available):
            return False
        start, end = self.pages.share(source, b, prefix), len(request.prompt)
        only = torch.arange(len(tables), device=self.device) == b
        self.pages.reserve(only * end)
        prompt = torch.tensor([request.prompt[start:]], device=self.device)
        positions = torch.arange(start, end, device=self.device)[None]
        self.model.hidden(prompt, positions, self.cache.row(b))
        self.lengths[b], self.limit[b], self.seed[b] = end - 1, request.limit, request.seed
        self.round[b], self.finished[b] = 0, False
        self.running[b] = request
        return True

    def step(self) -> None:
        """Draft, run one forward over K + 1 tokens per row, verify, commit."""
        last, draft = self.draft()
        positions = self.lengths[:, None] + torch.arange(self.k + 1, device=self.device)
        ahead = torch.minimum(self.lengths + self.k + 1, self.limit)
        # `admit` ensured that there are enough blocks
        self.pages.reserve(ahead.masked_fill(self.finished, 0))
        tokens = torch.cat([last, draft.tokens], 1)  # [B, K + 1]
        logits = self.model(tokens, positions, self.cache)  # [B, K + 1, V]
        verified = verify(logits, draft, self.temperature, seed=self.seed, round=self.round)
        check_status(verified.status.masked_fill(self.finished, 0), "row")
        self.lengths, kept, self.finished, _ = commit(
            self.lengths, verified.emitted,
            stop_tokens=self.stops, limit=self.limit, finished=self.finished,
            pages=self.pages, release=True,
        )  # fmt: skip
        self.round += 1
        new, counts, over = verified.emitted.tolist(), kept.tolist(), self.finished.tolist()
        for b, request in list(self.running.items()):
            request.text += new[b][: counts[b]]
            if over[b]:
                del self.running[b]

    def draft(self) -> tuple[Tensor, Draft]:
        """Last tokens [B, 1], and a one-hot draft of the next tokens, without distributions."""
        B = len(self.finished)
        tokens = torch.zeros(B, 1 + self.k, dtype=torch.int64)
        lengths = torch.zeros(B, dtype=torch.int64)
        for b, request in self.running.items():
            known = request.text[-1:] + look_up(request.text, self.k)
            tokens[b, : len(known)], lengths[b] = torch.tensor(known), len(known) - 1
        last, guesses = tokens.to(self.device).split([1, self.k], 1)
        return last, Draft.guesses(guesses, lengths.to(self.device))


def alike(a: list[int], b: list[int]) -> int:
    """Length of the common prefix of two texts."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def look_up(text: list[int], k: int) -> list[int]:
    """Up to k tokens after the last earlier occurrence of the text's last two tokens."""
    for end in range(len(text) - 1, 1, -1):
        if text[end - 2 : end] == text[-2:]:
            return text[end : end + k]
    return []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--prompt-ids", action="append", required=True, type=token_ids)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=2, help="requests decoded together")
    parser.add_argument("--blocks", type=int, default=64)
    args = parser.parse_args()
    requests = [Request(prompt, args.new_tokens) for prompt in args.prompt_ids]
    longest = max(request.limit + 1 for request in requests)
    model = load(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(model, rows=args.rows, blocks=args.blocks, block_size=16, longest=longest)
    for text in engine.run(requests):
        print(",".join(map(str, text)))
    print(f"{int(engine.pages.available)} of {args.blocks} blocks are free")


if __name__ == "__main__":
    main()
