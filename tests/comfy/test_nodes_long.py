"""The nodes of long video inside the real ComfyUI, in process, on tiny random models."""

from __future__ import annotations

import pytest
import torch

import inprocess as ip
from inprocess import node, run

SIZE = {"width": 64, "height": 32}


def loader(**changes):
    files = {"text_encoder": "gemma_tiny.safetensors", "vae": "wan_tiny.safetensors"}
    return node("SanaVideoLoader", **({"model": "tiny.safetensors", "precision": "auto", "mode": "long"} | files | changes))


def graph(**extra):
    """Nodes 1 and 2 (loader in long mode, text) and the given ones; the preview of a state makes the sampler run."""
    base = {
        "1": loader(),
        "2": node("SanaVideoTextEncode", clip=("1", 1), prompt="a red ball", negative_prompt="a blue square", motion_score=10,
                  instruction=True),
    }
    base.update({key.lstrip("n"): value for key, value in extra.items()})
    return base


def sampler(**changes):
    """A block sampler on nodes 1 and 2: blocks of 3, 2, 2 ... latent frames."""
    inputs = {"model": ("1", 0), "positive": ("2", 0), "blocks": 2, "seed": 1, "block_frames": 2, **SIZE} | changes
    return node("SanaVideoBlockSampler", **inputs)


def saved(source, name="s"):
    return node("SanaVideoStateSave", state=(source, 1), name=name)


def latent_of(outcome, number="4"):
    assert outcome.ok, outcome.error
    return outcome.output(number)["samples"]


def one(blocks=2, **changes):
    return run(graph(n4=sampler(blocks=blocks, **changes), n9=saved("4")))


def core(name):
    return ip.pack_module(f"sana_video_core.{name}")


def same(a, b):
    tensors = core("state").tensors
    return a[:9] == b[:9] and all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


# ------------------------------------------------------------------------------------------------------------- sampling

def test_block_sampler_equals_the_core(world):
    outcome = one(3)
    latent, state = latent_of(outcome), outcome.output("4", 1)
    caption = outcome.output("2")
    blocks, guidance, plan = core("sampling.blocks"), core("sampling.guidance"), core("sampling.plan")
    model = outcome.output("1")
    text = blocks.Condition(guidance.Caption(caption[0][0], caption[0][1]["attention_mask"]))
    spec = model.model.spec
    with torch.inference_mode():
        expected = list(blocks.sample_blocks(
            world.network, plan.plan_blocks(3, 2), text, spec=world.spec, size=(4, 8),
            recipe=blocks.Recipe.few_step(None, 1.0, shift=spec.flow_shift), seed=1))
    out = model.model.process_latent_out(torch.cat([b.latent for b in expected], 2))
    assert latent.shape == (1, 16, 7, 4, 8) and torch.allclose(latent, out, atol=1e-4)
    assert state.position == 7 and state.blocks == 3 and state.spec == spec.name and state.model
    assert all(t.device.type == "cpu" for t in core("state").tensors(state))


def test_what_a_block_is_made_with_when_no_levels_are_connected(world):
    recipe, specs = ip.pack_module("nodes.block_sampler").model_recipe, core("specs").SPECS
    few, many = core("sampling.blocks").recipe_of, "flow-DPM"
    for name in ("longsana-2b-480p", "sana-video-mini-long"):
        assert recipe(specs[name], None, "few-step re-noise", 1.0) == few(specs[name], cfg=1.0)
        assert few(specs[name]).count == 4 and recipe(specs[name], None, many, 3.0).count == 20
    clip = specs["sana-video-2b-480p"]
    assert recipe(clip, None, many, 6.0).count == clip.steps == 50
    with pytest.raises(core("errors").SanaVideoError, match="50 steps.*Choose the solver flow-DPM"):
        recipe(clip, None, "few-step re-noise", 6.0)


