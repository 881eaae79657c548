"""The text encoder as a native ComfyUI CLIP, and the token rows that SANA-Video was trained with.

Core's ``pixeldit`` CLIP holds the official path for a positive prompt; two things are added in small subclasses: texts
without the instruction (negative prompts) and a Gemma-2 of another size (the embedded model). Imported inside functions
only. Source: vae/text spec 4, comfyui spec 7. Not covered: Gemma without ComfyUI (``sana_video_core/text``).
"""

from __future__ import annotations

from pathlib import Path

import comfy.sd
from comfy.text_encoders import pixeldit

from ..sana_video_core.errors import CheckpointError, SanaVideoError
from ..sana_video_core.text.gemma import GemmaConfig
from ..sana_video_core.text.prompts import CAPTION_TOKENS, INSTRUCTION
from .loading import read_part, reraise_if_out_of_memory

KEY = "gemma2_2b"
PAD = 0
ACTION = "Choose gemma_2_2b_it_elm_bf16.safetensors (models/text_encoders)"
PROBE = "model.layers.0.post_feedforward_layernorm.weight"


def token_ids(tokenizer, text: str) -> list[int]:
    """Ids of ``text`` with the begin mark, by SentencePiece itself: no prompt weights, embeddings or escapes."""
    return list(getattr(tokenizer, KEY).tokenizer.tokenizer.encode(text))


def token_rows(tokenizer, text: str, instruction: str = "") -> tuple[dict, str]:
    """(tokens for ``clip.encode_from_tokens_scheduled``, the end of the text that no longer fits or "").

    With an instruction of n tokens the text is padded to n + 298, so that the encoder's selection of position 0 and the
    last 299 drops exactly the instruction; without one it is padded to 300.
    """
    total = len(token_ids(tokenizer, instruction)) + CAPTION_TOKENS - 2 if instruction else CAPTION_TOKENS
    ids = token_ids(tokenizer, instruction + text)
    lost = ids[total:]
    ids = ids[:total] + [PAD] * (total - len(ids))
    rest = getattr(tokenizer, KEY).tokenizer.tokenizer.decode(lost) if lost else ""
    return {KEY: [[(i, 1.0) for i in ids]]}, rest


class SanaVideoTokenizer(pixeldit.PixelDiTGemma2Tokenizer):
    """``clip.tokenize(text)`` as in SANA-Video; ``instruction=False`` (or ``negative=True``) leaves the instruction out.

    ``uses_instruction`` False makes that the habit of a text encoder trained without it.
    """

    uses_instruction = True

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data)
        self.uses_instruction = (tokenizer_data or {}).get("uses_instruction", True)

    def tokenize_with_weights(self, text, return_word_ids=False, *, negative=False, instruction=None, **kwargs):
        if instruction is None:
            instruction = self.uses_instruction and not negative
        rows, _ = token_rows(self, text.strip(), INSTRUCTION if instruction and text.strip() else "")
        if return_word_ids:
            rows = {KEY: [[(i, w, n) for n, (i, w) in enumerate(row)] for row in rows[KEY]]}
        return rows


class _Target:
    """What ``comfy.sd.CLIP`` asks for: the two classes and their parameters."""

    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer, self.params = clip, tokenizer, {}


def load_clip(path: str, caption_channels: int | None = None, disable_dynamic: bool = False):
    """A CLIP for the Gemma-2 file at ``path``; refused unless it is a whole Gemma-2 with its tokenizer inside.

    ``caption_channels``: the width that the model expects, checked when given.
    """
    state, metadata = read_part(path, "text encoder")
    name = Path(path).name
    _check_gemma(state, name, caption_channels)
    sizes = _sizes(metadata, name)
    target = _Target(pixeldit.pixeldit_te(**comfy.sd.llama_detect([state])), SanaVideoTokenizer)
    tokenizer_data = {"spiece_model": state["spiece_model"],
                      "uses_instruction": metadata.get("uses_instruction", "true") != "false"}
    try:
        clip = comfy.sd.CLIP(target, tokenizer_data=tokenizer_data, state_dict=[dict(state)],
                             parameters=sum(t.numel() for t in state.values()), disable_dynamic=disable_dynamic,
                             model_options={f"{KEY}_model_config": sizes} if sizes else {})
    except (RuntimeError, OSError) as error:  # misshapen weights, a tokenizer that does not parse
        reraise_if_out_of_memory(error)
        raise CheckpointError("The text encoder file is damaged", found=f"{name}: {str(error)[:300]}", action=ACTION) from error
    missing = sorted(set(getattr(clip.cond_stage_model, KEY).transformer.state_dict()) - set(state))
    if missing:
        raise CheckpointError("The text encoder file is not complete", action=ACTION,
                              found=f"{name}: {len(missing)} tensors missing, such as {', '.join(missing[:3])}")
    clip.patcher.cached_patcher_init = (_load_patcher, (path,))
    return clip


def _load_patcher(path: str, disable_dynamic: bool = False):
    return load_clip(path, disable_dynamic=disable_dynamic).patcher


def _check_gemma(state: dict, name: str, caption_channels: int | None) -> None:
    if PROBE not in state or "model.layers.0.self_attn.q_norm.weight" in state:
        raise CheckpointError("This text encoder is not Gemma-2", found=name, expected="Gemma-2-2B-it", action=ACTION)
    if "spiece_model" not in state:
        raise CheckpointError("The text encoder file carries no tokenizer", found=f"{name} without 'spiece_model'",
                              expected="a Gemma-2 file made for ComfyUI", action=ACTION)
    width = state[PROBE].shape[0]
    if caption_channels not in (None, width):
        raise SanaVideoError("The text encoder does not fit the model", found=f"{name}, {width} channels",
                             expected=f"{caption_channels} channels", action=ACTION)


def _sizes(metadata: dict, name: str) -> dict:
    """The network's sizes as ComfyUI names them when the file carries them ("config" in its metadata), else {}."""
    if not metadata.get("config"):
        return {}
    config = GemmaConfig.from_json(metadata["config"])
    if config.head_dim != 256 or config.softcap or config.query_pre_attn_scalar not in (None, config.head_dim):
        raise CheckpointError("ComfyUI cannot run a Gemma-2 of this form", found=f"{name}: {config}",
                              expected="head dimension 256, no soft-cap")
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "rms_norm_eps", "rope_theta")
    return {field: getattr(config, field) for field in fields}


def require_gemma_clip(clip) -> None:
    """Refuse a CLIP that is not Gemma-2 on SANA-Video's path."""
    model = getattr(clip, "cond_stage_model", None)
    if not isinstance(model, pixeldit.PixelDiTGemma2TE):
        raise SanaVideoError(
            "This CLIP is not SANA-Video's text encoder", found=type(model).__name__.strip("_"),
            expected="Gemma-2-2B-it on the SANA path",
            action="Connect the CLIP output of 'Load SANA-Video', or set the type of 'Load CLIP' to 'pixeldit'")
