"""Other models by the names of their tensors, so that a wrong file gets a name and an advice instead of a list of keys."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import CheckpointError

VIDEO_FILES = "SANA_Video_2B_480p.pth, SANA_Video_2B_720p.pth or a LongSANA file"
_CHOOSE = f"Choose a SANA-Video 2B file, such as {VIDEO_FILES}"
_LORA = re.compile(r"\.lora_(A|B|up|down)\b|^lora_(unet|te|transformer)|^lycoris_|\.(lokr|hada)_w\d|\.dora_scale$")
_SVDQUANT = re.compile(r"\.(qweight|wscales|smooth_factor|smooth_orig|proj_down|wcscales)$")
_OTHER_QUANT = re.compile(r"\.(quant_state\.bitsandbytes__\w+|absmax|quant_map|qzeros|g_idx|SCB)$")

# (what it is, what to do, patterns that must each match some name)
_FAMILIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("a Nunchaku / SVDQuant file", "This version cannot run SVDQuant. " + _CHOOSE, (_SVDQUANT.pattern,)),
    ("a LoRA", "Put it into models/loras and apply it with 'SANA-Video Load LoRA'", (_LORA.pattern,)),
    ("weights quantised by bitsandbytes or GPTQ", "This version cannot run them. " + _CHOOSE, (_OTHER_QUANT.pattern,)),
    ("SANA-Video 2.0", "This version cannot run SANA-Video 2.0 yet. " + _CHOOSE, (r"^attn_res\.",)),
    ("SANA-Streaming or SANA-WM (gated delta net)", "This version cannot run it yet. " + _CHOOSE,
     (r"^blocks\.\d+\.attn\.(A_log|dt_bias|gate_proj\.weight|recall_gate)$",)),
    ("SANA-Video 2.0", "This version cannot run SANA-Video 2.0 yet. " + _CHOOSE, (r"^blocks\.\d+\.attn\.beta_proj\.",)),
    ("the Wan video model", _CHOOSE, (r"^blocks\.\d+\.self_attn\.q\.", r"^(patch_embedding|head)\.")),
    ("the Wan video model (diffusers)", _CHOOSE, (r"^condition_embedder\.time_embedder\.", r"^blocks\.\d+\.attn1\.")),
    ("the LTX video model", _CHOOSE, (r"^adaln_single\.", r"^(patchify_proj|proj_in)\.")),
    ("PixArt", _CHOOSE, (r"^blocks\.\d+\.mlp\.fc1\.", r"^t_block\.1\.")),
    ("PixArt (diffusers)", _CHOOSE, (r"^adaln_single\.", r"^pos_embed\.proj\.")),
    ("the SANA image model (diffusers)", "Images need an image workflow. " + _CHOOSE,
     (r"^transformer_blocks\.\d+\.ff\.conv_inverted\.", r"^patch_embed\.proj\.")),
    ("a Flux-like image model", _CHOOSE, (r"^(double_blocks|single_transformer_blocks|joint_blocks)\.",)),
    ("a Stable Diffusion UNet", _CHOOSE, (r"^(input_blocks|down_blocks)\.\d+\..*(attn|transformer_blocks|in_layers)",)),
    ("a Wan VAE", "Put it into models/vae and choose it as the VAE. " + _CHOOSE, (r"^decoder\.middle\.0\.residual\.",)),
    ("a VAE", "Put it into models/vae and choose it as the VAE. " + _CHOOSE,
     (r"^(decoder|first_stage_model\.decoder)\.(conv_in|mid_block|up_blocks|up|mid|stages|input_stages|project_in)\.",)),
    ("a text encoder", "Put it into models/text_encoders and choose it as the text encoder. " + _CHOOSE,
     (r"^(model\.|text_model\.|transformer\.)*((encoder\.)?(layers|block)\.\d+\.)"
      r"(self_attn|layer|mlp|input_layernorm|post_attention_layernorm)",)),
)


def foreign_family(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """(what it is, what to do) when the names or shapes are those of a known other model, else None."""
    if not shapes:
        return "an empty file", "Download or copy the file again"
    for what, action, patterns in _FAMILIES:
        searches = [re.compile(p).search for p in patterns]
        if all(any(search(name) for name in shapes) for search in searches):
            return what, action
    return _image_sana(shapes)


def _image_sana(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """The image model has the video model's names, but patches of 2 dimensions and no temporal convolution."""
    patches = shapes.get("x_embedder.proj.weight", shapes.get("patch_embedding.weight"))
    temporal = any(name.endswith((".t_conv.weight", ".conv_temp.weight")) for name in shapes)
    mix_ffn = any(name.endswith((".inverted_conv.conv.weight", ".conv_inverted.weight")) for name in shapes)
    if mix_ffn and not temporal and (patches is None or len(patches) == 4):
        return "the SANA image model", "Images need an image workflow. " + _CHOOSE
    return None


def refuse_foreign(shapes: Mapping[str, tuple[int, ...]], name: str = "") -> None:
    """CheckpointError that names the model when ``shapes`` are those of a known other one."""
    family = foreign_family(shapes)
    if family:
        what, action = family
        raise CheckpointError(f"The file {name} is not a SANA-Video 2B model".replace("  ", " "), found=what,
                              expected=VIDEO_FILES, action=action)


def refuse_unknown(shapes: Mapping[str, tuple[int, ...]], name: str = "") -> None:
    """CheckpointError that shows the first names of a model that nothing here knows."""
    raise CheckpointError(f"The file {name} is not a SANA-Video model".replace("  ", " "),
                          found=f"{len(shapes)} tensors such as {', '.join(n[:80] for n in sorted(shapes)[:3])}",
                          expected=VIDEO_FILES, action=_CHOOSE)
