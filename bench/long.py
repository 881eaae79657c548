"""What the benchmarks of long video share: LongSANA of full size with random weights, and its peers without a carried state.

``Long`` is the network with a text and a recipe. ``recomputed_blocks`` reads all earlier blocks again before each block;
``ListModel`` keeps every block's contribution, as the official sampler does (causal spec 3.3). Both give the same blocks as the
running sums. Not a benchmark by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sana_video_core.mini.film import recipe_of
from sana_video_core.sampling.blocks import Block, Condition, Recipe, prefill, sample_blocks
from sana_video_core.sampling.guidance import Caption
from sana_video_core.sampling.plan import BlockPlan, plan_blocks
from sana_video_core.sampling.schedules import LONGSANA_TIMES
from sana_video_core.specs import SPECS, ModelSpec
from sana_video_core.state import LayerState, RecurrentState

from . import dit

SEED = 5
# The same arithmetic in the same order: 0 on a machine whose products repeat to the bit. A wrong history is off by far more.
SAME = 1e-3


@dataclass(frozen=True)
class Size:
    """Spec, latent (height, width), latent frames a block (the first has one more), limits of the state in MiB."""

    spec: ModelSpec
    latent: tuple[int, int]
    base: int
    state_mib: float
    undo_mib: float


FULL = Size(SPECS["longsana-2b-480p"], (60, 104), 10, 153, 320)
TINY = Size(replace(SPECS["sana-video-mini-long"], name="bench-tiny-long", depth=2), (8, 8), 2, 0.041, 0.09)


class Long:
    """A random network of that size in bfloat16, or ``model``, with one random text. ``steps``: None takes the spec's four."""

    def __init__(self, size: Size, device: str, steps: int | None = None, seed: int = 0, model=None):
        self.size, self.spec, self.device = size, size.spec, device
        self.model = dit.build(size.spec, device, torch.bfloat16, seed) if model is None else model
        texts = dit.inputs(size.spec, (1, *size.latent), 1, device, torch.bfloat16)
        self.condition = Condition(Caption(texts["caption"], texts["caption_mask"]))
        self.recipe: Recipe = recipe_of(size.spec, steps or len(LONGSANA_TIMES), 1.0)

    def plan(self, blocks: int) -> BlockPlan:
        return plan_blocks(blocks, self.size.base)

    def sample(self, blocks: int | BlockPlan, model=None, **options) -> Iterator[Block]:
        """The core's generator over so many blocks of a new film; ``options`` as for :func:`sample_blocks`."""
        plan = self.plan(blocks) if isinstance(blocks, int) else blocks
        return sample_blocks(self.model if model is None else model, plan, self.condition, spec=self.spec,
                             size=self.size.latent, recipe=self.recipe, seed=SEED, device=self.device, **options)

    def recompute(self, plan: BlockPlan, earlier: Sequence[Tensor] = ()) -> Iterator[Block]:
        """See :func:`recomputed_blocks`."""
        return recomputed_blocks(self.model, plan, self.condition, spec=self.spec, size=self.size.latent, recipe=self.recipe,
                                 seed=SEED, device=self.device, earlier=earlier)


def recomputed_blocks(
    model, plan: BlockPlan, condition: Condition | Callable[[int], Condition], *, spec: ModelSpec, size: tuple[int, int],
    recipe: Recipe, seed: int | Callable[[int], int], device, window: int = 0, earlier: Sequence[Tensor] = (),
) -> Iterator[Block]:
    """The blocks of :func:`sample_blocks` with nothing carried but latents: before each block the state is made anew from all
    blocks so far. ``earlier``: the latents ``[1, C, T, H, W]`` of the film's blocks before ``plan``."""
    latents = list(earlier)
    for span in plan.spans():
        state = None
        if latents:
            state = prefill(model, torch.cat(latents, 2).to(device), condition, spec=spec, cfg=recipe.cfg, device=device,
                            lengths=[t.shape[2] // spec.patch[0] for t in latents], window=window, keep_undo=False)
        one = BlockPlan((span.frames,), span.index, span.start)
        block = next(sample_blocks(model, one, condition, spec=spec, size=size, recipe=recipe, seed=seed, state=state,
                                   device=device, window=window, recompute=False, keep_undo=False, commit_last=False))
        latents.append(block.latent.to(latents[0].device if latents else device))
        yield block


class ListModel:
    """A network whose history is the official sampler's: ``kept`` holds the contribution of every block so far, and each commit
    sums them again from the first one."""

    def __init__(self, model):
        self.model, self.kept = model, []

    def __call__(self, *args, **options) -> Tensor:
        return self.model(*args, **options)

    def absorb(self, latent: Tensor, caption: Tensor, mask: Tensor | None = None, *, state: RecurrentState) -> RecurrentState:
        # With a window of one block the layers of the next state are that block's own contribution.
        alone = self.model.absorb(latent, caption, mask, state=state._replace(window=1, recent=(), keep_undo=False))
        self.kept.append(alone.layers)
        total = self.kept[0]
        for own in self.kept[1:]:
            total = tuple(LayerState(t.vk + o.vk, t.ksum + o.ksum, o.tail) for t, o in zip(total, own, strict=True))
        return alone._replace(window=0, recent=(), keep_undo=state.keep_undo, layers=total)


def synchronize(device: str) -> None:
    """Wait for the device, so that the clock tells the truth."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Marks:
    """Moments on the device's own clock; they are queued with its work, and nothing waits for them."""

    def __init__(self, device: str):
        self.device, self._moments = device, []

    def mark(self) -> None:
        moment = time.perf_counter()
        if self.device.startswith("cuda"):
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._moments.append(moment)

    def seconds(self) -> list[float]:
        """The time between each moment and the next."""
        synchronize(self.device)
        pairs = list(zip(self._moments, self._moments[1:]))
        return [b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in pairs]


def timed(blocks: Iterator[Block], device: str) -> Iterator[tuple[Block, float]]:
    """Each block with the seconds that it took."""
    while True:
        synchronize(device)
        start = time.perf_counter()
        block = next(blocks, None)
        synchronize(device)
        if block is None:
            return
        yield block, time.perf_counter() - start
        del block
