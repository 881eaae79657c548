"""The files of ``causal/``: chunked forward passes with states, block modules, whole runs, prompt switches, tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from golden_files import Check, Golden, Report, Tensors, Unsupported, Weights, network
from golden_model import caption_of
from torch import Tensor

from sana_video_core.dit import SanaVideoTransformer
from sana_video_core.dit.embeddings import rope_table
from sana_video_core.dit.layers import Context
from sana_video_core.sampling import schedules, solvers
from sana_video_core.sampling.blocks import Condition, Recipe, sample_blocks
from sana_video_core.sampling.guidance import Caption
from sana_video_core.sampling.plan import BlockPlan
from sana_video_core.state import LayerState, RecurrentState
from sana_video_core.train.timesteps import MonotoneTimes

FORWARD = 2e-6  # relative, float32
STATE = 1e-5  # relative, float32
TRAJECTORY = 5e-6  # relative, float32, over a whole run
HALF = 2e-2  # relative, half precision where kernels round differently; parity mode is bit-equal on the goldens' own setup
DEFECT = 1e-4  # by at least this much a corrected recache of the first block must differ from the reference's


# ------------------------------------------------------------------------------------------------------------------ states
def stored_layer(t: Tensors, prefix: str) -> LayerState:
    """A layer's state as the golden files store it: the tail is (B, C, 1, S) there."""
    return LayerState(t[f"{prefix}/vk"], t[f"{prefix}/k_sum"], t[f"{prefix}/tconv"].permute(0, 2, 3, 1))


def stored_layers(t: Tensors, prefix: str) -> tuple[LayerState, ...] | None:
    """The layers under ``prefix``, None when there are none (no history)."""
    count = sum(1 for k in t.keys if re.fullmatch(re.escape(prefix) + r"/block\d+/vk", k))
    return tuple(stored_layer(t, f"{prefix}/block{i}") for i in range(count)) if count else None


def compare_layers(
    report: Report, name: str, found: Sequence[LayerState], expected: Sequence[LayerState], tolerance: float,
) -> None:
    report.that(f"{name}: number of layers", len(found) == len(expected))
    for i, (a, b) in enumerate(zip(found, expected)):
        for part in LayerState._fields:
            report.rel(f"{name}/block{i}/{part}", getattr(a, part), getattr(b, part), tolerance)
            report.that(f"{name}/block{i}/{part} dtype", getattr(a, part).dtype == getattr(b, part).dtype)


