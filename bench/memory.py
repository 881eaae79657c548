"""Memory of LongSANA at every block boundary, beside the growing list that the official sampler keeps.

``run.py bench memory [--tiny] [--blocks N] [--steps N]``. On an H200 about 60 s with 60 blocks of 4 steps, 25 s with
``--steps 1`` (steps leave nothing behind). Checked first: the list gives the same blocks, the meter sees the list grow, the
carried state keeps to its size, and not one byte more is asked of the allocator at a later block than at an earlier one.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass

import numpy as np
import torch

from .harness import BenchError, Report, relative_error
from .long import FULL, SAME, TINY, ListModel, Long

BLOCKS, LIST_BLOCKS = 60, 5
# Block 1 has nothing to take back yet, and the rotary tables of a longer first block are held for one block more.
SETTLED = 3
ALLOCATOR_SLACK_MIB = 16  # what the allocator may round up or leave unsplit; a kept block has 153


@dataclass(frozen=True)
class Mark:
    """Bytes at one block boundary: asked for, held by the allocator, most during the block; and of the state."""

    requested: int
    allocated: int
    peak: int
    state: int
    state_plain: int


def held(device: str) -> tuple[int, int, int]:
    """Bytes (asked for, allocated, most since the last call). On a CPU: the storages of all living tensors, three times."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_stats()["requested_bytes.all.current"], torch.cuda.memory_allocated(), peak
    living = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()  # a compiler's stand-ins have no memory
              for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"}
    return (sum(living.values()),) * 3


def keep_list(long: Long) -> tuple[list[np.ndarray], float, int]:
    """(latents, bytes a block that the list makes memory grow by, bytes of one block's tensors in it)."""
    listed, latents, marks = ListModel(long.model), [], []
    for block in long.sample(LIST_BLOCKS, listed, recompute=False, keep_undo=False):
        latents.append(block.latent.cpu().numpy().copy())  # out of the meter's sight
        del block
        marks.append(held(long.device)[0])
    inside = sum(t.numel() * t.element_size() for layer in listed.kept[-1] for t in layer)
    return latents, (marks[-1] - marks[SETTLED - 1]) / (LIST_BLOCKS - SETTLED), inside


def follow(long: Long, blocks: int) -> tuple[list[np.ndarray], list[Mark]]:
    """(latents of the first blocks, a mark at every boundary) of a film with running sums and undo data."""
    latents, marks = [], []
    held(long.device)
    for block in long.sample(blocks):
        if len(latents) < LIST_BLOCKS:
            latents.append(block.latent.cpu().numpy().copy())
        state = block.state
        del block
        sizes = state.nbytes(), state.without_undo().nbytes()
        del state
        marks.append(Mark(*held(long.device), *sizes))
    return latents, marks


def check(report: Report, long: Long, ours, listed, marks: list[Mark], growth: float, inside: int) -> None:
    mib = 2**20
    for name, index in (("first", 0), ("last compared", -1)):
        report.check(f"cache list: the {name} block against the running sums",
                     relative_error(torch.from_numpy(listed[index]), torch.from_numpy(ours[index])), SAME)
    report.check("the meter sees the cache list grow (part that it misses)", max(0.0, 1 - growth / inside), 0.02)
    report.check("carried state, MiB", marks[-1].state_plain / mib, long.size.state_mib)
    report.check("carried state with undo data, MiB", marks[-1].state / mib, long.size.undo_mib)
    report.check("state after the last block against block 2, bytes", abs(marks[-1].state - marks[1].state), 0)
    settled = [m.requested for m in marks[SETTLED - 1:]]
    report.check(f"memory asked for at the boundaries {SETTLED} to {len(marks)}: largest minus smallest, bytes",
                 max(settled) - min(settled), 0)
    report.check("allocated at the last boundary more than at the first settled one, MiB",
                 (marks[-1].allocated - marks[SETTLED - 1].allocated) / mib, ALLOCATOR_SLACK_MIB)


def add_rows(report: Report, marks: list[Mark], growth: float, steps: int, seconds: float) -> None:
    settled, mib = marks[SETTLED - 1:], 2**20
    about = {"blocks": len(marks), "steps": steps}
    report.add("longsana_state", marks[-1].state_plain / mib, "MiB", with_undo=marks[-1].state / mib, bytes=marks[-1].state_plain,
               bytes_with_undo=marks[-1].state, bytes_with_undo_after_block_2=marks[1].state)
    for name in ("requested", "allocated", "peak"):
        values = [getattr(m, name) for m in settled]
        report.add(f"longsana_memory_{name}", max(values) / 2**30, "GiB, largest", min_bytes=min(values), max_bytes=max(values),
                   block_1_bytes=getattr(marks[0], name), block_2_bytes=getattr(marks[1], name), from_block=SETTLED, **about)
    ours = (settled[-1].requested - settled[0].requested) / mib
    report.add("longsana_memory_growth", ours, f"MiB from block {SETTLED} to {len(marks)}", seconds=seconds, **about)
    report.add("longsana_memory_growth_cache_list", growth / mib, "MiB a block", measured_blocks=LIST_BLOCKS,
               computed_gib_at_the_last_block=growth * len(marks) / 2**30)


@torch.inference_mode()
def run(tiny: bool = False, blocks: int | None = None, steps: int | None = None, report: Report | None = None) -> Report:
    """The two films, the checks, the rows; returns the report (not yet written)."""
    blocks = blocks or (8 if tiny else BLOCKS)
    if blocks <= LIST_BLOCKS:
        raise BenchError(f"memory needs more than {LIST_BLOCKS} blocks to compare, not {blocks}")
    device, report = "cuda" if torch.cuda.is_available() else "cpu", report or Report("memory")
    long = Long(TINY if tiny else FULL, device, steps)
    listed, growth, inside = keep_list(long)
    start = time.perf_counter()
    ours, marks = follow(long, blocks)
    seconds = time.perf_counter() - start
    check(report, long, ours, listed, marks, growth, inside)
    add_rows(report, marks, growth, long.recipe.count, seconds)
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench memory")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args(arguments)
    report = Report("memory")
    try:
        run(options.tiny, options.blocks, options.steps, report)
    finally:
        if not options.tiny:  # a check of the benchmark, not a figure
            print(report.write(), flush=True)
    return 0