def test_chain_of_samplers_equals_one(world):
    whole = one(3)
    chain = run(graph(n4=sampler(blocks=1), n5=sampler(blocks=1, state=("4", 1)), n6=sampler(blocks=1, state=("5", 1)),
                      n9=saved("6")))
    parts = [latent_of(chain, n) for n in ("4", "5", "6")]
    assert torch.equal(torch.cat(parts, 2), latent_of(whole)) and same(chain.output("6", 1), whole.output("4", 1))


def test_changing_the_seed_of_the_third_block_runs_only_from_there(world):
    def chain(seed):
        return graph(n4=sampler(blocks=1), n5=sampler(blocks=1, state=("4", 1)), n6=sampler(blocks=1, state=("5", 1), seed=seed),
                     n7=sampler(blocks=1, state=("6", 1)), n9=saved("7"))

    def executed(outcome):
        return {data["node"] for event, data in outcome.events if event == "executing" and data.get("node")}

    first = run(chain(1))
    before = [latent_of(first, n) for n in ("5", "6")]
    assert {"4", "5", "6", "7"} <= executed(first)
    second = run(chain(2), fresh=False)
    assert second.ok and executed(second) == {"6", "7", "9"}
    after = latent_of(second, "7")
    assert torch.equal(latent_of(second, "5"), before[0]) and not torch.equal(latent_of(second, "6"), before[1])
    assert torch.equal(latent_of(run(chain(2)), "7"), after)


def test_states_of_consumers_share_nothing_that_is_written(world):
    base = graph(n4=sampler(blocks=1), n5=sampler(blocks=2, state=("4", 1), seed=3), n6=sampler(blocks=1, state=("4", 1), seed=4),
                 n9=saved("5"), n10=saved("6"))
    outcome = run(base)
    state = outcome.output("4", 1)
    copies = [t.clone() for t in core("state").tensors(state)]
    again = run(base | {"5": sampler(blocks=2, state=("4", 1), seed=8)}, fresh=False)
    assert again.ok and all(torch.equal(a, b) for a, b in zip(copies, core("state").tensors(state), strict=True))
    first = latent_of(outcome, "6").clone()
    with torch.inference_mode():
        for t in core("state").tensors(state):
            with pytest.raises(ValueError, match="must not be written to"):
                t.zero_()  # a bad consumer
    assert all(torch.equal(a, b) for a, b in zip(copies, core("state").tensors(state), strict=True))
    other = run(base | {"6": sampler(blocks=1, state=("4", 1), seed=5)}, fresh=False)
    assert other.ok and torch.equal(latent_of(run(base, fresh=False), "6"), first)


def test_cfg_carries_both_branches_and_follows_the_negative(world):
    options = {"cfg": 3.0, "solver": "flow Euler", "negative": ("2", 1)}
    sigmas = {"n3": node("SanaVideoSigmas", model=("1", 0), schedule="flow Euler", steps=3, denoise=1.0)}
    outcome = run(graph(**sigmas, n4=sampler(sigmas=("3", 0), **options), n9=saved("4")))
    assert latent_of(outcome).std() > 0.1 and outcome.output("4", 1).batch == 2
    chain = run(graph(**sigmas, n4=sampler(blocks=1, sigmas=("3", 0), **options),
                      n5=sampler(blocks=1, sigmas=("3", 0), state=("4", 1), **options), n9=saved("5")))
    assert torch.equal(latent_of(chain, "5"), latent_of(outcome)[:, :, 3:])
    other = run(graph(**sigmas, n4=sampler(sigmas=("3", 0), **options | {"negative": ("2", 0)}), n9=saved("4")))
    assert not torch.allclose(latent_of(other), latent_of(outcome), atol=1e-3)


def test_lora_applies_to_the_block_sampler(world):
    import folder_paths
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(1)
    width = world.spec.width
    save_file({"diffusion_model.blocks.0.attn.qkv.lora_A.weight": torch.randn(2, width, generator=g),
               "diffusion_model.blocks.0.attn.qkv.lora_B.weight": torch.randn(3 * width, 2, generator=g)},
              world.work / "loras" / "long.safetensors")
    folder_paths.filename_list_cache.clear()
    plain = one()
    lora = run(graph(n3=node("SanaVideoLoadLora", model=("1", 0), lora="long.safetensors", strength=1.0),
                     n4=sampler(model=("3", 0)), n9=saved("4")))
    assert not torch.allclose(latent_of(lora), latent_of(plain), atol=1e-2)
    assert lora.output("4", 1).model == plain.output("4", 1).model, "a LoRA may change in mid-film"
    assert torch.equal(latent_of(one()), latent_of(plain))


