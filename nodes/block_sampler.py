"""Long video block by block: each block is denoised against the state of the earlier ones, which never grows."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError, StateError
from ..sana_video_core.specs import ModelSpec, require_size
from .common import CATEGORY, choice, finite, require_vae, whole_number
from .long import (
    LatentSpool,
    Network,
    Progress,
    State,
    Texts,
    long_spec,
    model_print,
    patches_print,
    require_state,
)
from .shared_state import hand_out

log = logging.getLogger(__name__)

MAX_BLOCKS, MAX_PIXELS, MAX_BLOCK_FRAMES, MAX_WINDOW = 10_000, 16384, 256, 1000
MAX_SEED = 0xFFFFFFFFFFFFFFFF
MANY_STEPS = 20  # of flow-DPM and flow Euler, for a model whose own steps are few
SOLVERS = ["few-step re-noise", "flow-DPM", "flow Euler"]


class SanaVideoBlockSampler(io.ComfyNode):
    """The generator of the core inside a graph (causal spec 0, comfyui spec 9)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoBlockSampler",
            display_name="SANA-Video Block Sampler",
            category=CATEGORY,
            description="Makes long video in blocks of 2.5 seconds at constant memory. Wire STATE from one sampler to the "
                        "next to "
                        "go on; name a run folder to keep every finished block on disk and to resume after a stop.",
            search_aliases=["long video", "autoregressive", "longsana", "continue", "infinite", "film", "sampler"],
            inputs=_inputs(),
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The new blocks, to 'SANA-Video Decode'."),
                State.Output(display_name="state", tooltip="Everything needed to go on: to another block sampler, or to "
                                                           "'SANA-Video Save State'."),
                io.String.Output(display_name="run_folder", tooltip="The run folder's name, to 'SANA-Video Decode'. Empty "
                                                                    "without one."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, blocks, width, height, seed, state=None, run_folder="", negative=None, cfg=1.0, sigmas=None,
        solver=SOLVERS[0], vae=None, fps=16.0, block_frames=0, first_block_frames=0, window=0, recompute=True, keep_states=True,
    ) -> io.NodeOutput:
        job = Job(model, positive, negative, blocks, (width, height), seed, state, cfg, sigmas, solver, fps, block_frames,
                  first_block_frames, window, recompute)
        if isinstance(run_folder, str) and run_folder.strip():
            from .block_film import run_film

            latent, after = run_film(job, run_folder.strip(), vae, bool(keep_states))
        else:
            latent, after = job.run()
        return io.NodeOutput({"samples": latent}, hand_out(after), str(run_folder or "").strip())


