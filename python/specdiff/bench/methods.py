"""Decoding methods to compare: those of specdiff and those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specdiff_kernels import RULES

from ..download import MODELS, target_folder
from ..drafters import SHIPPED, drafter_folder, load_drafter
from ..loop.decoder import Decoder
from ..loop.sampling import Sampling
from ..loop.session import LOOK_EVERY
from ..loop.stats import Stats
from ..loop.target import Target
from ..models import encode, load_causal
from ..planning.costs import PROMPTS, measure
from ..planning.planner import Planner

AUTO = "auto"
PLAIN = "plain"
THEIRS = ("transformers", "assisted", "transformers-lookup")
OWN = (PLAIN, "plain-compiled", "plain-captured")
DRAFTERS = (*SHIPPED, "prompt-lookup")
STEPLESS = ("prompt-lookup", "parallel", "eagle")  # drafters without reverse steps
EXACT = tuple(rule for rule in RULES if rule != "lenient")

# (prompts, number of new tokens, seed) -> new tokens of each row, and counts
Decode = Callable[..., tuple[list[list[int]], Stats]]


@dataclass(frozen=True)
class Method:
    """A decoding method.

    Attributes:
        name: one of OWN or THEIRS, or a drafter for `specdiff.drafters.load_drafter`.
        k: draft length; "auto": chosen in each round; None: the drafter's default, if it drafts.
        steps: reverse steps of a diffusion drafter; "auto" together with k; None: its default.
        rule: rule of `specdiff_kernels.verify`; None: `Sampling.rule`.
        model: folder of the assistant model of "assisted".
        tree: nodes of a tree that each draft is; None: drafts are chains.

    Example:
        >>> parse("block-diffusion,k=4,steps=2")
        Method(name='block-diffusion', k=4, steps=2, rule=None, model=None, tree=None)
    """

    name: str
    k: int | str | None = None
    steps: int | str | None = None
    rule: str | None = None
    model: str | None = None
    tree: int | None = None

    @property
    def drafts(self) -> bool:
        return self.name not in (*OWN, "transformers")

    def rule_for(self, sampling: Sampling) -> str | None:
        """The rule that judges its drafts; None: specdiff judges none."""
        if self.name in (*OWN, *THEIRS):
            return None
        return self.rule or (sampling.rule if self.tree is None else "token")

    @property
    def label(self) -> str:
        name = Path(self.name).name
        return name if self.tree is None else f"{name} tree {self.tree}"


def parse(text: str) -> Method:
    """Parse a method from NAME[,k=..][,steps=..][,rule=..][,model=..][,tree=..].

    Raises:
        ValueError: an option is unknown, out of its range, or belongs to another method.
    """
    name, *options = text.split(",")
    given: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in ("k", "steps", "rule", "model", "tree") or not value:
            raise ValueError(
                f"--method {text!r}: expected options k=, steps=, rule=, model= or tree=, got "
                f"{option!r}; each method has a --method of its own"
            )
        if key == "tree" or (key in ("k", "steps") and value != AUTO):
            if not value.isdecimal() or int(value) < 1:
                allowed = "at least 1" if key == "tree" else "auto or at least 1"
                raise ValueError(f"--method {text!r}: {key} must be {allowed}, got {value}")
            given[key] = int(value)
        else:
            given[key] = value
    method = Method(name, **given)
    if not name:
        raise ValueError(f"--method {text!r}: expected a name, then options")
    if given and not method.drafts:
        raise ValueError(f"--method {text!r}: plain decoding takes no options")
    if method.rule not in (None, *EXACT):
        raise ValueError(
            f"--method {text!r}: rule must be one of {', '.join(EXACT)}, got {method.rule!r}"
        )
    if (method.model is not None) != (name == "assisted"):
        raise ValueError(f"--method {text!r}: model=FOLDER is for 'assisted', and only for it")
    if method.tree is not None and method.k == AUTO:
        raise ValueError(f"--method {text!r}: a tree needs a number k, or none")
    if name in THEIRS and (method.rule or method.steps or method.tree or method.k == AUTO):
        raise ValueError(f"--method {text!r}: transformers' methods take only a number k")
    return method if method.k is None else planned(method)


def check_method(
    method: Method,
    option: str = "--method",
    names: Sequence[str] = (*OWN, *THEIRS, *DRAFTERS),
) -> None:
    """Raise ValueError for a method that no target can be decoded with. Nothing is loaded.

    Args:
        option: option of the command line that the message names.
        names: names that are allowed besides a drafter's folder.
    """
    folders = [] if method.name in names else [drafter_folder(method.name)]
    if method.model is not None and method.model not in MODELS:
        folders.append(Path(method.model))
    for folder in folders:
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"{option} {str(folder)!r}: expected {', '.join(names)}, or a folder with a "
                "drafter's config.json and safetensors weights"
            )
    if isinstance(method.steps, int) and method.name in STEPLESS:
        raise ValueError(
            f"{option} {method.name!r} has no reverse steps, got {method.steps}: leave them out"
        )


def check_labels(named: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError if two of these (label, folder) pairs have the same label."""
    known: dict[str, str] = {}
    for label, folder in named:
        other = known.setdefault(label, folder)
        if Path(other) != Path(folder):
            raise ValueError(
                f"{other} and {folder} would both be called {label!r} in the results: rename or "
                "link one of the folders, or measure each in its own run with its own --name"
            )


