"""A decoder in the style of gpt-fast: speculative decoding of ragged batches.

It uses the Llama of llama.py and `specdiff_kernels`, and nothing else.

    python gpt_fast.py --model FOLDER --draft SMALLER --prompt "Once upon" --prompt "The sky is"
    python gpt_fast.py --model FOLDER --prompt-ids 1,2,3 --prompt-ids 4,5 --temperature 0.8

A folder is a Hugging Face checkpoint of type llama: config.json, *.safetensors, tokenizer.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from llama import DenseCache, Transformer, load
from tokenizers import Tokenizer
from torch import Tensor

from specdiff_kernels import (
    Draft,
    check_status,
    commit,
    row_distribution,
    sample,
    verify,
)


def prefill(model: Transformer, text: Tensor, longest: int) -> DenseCache:
    """Read the first `longest` columns of a text [B, S] into a cache with room for all S."""
    cache = DenseCache(model, *text.shape)
    positions = torch.arange(longest, device=text.device).expand(len(text), -1)
    model.hidden(text[:, :longest], positions, cache)
    return cache


class Drafter:
    """A smaller model that drafts token by token.

    Each token is recorded: `verify` gets the logits and the distribution that it was drawn from.
    """

    def __init__(self, model: Transformer, text: Tensor, longest: int) -> None:
        self.model, self.cache = model, prefill(model, text, longest)

    def draft(
        self, text: Tensor, lengths: Tensor, k: int, temperature: float, seed: Tensor, round: Tensor
    ) -> Draft:
        """Draft K tokens after text [B, S]. The cache has `lengths` [B] tokens, or one fewer."""
        # if the whole last draft was accepted, the model has not read its last token
        at = (lengths[:, None] + torch.tensor([-1, 0], device=text.device)).clamp(min=0)
        new, tokens, logits, distributions = text.gather(1, at), [], [], []
        for i in range(k):
            logits.append(self.model(new, at, self.cache)[:, -1])  # [B, V]
            distributions.append(row_distribution(logits[i], temperature))
            tokens.append(sample(logits[i], distributions[i], seed=seed, round=round, slot=i))
            # -1 if logits define no distribution; verify reports it
            new = tokens[i][:, None].clamp(min=0)
            at = lengths[:, None] + i + 1
        return Draft.sequential(torch.stack(tokens, 1), logits, distributions)


@torch.inference_mode()
def generate(
    target: Transformer,
    prompts: list[list[int]],
    new_tokens: int,
    *,
    draft_model: Transformer | None = None,
    k: int = 4,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[list[list[int]], float]:
    """Continue prompts of different lengths in one batch. Each text is as if decoded alone.

    Args:
        target: the model whose distribution the texts follow.
        prompts: token ids, at least one per prompt.
        new_tokens: maximum number of new tokens per prompt; fewer if a stop token comes first.
        draft_model: draft model with the same vocabulary; None: one token per forward.
        k: tokens drafted per round.
        temperature: 0 is greedy.
        seed: row b uses seed + b.

    Returns:
        prompt and new tokens of each row, and the tokens per target forward.

    Example:
        >>> generate(load(Path("llama")), [[1, 2, 3], [4, 5]], 8, draft_model=load(Path("tiny")))
    """
    device, B, longest = target.norm.weight.device, len(prompts), max(map(len, prompts))
    k = 0 if draft_model is None else k
    text = torch.zeros(B, longest + new_tokens + k + 1, dtype=torch.int64, device=device)
    for row, prompt in zip(text, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    cache = prefill(target, text, longest)
    drafter = None if draft_model is None else Drafter(draft_model, text, longest)
    # a cache holds all tokens of a row but the last, so all rounds are alike
    start = lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    limit, seeds, round = start + new_tokens, seed + torch.arange(B, device=device), start * 0
    finished = torch.zeros_like(start, dtype=torch.bool)
    stops = torch.tensor(target.config.stop_tokens, dtype=torch.int64, device=device)
    draft = Draft.guesses(text[:, :0])
    while not finished.all():
        if drafter is not None:
            draft = drafter.draft(text, lengths, k, temperature, seeds, round)
        tokens = torch.cat([text.gather(1, lengths[:, None]), draft.tokens.clamp(min=0)], 1)
        positions = lengths[:, None] + torch.arange(k + 1, device=device)  # [B, K + 1]
        logits = target(tokens, positions, cache)  # [B, K + 1, V]
        verified = verify(logits, draft, temperature, seed=seeds, round=round)
        check_status(verified.status.masked_fill(finished, 0), "sequence")
        text.scatter_(
            1, positions + 1, verified.emitted
        )  # entries after the new length are stale, as in the cache
        round += ~finished
        lengths, _, finished, _ = commit(
            lengths, verified.emitted, stop_tokens=stops, limit=limit, finished=finished
        )
    texts = [row[: n + 1] for row, n in zip(text.tolist(), lengths.tolist(), strict=True)]
    return texts, float((lengths - start).sum() / round.sum())


def token_ids(text: str) -> list[int]:
    return [int(token) for token in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--draft", type=Path, help="folder of a smaller model for drafting")
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated")
    parser.add_argument("--prompt-ids", action="append", default=[], type=token_ids)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--k", type=int, default=4, help="tokens drafted per round")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.prompt and not args.prompt_ids:
        parser.error("expected a --prompt or --prompt-ids")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    file = args.model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file)) if file.exists() else None
    if args.prompt and tokenizer is None:
        parser.error(f"--prompt needs {file}, which is missing: pass --prompt-ids instead")
    encoded = [tokenizer.encode(text).ids for text in args.prompt] if tokenizer else []
    texts, rate = generate(
        load(args.model, device),
        args.prompt_ids + encoded,
        args.new_tokens,
        draft_model=load(args.draft, device) if args.draft else None,
        k=args.k,
        temperature=args.temperature,
        seed=args.seed,
    )
    for text in texts:
        print(tokenizer.decode(text) if tokenizer else ",".join(map(str, text)))
    print(f"{rate:.2f} tokens per target forward")


if __name__ == "__main__":
    main()
