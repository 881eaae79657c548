"""The files of ``model/``: one forward pass with its intermediate tensors, schedules, sampler trajectories."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from golden_files import NAMINGS, Golden, GoldenError, Report, Tensors, Weights, network, relative, spec_of
from torch import Tensor

from sana_video_core.checkpoint import convert
from sana_video_core.dit import SanaVideoTransformer
from sana_video_core.dit.embeddings import rope_table
from sana_video_core.sampling import schedules, solvers
from sana_video_core.sampling.guidance import Caption, Pair, guided, pair_velocity, with_first_frame

FORWARD = 1e-6  # relative, float32
PART_FACTOR = 2  # for tensors inside the network
HALF = 2e-2  # relative, bfloat16
TRAJECTORY = 5e-6  # relative, own network and own solver over the whole run
DELICATE = 5e-5  # the most that a run sensitive to rounding is allowed
LEVELS = 1e-6  # absolute
DIFFUSERS = {"cross_eps": 1e-5, "attention_eps": 1e-15}


def caption_of(x: Tensor) -> Tensor:
    """``[B, 1, L, D]`` as stored, or ``[B, L, D]``, to ``[B, L, D]``."""
    return x[:, 0] if x.ndim == 4 else x


def times_of(t: Tensor) -> Tensor:
    """``[B]`` or ``[B, 1, F]`` to what the network takes."""
    return t[:, 0] if t.ndim == 3 else t


class Recorder:
    """Keeps what the parts of a network give in one call, under the names of the golden files."""

    def __init__(self, model: SanaVideoTransformer):
        self.found: dict[str, Tensor] = {}
        self._hooks = []
        self._on("x_embedder", model.x_embedder)
        self._on("t_emb", model.t_embedder, lambda y: y.flatten(0, 1))
        self._on("t_block", model.t_block, lambda y: y.flatten(0, 1))
        self._on("y_proj", model.y_embedder, lambda y: y[:, None])
        self._on("y_normed", model.attention_y_norm, lambda y: y[:, None])
        self._on("final_layer", model.final_layer)
        for i, block in enumerate(model.blocks):
            self._on(f"block{i}.self_attn", block.attn, lambda y: y[0])
            self._on(f"block{i}.cross_attn", block.cross_attn)
            self._on(f"block{i}.mlp", block.mlp, lambda y: y[0] + y[1])
            self._on(f"block{i}.out", block, lambda y: y[0])

    def _on(self, name: str, module: torch.nn.Module, pick: Callable = lambda y: y) -> None:
        self._hooks.append(module.register_forward_hook(lambda m, args, out: self.found.__setitem__(name, pick(out))))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def recorded(model: SanaVideoTransformer, *inputs: Tensor) -> dict[str, Tensor]:
    """Every named intermediate tensor and ``output`` of one call."""
    recorder = Recorder(model)
    try:
        recorder.found["output"] = model(*inputs)
    finally:
        recorder.close()
    return recorder.found


# ---------------------------------------------------------------------------------------------------------------- forward
def check_forward(case: Golden, weights: Weights, report: Report) -> None:
    """All tensors of a forward case, with each weights file that belongs to it."""
    t = case.tensors
    inputs = (t["in.latent"], times_of(t["in.timestep"]), caption_of(t["in.caption"]), t["in.mask"])
    states = weights.in_both_namings(case)
    equal = 0
    for naming, state in states.items():
        for parity in (True, False):
            found = recorded(network(state, case.config, parity=parity), *inputs)
            _compare(report, t, "orig", found, f"{naming}, {'parity' if parity else 'quality'}", FORWARD)
            equal += parity and torch.equal(found["output"], t["orig.output"])
        for variant in sorted({re.split(r"\.(?=[a-z])", k)[0] for k in t.keys if k.startswith("diffusers")}):
            _forward_variant(report, t, variant, state, naming, case.config, inputs)
    if "orig_bf16.output" in t:
        half = tuple(x.bfloat16() if x.is_floating_point() and i != 1 else x for i, x in enumerate(inputs))
        for parity in (True, False):
            model = network(states["original"], case.config, dtype=torch.bfloat16, parity=parity)
            report.rel(f"orig_bf16.output (parity {parity})", model(*half).float(), t["orig_bf16.output"], HALF)
    _check_rope(report, t, case)
    report.notes.append(f"float32 outputs within {report.worst('output'):.1e}")
    if equal == len(states):
        report.notes.append("bit-equal in parity mode")


def _forward_variant(
    report: Report, t: Tensors, variant: str, state: dict[str, Tensor], naming: str, config: dict, inputs: tuple,
) -> None:
    """diffusers' outputs: ``diffusers``, ``diffusers_cross_eps<number>``, ``diffusers_bf16``; times are cut beforehand."""
    options, dtype, tolerance = dict(DIFFUSERS), torch.float32, FORWARD
    if match := re.fullmatch(r"diffusers_cross_eps([\d.e-]+)", variant):
        options["cross_eps"] = float(match[1])
    elif variant == "diffusers_bf16":
        dtype, tolerance = torch.bfloat16, HALF
    elif variant != "diffusers":
        raise GoldenError(f"unknown variant {variant}")
    given = tuple(x.to(dtype) if x.is_floating_point() and i != 1 else x for i, x in enumerate(inputs))
    found = recorded(network(state, config, dtype=dtype, **options), *given)
    _compare(report, t, variant, found, naming, tolerance)


