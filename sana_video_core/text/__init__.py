"""Prompt text, the Gemma-2 encoder, and the caption recipe; usable without ComfyUI."""

from .encode import TextEncoder, Tokenizer, load_text_encoder
from .gemma import MINI_CONFIG, Gemma2, GemmaConfig
from .prompts import DEFAULT_NEGATIVE, INSTRUCTION, motion_suffix, negative_text, positive_text

__all__ = [
    "DEFAULT_NEGATIVE", "INSTRUCTION", "MINI_CONFIG", "Gemma2", "GemmaConfig", "TextEncoder", "Tokenizer",
    "load_text_encoder", "motion_suffix", "negative_text", "positive_text",
]
