"""The recurrent state: arithmetic, window, undo, the cheap commit pass, and that nothing is ever written in place."""

from __future__ import annotations

import pytest
import torch

from longvideo import GRID, caption, latent, same_state, tiny_model, tiny_spec
from sana_video_core.errors import StateError
from sana_video_core.state import RecurrentState, check_fits, tensors


def committed(frames=(3, 2, 2), **options):
    """States after each block of a random clip, the first one before any."""
    model, (text, mask) = tiny_model(), caption(0)
    states = [RecurrentState.empty("tiny-long", (2, 3), 1, **options)]
    for i, count in enumerate(frames):
        states.append(model.commit(latent(count, i), text, mask, state=states[-1])[1])
    return states


def test_absorb_is_commit_without_the_velocity():
    model, (text, mask) = tiny_model(depth=3), caption(0)
    first = model.commit(latent(3), text, mask)[1]
    for state in (None, first):
        full, cheap = (f(latent(2, 1), text, mask, state=state) for f in (lambda *a, **k: model.commit(*a, **k)[1], model.absorb))
        for a, b in zip(tensors(full), tensors(cheap), strict=True):
            assert a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert full[:9] == cheap[:9]


def test_absorb_calls_the_hook_for_every_block_but_the_last():
    model, (text, mask), seen = tiny_model(depth=3), caption(0), []
    model.absorb(latent(2), text, mask, on_block=lambda i, call, x: (seen.append(i), call(x))[1])
    assert seen == [0, 1]


def test_state_holds_no_more_memory_than_its_values():
    for t in tensors(committed(keep_undo=True)[-1].layers):
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


def test_bytes_do_not_grow_with_blocks():
    plain, windowed = committed((3,) + (2,) * 7), committed((3,) + (2,) * 7, window=2)
    assert plain[2].nbytes() == plain[8].nbytes()
    assert windowed[2].nbytes() == windowed[8].nbytes()


def test_window_keeps_the_sums_of_the_last_blocks_only():
    states = committed((3, 2, 2, 2), window=2)
    last = states[-1]
    for i, layer in enumerate(last.layers):
        assert torch.equal(layer.vk, last.recent[0][i].vk + last.recent[1][i].vk)
        assert torch.equal(layer.ksum, last.recent[0][i].ksum + last.recent[1][i].ksum)
    assert len(last.recent) == 2 and last.position == 9 and last.blocks == 4


@pytest.mark.parametrize("window", [0, 1, 2])
def test_undo_takes_one_block_back_exactly(window):
    model, (text, mask) = tiny_model(), caption(0)
    states = committed((3, 2, 2), window=window, keep_undo=True)
    before, clean = states[-1].before_last()
    assert torch.equal(clean, latent(2, 2)) and before.position == 5 and before.blocks == 2
    assert all(torch.equal(a, b) for a, b in zip(tensors(before.layers), tensors(states[-2].layers), strict=True))
    assert same_state(model.commit(clean, text, mask, state=before)[1], states[-1])


def test_undo_of_the_first_block_is_the_empty_state():
    states = committed((3,), keep_undo=True)
    before, _ = states[-1].before_last()
    assert before.layers == () and before.position == 0 and before.blocks == 0


def test_undo_is_refused_without_its_data():
    with pytest.raises(StateError, match="keep undo"):
        committed((3,))[-1].before_last()
    with pytest.raises(StateError):
        committed((3,), keep_undo=True)[-1].without_undo().before_last()


def test_commit_and_forward_leave_the_given_state_alone():
    model, (text, mask) = tiny_model(), caption(0)
    state = committed((3, 2), window=2, keep_undo=True)[-1]
    copies = [t.clone() for t in tensors(state)]
    model.commit(latent(2, 9), text, mask, state=state)
    model(latent(2, 9), torch.tensor([500.0]), text, mask, state=state)
    assert all(torch.equal(a, b) for a, b in zip(copies, tensors(state), strict=True))


def test_a_copy_shares_nothing():
    state = committed((3,))[-1]
    for a, b in zip(tensors(state), tensors(state.to("cpu", copy=True)), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize(("change", "word"), [
    ({"version": 99}, "version"), ({"spec": "other"}, "model"), ({"grid": (3, 3)}, "grid"), ({"batch": 2}, "batch"),
    ({"precision": "parity"}, "precision"), ({"model": "b" * 8}, "weights"),
])
def test_what_does_not_fit_is_named(change, word):
    state = committed((3,))[-1]._replace(model="a" * 8)
    check_fits(state, tiny_spec(), (2, 3), 1, "quality", "a" * 8)
    with pytest.raises(StateError, match=word):
        check_fits(state._replace(**change), tiny_spec(), (2, 3), 1, "quality", "a" * 8)


def test_a_negative_window_is_refused():
    with pytest.raises(StateError, match="window"):
        RecurrentState.empty("x", GRID, 1, window=-1)