def test_bf16_runs_close_to_fp32(world):
    half = run(graph(n4=sampler(), n9=saved("4")) | {"1": loader(precision="bf16")})
    full = latent_of(one())
    assert float((latent_of(half) - full).norm() / full.norm()) < 0.25
    layer = half.output("4", 1).layers[0]
    assert (layer.vk.dtype, layer.ksum.dtype) == (torch.float32, torch.float32)


@pytest.fixture
def bar(monkeypatch):
    """What the progress bar sent, with previews on (every step is sent then); ``bar.stop_at`` cancels at that message."""
    import comfy.model_management
    import comfy.utils
    import latent_preview

    class Bar(list):
        stop_at, total = 0, None

        def hook(self, value, total, preview, **options):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if self.total in (None, total):
                self.append((value, total, preview))
                if len(self) == self.stop_at:
                    comfy.model_management.interrupt_current_processing()

    bar = Bar()
    monkeypatch.setattr(latent_preview, "default_preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    comfy.utils.set_progress_bar_global_hook(bar.hook)
    yield bar
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)


def test_progress_counts_steps_of_all_blocks_and_previews_move(world, bar):
    assert one(3).ok
    assert [(value, total) for value, total, _ in bar] == [(i, 12) for i in range(1, 13)]
    import io

    from PIL import Image

    kind, picture, size = bar[-1][2]
    file = io.BytesIO()
    picture.save(file, format=kind, quality=95, compress_level=1)  # as the server does
    moving = Image.open(file)
    assert kind == "PNG" and size is None and moving.n_frames == 2 and moving.size == (8, 4)
    assert Image.open(io.BytesIO(file.getvalue())).info["duration"] == 250


@pytest.mark.parametrize("moment", [1, 4, 6, 11])
def test_cancel_stops_within_a_step_and_the_next_run_is_the_same(world, bar, moment):
    expected = latent_of(one(3)).clone()
    bar.clear()
    bar.stop_at = moment
    assert not one(3).ok and len(bar) == moment
    bar.stop_at = 0
    assert torch.equal(latent_of(one(3)), expected)


# ----------------------------------------------------------------------------------------------------- states and schedule

def test_a_saved_state_continues_as_if_never_saved(world):
    whole = one(3)
    first = run(graph(n4=sampler(blocks=1), n9=saved("4", "series/night")))
    file = first.output("9", 1)
    assert file.startswith("series/night_0")
    loaded = run(graph(n7=node("SanaVideoStateLoad", file=file, model=("1", 0)), n5=sampler(blocks=2, state=("7", 0)),
                       n9=saved("5")))
    assert loaded.ok, loaded.error
    assert same(loaded.output("7"), first.output("4", 1)) and "1 blocks, 3 latent frames" in loaded.output("7", 1)
    assert torch.equal(latent_of(loaded, "5"), latent_of(whole)[:, :, 3:])


def test_a_damaged_state_file_is_refused(world):
    file = run(graph(n4=sampler(blocks=1), n9=saved("4", "damaged"))).output("9", 1)
    path = world.work / "output" / "sana_video_states" / file
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    outcome = run(graph(n7=node("SanaVideoStateLoad", file=file), n9=saved("7") | {
        "inputs": {"state": ["7", 0], "name": "x"}}))
    assert not outcome.ok and "damaged" in outcome.error
    path.unlink()


def carry(source="4", **inputs):
    plain = {"state": (source, 1), "action": "carry", "name": "", "run_folder": "", "block": 1}
    return node("SanaVideoKVStateCarry", **(plain | inputs))


