"""Samples conversations from a target, to distil a drafter from (`specdiff sample-target`).

The prompt, temperature and seed of conversation i depend only on i and the run's seed. Within a
part (one file) the batch stays full: new rows are admitted as soon as others are seen to have
finished, adjacent rows in one prefill. Parts are sampled one by one, each in its own session. The
bits of a part therefore do not depend on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle, groupby, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from ..files import digest, keep_settings, model_digest, read_lines, write_atomically
from ..loop.decoder import Decoder
from ..loop.sampling import Sampling
from ..loop.session import Session
from .conversations import read_part
from .corpora import NAMES, progress_bar, read_texts, tokenizer_digest
from .held_out import is_held_out

WAVES = 16  # maximum number of batches in a part
ENOUGH = 2048  # conversations, at which a part has fewer batches
ATTEMPTS = 100  # to get a usable message or passage
LEAST_WORDS = 3  # in a message written by the target
INSTRUCTIONS = (
    "Continue this text:\n\n{}",
    "Write the next paragraph.\n\n{}",
    "Summarize this passage in a few sentences:\n\n{}",
    "What is this about?\n\n{}",
    "Correct any mistakes in the following:\n\n{}",
)
SHORTEST_PASSAGE = 16  # words
WORD = r"\S{1,40}\s*"
MARK = "THE-WORDS-OF-THE-USER"


@dataclass(frozen=True)
class SamplePlan:
    """Settings that determine the conversations.

    Args:
        prompts: "self": the target also writes the user's message (Magpie, 2406.08464). Or a file
            with one prompt per line. Or a corpus or folder for `read_texts`, whose passages are to
            be continued, summarised or corrected. Prompts of the benchmarks
            (`specdiff.training.held_out`) are never used: another is drawn, and a file with one is
            refused.
        max_length: maximum tokens of prompt and answer. Prompts from "self" or a corpus have at
            most half of them.
        temperatures: conversation i has temperatures[i modulo their number]; 0 is greedy.
        seed: seed of the run.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> SamplePlan(temperatures=(1.0, 0.7, 0.0), max_length=400)
    """

    prompts: str = "self"
    max_length: int = 512
    temperatures: tuple[float, ...] = (1.0,)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise ValueError(f"max_length must be at least 4, got {self.max_length}")
        if not self.temperatures:
            raise ValueError("temperatures must hold at least one number, got none")
        for temperature in self.temperatures:
            Sampling(temperature)  # raises ValueError if it is out of range

    def temperature(self, i: int) -> float:
        return self.temperatures[i % len(self.temperatures)]


class Totals(NamedTuple):
    """Counts and time of a run."""

    conversations: int  # sampled in this run, without those already there
    answer_tokens: int  # in these conversations
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.answer_tokens / self.seconds if self.seconds else 0.0


class UserTurn(NamedTuple):
    """Tokens around a user's message in a chat template."""

    before: list[int]  # token ids before the message
    end: int  # the special token after it


class Job(NamedTuple):
    """Task of a session's row."""

    conversation: int
    attempt: int | None  # number of the attempt at a message; None: the answer
    prompt: list[int]


def draw(seed: int, index: int, what: str, attempt: int = 0) -> int:
    """64 random bits for one purpose in one conversation, the same on every machine.

    The answer of conversation i is sampled with `draw(seed, i, "answer")`.

    Args:
        seed: the run's seed.
        index: index of the conversation, counted from 0 over all parts.
        what: "answer", "message" or "passage".
        attempt: number of the attempt at a message or passage.

    Returns:
        an int in [0, 2^64).

    Example:
        >>> decoder.generate(prompt, sampling=Sampling(1.0), seed=draw(0, 7, "answer"))
    """
    said = f"{seed} {index} {what} {attempt}".encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")


