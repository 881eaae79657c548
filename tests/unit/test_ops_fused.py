"""The fused operators: when they are chosen, and that the plain-torch ones equal the reference on awkward shapes."""

from __future__ import annotations

import itertools

import pytest
import torch

from sana_video_core import ops
from sana_video_core.errors import SanaVideoError
from sana_video_core.ops import fused, fused_torch, reference, registry

SHAPES = list(itertools.product((1, 2, 3), (1, 2, 5), (1, 7, 12), (8, 24)))  # batch, frames, tokens a frame, channels


@pytest.mark.parametrize(("batch", "frames", "size", "channels"), SHAPES)
def test_temporal_taps_equal_the_reference(batch, frames, size, channels):
    generator = torch.Generator().manual_seed(batch * 100 + frames * 10 + size)
    u = torch.randn(batch, frames * size, channels, generator=generator)
    for tail in (None, torch.randn(batch, 1, size, channels, generator=generator)):
        found, expected = fused_torch.temporal_taps(u, frames, tail), reference.temporal_taps(u, frames, tail)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("batch", "frames", "size", "channels"), SHAPES)
def test_gated_residual_equals_the_reference(batch, frames, size, channels):
    generator = torch.Generator().manual_seed(frames)
    x, y = (torch.randn(batch, frames * size, channels, generator=generator) for _ in range(2))
    for rows in {1, frames}:
        gate = torch.randn(batch, rows, 6, channels, generator=generator).unbind(2)[2]
        for extra in (None, y.flip(1)):
            found = fused_torch.gated_residual(x, y, gate, extra)
            assert torch.allclose(found, reference.gated_residual(x, y, gate, extra), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_the_reference(dtype):
    x, weight = torch.randn(2, 9, 40).to(dtype) * 3, torch.rand(40).to(dtype) + 0.5
    found, expected = fused_torch.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)
    assert torch.allclose(found.float(), expected.float(), rtol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 2), (1, 9)])
def test_trimmed_text_equals_masked_text(lengths):
    q, k, v = torch.randn(2, 11, 32), torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    trimmed = reference.softmax_attention(q, k, v, 4, mask, lengths)
    assert torch.allclose(trimmed, reference.softmax_attention(q, k, v, 4, mask), atol=1e-6)
    k[~mask] = float("nan")  # left out, not multiplied by zero
    assert torch.equal(reference.softmax_attention(q, k, v, 4, mask, lengths), trimmed)


@pytest.mark.parametrize(("mask", "expected"), [
    ([[1, 1, 0], [1, 0, 0]], (2, 1)), ([[1, 1, 1]], (3,)), ([[1, 0, 1]], None), ([[0, 0, 0]], None), ([[0, 1, 1]], None)])
def test_lengths_are_known_only_for_leading_tokens(mask, expected):
    from sana_video_core.dit.look import look

    with torch.inference_mode():
        assert look(torch.tensor(mask).bool()) == (expected, False)
        assert look(None) == (None, False)
    assert look(torch.tensor(mask).bool()) == (None, False)  # in training the batch stays whole


def test_cpu_runs_the_reference_and_says_why():
    x, y, gate = torch.randn(1, 4, 8), torch.randn(1, 4, 8), torch.randn(1, 1, 8)
    name, function, reasons = ops.gated_residual.choose(x, y, gate)
    assert (name, function) == ("reference", reference.gated_residual)
    assert "the input is on cpu" in reasons["torch-fused"]
    with ops.force("torch-fused", "gated_residual"), pytest.raises(SanaVideoError, match="forced to 'torch-fused'"):
        ops.gated_residual(x, y, gate)


