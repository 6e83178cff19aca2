"""Adapters of peft: those that merge, and those that put something before the text."""

from __future__ import annotations

import pytest
import torch

import specdiff.hf
from specdiff import Target
from tests.tiny import tiny_model

peft = pytest.importorskip("peft", reason="needs peft")
PROMPT = torch.tensor([[4, 5, 6, 7, 8, 9, 1, 2, 4, 5]])


def lora():
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny_model("llama"), config).eval()


def before_the_text():
    common = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    return {
        "prompt tuning": peft.PromptTuningConfig(**common),
        "p-tuning": peft.PromptEncoderConfig(**common, encoder_hidden_size=8),
        "prefix tuning": peft.PrefixTuningConfig(**common),
    }


@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning", "prefix tuning"])
def test_what_comes_before_the_text_is_refused(kind):
    model = peft.get_peft_model(tiny_model("llama"), before_the_text()[kind]).eval()
    with pytest.raises(ValueError, match="puts a prompt or a prefix before the text"):
        Target(model)
    with pytest.raises(ValueError, match=r"PeftModel.* prepares the inputs of this model"):
        model.generate(input_ids=PROMPT, custom_generate=specdiff.hf.generate, max_new_tokens=3)


def test_lora_is_decoded_by_generate_merged_or_not():
    model = lora()
    want = model.generate(input_ids=PROMPT, max_new_tokens=9, do_sample=False)
    plain = tiny_model("llama").generate(PROMPT, max_new_tokens=9, do_sample=False)
    assert want.tolist() != plain.tolist()
    options = {"custom_generate": specdiff.hf.generate, "drafter": "prompt-lookup"}
    got = model.generate(input_ids=PROMPT, max_new_tokens=9, do_sample=False, **options)
    assert got.tolist() == want.tolist()
    with pytest.raises(ValueError, match=r"pass model.merge_and_unload"):
        Target(model)
    merged = model.merge_and_unload()
    got = merged.generate(PROMPT, max_new_tokens=9, do_sample=False, **options)
    assert got.tolist() == want.tolist()
