"""Long runs on the real server: caching along a chain, states across a restart, nodes that write into a state, cancelling."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from pathlib import Path

import longprompts as lp
import pytest
import state_writer
import tinyfiles
import torch
from tinyfiles import saved_latent

import inprocess as ip
from tools.server import ComfyServer, prepare_base

STEPS, BLOCKS = 4, 4  # of the film that is interrupted


@pytest.fixture(scope="module")
def own(environment, tmp_path_factory):
    """A server for this file: it is stopped and started, and has a custom node that writes into states."""
    base = tmp_path_factory.mktemp("long")
    prepare_base(base)
    tinyfiles.write_models(base / "models")
    shutil.copy(state_writer.__file__, base / "custom_nodes")
    with ComfyServer(environment, base, base / "server.log") as server:
        yield server


def run(server, prompt: dict, **options):
    outcome = server.client.run(prompt, **options)
    assert outcome.ok, outcome.error
    return outcome


def latent(server, prompt: dict, **options) -> torch.Tensor:
    """What the prompt's SaveLatent wrote."""
    return saved_latent(server, run(server, prompt, **options))


def test_a_new_seed_in_the_third_part_of_the_chain_runs_only_what_follows(own):
    chain = lp.shrunk(own.client, "long_video_chain", "seed")
    third = lp.only(chain, "SanaVideoBlockSampler", "3")
    chain["99"] = lp.save_latent(lp.only(chain, "SanaVideoDecode"))
    chain["99"]["inputs"]["samples"] = chain[lp.only(chain, "SanaVideoDecode")]["inputs"]["samples"]
    before = run(own, chain)
    assert lp.executed(before) == set(chain)
    changed = json.loads(json.dumps(chain))
    changed[third]["inputs"]["seed"] += 100
    after = run(own, changed)
    follows = {key for key in chain if third in ancestors(chain, key)}
    kinds = sorted(chain[key]["class_type"] for key in follows)
    assert kinds == ["LatentConcat", "SanaVideoBlockSampler", "SanaVideoDecode", "SanaVideoStateSave", "SaveLatent", "SaveVideo"]
    assert lp.executed(after) == follows and lp.cached(after) == set(chain) - follows
    old, new = saved_latent(own, before), saved_latent(own, after)
    assert torch.equal(old[:, :, :9], new[:, :, :9]) and not torch.equal(old[:, :, 9:], new[:, :, 9:])
    own.client.free()
    assert torch.equal(latent(own, changed), new), "a run from nothing gives what the cache gave"


def ancestors(prompt: dict, key: str) -> set[str]:
    """The node and all that it depends on."""
    links = [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
    return {key}.union(*(ancestors(prompt, link) for link in links))


def test_a_saved_state_goes_on_after_a_restart_as_if_nothing_had_happened(own):
    whole = latent(own, lp.graph(n4=lp.sampler(blocks=4, run_folder="whole"), n9=lp.save_latent("4")))
    first = run(own, lp.graph(n4=lp.sampler(blocks=2), n8=lp.save_state("4", "evening"), n9=lp.save_latent("4")))
    file = lp.state_file(first, "8")
    own.stop()
    assert not own.alive()
    own.__enter__()
    rest = lp.graph(n3=ip.node("SanaVideoStateLoad", file=file, model=("1", 0)),
                    n4=lp.sampler(blocks=2, state=("3", 0), width=0, height=0), n9=lp.save_latent("4"))
    assert torch.equal(torch.cat((saved_latent(own, first), latent(own, rest)), 2), whole)
    film = lp.graph(n3=rest["3"], n4=lp.sampler(blocks=2, state=("3", 0), run_folder="morning"), n9=lp.save_latent("4"))
    assert torch.equal(latent(own, film), whole[:, :, 5:])


def test_a_node_that_writes_into_a_state_cannot_change_it_for_others(own):
    def prompt(seed: int, **more: dict) -> dict:
        return lp.graph(n4=lp.sampler(), n5=lp.sampler(state=("4", 1), seed=seed), n9=lp.save_latent("5"), **more)

    def writer(way: str) -> dict:
        return ip.node("StateWriter", state=("4", 1), way=way)

    own.client.free()
    expected = {seed: latent(own, prompt(seed)) for seed in (2, 3)}
    assert not torch.equal(expected[2], expected[3])
    own.client.free()
    run(own, prompt(2))
    for way in state_writer.WAYS:
        outcome = own.client.run(prompt(2, n7=writer(way)))
        assert "4" in lp.cached(outcome)
        if way == "numpy":  # gets a copy
            assert outcome.ok
        else:
            assert outcome.ending == "execution_error" and outcome.data["node_id"] == "7"
            assert "A state must not be written to" in outcome.error and "tensor.clone()" in outcome.error
    hidden = run(own, prompt(2, n7=writer("all, hiding errors")))
    tensors = 2 * 3 + 1  # three in each of two layers, and the latent of the block that can be taken back
    assert hidden.history["outputs"]["7"]["text"] == [f"{tensors} tensors, {6 * tensors} writes refused"]
    after = run(own, prompt(3))
    assert "4" in lp.cached(after) and lp.executed(after) == {"5", "9"}
    assert torch.equal(saved_latent(own, after), expected[3])


# ------------------------------------------------------------------------------------------------------------ interrupts

def film(name: str) -> dict:
    """Four blocks whose steps take long enough to be interrupted in."""
    return lp.graph(n4=lp.sampler(blocks=BLOCKS, width=256, height=256, block_frames=4, run_folder=name), n9=lp.save_latent("4"))


def blocks_of(server, name: str) -> dict[str, tuple[bytes, int]]:
    """{file: (content, time of writing)} of the blocks in a run folder; nothing half written may lie beside them."""
    folder = server.base / "output" / "sana_video" / name
    files = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.iterdir())}
    assert {f for f in files if not f.startswith("block_")} <= {"film.json", "film.lock"}
    return {f: v for f, v in files.items() if f.startswith("block_")}


