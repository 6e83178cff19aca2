"""Common mistakes, and the message that each is answered with: a row of a table each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from specdiff_kernels import (
    BackendError,
    Draft,
    Lenience,
    PackedWeight,
    Pages,
    Reveal,
    Verified,
    available_backends,
    cached_attention,
    check_lenience,
    check_status,
    choose_record,
    commit,
    denoise_step,
    pack_weight,
    row_distribution,
    row_divergence,
    row_seeds,
    sample,
    skinny_linear,
    use_backend,
    verify,
    workspace_size,
)

from .helpers import assert_named, each_mistake, i64

B, K, V = 2, 3, 9
KEY = {"seed": 7, "round": 0}
TARGET, POOL = torch.zeros(B, K + 1, V), torch.zeros(B * K, V)
ROWS = row_distribution(POOL)
GUESSES = Draft.guesses(torch.zeros(B, K, dtype=torch.int64))
RECORDED = GUESSES._replace(logits=POOL, distribution=ROWS)
MASKED = Draft.masked(B, K, POOL)
TOKENS = torch.ones(B, K, dtype=torch.int64)
LENGTHS = i64(5, 5)
STEPS = [POOL[:B]] * K
OF_STEPS = [row_distribution(rows) for rows in STEPS]


def verifying(**change: Any) -> Callable[[], Any]:
    return lambda: verify(**{"target_logits": TARGET, "draft": GUESSES} | KEY | change)


def sampling(**change: Any) -> Callable[[], Any]:
    return lambda: sample(**{"logits": POOL, "distribution": ROWS} | KEY | change)


def denoising(**change: Any) -> Callable[[], Any]:
    return lambda: denoise_step(
        **{"draft": MASKED, "reveal": Reveal.all(), "step": 0} | KEY | change
    )


def committing(**change: Any) -> Callable[[], Any]:
    return lambda: commit(**{"lengths": LENGTHS, "emitted": TOKENS} | change)


def attending(**change: Any) -> Callable[[], Any]:
    query, cache = torch.zeros(B, K, 4, 8), torch.zeros(B, 2, 12, 8)
    good = {"query": query, "keys": cache, "values": cache, "lengths": LENGTHS}
    return lambda: cached_attention(**good | change)


def sequential(**change: Any) -> Callable[[], Any]:
    good = {"tokens": TOKENS, "logits": STEPS, "distributions": OF_STEPS}
    return lambda: Draft.sequential(**good | change)


def a_backend(name: Any) -> Callable[[], Any]:
    def use() -> None:
        with use_backend(name):
            pass

    return use


def pages(held: int = 0) -> Pages:
    """Of rows of up to 4 blocks of 16 positions; row 0 holds some."""
    pages = Pages.empty(2, 4, 8, 16)
    pages.reserve(i64(16 * held, 0))
    return pages


SHAPES = {
    "target_logits: expected shape [B, K+1=4, V], got [2, 3, 9]; it needs a row for each of the "
    "draft's K=3 tokens, and one more for the token behind them": verifying(
        target_logits=TARGET[:, :K]
    ),
    "target_logits: expected shape [B, K+1, V] with K >= 0, got [4, 9]": verifying(
        target_logits=TARGET[0]
    ),
    "draft.tokens: expected shape [B, K], got [6]": verifying(
        draft=GUESSES._replace(tokens=i64(*[0] * 6))
    ),
    "draft.tau: expected shape [B=2, K=3], got [2, 2]": verifying(
        draft=GUESSES._replace(tau=GUESSES.tau[:, :2])
    ),
    "draft.logits: expected shape [R, Vd], got [9]": verifying(
        draft=RECORDED._replace(logits=POOL[0])
    ),
    "draft.logits: expected shape [R=6, Vd=9], got [6, 5]; a draft over some of the target's "
    "tokens names them in draft_ids, and columns that are no tokens are left out by a view, "
    "logits[:, :V]": verifying(draft=RECORDED._replace(logits=POOL[:, :5])),
    "draft.logits: expected shape [R=6, Vd=5], got [6, 9]; a draft over some": verifying(
        draft=RECORDED._replace(draft_ids=torch.arange(5))
    ),
    "draft.draft_ids: expected shape [Vd], got [1, 9]": verifying(
        draft=RECORDED._replace(draft_ids=torch.arange(V)[None])
    ),
    "draft.distribution.max: expected shape [R=6], got [5]": verifying(
        draft=RECORDED._replace(distribution=ROWS._replace(max=torch.zeros(5)))
    ),
    "out.emitted: expected shape [B=2, K+1=4], got [2, 3]": verifying(
        out=Verified(LENGTHS, TOKENS, LENGTHS.int(), LENGTHS.double())
    ),
    "seed: expected shape [B=2], got [3]": verifying(seed=i64(1, 2, 3)),
    "words: expected shape [2, 4], got [2, 3]": verifying(words=TOKENS),
    "logits: expected shape [N, V], got [9]": sampling(logits=POOL[0]),
    "draft_ids: expected shape [V=9], got [4]": sampling(draft_ids=torch.arange(4)),
    "pool_rows: expected shape [B=2, K=3], got [6]": denoising(pool_rows=torch.arange(6)),
    "draft_logits: expected shape [N=6, D=9], got [6, 5]; a draft over some of the target's tokens "
    "names them in draft_ids": lambda: row_divergence(POOL, POOL[:, :5]),
    "lengths: expected shape [B=2], got [1]": committing(lengths=i64(1)),
    "caches[0]: expected shape [B=2, H, S, D], got [6, 9]": committing(
        path=torch.arange(K).repeat(B, 1), caches=[POOL]
    ),
    "weight: expected shape [N, K=9], got [4, 8]": lambda: skinny_linear(POOL, torch.zeros(4, 8)),
    "query: expected shape [B, Q, G*H, D], got [6, 9]": attending(query=POOL),
    "keys: expected shape [B=2, H, S, D=8], got [2, 2, 12, 9]": attending(
        keys=torch.zeros(B, 2, 12, 9)
    ),
    "keys: expected shape [blocks, block_size, H, D=8], got [6, 9]": attending(
        keys=POOL, tables=TOKENS.int()
    ),
    "values: expected shape [B=2, H=2, S=12, D=8], got [2, 2, 11, 8]": attending(
        values=torch.zeros(B, 2, 11, 8)
    ),
    "parents: expected shape [B=2, Q=3], got [2, 4]": attending(parents=torch.zeros(B, 4).long()),
    "sinks: expected shape [G*H=4], got [2]": attending(sinks=torch.zeros(2)),
    "lengths: expected shape [B=2], got [3]": lambda: pages().reserve(i64(1, 2, 3)),
    "tokens: expected shape [B, K], got [2]": lambda: Draft.guesses(LENGTHS),
    "logits: expected shape [R, Vd], got [2, 4, 9]": lambda: Draft.masked(B, K, TARGET),
    "logits: expected shape [B=2, K=3, Vd], got [2, 4, 9]": sequential(logits=TARGET),
    "logits[1]: expected shape [B=2, Vd=9], got [1, 9]": sequential(
        logits=[POOL[:2], POOL[:1], POOL[:2]]
    ),
    "distributions[0].total: expected shape [B=2], got [6]": sequential(distributions=[ROWS] * K),
    "status: expected shape [N], got [2, 3]": lambda: check_status(TOKENS),
}

VALUES = {
    "seed: expected an integer, or a tensor [2] int64, got None; pass seed and round, or "
    "words": verifying(seed=None),
    "round: expected an integer, or a tensor [2] int64, got None; pass seed and round": verifying(
        round=None
    ),
    "position: expected an integer, or a tensor [2] int64, got None; pass seed and "
    "position": verifying(rule="coupled"),
    "seed: expected an integer, or a tensor [6] int64, got None; pass seed and round": sampling(
        seed=None
    ),
    "seed: expected an integer, or a tensor [6] int64, got None; pass seed, or words": sampling(
        seed=None, position=0
    ),
    # whatever the temperature, this order draws which positions it reveals
    "seed: expected an integer, or a tensor [2] int64, got None; pass": denoising(
        seed=None, temperature=0, reveal=Reveal.mdlm(0.5)
    ),
    "seed: expected an integer in [-2^63, 2^64), or a tensor [2] int64, got 0.5": verifying(
        seed=0.5
    ),
    "seed: expected an integer in [-2^63, 2^64), or a tensor [2] int64, got [1, 2]": verifying(
        seed=[1, 2]
    ),
    "seed: expected an integer in [-2^63, 2^64), or a tensor [6] int64, got '7'": sampling(
        seed="7"
    ),
    "round: expected an integer in [-2^63, 2^63), or a tensor [2] int64, got 1.0": denoising(
        round=1.0
    ),
    "slot: expected an integer in [-2^63, 2^63), or a tensor [6] int64, got 'a'": sampling(
        slot="a"
    ),
    "position: expected an integer in [-2^63, 2^63), or a tensor [2] int64, got 'a'": verifying(
        rule="coupled", position="a"
    ),
    "temperature: expected 0 or a number in [2^-95, 2^95], or a tensor [2] float32, got "
    "'0.7'": verifying(temperature="0.7"),
    "temperature: expected 0 or a number in [2^-95, 2^95], or a tensor [2] float32, got "
    "None": denoising(temperature=None),
    "temperature: expected 0 or a number in [2^-95, 2^95], or a tensor [6] float32, got "
    "[0.7]": lambda: row_distribution(POOL, [0.7]),
    "top_k: expected an integer in [0, 2^63) (0: off), or a tensor [2] int64, got 50.0": verifying(
        top_k=50.0
    ),
    "top_p: expected a number in [2^-149, 1], or a tensor [6] float32, got 1.5": lambda: (
        row_distribution(POOL, top_p=1.5)
    ),
    "min_p: expected a number in [0, 1], or a tensor [6] float32, got array(": lambda: (
        row_distribution(POOL, min_p=np.zeros(6))
    ),
    "rule: expected one of token, block, greedy, coupled, lenient, got None": verifying(rule=None),
    "record: expected one of one-hot, final, running-max, entangled, got ['final']": verifying(
        record=["final"]
    ),
    "lenience.kind: expected one of lenience, additive, ensemble, got ['additive']": lambda: (
        check_lenience("lenient", Lenience(["additive"], 1))
    ),
    "lenience.amount: expected a number in (0, 1] for 'lenience', got '1'": verifying(
        rule="lenient", lenience=Lenience("lenience", "1")
    ),
    "entropies: expected a bool, the same for all rows, got a tensor [2]": denoising(
        entropies=LENGTHS
    ),
    "release: expected a bool, the same for all rows, got a tensor [2]": committing(
        pages=pages(), release=LENGTHS > 0
    ),
    "draft.final_step: expected an integer, got 'x'": verifying(
        draft=GUESSES._replace(final_step="x")
    ),
    "purpose: expected one of REVEAL, DRAFT, ACCEPT, RESIDUAL, BONUS, COUPLED, got 9": sampling(
        purpose=9
    ),
    "purpose: expected one of REVEAL, DRAFT, ACCEPT, RESIDUAL, BONUS, COUPLED, got [1]": sampling(
        purpose=[1]
    ),
    "step: expected an integer in [0, 2^31), got None": denoising(step=None),
    "order: expected one of ALL, CHUNK, MDLM, SEDD, FIRST_HITTING, ENTROPY, CONFIDENCE, got "
    "99": denoising(reveal=Reveal(99)),
    "order: expected one of ALL, CHUNK, MDLM, SEDD, FIRST_HITTING, ENTROPY, CONFIDENCE, got "
    "'all'": denoising(reveal=Reveal("all")),
    "lo: expected an integer, got 1.5": denoising(reveal=Reveal.chunk(0, 2)._replace(lo=1.5)),
    "chunk: expected integers 0 <= lo <= hi, got lo = a, hi = 2": lambda: Reveal.chunk("a", 2),
    "rate: expected a number >= 0 or a tensor [B] float64, got '0.5'": lambda: Reveal.mdlm("0.5"),
    "number: expected how many positions, an integer >= 0, got None": lambda: Reveal.lowest_entropy(
        None
    ),
    "lengths: expected numbers of cached positions, at least 0, got -3": committing(
        lengths=i64(5, -3)
    ),
    "pages.block_size: expected an integer, got '16'": committing(
        pages=pages()._replace(block_size="16")
    ),
    "batch: expected an integer >= 1, got 2.0": lambda: Pages.empty(2.0, 4, 8, 16),
    "block_size: expected an integer >= 1, got None": lambda: Pages.empty(2, 4, 8, None),
    "device: expected 'cpu', 'cuda' or the like, got 'gpu'": lambda: Pages.empty(
        2, 4, 8, 16, device="gpu"
    ),
    "source: expected an integer in [0, 1], got 2": lambda: pages(2).share(2, 1, 16),
    "source: expected an integer in [0, 1], got -1": lambda: pages(2).share(-1, 1, 16),
    "to: expected an integer in [0, 1], got 'b'": lambda: pages(2).share(0, "b", 16),
    "positions: expected an integer in [0, 64], got 65": lambda: pages(4).share(0, 1, 65),
    "positions: expected an integer in [0, 64], got 16.0": lambda: pages(4).share(0, 1, 16.0),
    "to: expected another sequence than source, got 0 for both": lambda: pages(2).share(0, 0, 16),
    "source: expected a sequence that holds the first 3 blocks, got 0, which lacks 1 of "
    "them": lambda: pages(2).share(0, 1, 48),
    "to: expected a sequence that holds no block, got 0, which holds 2; commit with "
    "finished[to] and release=True gives them back": lambda: (
        pages(2)._replace(tables=pages(2).tables[[0, 0]]).share(1, 0, 16)
    ),
    "B: expected an integer >= 0, got a tensor [6, 9]": lambda: Draft.masked(POOL, B, K),
    "B: expected an integer >= 0, got -1": lambda: Draft.masked(-1, K, POOL),
    "K: expected an integer >= 0, got 3.0": lambda: Draft.masked(B, 3.0, POOL),
    "logits: expected a list of K=3 tensors [B, Vd], got 2": sequential(logits=STEPS[:2]),
    "distributions: expected a list of K=3 RowDistributions, got 2": sequential(
        distributions=OF_STEPS[:2]
    ),
    "status: expected 0 to 7, a Status, got 9": lambda: check_status(i64(0, 9)),
    "rows: expected an integer >= 0, got '9'": lambda: workspace_size("9", V, device="cpu"),
    "V: expected an integer >= 0, got -1": lambda: workspace_size(9, -1, device="cpu"),
    "device: expected 'cpu', 'cuda' or the like, got 'tpu'": lambda: available_backends("tpu"),
    "device: expected 'cpu', 'cuda' or the like, got None": lambda: workspace_size(
        9, V, device=None
    ),
    "query: expected a D in [1, 256], got 300": attending(query=torch.zeros(B, K, 4, 300)),
    "query: expected a multiple of the keys' H=2 heads, got 3; keys are [B, H, S, D]": attending(
        query=torch.zeros(B, K, 3, 8)
    ),
    "window: expected an integer in [1, 2^63), got 0": attending(window=0),
    "window: expected an integer in [1, 2^63), got '9'": attending(window="9"),
    "softcap: expected a number in [2^-126, 2^128), got -1.0": attending(softcap=-1.0),
    "scale: expected a number in (-2^128, 2^128), got a tensor [2]": attending(scale=LENGTHS),
    "weight.rows: expected an integer >= 0, got 'a'": lambda: skinny_linear(
        POOL, PackedWeight(torch.zeros(1, V, 16), "a")
    ),
    "seed: expected an integer, or one for each of 2 sequences, got 3": lambda: row_seeds(
        [1, 2, 3], 2
    ),
}

KINDS = {
    "target_logits: expected a tensor, got ndarray; convert with torch.as_tensor("
    "target_logits)": verifying(target_logits=TARGET.numpy()),
    "target_logits: expected a tensor, got None": verifying(target_logits=None),
    "draft: expected a Draft, got Tensor; Draft.guesses(tokens) makes one of tokens "
    "alone": verifying(target_logits=GUESSES, draft=TARGET),
    "draft: expected a Draft, got None": lambda: choose_record(None, "token", None),
    "draft.tokens: expected a tensor, got list; convert with torch.as_tensor(draft."
    "tokens)": verifying(draft=GUESSES._replace(tokens=[[1]])),
    "draft.lengths: expected a tensor, got int": verifying(draft=GUESSES._replace(lengths=3)),
    "draft.logits: expected a tensor, got list": verifying(
        draft=RECORDED._replace(logits=POOL.tolist())
    ),
    "draft.distribution: expected a RowDistribution, got int": verifying(
        draft=RECORDED._replace(distribution=1)
    ),
    "lenience: expected a Lenience, got float": verifying(rule="lenient", lenience=0.5),
    "out: expected a Verified, got int": verifying(out=1),
    "out: expected a Verified, got Tensor": verifying(out=TOKENS),
    "words: expected a tensor, got int": verifying(words=1),
    "distribution: expected a RowDistribution, got None": sampling(distribution=None),
    "distribution: expected a RowDistribution, got Tensor": sampling(distribution=POOL),
    "logits: expected a tensor, got list": sampling(logits=POOL.tolist()),
    "out: expected a tensor, got list; convert with torch.as_tensor(out)": sampling(out=[0] * 6),
    "draft.tokens: expected a tensor, got None": denoising(draft=MASKED._replace(tokens=None)),
    "reveal: expected a Reveal such as Reveal.all(), got 0": denoising(reveal=0),
    "out: expected a Draft, got int": denoising(out=1),
    "pool_rows: expected a tensor, got int": denoising(pool_rows=1),
    "logits: expected a tensor, got float": lambda: row_distribution(1.0),
    "out: expected a RowDistribution, got Tensor": lambda: row_distribution(POOL, out=POOL),
    "workspace: expected a tensor, got int": lambda: row_distribution(POOL, out=ROWS, workspace=1),
    "draft_logits: expected a tensor, got None": lambda: row_divergence(POOL, None),
    "out: expected a RowDivergence, got int": lambda: row_divergence(POOL, POOL, out=1),
    "emitted: expected a tensor, got list; convert": committing(emitted=[[1, 2]]),
    "stop_tokens: expected a tensor, got int": committing(stop_tokens=2),
    "limit: expected a tensor, got int": committing(limit=9),
    "finished: expected dtype bool, got int64; convert with finished.to(torch.bool)": committing(
        finished=i64(0, 1)
    ),
    "pages: expected a Pages, got int": committing(pages=1),
    "pages.tables: expected a tensor, got None": committing(pages=pages()._replace(tables=None)),
    "path: expected a tensor, got list": committing(path=[[0, 1, 2]]),
    "caches: expected a list of tensors, got int": committing(caches=5),
    "caches: expected a list of tensors, got Tensor": committing(caches=TARGET),
    "caches[0]: expected a tensor, got int": committing(path=TOKENS, caches=[1]),
    "out: expected a Committed, got tuple": committing(out=(LENGTHS,)),
    "x: expected a tensor, got None": lambda: skinny_linear(None, POOL),
    "weight: expected a tensor, got None": lambda: skinny_linear(POOL, None),
    "bias: expected a tensor, got list": lambda: skinny_linear(POOL, POOL, [0.0] * 6),
    "out: expected a tensor, got int": lambda: skinny_linear(POOL, POOL, out=1),
    "query: expected a tensor, got list; convert": attending(query=[[1.0]]),
    "values: expected a tensor, got None": attending(values=None),
    "tables: expected a tensor, got Pages": attending(
        keys=torch.zeros(5, 4, 2, 8), values=torch.zeros(5, 4, 2, 8), tables=pages()
    ),
    "weight: expected a tensor, got list": lambda: pack_weight([[1.0]]),
    "dtype: expected torch.float32 or torch.bfloat16, got float32": lambda: pack_weight(
        POOL, "float32"
    ),
    "lengths: expected a tensor, got int": lambda: pages().reserve(17),
    "lengths: expected dtype int64, got float32": lambda: pages().reserve(torch.zeros(2)),
    "tokens: expected a tensor, got list; convert": lambda: Draft.guesses([[1, 2]]),
    "tokens: expected dtype int64, got int32; convert": lambda: Draft.guesses(TOKENS.int()),
    "logits: expected a tensor, got int": lambda: Draft.masked(B, K, 9),
    "logits: expected a list of K=3 tensors [B, Vd], got int": sequential(logits=1),
    "logits: expected a list of K=3 tensors [B, Vd], got Tensor, None": sequential(
        logits=[POOL[:2], None]
    ),
    "logits[0]: expected dtype float32, bfloat16, float16, got float64": sequential(
        logits=[rows.double() for rows in STEPS]
    ),
    "distributions: expected a list of K=3 RowDistributions, got RowDistribution": sequential(
        distributions=ROWS
    ),
    "status: expected a tensor, got Verified": lambda: check_status(verifying()()),
    "seed: expected an integer, or one for each of 2 sequences, got None": lambda: row_seeds(
        None, 2
    ),
    "seed: expected an integer, or one for each of 2 sequences, got [1, 2.5]": lambda: row_seeds(
        [1, 2.5], 2
    ),
}

BACKENDS = {
    "backend is 'gpu'; expected one of cpp, triton, cuda, reference": verifying(backend="gpu"),
    "backend is 1; expected one of": committing(backend=1),
    "backend is 2; expected one of": lambda: row_distribution(
        POOL.clone().requires_grad_(), backend=2
    ),
    "use_backend(name) is None; expected one of": a_backend(None),
    "use_backend(name) is ['cpp']; expected one of": a_backend(["cpp"]),
}

MISTAKES = {ValueError: SHAPES | VALUES, TypeError: KINDS, BackendError: BACKENDS}


@pytest.mark.parametrize(("error", "message", "call"), each_mistake(MISTAKES))
def test_the_message_names_the_argument_and_what_was_expected(error, message, call):
    assert_named(error, message, call)
