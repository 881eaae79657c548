"""SANA-Video's caption embedding: instruction, 300 rows, mask; and loading the encoder with its tokenizer.

The recipe (model spec 3.2-3.4): a positive prompt is padded to n + 298 tokens, n being the instruction's tokens with the
begin mark, and rows 0 and the last 299 are kept: exactly the instruction drops out. A negative prompt has no instruction
and keeps all 300 rows. Needs the package sentencepiece (stock in ComfyUI), imported on use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .gemma import Gemma2, GemmaConfig
from .prompts import CAPTION_TOKENS, INSTRUCTION, negative_text, positive_text

BOS, PAD = 2, 0
TOKENIZER_KEY = "spiece_model"


class Tokenizer:
    """SentencePiece ids with the begin mark in front and no end mark; ``model`` is the serialised model."""

    def __init__(self, model: bytes):
        import sentencepiece

        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as e:
            raise CheckpointError("The tokenizer inside the text encoder file cannot be read", found=str(e)) from None

    def __call__(self, text: str) -> list[int]:
        return [BOS, *self._pieces.encode(text)]


def pad_rows(rows: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), each ``[B, length]`` int64: cut on the right, padded on the right."""
    ids = torch.full((len(rows), length), PAD, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        row = list(row)[:length]
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return ids, mask


def select_rows(length: int, keep: int = CAPTION_TOKENS) -> Tensor:
    """Indices kept of a sequence of ``length``: 0 and the last ``keep - 1``."""
    return torch.cat((torch.zeros(1, dtype=torch.int64), torch.arange(length - keep + 1, length)))


class TextEncoder:
    """A Gemma-2 network with its tokenizer; ``positive`` and ``negative`` give what the transformer takes."""

    def __init__(self, network: Gemma2, tokenizer: Tokenizer, uses_instruction: bool = True):
        self.network, self.tokenizer, self.uses_instruction = network, tokenizer, uses_instruction

    def tokens(self, prompts: Sequence[str], motion_score: float | None = 10,
               instruction: bool | None = None) -> tuple[Tensor, Tensor]:
        """(ids, mask) ``[B, n + 298]`` of positive prompts (``[B, 300]`` without the instruction)."""
        instruction = self.uses_instruction if instruction is None else instruction
        rows = [self.tokenizer(positive_text(p, motion_score, instruction)) for p in prompts]
        length = len(self.tokenizer(INSTRUCTION)) + CAPTION_TOKENS - 2 if instruction else CAPTION_TOKENS
        return pad_rows(rows, length)

    def embed(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(embedding ``[B, 300, D]``, mask ``[B, 300]``) of padded rows."""
        device = self.network.model.norm.weight.device
        ids, mask = ids.to(device), mask.to(device)
        hidden = self.network(ids, mask)
        keep = select_rows(ids.shape[1]).to(device)
        return hidden[:, keep], mask[:, keep]

    def positive(self, prompts: Sequence[str], motion_score: float | None = 10,
                 instruction: bool | None = None) -> tuple[Tensor, Tensor]:
        """Embedding and mask of positive prompts."""
        return self.embed(*self.tokens(prompts, motion_score, instruction))

    def negative(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embedding and mask of negative prompts: no instruction, all 300 rows."""
        return self.embed(*pad_rows([self.tokenizer(negative_text(p)) for p in prompts], CAPTION_TOKENS))


def load_text_encoder(path: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> TextEncoder:
    """Read a ComfyUI text encoder file (safetensors with ``model.*`` keys and the tokenizer inside).

    Sizes come from the metadata entry ``config`` where the file has one, otherwise they are those of gemma-2-2b.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            config = GemmaConfig.from_json(metadata["config"]) if "config" in metadata else GemmaConfig()
            keys = set(f.keys())
            if TOKENIZER_KEY not in keys:
                raise CheckpointError(
                    f"{path.name} has no tokenizer inside", expected=f"a tensor named {TOKENIZER_KEY}",
                    action="Use gemma_2_2b_it_elm_bf16.safetensors (models/text_encoders)")
            tokenizer = Tokenizer(bytes(f.get_tensor(TOKENIZER_KEY).numpy()))
            with torch.device("meta"):
                network = Gemma2(config)
            expected = network.state_dict()
            state = _read_exact(f, keys - {TOKENIZER_KEY}, expected, path.name, dtype, device)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path.name} cannot be read as a text encoder", found=str(e)) from None
    network.load_state_dict(state, assign=True)
    return TextEncoder(network.eval(), tokenizer, metadata.get("uses_instruction", "true") != "false")


def _read_exact(f, keys: set[str], expected: dict[str, Tensor], name: str, dtype, device) -> dict[str, Tensor]:
    missing = sorted(expected.keys() - keys)
    shapes = {k: tuple(f.get_slice(k).get_shape()) for k in expected.keys() & keys}
    wrong = [f"{k} {shapes[k]} instead of {tuple(expected[k].shape)}" for k in sorted(shapes) if shapes[k] != expected[k].shape]
    if missing or wrong:
        raise CheckpointError(
            f"{name} is not a Gemma-2 text encoder of the expected size",
            found=f"{len(missing)} missing keys {missing[:3]}, {len(wrong)} wrong shapes {wrong[:3]}",
            action="Use gemma_2_2b_it_elm_bf16.safetensors (models/text_encoders)")
    return {k: f.get_tensor(k).to(device, dtype) for k in expected}
