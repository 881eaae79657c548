"""The table of models, its arithmetic, and the checks of sizes and lengths."""

from __future__ import annotations

import dataclasses
import math

import pytest

from sana_video_core import SPECS, SanaVideoError, get_spec
from sana_video_core.specs import LTX2, LTX23, WAN21, require_frames, require_size, safe_name

BASE = SPECS["sana-video-2b-480p"]


def test_rows_are_frozen_hashable_and_named_by_their_key():
    assert all(name == spec.name for name, spec in SPECS.items()) and len(set(SPECS.values())) == len(SPECS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.width = 1


@pytest.mark.parametrize(("name", "facts"), [
    ("sana-video-2b-480p", (20, 2240, 112, 20, 6720, 16, (1, 2, 2), WAN21, 8.0, 6.0, 50, False, False)),
    ("sana-video-2b-720p", (20, 2240, 112, 20, 6720, 128, (1, 1, 1), LTX2, 8.0, 6.0, 50, False, False)),
    ("longsana-2b-480p", (20, 2240, 112, 20, 6720, 16, (1, 2, 2), WAN21, 7.0, 1.0, 4, True, False)),
    ("sana-video-2.0-5b-720p", (32, 2560, 128, 20, 10240, 128, (1, 1, 1), LTX23, 12.0, 8.0, 50, False, True)),
])
def test_public_rows_hold_the_published_figures(name, facts):
    s = get_spec(name)
    assert facts == (s.depth, s.width, s.linear_head_dim, s.cross_heads, s.ffn_hidden, s.channels, s.patch, s.vae, s.flow_shift,
                     s.cfg, s.steps, s.causal, s.hybrid)
    assert (s.caption_channels, s.caption_tokens) == (2304, 300)


@pytest.mark.parametrize("name", SPECS)
def test_every_row_fits_its_vae_and_its_own_defaults(name):
    spec = SPECS[name]
    assert spec.channels == spec.vae.channels and spec.linear_heads * spec.linear_head_dim == spec.width
    assert require_size(spec, *spec.size) == spec.size and require_frames(spec, spec.frames) == spec.frames
    assert spec.pixel_frames(spec.latent_frames(spec.frames)) == spec.frames
    assert min(spec.flow_shift, spec.steps, spec.fps, spec.block_frames) > 0


def test_long_rows_are_their_clip_rows_with_other_ways_to_sample():
    for clip, long in (("sana-video-2b-480p", "longsana-2b-480p"), ("sana-video-mini", "sana-video-mini-long")):
        network = ("depth", "width", "linear_head_dim", "cross_heads", "ffn_hidden", "channels", "patch", "caption_channels",
                   "vae")
        assert all(getattr(SPECS[clip], f) == getattr(SPECS[long], f) for f in network)
        assert SPECS[long].causal and not SPECS[clip].causal


@pytest.mark.parametrize(("change", "words"), [
    ({"linear_head_dim": 100}, "head dim 100"), ({"cross_heads": 3}, "3 cross heads"),
    ({"linear_head_dim": 35}, "even head dim"),
])
def test_rows_that_cannot_be_built_are_refused(change, words):
    with pytest.raises(SanaVideoError, match=words):
        dataclasses.replace(BASE, **change)


def test_unknown_names_get_the_list():
    with pytest.raises(SanaVideoError, match=r"sana-9.*longsana-2b-480p"):
        get_spec("sana-9")


def test_steps_in_pixels_and_frames():
    assert BASE.pixel_step == (16, 16) and SPECS["sana-video-2b-720p"].pixel_step == (32, 32)
    assert BASE.latent_frames(81) == 21 and BASE.latent_frames(1) == 1
    assert SPECS["sana-video-2.0-5b-720p"].latent_frames(193) == 25


@pytest.mark.parametrize("frames", [1, 5, 81, 4093])
def test_lengths_of_one_plus_a_multiple_of_the_stride_pass(frames):
    assert require_frames(BASE, frames) == frames


@pytest.mark.parametrize(("frames", "words"), [(80, "Use 77 or 81"), (82, "Use 81 or 85"), (0, "Use 1 or 5"), (-4, "Use 1 or 5"),
                                               (81.0, "Use 1"), (True, "Use 1"), ("81", "Use 1"), (math.nan, "Use 1")])
def test_other_lengths_are_refused_with_the_nearest(frames, words):
    with pytest.raises(SanaVideoError, match=words):
        require_frames(BASE, frames)


@pytest.mark.parametrize(("width", "height", "words"), [
    (833, 480, "Use 832x480"), (832, 470, "Use 832x464"), (8, 480, "Use 16x480"), (0, 480, "Use 16x480"),
    (-832, 480, "Use 16x480"), (math.nan, 480, "Use 16x480"), (math.inf, 480, "Use 16x480"), (832, 10**12, "Use 832x16"),
])
def test_odd_sizes_are_refused_with_the_nearest(width, height, words):
    with pytest.raises(SanaVideoError, match=words):
        require_size(BASE, width, height)


@pytest.mark.parametrize(("name", "safe"), [("a b/c", "a-b-c"), ("../../x", "x"), ("", "unnamed"), ("...", "unnamed"),
                                            ("Ünï", "n"), ("ok_1.2-3", "ok_1.2-3")])
def test_safe_names_hold_no_path(name, safe):
    assert safe_name(name) == safe