def test_carry_undo_and_window(world):
    outcome = run(graph(n4=sampler(blocks=2), n5=carry(name="scene 1"), n6=carry(action="undo"),
                        n7=sampler(blocks=1, state=("6", 0)), n8=carry(action="window", block=1), n9=saved("7"),
                        n10=sampler(blocks=1, state=("8", 0)), n11=saved("10"), n12=sampler(blocks=1, state=("5", 0)),
                        n13=saved("12")))
    assert outcome.ok, outcome.error
    assert outcome.output("5", 1).startswith("scene 1: ") and outcome.output("5") is outcome.output("4", 1)
    assert torch.equal(latent_of(outcome, "7"), latent_of(outcome)[:, :, 3:])
    assert outcome.output("8").window == 1
    assert not torch.allclose(latent_of(outcome, "10"), latent_of(outcome, "12"), atol=1e-3)


SCHEDULE = "[block 1] a red ball; motion 20\n[block 2-3] a blue square; motion 5 -> 6; seed 9\n[block 4-] a red ball"


def scheduled(text=SCHEDULE, **extra):
    return graph(n2=node("SanaVideoPromptSchedule", clip=("1", 1), text=text, motion_score=10, instruction=True), **extra)


def test_prompt_schedule_gives_each_block_its_text(world):
    outcome = run(scheduled(n4=sampler(blocks=4), n9=saved("4")))
    latent = latent_of(outcome)
    assert outcome.output("2", 1).splitlines() == [
        "block 1: a red ball (motion 20)", "block 2-3: a blue square (motion 5 to 6, seed 9)", "block 4-: a red ball (motion 10)"]
    texts = ip.pack_module("nodes.long").Texts(outcome.output("1").model.spec, outcome.output("2"))
    spans = core("sampling.plan").plan_blocks(5, 2).spans()
    assert [texts.of(s)[1:] for s in spans] == [("a red ball", 20, None), ("a blue square", 5, 9), ("a blue square", 6, 9),
                                                ("a red ball", 10, None), ("a red ball", 10, None)]
    chain = run(scheduled(n4=sampler(blocks=2), n5=sampler(blocks=2, state=("4", 1)), n9=saved("5")))
    assert torch.equal(torch.cat((latent_of(chain), latent_of(chain, "5")), 2), latent)
    plain = run(scheduled("[block 1-] a red ball; motion 20", n4=sampler(blocks=4), n9=saved("4")))
    assert torch.equal(latent_of(plain)[:, :, :3], latent[:, :, :3]) and not torch.allclose(latent_of(plain), latent, atol=1e-3)


def test_a_schedule_in_another_sampler_is_refused(world):
    outcome = run(scheduled(
        n3=node("SanaVideoEmptyLatent", model=("1", 0), frames=5, batch_size=1, **SIZE),
        n4=node("KSampler", model=("1", 0), seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", positive=("2", 0),
                negative=("2", 0), latent_image=("3", 0), denoise=1.0),
        n9=node("SaveLatent", samples=("4", 0), filename_prefix="x")))
    assert not outcome.ok and "Block Sampler" in outcome.error


def test_prefill_reads_a_clip_as_if_the_model_had_made_it(world):
    prefill = node("SanaVideoPrefillState", model=("1", 0), samples=("4", 0), positive=("2", 0), block_frames=2)
    outcome = run(graph(n4=sampler(blocks=2), n5=prefill, n6=sampler(blocks=1, state=("5", 0)),
                        n7=sampler(blocks=1, state=("4", 1)), n9=saved("6"), n10=saved("7")))
    assert outcome.ok, outcome.error
    for a, b in zip(core("state").tensors(outcome.output("5").layers), core("state").tensors(outcome.output("4", 1).layers),
                    strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)  # the clip went through the latent format and back
    assert torch.allclose(latent_of(outcome, "6"), latent_of(outcome, "7"), rtol=1e-2, atol=1e-2)


# ----------------------------------------------------------------------------------------------------------------- films