def sample_conversations(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    conversations: int,
    plan: SamplePlan | None = None,
    *,
    first: int = 0,
    batch: int = 16,
) -> Totals:
    """Sample conversations first, ..., first + conversations - 1 from a target into a folder.

    Answers are sampled from the target's distribution, without top-k and top-p, until the target
    ends them or max_length is reached. The files part-<first index>.npz have `part_size(batch)`
    conversations each, in the format of data/README.md, for `load_conversations`. A file appears
    when it is complete. After an interruption, the same call samples the missing files. On one
    machine the result equals an uninterrupted run's, byte for byte. Other ranges can be sampled
    elsewhere and their files put into the same folder.

    A conversation does not depend on the others in its batch, except by rounding in the model: in
    another batch or on another machine, a token may differ if two were about equally likely.

    Args:
        decoder: a decoder of the target, without a drafter.
        tokenizer: the target's tokenizer.
        out: output folder.
        conversations: number of conversations, at least 1.
        plan: prompts, temperatures and lengths; None: the defaults.
        first: index of the first conversation, a multiple of `part_size(batch)`.
        batch: rows decoded together.

    Returns:
        totals of the conversations sampled by this call.

    Raises:
        ValueError: an argument is out of range, the prompts are unusable or held out, the target
            writes no usable message, or `out` was made with another target, plan or batch.
        DistributionError: the target's logits define no distribution.
        KeyboardInterrupt: Ctrl-C was pressed. The files that are complete stay.

    Example:
        >>> sample_conversations(Decoder(Target(model)), tokenizer, "samples", 2000)
    """
    plan = plan or SamplePlan()
    check_arguments(decoder, plan, conversations, first, batch)
    sampler = Sampler(decoder, tokenizer, plan, batch)
    texts = sampler.texts(first)
    keep_settings(Path(out), sampler.settings())
    try:
        return sample_missing(sampler, texts, Path(out), range(first, first + conversations))
    except KeyboardInterrupt:
        said = f"stopped; the same command goes on with the first part that {out} lacks"
        Console(stderr=True).print(said, markup=False, soft_wrap=True)
        raise


