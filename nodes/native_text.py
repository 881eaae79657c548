"""The text encoder as a native ComfyUI CLIP, and the token rows that SANA-Video was trained with.

Core's ``pixeldit`` CLIP holds the official path for a positive prompt; two things are added in small subclasses: texts
without the instruction (negative prompts) and a Gemma-2 of another size (the embedded model). Imported inside functions
only. Source: vae/text spec 4, comfyui spec 7. Not covered: Gemma without ComfyUI (``sana_video_core/text``).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import comfy.sd
import comfy.text_encoders.llama
from comfy.text_encoders import pixeldit

from ..sana_video_core.errors import CheckpointError, SanaVideoError
from ..sana_video_core.text.prompts import INSTRUCTION
from .loading import read_part

log = logging.getLogger(__name__)

WINDOW = 300  # rows the network reads: position 0 and the last 299 (model spec 3.2)
KEY = "gemma2_2b"
PAD = 0
PROBE = "model.layers.0.post_feedforward_layernorm.weight"


def token_ids(tokenizer, text: str) -> list[int]:
    """Ids of ``text`` with the begin mark, by SentencePiece itself: no prompt weights, embeddings or escapes."""
    return list(getattr(tokenizer, KEY).tokenizer.tokenizer.encode(text))


def token_rows(tokenizer, text: str, instruction: str = "") -> tuple[dict, str]:
    """(tokens for ``clip.encode_from_tokens_scheduled``, the end of the text that no longer fits or "").

    With an instruction of n tokens the text is padded to n + 298, so that the encoder's selection of position 0 and the
    last 299 drops exactly the instruction; without one it is padded to 300.
    """
    total = len(token_ids(tokenizer, instruction)) + WINDOW - 2 if instruction else WINDOW
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


class _SizedGemma2(comfy.text_encoders.llama.Gemma2_2B):
    """ComfyUI's Gemma-2 at any size, the head dimension included (which its own options cannot set)."""

    def __init__(self, config_dict, dtype, device, operations):
        sizes = dict(config_dict)
        head_dim = sizes.pop("head_dim", None)
        base = comfy.text_encoders.llama.Gemma2_2B_Config
        config = base(**sizes)
        if head_dim:
            config.head_dim = head_dim
        super(comfy.text_encoders.llama.Gemma2_2B, self).__init__()
        self.num_layers = config.num_hidden_layers
        self.model = comfy.text_encoders.llama.Llama2_(config, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype


class _SizedEncoder(pixeldit.PixelDiTGemma2_2BModel):
    """``PixelDiTGemma2_2BModel`` around the sized network."""

    def __init__(self, device="cpu", layer="last", layer_idx=None, dtype=None, attention_mask=True,
                 model_options=None):
        pixeldit.sd1_clip.SDClipModel.__init__(
            self, device=device, layer=layer, layer_idx=layer_idx, textmodel_json_config={}, dtype=dtype,
            special_tokens={"start": 2, "pad": PAD}, layer_norm_hidden_state=False, model_class=_SizedGemma2,
            enable_attention_masks=attention_mask, return_attention_masks=attention_mask, model_options=model_options or {})


class _SizedTextEncoder(pixeldit.PixelDiTGemma2TE):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super(pixeldit.PixelDiTGemma2TE, self).__init__(
            device=device, dtype=dtype, name=KEY, clip_model=_SizedEncoder, model_options=model_options or {})


class _Target:
    """What ``comfy.sd.CLIP`` asks for: the two classes and their parameters."""

    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer, self.params = clip, tokenizer, {}


def load_clip(path: str, caption_channels: int | None = None, disable_dynamic: bool = False):
    """A CLIP for the Gemma-2 file at ``path``; refused unless it is Gemma-2 with its tokenizer inside.

    ``caption_channels``: the width that the model expects, checked when given.
    """
    state, metadata = read_part(path, "text encoder")
    name = Path(path).name
    _check_gemma(state, name, caption_channels)
    config = _sizes(metadata, name)
    uses_instruction = bool(config.pop("instruction", True))
    options = {f"{KEY}_model_config": config} if config else {}
    target = _Target(_SizedTextEncoder if config else pixeldit.pixeldit_te(**comfy.sd.llama_detect([state])),
                     SanaVideoTokenizer)
    tokenizer_data = {"spiece_model": state["spiece_model"], "uses_instruction": uses_instruction}
    clip = comfy.sd.CLIP(target, tokenizer_data=tokenizer_data, state_dict=[dict(state)], model_options=options,
                         parameters=sum(t.numel() for t in state.values()), disable_dynamic=disable_dynamic)
    clip.patcher.cached_patcher_init = (_load_patcher, (path,))
    return clip


def _load_patcher(path: str, disable_dynamic: bool = False):
    return load_clip(path, disable_dynamic=disable_dynamic).patcher


def _check_gemma(state: dict, name: str, caption_channels: int | None) -> None:
    action = "Choose gemma_2_2b_it_elm_bf16.safetensors (models/text_encoders)"
    if PROBE not in state or "model.layers.0.self_attn.q_norm.weight" in state:
        raise CheckpointError("This text encoder is not Gemma-2", found=name, expected="Gemma-2-2B-it", action=action)
    if "spiece_model" not in state:
        raise CheckpointError("The text encoder file carries no tokenizer", found=f"{name} without 'spiece_model'",
                              expected="a Gemma-2 file made for ComfyUI", action=action)
    width = state[PROBE].shape[0]
    if caption_channels not in (None, width):
        raise SanaVideoError("The text encoder does not fit the model", found=f"{name}, {width} channels",
                             expected=f"{caption_channels} channels", action=action)


def _sizes(metadata: dict, name: str) -> dict:
    """The network's sizes when the file names them in its metadata ("config"), else {} (the 2B sizes)."""
    text = metadata.get("config")
    if not text:
        return {}
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError("The text encoder's config cannot be read", found=f"{name}: {error}") from error
    return config if isinstance(config, dict) else {}


def require_gemma_clip(clip) -> None:
    """Refuse a CLIP that is not Gemma-2 on SANA-Video's path."""
    model = getattr(clip, "cond_stage_model", None)
    if not isinstance(model, pixeldit.PixelDiTGemma2TE):
        raise SanaVideoError(
            "This CLIP is not SANA-Video's text encoder", found=type(model).__name__.strip("_"),
            expected="Gemma-2-2B-it on the SANA path",
            action="Connect the CLIP output of 'Load SANA-Video', or set the type of 'Load CLIP' to 'pixeldit'")
