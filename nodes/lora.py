"""LoRA files of every public key naming onto a SANA-Video MODEL, with a report of what was and was not used."""

from __future__ import annotations

import logging
from pathlib import Path

from comfy_api.latest import io

from ..sana_video_core.errors import CheckpointError, SanaVideoError
from .common import CATEGORY, file_stamp, finite, spec_of
from .loading import read_part
from .lora_keys import Reading, as_linear, key_map, metadata_scale, misfits

log = logging.getLogger(__name__)

MAX_STRENGTH = 20.0
SHOWN = 8  # unknown keys that the report names


class SanaVideoLoadLora(io.ComfyNode):
    """Native, kohya and diffusers names; core's LoRA loader knows only the first two."""

    @classmethod
    def define_schema(cls):
        import folder_paths

        return io.Schema(
            node_id="SanaVideoLoadLora",
            display_name="SANA-Video Load LoRA",
            category=CATEGORY,
            description="Applies a LoRA to a SANA-Video model. Understands native, kohya and diffusers files and tells which "
                        "parts of the file it could not use.",
            search_aliases=["lora", "lycoris", "style", "adapter"],
            inputs=[
                io.Model.Input("model", tooltip="The model from 'Load SANA-Video' (or from another LoRA node)."),
                io.Combo.Input("lora", options=folder_paths.get_filename_list("loras"),
                               tooltip="The LoRA file, from models/loras. It must have been trained for this model."),
                io.Float.Input("strength", default=1.0, min=-MAX_STRENGTH, max=MAX_STRENGTH, step=0.01,
                               tooltip="How strongly the LoRA shows. 1 is as trained, 0 switches it off, below 0 turns it "
                                       "round."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA applied."),
                io.String.Output(display_name="report", tooltip="What was applied, and the keys that were not understood."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model=None, lora=None, strength=None):
        """Loads again when the file was replaced under the same name."""
        return file_stamp("loras", lora)

    @classmethod
    def execute(cls, model, lora, strength) -> io.NodeOutput:
        import folder_paths

        spec = spec_of(model)
        strength = finite("strength", strength, -MAX_STRENGTH, MAX_STRENGTH)
        state, metadata = read_part(folder_paths.get_full_path_or_raise("loras", lora), "LoRA")
        patched, report = apply_lora(model, spec, state, metadata, strength, Path(lora).name)
        log.info("%s", report)
        return io.NodeOutput(patched, report)


def apply_lora(model, spec, state: dict, metadata: dict, strength: float, name: str):
    """(patched clone of ``model``, report). Refuses a file of which nothing fits."""
    import comfy.lora

    # the parameters and not the state dict: that has the packed shapes of quantised weights, and their scales
    shapes = {key: tuple(p.shape) for key, p in model.model.named_parameters() if key.startswith("diffusion_model.")}
    table = key_map(shapes, spec)
    wrong = misfits(as_linear(state, table, shapes), table, shapes)
    if wrong:
        raise CheckpointError(f"The LoRA {name} was made for a model of another size", found="; ".join(wrong[:3]),
                              expected=spec.name, action="Choose a LoRA that was trained for this model")
    reading = Reading(as_linear(state, table, shapes))
    patches = comfy.lora.load_lora(reading, _names_in(reading, table), log_missing=False)
    if not patches:
        raise SanaVideoError(f"Nothing in the LoRA {name} fits this model",
                             found=f"{len(state)} keys such as {', '.join(sorted(state)[:3]) or 'none'}",
                             expected=f"a LoRA for {spec.name}", action="Choose a LoRA that was trained for SANA-Video")
    scale = 1.0 if any(key.endswith(".alpha") for key in state) else metadata_scale(metadata)
    patched = model.clone()
    applied = patched.add_patches(patches, strength * scale)
    left = reading.left()
    report = f"{name}: {len(applied)} weights changed at strength {strength:g}"
    if scale != 1.0:
        report += f" (times {scale:g}, alpha / rank of the file)"
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        report += f". {len(left)} keys not understood: {', '.join(left[:SHOWN])}{more}"
        log.warning("%s", report)
    return patched, report


def _names_in(state: dict, table: dict) -> dict:
    """The part of ``table`` whose names occur in ``state`` (the full table has thousands of names)."""
    used = {}
    for key in state:
        cut = len(key)
        while (cut := key.rfind(".", 0, cut)) > 0:
            if key[:cut] in table:
                used[key[:cut]] = table[key[:cut]]
                break
    return used
