"""The block sampler with a run folder: plan, resume, decode while sampling."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..sana_video_core.errors import SanaVideoError
from .common import MissingPart
from .film import film_file, run_folder
from .long import LatentSpool, Progress

if TYPE_CHECKING:
    from .block_sampler import Job

log = logging.getLogger(__name__)


def film_plan(job: Job):
    """The core's FilmPlan for the inputs of a block sampler."""
    from ..sana_video_core.film import FilmBlock, FilmPlan, FilmSettings
    from ..sana_video_core.sampling.blocks import caption_key

    plan, patches, keys, blocks = job.plan(job.blocks), job.patches(), {}, []
    for span in plan.spans():
        caption, prompt, score, _ = job.texts.of(span)
        condition = job.texts.condition(span)
        key = (id(caption.embedding), condition.negative and id(condition.negative.embedding))
        if key not in keys:
            keys[key] = caption_key(condition, job.cfg)
        blocks.append(FilmBlock(span.frames, job.seed_of(span), keys[key], patches, prompt, score))
    recipe = {"solver": job.recipe.solver, "steps": job.recipe.steps, "sigmas": job.recipe.sigmas, "cfg": job.cfg}
    start = "" if job.state is None else state_print(job.state)
    settings = FilmSettings(job.spec.name, job.print, job.size, recipe, job.window, job.recompute, "quality", start,
                            plan.index, plan.start)
    return FilmPlan(settings, tuple(blocks))


def state_print(state) -> str:
    """Fingerprint of a state, to recognise the one that a film continues from."""
    from ..sana_video_core.state.files import state_record, state_tensors
    from .long import weights_print

    return f"{weights_print(state_tensors(state).items())}-{state_record(state)['blocks']}"


def run_film(job: Job, name: str, vae, keep_states: bool):
    """(LATENT tensor of all blocks of the film, STATE after it). Finished blocks are taken from the folder."""
    import torch

    from ..sana_video_core.film import Film, make_film
    from ..sana_video_core.film.transfer import later_on_cpu
    from ..sana_video_core.sampling.blocks import prefill

    job.check_state()
    if vae is not None and not isinstance(vae, MissingPart):
        job.check_vae(vae)
    folder, plan = run_folder(name), film_plan(job)
    with Film(folder) as film:
        film.use_start(job.state)
        done = film.use_plan(plan)
        total, spans = len(plan.blocks), plan.block_plan().spans()
        log.info("Film %s: %d of %d blocks are finished", name, done, total)
        video = None if vae is None or isinstance(vae, MissingPart) else film_file(film, vae, job.fps)
        progress = Progress(job.model, max(total - done, 1), job.recipe.count, job.fps)
        shape = 1, job.spec.channels, *job.size
        with (job.network(max(b.frames for b in plan.blocks)) as network,
              LatentSpool(job.model, plan.block_plan().frames, shape) as spool):
            for block in range(done):
                spool.add(film.latent(block))

            def sample(first, state):
                from ..sana_video_core.sampling.plan import BlockPlan

                part = BlockPlan(tuple(s.frames for s in spans[first:]), spans[first].index, spans[first].start)
                return job.sample(network, part, state, progress, checked=False)

            def replay(first, state, latents):
                by_index = {s.index: s for s in spans}
                return prefill(
                    network, torch.cat(latents, 2), lambda i: job.texts.condition(by_index[i]), spec=job.spec, cfg=job.cfg,
                    lengths=[t.shape[2] for t in latents], state=state, device=network.device, window=job.window,
                    keep_undo=job.recompute, recompute=job.recompute, model_print=job.print)

            def heard(block, what):
                if what == "decoded":
                    network.release()  # the VAE may have taken the network's place

            state = make_film(film, sample, video, replay=replay, keep_states=keep_states, on_block=heard,
                              on_latent=lambda block, latent: spool.add(latent))
    if state is None:
        raise SanaVideoError("The film ended without a state", found=str(folder))
    return spool.result(), later_on_cpu(state)().to("cpu", copy=True)  # see transfer.py