def film(blocks=3, name="film", decode=True, **changes):
    extra = {"n5": node("SanaVideoDecode", vae=("1", 2), run_folder=("4", 2)),
             "n6": node("SaveVideo", video=("5", 1), filename_prefix="long", format="mp4", codec="h264")} if decode else {}
    return graph(n4=sampler(blocks=blocks, run_folder=name, **changes), n9=saved("4"), **extra)


def files(world, name):
    folder = world.work / "output" / "sana_video" / name
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "film.lock"}


def frames(path):
    import av

    with av.open(str(path)) as file:
        return [round(float(f.pts * f.time_base) * 16) for f in file.decode(video=0)]


def test_film_is_the_same_video_and_is_resumed(world):
    whole = one(3)
    made = run(film())
    assert torch.equal(latent_of(made), latent_of(whole)) and same(made.output("4", 1), whole.output("4", 1))
    folder = world.work / "output" / "sana_video" / "film"
    assert frames(folder / "film.mp4") == list(range(25))
    assert frames(sorted((world.work / "output").glob("long*.mp4"))[-1]) == list(range(25))
    before = files(world, "film")
    again = run(film())
    assert again.ok and files(world, "film") == before and torch.equal(latent_of(again), latent_of(whole))
    longer = run(film(4))
    assert torch.equal(latent_of(longer)[:, :, :7], latent_of(whole))
    assert {k: v for k, v in files(world, "film").items() if k in before and k.startswith("block")} == {
        k: v for k, v in before.items() if k.startswith("block")}
    assert frames(folder / "film.mp4") == list(range(33))


def test_film_decodes_while_it_samples(world):
    afterwards, at_once = run(film(name="a")), run(film(name="b", decode=False, vae=("1", 2)))
    assert afterwards.ok and at_once.ok, at_once.error
    assert files(world, "a") == files(world, "b")


def test_film_frames_are_those_of_the_latent(world):
    made = run(film(name="pixels", block_frames=1, blocks=5) | {
        "7": node("SanaVideoDecode", samples=("4", 0), vae=("1", 2)), "8": node("PreviewImage", images=("7", 0))})
    assert made.ok, made.error
    stream = ip.pack_module("nodes.film").NativeStream(made.output("1", 2))
    full = made.output("7")
    plan = core("film").Film(world.work / "output" / "sana_video" / "pixels", write=False)
    with torch.inference_mode():
        stream.start(None)
        pieces = [torch.cat(list(stream.decode(plan.latent(i)))) for i in range(5)]
        assert [len(p) for p in pieces] == [5, 4, 4, 4, 4]
        assert torch.equal(torch.cat(pieces), (full * 255).to(torch.uint8))
        for cut in range(1, 5):
            stream.start(plan.latents_before(cut, stream.memory))
            rest = torch.cat([p for i in range(cut, 5) for p in stream.decode(plan.latent(i))])
            assert torch.equal(rest, torch.cat(pieces[cut:]))


def test_film_edit_and_interrupt(world, bar):
    reference = run(film(name="reference", seed=1))
    assert reference.ok
    bar.clear()
    bar.total, bar.stop_at = 12, 10
    assert not run(film(name="stopped", seed=1)).ok
    bar.stop_at = 0
    assert {"block_0001.safetensors", "block_0002.safetensors"} <= set(files(world, "stopped"))
    assert "block_0003.safetensors" not in files(world, "stopped")
    assert run(film(name="stopped", seed=1)).ok and files(world, "stopped") == files(world, "reference")
    text = "[block 1-2] a red ball; seed 1\n[block 3-] a red ball; seed 5"
    edited = run(scheduled(text, **{f"n{k}": v for k, v in film(name="stopped", seed=1).items() if k not in "12"}))
    assert edited.ok, edited.error
    old, new = files(world, "reference"), files(world, "stopped")
    assert old["block_0002.safetensors"] == new["block_0002.safetensors"]
    assert old["block_0003.safetensors"] != new["block_0003.safetensors"]


