"""Files to MODEL, CLIP and VAE in one node; the embedded model needs no file at all."""

from __future__ import annotations

from comfy_api.latest import io

from .calibrate import load_scaled
from .common import (
    CATEGORY,
    EMBEDDED,
    EMBEDDED_LONG,
    NONE,
    MissingPart,
    choice,
    embedded_files,
    embedded_models,
    file_stamp,
)
from .loading import MODES, PRECISIONS, load_vae, refuse_fp16


def model_files() -> list[str]:
    """The choices of 'model': the embedded models first where they are there, then ComfyUI's diffusion_models folder."""
    import folder_paths

    return embedded_models() + folder_paths.get_filename_list("diffusion_models")


def part_files(folder: str) -> list[str]:
    """'none', then the files of a ComfyUI model folder."""
    import folder_paths

    return [NONE, *folder_paths.get_filename_list(folder)]


class SanaVideoLoader(io.ComfyNode):
    """One node from files to a graph's three model wires."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoLoader",
            display_name="Load SANA-Video",
            category=CATEGORY,
            description="Loads a SANA-Video model (official .pth, safetensors or diffusers weights), and its text encoder and "
                        "VAE when you name their files. 'embedded mini' is a small model that comes with this pack, "
                        "'embedded mini long' the same for long video.",
            search_aliases=["sana", "longsana", "checkpoint", "unet loader", "diffusion model", "mini"],
            inputs=[
                io.Combo.Input("model", options=model_files(),
                               tooltip="The model, from models/diffusion_models. 'embedded mini' draws coloured shapes, needs no "
                                       "download and brings its own text encoder and VAE. 'embedded mini long': the same, block "
                                       "by block."),
                io.Combo.Input("precision", options=PRECISIONS, default="auto", advanced=True,
                               tooltip="auto: what suits your card (bf16 on today's). bf16: half the memory of fp32, same "
                                       "pictures to the eye. fp32: for comparisons only, twice the memory. fp8, int8, mxfp8, "
                                       "nvfp4: made from the file while loading, about half the memory of bf16; the help page "
                                       "says which card multiplies in them. Where yours does, fp8 loads with a short run that "
                                       "makes it faster."),
                io.Combo.Input("mode", options=MODES, default="auto",
                               tooltip="The 480p clip model and LongSANA look the same from outside. auto: by the file's name "
                                       "and form, see the log. clip: 5-second clips. long: LongSANA, 4 steps at CFG 1."),
                io.Combo.Input("text_encoder", options=part_files("text_encoders"), default=NONE,
                               tooltip="gemma_2_2b_it_elm_bf16.safetensors, from models/text_encoders. none: connect "
                                       "'Load CLIP' (type pixeldit) instead."),
                io.Combo.Input("vae", options=part_files("vae"), default=NONE,
                               tooltip="480p: wan_2.1_vae.safetensors, 720p: the LTX-2 video VAE, from models/vae. none: "
                                       "connect 'Load VAE' instead."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="To the sampler, LoRA loaders and 'SANA-Video Empty Latent'."),
                io.Clip.Output(display_name="clip", tooltip="To 'SANA-Video Text Encode'. Works when a text encoder is named."),
                io.Vae.Output(display_name="vae", tooltip="To 'SANA-Video Decode'. Works when a VAE is named."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model, precision, mode, text_encoder, vae):
        """Loads again when a file was replaced under the same name."""
        named = (("diffusion_models", model), ("text_encoders", text_encoder), ("vae", vae))
        return [file_stamp(folder, name) for folder, name in named]

    @classmethod
    def execute(cls, model, precision, mode, text_encoder, vae) -> io.NodeOutput:
        import folder_paths

        refuse_fp16(precision)
        choice("precision", precision, PRECISIONS)
        choice("mode", mode, MODES)
        embedded = embedded_files(model) if model in (EMBEDDED, EMBEDDED_LONG) else {}
        if model == EMBEDDED_LONG and mode == "auto":
            mode = "long"
        path = embedded.get("transformer") or folder_paths.get_full_path_or_raise("diffusion_models", model)
        patcher = load_scaled(path, precision, mode)
        spec = patcher.model.spec
        return io.NodeOutput(patcher, _clip(text_encoder, embedded.get("text"), spec),
                             _vae(vae, embedded.get("vae"), spec))


def _clip(name, embedded: str | None, spec):
    """The CLIP of the named file, else the embedded one, else a stand-in that explains itself."""
    import folder_paths

    if name in (None, NONE) and embedded is None:
        return MissingPart("CLIP", "Choose a text encoder in 'Load SANA-Video', or connect 'Load CLIP' (type pixeldit)")
    from .native_text import load_clip

    path = embedded if name in (None, NONE) else folder_paths.get_full_path_or_raise("text_encoders", name)
    return load_clip(path, spec.caption_channels)


def _vae(name, embedded: str | None, spec):
    """The VAE of the named file, else the embedded one, else a stand-in that explains itself."""
    import folder_paths

    if name in (None, NONE) and embedded is None:
        return MissingPart("VAE", "Choose a VAE in 'Load SANA-Video', or connect 'Load VAE'")
    return load_vae(embedded if name in (None, NONE) else folder_paths.get_full_path_or_raise("vae", name), spec)
