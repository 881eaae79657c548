"""What ComfyUI's step caches cost the embedded clip model: steps left out, difference from the exact clip, prompts followed.

``run.py bench step_cache [--tiny] [--clips N]``; needs COMFYUI_PATH; on two CPU cores about 10 s a clip and setting. Each is
sampled by itself in ComfyUI's sampler (Euler, 20 steps, CFG 3), as EasyCache decides for a whole batch. Checked first: without a
cache the pack's MODEL gives the same clip twice.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from sana_video_core.mini import evaluate, files
from sana_video_core.mini.captions import parse
from sana_video_core.mini.judge import adherence, judge

from .comfy_step import load_pack
from .harness import Report, relative_error

SETTINGS = (("EasyCache", 0.05), ("EasyCache", 0.1), ("EasyCache", 0.2), ("LazyCache", 0.2))
START, END = 0.15, 0.95  # ComfyUI's own defaults: share of the noise range within which steps may be left out
STEPS, CFG = 20, 3.0


class Clips:
    """The embedded clip model in ComfyUI's sampler."""

    def __init__(self, loading, steps: int, frames: int):
        import comfy.model_management

        self.steps, self.frames = steps, frames
        self.patcher = loading.load_diffusion(str(files()["transformer"]), "auto", "auto")
        self.mini = evaluate.MiniModel(comfy.model_management.get_torch_device())
        self.calls, network = 0, self.patcher.model.diffusion_model
        plain = network._forward

        def counted(*arguments, **options):
            self.calls += 1
            return plain(*arguments, **options)

        network._forward = counted

    def condition(self, caption) -> list:
        embedding, mask = caption
        return [[embedding.cpu(), {"attention_mask": mask.cpu()}]]

    def sample(self, prompt: str, seed: int, cache: tuple[str, float] | None = None) -> tuple[Tensor, float]:
        """(latent in ComfyUI's space, share of steps that the network made)."""
        import comfy.sample
        from comfy_extras import nodes_easycache

        model, spec = self.patcher, self.patcher.model.spec
        if cache is not None:
            model, = getattr(nodes_easycache, f"{cache[0]}Node").execute(model, cache[1], START, END, False).args
        _, down, across = spec.vae.stride
        shape = (1, spec.channels, spec.latent_frames(self.frames), spec.size[1] // down, spec.size[0] // across)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        positive, negative = self.mini.text.positive([prompt]), self.mini.text.negative([""])
        self.calls = 0
        out = comfy.sample.sample(model, noise, self.steps, CFG, "euler", "simple", self.condition(positive),
                                  self.condition(negative), torch.zeros(shape), seed=seed, disable_pbar=True)
        return out, self.calls / self.steps

    def right(self, latent: Tensor, prompt: str):
        inner = self.patcher.model.process_latent_in(latent)[0].to(self.mini.device)
        return judge(self.mini.decode(inner.to(next(self.mini.network.parameters()).dtype)), parse(prompt))


@torch.inference_mode()
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench step_cache")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--clips", type=int, default=24)
    options = parser.parse_args(arguments)
    clips = Clips(load_pack(), 6 if options.tiny else STEPS, 41 if options.tiny else 81)
    report = Report("step_cache")
    prompts, _ = evaluate.held_out_prompts(options.clips)
    try:
        exact = [clips.sample(prompt, seed)[0] for seed, prompt in enumerate(prompts)]
        report.check("the same clip without a cache", relative_error(clips.sample(prompts[0], 0)[0], exact[0]), 1e-6)
        report.add("exact", adherence([clips.right(x, p) for x, p in zip(exact, prompts)]), "share of clips right",
                   clips=options.clips)
        for cache in SETTINGS:
            made = [clips.sample(prompt, seed, cache) for seed, prompt in enumerate(prompts)]
            share = sum(s for _, s in made) / len(made)
            report.add(f"{cache[0]}_{cache[1]}", adherence([clips.right(x, p) for (x, _), p in zip(made, prompts)]),
                       "share of clips right", steps_made=share, times_fewer=1 / share,
                       latent_difference=sum(relative_error(a, b) for (a, _), b in zip(made, exact)) / len(made))
    finally:
        if not options.tiny:  # a check of the benchmark, not a figure
            print(report.write(), flush=True)
    return 0
