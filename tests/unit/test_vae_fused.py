"""The Wan decoder of operators on the CPU, the card's form of it too: the same function as the plain decoder."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from sana_video_core import ops
from sana_video_core.film.transfer import to_cpu
from sana_video_core.vae import fused
from sana_video_core.vae.wan import WanCache, WanVAE
from wanvae import random_vae, relative

CLOSE = 2e-5  # relative; the order of sums differs, and random weights make rounding grow from layer to layer


@pytest.fixture(scope="module")
def vae():
    return random_vae()


@pytest.fixture(scope="module")
def latent():
    return torch.randn(2, 16, 8, 2, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def room(monkeypatch):
    """As if the card had that many bytes."""
    state = {"bytes": 1 << 50}
    monkeypatch.setattr(fused, "_free_memory", lambda device: state["bytes"])
    return state


@pytest.fixture
def on_the_cpu(monkeypatch, room):
    """The card's form of the decoder allowed where it does not run otherwise, with the CPU's operators."""
    function, constraint = fused.stream_latents.backends["triton"]
    here = dataclasses.replace(constraint, devices=("cpu",), dtypes=(torch.float32,), triton=False)
    monkeypatch.setitem(fused.stream_latents.backends, "triton", (function, here))


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_groups_of_latent_frames_give_the_plain_frames(vae, latent, group, on_the_cpu, monkeypatch):
    monkeypatch.setattr(fused, "GROUP", group)
    with ops.force("reference"):
        expected = vae.decode(latent)
    cache = WanCache()
    pieces = list(vae.decode_stream(latent, cache))
    assert [p.shape[2] for p in pieces] == [1] + [4] * 7
    assert cache.decoder is not None and relative(torch.cat(pieces, 2), expected) < CLOSE


@pytest.mark.parametrize("parts", [(1, 7), (3, 5), (2, 1, 1, 4), (8,)])
def test_any_partition_gives_the_same(vae, latent, parts, on_the_cpu):
    whole, cache = vae.decode(latent), WanCache()
    pieces = [vae.decode(part, cache) for part in latent.split(parts, 2)]
    assert relative(torch.cat(pieces, 2), whole) < CLOSE


@pytest.mark.parametrize("first", [True, False])
def test_a_video_may_change_between_the_decoders_at_any_frame(vae, latent, first, on_the_cpu):
    """The caches are the same, down to the single frame of the beginning and the marker of the temporal up-steps."""
    with ops.force("reference"):
        expected = vae.decode(latent)
    cache, pieces = WanCache(), []
    for i, part in enumerate(latent.split((1, 1, 2, 3, 1), 2)):
        with ops.force("reference" if (i % 2 == 0) == first else None):
            pieces.append(vae.decode(part, cache))
    assert relative(torch.cat(pieces, 2), expected) < CLOSE


def test_the_cache_is_that_of_the_plain_decoder(vae, latent, on_the_cpu):
    caches = WanCache(), WanCache()
    for cache, backend in zip(caches, ("triton", "reference")):
        with ops.force(backend, "stream_latents"):
            vae.decode(latent[:, :, :3], cache)
    ours, plain = (cache.slots for cache in caches)
    assert len(ours) == len(plain) == 32 and caches[0].nbytes() == caches[1].nbytes()
    for a, b in zip(ours, plain):
        assert relative(a, b) < CLOSE


@pytest.mark.parametrize("batch", [1, 2])
def test_the_cache_is_read_where_it_lies(vae, latent, batch, on_the_cpu):
    """Copying the history of every convolution cost 3 % of the time."""
    cache = WanCache()
    for _ in vae.decode_stream(latent[:batch], cache):
        pass
    slots = [slot for slot in cache.slots if isinstance(slot, torch.Tensor) and slot.storage_offset()]
    assert len(slots) > 20
    for slot in slots:
        assert fused._padded(slot, slot).untyped_storage().data_ptr() == slot.untyped_storage().data_ptr()


def test_a_cache_moved_elsewhere_is_still_understood(vae, latent, on_the_cpu):
    """Offloading makes dense copies of the slots, which are views of windows before."""
    expected, cache = vae.decode(latent), WanCache()
    vae.decode(latent[:, :, :3], cache)
    cache.slots = [slot.clone() if isinstance(slot, torch.Tensor) else slot for slot in cache.slots]
    assert relative(vae.decode(latent[:, :, 3:], cache), expected[:, :, 9:]) < CLOSE


def test_another_network_is_not_decoded_with_the_weights_of_the_first(vae, latent, on_the_cpu):
    cache, other = WanCache(), random_vae(seed=5)
    vae.decode(latent[:, :, :1], cache)
    with ops.force("reference"):
        expected = other.decode(latent[:, :, 1:3], WanCache(list(cache.slots)))
    assert relative(other.decode(latent[:, :, 1:3], cache), expected) < CLOSE


def test_few_bytes_mean_few_frames_a_pass(latent):
    need = [2 * fused.memory_needed(2, 3, n, 16) for n in (1, 2, 4)]
    assert need == sorted(set(need))
    assert [fused.group_that_fits(latent, free, 16) for free in (0, need[1] + 1, need[2] + 1)] == [1, 2, 4]
    # 832x480: the cache of vae/text spec 1.4 and some times as much
    assert 3.0e9 < fused.memory_needed(60, 104, 1) < 4.5e9 and 7e9 < fused.memory_needed(60, 104, 4) < 9e9


@pytest.mark.parametrize("width", [12, 16])
def test_a_cpu_decodes_by_onednn_the_same_bits_in_any_partition(width, latent):
    vae = random_vae(width)
    name, _, reasons = fused.stream_latents.choose(latent, vae, WanCache())
    assert name == "onednn" and "on cpu" in reasons["triton"]
    with ops.force("reference"):
        expected = vae.decode(latent)
    whole, cache = vae.decode(latent), WanCache()
    assert relative(whole, expected) < CLOSE
    assert torch.equal(torch.cat([vae.decode(part, cache) for part in latent.split((2, 1, 5), 2)], 2), whole)
    assert torch.equal(vae.decode(latent[:, :, 5:], vae.rebuild_cache(latent[:, :, :5])), whole[:, :, 17:])


def test_where_onednn_cannot_run_the_plain_decoder_does_bit_for_bit(vae, latent, monkeypatch):
    def plain(network, latent):
        cache = WanCache()
        return torch.cat([network.decoder(network.conv2(z), cache.rewind()) for z in latent.split(1, 2)], 2)

    half = random_vae().bfloat16()
    assert torch.equal(half.decode(latent.bfloat16()), plain(half, latent.bfloat16()))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert torch.equal(vae.decode(latent), plain(vae, latent))
    name, _, reasons = fused.stream_latents.choose(latent, vae, WanCache())
    assert name == "reference" and "without oneDNN" in reasons["onednn"]


def test_gradients_take_the_plain_decoder(latent):
    vae = WanVAE(8)
    vae.decode(latent[:1, :, :2]).sum().backward()
    assert all(p.grad is not None for p in vae.decoder.parameters())
    wanted = latent[:1, :, :2].clone().requires_grad_()
    vae.requires_grad_(False).decode(wanted).sum().backward()
    assert wanted.grad.abs().sum() > 0


def test_what_the_fused_decoder_cannot_do_is_refused_with_the_reason(vae, latent):
    _, constraint = fused.stream_latents.backends["triton"]
    assert constraint.check(latent, vae, WanCache()) is None
    assert "multiples of 16" in constraint.check(latent, WanVAE(8).requires_grad_(False), WanCache())
    assert "multiples of 16" in constraint.check(latent[:, :4], vae, WanCache())
    other = torch.nn.Module()
    other.decoder = types.SimpleNamespace(upsamples=[], middle=[])
    assert "layers of the Wan 2.1" in constraint.check(latent, other, WanCache())
    trained = WanVAE(16)
    assert "backward" in constraint.check(latent, trained, WanCache())
    with torch.no_grad():
        assert constraint.check(latent, trained, WanCache()) is None


def test_four_weights_stand_for_nine():
    """The kernel made of sums of weights, on the small frame, equals the 3x3 kernel on the doubled one."""
    from sana_video_core.ops import frames
    from sana_video_core.ops.frames_fused import _four_kernels

    x, weight = torch.randn(1, 2, 4, 5, 6).double(), torch.randn(7, 3, 3, 6)
    expected = frames.upsample_conv(x, weight.double(), torch.zeros(7).double())
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))[0].movedim(-1, 1)
    for parity, taps in enumerate(_four_kernels(weight).double()):
        y, c = divmod(parity, 2)
        found = torch.nn.functional.conv2d(padded[:, :, y:y + 5, c:c + 6], taps.movedim(-1, 1)).movedim(1, -1)
        assert torch.allclose(found, expected[0, :, y::2, c::2], atol=1e-6)


def test_pieces_on_the_cpu_are_handed_out_at_once():
    made = []

    def pieces():
        for i in range(3):
            made.append(i)
            yield torch.full((2,), i)

    for i, piece in enumerate(to_cpu(pieces())):
        assert len(made) == i + 1 and piece.tolist() == [i, i]
