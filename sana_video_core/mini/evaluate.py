"""``run.py judge``: how often the embedded model shows what the prompt says, on combinations that training never showed.

Samples clips of held-out prompts, decodes them, lets the judge read them, prints a table and as last line
``adherence: 0.97``. ``--untrained`` does the same with random weights in the transformer, ``--world`` with pictures of the
renderer (the judge's own accuracy). ``--film`` hands over to ``evaluate_film.py``. Not covered: how the judge reads
(``judge.py``).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import SanaVideoError
from . import PROMPTS, load
from .captions import caption, parse
from .judge import ATTRIBUTES, Verdict, adherence, judge
from .render import render
from .sheet import contact_sheet
from .world import Scene, random_scene


def held_out_prompts(clips: int, seed: int = 2) -> tuple[list[str], list[Scene]]:
    """Sentences about scenes that hold a combination kept out of training, and these scenes."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, held_out=True) for _ in range(clips)]
    return [caption(scene, rng) for scene in scenes], scenes


class MiniModel:
    """The embedded model, ready to make clips. ``untrained`` puts random weights into the transformer."""

    def __init__(self, device: torch.device | str = "cpu", untrained: bool = False, dtype: torch.dtype | None = None):
        self.device = torch.device(device)
        self.network, self.text, self.vae = load(device, dtype)
        if untrained:
            self._forget()

    def _forget(self) -> None:
        """Fresh weights of the same spread as each trained one: nothing learned is left, and numbers stay tame."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.network.parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_((p.float().mean() + noise.to(p.device) * p.float().std(unbiased=False)).to(p.dtype))

    @torch.no_grad()
    def clips(self, prompts: Sequence[str], seed: int = 0, steps: int | None = None, cfg: float | None = None,
              frames: int | None = None, solver: str | None = None) -> Tensor:
        """Clips of all prompts in one batch: uint8 ``[B, F, H, W, 3]`` on the CPU. Clip i starts from noise ``seed + i``."""
        from ..sampling.clip import FLOW_DPM, sample_clip

        dtype = next(self.network.parameters()).dtype
        positive, negative = self.text.positive(prompts), self.text.negative([""])
        latents = sample_clip(self.network, positive, negative, self.network.spec, seed=seed, steps=steps, cfg=cfg,
                              frames=frames, solver=solver or FLOW_DPM, device=self.device)
        return torch.stack([self.decode(latent.to(dtype)) for latent in latents])

    def decode(self, latent: Tensor) -> Tensor:
        """uint8 ``[F, H, W, 3]`` on the CPU of one latent ``[C, T, h, w]`` in the network's space."""
        from ..vae.wan import denormalize

        video = self.vae.decode(denormalize(latent[None]))[0].float()
        return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()


def run(clips: int, make: Callable[[list[str], int], Tensor], prompts: Sequence[str], batch: int,
        keep: int = 0) -> tuple[list[Verdict], list[Tensor]]:
    """Make and judge the clips of ``prompts`` in batches, with a line of progress; ``keep`` clips are handed back."""
    verdicts, kept, began = [], [], time.monotonic()
    for start in range(0, clips, batch):
        part = list(prompts[start : start + batch])
        for prompt, clip in zip(part, make(part, start)):
            verdicts.append(judge(clip, parse(prompt)))
            if len(kept) < keep:
                kept.append(clip)
        print(f"\r{len(verdicts)} of {clips} clips, {adherence(verdicts):.3f} right, "
              f"{time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return verdicts, kept


def table(verdicts: Sequence[Verdict]) -> str:
    """Share right of each attribute, among the clips whose prompt states it, then the commonest reasons of failure."""
    lines = [f"{'attribute':12} {'right':>7} {'of':>6}"]
    for name in ATTRIBUTES:
        marks = [getattr(v, name) for v in verdicts if getattr(v, name) is not None]
        if marks:
            lines.append(f"{name:12} {sum(marks) / len(marks):7.3f} {len(marks):6d}")
    failed = Counter(r for v in verdicts if not v.ok for r in v.reasons)
    lines += [f"{count:5d} x {reason}" for reason, count in failed.most_common(12)]
    return "\n".join(lines)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py judge", description="Prompt adherence of the embedded model.",
                                     allow_abbrev=False)
    parser.add_argument("--clips", type=int, default=50, help="number of clips (default 50)")
    parser.add_argument("--film", metavar="BLOCKS", help="judge films of the causal model instead; --film 24 --help tells more")
    parser.add_argument("--untrained", action="store_true", help="random weights in the transformer, for comparison")
    parser.add_argument("--world", action="store_true", help="pictures of the renderer instead: the judge's own accuracy")
    parser.add_argument("--gallery", action="store_true", help="the 16 example prompts instead of drawn ones")
    parser.add_argument("--sheet", metavar="PATH", help="write a contact sheet of the first 16 clips there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--cfg", type=float, help="guidance (default: the model's)")
    parser.add_argument("--solver", help="'flow-DPM' (default), 'flow Euler' or 'UniPC'")
    parser.add_argument("--batch", type=int, help="clips at once (default 50 on a GPU, 4 without)")
    parser.add_argument("--device", help="default: cuda where there is one")
    options = parser.parse_args(argv)
    for name in ("clips", "batch", "steps"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= 100_000:
            raise SanaVideoError(f"--{name} must lie from 1 to 100,000", found=value)
    return options


def main(argv: Sequence[str] = ()) -> int:
    """The command; returns the exit status. The last line printed is ``adherence: X``."""
    try:
        if any(word == "--film" or word.startswith("--film=") for word in argv):
            from .evaluate_film import judge_films

            return judge_films(argv)
        return _clips(_arguments(argv))
    except SanaVideoError as e:
        print(f"judge: {e}", file=sys.stderr)
        return 2


def _clips(options: argparse.Namespace) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch = options.batch or (50 if torch.device(device).type == "cuda" else 4)
    if options.gallery:
        prompts, scenes = list(PROMPTS), []
    else:
        prompts, scenes = held_out_prompts(options.clips)
    if options.world:
        if options.gallery:
            raise SanaVideoError("--world draws its own scenes", action="Leave out --gallery")

        def make(part: list[str], start: int) -> Tensor:
            return render(scenes[start : start + len(part)], device=device).cpu()
    else:
        model = MiniModel(device, options.untrained)

        def make(part: list[str], start: int) -> Tensor:
            return model.clips(part, options.seed + start, options.steps, options.cfg, solver=options.solver)
    verdicts, kept = run(len(prompts), make, prompts, batch, keep=16 if options.sheet else 0)
    print(table(verdicts))
    if options.sheet:
        print(f"sheet: {contact_sheet(kept, prompts[: len(kept)], options.sheet, marks=[v.ok for v in verdicts])}")
    print(f"adherence: {adherence(verdicts):.3f}")
    return 0