def test_film_rewind_and_fork(world):
    made = run(film(name="origin", decode=False))
    assert made.ok, made.error
    outcome = run(graph(n5=node("SanaVideoKVStateCarry", action="rewind", name="", run_folder="origin", block=2),
                        n6=sampler(blocks=1, state=("5", 0)), n9=saved("6"),
                        n7=node("SanaVideoKVStateCarry", action="fork", name="branch", run_folder="origin", block=2),
                        n8=sampler(blocks=3, run_folder="branch", seed=1), n10=saved("8"), n11=saved("7") | {
                            "inputs": {"state": ["7", 0], "name": "y"}}))
    assert outcome.ok, outcome.error
    assert torch.equal(latent_of(outcome, "6"), latent_of(made)[:, :, 5:])
    assert files(world, "branch")["block_0002.safetensors"] == files(world, "origin")["block_0002.safetensors"]


def test_film_from_a_state(world):
    whole = one(3)
    later = sampler(blocks=2, state=("4", 1), run_folder="later", vae=("1", 2))
    outcome = run(graph(n4=sampler(blocks=1), n5=later, n9=saved("5")))
    assert torch.equal(latent_of(outcome, "5"), latent_of(whole)[:, :, 3:])
    assert same(outcome.output("5", 1), whole.output("4", 1))
    assert len(frames(world.work / "output" / "sana_video" / "later" / "film.mp4")) == 16
    other = run(graph(n4=sampler(blocks=1, seed=77), n5=sampler(blocks=2, state=("4", 1), run_folder="later"), n9=saved("5")))
    assert not other.ok and "another film: start" in other.error


def test_long_latents_go_through_a_file(world, monkeypatch):
    spool = ip.pack_module("nodes.long").LatentSpool
    plain = latent_of(one(3))
    monkeypatch.setattr(spool, "LIMIT", 100)
    earlier = set((world.work / "temp").glob("sana_video_*.latents"))
    outcome = one(3)
    spooled = latent_of(outcome)
    assert torch.equal(spooled, plain)
    path, = set((world.work / "temp").glob("sana_video_*.latents")) - earlier
    before = path.read_bytes()
    with torch.inference_mode():
        spooled.zero_()
    assert path.read_bytes() == before
    monkeypatch.setattr(spool, "add", lambda *_: 1 / 0)
    assert not one(3).ok and set((world.work / "temp").glob("sana_video_*.latents")) == earlier | {path}


# ------------------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize(("changes", "words"), [
    ({"blocks": 0}, "blocks"), ({"blocks": 100_000}, "blocks"), ({"width": 30}, "30"), ({"seed": -1}, "seed"),
    ({"cfg": float("nan")}, "cfg"), ({"cfg": 3.0}, "negative"), ({"fps": float("inf")}, "fps"), ({"block_frames": 300}, "300"),
    ({"solver": "euler"}, "solver"), ({"run_folder": "../escape"}, "run folder"), ({"run_folder": "/etc/x"}, "run folder"),
    ({"run_folder": "a/../../b"}, "run folder"), ({"run_folder": "con"}, "run folder"), ({"run_folder": "C:\\x"}, "run folder"),
    ({"run_folder": "a" * 300}, "run folder"), ({"run_folder": "x\x00y"}, "run folder"),
])
def test_bad_inputs_are_refused_in_one_sentence(world, changes, words):
    outcome = one(**changes)
    assert not outcome.ok and words in outcome.error
    assert one().ok


def test_number_wires_are_checked_too(world):
    execute = ip.pack_module("nodes.block_sampler").SanaVideoBlockSampler.execute
    made = one()
    model, positive = made.output("1"), made.output("2")
    for changes, words in (({"blocks": 2.5}, "blocks"), ({"blocks": float("nan")}, "blocks"), ({"seed": 2**64}, "seed"),
                           ({"state": 5}, "no state"), ({"solver": "x"}, "solver"), ({"window": -1}, "window")):
        with pytest.raises(ValueError, match=words):
            execute(**({"model": model, "positive": positive, "blocks": 2, "width": 64, "height": 32, "seed": 1} | changes))


def test_clip_models_are_refused(world):
    outcome = run(graph(n4=sampler(), n9=saved("4")) | {"1": loader(mode="clip")})
    assert not outcome.ok and "mode 'long'" in outcome.error


