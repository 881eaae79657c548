"""The official solvers as SAMPLER and SIGMAS, for 'SamplerCustom' and 'SamplerCustomAdvanced'."""

from __future__ import annotations

import itertools

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError
from .common import CATEGORY, choice, finite, spec_of, whole_number

FLOW_DPM, FLOW_EULER, RENOISE = "flow-DPM", "flow Euler", "few-step re-noise"
SOLVERS = [FLOW_DPM, FLOW_EULER, RENOISE]
SCHEDULES = ["flow-DPM", "flow Euler", "LongSANA 4 steps"]
# LongSANA's four levels: the shift-8 warp of 1, 3/4, 1/2, 1/4 (causal spec 4.2), then the clean end.
LONGSANA_SIGMAS = (1.0, 0.96, 0.889, 0.727, 0.0)
MAX_STEPS = 1000
MAX_SHIFT = 100.0
PURE_NOISE = 0.99899  # the lowest first sigma of a schedule that starts from pure noise (shift 1)


class SanaVideoSampler(io.ComfyNode):
    """SAMPLER output; the numbers are those of the official scripts (model spec 3.6, causal spec 4.3)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoSampler",
            display_name="SANA-Video Sampler",
            category=CATEGORY,
            description="The solvers of the official scripts. Use it with 'SANA-Video Sigmas' in a custom sampler node when you "
                        "want the pictures of the official code.",
            search_aliases=["flow dpm solver", "flow-dpm", "euler", "longsana", "official sampler"],
            inputs=[
                io.Combo.Input("solver", options=SOLVERS, default=FLOW_DPM,
                               tooltip="flow-DPM: the official solver of the clip models, sharp from about 20 steps. flow Euler: "
                                       "simpler, wants more steps. few-step re-noise: for LongSANA's 4 steps at CFG 1."),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="To the sampler input of 'SamplerCustomAdvanced'.")],
        )

    @classmethod
    def execute(cls, solver) -> io.NodeOutput:
        import comfy.samplers

        choice("solver", solver, SOLVERS)
        if solver == FLOW_EULER:
            return io.NodeOutput(comfy.samplers.ksampler("euler"))
        function = sample_flow_dpm if solver == FLOW_DPM else sample_renoise
        return io.NodeOutput(comfy.samplers.KSAMPLER(function))


class SanaVideoSigmas(io.ComfyNode):
    """SIGMAS output in the official forms (model spec 3.5)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoSigmas",
            display_name="SANA-Video Sigmas",
            category=CATEGORY,
            description="The noise levels of the official scripts. The shift is taken from the model (8 at 480p); change it with "
                        "'ModelSamplingSD3' before this node.",
            search_aliases=["scheduler", "sigmas", "flow shift", "steps", "longsana"],
            inputs=[
                io.Model.Input("model", tooltip="Gives the shift: a higher one spends more steps on the coarse picture."),
                io.Combo.Input("schedule", options=SCHEDULES, default=SCHEDULES[0],
                               tooltip="Choose the one that belongs to the solver. 'LongSANA 4 steps' has fixed levels; steps "
                                       "is ignored there."),
                io.Int.Input("steps", default=20, min=1, max=MAX_STEPS,
                             tooltip="More steps: finer and slower. 20 is good, the official scripts use 50."),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                               tooltip="1 makes a new video. Lower keeps more of the video in the latent (video to video)."),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="To the sigmas input of 'SamplerCustomAdvanced'.")],
        )

    @classmethod
    def execute(cls, model, schedule, steps, denoise) -> io.NodeOutput:
        spec = spec_of(model)
        choice("schedule", schedule, SCHEDULES)
        steps = whole_number("steps", steps, 1, MAX_STEPS)
        denoise = finite("denoise", denoise, 0.01, 1.0)
        shift = getattr(model.get_model_object("model_sampling"), "shift", spec.flow_shift)
        return io.NodeOutput(make_sigmas(schedule, steps, finite("shift", shift, 0.01, MAX_SHIFT), denoise))


def make_sigmas(schedule: str, steps: int, shift: float, denoise: float = 1.0):
    """SIGMAS ``[steps + 1]`` float32, falling to 0; with ``denoise`` below 1 the last part of a longer schedule."""
    import torch

    from ..sana_video_core.sampling.schedules import flow_dpm_sigmas, flow_euler_sigmas

    if schedule == SCHEDULES[2]:
        sigmas = torch.tensor(LONGSANA_SIGMAS)
        kept = max(1, round(4 * denoise))
        return sigmas[-(kept + 1):]
    total = max(steps, int(steps / denoise))
    function = flow_dpm_sigmas if schedule == SCHEDULES[0] else flow_euler_sigmas
    return torch.as_tensor(function(total, shift), dtype=torch.float32).cpu()[-(steps + 1):]


def start_noise(model, x, sigmas):
    """Where the official code starts: at a first sigma of nearly 1 from pure noise, not from sigma times noise."""
    noise = getattr(model, "noise", None)
    if noise is None or float(sigmas[0]) < PURE_NOISE or not bool(noise.any()):
        return x
    return noise.to(x)


def velocity(model, extra_args: dict):
    """``v(x, sigma)`` of the guided model: ComfyUI's denoisers return x0, and v = (x - x0) / sigma."""
    def call(x, sigma):
        level = x.new_ones([x.shape[0]]) * sigma
        return (x - model(x, level, **extra_args)) / sigma

    return call


def sample_renoise(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """x0 from the velocity, then fresh noise of the next level (causal spec 4.3). Noise comes from the run's seed."""
    import torch

    extra_args = extra_args or {}
    x = start_noise(model, x, sigmas)
    generator = torch.Generator("cpu").manual_seed((extra_args.get("seed") or 0) + 1)
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        x0 = model(x, x.new_ones([x.shape[0]]) * sigma, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})
        noise = torch.randn(x.shape, generator=generator).to(x)
        x = (1 - after) * x0 + after * noise
    return x


def sample_flow_dpm(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The official multistep flow DPM-Solver++ (model spec 3.6) by the core, in the calling form of ComfyUI's samplers."""
    from ..sana_video_core.sampling.solvers import flow_dpm_solver

    if float(sigmas[0]) > 1 or len(sigmas) < 2:
        raise SanaVideoError("The flow-DPM solver needs noise levels from 1 down to 0", found=f"{sigmas.tolist()[:4]} ...",
                             action="Connect 'SANA-Video Sigmas'")
    guided = velocity(model, extra_args or {})

    def report(i, x0, x_now):
        if callback is not None:
            callback({"x": x_now, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})

    return flow_dpm_solver(guided, start_noise(model, x, sigmas), sigmas, callback=report)
