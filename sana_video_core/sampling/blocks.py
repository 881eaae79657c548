"""Block-wise sampling of a film: a generator that yields finished blocks (causal spec 0, 4).

Each block is denoised against the state of the earlier ones and then committed at time 0, which gives the next state. Only
the state is carried, so memory does not grow. Noise depends on (seed, block, step) alone, so a block does not depend on how
many are run in one go. The model is anything with the calls of :class:`~sana_video_core.dit.SanaVideoTransformer`:
``model(latent, time, caption, mask, state=)`` and ``model.absorb(latent, caption, mask, state=)``; where it has
``read_text(caption, mask)`` too, a text is read once for all blocks, and its result stands for caption and mask.
Not covered: decoding, files (``film``), which levels a model wants (``schedules.py``).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SanaVideoError, StateError
from ..specs import ModelSpec
from ..state import RecurrentState, check_fits
from .guidance import TIME_SCALE, Caption, caption_batch, guided
from .plan import BlockPlan, Span
from .schedules import LONGSANA_TIMES, FewStep, few_steps, flow_dpm_sigmas, longsana_steps, shifted
from .solvers import few_step_solver, flow_dpm_solver, flow_euler_solver

Noise = Callable[[int, int, tuple[int, ...]], Tensor]  # (block, step, shape) -> standard normal; step 0 starts the block
StepHook = Callable[[int, int, int, Tensor], object]  # (block, step, steps, estimate of the clean latent)
SOLVERS = {"flow-DPM": flow_dpm_solver, "flow Euler": flow_euler_solver}
RENOISE = "few-step re-noise"
FEW_STEPS = 8  # up to so many steps the few-step sampler, above them flow-DPM
_WARP = 8.0  # LongSANA's four times are even steps bent by this shift (causal spec 4.2); so are other numbers of few steps


class Condition(NamedTuple):
    """The texts of one block. ``negative`` is used when CFG is not 1."""

    positive: Caption
    negative: Caption | None = None


class Recipe(NamedTuple):
    """How a block is denoised: ``steps`` with fresh noise (few-step models), or ``sigmas`` through a ``solver``."""

    solver: str = RENOISE
    steps: tuple[FewStep, ...] = ()
    sigmas: tuple[float, ...] = ()
    cfg: float = 1.0

    @classmethod
    def few_step(cls, sigmas: Sequence[float] | Tensor | None = None, cfg: float = 1.0, **longsana) -> Recipe:
        """LongSANA's four steps, or any falling levels that end with 0."""
        return cls(RENOISE, longsana_steps(**longsana) if sigmas is None else few_steps(sigmas), (), float(cfg))

    @classmethod
    def multi_step(cls, sigmas: Sequence[float] | Tensor, solver: str = "flow-DPM", cfg: float = 1.0) -> Recipe:
        """A solver of the non-distilled models over falling levels that end with 0."""
        levels = torch.as_tensor(sigmas, dtype=torch.float32).tolist()
        if solver not in SOLVERS or len(levels) < 2 or levels[-1] != 0 or any(a <= b for a, b in itertools.pairwise(levels)):
            raise SanaVideoError("A block cannot be sampled this way", found=f"{solver}, levels {levels[:4]} ...",
                                 expected=f"{', '.join(SOLVERS)}; levels that fall and end with 0")
        return cls(solver, (), tuple(levels), float(cfg))

    @property
    def count(self) -> int:
        """Steps a block."""
        return len(self.steps) or len(self.sigmas) - 1


def recipe_of(spec: ModelSpec, steps: int | None = None, cfg: float | None = None) -> Recipe:
    """How a block is denoised in ``steps`` (those of the spec when None): few steps with fresh noise, or many by flow-DPM."""
    steps, cfg = spec.steps if steps is None else steps, spec.cfg if cfg is None else float(cfg)
    if steps == len(LONGSANA_TIMES):
        return Recipe.few_step(None, cfg, shift=spec.flow_shift)
    if steps <= FEW_STEPS:
        return Recipe.few_step(shifted(torch.linspace(1, 0, steps + 1), _WARP), cfg)
    return Recipe.multi_step(flow_dpm_sigmas(steps, spec.flow_shift), cfg=cfg)