class Interrupter:
    """Follows a prompt's events; at step ``moment`` of the sampler it waits ``delay`` seconds and asks for an interrupt."""

    def __init__(self, server, moment: int, delay: float):
        self.server, self.moment, self.delay = server, moment, delay
        self.steps, self.answered, self.thread = [], None, None  # steps: (time of arrival, number)

    def __call__(self, event) -> None:
        if event.type == "progress" and event.data["node"] == "4":
            self.steps.append((time.monotonic(), event.data["value"]))
            if event.data["value"] == self.moment:
                self.thread = threading.Thread(target=self.interrupt, args=(event.data["prompt_id"],))
                self.thread.start()

    def interrupt(self, prompt_id: str) -> None:
        time.sleep(self.delay)
        assert self.server.client.post("/interrupt", {"prompt_id": prompt_id})[0] == 200
        self.answered = time.monotonic()

    def steps_after(self) -> int:
        """Steps that were still heard of after the server had answered."""
        self.thread.join()
        return sum(1 for moment, _ in self.steps if moment > self.answered)


@pytest.fixture(scope="module")
def undisturbed(own):
    """(latent, {block file: content}, seconds a step) of the film without an interrupt."""
    listen = Interrupter(own, 0, 0)
    result = latent(own, film("undisturbed"), on_event=listen, preview_method="latent2rgb")  # with previews every step is sent
    assert [number for _, number in listen.steps] == list(range(1, STEPS * BLOCKS + 1))
    step = (listen.steps[-1][0] - listen.steps[0][0]) / (len(listen.steps) - 1)
    return result, {name: content for name, (content, _) in blocks_of(own, "undisturbed").items()}, step


@pytest.mark.parametrize("number", range(20))
def test_an_interrupt_stops_within_a_step_and_the_film_goes_on_the_same(own, undisturbed, number):
    expected, blocks, step = undisturbed
    chance = random.Random(1000 + number)
    listen = Interrupter(own, chance.randint(1, STEPS * (BLOCKS - 1)), chance.random() * step)
    name = f"stopped/{number}"
    stopped = own.client.run(film(name), listen, preview_method="latent2rgb")
    assert stopped.ending == "execution_interrupted" and stopped.data["node_id"] == "4"
    assert listen.steps_after() <= 1
    done = listen.steps[-1][1]
    kept = blocks_of(own, name)
    # A block is written after the pass that follows its last step, and that pass may have been the one interrupted.
    assert done // STEPS - (done % STEPS == 0) <= len(kept) <= done // STEPS
    assert all(blocks[file] == content for file, (content, _) in kept.items())
    again = Interrupter(own, 0, 0)
    assert torch.equal(latent(own, film(name), on_event=again, preview_method="latent2rgb"), expected)
    assert len(again.steps) == STEPS * (BLOCKS - len(kept))
    final = blocks_of(own, name)
    assert {file: content for file, (content, _) in final.items()} == blocks
    assert all(final[file] == whole for file, whole in kept.items()), "a finished block was written again"
    shutil.rmtree(Path(own.base, "output", "sana_video", name))
