"""PromptLookup, Autoregressive and load_drafter, without a target where they need none."""

from __future__ import annotations

import pytest
import torch

from specdiff import Decoder, Sampling
from specdiff.drafters import Autoregressive, Draws, News, PromptLookup, load_drafter
from specdiff_kernels import Purpose, row_distribution, sample


def news_of(rows: list[list[int]]) -> News:
    width = max(1, *(len(row) for row in rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return News(tokens, torch.tensor([len(row) for row in rows]), None)


def lookup(drafter: PromptLookup, rows, k, lengths=None) -> list[list[int]]:
    lengths = torch.full((len(rows),), k) if lengths is None else torch.tensor(lengths)
    zeros = torch.zeros(len(rows), dtype=torch.int64)
    draft = drafter.draft(news_of(rows), k, lengths, Draws(zeros, zeros))
    assert (draft.rows == -1).all() and draft.tokens.shape == (len(rows), k)
    return [row[:n] for row, n in zip(draft.tokens.tolist(), draft.lengths.tolist(), strict=True)]


def test_prompt_lookup_continues_the_longest_then_latest_match():
    drafter = PromptLookup(max_ngram=3)
    drafter.start(5, 100, Sampling())
    rows = [
        [1, 2, 3, 9, 2, 3, 8, 1, 2, 3],  # the trigram 1 2 3 wins over the later bigram 2 3
        [2, 3, 7, 2, 3, 8, 2, 3],  # both bigrams match: the later one
        [1, 2, 3, 4],  # nothing matches
        [5, 5],  # a match may overlap the end
        [6],
    ]
    assert lookup(drafter, rows, 3) == [[9, 2, 3], [8, 2, 3], [], [5], []]


def test_prompt_lookup_learns_from_news_and_obeys_lengths():
    drafter = PromptLookup(max_ngram=2)
    drafter.start(2, 100, Sampling())
    assert lookup(drafter, [[1, 2], [3, 4]], 2) == [[], []]
    assert lookup(drafter, [[3, 1], []], 4) == [[2, 3, 1], []]
    assert lookup(drafter, [[2], [3]], 4, [1, 4]) == [[3], [4, 3]]
    drafter.start(1, 100, Sampling())
    assert lookup(drafter, [[1]], 4) == [[]]


def test_prompt_lookup_equals_a_search_of_everything():
    generator = torch.Generator().manual_seed(0)
    drafter = PromptLookup()
    drafter.start(1, 100, Sampling())
    tokens: list[int] = []
    for _ in range(60):
        new = torch.randint(4, (3,), generator=generator).tolist()
        tokens += new
        want: list[int] = []
        for n in (3, 2, 1):
            starts = [i for i in range(len(tokens) - n) if tokens[i : i + n] == tokens[-n:]]
            if starts:
                want = tokens[starts[-1] + n :][:5]
                break
        assert lookup(drafter, [new], 5) == [want]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=20)], ids=repr)
def test_autoregressive_records_the_distribution_of_every_token(model, sampling):
    """After ragged news, rows and tokens are those of a fresh forward over the committed prefix."""
    drafter = Autoregressive(model)
    drafter.start(3, 60, sampling)
    generator = torch.Generator().manual_seed(3)
    committed: list[list[int]] = [[], [], []]
    seed, k = torch.tensor([1, 2, 3]), 4
    for turn in range(5):
        counts = [3, 7, 1] if turn == 0 else torch.randint(k + 2, (3,), generator=generator)
        new = [torch.randint(50, (int(n),), generator=generator).tolist() for n in counts]
        committed = [row + more for row, more in zip(committed, new, strict=True)]
        round = torch.full((3,), turn)
        lengths = torch.tensor([4, 2, 3]) * torch.tensor([len(more) > 0 for more in new])
        with torch.inference_mode():
            draft = drafter.draft(news_of(new), k, lengths, Draws(seed, round))
        width = max(1, int(lengths.max()))
        assert draft.tau.tolist() == [list(range(width))] * 3
        assert drafter.cache.lengths.tolist() == [len(row) for row in committed]
        for b, row in enumerate(committed):
            for i in range(int(lengths[b])):
                prefix = row + draft.tokens[b, :i].tolist()
                with torch.inference_mode():
                    want = model(torch.tensor([prefix])).logits[0, -1:]
                at = draft.rows[b, i]
                torch.testing.assert_close(draft.logits[at], want[0], atol=1e-4, rtol=1e-4)
                distribution = row_distribution(draft.logits[at][None], *sampling.parameters)
                assert all(
                    a[at] == w[0] for a, w in zip(draft.distribution, distribution, strict=True)
                )
                options = dict(seed=seed[b : b + 1], round=round[:1], slot=torch.tensor([i]))
                token = sample(
                    draft.logits[at][None], distribution, purpose=Purpose.DRAFT, **options
                )
                assert draft.tokens[b, i] == token


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_accepts_its_own_drafts(model, target, temperature):
    decoder = Decoder(target, Autoregressive(model), 4)
    sampling = Sampling(temperature=temperature)
    stats = decoder.generate([[1, 2], [3]], max_new_tokens=40, sampling=sampling).stats
    assert stats.acceptance == [1.0] * 4 and stats.tokens_per_forward == 5


def test_load_drafter(model, target, tmp_path):
    assert isinstance(load_drafter("prompt-lookup", target), PromptLookup)
    model.save_pretrained(tmp_path)
    drafter = load_drafter(tmp_path, target)
    assert isinstance(drafter, Autoregressive) and drafter.vocab_size == 50
    want = Decoder(target).generate([1, 2], max_new_tokens=9)
    got = Decoder(target, drafter, 3).generate([1, 2], max_new_tokens=9)
    assert got.new_tokens == want.new_tokens and got.stats.acceptance == [1.0] * 3
    for name in ("prompt-lookup", tmp_path):
        with pytest.raises(ValueError, match="steps are for diffusion drafters only"):
            load_drafter(name, target, steps=2)
    with pytest.raises(ValueError, match="unknown drafter 'no-such'; expected 'parallel'"):
        load_drafter("no-such", target)


def test_a_pickled_drafter_is_refused(model, target, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no usable causal language model.*safetensors"):
        load_drafter(tmp_path, target)


def test_bad_max_ngram():
    with pytest.raises(ValueError, match="max_ngram must be at least 1"):
        PromptLookup(max_ngram=0)