def pieces(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end) of consecutive chunks."""
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return list(pairwise(ends))


def commit(model: SanaVideoTransformer, x: Tensor, y: Tensor, mask: Tensor, state: RecurrentState | None, **new):
    """(velocity, next state, this block's own contribution)."""
    if state is None:
        grid = tuple(n // p for n, p in zip(x.shape[3:], model.spec.patch[1:]))
        state = RecurrentState.empty(model.spec.name, grid, x.shape[0], "parity" if model.parity else "quality", **new)
    v, after = model.commit(x, y, mask, state=state)
    alone = model.commit(x, y, mask, state=state._replace(window=1, recent=(), keep_undo=False))[1]
    return v, after, alone.layers


# ----------------------------------------------------------------------------------------------------------- chunked forward
def check_chunked(case: Golden, weights: Weights, report: Report) -> None:
    """Our own chain of chunks, each chunk on the recorded history, the full sequence, and the bidirectional pass."""
    t, c = case.tensors, case.config
    x, y, mask, noisy = t["x"], caption_of(t["y"]), t["mask"], c["t_noisy"]
    model = network(weights.state(case), c)
    times = torch.full((x.shape[0],), float(noisy))
    state, clean, last = None, [], None
    for i, (start, end) in enumerate(pieces(c["chunk_sizes"])):
        part, name = x[:, :, start:end], f"chunk{i}"
        history = stored_layers(t, f"{name}/kv_in")
        if history is not None:
            compare_layers(report, f"{name}/kv_in", state.layers, history, STATE)
            given = state._replace(layers=history)
            report.rel(f"{name}/out_t{noisy}_nosave on the recorded history", model(part, times, y, mask, state=given),
                       t[f"{name}/out_t{noisy}_nosave"], FORWARD)
        last = model(part, times, y, mask, state=state)
        report.rel(f"{name}/out_t{noisy}_nosave", last, t[f"{name}/out_t{noisy}_nosave"], FORWARD)
        v, state, own = commit(model, part, y, mask, state)
        report.rel(f"{name}/out_t0_save", v, t[f"{name}/out_t0_save"], FORWARD)
        compare_layers(report, f"{name}/kv_out", own, stored_layers(t, f"{name}/kv_out"), STATE)
        clean.append(v)
    compare_layers(report, "history_after_all_chunks", state.layers, stored_layers(t, "history_after_all_chunks"), STATE)
    report.that("position after all chunks", state.position == x.shape[2] and state.blocks == len(c["chunk_sizes"]))
    report.rel("full/out_t0", torch.cat(clean, 2), t["full/out_t0"], FORWARD)
    name = f"full/out_frames_last_chunk_t{noisy}"
    report.rel(name, torch.cat([*clean[:-1], last], 2), t[name], FORWARD)
    report.rel("bidirectional/out_t0", model(x, torch.zeros_like(times), y, mask), t["bidirectional/out_t0"], FORWARD)


def check_modules(case: Golden, weights: Weights, report: Report) -> None:
    """Attention and feed-forward of one block, chunk by chunk, with and without history."""
    t, c = case.tensors, case.config
    x, (height, width) = t["x"], c["grid_hw"]
    model = network(weights.state(case), c)
    block = model.blocks[int(re.search(r"blocks\.(\d+)", c["block"])[1])]
    space = height * width
    history, outs, mixed_outs = None, [], []
    for i, (start, end) in enumerate(pieces(c["chunk_sizes"])):
        part, name, grid = x[:, start * space:end * space], f"chunk{i}", (end - start, height, width)
        cos, sin = rope_table(*grid, c["head_dim"], start, torch.float64)
        report.abs(f"{name}/rope_real", cos, t[f"{name}/rope_real"][0, 0], 1e-12)
        report.abs(f"{name}/rope_imag", sin, t[f"{name}/rope_imag"][0, 0], 1e-12)
        ctx = Context(grid, x, x, None, cos.float(), sin.float())
        attended, own = block.attn(part, ctx, history)
        spatial, temporal, tail = block.mlp(part, grid, None if history is None else history.tail)
        mixed = spatial + temporal
        for key, found in (("attn_out", attended), ("ffn_out", mixed), ("attn_out_no_cache", block.attn(part, ctx, None)[0]),
                           ("ffn_out_no_cache", sum(block.mlp(part, grid, None)[:2]))):
            report.rel(f"{name}/{key}", found, t[f"{name}/{key}"], FORWARD)
        own = LayerState(own.vk, own.ksum, tail)
        history = own if history is None else LayerState(history.vk + own.vk, history.ksum + own.ksum, tail)
        for key, found in (("kv_out", own), ("history_after", history)):
            compare_layers(report, f"{name}/{key}", [found], [stored_layer(t, f"{name}/{key}")], STATE)
        outs.append(attended)
        mixed_outs.append(mixed)
    report.rel("full/attn_out", torch.cat(outs, 1), t["full/attn_out"], FORWARD)
    report.rel("full/ffn_out", torch.cat(mixed_outs, 1), t["full/ffn_out"], FORWARD)


# ----------------------------------------------------------------------------------------------------------------- whole runs
class Comparer:
    """Compares to rounding in float32; in half precision bit by bit, or to ``HALF`` on a machine that rounds differently."""

    def __init__(self, report: Report, half: bool):
        self.report, self.half, self.bits_equal, self.count = report, half, 0, 0

    def __call__(self, name: str, found: Tensor, expected: Tensor, tolerance: float = TRAJECTORY) -> None:
        self.count += 1
        self.bits_equal += torch.equal(found, expected)
        self.report.rel(name, found, expected, HALF if self.half else tolerance)
        self.report.that(f"{name} dtype", found.dtype == expected.dtype)


def compare_steps(compare: Comparer, t: Tensors, name: str, seen: list, steps: Sequence[schedules.FewStep]) -> None:
    """The recorded steps of one chunk: latent in, time, velocity, clean estimate (what the file has of them)."""
    for j, (x, x0, v) in enumerate(seen):
        for key, found in (("x_in", x), ("pred_x0", x0), ("flow_pred", v)):
            if (expected := t.get(f"{name}/step{j}/{key}")) is not None:
                compare(f"{name}/step{j}/{key}", found if key != "x_in" else found.to(expected.dtype), expected)
        compare.report.exact(f"{name}/step{j}/t_model", torch.tensor([steps[j].time]), t[f"{name}/step{j}/t_model"])


def sample_chunk(model, x: Tensor, y: Tensor, mask: Tensor, state, steps, t: Tensors, chunk: int) -> tuple[Tensor, list]:
    """(clean latent, [(x, x0, v) of each step]) of one chunk with the recorded noises."""
    velocities, seen = [], []

    def velocity(now, time):
        velocities.append(model(now, time.expand(now.shape[0]), y, mask, state=state))
        return velocities[-1]

    def noise(j: int) -> Tensor:
        return t[f"noise/chunk{chunk}/after_step{j}_fchw"].transpose(0, 1)[None]

    x0 = solvers.few_step_solver(velocity, x, steps, noise, lambda j, x0, now: seen.append((now, x0)))
    return x0, [(now, x0_, v) for (now, x0_), v in zip(seen, velocities)]


def check_sampling(case: Golden, weights: Weights, report: Report) -> None:
    """The official end-to-end sampler: every step of every chunk, the states, the finished latent."""
    t, c = case.tensors, case.config
    dtype = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[c["dtype"]]
    half = dtype is not torch.float32
    if half and not c["fp32_attention"]:
        raise Unsupported("half precision without fp32 attention")
    model = network(weights.state(case), c, dtype=dtype, parity=half)
    steps = schedules.longsana_steps(c["denoising_step_list"], c["flow_shift"], dtype)
    compare = Comparer(report, half)
    report.abs("sigma_used_x0", torch.tensor([s.sigma for s in steps]), t["sigma_used_x0"], 1e-7)
    y, mask, z = caption_of(t["y"]), t["mask"], t["z"]
    window = max(0, c["num_cached_blocks"])
    state, finished = None, []
    for i, (start, end) in enumerate(pairwise(c["chunk_boundaries"])):
        name = f"chunk{i}"
        x0, seen = sample_chunk(model, z[:, :, start:end], y, mask, state, steps, t, i)
        compare_steps(compare, t, name, seen, steps)
        finished.append(x0.float())
        before = state
        v, state, own = commit(model, finished[-1], y, mask, state, window=window)
        _compare_commit(compare, t, f"{name}/cache_pass", finished[-1], v, before, own)
    compare("output", torch.cat(finished, 2), t["output"])
    recipe = Recipe.few_step(times=c["denoising_step_list"], shift=c["flow_shift"], time_dtype=dtype)
    compare("output of the block sampler", by_block_sampler(
        model, case, recipe, lambda i: Condition(Caption(y, mask)), window=window, parity=half), t["output"])
    if half:
        report.notes.append(f"{compare.bits_equal} of {compare.count} tensors bit-equal")


def by_block_sampler(model, case: Golden, recipe: Recipe, condition, **options) -> Tensor:
    """The finished latent by the sampler that the nodes use, with the recorded noises."""
    t, bounds = case.tensors, list(pairwise(case.config["chunk_boundaries"]))

    def noise(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        if step == 0:
            return t["z"][:, :, slice(*bounds[block])]
        return t[f"noise/chunk{block}/after_step{step - 1}_fchw"].transpose(0, 1)[None]

    plan = BlockPlan(tuple(end - start for start, end in bounds))
    blocks = sample_blocks(model, plan, condition, spec=model.spec, size=tuple(t["z"].shape[3:]), recipe=recipe, noise=noise,
                           **options)
    return torch.cat([block.latent for block in blocks], 2)


def _compare_commit(compare: Comparer, t: Tensors, name: str, x: Tensor, v: Tensor, before, own) -> None:
    compare(f"{name}/x_in", x, t[f"{name}/x_in"])
    compare.report.exact(f"{name}/t_model", torch.zeros(1), t[f"{name}/t_model"])
    if (expected := t.get(f"{name}/flow_pred")) is not None:
        compare(f"{name}/flow_pred", v, expected)
    history = stored_layers(t, f"{name}/kv_in")
    pairs = [("kv_out", own, stored_layers(t, f"{name}/kv_out"))]
    if history is not None and before is not None:
        pairs.append(("kv_in", before.layers, history))
    for key, found, expected in pairs:
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            for part in LayerState._fields:
                compare(f"{name}/{key}/block{i}/{part}", getattr(a, part), getattr(b, part), STATE)


# -------------------------------------------------------------------------------------------------------------- prompt switch
def recache(model: SanaVideoTransformer, state: RecurrentState, y: Tensor, mask: Tensor, defect: bool = False) -> RecurrentState:
    """``state`` with its last block committed again under another prompt.

    ``defect``: as the reference does for the very first block, which reads its own old contribution as history.
    """
    earlier, latent = state.before_last()
    if defect and not earlier.layers:
        after = model.commit(latent, y, mask, state=earlier._replace(layers=state.layers, window=1))[1]
        return after._replace(window=state.window, recent=(), undo=None, keep_undo=True)
    return model.commit(latent, y, mask, state=earlier._replace(keep_undo=True))[1]


def _captions(t: Tensors) -> list[tuple[Tensor, Tensor]]:
    return [(t["prompt_embeds"][p:p + 1], t["prompt_mask"][p:p + 1]) for p in range(len(t["prompt_embeds"]))]


def run_interactive(case: Golden, model: SanaVideoTransformer, defect: bool):
    """The run of an interactive file: (finished latent, per chunk: steps, clean latent, state before, own contribution)."""
    t, c = case.tensors, case.config
    steps = schedules.longsana_steps(c["denoising_step_list"], c["flow_shift"])
    prompt_of = [p for p, blocks in enumerate(c["prompt_blocks"]) for _ in range(blocks)]
    captions = _captions(t)
    state, chunks = None, []
    for i, (start, end) in enumerate(pairwise(c["chunk_boundaries"])):
        y, mask = captions[prompt_of[i]]
        if i and c["recache_on_prompt_switch"] and prompt_of[i] != prompt_of[i - 1]:
            earlier = state.before_last()[0]
            state = recache(model, state, y, mask, defect)
            own = state.layers if not earlier.layers else commit(model, chunks[-1]["x0"], y, mask, earlier)[2]
            chunks[-1].update(own=own, before=None if not earlier.layers else earlier)
        x0, seen = sample_chunk(model, t["z"][:, :, start:end], y, mask, state, steps, t, i)
        before = state
        v, state, own = commit(model, x0, y, mask, state, **({"keep_undo": True} if state is None else {}))
        chunks.append({"seen": seen, "x0": x0, "v": v, "before": before, "own": own})
    return torch.cat([k["x0"] for k in chunks], 2), chunks, steps


def check_interactive(case: Golden, weights: Weights, report: Report) -> None:
    """A run with a prompt switch. Where the reference recaches the first block it reads that block's own old state; there
    the file must be met with that defect repeated, and our default must differ from it."""
    t, c = case.tensors, case.config
    model = network(weights.state(case), c)
    defective = bool(c["recache_on_prompt_switch"]) and c["prompt_blocks"][0] == 1
    found, chunks, steps = run_interactive(case, model, defect=defective)
    compare = Comparer(report, half=False)
    for i, chunk in enumerate(chunks):
        compare_steps(compare, t, f"chunk{i}", chunk["seen"], steps)
        _compare_commit(compare, t, f"chunk{i}/cache_pass", chunk["x0"], chunk["v"], chunk["before"], chunk["own"])
    expected = t["output_bfchw"].transpose(1, 2)
    compare("output_bfchw", found, expected)
    corrected = run_interactive(case, model, defect=False)[0] if defective else expected
    recipe = Recipe.few_step(times=c["denoising_step_list"], shift=c["flow_shift"])
    prompts = [Condition(Caption(*caption)) for caption, blocks in zip(_captions(t), c["prompt_blocks"]) for _ in range(blocks)]
    compare("output of the block sampler", by_block_sampler(
        model, case, recipe, lambda i: prompts[i], recompute=bool(c["recache_on_prompt_switch"])), corrected)
    if defective:
        difference = float((corrected - expected).abs().max())
        report.that("the default is free of the reference's defect", DEFECT < difference < 1)
        untouched = c["chunk_boundaries"][1]
        compare("output_bfchw before the switch, default", corrected[:, :, :untouched], expected[:, :, :untouched])
        report.notes.append(f"reference defect repeated; the default differs from it by {difference:.1e}")


# ------------------------------------------------------------------------------------------------------------------- tables
def check_tables(case: Golden, weights: Weights, report: Report) -> None:
    """Level tables, nearest-entry look-ups and training weights."""
    t = case.tensors
    for match, sigmas in t.matching(r"shift([\d.]+)/sigmas"):
        prefix, table = f"shift{match[1]}", schedules.LevelTable(float(match[1]))
        report.abs(match[0], table.sigmas, sigmas, 1e-6)
        report.abs(f"{prefix}/timesteps", table.times, t[f"{prefix}/timesteps"], 1e-3)
        report.abs(f"{prefix}/training_weights", table.weights, t[f"{prefix}/training_weights"], 1e-5)
        asked = t[f"{prefix}/lookup_t"].tolist()
        report.exact(f"{prefix}/lookup_index", torch.tensor([table.index(q) for q in asked]), t[f"{prefix}/lookup_index"])
        report.abs(f"{prefix}/lookup_sigma", torch.tensor([table.sigma(q) for q in asked]), t[f"{prefix}/lookup_sigma"], 1e-6)


def check_block_times(case: Golden, weights: Weights, report: Report) -> None:
    """The monotone sampler: its tables, and its draws against the recorded ones by their distribution."""
    t = case.tensors
    for match, log_after in t.matching(r"F(\d+)_T(\d+)/log_mat_s"):
        blocks, steps = int(match[1]), int(match[2])
        prefix, sampler = f"F{blocks}_T{steps}", MonotoneTimes(blocks, steps)
        report.abs(match[0], sampler.log_after, log_after, 1e-9)
        report.abs(f"{prefix}/log_mat_e", sampler.log_before, t[f"{prefix}/log_mat_e"], 1e-9)
        for drawn, expected in t.matching(re.escape(prefix) + r"/samples_(random_anchor|anchor_last_frame_t(\d+))"):
            generator, count = torch.Generator().manual_seed(0), 1 << 16
            if drawn[2] is None:
                found = sampler.sample(torch.randint(0, steps, (count,), generator=generator), generator=generator)
            else:
                last = torch.full((count,), blocks - 1)
                found = sampler.sample(torch.full((count,), int(drawn[2])), last, generator=generator)
            report.that(f"{drawn[0]}: rising", bool((found[:, 1:] >= found[:, :-1]).all()))
            _same_distribution(report, drawn[0], found, expected, steps)


def _same_distribution(report: Report, name: str, found: Tensor, expected: Tensor, steps: int) -> None:
    """Shares of times at every block, and of pairs of neighbours, within six standard errors of the draws."""
    coarse = min(steps, 10)
    for f in range(expected.shape[1]):
        columns = [(f"block {f}", *(x[:, f] * coarse // steps for x in (found, expected)), coarse)]
        if f:
            pairs = [torch.stack((x[:, f - 1], x[:, f])) * coarse // steps for x in (found, expected)]
            columns.append((f"blocks {f - 1}, {f}", *(a * coarse + b for a, b in pairs), coarse * coarse))
        for what, ours, theirs, bins in columns:
            p = torch.bincount(ours, minlength=bins).double() / len(ours)
            q = torch.bincount(theirs, minlength=bins).double() / len(theirs)
            spread = (p * (1 - p)).clamp(min=1 / len(theirs)).sqrt() * (1 / len(theirs) + 1 / len(ours)) ** 0.5
            apart = float(((p - q).abs() / spread).max())
            report.checks.append(Check(f"{name}: shares at {what}, in standard errors", apart, 6.0))
