"""A small film on tiny random models, and its pieces on disk for comparison."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from longvideo import GRID, caption, tiny_model, tiny_spec, tiny_vae
from sana_video_core.film import Film, FilmBlock, FilmPlan, FilmSettings, FilmVideo, WanStream, make_film
from sana_video_core.sampling.blocks import Condition, Recipe, caption_key, prefill, sample_blocks
from sana_video_core.sampling.guidance import Caption
from sana_video_core.sampling.plan import BlockPlan

RECIPE = Recipe.few_step((1.0, 0.6, 0.0))
LENGTHS, TEXTS = (3, 2, 2, 1, 2, 2), (0, 0, 1, 1, 1, 2)


def condition(text: int) -> Condition:
    return Condition(Caption(*caption(text)))


def plan(lengths=LENGTHS, texts=TEXTS, seeds=None, **settings) -> FilmPlan:
    blocks = tuple(FilmBlock(n, (seeds or {}).get(i, 7), caption_key(condition(t)), prompt=f"text {t}")
                   for i, (n, t) in enumerate(zip(lengths, texts, strict=False)))
    return FilmPlan(FilmSettings("tiny-long", "weights", GRID, {"solver": RECIPE.solver, "steps": RECIPE.steps}, **settings),
                    blocks)


def sampler(film: Film, texts=TEXTS, on_step=None):
    """``sample`` for make_film."""
    p = film.plan

    def sample(first, state):
        spans = p.block_plan().spans()[first:]
        part = BlockPlan(tuple(s.frames for s in spans), spans[0].index, spans[0].start)
        return sample_blocks(
            tiny_model(), part, lambda i: condition(texts[i - p.settings.index]), spec=tiny_spec(), size=GRID, recipe=RECIPE,
            seed=lambda i: p.blocks[i - p.settings.index].seed, state=state, window=p.settings.window,
            recompute=p.settings.recompute, model_print=p.settings.model, on_step=on_step)

    return sample


def replayer(film: Film, texts=TEXTS):
    def replay(first, state, latents):
        return prefill(tiny_model(), torch.cat(latents, 2), lambda i: condition(texts[i - film.plan.settings.index]),
                       spec=tiny_spec(), lengths=[t.shape[2] for t in latents], state=state, window=film.plan.settings.window,
                       recompute=film.plan.settings.recompute, model_print=film.plan.settings.model)

    return replay


def shoot(folder: Path, film_plan: FilmPlan | None = None, texts=TEXTS, video=True, on_step=None, start=None, overlap=False,
          **options):
    """Make (or finish) the film in ``folder``; returns the last state."""
    with Film(folder) as film:
        film.use_start(start)
        film.use_plan(film_plan or plan(texts=texts))
        stream = FilmVideo(film, WanStream(tiny_vae(), "vae"), overlap=overlap) if video else None
        return make_film(film, sampler(film, texts, on_step), stream, **options)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file but the lock."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.name != "film.lock"}


def frames_of(path: Path):
    """(list of presentation frame numbers, list of luma planes) of a video at 16 fps."""
    import av

    with av.open(str(path)) as file:
        pictures = list(file.decode(video=0))
    return [round(float(f.pts * f.time_base) * 16) for f in pictures], [f.to_ndarray()[: f.height] for f in pictures]