@pytest.mark.parametrize(("helper", "inputs", "words"), [
    ("EasyCache", {"reuse_threshold": 0.2, "start_percent": 0.1, "end_percent": 0.9, "verbose": False}, "EasyCache"),
    ("SkipLayerGuidanceDiT", {"double_layers": "1", "single_layers": "", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0,
                              "rescaling_scale": 0.0}, "guidance"),
])
def test_helpers_that_would_break_a_state_are_refused(world, helper, inputs, words):
    outcome = run(graph(n3=node(helper, model=("1", 0), **inputs), n4=sampler(model=("3", 0)), n9=saved("4")))
    assert not outcome.ok and words in outcome.error and "wrong state" in outcome.error


def test_context_windows_are_refused(world):
    made = one()
    model = made.output("1").clone()
    model.model_options["context_handler"] = object()
    with pytest.raises(ValueError, match="context windows"):
        ip.pack_module("nodes.long").refuse_helpers(model)


def test_a_state_of_another_size_or_guidance_is_refused(world):
    first = {"n4": sampler(blocks=1)}
    for changes, words in (({"width": 32}, "resolution"), ({"cfg": 2.0, "negative": ("2", 1)}, "batch size")):
        outcome = run(graph(**first, n5=sampler(blocks=1, state=("4", 1), **changes), n9=saved("5")))
        assert not outcome.ok and words in outcome.error
    assert run(graph(**first, n5=sampler(blocks=1, state=("4", 1), width=0, height=0), n9=saved("5"))).ok


def test_a_state_of_other_weights_is_refused(world):
    import folder_paths
    from safetensors.torch import load_file, save_file

    state = load_file(world.work / "diffusion_models" / "tiny.safetensors")
    state["blocks.0.attn.proj.weight"] = state["blocks.0.attn.proj.weight"] * 1.001
    save_file(state, world.work / "diffusion_models" / "other.safetensors")
    folder_paths.filename_list_cache.clear()
    outcome = run(graph(n20=loader(model="other.safetensors"), n4=sampler(blocks=1),
                        n5=sampler(blocks=1, state=("4", 1), model=("20", 0)), n9=saved("5")))
    assert not outcome.ok and "weights differs" in outcome.error


@pytest.mark.parametrize(("text", "words"), [
    ("a red ball", "line 1, column 1"), ("[0-5s] a\n[6-7s] b", "line 2, column 1"), ("[0-5s] a; zoom", "line 1, column 11"),
    ("[0-1s] a", "longer than its prompt schedule"),
])
def test_schedule_errors(world, text, words):
    outcome = run(scheduled(text, n4=sampler(blocks=4), n9=saved("4")))
    assert not outcome.ok and words in outcome.error


def test_decode_says_what_is_missing(world):
    nothing = run(graph(n5=node("SanaVideoDecode", vae=("1", 2)), n6=node("PreviewImage", images=("5", 0))))
    assert not nothing.ok and "nothing to decode" in nothing.error
    lost = run(graph(n5=node("SanaVideoDecode", vae=("1", 2), run_folder="nowhere"),
                     n6=node("SaveVideo", video=("5", 1), filename_prefix="x", format="mp4", codec="h264")))
    assert not lost.ok and "no such run folder" in lost.error
    as_images = run(film(name="images") | {"7": node("PreviewImage", images=("5", 0))})
    assert any(event == "execution_error" and "use the video output" in str(data) for event, data in as_images.events)


def test_decode_of_a_clip_also_gives_a_video(world):
    outcome = run(graph(n4=sampler(), n5=node("SanaVideoDecode", samples=("4", 0), vae=("1", 2), fps=24.0),
                        n6=node("SaveVideo", video=("5", 1), filename_prefix="clipvideo", format="mp4", codec="h264")))
    assert outcome.ok, outcome.error
    assert outcome.output("5", 1).get_frame_count() == 17 and float(outcome.output("5", 1).get_frame_rate()) == 24
