"""What surrounds the kernels in Gluon: which calls they take, how work is cut for them, and the trial before their first use.

Their values: ``test_ops_gluon.py``, and on a Hopper card ``tests/gpu``; that they build is ``test_ops_builds.py``.
"""

from __future__ import annotations

import logging

import pytest
import torch

from sana_video_core.ops import fused, linear_fused, onto_fused, softmax_fused
from sana_video_core.ops.reference import Rows
from sana_video_core.ops.registry import fault_of

SHARED = 232448  # bytes of shared memory that a program can have on Hopper


def attention(heads: int, dim: int, **options) -> str | None:
    width = heads * dim
    qkv, weight, table = torch.zeros(1, 6, 3 * width).bfloat16(), torch.ones(width), torch.zeros(6, dim // 2)
    return linear_fused.refuses(qkv, weight, weight, table.to(options.pop("table", torch.float32)), table, heads, **options)


def test_linear_attention_takes_heads_it_is_made_for():
    assert all(attention(2, dim) is None for dim in (80, 96, 112, 128))
    assert all("80, 96, 112 or 128" in attention(2, dim) for dim in (32, 64, 104)) and "at most 128" in attention(2, 144)
    assert "two heads side by side" in attention(3, 112)
    assert "parity" in attention(2, 112, parity=True) and "rotary" in attention(2, 112, table=torch.float64)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 9680, 15600, 32760, 1_000_000])
@pytest.mark.parametrize("rows", [32, 64])
def test_programs_share_all_tokens_and_none_is_without(tokens, rows):
    tiles, programs = fused.programs_of(tokens, rows)
    assert (programs - 1) * tiles * rows < tokens <= programs * tiles * rows and programs <= fused.PROGRAMS


def text(lengths, dim: int = 112, dtype=torch.bfloat16) -> str | None:
    q, k = torch.zeros(1, 6, 2 * dim).bfloat16(), torch.zeros(1, 400, 2 * dim, dtype=dtype)
    return softmax_fused.refuses(q, k, k, 2, None, lengths)


def test_text_attention_takes_texts_it_has_room_for():
    assert text((1,)) is None and text((320, 7)) is None
    assert "1 to 320 text tokens, here are 3 to 321" in text((3, 321)) and "here are 0 to 5" in text((0, 5))
    assert "how many text tokens" in text(None) and "one dtype" in text((5,), dtype=torch.float32)
    assert "80, 96, 112 or 128" in text((5,), dim=32)


def test_a_matrix_begins_where_a_descriptor_can():
    wide = torch.zeros(6 * 672 + 8).bfloat16()
    table, weight = torch.zeros(6, 56), torch.ones(224)
    for start, expected in ((8, None), (4, "16 bytes")):
        qkv, q = wide[start:start + 6 * 672].view(1, 6, 672), wide[start:start + 6 * 224].view(1, 6, 224)
        for reason in (linear_fused.refuses(qkv, weight, weight, table, table, 2), softmax_fused.refuses(q, q, q, 2, None, (5,)),
                       None if expected is None else onto_fused.misplaced(q)):
            assert reason is None if expected is None else expected in reason


@pytest.mark.parametrize("words", range(1, softmax_fused.WORDS_HELD + 1))
def test_a_text_fits_and_a_place_serves_one_group(words):
    form = softmax_fused._form(words)
    held = form["CHUNK"] * form["CHUNKS"]
    assert form["STAGES"] % form["GROUPS"] == 0
    assert words <= held < words + form["CHUNK"] and 2 * 256 * held + 64 * 256 * form["STAGES"] + 1024 <= SHARED


def test_graphs_keep_the_other_kernels(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "compiled graphs" in attention(2, 112) and "compiled graphs" in text((5,))


def test_a_trial_says_what_is_wrong(caplog):
    def fails() -> float:
        raise AttributeError("module has no attribute 'tma'")

    with caplog.at_level(logging.WARNING):
        assert fault_of("an_operator", lambda: 0.003, "others run instead") is None and not caplog.messages
        assert "wrong values here (error 0.500)" in fault_of("an_operator", lambda: 0.5, "others run instead")
        assert "wrong values" in fault_of("an_operator", lambda: float("nan"), "others run instead")
        assert "AttributeError: module has no attribute 'tma'" in fault_of("an_operator", fails, "others run instead")
    assert len(caplog.messages) == 3 and all(m.startswith("an_operator: ") and m.endswith("others run instead")
                                             for m in caplog.messages)


@pytest.mark.parametrize("frames, size", [(0, 0), (3, 40), (4, 40), (9, 33), (21, 64), (8, 31)])
@pytest.mark.parametrize("works", [True, False, "until it is built"])
def test_every_token_gets_its_product_once(frames, size, works, monkeypatch):
    """Four frames together and the others, which begin after them in every matrix; without a place for a tile, or where that
    kernel cannot be built, none together."""
    batch, channels = 2, 16
    tokens = frames * size or 50
    x = torch.zeros(batch, tokens, channels).bfloat16()
    extra = torch.arange(batch * tokens).view(batch, tokens, 1).expand(-1, -1, 2)
    rows = torch.arange(batch * (frames + 2) * size if frames else batch * tokens).view(-1, 1).expand(-1, 3)
    seen = []

    def together(x, y, weight, extra, out, frames, count, **_):
        seen.append(count)
        if works is not True:
            raise type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})
        x[:, :count * size] += 1

    def others(x, y, weight, extra, out, whole, size, **_):
        x += 1
        first = int(extra[0, 0, 0])
        for b in range(batch):  # the middle one of three neighbours
            own = y.values.reshape(-1, 3)[b * (whole + 2 * size) + size:][:x.shape[1], 0]
            assert torch.equal(own, b * (whole + 2 * size) + size + first + torch.arange(x.shape[1]))
            assert torch.equal(extra[b, :, 0], b * whole + first + torch.arange(x.shape[1]))

    monkeypatch.setattr(onto_fused, "frames_fault", lambda device: None if works else "no")
    monkeypatch.setattr(onto_fused, "_add_frames", together)
    monkeypatch.setattr(onto_fused, "_add_rows", others)
    assert onto_fused.add_product_fp8(x, Rows(rows, torch.ones(())), Rows(x, x), extra=extra, frames=frames) is x
    assert bool((x == 1).all()) and seen == ([frames // 4 * 4] if works and frames >= 4 and size >= 32 else [])


@pytest.mark.parametrize("module", [linear_fused, softmax_fused, onto_fused])
def test_a_trial_without_such_a_card_is_a_reason(module):
    module.gluon_fault.cache_clear()
    assert "does not work here" in module.gluon_fault(torch.device("cpu"))
    module.gluon_fault.cache_clear()
