"""Block plan and block sampler: arithmetic, partitions, prompt changes, guidance, cancel, bad input."""

from __future__ import annotations

import pytest
import torch

from longvideo import GRID, caption, latent, same_state, tiny_model, tiny_spec
from sana_video_core.errors import SanaVideoError, StateError
from sana_video_core.sampling.blocks import Condition, Recipe, caption_key, prefill, sample_blocks, seeded_noise
from sana_video_core.sampling.guidance import Caption
from sana_video_core.sampling.plan import MAX_BLOCKS, BlockPlan, plan_blocks, seconds_of, split
from sana_video_core.state import RecurrentState, tensors

FEW = Recipe.few_step((1.0, 0.7, 0.0))
TEXTS = [Condition(Caption(*caption(i)), Caption(*caption(50 + i, tokens=3))) for i in range(4)]


def sample(lengths, texts=TEXTS[0], recipe=FEW, seed=1, state=None, model=None, **options):
    """The list of blocks of a run that goes on from ``state``."""
    plan = BlockPlan(tuple(lengths), *((state.blocks, state.position) if state else (0, 0)))
    return list(sample_blocks(model or tiny_model(), plan, texts, spec=tiny_spec(), size=GRID, recipe=recipe, seed=seed,
                              state=state, **options))


def joined(blocks):
    return torch.cat([b.latent for b in blocks], 2)


# ---------------------------------------------------------------------------------------------------------------- plan