def _inputs() -> list:
    return [
        io.Model.Input("model", tooltip="LongSANA, from 'Load SANA-Video' in mode 'long'. LoRAs on the way apply."),
        io.Conditioning.Input("positive", tooltip="From 'SANA-Video Text Encode' (one prompt for all blocks) or from "
                                                  "'SANA-Video Prompt Schedule' (prompts over time)."),
        io.Int.Input("blocks", default=4, min=1, max=MAX_BLOCKS,
                     tooltip="How many new blocks: one is 2.5 seconds at 16 frames a second, 24 are a minute. With a run folder: "
                             "the length of the whole film in blocks."),
        io.Int.Input("width", default=0, min=0, max=MAX_PIXELS, step=16,
                     tooltip="Width in pixels. 0: the model's own (832), or that of the film so far."),
        io.Int.Input("height", default=0, min=0, max=MAX_PIXELS, step=16,
                     tooltip="Height in pixels. 0: the model's own (480), or that of the film so far."),
        io.Int.Input("seed", default=0, min=0, max=MAX_SEED,
                     tooltip="Noise of all blocks. Each block has its own noise from seed and block number, so a film in "
                             "parts is "
                             "the same as in one go. It stays fixed between runs, so that a run folder resumes."),
        State.Input("state", optional=True, tooltip="Where to go on from. Nothing connected: a new video."),
        io.String.Input("run_folder", default="", optional=True,
                        tooltip="A name makes a film in output/sana_video/NAME: finished blocks are kept and not sampled "
                                "again; a "
                                "change of prompt or seed samples from the first changed block on. Empty: no film."),
        io.Conditioning.Input("negative", optional=True, tooltip="What to steer away from. Used when cfg is not 1."),
        io.Float.Input("cfg", default=1.0, min=0.0, max=30.0, step=0.1, optional=True,
                       tooltip="1 for LongSANA. Other values are for models that were not distilled; memory of the state "
                               "doubles."),
        io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels of each block. Nothing connected: the model's own."),
        io.Combo.Input("solver", options=SOLVERS, default=SOLVERS[0], optional=True, advanced=True,
                       tooltip="few-step re-noise: LongSANA's. flow-DPM or flow Euler: for models with many steps."),
        io.Vae.Input("vae", optional=True, tooltip="With a run folder: each finished block is decoded at once into film.mp4, "
                                                   "which "
                                                   "plays while the next one is sampled."),
        io.Float.Input("fps", default=16.0, min=1.0, max=120.0, step=0.01, optional=True, advanced=True,
                       tooltip="Frames a second, for the seconds of a prompt schedule and for the film's video."),
        io.Int.Input("block_frames", default=0, min=0, max=MAX_BLOCK_FRAMES, optional=True, advanced=True,
                     tooltip="Latent frames a block (4 frames each). 0: as the model was trained (10)."),
        io.Int.Input("first_block_frames", default=0, min=0, max=MAX_BLOCK_FRAMES, optional=True, advanced=True,
                     tooltip="Latent frames of a new video's first block. 0: one more than the others (11), as trained."),
        io.Int.Input("window", default=0, min=0, max=MAX_WINDOW, optional=True, advanced=True,
                     tooltip="0: every block remembers the whole video. 3: only the last 3 blocks. Applies to a new video."),
        io.Boolean.Input("recompute", default=True, optional=True, advanced=True,
                         tooltip="At a change of prompt the block before is read again with the new prompt, as in the official "
                                 "code: the video follows sooner."),
        io.Boolean.Input("keep_states", default=True, optional=True, advanced=True,
                         tooltip="With a run folder: keeps the state of every block (153 MiB each at 480p), so that an edit "
                                 "starts "
                                 "at once. Off: only the last two; an edit further back reads the blocks before again."),
    ]


def model_recipe(spec: ModelSpec, sigmas, solver: str, cfg: float):
    """The core's Recipe: connected levels, or those that the model was made for."""
    from ..sana_video_core.sampling.blocks import FEW_STEPS, Recipe, recipe_of
    from ..sana_video_core.sampling.schedules import flow_dpm_sigmas

    choice("solver", solver, SOLVERS)
    if solver == SOLVERS[0]:
        if sigmas is not None:
            return Recipe.few_step(sigmas, cfg)
        if spec.steps > FEW_STEPS:
            raise SanaVideoError("This model needs more steps than the few-step solver makes",
                                 found=f"{spec.name}: {spec.steps} steps", action="Choose the solver flow-DPM")
        return recipe_of(spec, cfg=cfg)
    steps = spec.steps if spec.steps > FEW_STEPS else MANY_STEPS
    return Recipe.multi_step(flow_dpm_sigmas(steps, spec.flow_shift) if sigmas is None else sigmas, solver, cfg)


