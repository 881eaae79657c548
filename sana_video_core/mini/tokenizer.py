"""The embedded model's tokenizer: a SentencePiece model of 512 pieces, made from the world's own sentences.

Every word of the world is one piece; bytes stand in for everything else, so that any text can be typed. The result is
bytes for ``text.encode.Tokenizer`` and goes into the text encoder file. Needs the package sentencepiece.
"""

from __future__ import annotations

import io
import random

from ..text.prompts import DEFAULT_NEGATIVE, INSTRUCTION
from .captions import caption
from .world import random_scene

PIECES = 512
PAD, EOS, BOS, UNK = 0, 1, 2, 3


def corpus(sentences: int = 4000) -> list[str]:
    """Text that the tokenizer is made from: captions, other texts it will meet, the letters of English."""
    rng = random.Random(512)
    lines = [caption(random_scene(rng), rng) for _ in range(sentences)]
    lines += [f"{line} motion score: {i % 40}." for i, line in enumerate(lines[: sentences // 4])]
    letters = "the quick brown fox jumps over a lazy dog; THE QUICK BROWN FOX JUMPS OVER A LAZY DOG, 0123456789 (or so) - 'yes'!"
    return lines + [letters] * 20 + [line for line in (DEFAULT_NEGATIVE, *INSTRUCTION.split("\n")) if line.strip()] * 4


def train_tokenizer() -> bytes:
    """The serialised SentencePiece model: pad 0, eos 1, bos 2, unk 3, then 256 bytes, then pieces. The same every time."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type="bpe", vocab_size=PIECES, byte_fallback=True,
        pad_id=PAD, eos_id=EOS, bos_id=BOS, unk_id=UNK, character_coverage=1.0, num_threads=1, shuffle_input_sentence=False,
        normalization_rule_name="identity", remove_extra_whitespaces=True, minloglevel=2)
    return model.getvalue()