@pytest.mark.parametrize(("pixels", "lengths"), [
    (81, (11, 10)), (161, (11, 10, 10, 10)), (321, (11,) + (10,) * 7), (961, (11,) + (10,) * 23), (1041, (11,) + (10,) * 25),
    (37, (10,)), (33, (9,)), (1, (1,)),
])
def test_official_partition(pixels, lengths):
    assert split((pixels - 1) // 4 + 1) == lengths


def test_pixels_of_blocks():
    spans = plan_blocks(3).spans()
    assert [s.pixels() for s in spans] == [(0, 41), (41, 81), (81, 121)]
    assert seconds_of(spans[1], 16) == (41 / 16, 81 / 16)
    later = plan_blocks(2, index=3, start=31).spans()
    assert later[0].index == 3 and later[0].frames == 10 and later[0].pixels() == (121, 161)


@pytest.mark.parametrize("count", [0, -1, 100_000, 2.5, True, "3"])
def test_impossible_numbers_of_blocks(count):
    with pytest.raises(SanaVideoError, match="number of blocks"):
        plan_blocks(count)
    assert len(plan_blocks(MAX_BLOCKS).lengths) == MAX_BLOCKS


@pytest.mark.parametrize("lengths", [(), (0,), (3, -1), (3, 257), (2.0,), (True,)])
def test_impossible_blocks(lengths):
    with pytest.raises(SanaVideoError, match="[Bb]lock"):
        BlockPlan(lengths).checked()


# ---------------------------------------------------------------------------------------------------------- the sampler

def test_blocks_come_one_by_one_with_absolute_positions():
    blocks = sample((3, 2, 1, 2))
    assert [(b.index, b.start, b.latent.shape[2], b.state.position) for b in blocks] == [
        (0, 0, 3, 3), (1, 3, 2, 5), (2, 5, 1, 6), (3, 6, 2, 8)]
    assert all(b.latent.dtype == torch.float32 and torch.isfinite(b.latent).all() for b in blocks)


def test_a_plain_loop_gives_the_same_blocks():
    model, noise, (text, mask) = tiny_model(), seeded_noise(1), TEXTS[0].positive
    state, out = None, []
    for i, frames in enumerate((3, 2)):
        shape = (1, 4, frames, *GRID)
        x = noise(i, 0, shape)
        for step, (sigma, after) in enumerate(((1.0, 0.7), (0.7, 0.0))):
            v = model(x, torch.tensor([1000 * sigma]), text, mask, state=state)
            x0 = x - sigma * v
            x = (1 - after) * x0 + after * noise(i, step + 1, shape) if after else x0
        out.append(x)
        state = model.commit(x, text, mask, state=state)[1]
    assert torch.allclose(torch.cat(out, 2), joined(sample((3, 2))), atol=1e-5)


@pytest.mark.parametrize("recipe", [
    FEW, Recipe.few_step(), Recipe.multi_step((1.0, 0.6, 0.3, 0.0), "flow Euler", 3.0),
    Recipe.multi_step((0.999, 0.6, 0.3, 0.0), "flow-DPM", 2.0),
])
@pytest.mark.parametrize("window", [0, 1, 2])
def test_any_partition_gives_the_same_film(recipe, window):
    lengths, texts = (3, 2, 2, 1, 2), lambda i: TEXTS[(0, 0, 1, 1, 2)[i]]
    whole = sample(lengths, texts, recipe, window=window)
    for cut in range(1, 5):
        first = sample(lengths[:cut], texts, recipe, window=window)
        rest = sample(lengths[cut:], texts, recipe, state=first[-1].state)
        assert torch.equal(joined(first + rest), joined(whole)) and same_state(rest[-1].state, whole[-1].state)


class WithoutReading:
    """A network that makes keys and values of the text at every pass."""

    def __init__(self, model):
        self.model, self.absorb = model, model.absorb

    def __call__(self, *arguments, **options):
        return self.model(*arguments, **options)


@pytest.mark.parametrize("recipe", [FEW, Recipe.multi_step((1.0, 0.5, 0.0), "flow Euler", 3.0)])
@pytest.mark.parametrize("parity", [False, True])
def test_a_text_is_read_once_for_all_its_blocks(recipe, parity):
    """One reading a text, the same bits; also where each block brings a Condition of its own about the same tensors."""
    model, calls = tiny_model(parity=parity), []
    layer = model.blocks[1].cross_attn.kv_linear
    mask = torch.arange(5)[None] < 3
    texts = [Condition(Caption(TEXTS[i].positive.embedding, mask), TEXTS[i].negative) for i in range(2)]
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = sample((3, 2, 2), lambda i: Condition(*texts[i // 2]), recipe, model=model, parity=parity)
        assert len(calls) == 2
        plain = sample((3, 2, 2), lambda i: texts[i // 2], recipe, model=WithoutReading(model), parity=parity)
        assert len(calls) > 10
    finally:
        handle.remove()
    assert torch.equal(joined(found), joined(plain)) and same_state(found[-1].state, plain[-1].state)


def test_a_text_of_another_encoder_is_refused_by_name():
    with pytest.raises(SanaVideoError, match="text conditioning does not fit tiny-long"):
        sample((2,), Condition(Caption(torch.randn(1, 5, 9), None)))
    with pytest.raises(SanaVideoError, match="text mask does not fit"):
        sample((2,), Condition(Caption(torch.randn(1, 5, 8), torch.ones(1, 4, dtype=torch.bool))))


def test_gradients_read_the_text_at_every_pass():
    plan, text = BlockPlan((2,), 0, 0), Caption(TEXTS[0].positive.embedding.clone().requires_grad_(), TEXTS[0].positive.mask)
    blocks = sample_blocks(tiny_model(), plan, Condition(text), spec=tiny_spec(), size=GRID, recipe=FEW, grad=True)
    next(blocks).latent.square().mean().backward()
    assert text.embedding.grad.abs().sum() > 0


def test_a_block_depends_on_its_own_seed_and_the_blocks_before():
    base = sample((3, 2, 2), seed=lambda i: (5, 6, 7)[i])
    other = sample((3, 2, 2), seed=lambda i: (5, 6, 8)[i])
    assert torch.equal(joined(base[:2]), joined(other[:2])) and not torch.equal(base[2].latent, other[2].latent)
    assert torch.equal(sample((3,), seed=5)[0].latent, base[0].latent)


def test_state_is_read():
    blocks = sample((3, 2))
    alone = sample((2,), state=sample((3,), seed=99)[-1].state)
    assert not torch.allclose(alone[0].latent, blocks[1].latent, atol=1e-3)


def test_noise_is_standard_normal_and_never_repeats():
    noise = seeded_noise(3)
    draws = [noise(b, s, (1, 4, 50, 20, 20)) for b in range(3) for s in range(2)]
    for d in draws:
        assert abs(float(d.mean())) < 0.02 and abs(float(d.std()) - 1) < 0.02
    for i, a in enumerate(draws):
        assert all(abs(float((a * b).mean())) < 0.02 for b in draws[:i])


@pytest.mark.parametrize("switch", [1, 2])
def test_a_prompt_change_commits_the_block_before_again(switch):
    model, texts = tiny_model(), lambda i: TEXTS[int(i >= switch)]
    blocks = sample((3, 2, 2), texts)
    before = blocks[switch - 2].state if switch > 1 else None
    text, mask = TEXTS[1].positive
    state = model.absorb(blocks[switch - 1].latent, text, mask, state=before)
    alone = sample((2,), texts, state=state)
    assert torch.equal(alone[0].latent, blocks[switch].latent)
    kept = sample((3, 2, 2), texts, recompute=False)
    assert torch.equal(joined(kept[:switch]), joined(blocks[:switch]))
    assert not torch.allclose(kept[switch].latent, blocks[switch].latent, atol=1e-4)


def test_with_a_window_a_prompt_change_remembers_the_block_before_alone():
    model, texts = tiny_model(), lambda i: TEXTS[int(i >= 3)]
    blocks = sample((3, 2, 2, 2), texts, window=2)
    alone = RecurrentState.empty(tiny_spec().name, (GRID[0] // 2, GRID[1] // 2), 1, window=2, keep_undo=True)
    state = model.absorb(blocks[2].latent, *TEXTS[1].positive, state=alone._replace(position=5, blocks=2))
    after = sample((2,), TEXTS[1], state=state)[0]
    assert torch.equal(after.latent, blocks[3].latent) and len(blocks[3].state.recent) == 2
    assert not torch.equal(sample((3, 2, 2, 2), texts)[3].latent, blocks[3].latent)


def test_a_prompt_change_needs_undo_data():
    state = sample((3,), keep_undo=False)[-1].state
    assert sample((2,), state=state) and sample((2,), TEXTS[1], state=state, recompute=False)
    with pytest.raises(StateError, match="block 2.*undo"):
        sample((2,), TEXTS[1], state=state)


def test_caption_key_sees_what_the_network_sees():
    a, b = TEXTS[0], TEXTS[0]._replace(negative=TEXTS[1].negative)
    assert caption_key(a) == caption_key(b) and caption_key(a, 4.0) != caption_key(b, 4.0)
    assert caption_key(a) != caption_key(TEXTS[1])
    assert caption_key(Condition(Caption(a.positive[0]))) != caption_key(a)


def test_guided_blocks_carry_a_state_for_each_branch():
    recipe, model = Recipe.multi_step((1.0, 0.5, 0.0), "flow Euler", 3.0), tiny_model()
    blocks = sample((3, 2), recipe=recipe)
    assert blocks[-1].state.batch == 2
    noise, branches, out = seeded_noise(1), [None, None], []
    for i, frames in enumerate((3, 2)):
        x = noise(i, 0, (1, 4, frames, *GRID))
        for sigma, after in ((1.0, 0.5), (0.5, 0.0)):
            v = [model(x, torch.tensor([1000 * sigma]), *text, state=s)
                 for text, s in zip((TEXTS[0].negative, TEXTS[0].positive), branches, strict=True)]
            x = x + (after - sigma) * (v[0] + 3 * (v[1] - v[0]))
        out.append(x)
        branches = [model.commit(x, *text, state=s)[1]
                    for text, s in zip((TEXTS[0].negative, TEXTS[0].positive), branches, strict=True)]
    assert torch.allclose(torch.cat(out, 2), joined(blocks), atol=2e-5)
    for row, branch in enumerate(branches):
        for a, b in zip(tensors(branch.layers), tensors(blocks[-1].state.layers), strict=True):
            assert torch.allclose(a, b[row:row + 1], atol=1e-4, rtol=1e-4)


def test_several_films_at_once():
    two = sample((3, 2), batch=2)
    assert two[0].latent.shape[0] == 2 and two[-1].state.batch == 2
    assert not torch.allclose(two[0].latent[0], two[0].latent[1])


def test_prefill_is_as_if_the_model_had_made_the_clip():
    blocks = sample((3, 2, 2))
    state = prefill(tiny_model(), joined(blocks), TEXTS[0], spec=tiny_spec(), lengths=(3, 2, 2))
    assert same_state(state, blocks[-1].state)
    part = prefill(tiny_model(), joined(blocks[:1]), TEXTS[0], spec=tiny_spec(), lengths=(3,))
    again = prefill(tiny_model(), joined(blocks[1:]), TEXTS[0], spec=tiny_spec(), lengths=(2, 2), state=part)
    assert same_state(again, state)


def test_parity_mode_keeps_the_official_dtypes():
    import copy

    model = copy.deepcopy(tiny_model(parity=True)).to(torch.bfloat16)
    recipe = Recipe.few_step(time_dtype=torch.bfloat16)
    assert [s.time for s in recipe.steps] == [1000, 960, 888, 728]
    state = sample((3, 2), model=model, recipe=recipe, parity=True)[-1].state
    layer = state.layers[0]
    assert (layer.vk.dtype, layer.ksum.dtype, layer.tail.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    with pytest.raises(StateError, match="precision"):
        sample((2,), state=state)


def test_last_commit_can_be_left_out():
    class Counting:
        commits = 0

        def __call__(self, *args, **options):
            return tiny_model()(*args, **options)

        def absorb(self, *args, **options):
            self.commits += 1
            return tiny_model().absorb(*args, **options)

    model = Counting()
    blocks = sample((3, 2), model=model, commit_last=False)
    assert model.commits == 1 and blocks[-1].state is None and blocks[0].state is not None
    assert torch.equal(joined(blocks), joined(sample((3, 2))))


def test_gradients_reach_the_network_only_when_asked():
    import copy

    model = copy.deepcopy(tiny_model())
    for p in model.parameters():
        p.requires_grad_(True)
    blocks = sample((3, 2), model=model, grad=True)
    joined(blocks).square().mean().backward()
    assert float(model.blocks[0].attn.qkv.weight.grad.abs().max()) > 0
    assert not any(t.requires_grad for t in tensors(blocks[-1].state))
    assert not sample((3,), model=model)[0].latent.requires_grad


# -------------------------------------------------------------------------------------------------- cancel and bad input

def test_cancel_between_steps_keeps_finished_blocks():
    seen, blocks = [], []

    class Stop(BaseException):
        pass

    def hook(block, step, steps, x0):
        seen.append((block, step, steps))
        if (block, step) == (1, 1):
            raise Stop

    run = sample_blocks(tiny_model(), BlockPlan((3, 2, 2)), TEXTS[0], spec=tiny_spec(), size=GRID, recipe=FEW, seed=1,
                        on_step=hook)
    with pytest.raises(Stop):
        for block in run:
            blocks.append(block)
    assert seen == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)] and len(blocks) == 1
    rest = sample((2, 2), state=blocks[0].state)
    assert torch.equal(joined(blocks + rest), joined(sample((3, 2, 2))))


@pytest.mark.parametrize(("where", "words"), [("velocity", "Block 2.*step 1"), ("state", "Block 2.*state")])
def test_numbers_that_are_none_are_caught_at_once(where, words):
    class Broken:
        def __call__(self, x, *args, state=None, **options):
            v = tiny_model()(x, *args, state=state, **options)
            return v * float("nan") if where == "velocity" and state.blocks == 1 else v

        def absorb(self, *args, state=None, **options):
            after = tiny_model().absorb(*args, state=state, **options)
            if where == "state" and state.blocks == 1:
                after.layers[1].vk[0, 0, 0, 0] = float("inf")
            return after

    blocks = []
    with pytest.raises(SanaVideoError, match=words):
        for block in sample_blocks(Broken(), BlockPlan((3, 2, 2)), TEXTS[0], spec=tiny_spec(), size=GRID, recipe=FEW):
            blocks.append(block)
    assert len(blocks) == 1


@pytest.mark.parametrize(("options", "words"), [
    ({"recipe": Recipe.multi_step((1.0, 0.5, 0.0), "flow Euler", 3.0)}, "batch"), ({"batch": 2}, "batch"),
    ({"model_print": "other"}, "weights"), ({"parity": True}, "precision"),
])
def test_a_state_that_does_not_fit_is_named(options, words):
    state = sample((3,), model_print="mine")[-1].state
    with pytest.raises(StateError, match=words):
        sample((2,), state=state, **options)


def test_resolution_cannot_change_in_mid_film():
    state = sample((3,))[-1].state
    with pytest.raises(StateError, match="grid.*Keep the resolution"):
        list(sample_blocks(tiny_model(), BlockPlan((2,), 1, 3), TEXTS[0], spec=tiny_spec(), size=(4, 4), recipe=FEW, state=state))


def test_plan_and_state_must_meet():
    state = sample((3,))[-1].state
    with pytest.raises(StateError, match="does not begin where the state ends"):
        list(sample_blocks(tiny_model(), BlockPlan((2,)), TEXTS[0], spec=tiny_spec(), size=GRID, recipe=FEW, state=state))


def test_guidance_needs_a_negative():
    with pytest.raises(SanaVideoError, match="negative"):
        sample((3,), TEXTS[0]._replace(negative=None), Recipe.multi_step((1.0, 0.0), "flow Euler", 3.0))


@pytest.mark.parametrize("levels", [(1.0,), (1.0, 0.5), (0.5, 0.7, 0.0), (1.0, 1.0, 0.0)])
def test_levels_must_fall_to_zero(levels):
    for make in (Recipe.few_step, Recipe.multi_step):
        with pytest.raises(SanaVideoError, match="fall"):
            make(levels)


def test_prefill_blocks_must_cover_the_clip():
    with pytest.raises(SanaVideoError, match="cover the clip"):
        prefill(tiny_model(), latent(5), TEXTS[0], spec=tiny_spec(), lengths=(3, 3))
