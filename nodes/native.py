"""SANA-Video as a native ComfyUI MODEL: the network's adapter, the BaseModel and its config.

Imported inside functions only (it needs ``comfy.model_base``). No global of ComfyUI is touched: the objects are built
here and handed to ComfyUI's own patcher, so samplers, LoRAs, caches, compile and offload treat them like core models.
Source: comfyui spec 6. Not covered: reading files (``loading.py``).
"""

from __future__ import annotations

import math

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.patcher_extension
import comfy.supported_models_base
import torch

from ..sana_video_core.checkpoint import SPEC_KEY, spec_to_text
from ..sana_video_core.dit import SanaVideoTransformer
from ..sana_video_core.errors import SanaVideoError
from ..sana_video_core.specs import ModelSpec, require_size
from .fp8_layers import with_scaled_inputs

LATENT_FORMATS = {16: comfy.latent_formats.Wan21, 128: comfy.latent_formats.LTXV}
# Values of the model's width that one token holds at the peak of a block: q, k, v with their rotated float32 copies.
PEAK_WIDTHS_PER_TOKEN = 24


def memory_factor(spec: ModelSpec) -> float:
    """ComfyUI reckons ``latent points * bytes per value * 0.01 * factor`` MiB of working memory (comfyui spec 4)."""
    return PEAK_WIDTHS_PER_TOKEN * spec.width / math.prod(spec.patch) / (0.01 * 2**20)


class SanaVideoDiT(SanaVideoTransformer):
    """The core's network behind the call signature of ComfyUI's diffusion models."""

    def __init__(self, spec: ModelSpec, dtype=None, device=None, operations=None, image_model=None):
        super().__init__(spec, operations=with_scaled_inputs(operations), dtype=dtype, device=device)
        self.dtype = dtype

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **kwargs):
        """x ``[B, C, T, H, W]``, timestep ``[B]`` or ``[B, T]`` -> velocity. Runs through DIFFUSION_MODEL wrappers."""
        transformer_options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options)
        if wrappers:  # EasyCache of ComfyUI 0.30 writes into its input, which in float32 is the sampler's own latent
            x = x.clone()
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, transformer_options, **kwargs)

    def _forward(self, x, timestep, context, transformer_options, attention_mask=None, kept_latent=None, free_frames=None,
                 **kwargs):
        if kept_latent is not None:
            x = torch.where(free_frames > 0, x, kept_latent.to(x))
        hook = _block_hook(transformer_options, context, len(self.blocks))
        return super().forward(x, timestep, context, attention_mask, on_block=hook)


def _block_hook(options: dict, context, total: int):
    """The core's ``on_block``: 'double_block' replacements (skip-layer guidance and the like), and a prompt interrupt."""
    replace = options.get("patches_replace", {}).get("dit", {})
    if torch.compiler.is_compiling() and not replace:
        return None

    def run(index, call, x):
        options["block_index"], options["total_blocks"] = index, total
        _stop_if_interrupted()
        if ("double_block", index) not in replace:
            return call(x, not replace)  # a replacement may have kept what it was given or gave
        arguments = {"img": x, "txt": context, "transformer_options": options}
        extra = {"original_block": lambda a: {"img": call(a["img"])}}
        return replace[("double_block", index)](arguments, extra)["img"]

    return run


def _stop_if_interrupted() -> None:
    """Once a block, so that Cancel is felt within a step also where a step takes long."""
    if not torch.compiler.is_compiling():
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()