class Block(NamedTuple):
    """A finished block: absolute ``index`` and first latent frame ``start``, clean ``latent [B, C, T, H, W]`` in the model's
    space (float32), and the ``state`` after it (None when it was not asked for). ``check()`` waits for the device and raises
    unless the state holds numbers; a block that came ``checked`` has passed it."""

    index: int
    start: int
    latent: Tensor
    state: RecurrentState | None
    check: Callable[[], None] = lambda: None


def seeded_noise(seed: int | Callable[[int], int]) -> Noise:
    """Float32 noise on the CPU from (seed, block, step); ``seed`` may be a function of the block."""
    def noise(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        own = seed(block) if callable(seed) else seed
        digest = hashlib.blake2b(f"sana-video block noise 1|{own}|{block}|{step}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    return noise


def caption_key(condition: Condition, cfg: float = 1.0) -> str:
    """Fingerprint of the texts of a block as the network sees them."""
    digest = hashlib.blake2b(digest_size=16)
    for caption in (condition.positive, condition.negative if cfg != 1 else None):
        for t in (None, None) if caption is None else caption:
            digest.update(b"none" if t is None else f"{tuple(t.shape)}{t.dtype}".encode())
            if t is not None:
                digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def rows_of(condition: Condition, batch: int, cfg: float, device) -> Caption:
    """The text rows of one network call: one a video, or [negative, positive] with CFG (padded to one length).

    Masks stay on the CPU: the network counts valid tokens there without a wait for the device.
    """
    positive = caption_batch(condition.positive, batch)
    if cfg == 1:
        return Caption(positive.embedding.to(device), None if positive.mask is None else positive.mask.cpu())
    if condition.negative is None:
        raise SanaVideoError("CFG needs a negative prompt", found=f"CFG {cfg:g} and none",
                             action="Connect the negative conditioning (it may be an empty text), or set CFG to 1")
    halves = (caption_batch(condition.negative, batch, "negative caption"), positive)
    length = max(c.embedding.shape[1] for c in halves)
    embeddings, masks = [], []
    for embedding, mask in halves:
        mask = torch.ones(embedding.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
        missing = length - embedding.shape[1]
        embeddings.append(torch.nn.functional.pad(embedding, (0, 0, 0, missing)).to(device))
        masks.append(torch.nn.functional.pad(mask, (0, missing)))
    return Caption(torch.cat(embeddings), torch.cat(masks))


def denoise_block(
    model: Callable, shape: tuple[int, ...], recipe: Recipe, rows: Caption, state: RecurrentState | None, noise, *,
    device="cpu", callback=None, parity: bool = False,
) -> Tensor:
    """The clean latent ``[B, C, T, H, W]`` float32 of one block; ``noise(step)`` gives its noise, step 0 the start.

    ``callback(step, x0, x)`` sees every step; what it raises ends the block. ``parity`` keeps the dtype chain of the official
    half-precision run (x0 in the network's dtype); otherwise everything outside the network is float32. Differentiable.
    """
    batch, total = shape[0], rows.embedding.shape[0]

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        times = torch.full((total,), float(time), device=device)  # a copy from the CPU would wait for the device
        latent = x if total == batch else torch.cat((x, x))
        v = model(latent, times, rows.embedding, rows.mask, state=state)
        if total != batch:
            return guided(*v.chunk(2), recipe.cfg)
        return v if parity else v.float()

    start = on_device(noise(0), device)
    if recipe.steps:
        return few_step_solver(velocity, start, recipe.steps, lambda step: noise(step + 1), callback).float()
    levels = torch.tensor(recipe.sigmas, dtype=torch.float32)
    return SOLVERS[recipe.solver](lambda x, sigma: velocity(x, TIME_SCALE * sigma).to(x.dtype), start, levels, callback).float()


def on_device(t: Tensor, device) -> Tensor:
    """``t`` on ``device``; on its way from the CPU to a card it does not wait for the work there."""
    if t.device.type != "cpu" or torch.device(device).type != "cuda":
        return t.to(device)
    return (t if t.is_pinned() else t.pin_memory()).to(device, non_blocking=True)


class _Finite:
    """Whether all ``tensors`` hold numbers only. Asking waits until they are made, and for nothing queued after them."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.answer, self.known = _all_numbers(tensors), None
        if self.answer.is_cuda:
            self.answer = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self.answer, non_blocking=True)
            self.known = torch.cuda.Event()
            self.known.record()

    def __bool__(self) -> bool:
        if self.known is not None:
            self.known.synchronize()
        return bool(self.answer)


def _all_numbers(tensors: Sequence[Tensor]) -> Tensor:
    """Whether the largest value of all is one; a few kernels for all tensors, not four for each."""
    largest = getattr(torch.nn.utils, "get_total_norm", None)
    if largest is None:  # before torch 2.6
        return torch.stack([torch.isfinite(t).all() for t in tensors]).all()
    return torch.isfinite(largest(tensors, math.inf))


def _insist(finite: _Finite, error: SanaVideoError) -> None:
    if not finite:
        raise error


class _ReadOnce:
    """A network with the keys and values of one text kept from pass to pass. For one run: its weights must not change."""

    def __init__(self, model):
        self.model, self._of, self._text = model, None, None

    def _read(self, caption: Tensor, mask: Tensor | None):
        if self._of is None or self._of[0] is not caption or self._of[1] is not mask:
            self._text = None  # before the next one is made
            self._of, self._text = (caption, mask), self.model.read_text(caption, mask)
        return self._text

    def __call__(self, latent: Tensor, times: Tensor, caption: Tensor, mask: Tensor | None = None, *, state=None) -> Tensor:
        return self.model(latent, times, self._read(caption, mask), state=state)

    def absorb(self, latent: Tensor, caption: Tensor, mask: Tensor | None = None, *, state=None) -> RecurrentState:
        return self.model.absorb(latent, self._read(caption, mask), state=state)


class _Run:
    """One call of :func:`sample_blocks`: what stays the same from block to block.

    A card is kept busy: whether values are numbers is asked one step later (:meth:`doubt`, :meth:`settle`), and the noise of
    the next block is made while the card commits the last one.
    """

    def __init__(self, model, spec: ModelSpec, recipe: Recipe, batch: int, size, noise: Noise, device, parity: bool,
                 recompute: bool, on_step: StepHook | None, keep_text: bool = True):
        self.model = _ReadOnce(model) if keep_text and hasattr(model, "read_text") else model
        self.spec, self.recipe, self.batch, self.size = spec, recipe, batch, size
        self.device, self.parity, self.recompute, self.on_step = device, parity, recompute, on_step
        self._draw, self._ready, self._doubt, self._texts = noise, {}, None, None

    def texts(self, condition: Condition) -> tuple[Caption, str]:
        """Rows and key of a block's texts; made once where the next block has the same (a key waits for the card)."""
        parts = [t for caption in condition if caption is not None for t in caption]
        if self._texts is None or len(parts) != len(self._texts[0]) or any(a is not b for a, b in zip(parts, self._texts[0])):
            cfg = self.recipe.cfg
            self._texts = parts, rows_of(condition, self.batch, cfg, self.device), caption_key(condition, cfg)
        return self._texts[1:]

    def switch(self, span: Span, state: RecurrentState, rows: Caption, key: str) -> RecurrentState:
        """At a prompt change the block before is committed again with the new text (causal spec 4.5).

        A window, which is there to forget, then holds that block alone: with blocks of the old text beside it, the embedded
        model kept an old thing for one block more in 5 of 48 films.
        """
        if not self.recompute or not state.layers or state.caption in ("", key):
            return state
        if state.undo is None:
            raise StateError(f"The prompt changes at block {span.index + 1}, and the state cannot take the block before back",
                             found="a state without undo data",
                             action="Carry the state with 'keep undo', or switch the recomputation at prompt changes off")
        before, clean = state.before_last()
        if before.window and not self.parity:
            before = before.forgotten()
        again = self.commit(clean, rows, before, span.index - 1)
        return again._replace(caption=key)

    def commit(self, latent: Tensor, rows: Caption, state: RecurrentState, index: int) -> RecurrentState:
        latent = latent.to(self.device)
        if latent.shape[0] != rows.embedding.shape[0]:
            latent = torch.cat((latent, latent))
        state = self.model.absorb(latent, rows.embedding, rows.mask, state=state)
        self.doubt([t for layer in state.layers for t in layer], SanaVideoError(
            f"Block {index + 1} left values in the state that are not numbers",
            action="Run the model in bf16 or fp32 with unchanged weights; the blocks before are intact"))
        return state

    def doubt(self, tensors: Sequence[Tensor], error: SanaVideoError) -> None:
        """Raise ``error`` unless ``tensors`` hold numbers: on a CPU now, on a card when the next doubt or settle comes."""
        self.settle()
        self._doubt = _Finite(tensors), error
        if self.device.type != "cuda":
            self.settle()

    def settle(self) -> None:
        doubt, self._doubt = self._doubt, None
        if doubt is not None:
            _insist(*doubt)

    def check(self) -> Callable[[], None]:
        """What is in doubt now, to be settled by someone else too."""
        return functools.partial(_insist, *self._doubt) if self._doubt is not None else lambda: None

    def noise(self, index: int, step: int, shape: tuple[int, ...]) -> Tensor:
        ready = self._ready.pop((index, step), None)
        return on_device(self._draw(index, step, shape) if ready is None else ready, self.device)

    def prepare(self, span: Span) -> None:
        """Make the first noise of a block that is to come; it stays on the CPU, so that the card's memory does not grow."""
        if self.device.type == "cuda":
            self._ready = {(span.index, 0): self._draw(span.index, 0, self.shape(span))}

    def shape(self, span: Span) -> tuple[int, ...]:
        return self.batch, self.spec.channels, span.frames * self.spec.patch[0], *self.size

    def block(self, span: Span, rows: Caption, state: RecurrentState) -> Tensor:
        shape = self.shape(span)

        def callback(step: int, x0: Tensor, x: Tensor) -> None:
            self.doubt([x0], SanaVideoError(f"Block {span.index + 1} became values that are not numbers in step {step + 1}",
                                            action="Run the model in bf16 or fp32; the blocks before are intact"))
            if self.on_step is not None:
                self.on_step(span.index, step, self.recipe.count, x0)

        return denoise_block(
            self.model, shape, self.recipe, rows, state,
            lambda step: self.noise(span.index, step, shape), device=self.device, callback=callback, parity=self.parity)


def start_state(
    spec: ModelSpec, size: tuple[int, int], rows: int, state: RecurrentState | None = None, *, parity: bool = False,
    window: int = 0, keep_undo: bool = True, model_print: str = "",
) -> RecurrentState:
    """The given state if it fits (latent ``size``, ``rows`` = batch, doubled with CFG), or the empty one of a new film."""
    grid = (size[0] // spec.patch[1], size[1] // spec.patch[2])
    precision = "parity" if parity else "quality"
    if state is None:
        return RecurrentState.empty(spec.name, grid, rows, precision, window, keep_undo, model_print)
    check_fits(state, spec, grid, rows, precision, model_print)
    return state


def sample_blocks(
    model, plan: BlockPlan, condition: Condition | Callable[[int], Condition], *, spec: ModelSpec, size: tuple[int, int],
    recipe: Recipe, seed: int | Callable[[int], int] = 0, state: RecurrentState | None = None, batch: int = 1,
    device: torch.device | str = "cpu", window: int = 0, recompute: bool = True, keep_undo: bool = True,
    commit_last: bool = True, parity: bool = False, model_print: str = "", noise: Noise | None = None,
    on_step: StepHook | None = None, grad: bool = False, checked: bool = True,
) -> Iterator[Block]:
    """Yield the blocks of ``plan`` one by one; each is finished when it is yielded, unless ``checked`` is off.

    ``condition`` is one for all, or a function of the absolute block. ``size`` is the latent height and width. ``state``
    continues a film: the plan must begin where it ends. ``recompute`` repeats the commit of the block before at a change of
    text; it needs ``keep_undo`` (twice the state's memory). ``window`` w > 0 forgets all but the last w blocks; both are
    properties of a new state, a given one keeps its own. ``commit_last=False`` saves one pass when nobody will continue.
    ``on_step`` may raise to cancel. ``grad`` keeps gradients of the denoising (the state never carries any). With ``checked``
    off a block comes while a card still commits it, so that its work goes on without a gap; call its ``check()`` before it
    is kept.
    """
    plan.checked()
    rows = batch * (1 if recipe.cfg == 1 else 2)
    state = start_state(spec, size, rows, state, parity=parity, window=window, keep_undo=keep_undo, model_print=model_print)
    if (state.blocks, state.position) != (plan.index, plan.start):
        raise StateError("The block plan does not begin where the state ends",
                         found=f"block {plan.index + 1} at latent frame {plan.start}",
                         expected=f"block {state.blocks + 1} at latent frame {state.position}")
    run = _Run(model, spec, recipe, batch, tuple(size), noise or seeded_noise(seed), torch.device(device), parity, recompute,
               on_step, keep_text=not grad)
    state = state.to(device)
    spans = plan.spans()
    while spans:
        span = spans.pop(0)
        texts, key = run.texts(condition(span.index) if callable(condition) else condition)
        with torch.no_grad():
            state = run.switch(span, state, texts, key)
        with torch.set_grad_enabled(grad):
            latent = run.block(span, texts, state)
        after = None
        if spans or commit_last:
            with torch.no_grad():
                after = state = run.commit(latent.detach(), texts, state, span.index)._replace(caption=key)
        if spans:
            run.prepare(spans[0])
        if checked:
            run.settle()
        block = Block(span.index, span.start, latent, after, run.check())
        del latent, texts
        yield block
        del block, after
        run.settle()


def prefill(
    model, latent: Tensor, condition: Condition | Callable[[int], Condition], *, spec: ModelSpec, lengths: Sequence[int],
    cfg: float = 1.0, state: RecurrentState | None = None, device: torch.device | str = "cpu", window: int = 0,
    keep_undo: bool = True, recompute: bool = False, parity: bool = False, model_print: str = "",
    on_block: Callable[[int, int], object] | None = None,
) -> RecurrentState:
    """The state as if the model had made ``latent [B, C, T, H, W]`` (model space) in blocks of ``lengths`` latent frames.

    With the texts and ``recompute`` of a run of :func:`sample_blocks` it is that run's state, bit for bit.
    """
    batch, size = latent.shape[0], tuple(latent.shape[3:])
    if sum(lengths) != latent.shape[2]:
        raise SanaVideoError("The blocks do not cover the clip", found=f"{sum(lengths)} latent frames in blocks",
                             expected=latent.shape[2])
    rows = batch * (1 if cfg == 1 else 2)
    state = start_state(spec, size, rows, state, parity=parity, window=window, keep_undo=keep_undo, model_print=model_print)
    plan = BlockPlan(tuple(lengths), state.blocks, state.position).checked()
    run = _Run(model, spec, Recipe(cfg=cfg), batch, size, seeded_noise(0), torch.device(device), parity, recompute, None)
    state = state.to(device)
    with torch.no_grad():
        for n, span in enumerate(plan.spans()):
            texts, key = run.texts(condition(span.index) if callable(condition) else condition)
            state = run.switch(span, state, texts, key)
            piece = latent[:, :, span.start - plan.start:span.end - plan.start].float()
            state = run.commit(piece, texts, state, span.index)._replace(caption=key)
            run.settle()
            if on_block is not None:
                on_block(n + 1, len(plan.lengths))
    return state
