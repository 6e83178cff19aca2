"""Use from Hugging Face: `model.generate(..., custom_generate=specdiff.hf.generate, drafter=...)`.

Every option that shapes the text is applied or refused with a reason.
"""

from .decoding import GenerateOutput, generate

__all__ = ["GenerateOutput", "generate"]