class Job:
    """The checked inputs of one run. Nothing is loaded or allocated before all of them have passed."""

    def __init__(self, model, positive, negative, blocks, size, seed, state, cfg, sigmas, solver, fps, block_frames,
                 first_block_frames, window, recompute):
        self.spec = spec = long_spec(model)
        self.model, self.state = model, None if state is None else require_state(state)
        self.blocks = whole_number("blocks", blocks, 1, MAX_BLOCKS)
        self.seed = whole_number("seed", seed, 0, MAX_SEED)
        self.cfg, self.fps = finite("cfg", cfg, 0.0, 30.0), finite("fps", fps, 1.0, 120.0)
        self.recipe = model_recipe(spec, sigmas, solver, self.cfg)
        if self.cfg != 1 and negative is None:
            raise SanaVideoError("cfg needs a negative prompt", found=f"cfg {self.cfg:g}, nothing connected to 'negative'",
                                 action="Connect the negative conditioning, or set cfg to 1")
        self.texts = Texts(spec, positive, negative if self.cfg != 1 else None, self.fps)
        self.block_frames = whole_number("block_frames", block_frames, 0, MAX_BLOCK_FRAMES) or spec.block_frames
        self.first_frames = whole_number("first_block_frames", first_block_frames, 0, MAX_BLOCK_FRAMES)
        self.window, self.recompute = whole_number("window", window, 0, MAX_WINDOW), bool(recompute)
        self.size = self._latent_size(*(whole_number(n, v, 0, MAX_PIXELS) for n, v in zip(("width", "height"), size)))
        self.print = model_print(model)
        self.rows = 1 if self.cfg == 1 else 2

    def _latent_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) in latents: what is asked for, else the state's, else the model's own."""
        spec, step = self.spec, self.spec.pixel_step
        own = spec.size if self.state is None else (self.state.grid[1] * step[0], self.state.grid[0] * step[1])
        size = require_size(spec, width or own[0], height or own[1])
        if self.state is not None and size != own:
            raise StateError("The resolution cannot change in mid-film", found=f"{size[0]}x{size[1]}",
                             expected=f"{own[0]}x{own[1]}, as the state was made",
                             action="Set width and height to 0, or begin a new video without a state")
        return size[1] // spec.vae.stride[1], size[0] // spec.vae.stride[2]

    def check_state(self) -> None:
        """Refuse a state that does not fit, before the model is loaded."""
        from ..sana_video_core.sampling.blocks import start_state

        start_state(self.spec, self.size, self.rows, self.state, model_print=self.print)

    def plan(self, blocks: int):
        """BlockPlan of ``blocks`` blocks from the state on."""
        from ..sana_video_core.sampling.plan import plan_blocks

        index, start = (0, 0) if self.state is None else (self.state.blocks, self.state.position)
        return plan_blocks(blocks, self.block_frames, self.first_frames or self.block_frames + 1, index, start)

    def network(self, frames: int) -> Network:
        return Network(self.model, (self.rows, self.spec.channels, frames, *self.size))

    def sample(self, network: Network, plan, state, progress: Progress | None = None, checked: bool = True):
        """The core's generator over ``plan``."""
        from ..sana_video_core.sampling.blocks import sample_blocks

        spans = {span.index: span for span in plan.spans()}
        return sample_blocks(
            network, plan, lambda index: self.texts.condition(spans[index]), spec=self.spec, size=self.size, recipe=self.recipe,
            seed=lambda index: self.seed_of(spans[index]), state=state, device=network.device, window=self.window,
            recompute=self.recompute, keep_undo=self.recompute, model_print=self.print,
            on_step=None if progress is None else progress.step, checked=checked)

    def seed_of(self, span) -> int:
        seed = self.texts.of(span)[3]
        return self.seed if seed is None else seed

    def run(self):
        """(LATENT tensor of the new blocks, STATE on the CPU), without a run folder."""
        self.check_state()
        plan = self.plan(self.blocks)
        for span in plan.spans():
            self.texts.of(span)  # a schedule that is too short says so before anything is sampled
        progress, state = Progress(self.model, self.blocks, self.recipe.count, self.fps), None
        with (self.network(max(plan.lengths)) as network,
              LatentSpool(self.model, plan.frames, (1, self.spec.channels, *self.size)) as spool):
            for block in self.sample(network, plan, self.state, progress):
                spool.add(block.latent)
                state = block.state
        return spool.result(), state.to("cpu", copy=True)

    def patches(self) -> str:
        return patches_print(self.model)

    def check_vae(self, vae) -> None:
        require_vae(vae, self.spec.vae)
