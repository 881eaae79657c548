"""Input scales for fp8: a short run shows how large the inputs of layers get, and what makes them can then write fp8 itself.

'Load SANA-Video' gives a model that it has quantised such scales by a run of the model alone (``load_scaled``). The node here
does it with a prompt, a size and a length of the user's.
"""

from __future__ import annotations

import itertools
import logging

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError
from .common import CATEGORY, spec_of, whole_number
from .lowbit import multiplies_in

log = logging.getLogger(__name__)

MOST_STEPS = 50
OWN_STEPS, OWN_FRAMES = 8, 17  # of the run at loading; fewer steps where the model was made for fewer
OWN_TOKENS = 16  # few: attention averages the text, and averages of many random tokens are smaller than those of a real text
SHOWN = 5  # layers that the report names


class SanaVideoCalibrate(io.ComfyNode):
    """MODEL in fp8 to a fresh one with input scales; the given one stays as it is."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoCalibrate",
            display_name="SANA-Video Calibrate FP8",
            category=CATEGORY,
            description="'Load SANA-Video' finds the scales of an fp8 model's inputs itself, by a short run without a prompt. "
                        "Use this node where you want them from a prompt and size of yours, or where the log says that the "
                        "loader's run failed. Save the result with 'ModelSave' and load that file with precision 'auto' from "
                        "then on.",
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
    from .loading import load_diffusion

    patcher = load_diffusion(*arguments)
    return patcher, give_scales(patcher, arguments, run)


def give_scales(patcher, arguments: tuple, run) -> str:
    """Give a MODEL, just loaded with ``arguments``, the input scales that ``run(patcher)`` asks for; which layers got one."""
    from ..sana_video_core.quant.calibrate import SPREAD
    from .fp8_layers import calibrate

    scales, seen = calibrate(patcher.model.diffusion_model, lambda: run(patcher))
    kept = {name: inputs.spread() for name, inputs in seen.items() if name not in scales}
    patcher.cached_patcher_init = (load_calibrated, (arguments, scales))
    report = f"{len(scales)} of {len(seen)} fp8 layers got an input scale."
    if kept:
        names = ", ".join(f"{name} ({spread:.0f} times)" for name, spread in sorted(kept.items(), key=lambda k: -k[1])[:SHOWN])
        report += (f" The others stay as they were: their largest values are more than {SPREAD:.0f} times those of a typical "
                   f"channel ({names}{' ...' if len(kept) > SHOWN else ''}).")
    return report


def load_scaled(path: str, precision: str = "auto", mode: str = "auto"):
    """As ``load_diffusion``. What it quantises to fp8 gets input scales where the device multiplies in fp8."""
    import comfy.model_management as management

    from .fp8_layers import FORMAT
    from .loading import load_diffusion

    arguments = (path, precision, mode)
    patcher = load_diffusion(*arguments)
    if precision != "fp8" or not patcher.model.quantised_here or not multiplies_in(FORMAT, patcher.load_device):
        return patcher
    try:
        log.info("A short run without a prompt: %s", give_scales(patcher, arguments, own_run))
    except Exception as error:  # whatever it is: without scales the model is slower, but it is there. Cancel is no Exception
        reason = "not enough memory" if management.is_oom(error) else f"{type(error).__name__}: {str(error)[:200]}"
        log.warning("The fp8 model has no input scales and runs slower: the short run for them failed (%s). "
                    "'SANA-Video Calibrate FP8' behind the loader makes such a run too, with a latent of your size", reason)
    return patcher


def own_run(patcher) -> None:
    """A few Euler steps of a small clip from fixed noise and a made-up text: the weights decide how large inputs get. Shows its
    progress on the running node."""
    import comfy.utils
    import torch

    from .long import Network
    from .sampler import FLOW_EULER, make_sigmas

    spec, generator = patcher.model.spec, torch.Generator().manual_seed(0)
    points = [max(1, size // 2 // step) * patch for size, step, patch in zip(spec.size, spec.pixel_step, spec.patch[:0:-1])]
    shape = (1, spec.channels, spec.latent_frames(OWN_FRAMES), points[1], points[0])
    latent = torch.randn(shape, generator=generator).to(patcher.load_device)
    text = torch.randn(1, OWN_TOKENS, spec.caption_channels, generator=generator).to(patcher.load_device)
    sigmas = make_sigmas(FLOW_EULER, min(OWN_STEPS, spec.steps), spec.flow_shift).tolist()
    bar = comfy.utils.ProgressBar(len(sigmas) - 1)
    with Network(patcher, shape) as network, torch.inference_mode():  # the network looks for Cancel in every block
        for sigma, after in itertools.pairwise(sigmas):
            latent = latent + (after - sigma) * network(latent, latent.new_tensor([1000 * sigma]), text).float()
            bar.update(1)


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