@pytest.mark.parametrize("found", [(9, 0), (12, 0), (8, 9)])
def test_a_backend_for_one_kind_of_card_says_so(found, monkeypatch):
    """At a call, and in the list of ``run.py ops``, also for newer cards."""
    reason = None if found[0] == 9 else "is made for cards of compute capability 9"
    monkeypatch.setattr(registry, "capability", lambda device: found)
    monkeypatch.setattr(registry, "triton_fault", lambda device: None)
    monkeypatch.setattr(registry, "triton_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)
    assert registry._machine_refusal(torch.device("cuda"), True, (8, 0), 9) == reason
    states = {(name, backend): state for name, backend, state in ops.report()}
    gluon = ((name, "gluon") for name in ("add_product_fp8", "linear_attention", "softmax_attention"))
    for key in (*gluon, ("pair_conv", "triton"), ("open_pairs", "triton")):
        assert states[key] == ("available" if reason is None else f"unavailable: {reason}")
    assert states["causal_step", "triton"] == "available"


def test_parity_mode_is_refused_by_the_fused_attention():
    _, constraint = ops.OPERATORS["linear_attention"].backends["triton"]
    qkv, weight, table = torch.randn(1, 4, 3 * 16), torch.ones(16), torch.zeros(4, 4)
    assert "parity" in constraint.check(qkv, weight, weight, table, table, 2, None, parity=True)
    assert "float32 rotary" in constraint.check(qkv, weight, weight, table.double(), table, 2, None)
    assert constraint.check(qkv, weight, weight, table, table, 2, None, parity=False, eps=1e-8) is None


def test_operators_that_train_refuse_backends_without_gradient():
    """None of them has a gradient; on a CPU only the video decoder's have another backend than the reference."""
    import sana_video_core.vae.fused  # noqa: F401 (registers the decoder's own operator)

    on_cpu = set()
    for name in ops.OPERATORS:
        for backend, constraint in ((b, c) for b, (_, c) in ops.OPERATORS[name].backends.items()):
            assert constraint.inference_only
            on_cpu |= {(name, backend)} if "cpu" in constraint.devices else set()
    decoder = ("open_window", "causal_step", "time_double", "upsample_conv", "pixel_conv", "stream_latents")
    assert on_cpu == {(name, "onednn") for name in decoder}


def test_overwriting_happens_only_where_it_is_allowed():
    x, weight = torch.randn(1, 6, 8), torch.randn(8, 1, 3, 3)
    kept = x.clone()
    expected = reference.gated_depthwise(x, weight, None, (2, 3))
    assert torch.equal(x, kept)
    assert torch.equal(reference.gated_depthwise(x, weight, None, (2, 3), True), expected)
    assert not torch.equal(x, kept)


def test_a_triton_that_cannot_build_kernels_is_passed_over_with_its_reason(monkeypatch, caplog):
    from sana_video_core.ops import registry

    def broken(device):
        raise RuntimeError("no C compiler found")

    monkeypatch.setattr(fused, "self_test", broken)
    registry.triton_fault.cache_clear()
    try:
        assert "no C compiler found" in registry.triton_fault(torch.device("cpu"))
        assert "plain operators run instead" in caplog.text
    finally:
        registry.triton_fault.cache_clear()


class OutOfResources(Exception):
    """As Triton raises it where a kernel does not fit a card."""

    __module__ = "triton.runtime.errors"


@pytest.mark.parametrize(("error", "falls_back"), [(OutOfResources("out of resource: shared memory"), True),
                                                  (RuntimeError("CUDA out of memory"), False)])
def test_a_kernel_that_does_not_fit_a_card_is_replaced_once_and_for_all(caplog, error, falls_back):
    calls = []

    def fast(x):
        calls.append(1)
        raise error

    double = ops.registry.Operator("double", lambda x: 2 * x)
    double.add("fast", fast, ops.registry.Constraint())
    x = torch.ones(3)
    if not falls_back:
        with pytest.raises(RuntimeError, match="out of memory"):
            double(x)
        return
    assert torch.equal(double(x), 2 * x) and torch.equal(double(x), 2 * x)
    assert len(calls) == 1 and sum("shared memory" in r.message for r in caplog.records) == 1
    assert "shared memory" in double.choose(x)[2]["fast"]
    double.forced = "fast"
    with pytest.raises(SanaVideoError, match="shared memory"):
        double(x)