def planned(method: Method) -> Method:
    """Return the method unless it lets the planner choose T but not K. The planner chooses both.

    Raises:
        ValueError: steps is "auto", but k is not.
    """
    if method.steps == AUTO and method.k != AUTO:
        raise ValueError(
            f"steps=auto of {method.label!r} needs k=auto, got k={method.k}: the planner chooses "
            "both, so give a number of steps or k=auto"
        )
    return method


def spread(methods: Sequence[Method], ks: Sequence[Any], steps: Sequence[Any]) -> list[Method]:
    """Combine every drafting method without K or T with each of `ks` and `steps`.

    Raises:
        ValueError: two methods would have the same label, or one has steps=auto without k=auto.
    """
    result: list[Method] = []
    for method in methods:
        own_k = method.k is not None or not ks or not method.drafts or method.tree is not None
        taken = [method] if own_k else [replace(method, k=k) for k in ks]
        for one in taken:
            own_steps = one.steps is not None or not steps or not one.drafts
            own_steps = own_steps or one.name in (*THEIRS, *STEPLESS)
            result += [one] if own_steps else [replace(one, steps=T) for T in steps]
    check_labels((method.label, method.model or method.name) for method in result)
    return [planned(method) for method in dict.fromkeys(result)]


class Models:
    """A target, as a `Target` and as transformers' unmodified model. Both are loaded on first use.

    Args:
        name: a known model's name or a folder.
        dtype: dtype of the weights.
        device: device to run on.
        accelerated: whether the `Target` has accelerated linear layers, on a CPU.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        accelerated: bool = True,
    ) -> None:
        self.name, self.dtype, self.device = name, dtype, device
        self.target = Target.load(name, dtype=dtype, device=device, accelerate=accelerated)
        self.tokenizer: Any = self.target.tokenizer
        self._untouched: Any = None

    @property
    def label(self) -> str:
        return Path(self.name).name

    @property
    def untouched(self) -> Any:
        """The model as loaded by transformers, a second copy, as `Target` changes attention."""
        if self._untouched is None:
            self._untouched = load_untouched(self.name, self)
        return self._untouched

    def costs_prompts(self) -> list[list[int]]:
        return [encode(self.tokenizer, text) for text in PROMPTS]


def load_untouched(name: str, models: Models) -> Any:
    """A model as loaded by transformers, with the dtype and device of `models`."""
    model: Any = load_causal(target_folder(name), models.dtype)
    return model.to(models.device)


def make(method: Method, models: Models, sampling: Sampling, batch: int) -> Decode:
    """Prepare a method.

    Raises:
        ValueError: the method is impossible here; the message says why.
    """
    if method.name in THEIRS:
        return theirs(method, models, sampling)
    if method.name in OWN:
        return plain(method.name, models, sampling)
    steps = method.steps if isinstance(method.steps, int) else None
    drafter = load_drafter(method.name, models.target, steps=steps)
    decoder = Decoder(models.target, drafter, rule=method.rule_for(sampling) or "token")
    k: Any = method.k
    if method.tree is not None:
        return ours(decoder.replace(k=k or drafter.most, tree=method.tree), sampling)
    if k == AUTO:
        found = measure(decoder, models.costs_prompts(), batch=batch, sampling=sampling)
        k = Planner(found, steps=None if method.steps in (None, AUTO) else (steps or 1,))
    return ours(decoder.replace(k=k), sampling)


def plain(name: str, models: Models, sampling: Sampling) -> Decode:
    """specdiff's loop without a drafter."""
    if name == "plain-captured":
        if models.device.type != "cuda":
            raise ValueError("plain-captured replays CUDA graphs and needs a GPU")
        return ours(Decoder(models.target), sampling, capture=True, look_every=LOOK_EVERY)
    if name == "plain-compiled":
        if models.device.type != "cuda":
            raise ValueError("plain-compiled is measured on a GPU only")
        return ours(Decoder(Target(models.target.model, compile=True)), sampling)
    return ours(Decoder(models.target), sampling)


