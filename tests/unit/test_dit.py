"""The network and its reference operators: states, masks, layouts, batches, precision, and the checks of its inputs.

Numbers of the official code are in tests/golden; here are the properties that hold for any weights.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from longvideo import GRID, caption, latent, tiny_model, tiny_spec
from sana_video_core import SPECS
from sana_video_core.dit import SanaVideoTransformer, layers
from sana_video_core.dit import model as network
from sana_video_core.dit.embeddings import axis_split, patchify, rope_table, time_sinusoid, unpatchify
from sana_video_core.dit.look import look
from sana_video_core.errors import SanaVideoError, StateError
from sana_video_core.ops import OPERATORS, Constraint
from sana_video_core.ops import reference as ops

HEADS, DIM = 2, 12
WIDTH = HEADS * DIM
TIMES = torch.tensor([700.0])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(found, expected):
    return float((found.detach() - expected.detach()).norm() / expected.norm())


def qkv_of(tokens, batch=1, seed=0):
    return draw(batch, tokens, 3 * WIDTH, seed=seed), 1 + 0.2 * draw(WIDTH, seed=8), 1 + 0.2 * draw(WIDTH, seed=9)


def split_attention(qkv, weights, cos, sin, sizes, **options):
    """Linear attention over consecutive pieces with the history carried; (joined output, history)."""
    history, outs, start = None, [], 0
    for n in sizes:
        rows = slice(start, start + n)
        out, own = ops.linear_attention(qkv[:, rows], *weights, cos[rows], sin[rows], HEADS, history, **options)
        history = own if history is None else ops.Contribution(history.vk + own.vk, history.ksum + own.ksum)
        outs.append(out)
        start += n
    return torch.cat(outs, 1), history


# ------------------------------------------------------------------------------------------------------- linear attention

def dense_attention(qkv, q_weight, k_weight, cos, sin, sizes):
    """The same in float64 with the whole N x N matrix and an explicit block-causal mask."""
    q, k, v = (t.double() for t in qkv.chunk(3, -1))
    q, k = F.relu(ops.rms_norm(q, q_weight.double(), 1e-5)), F.relu(ops.rms_norm(k, k_weight.double(), 1e-5))
    q, k, v = (t.unflatten(-1, (HEADS, DIM)) for t in (q, k, v))
    turned = [ops.rotate(t, cos.double(), sin.double()) for t in (q, k)]
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    seen = (block[:, None] >= block[None]).double()
    numerator = torch.einsum("bnhd,bmhd->bhnm", *turned) * seen
    denominator = (torch.einsum("bnhd,bmhd->bhnm", q, k) * seen).sum(-1)
    return (torch.einsum("bhnm,bmhd->bnhd", numerator, v) / (denominator.transpose(1, 2)[..., None] + 1e-8)).flatten(2)


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (1, 1, 1, 9), (5, 4, 3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_pieces_with_state_equal_the_block_causal_mask(sizes, batch):
    qkv, *weights = qkv_of(12, batch)
    cos, sin = rope_table(3, 2, 2, DIM)
    found, _ = split_attention(qkv, weights, cos, sin, sizes)
    assert distance(found, dense_attention(qkv, *weights, cos, sin, sizes).float()) <= 1e-5


def test_the_order_of_history_is_only_a_sum():
    """The state after any partition is the sum over all tokens."""
    qkv, *weights = qkv_of(12)
    cos, sin = rope_table(3, 2, 2, DIM)
    _, whole = split_attention(qkv, weights, cos, sin, (12,))
    _, parts = split_attention(qkv, weights, cos, sin, (3, 1, 8))
    assert distance(parts.vk, whole.vk) < 1e-6 and distance(parts.ksum, whole.ksum) < 1e-6
    assert whole.vk.shape == (1, HEADS, DIM, DIM) and whole.ksum.shape == (1, HEADS, 1, DIM)


def test_value_index_stands_first_and_keys_of_the_sum_are_not_rotated():
    qkv, *weights = qkv_of(4)
    cos, sin = rope_table(1, 2, 2, DIM, start=7)
    _, own = ops.linear_attention(qkv, *weights, cos, sin, HEADS)
    _, k, v = qkv.chunk(3, -1)
    k = F.relu(ops.rms_norm(k, weights[1], 1e-5)).unflatten(-1, (HEADS, DIM))
    assert torch.allclose(own.ksum[:, :, 0], k.sum(1), atol=1e-6)
    expected = torch.einsum("bnhv,bnhk->bhvk", v.unflatten(-1, (HEADS, DIM)), ops.rotate(k, cos, sin))
    assert torch.allclose(own.vk, expected, atol=1e-5)


def test_only_relative_positions_matter():
    qkv, *weights = qkv_of(8)
    outs = [ops.linear_attention(qkv, *weights, *rope_table(2, 2, 2, DIM, start), HEADS)[0] for start in (0, 50)]
    assert distance(*outs) < 1e-5


def test_layout_of_the_input_does_not_matter():
    qkv, *weights = qkv_of(12, 2)
    cos, sin = rope_table(3, 2, 2, DIM)
    scattered = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    assert not scattered.is_contiguous()
    for parity in (False, True):
        a, b = (ops.linear_attention(x, *weights, cos, sin, HEADS, parity=parity) for x in (qkv, scattered))
        assert torch.allclose(a[0], b[0], atol=1e-6) and torch.allclose(a[1].vk, b[1].vk, atol=1e-5)


def test_rows_of_a_batch_do_not_mix():
    qkv, *weights = qkv_of(12, 3)
    cos, sin = rope_table(3, 2, 2, DIM)
    together = ops.linear_attention(qkv, *weights, cos, sin, HEADS)[0]
    for i in range(3):
        assert torch.allclose(together[i:i + 1], ops.linear_attention(qkv[i:i + 1], *weights, cos, sin, HEADS)[0], atol=1e-6)


def test_precisions_agree_in_float32_and_keep_their_dtypes_in_half():
    qkv, *weights = qkv_of(12)
    exact = rope_table(3, 2, 2, DIM, 0, torch.float64)
    plain = ops.linear_attention(qkv, *weights, *rope_table(3, 2, 2, DIM), HEADS)
    parity = ops.linear_attention(qkv, *weights, *exact, HEADS, parity=True)
    assert distance(parity[0], plain[0]) < 1e-6
    half = [w.bfloat16() for w in (qkv, *weights)]
    for precise, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        out, own = ops.linear_attention(*half, *exact, HEADS, parity=precise)
        assert (out.dtype, own.vk.dtype, own.ksum.dtype) == (torch.bfloat16, torch.float32, dtype)
        assert distance(out.float(), plain[0]) < 3e-2


def test_a_token_without_features_gives_zero_not_nan():
    qkv, *weights = qkv_of(4)
    cos, sin = rope_table(1, 2, 2, DIM)
    qkv[..., :2 * WIDTH] = -qkv[..., :2 * WIDTH].abs()  # ReLU leaves nothing
    out, _ = ops.linear_attention(qkv, *weights, cos, sin, HEADS)
    assert torch.equal(out, torch.zeros_like(out))


# --------------------------------------------------------------------------------------------------------- other operators

def test_masked_text_is_as_good_as_absent_text():
    q, k, v = draw(2, 7, WIDTH), draw(2, 9, WIDTH, seed=1), draw(2, 9, WIDTH, seed=2)
    mask = torch.arange(9)[None] < torch.tensor([[4], [9]])
    masked = ops.softmax_attention(q, k, v, HEADS, mask)
    known = ops.softmax_attention(q, k * mask[..., None], v * 1e6 * ~mask[..., None] + v * mask[..., None], HEADS, mask, (4, 9))
    cut = ops.softmax_attention(q[:1], k[:1, :4], v[:1, :4], HEADS)
    assert torch.allclose(masked[:1], cut, atol=1e-6) and torch.allclose(known, masked, atol=1e-6)
    scattered = torch.tensor([[True, False, True, False, True, True, False, False, False]])
    kept = ops.softmax_attention(q[:1], k[:1, scattered[0]], v[:1, scattered[0]], HEADS)
    assert torch.allclose(ops.softmax_attention(q[:1], k[:1], v[:1], HEADS, scattered), kept, atol=1e-6)


@torch.no_grad()
def test_one_look_tells_lengths_and_whether_rows_are_the_same():
    mask, part = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), torch.ones(2, 4, 3)
    assert look(mask) == ((2, 3), False) and look(mask, part, part[:, 0]) == ((2, 3), True)
    other = part.clone()
    other[1, 3, 2] = 2
    assert look(mask, part, other) == ((2, 3), False) and look(mask[:1], part[:1]) == ((2,), False)
    assert look(torch.tensor([[1, 0, 1], [1, 1, 1]]).bool(), part) == (None, True)
    assert look(torch.tensor([[0, 0, 0]]).bool()) == (None, False) and look(None, part) == (None, False)
    assert look(mask, part.double().log() / 0) == ((2, 3), False)  # NaN is not the same as itself


@pytest.mark.parametrize("times", [[500.0, 500.0], [500.0, 400.0]])
@torch.no_grad()
def test_rows_that_differ_by_their_text_are_one_up_to_it(times, monkeypatch):
    model, seen = tiny_model(), []
    one, (y, mask) = latent(3), caption(0, batch=2)
    y, mask = torch.cat((y[:1], -y[1:])), torch.arange(mask.shape[1]) < torch.tensor([[4], [2]])
    handles = [block.attn.qkv.register_forward_pre_hook(lambda _, given: seen.append(len(given[0]))) for block in model.blocks]
    found = model(one.expand(2, -1, -1, -1, -1), torch.tensor(times), y, mask)
    same = times[0] == times[1]
    assert seen == [1 if same else 2] + [2] * (len(model.blocks) - 1)
    model(latent(3, batch=2), torch.tensor(times), y, mask)
    assert seen[len(model.blocks):] == [2] * len(model.blocks)
    _, state = model.commit(one.expand(2, -1, -1, -1, -1), y, mask)  # a state has all rows
    assert state.layers[0].vk.shape[0] == 2 and seen[2 * len(model.blocks):] == [2] * len(model.blocks)
    for handle in handles:
        handle.remove()
    monkeypatch.setattr(network, "look", lambda mask, *parts: look(mask))
    torch.testing.assert_close(found, model(one.expand(2, -1, -1, -1, -1), torch.tensor(times), y, mask))


def test_depthwise_gate_is_a_plain_convolution_per_frame():
    x, weight, bias = draw(2, 12, 8), draw(8, 1, 3, 3, seed=1), draw(8, seed=2)
    found = ops.gated_depthwise(x, weight, bias, (3, 2))
    frames = F.silu(x).view(2, 2, 3, 2, 8).flatten(0, 1).permute(0, 3, 1, 2).contiguous()
    y = F.conv2d(frames, weight, bias, padding=1, groups=8)
    expected = (y[:, :4] * F.silu(y[:, 4:])).permute(0, 2, 3, 1).reshape(2, 12, 4)
    assert torch.allclose(found, expected, atol=1e-6)


def test_time_taps_are_the_temporal_convolution():
    u, kernel = draw(2, 5 * 6, 8), draw(8, 8, 3, 1, seed=3)
    taps, tail = ops.temporal_taps(u, 5)
    found = taps @ kernel[..., 0].permute(0, 2, 1).flatten(1).T
    expected = F.conv2d(u.view(2, 5, 6, 8).permute(0, 3, 1, 2), kernel, padding=(1, 0)).permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.allclose(found, expected, atol=1e-5) and torch.equal(tail, u.view(2, 5, 6, 8)[:, -1:])


def test_a_tail_is_the_left_neighbour_and_the_right_one_is_zero():
    u = draw(1, 4 * 3, 2)
    whole, _ = ops.temporal_taps(u, 4)
    _, tail = ops.temporal_taps(u[:, :6], 2)
    second, _ = ops.temporal_taps(u[:, 6:], 2, tail)
    assert torch.equal(second, whole[:, 6:])
    first, _ = ops.temporal_taps(u[:, :6], 2)
    assert torch.equal(first[:, 3:, 4:], torch.zeros(1, 3, 2)) and not torch.equal(whole[:, 3:6, 4:], torch.zeros(1, 3, 2))


def test_modulation_per_frame_equals_one_for_all_when_times_agree():
    x, row = draw(2, 12, 8), draw(2, 1, 8, seed=1)
    frames = row.expand(-1, 3, -1).contiguous()
    assert torch.allclose(ops.modulate_norm(x, row, row), ops.modulate_norm(x, frames, frames), atol=1e-6)
    assert torch.allclose(ops.gated_residual(x, x, row), ops.gated_residual(x, x, frames), atol=1e-6)
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + row) + row
    assert torch.allclose(ops.modulate_norm(x, row, row), expected, atol=1e-6)


def test_norm_is_computed_in_float32():
    x, weight = (100 * draw(3, 64)).bfloat16(), draw(64, seed=1)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.bfloat16().double()
    assert torch.equal(ops.rms_norm(x, weight.bfloat16(), 1e-5), exact.bfloat16())


# ------------------------------------------------------------------------------------------------------------- embeddings

@pytest.mark.parametrize(("dim", "expected"), [(112, (40, 36, 36)), (128, (44, 42, 42)), (28, (12, 8, 8)), (24, (8, 8, 8))])
def test_channels_of_the_axes(dim, expected):
    assert axis_split(dim) == expected and sum(expected) == dim


def test_rotary_table_has_no_end_and_continues():
    whole = rope_table(6, 2, 3, DIM, 0, torch.float64)
    later = rope_table(2, 2, 3, DIM, 4, torch.float64)
    assert all(torch.equal(a[4 * 6:], b) for a, b in zip(whole, later))
    cos, sin = rope_table(1, 1, 1, DIM, 5000, torch.float64)
    assert float(cos[0, 0]) == pytest.approx(torch.tensor(5000.0).double().cos().item())
    assert float((cos**2 + sin**2).min()) > 0.999


def test_rotation_keeps_lengths():
    x = draw(1, 12, HEADS, DIM)
    turned = ops.rotate(x, *rope_table(3, 2, 2, DIM))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned[:, :1], x[:, :1]) and not torch.allclose(turned[:, -1], x[:, -1], atol=1e-2)


def test_times_are_cut_to_whole_numbers():
    times = torch.tensor([999.87, 999.0, 0.9, 0.0])
    a = time_sinusoid(times)
    assert torch.equal(a[0], a[1]) and torch.equal(a[2], a[3]) and a.shape == (4, 256)
    assert float(a[3, 0]) == 1 and float(a[3, 128]) == 0  # cosines first
    exact = time_sinusoid(times, truncate=False)
    assert not torch.allclose(exact[0], exact[1], atol=1e-3)


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_patches_follow_the_convolution_and_come_back(patch):
    x = draw(2, 3, 4, 4, 6)
    kernel = draw(5, 3, *patch, seed=1)
    tokens = patchify(x, patch) @ kernel.flatten(1).T
    assert torch.allclose(tokens, F.conv3d(x, kernel, stride=patch).flatten(2).transpose(1, 2), atol=1e-5)
    grid = tuple(n // p for n, p in zip(x.shape[2:], patch))
    values = patchify(x, patch).unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2)  # channel fastest, as the head gives it
    assert torch.equal(unpatchify(values, grid, patch), x)
    assert torch.equal(patchify(x.transpose(3, 4), patch), patchify(x.transpose(3, 4).contiguous(), patch))


# -------------------------------------------------------------------------------------------------------------- the network

def test_one_time_a_frame_equals_one_for_all_when_they_agree():
    model, x, (y, mask) = tiny_model(), latent(3), caption(0)
    assert distance(model(x, TIMES.expand(1, 3), y, mask), model(x, TIMES, y, mask)) < 1e-6
    mixed = model(x, torch.tensor([[0.0, 700.0, 700.0]]), y, mask)
    assert distance(mixed, model(x, TIMES, y, mask)) > 1e-3


def test_first_block_with_an_empty_state_is_the_plain_pass():
    model, x, (y, mask) = tiny_model(), latent(3), caption(0)
    _, state = model.commit(x, y, mask)
    empty = state._replace(layers=(), position=0, blocks=0, undo=None)
    assert torch.equal(model(x, TIMES, y, mask, state=empty), model(x, TIMES, y, mask))


def test_history_changes_what_comes_and_absolute_positions_matter():
    model, (y, mask) = tiny_model(), caption(0)
    _, state = model.commit(latent(3), y, mask)
    x = latent(2, seed=5)
    with_history = model(x, TIMES, y, mask, state=state)
    assert distance(model(x, TIMES, y, mask), with_history) > 1e-2
    assert distance(model(x, TIMES, y, mask, state=state._replace(position=0)), with_history) > 1e-3


def test_commit_gives_the_velocity_at_time_zero():
    model, x, (y, mask) = tiny_model(), latent(3), caption(0)
    v, _ = model.commit(x, y, mask)
    assert torch.equal(v, model(x, torch.zeros(1), y, mask))


@pytest.mark.parametrize("grad", [True, False])
def test_masked_captions_equal_trimmed_ones(grad):
    model, x = tiny_model(), latent(2)
    y, mask = caption(0, tokens=6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    wild = torch.cat((y[:, :4], 1e3 * y[:, 4:]), 1)
    with torch.set_grad_enabled(grad):
        expected = model(x, TIMES, y[:, :4])
        assert distance(model(x, TIMES, y, mask), expected) < 1e-6 and distance(model(x, TIMES, wild, mask), expected) < 1e-6


def test_batch_rows_and_layouts():
    model, x = tiny_model(), torch.cat((latent(2, seed=1), latent(2, seed=2)))
    y, mask = caption(0, batch=2)
    times = torch.tensor([900.0, 17.0])
    both = model(x, times, y, mask)
    for i in range(2):
        assert distance(model(x[i:i + 1], times[i:i + 1], y[i:i + 1], mask[i:i + 1]), both[i:i + 1]) < 1e-6
    scattered = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert distance(model(scattered, times, y, mask), both) < 1e-6


def test_frames_may_be_passed_through_the_feed_forward_in_groups(monkeypatch):
    model, x, (y, mask) = tiny_model(), latent(5), caption(0)
    with torch.no_grad():
        expected = model(x, TIMES, y, mask)
        monkeypatch.setattr(layers, "FFN_PASS_BYTES", 2 * 6 * 64 * 4)  # two frames of six tokens
        assert distance(model(x, TIMES, y, mask), expected) < 1e-6
        monkeypatch.setattr(layers, "FFN_PASS_BYTES", 1)
        assert distance(model(x, TIMES, y, mask), expected) < 1e-6


def test_gradients_reach_every_parameter():
    model = SanaVideoTransformer(tiny_spec())
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model(latent(2), TIMES, *caption(0)).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert missing == []


def test_a_block_can_be_skipped_by_a_hook():
    model, x, (y, mask) = tiny_model(), latent(2), caption(0)
    called = []
    out = model(x, TIMES, y, mask, on_block=lambda i, call, tokens: called.append(i) or call(tokens))
    assert called == [0, 1] and torch.equal(out, model(x, TIMES, y, mask))
    assert distance(model(x, TIMES, y, mask, on_block=lambda i, call, tokens: tokens), out) > 1e-3


def test_options_of_the_diffusers_variant_matter_a_little():
    spec = tiny_spec()
    state = tiny_model().state_dict()
    x, (y, mask) = latent(3), caption(0)
    y = 1e-2 * y  # small keys make the epsilon visible
    expected = tiny_model()(x, TIMES, y, mask)
    for options in ({"cross_eps": 1e-3}, {"attention_eps": 1e-1}):
        model = SanaVideoTransformer(spec, **options)
        model.load_state_dict(state)
        assert 1e-9 < distance(model(x, TIMES, y, mask), expected) < 0.5
    exact = SanaVideoTransformer(spec, truncate_times=False)
    exact.load_state_dict(state)
    assert torch.equal(exact(x, TIMES, y, mask), expected)
    assert distance(exact(x, TIMES + 0.7, y, mask), expected) > 1e-5


def test_fresh_weights_start_as_a_zero_velocity():
    from sana_video_core.dit.model import init_weights

    model = SanaVideoTransformer(tiny_spec())
    init_weights(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float(model(latent(2), TIMES, *caption(0)).abs().max()) == 0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize(("changes", "words"), [
    ({"latent": torch.zeros(1, 5, 2, *GRID)}, ("latent does not fit", "4, frames", "models/vae")),
    ({"latent": torch.zeros(4, 2, *GRID)}, ("latent does not fit",)),
    ({"latent": torch.zeros(1, 4, 2, 4, 5)}, ("latent size", "[1, 2, 2]", "16 and 16 pixels")),
    ({"latent": torch.zeros(1, 4, 0, *GRID)}, ("latent size",)),
    ({"caption": torch.zeros(1, 5, 9)}, ("text conditioning", "tokens, 8", "Gemma-2-2B")),
    ({"caption": torch.zeros(5, 8)}, ("text conditioning",)),
    ({"mask": torch.ones(1, 4)}, ("text mask", "[1, 5]")),
    ({"times": torch.zeros(1, 3)}, ("Times must be", "[batch, 2]")),
    ({"times": torch.zeros(())}, ("Times must be",)),
])
def test_wrong_inputs_are_refused_with_what_would_be_right(changes, words):
    y, mask = caption(0)
    given = {"latent": latent(2), "times": TIMES, "caption": y, "mask": mask} | changes
    with pytest.raises(SanaVideoError) as error:
        tiny_model()(*given.values())
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("x", "word"), [
    (latent(2, batch=2), "batch size"), (torch.zeros(1, 4, 2, 6, 6), "grid"),
])
def test_a_state_of_another_video_is_refused(x, word):
    model, (y, mask) = tiny_model(), caption(0)
    _, state = model.commit(latent(2), y, mask)
    y, mask = caption(0, batch=x.shape[0])
    with pytest.raises(StateError, match=word):
        model(x, TIMES.expand(x.shape[0]), y, mask, state=state)


def test_the_second_generation_is_refused_by_name():
    with pytest.raises(SanaVideoError, match=r"2\.0"):
        SanaVideoTransformer(SPECS["sana-video-2.0-5b-720p"], device="meta")


@pytest.mark.parametrize("changes", [
    {"linear_head_dim": 7}, {"cross_heads": 5}, {"width": 21, "linear_head_dim": 7, "cross_heads": 3}])
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(SanaVideoError, match="multiple|even"):
        replace(tiny_spec(), **changes)


def test_parity_mode_runs_the_reference_operators_alone():
    """A backend that could run here is used in quality mode and left alone in parity mode."""
    calls = []
    operator = OPERATORS["gated_residual"]
    before = dict(operator.backends)

    def counted(*args):
        calls.append(1)
        return operator.reference(*args)

    operator.backends.clear()
    operator.add("counted", counted, Constraint())
    try:
        for parity, expected in ((False, True), (True, False)):
            calls.clear()
            model = SanaVideoTransformer(tiny_spec(), parity=parity).requires_grad_(False)
            model(latent(2), TIMES, *caption(0))
            assert bool(calls) is expected
    finally:
        operator.backends.clear()
        operator.backends.update(before)
