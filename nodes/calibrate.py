"""Input scales for fp8: a short run shows how large the inputs of layers get, and what makes them can then write fp8 itself."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError
from .common import CATEGORY, spec_of, whole_number

log = logging.getLogger(__name__)

MOST_STEPS = 50
SHOWN = 5  # layers that the report names


class SanaVideoCalibrate(io.ComfyNode):
    """MODEL in fp8 to a fresh one with input scales; the given one stays as it is."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoCalibrate",
            display_name="SANA-Video Calibrate FP8",
            category=CATEGORY,
            description="Makes an fp8 model faster on cards that multiply in fp8: a short run shows how large the layers' inputs "
                        "get. Save the result with 'ModelSave' and load that file with precision 'auto' from then on.",
            search_aliases=["fp8", "quantize", "quantise", "input scale", "faster", "speed"],
            inputs=[
                io.Model.Input("model", tooltip="Straight from 'Load SANA-Video' with precision fp8; LoRAs come after this "
                                                "node."),
                io.Conditioning.Input("positive", tooltip="A prompt of the kind you use, from 'SANA-Video Text Encode'."),
                io.Latent.Input("latent", tooltip="Size and length of the short run. A small one is enough: 'SANA-Video Empty "
                                                  "Latent' with 17 frames."),
                io.Int.Input("steps", default=8, min=1, max=MOST_STEPS, tooltip="Steps of the short run: 8 is enough."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with input scales, to the sampler or to 'ModelSave'."),
                io.String.Output(display_name="report", tooltip="How many layers got a scale, and which did not."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, latent, steps) -> io.NodeOutput:
        spec_of(model)
        steps = whole_number("steps", steps, 1, MOST_STEPS)
        arguments = plain_fp8(model)
        patcher, report = calibrated(arguments, lambda fresh: short_run(fresh, positive, latent, steps))
        log.info("%s", report)
        return io.NodeOutput(patcher, report)


def plain_fp8(model) -> tuple:
    """How 'Load SANA-Video' made this MODEL; refused unless it is in fp8 and nothing has been put on it."""
    from .fp8_layers import fp8_layers_of
    from .loading import load_diffusion

    if model.patches:
        raise SanaVideoError("'SANA-Video Calibrate FP8' wants the model without LoRAs", found="a LoRA on the model",
                             action="Connect 'Load SANA-Video' straight to it, and the LoRA nodes behind it")
    if not fp8_layers_of(model.model.diffusion_model):
        raise SanaVideoError("There is nothing to calibrate in this model", found="no layers in fp8",
                             action="Choose precision 'fp8' in 'Load SANA-Video'")
    made_by, arguments = (model.cached_patcher_init or (None, ()))[:2]
    if made_by is load_calibrated:
        arguments = arguments[0]
    elif made_by is not load_diffusion:
        raise SanaVideoError("It is not known which file this model was loaded from",
                             action="Connect 'Load SANA-Video' straight to 'SANA-Video Calibrate FP8'")
    return arguments


def calibrated(arguments: tuple, run) -> tuple[object, str]:
    """(a fresh MODEL with the input scales that ``run(fresh)`` asks for, report). ``arguments``: those of ``load_diffusion``."""
    from ..sana_video_core.quant.calibrate import SPREAD
    from .fp8_layers import calibrate
    from .loading import load_diffusion

    patcher = load_diffusion(*arguments)
    scales, seen = calibrate(patcher.model.diffusion_model, lambda: run(patcher))
    kept = {name: inputs.spread() for name, inputs in seen.items() if name not in scales}
    patcher.cached_patcher_init = (load_calibrated, (arguments, scales))
    report = f"{len(scales)} of {len(seen)} fp8 layers got an input scale."
    if kept:
        names = ", ".join(f"{name} ({spread:.0f} times)" for name, spread in sorted(kept.items(), key=lambda k: -k[1])[:SHOWN])
        report += (f" The others stay as they were: their largest values are more than {SPREAD:.0f} times those of a typical "
                   f"channel ({names}{' ...' if len(kept) > SHOWN else ''}).")
    return patcher, report


def load_calibrated(arguments: tuple, scales: dict[str, float], disable_dynamic: bool = False):
    """The same model again, for ComfyUI."""
    from .fp8_layers import set_input_scales
    from .loading import load_diffusion

    patcher = load_diffusion(*arguments, disable_dynamic=disable_dynamic)
    set_input_scales(patcher.model.diffusion_model, scales)
    patcher.cached_patcher_init = (load_calibrated, (arguments, scales))
    return patcher


def short_run(patcher, positive, latent: dict, steps: int) -> None:
    """A few steps from noise without guidance, with progress and Cancel as in a sampler."""
    import comfy.sample
    import comfy.samplers
    import latent_preview

    from .sampler import make_sigmas

    samples = comfy.sample.fix_empty_latent_channels(patcher, latent["samples"])
    shift = getattr(patcher.get_model_object("model_sampling"), "shift", spec_of(patcher).flow_shift)
    comfy.sample.sample_custom(
        patcher, comfy.sample.prepare_noise(samples, 0), 1.0, comfy.samplers.ksampler("euler"),
        make_sigmas("flow Euler", steps, float(shift)), positive, positive, samples, noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(patcher, steps), disable_pbar=True, seed=0)