def ours(decoder: Decoder, sampling: Sampling, **options: Any) -> Decode:
    """specdiff's loop. Options are those of `Decoder.open`; a call may override them."""

    def decode(
        prompts: list[list[int]], tokens: int, seed: int, **more: Any
    ) -> tuple[list[list[int]], Stats]:
        run = decoder.generate(
            prompts, max_new_tokens=tokens, sampling=sampling, seed=seed, **{**options, **more}
        )
        return run.new_tokens, run.stats

    return decode


def theirs(method: Method, models: Models, sampling: Sampling) -> Decode:
    """transformers' `generate`: plain, assisted or with prompt lookup."""
    model = models.untouched
    how: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    if method.name == "assisted":
        assistant = load_untouched(str(method.model), models)
        if method.k is not None:
            assistant.generation_config.num_assistant_tokens = method.k
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
        how["assistant_model"] = assistant
    elif method.name == "transformers-lookup":
        how["prompt_lookup_num_tokens"] = method.k or 10
    ends = model.generation_config.eos_token_id

    def decode(prompts: list[list[int]], tokens: int, seed: int) -> tuple[list[list[int]], Stats]:
        longest = max(map(len, prompts))
        if len(prompts) > 1 and method.name != "transformers":
            raise ValueError(f"{method.name} decodes one sequence at a time")
        torch.manual_seed(seed)
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=models.device)
        seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        pad = ends[0] if isinstance(ends, list) else ends
        stats = Stats()
        with counting(model, stats):
            out = model.generate(
                ids, attention_mask=seen.to(ids.device), max_new_tokens=tokens,
                pad_token_id=0 if pad is None else pad, **how,
            )  # fmt: skip
        new = [until(row[longest:].tolist(), ends) for row in out]
        stats.tokens, stats.row_forwards = sum(map(len, new)), stats.target_forwards * len(new)
        return new, stats

    return decode


@contextmanager
def counting(model: torch.nn.Module, stats: Stats) -> Iterator[None]:
    """Count a model's forwards, including the one that reads the prompt."""

    def count(*_: Any) -> None:
        stats.target_forwards += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def until(tokens: list[int], ends: Any) -> list[int]:
    """Tokens up to and including the first that ends the row. The rest is padding."""
    stops = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    at = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: at + 1]
