"""Where a device's time goes during one call, by kind of work."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .harness import Report

KINDS = {  # a kernel belongs to the first kind with a word of its name
    "products": ("gemm", "cutlass", "nvjet", "add_product", "add_frames"),
    "gated_depthwise": ("gated_depthwise",),
    "linear_attention": ("attention_keys", "attention_state", "attention_totals", "attention_apply", "key_factor",
                         "attention_sums", "attention_outputs"),
    "text_attention": ("text_attention", "text_softmax", "query_factor", "sdpa", "flash", "fmha", "rms_kernel"),
    "norms_and_residuals": ("residual_norm",),
    "temporal": ("time_pairs", "pair_residual", "pair_weights", "temporal_taps", "given_taps", "framed_fp8"),
    "row_scales": ("row_fp8", "largest_kernel", "scale_kernel"),
}


def device_times(function: Callable[[], object]) -> list[tuple[str, float, int]]:
    """(kernel, milliseconds, launches) of one call, the longest first."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if torch.cuda.is_available() else activity.CPU]) as record:
        function()
    events = sorted(record.key_averages(), key=lambda e: -e.self_device_time_total)
    return [(e.key, e.self_device_time_total / 1e3, e.count) for e in events]


def by_kind(times: list[tuple[str, float, int]]) -> dict[str, float]:
    """Milliseconds of every kind that there is, and of the rest."""
    found: dict[str, float] = {}
    for name, ms, _ in times:
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "rest")
        found[kind] = found.get(kind, 0.0) + ms
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def add_profile(report: Report, name: str, function: Callable[[], object]) -> None:
    """A row with the parts of one call's time on a card; nothing without one."""
    if torch.cuda.is_available():
        kinds = by_kind(device_times(function))
        report.add(f"{name}_profile", sum(kinds.values()), "ms on the device in one profiled call", **kinds)