def _compare(report: Report, t: Tensors, prefix: str, found: dict[str, Tensor], label: str, tolerance: float) -> None:
    for match, expected in t.matching(re.escape(prefix) + r"\.(.+)"):
        if match[1] in ("rope_cos", "rope_sin"):
            continue
        if match[1] not in found:
            raise GoldenError(f"unknown tensor {match[0]}")
        part = tolerance if match[1] == "output" else PART_FACTOR * tolerance
        report.rel(f"{match[0]} ({label})", found[match[1]].to(expected.dtype), expected, part)


def _check_rope(report: Report, t: Tensors, case: Golden) -> None:
    if "orig.rope_cos" not in t:
        return
    grid = tuple(n // p for n, p in zip(t["in.latent"].shape[2:], case.config["patch_size"]))
    cos, sin = rope_table(*grid, case.config["linear_head_dim"], 0, torch.float64)
    report.abs("orig.rope_cos", cos, t["orig.rope_cos"], 1e-12)
    report.abs("orig.rope_sin", sin, t["orig.rope_sin"], 1e-12)


# ---------------------------------------------------------------------------------------------------------------- weights
def check_weights(case: Golden, weights: Weights, report: Report) -> None:
    """A weights file goes to the other namings and back without a changed bit, and equals the files of the same seed."""
    state, spec = case.tensors.prefixed(""), spec_of(case.config)
    own = convert(state, spec, case.naming)
    for naming in (*NAMINGS, "native"):
        back = convert(convert(state, spec, naming), spec, case.naming)
        report.that(f"names after {naming}", list(back) == list(own))
        for key in own:
            report.exact(f"{key} by way of {naming}", back[key], state[key])
    for other in weights.of(case):
        there = convert(state, spec, other.naming)
        if other is not case:
            for key, tensor in there.items():
                report.exact(f"{key} in {other.name}", tensor, other.tensors[key])


# -------------------------------------------------------------------------------------------------------------- schedules
def check_schedules(case: Golden, weights: Weights, report: Report) -> None:
    """Levels and times of every family and number of steps in the file."""
    shift = float(case.info["shift"])
    tables = {
        "orig_flow_dpm": (schedules.flow_dpm_sigmas, None),
        "orig_flow_dpm_linear_quadratic": (lambda n, _: schedules.linear_quadratic_sigmas(n), None),
        "flow_euler": (schedules.flow_euler_sigmas, None),
        "diffusers_dpm": (schedules.diffusers_dpm_sigmas, schedules.diffusers_dpm_times),
        "unipc": (schedules.unipc_sigmas, schedules.unipc_times),
    }
    for match, expected in case.tensors.matching(r"(.+)\.(\d+)\.(.+)"):
        family, steps, what = match[1], int(match[2]), match[3]
        if family not in tables:
            raise GoldenError(f"unknown schedule {family}")
        levels, times = tables[family]
        if what == "sigmas":
            report.abs(match[0], levels(steps, shift), expected, LEVELS)
        elif expected.is_floating_point():
            report.abs(match[0], levels(steps, shift)[:-1] * 1000, expected, 1000 * LEVELS)
        else:
            found = times(steps, shift) if times else schedules.whole_times(levels(steps, shift))
            report.exact(match[0], found, expected)


# --------------------------------------------------------------------------------------------------------------- samplers
class Run(NamedTuple):
    """How one recorded sampler is repeated."""

    levels: Tensor
    times: Tensor | None
    options: dict
    solve: Callable  # (pair velocity, x, callback) -> final latent
    per_frame: bool = False
    delicate: bool = False  # loses digits in its first step


def check_sampler(case: Golden, weights: Weights, report: Report) -> None:
    """Every trajectory in the file: whole run, solver alone, network alone."""
    names = sorted(match[1] for match, _ in case.tensors.matching(r"(.+)\.final"))
    for naming, state in weights.in_both_namings(case).items():
        for name in names:
            _check_trajectory(case, state, naming, name, plan(case, name), report)
    report.notes.append(f"{len(names)} samplers, whole runs within {report.worst('final (', 'model_x ('):.1e}")


def plan(case: Golden, name: str) -> Run:
    """The run that the sampler's name stands for."""
    t, steps, shift, cfg = case.tensors, int(case.case["steps"]), float(case.case["shift"]), float(case.case["cfg_scale"])
    euler = schedules.flow_euler_sigmas(steps, shift)
    if name == "orig_flow_dpm":
        levels = schedules.flow_dpm_sigmas(steps, shift)
        return Run(levels, None, {}, lambda v, x, cb: solvers.flow_dpm_solver(v, x, levels, cb, cfg=cfg), delicate=True)
    if name == "orig_flow_euler":
        return Run(euler, None, {}, lambda v, x, cb: solvers.flow_euler_solver(combined(v, cfg), x, euler, cb))
    if match := re.fullmatch(r"orig_ltx_euler_noise([\d.e-]+)", name):
        draws = t.get(f"{name}.noise_draws")
        return Run(euler, None, {}, lambda v, x, cb: solvers.ltx_euler_solver(
            combined(v, cfg), x, euler, t["in.first_frame_latent"], cb, condition_noise=float(match[1]),
            noise=None if draws is None else lambda i: draws[i][None]), per_frame=True)
    if match := re.fullmatch(r"diffusers_(i2v_)?(dpm|unipc|euler)(_trunc)?", name):
        return _diffusers_run(t, match[2], bool(match[1]), bool(match[3]), steps, shift, cfg, euler)
    raise GoldenError(f"unknown sampler {name}")


def _diffusers_run(t: Tensors, solver: str, image: bool, cut: bool, steps: int, shift: float, cfg: float, euler: Tensor) -> Run:
    levels, times, solve = {
        "dpm": (schedules.diffusers_dpm_sigmas(steps, shift), schedules.diffusers_dpm_times(steps, shift), solvers.dpm_solver),
        "unipc": (schedules.unipc_sigmas(steps, shift), schedules.unipc_times(steps, shift), solvers.unipc_solver),
        "euler": (euler, None, solvers.flow_euler_solver),
    }[solver]
    asked = None if times is None else times.float() / 1000
    options = {**DIFFUSERS, "truncate_times": cut}
    first = t["in.first_frame_latent"] if image else None

    def run(v, x, callback):
        if first is None:
            return solve(combined(v, cfg), x, levels, callback, times=asked)
        rest = solve(with_first_frame(combined(v, cfg), first), x[:, :, 1:], levels,
                     lambda i, x0, now: callback(i, x0, torch.cat((first, now), 2)), times=asked)
        return torch.cat((first, rest), 2)

    return Run(levels, times, options, run, per_frame=image)


def combined(pair: Callable, cfg: float) -> Callable:
    """A velocity that returns a pair, guided."""
    return lambda x, sigma: guided(*pair(x, sigma), cfg)


def _check_trajectory(
    case: Golden, state: dict[str, Tensor], label: str, name: str, run: Run, report: Report,
) -> None:
    t = case.tensors
    expected_x, final = t[f"{name}.model_x"], t[f"{name}.final"]
    mask = t["in.mask"]
    captions = Caption(caption_of(t["in.cond"]), mask[1:2]), Caption(caption_of(t["in.uncond"]), mask[:1])
    for parity in (True, False) if name.startswith("orig_") else (False,):
        pair = pair_velocity(network(state, case.config, parity=parity, **run.options), *captions)
        seen: list[Tensor] = []
        found = run.solve(pair, t["in.noise"], lambda i, x0, x, seen=seen: seen.append(x))
        tolerance, mode = TRAJECTORY, "parity" if parity else "quality"
        if run.delicate and relative(found, final) > TRAJECTORY:
            tolerance = _rounding_allowance(run, pair, t["in.noise"], found)
            report.notes.append(f"{name}: within its own sensitivity to rounding, {tolerance:.0e}")
        report.rel(f"{name}.model_x ({label}, {mode})", torch.cat(seen), expected_x, tolerance)
        report.rel(f"{name}.final ({label}, {mode})", found, final, tolerance)
        if f"{name}.model_out" in t:
            _check_parts(t, name, run, pair, f"{label}, {mode}", report)


def _rounding_allowance(run: Run, pair: Callable, noise: Tensor, found: Tensor) -> float:
    """How far the run moves when the network's answers change by as little as their rounding: twice the largest of four.

    The official DPM form divides by 1 - sigma, 1.25e-4 in its first step, so one last bit there can show as 1e-5.
    """
    generator, moved = torch.Generator().manual_seed(0), [TRAJECTORY]
    for _ in range(4):
        def shaken(x, sigma):
            return Pair(*(v * (1 + 2e-7 * torch.randn(v.shape, generator=generator)) for v in pair(x, sigma)))

        moved.append(2 * relative(run.solve(shaken, noise, None), found))
    return min(max(moved), DELICATE)


def _check_parts(t: Tensors, name: str, run: Run, pair: Callable, label: str, report: Report) -> None:
    """The network at the recorded latents, and the solver on the recorded answers."""
    xs, outs, times = t[f"{name}.model_x"], t[f"{name}.model_out"], t[f"{name}.model_t"]
    frames = xs.shape[2]
    for i, (x, out) in enumerate(zip(xs, outs)):
        level = run.levels[i].repeat(frames) if run.per_frame else run.levels[i]
        if run.per_frame:
            level[0] = 0
        report.rel(f"{name}.model_out[{i}] ({label})", torch.cat(pair(x[None], level)), out, FORWARD)
        shape = times[i].shape
        report.abs(f"{name}.model_t[{i}]", (level * 1000).expand(shape), times[i], 1000 * LEVELS)
    steps, seen = iter(outs), []
    final = run.solve(lambda x, sigma: Pair(*(o[None] for o in next(steps))), t["in.noise"], lambda i, x0, x: seen.append(x))
    report.rel(f"{name}.model_x, solver alone", torch.cat(seen), xs, FORWARD)
    report.rel(f"{name}.final, solver alone", final, t[f"{name}.final"], FORWARD)
