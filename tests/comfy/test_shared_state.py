"""States on a wire can be read in every way and written in none (comfyui spec 9.1)."""

from __future__ import annotations

import copy

import pytest
import torch

import inprocess as ip

WRITES = {
    "method": lambda t: t.zero_(),
    "operator": lambda t: t.__imul__(2),
    "item": lambda t: t.__setitem__(0, 7.0),
    "out": lambda t: torch.mul(t, 0, out=t),
    "copy_": lambda t: t.copy_(torch.zeros_like(t)),
    "a row": lambda t: t[0].fill_(3),
    "transposed": lambda t: t.T.mul_(0),
    "another shape": lambda t: t.reshape(-1).zero_(),
    "another dtype": lambda t: t.view(torch.uint8).zero_(),
    "detached": lambda t: t.detach().zero_(),
    ".data": lambda t: t.data.zero_(),
    "split": lambda t: t.unbind()[0].zero_(),
    "the same device": lambda t: t.to("cpu").zero_(),
    "contiguous": lambda t: t.contiguous().zero_(),
    "as a plain tensor": lambda t: t.as_subclass(torch.Tensor).zero_(),
    "foreach": lambda t: torch._foreach_mul_([t], 0.0),
    "index": lambda t: t.index_put_((torch.tensor([0]),), torch.tensor(5.0)),
    "init": lambda t: torch.nn.init.zeros_(t),
    "random": lambda t: t.normal_(),
    "resize": lambda t: t.resize_(1),
    "set_": lambda t: t.set_(),
}


@pytest.fixture(params=[True, False], ids=["inference", "plain"])
def pair(world, request):
    """(plain tensor, the protected one on its memory), inside and outside of inference mode."""
    with torch.inference_mode(request.param):
        plain = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
        yield plain, ip.pack_module("nodes.shared_state").ReadOnlyTensor(plain)


@pytest.mark.parametrize("way", WRITES)
def test_every_write_is_refused_and_changes_nothing(pair, way):
    plain, guard = pair
    before = plain.clone()
    with pytest.raises(ValueError, match=r"must not be written to.*tensor\.clone\(\)"):
        WRITES[way](guard)
    assert torch.equal(plain, before) and torch.equal(guard, before)


def test_reading_works_and_results_are_ordinary(pair):
    plain, guard = pair
    for result in (guard + 1, 1 - guard, guard.clone(), guard.double(), guard @ guard.T, torch.cat((guard, plain)), guard.sum(0),
                   torch.stack([guard, guard]), copy.deepcopy(guard), copy.copy(guard), guard.to("cpu", copy=True)):
        assert type(result) is torch.Tensor
        result.zero_()
    assert torch.equal(guard.clone(), plain) and plain.abs().sum() > 0
    assert torch.equal(guard[1:, 2], plain[1:, 2]) and guard[0, 0].item() == plain[0, 0].item()
    assert guard.tolist() == plain.tolist() and repr(guard) == repr(plain) and f"{guard}" == f"{plain}"
    assert (guard.shape, guard.dtype, guard.device, guard.numel()) == (plain.shape, plain.dtype, plain.device, plain.numel())
    numbers = guard.numpy()
    numbers.fill(0)
    assert plain.abs().sum() > 0
    writable = torch.zeros(3, 4)
    writable += guard  # reading into somebody's own tensor
    writable.copy_(guard)
    assert torch.equal(writable, plain)


def test_replacing_the_data_of_a_wire_does_not_reach_our_nodes(pair):
    plain, guard = pair
    guard.data = torch.zeros(1)
    assert ip.pack_module("nodes.shared_state").unguarded(guard) is plain


def test_a_state_goes_out_and_comes_in_without_a_copy(world):
    shared, state = (ip.pack_module(name) for name in ("nodes.shared_state", "sana_video_core.state"))
    layer = state.LayerState(*(torch.randn(1, 2, 3, 3) for _ in range(3)))
    undo = state.Undo((layer,), 3, torch.randn(1, 4, 3, 2, 2))
    made = state.RecurrentState.empty("tiny", (2, 2), 1)._replace(layers=(layer,), undo=undo)
    wire = shared.hand_out(made)
    assert type(wire) is state.RecurrentState and wire[:9] == made[:9]
    assert all(type(t) is shared.ReadOnlyTensor for t in state.tensors(wire)) and len(state.tensors(wire)) == 7
    assert shared.hand_out(wire) is wire and wire.nbytes() == made.nbytes()
    assert all(a is b for a, b in zip(state.tensors(shared.take_in(wire)), state.tensors(made), strict=True))
    mixed = shared.hand_out(wire._replace(layers=(layer,)))
    assert all(type(t) is shared.ReadOnlyTensor for t in state.tensors(mixed))
    assert mixed.undo.latent is wire.undo.latent
    with pytest.raises(ValueError, match="There is no state"):
        ip.pack_module("nodes.long").require_state((wire,))


def test_comfyui_counts_the_memory_of_a_state(world):
    """Its cache looks for CPU tensors in tuples, by type, device and size."""
    wire = ip.pack_module("nodes.shared_state").ReadOnlyTensor(torch.zeros(1000))
    assert isinstance(wire, torch.Tensor) and wire.device.type == "cpu" and wire.numel() * wire.element_size() == 4000
