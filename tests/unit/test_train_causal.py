"""Training of the causal model: the one-pass form equals the states of inference, rows and cuts, the distillation's targets."""

from __future__ import annotations

import argparse
import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from longvideo import GRID, tiny_model, tiny_spec
from sana_video_core import mini, ops
from sana_video_core.dit.embeddings import rope_table
from sana_video_core.errors import SanaVideoError
from sana_video_core.mini.render import render
from sana_video_core.mini.world import Scene, Thing
from sana_video_core.ops import reference
from sana_video_core.sampling.blocks import Recipe
from sana_video_core.sampling.schedules import LONGSANA_TIMES
from sana_video_core.train import causal, distill
from sana_video_core.train.common import Optimiser, Processes
from sana_video_core.train.continuation import continuation_errors
from sana_video_core.train.fast import replaced_operators
from sana_video_core.train.parallel import Layout, arrange, block_causal_operators
from sana_video_core.train.pieces import BASE, CAPTIONED, CAPTIONS, Pieces, cut_video, empty_caption, make_pieces
from sana_video_core.train.replay import place_state

TOKENS, WIDTH, CHANNELS = 5, 8, 4  # of the tiny network's captions and latents
TOKEN_GRID = (GRID[0] // 2, GRID[1] // 2)
LENGTHS = (3, 2, 2, 2)  # blocks of the exact comparisons


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def toy_pieces(count=6, blocks=7, cut=None, seed=0):
    """Latents that swing smoothly, each piece with a phase of its own, in the form that the real ones have."""
    length = 1 + BASE * blocks
    phase = 2 * draw(count, 1, CHANNELS, *GRID, seed=seed)
    latents = torch.sin(phase + 0.6 * torch.arange(length).view(1, -1, 1, 1, 1))
    mask = torch.ones(count, CAPTIONED, CAPTIONS, TOKENS, dtype=torch.bool)
    mask[..., -1] = False
    text = draw(*mask.shape, WIDTH, seed=seed + 1)
    return Pieces(latents.half(), torch.full((count,), cut or length), text.half(), mask)


def trainable():
    return copy.deepcopy(tiny_model(seed=3)).requires_grad_(True)


# ----------------------------------------------------------------------------------------------- one pass against states

def film(levels, rough=0.0):
    """Clean and noisy latents of a film of LENGTHS, and its two captions of different length."""
    frames = sum(LENGTHS)
    clean, noise = draw(1, CHANNELS, frames, *GRID, seed=1), draw(1, CHANNELS, frames, *GRID, seed=2)
    level = torch.repeat_interleave(torch.tensor(levels) / 1000, torch.tensor(LENGTHS)).view(1, 1, -1, 1, 1)
    texts = [(draw(1, TOKENS, WIDTH, seed=10 + k), torch.tensor([[True] * (TOKENS - k) + [False] * k])) for k in range(2)]
    return clean + rough * noise, (1 - level) * clean + level * noise, texts


def one_by_one(network, history, noisy, levels, texts, window, position, text_of):
    """Velocity of every block at its level, each after the commits of the blocks before it, as a sampler would make them.

    ``text_of(i, j)``: the caption under which block j stands in the state that block i reads.
    """
    pieces = [t.split(LENGTHS, 2) for t in (history, noisy)]
    out = []
    for i in range(len(LENGTHS)):
        state = place_state(network.spec, TOKEN_GRID, 1, position, window)
        for j in range(i):
            state = network.absorb(pieces[0][j], *texts[text_of(i, j)], state=state)
        out.append(network(pieces[1][i], torch.tensor([levels[i]]), *texts[text_of(i, i)], state=state))
    return torch.cat(out, 2)


def in_one_pass(network, history, noisy, levels, texts, window, position, text_of, told=0.0):
    """The same from one forward pass, with two frames of padding. ``told``: time of the history, or one a block."""
    table = arrange(LENGTHS, 0, window, 2 * sum(LENGTHS))
    last = len(LENGTHS)
    read = [0 if b < 0 else text_of(b if noisy_copy else last, b)
            for b, noisy_copy in zip(table.block.tolist(), table.target.tolist())]
    angles = [t.unflatten(0, (sum(LENGTHS), -1))[table.source]
              for t in rope_table(sum(LENGTHS), *TOKEN_GRID, network.spec.linear_head_dim, position)]
    layout = Layout(*(t[None] for t in (table.reads, table.before, table.after,
                                        F.one_hot(torch.tensor(read), CAPTIONED).float(), *angles)))
    chosen = table.target.view(1, 1, -1, 1, 1)
    seen = torch.where(chosen, noisy[:, :, table.source], history[:, :, table.source])
    told = torch.as_tensor(told).expand(last)[table.block.clamp(min=0)]
    times = torch.where(table.target, torch.tensor(levels)[table.block.clamp(min=0)], told)[None]
    text, mask = (torch.cat(parts, 1) for parts in zip(*texts))
    with torch.enable_grad(), block_causal_operators() as parallel:
        parallel.layout = layout
        return network(seen, times, text, mask)[:, :, table.target]


@pytest.mark.parametrize("window", [0, 1, 2])
@pytest.mark.parametrize("cut", [None, 1, 2, 3])
def test_one_pass_equals_the_states_of_inference(window, cut):
    """Also with a cut at block ``cut``: the block before it then stands under the new caption, as it is committed again."""
    network, levels = tiny_model(seed=3), [120.0, 870.0, 400.0, 999.0]
    history, noisy, texts = film(levels, rough=0.1)
    first = len(LENGTHS) + 1 if cut is None else cut

    def text_of(i, j):
        return int(j >= first or (j == first - 1 and i >= first))

    arguments = (network, history, noisy, levels, texts, window, 40, text_of)
    expected, found = one_by_one(*arguments), in_one_pass(*arguments)
    assert float(expected.std()) > 0.1
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_one_pass_of_noisy_blocks_equals_the_blocks_after_each_other():
    """Monotone rows: every block is the history of the next at its own level, so both copies of it say the same."""
    network, levels, window = tiny_model(seed=3), [100.0, 300.0, 300.0, 900.0], 2
    _, noisy, texts = film(levels)
    found = in_one_pass(network, noisy, noisy, levels, texts, window, 7, lambda i, j: 0, told=levels)
    state = place_state(network.spec, TOKEN_GRID, 1, 7, window)
    for part, level, answer in zip(noisy.split(LENGTHS, 2), levels, found.split(LENGTHS, 2)):
        layers = []
        expected = network._pass(part, torch.tensor([level]), *texts[0], state, None, layers)
        assert float((answer - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
        state = state.advance(tuple(layers), part.shape[2], part)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(SanaVideoError):
        arrange(LENGTHS, 0, 2, 2 * sum(LENGTHS) - 3)
    with pytest.raises(ValueError):
        causal.row_lengths(1, 2)


@pytest.mark.parametrize(("blocks", "window"), [(2, 2), (5, 2), (4, 1), (5, 0), (6, 3)])
def test_both_kinds_of_rows_have_one_length(blocks, window):
    opening, middle = causal.row_lengths(blocks, window)
    frames = len(arrange(opening, 0, window).source)
    used = len(arrange(middle, window or 2, window).source)
    assert opening[0] == BASE + 1 and set(opening[1:] + middle) == {BASE}
    assert frames - BASE * 2 < used <= frames


def test_operators_are_put_back():
    before = {name: (op.reference, op.backends) for name, op in ops.OPERATORS.items()}
    with pytest.raises(KeyError), block_causal_operators():
        assert ops.linear_attention.reference is not before["linear_attention"][0]
        raise KeyError
    assert {name: (op.reference, op.backends) for name, op in ops.OPERATORS.items()} == before


# ----------------------------------------------------------------------------------------------------------------- batches

def rows(pieces, blocks=3, **options):
    return causal.Rows(pieces, tiny_spec(), blocks, 2, causal.Options(**options))


def test_batches_of_clean_history():
    torch.manual_seed(1)
    made = rows(toy_pieces(), monotone=0.0, opening=0.5, rough=0.1)
    batch = made.batch(12)
    kind = (batch.clean[:, 0] != made.pieces.latents[:, 0].float()[:, None].expand(-1, 12, -1, -1, -1)).flatten(2).any(2).all(0)
    assert 0 < int(kind.sum()) < 12  # rows of the opening and of the middle
    history = (batch.times == 0)
    assert torch.equal(batch.weight > 0, ~history)
    off = (batch.seen - batch.clean).flatten(2).std(2)
    assert float(off[history].max()) < 0.13 and float(off[history].max()) > 0.02  # told 0, a little noise all the same
    level = (batch.times / 1000)[..., None, None, None]
    target = batch.weight > 0
    expected = (1 - level) * batch.clean + level * batch.noise
    assert torch.allclose(batch.seen[target], expected[target], atol=1e-6)
    for times, weight in zip(batch.times, batch.weight):  # every block of a row has a level of its own
        assert 1 < len(times[weight > 0].unique()) <= 3


def test_batches_of_rising_noise():
    torch.manual_seed(2)
    made = rows(toy_pieces(), monotone=1.0)
    batch = made.batch(8)
    for row in range(8):
        table = [t[int(batch.times[row, -1] == 0)] for t in made.tables]  # a middle ends with padding
        _, block, target = table[:3]
        levels = [batch.times[row][(block == b) & target].unique() for b in range(int(block.max()) + 1)]
        told = [batch.times[row][(block == b) & ~target].unique() for b in range(int(block.max()))]
        assert all(len(t) <= 1 for t in levels) and all(len(t) == 1 for t in told)
        rising = [float(t) for t in levels if len(t)]
        assert rising == sorted(rising) and rising[-1] > 0
        assert all(not len(a) or float(a) == float(b) for a, b in zip(levels, told))
    level = (batch.times / 1000)[..., None, None, None]
    assert torch.allclose(batch.seen, (1 - level) * batch.clean + level * batch.noise, atol=1e-6)


def test_captions_are_dropped_as_a_whole():
    torch.manual_seed(3)
    batch = rows(toy_pieces(), drop=0.5).batch(40)
    mask = batch.mask.unflatten(1, (CAPTIONED, TOKENS))
    empty = mask.sum(-1) == 1
    assert torch.equal(empty[:, 0], empty[:, 1]) and 8 < int(empty[:, 0].sum()) < 32
    assert bool(mask[..., 0].all())


@pytest.mark.parametrize("cut", [11, 21, 31, 41])
def test_frames_after_a_cut_read_the_second_caption(cut):
    torch.manual_seed(4)
    made = rows(toy_pieces(cut=cut), blocks=3)
    batch = made.batch(10)
    for row in range(10):
        middle = int(batch.times[row, -1] == 0)
        source, block, target = (t[middle] for t in made.tables[:3])
        at = source + 11 * middle  # frame of the piece
        first = block[(at >= cut) & (block >= 0)]
        edge = int(first.min()) if len(first) else 99
        expected = ((block >= edge) | ((block == edge - 1) & ~target)) & (block >= 0)
        assert torch.equal(batch.layout.text[row, :, 1].bool(), expected)


def test_a_cut_film_shows_the_second_scene_from_its_frame_on():
    a, b = Scene((Thing("red", "star", "slide"),)), Scene((Thing("blue", "square", "bounce"),), "grey")
    video = cut_video([a, a], [b, None], [11, 21], 81, torch.device("cpu"))
    films = render([a, b], frames=81)
    first = 1 + 4 * 10  # eleven latent frames: one frame and ten fours
    assert torch.equal(video[0, :first], films[0, :first]) and torch.equal(video[0, first:], films[1, first:])
    assert torch.equal(video[1], films[0])


def test_a_piece_is_learned():
    torch.manual_seed(5)
    network, processes = trainable(), Processes()
    made = rows(toy_pieces(count=1), blocks=2, monotone=0.3, shifts=(10.0,))
    optimiser, losses = Optimiser([network], 2e-2), []
    with block_causal_operators() as parallel:
        for _ in range(80):
            loss = causal.causal_loss(network, parallel, made.batch(2))
            loss.backward()
            optimiser.step(1.0, processes)
            losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.35 * sum(losses[:10])


# ------------------------------------------------------------------------------------------------------------ distillation

@pytest.fixture
def films():
    """``films(batch, **options)``: films of tiny networks, within their operators."""
    with contextlib.ExitStack() as stack:
        def make(batch=3, **changes):
            options = {"batch": batch, "window": 2, "max_position": 30, "switch": 0.0, "cfg": 2.0, "guided_above": 0.8,
                       "solver_steps": 3, "solver_shift": 3.0, "rough": 0.1, "truths": 0, "opening": 0.0, "longest": 4,
                       "no_graphs": False}
            made = distill.Films(tiny_model(seed=3), tiny_model(seed=9), toy_pieces(), argparse.Namespace(**options | changes))
            stack.enter_context(made.places.operators())
            return made

        yield make


def same_layers(a, b):
    return all(torch.allclose(x, y, atol=1e-4) for m, n in zip(a.layers, b.layers, strict=True) for x, y in zip(m, n))


def test_players_answer_as_their_network(films):
    """The network itself, outside, with its own rotary table, over three blocks and the window of two."""
    torch.manual_seed(12)
    made = films(batch=2)
    made.restart(4, False)
    state, text = place_state(made.spec, TOKEN_GRID, 2, 25, 2), made.text
    parts, states = draw(2, CHANNELS, 41, *GRID).split((11, 10, 10, 10), 2), [state]
    for part in parts[:3]:
        states.append(made.runner.absorb(part, *text, state=states[-1]))
    found = made.runner(parts[3], torch.full((2,), 700.0), *text, state=states[-1])
    with replaced_operators(linear_attention=reference.linear_attention):
        for part, expected in zip(parts, states[1:]):
            state = tiny_model(seed=3).absorb(part, *text, state=state)
            assert same_layers(state, expected) and (state.position, state.blocks) == (expected.position, expected.blocks)
        assert torch.allclose(found, tiny_model(seed=3)(parts[3], torch.full((2,), 700.0), *text, state=state), atol=1e-5)


def test_the_target_is_the_teachers_solution_of_the_students_own_latent(films):
    torch.manual_seed(6)
    made = films()
    made.restart(3, True)
    made.advance(1)  # the first block
    before, teacher_before = made.state, made.teacher_state
    made_blocks, make = [], made.block
    made.block = lambda: made_blocks.append(make()) or made_blocks[-1]
    target = made.advance(1)
    latent, met = made_blocks[0]
    assert same_layers(distill.last_rows(target.state, 3), before) and target.state.batch == 12 and made.state.blocks == 2
    assert torch.equal(target.x, torch.cat(met)) and target.time.tolist() == [t for t in LONGSANA_TIMES for _ in range(3)]
    assert torch.allclose(target.sigma, target.time / 1000, atol=1e-3) and torch.equal(target.text.mask[3:6], made.text.mask)
    made.teacher_state = teacher_before
    for step, (x, found) in enumerate(zip(met, target.clean.chunk(4), strict=True)):
        assert torch.allclose(found, made.solve(x, step), atol=1e-6)
        assert not torch.allclose(found, latent, atol=0.05)  # the teacher says something else than the student
    assert same_layers(made.runner.absorb(latent, *made.text, state=before), made.state)


def test_below_a_level_the_teacher_needs_no_guidance(films, monkeypatch):
    """There it is asked once a step, and answers as its guided rows do at guidance 1."""
    torch.manual_seed(16)
    made = films(guided_above=2.0, cfg=5.0)
    made.restart(3, False)
    x, rows, teacher = draw(3, CHANNELS, 10, *GRID), [], made.teacher

    class Counting:
        def __call__(self, latent, *args, **kwargs):
            rows.append(len(latent))
            return teacher(latent, *args, **kwargs)

    made.teacher = Counting()
    plain = made.solve(x, 0)
    made.args.guided_above, made.args.cfg = 0.0, 1.0
    assert torch.allclose(made.solve(x, 0), plain, atol=1e-5)
    made.args.cfg = 5.0
    assert not torch.allclose(made.solve(x, 0), plain, atol=0.05)
    made.args.guided_above = 0.8
    made.solve(x, 3)  # from 0.727 on
    assert rows == [3] * 3 + [6] * 6 + [3]


def test_the_teacher_has_a_state_of_its_own_over_the_same_latents(films):
    torch.manual_seed(8)
    made = films()
    made.restart(1, False)
    assert made.state.blocks == made.teacher_state.blocks == 2
    assert made.teacher_state.batch == 2 * made.state.batch
    stated = made.teacher_state.layers[0].vk[made.args.batch:]
    assert not torch.allclose(stated, made.state.layers[0].vk, rtol=0.01)


def test_a_switch_commits_the_last_block_again(films):
    torch.manual_seed(9)
    made = films()
    made.restart(4, True)
    made.advance(1)
    made.advance(1)
    old, (before, latent) = made.state, made.state.before_last()
    made.switch()
    assert (made.state.blocks, made.state.position) == (old.blocks, old.position)
    assert same_layers(made.runner.absorb(latent, *made.text, state=before), made.state)
    assert not same_layers(old, made.state)


def test_true_rows_stand_beside_the_films(films):
    """Their answer is the film itself, and each row of the joined batch is answered as it would be alone."""
    torch.manual_seed(10)
    made = films(truths=2)
    made.restart(2, True)
    assert made.advance(1).x.shape[0] == 12  # a first block has no history to be true to
    target = made.advance(1)
    assert target.x.shape[0] == target.state.batch == 14
    level = target.sigma[12:].view(-1, 1, 1, 1, 1)
    swing = (target.x[12:] - (1 - level) * target.clean[12:]) / level
    assert 0.8 < float(swing.std()) < 1.2
    assert float(target.clean[12:].abs().max()) <= 1.0
    whole = made.runner(target.x, target.time, *target.text, state=target.state)
    alone = made.runner(target.x[13:], target.time[13:], *(t[13:] for t in target.text), state=distill.last_rows(target.state, 1))
    assert torch.allclose(whole[13:], alone, atol=1e-5)


def test_endpoints_of_a_flow_that_is_known():
    """A straight flow is exact, a curved one comes closer with more steps."""
    x, noise = draw(3, 2, 2, 2, 2, seed=1), draw(3, 2, 2, 2, 2, seed=2)
    for sigma in (1.0, 0.9, 0.5):
        levels = distill.falling_levels(sigma, 8, 3.0)
        assert levels[0] == pytest.approx(sigma) and levels[-1] == 0 and levels == sorted(levels, reverse=True)
        start = x + sigma * noise
        assert torch.allclose(distill.endpoint(lambda x, s: noise, start, levels), x, atol=1e-5)
        # dx/ds = 2 s x, so the end is x(s) exp(-s^2)
        errors = [float((distill.endpoint(lambda x, s: 2 * s * x, start, distill.falling_levels(sigma, n, 3.0))
                         - start * math.exp(-sigma ** 2)).abs().max()) for n in (8, 32)]
        assert errors[1] < 0.35 * errors[0] < 0.3


def test_captions_alone_need_no_film():
    """What a run on a CPU takes: texts as with film, and latents of the right size without frames."""
    _, text, vae = mini.load("cpu")
    film, captions = (make_pieces(vae, text, 2, 5, torch.device("cpu"), blocks, 0.0) for blocks in (1, 0))
    assert torch.equal(film.text, captions.text) and torch.equal(film.mask, captions.mask)
    assert film.latents.shape == (2, 11, 16, 12, 20) and captions.latents.shape == (2, 0, 16, 12, 20)


@pytest.mark.parametrize("no_graphs", [False, True])
def test_distillation_brings_the_student_to_the_teacher(films, no_graphs):
    torch.manual_seed(11)
    made, student, processes = films(batch=3, truths=1, opening=0.5, cfg=1.0), trainable(), Processes()
    optimiser, losses = Optimiser([student], 3e-3, keep_grads=True), []
    learn = distill.Lessons(student, made.places, optimiser, not no_graphs)
    for _ in range(40):
        losses.append(float(learn(made.advance(2))))
        optimiser.step(1.0, processes)
    assert all(p.grad is None for p in made.runner.network.parameters())
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


def test_continuations_are_measured_against_the_true_film():
    pieces = toy_pieces(count=2, blocks=4)
    words = continuation_errors(tiny_model(seed=3), pieces, Recipe.few_step((1.0, 0.7, 0.0)), 2).split("by block ")[1].split()
    assert len(words) == 2 and all(float(w) > 0.5 for w in words)  # a random network knows nothing


def test_an_empty_caption_is_the_begin_mark():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert empty_caption(mask).tolist() == [[True, False, False]] * 2