def part_size(batch: int) -> int:
    """Conversations in a part: 16 batches, or fewer if these already make 2048 conversations.

    A killed run loses at most one part. The batch runs empty at the end of each part.

    Example:
        >>> [part_size(batch) for batch in (16, 128, 500, 4096)]
        [256, 2048, 2500, 4096]
    """
    return batch * min(WAVES, -(-ENOUGH // batch))


def check_arguments(
    decoder: Decoder, plan: SamplePlan, conversations: int, first: int, batch: int
) -> None:
    if conversations < 1 or batch < 1:
        raise ValueError(
            f"conversations and batch must be at least 1, got {conversations} and {batch}"
        )
    if first < 0 or first % part_size(batch):
        raise ValueError(
            f"first must be a multiple of {part_size(batch)}, the size of a part with batch "
            f"{batch}, got {first}"
        )
    if decoder.drafter is not None:
        raise ValueError("decoder must have no drafter: conversations are sampled by the target")
    if plan.max_length > decoder.target.context_limit:
        raise ValueError(
            f"max_length must be at most {decoder.target.context_limit}, the target's context, got "
            f"{plan.max_length}"
        )


def sample_missing(
    sampler: Sampler, texts: Iterator[str] | None, out: Path, indices: range
) -> Totals:
    """Write the missing parts of these conversations."""
    sampled = tokens = 0
    began = time.monotonic()
    size = part_size(sampler.batch)
    with progress_bar("conversations") as progress:
        task = progress.add_task("sampling", total=len(indices))
        for start in indices[::size]:
            part = range(start, min(start + size, indices.stop))
            mine = None if texts is None else list(islice(texts, len(part)))
            file = out / f"part-{start:08d}.npz"
            if conversations_in(file) >= len(part):
                progress.advance(task, len(part))
                continue
            arrays = sampler.part(part, mine, progress, task)
            write_atomically(file, npz(arrays))
            sampled += len(part)
            tokens += int((arrays["length"] - arrays["prompt_length"]).sum())
    return Totals(sampled, tokens, time.monotonic() - began)


class Sampler:
    """Samples parts in sessions of `batch` rows."""

    def __init__(
        self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, plan: SamplePlan, batch: int
    ) -> None:
        self.decoder, self.tokenizer, self.plan, self.batch = decoder, tokenizer, plan, batch
        self.room = plan.max_length // 2  # maximum prompt length in tokens
        self.own = plan.prompts == "self"
        self.captures = decoder.target.device.type == "cuda"
        self.turn = user_turn(tokenizer) if self.own else None
        if len(self.formatted(".")) >= self.room:
            raise ValueError(
                f"max_length must be above {2 * len(self.formatted('.'))}, twice the chat "
                f"template's length, got {plan.max_length}"
            )

    def settings(self) -> dict[str, Any]:
        """Settings that the bits of a part depend on."""
        plan = self.plan
        return {
            "target": model_digest(self.decoder.target.model),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "prompts": plan.prompts,
            "prompt_file": digest(Path(plan.prompts).read_bytes()) if self.is_file() else None,
            "max_length": plan.max_length,
            "temperatures": list(plan.temperatures),
            "seed": plan.seed,
            "batch": self.batch,
        }

    def texts(self, first: int) -> Iterator[str] | None:
        """Lines or documents for conversations from `first` on; None for prompts "self"."""
        source = self.plan.prompts
        if self.own:
            return None
        if not self.is_file():
            if source not in NAMES and not Path(source).is_dir():
                raise ValueError(
                    "prompts must be self, a file with a prompt on each line, a folder of "
                    f"documents, or one of {', '.join(NAMES)}, got {source!r}"
                )
            return islice(endless(source), first, None)
        numbered = enumerate(read_lines(Path(source)), 1)
        lines = {n: line for n, line in numbered if line.strip()}
        if not lines:
            raise ValueError(f"prompts: {source} is empty, expected one prompt per line")
        if held_out := [n for n, line in lines.items() if is_held_out(line)]:
            raise ValueError(
                f"prompts: {source} holds prompts that `specdiff bench` measures on, in line "
                f"{', '.join(map(str, held_out))}: remove them"
            )
        return islice(cycle(lines.values()), first % len(lines), None)

    def is_file(self) -> bool:
        return self.plan.prompts not in NAMES and Path(self.plan.prompts).is_file()

    def prompt(self, i: int, text: str) -> list[int]:
        """Token ids of conversation i's prompt, from its line or document."""
        if not self.is_file():
            return self.passage(i, text)
        ids = self.formatted(text)
        if len(ids) >= self.plan.max_length:
            raise ValueError(
                f"prompts: {text[:40]!r} has {len(ids)} tokens, and max_length = "
                f"{self.plan.max_length} leaves no room for an answer: shorten the prompt or raise "
                "max_length"
            )
        return ids

    def passage(self, i: int, text: str) -> list[int]:
        """A prompt with an instruction and some words of a document."""
        for attempt in range(ATTEMPTS):
            message, ids = self.asked(i, text, attempt)
            if not is_held_out(message):
                return ids
        raise ValueError(
            "prompts: `specdiff bench` measures on every passage of the document "
            f"{text.strip()[:40]!r}: remove the document"
        )

    def asked(self, i: int, text: str, attempt: int) -> tuple[str, list[int]]:
        """A message with words of a document, shortened to fit, and the prompt's token ids."""
        choose = random.Random(draw(self.plan.seed, i, "passage", attempt))
        instruction = choose.choice(INSTRUCTIONS) if self.tokenizer.chat_template else "{}"
        words = re.findall(WORD, text) or ["."]
        size = choose.randint(SHORTEST_PASSAGE, max(SHORTEST_PASSAGE, self.room // 2))
        start = choose.randrange(max(1, len(words) - size))
        while True:
            message = instruction.format("".join(words[start : start + size]).strip())
            ids = self.formatted(message)
            if len(ids) <= self.room or size == 1:
                return message, ids
            size = size * 3 // 4

    def formatted(self, text: str) -> list[int]:
        """Token ids of a message in the chat template, or as plain text if there is none."""
        if not self.tokenizer.chat_template:
            return self.tokenizer(text)["input_ids"]
        message = [{"role": "user", "content": text}]
        encoded: Any = self.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True
        )
        return encoded["input_ids"]

    def part(
        self, indices: range, texts: list[str] | None, progress: Progress, task: Any
    ) -> dict[str, np.ndarray]:
        """Conversations of these indices, from their lines or documents, as arrays."""
        session = self.open()
        if texts is None:
            waiting = deque(self.message(i, 0) for i in indices)
        else:
            pairs = zip(indices, texts, strict=True)
            waiting = deque(Job(i, None, self.prompt(i, text)) for i, text in pairs)
        places: list[Job | None] = [None] * self.batch
        finished: dict[int, tuple[list[int], int]] = {}
        while waiting or any(places):
            for b, row in enumerate(places):
                if row is None or not session.done[b]:
                    continue
                if row.attempt is not None:
                    waiting.appendleft(self.answer(row, session.texts[b]))
                else:
                    finished[row.conversation] = (session.texts[b], len(row.prompt))
                    progress.advance(task)
                places[b] = None
            free = [b for b, row in enumerate(places) if row is None][: len(waiting)]
            for run in adjacent(free):
                rows = [waiting.popleft() for _ in run]
                self.admit(session, run.start, rows)
                places[run.start : run.stop] = rows
            if any(places):
                session.step()
        return self.arrays(indices, finished)

    def open(self) -> Session:
        """A fresh session, whose rows end where a turn does, the user's or the target's."""
        target = self.decoder.target
        ends = set(target.stop_tokens)
        if self.turn is not None:
            ends.add(self.turn.end)
        return self.decoder.open(
            self.batch,
            self.plan.max_length,
            sampling=Sampling(1.0),
            stop_tokens=sorted(ends),
            capture=self.captures,
        )

    def admit(self, session: Session, first: int, rows: list[Job]) -> None:
        """Let the places of the session from `first` on begin with rows, in one prefill."""
        prompts = [row.prompt for row in rows]
        ends = [self.plan.max_length if row.attempt is None else self.room for row in rows]
        session.admit(
            prompts,
            first=first,
            max_new_tokens=[end - len(prompt) for end, prompt in zip(ends, prompts, strict=True)],
            seed=[self.seed(row) for row in rows],
            sampling=[Sampling(self.temperature(row)) for row in rows],
        )

    def seed(self, row: Job) -> int:
        what = "answer" if row.attempt is None else "message"
        return draw(self.plan.seed, row.conversation, what, row.attempt or 0)

    def temperature(self, row: Job) -> float:
        return self.plan.temperature(row.conversation) if row.attempt is None else 1.0

    def message(self, index: int, attempt: int) -> Job:
        """A row in which the target writes the user's message."""
        return Job(index, attempt, self.turn.before if self.turn else [])

    def answer(self, row: Job, tokens: list[int]) -> Job:
        """A row that answers a message if the message is usable, else another attempt at one.

        A message is usable if the target ended it, it has at least three words of letters or
        digits, it fits into half of max_length, and it is not held out. It is tokenised again, as
        if a user had typed it.
        """
        attempt = (row.attempt or 0) + 1
        if self.turn is not None and tokens[-1] == self.turn.end:
            new = tokens[len(row.prompt) :]
            said: Any = self.tokenizer.decode(new, skip_special_tokens=True)
            ids = self.formatted(said.strip())
            enough = len(re.findall(r"\w+", said)) >= LEAST_WORDS
            if enough and len(ids) <= self.room and not is_held_out(said):
                return Job(row.conversation, None, ids)
        if attempt == ATTEMPTS:
            raise ValueError(
                f"prompts 'self': in {ATTEMPTS} attempts the target wrote no message of "
                f"{LEAST_WORDS} words within {self.room} tokens that is not held out: raise "
                "max_length, or use a file of prompts, a folder or a corpus"
            )
        return self.message(row.conversation, attempt)

    def arrays(
        self, indices: range, finished: dict[int, tuple[list[int], int]]
    ) -> dict[str, np.ndarray]:
        """The arrays described in data/README.md."""
        vocabulary = self.decoder.target.vocab_size
        dtype = np.uint16 if vocabulary <= 1 << 16 else np.int32
        tokens = np.zeros((len(indices), self.plan.max_length), dtype)
        for n, i in enumerate(indices):
            text, _ = finished[i]
            tokens[n, : len(text)] = text
        return {
            "tokens": tokens,
            "prompt_length": np.array([finished[i][1] for i in indices], np.int32),
            "length": np.array([len(finished[i][0]) for i in indices], np.int32),
            "temperature": np.array([self.plan.temperature(i) for i in indices], np.float32),
        }


def adjacent(places: list[int]) -> Iterator[range]:
    """Group ascending rows into runs of adjacent rows.

    Example:
        >>> list(adjacent([0, 1, 2, 5, 7, 8]))
        [range(0, 3), range(5, 6), range(7, 9)]
    """
    for _, pairs in groupby(enumerate(places), lambda pair: pair[1] - pair[0]):
        run = [b for _, b in pairs]
        yield range(run[0], run[-1] + 1)


def user_turn(tokenizer: PreTrainedTokenizerBase) -> UserTurn:
    """The tokens that the chat template puts around a user's message.

    Raises:
        ValueError: there is no chat template, it changes the message, or no special token ends it.
    """
    way_out = "use a file of prompts, a folder or a corpus (--prompts)"
    if not tokenizer.chat_template:
        raise ValueError(f"prompts 'self' need a chat template, but there is none: {way_out}")
    message = [{"role": "user", "content": MARK}]
    text: Any = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(MARK)
    first, then = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (before, after))
    if not first or not then or MARK in after or then[0] not in tokenizer.all_special_ids:
        raise ValueError(
            "prompts 'self' need a chat template with text before a user's message and a special "
            f"token after it, got {text!r}: {way_out}"
        )
    return UserTurn(first, then[0])


def endless(source: str) -> Iterator[str]:
    """The documents of a corpus's training split, repeated forever."""
    texts = read_texts(source, "train")  # raises errors now
    return chain(texts, chain.from_iterable(read_texts(source, "train") for _ in repeat(None)))


def conversations_in(file: Path) -> int:
    """Number of conversations in a part's file; 0 if there is no file."""
    return len(read_part(file).length) if file.is_file() else 0


def npz(arrays: dict[str, Any]) -> bytes:
    """The bytes of an .npz file. They depend on the arrays only, as zip entries have no date."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()