class SanaVideoModel(comfy.model_base.BaseModel):
    """Flow matching model of one ModelSpec. ``spec`` is what the other nodes read."""

    def __init__(self, config: SanaVideoConfig, device=None):
        super().__init__(config, comfy.model_base.ModelType.FLOW, device=device, unet_model=SanaVideoDiT)
        self.spec: ModelSpec = config.unet_config["spec"]
        self.quantised_here = False  # by the loader, from a file that was not

    def _apply_model(self, *args, **kwargs):
        # ComfyUI casts weights on use, so the network cannot tell the dtype of the arithmetic from them. Set here and not
        # in the network's forward: a change in there would make torch.compile compile twice.
        if self.diffusion_model.compute_dtype != self.get_dtype_inference():
            self.diffusion_model.compute_dtype = self.get_dtype_inference()
        return super()._apply_model(*args, **kwargs)

    def extra_conds(self, **kwargs):
        """Conditions of one prompt; everything that does not fit is refused here, before the first step."""
        out = super().extra_conds(**kwargs)
        check_latent(self.spec, kwargs["noise"].shape)
        refuse_schedule(kwargs)
        context, mask = kwargs.get("cross_attn"), kwargs.get("attention_mask")
        check_conditioning(self.spec, context, mask)
        out["c_crossattn"] = comfy.conds.CONDRegular(context)
        if mask is not None:
            out["attention_mask"] = comfy.conds.CONDRegular(mask)
        free = free_frames(kwargs.get("denoise_mask"))
        if free is not None and kwargs.get("latent_image") is not None:
            out["free_frames"] = comfy.conds.CONDRegular(free)
            out["kept_latent"] = comfy.conds.CONDRegular(kwargs["latent_image"] * (1 - free))
        return out

    def process_timestep(self, timestep, free_frames=None, **kwargs):
        """One time per latent frame when some frames are kept: those are clean, so their time is 0 (model spec 3.7)."""
        if free_frames is None:
            return timestep
        return timestep[:, None] * free_frames[:, 0, :, 0, 0].float()


def free_frames(mask: torch.Tensor | None) -> torch.Tensor | None:
    """``[B, 1, T, 1, 1]``: 0 where a noise mask ``[B, C, T, H, W]`` keeps the whole latent frame, else 1.

    None when no frame is kept whole: then ComfyUI's usual masking does the work alone.
    """
    if mask is None or mask.ndim != 5:
        return None
    free = (mask.amax(dim=(1, 3, 4), keepdim=True) > 0).float()
    return None if bool(free.all()) else free


def check_latent(spec: ModelSpec, shape) -> None:
    """Refuse a latent whose channels or size the model cannot take, with the nearest valid size in pixels."""
    if len(shape) != 5 or shape[1] != spec.channels:
        raise SanaVideoError(f"The latent does not fit {spec.name}", found=f"shape {list(shape)}",
                             expected=f"{spec.channels} channels in 5 dimensions (a video latent)",
                             action="Make it with 'SANA-Video Empty Latent', or encode it with the VAE of this model")
    stride = spec.vae.stride
    require_size(spec, shape[4] * stride[2], shape[3] * stride[1])


def check_conditioning(spec: ModelSpec, context: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """Refuse text conditioning of another text encoder, or whose mask does not cover its tokens."""
    action = "Encode the prompt with 'SANA-Video Text Encode' and the text encoder that belongs to this model"
    if context is None or context.ndim != 3 or context.shape[-1] != spec.caption_channels:
        raise SanaVideoError(f"The text conditioning does not fit {spec.name}",
                             found="none" if context is None else f"{context.shape[-1]} channels",
                             expected=f"{spec.caption_channels} channels", action=action)
    if mask is not None and mask.shape[-1] != context.shape[1]:
        raise SanaVideoError("The text mask does not cover the text",
                             found=f"{mask.shape[-1]} mask entries for {context.shape[1]} tokens",
                             action="Write both texts into one prompt instead of joining two conditionings")


def refuse_schedule(options: dict) -> None:
    """A prompt schedule is many texts with times: an ordinary sampler would mix them all in every step."""
    if options.get("sana_video_schedule") is not None:
        raise SanaVideoError("A prompt schedule works in 'SANA-Video Block Sampler' only", found="a schedule in another sampler",
                             action="Use 'SANA-Video Text Encode' here, or the block sampler")


class SanaVideoConfig(comfy.supported_models_base.BASE):
    """What ComfyUI wants to know about an architecture, filled from a ModelSpec."""

    def __init__(self, spec: ModelSpec):
        self.unet_extra_config = {}
        self.supported_inference_dtypes = [torch.bfloat16, torch.float32]
        self.latent_format = LATENT_FORMATS[spec.channels]
        self.sampling_settings = {"shift": spec.flow_shift}
        self.memory_usage_factor = memory_factor(spec)
        super().__init__({"image_model": "sana_video", "spec": spec})

    def get_model(self, state_dict, prefix="", device=None):
        return SanaVideoModel(self, device=device)

    def process_unet_state_dict_for_saving(self, state_dict):
        """ModelSave writes no description of the model, and heads and mode are not in the shapes: carry it as a tensor."""
        text = spec_to_text(self.unet_config["spec"]).encode()
        return super().process_unet_state_dict_for_saving(state_dict) | {SPEC_KEY: torch.tensor(list(text), dtype=torch.uint8)}
