"""The checker on goldens of other sizes, seeds and names, made here from the literal second writing of the network."""

from __future__ import annotations

import json

import check
import pytest
import torch
from golden_files import spec_of
from literal import Literal
from safetensors.torch import save_file

from sana_video_core.checkpoint import convert
from sana_video_core.dit import SanaVideoTransformer

SIZES = {
    "deep": {"depth": 3, "hidden_size": 60, "linear_head_dim": 20, "num_heads": 5, "mlp_ratio": 2.5, "in_channels": 3,
             "patch_size": [1, 2, 2], "caption_channels": 11, "model_max_length": 7},
    "flat": {"depth": 1, "hidden_size": 24, "linear_head_dim": 8, "num_heads": 2, "mlp_ratio": 4, "in_channels": 6,
             "patch_size": [1, 1, 1], "caption_channels": 9, "model_max_length": 4},
}


def weights_of(config, seed):
    """(original state dict, network) with random weights."""
    generator, spec = torch.Generator().manual_seed(seed), spec_of(config)
    model = SanaVideoTransformer(spec).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.2)
        p.data += float(name.endswith("norm.weight"))
    return {k: v.contiguous() for k, v in convert(model.state_dict(), spec, "original").items()}, model


def inputs(config, batch, grid, generator):
    """(latent, caption (B, 1, L, X), mask)"""
    length = config["model_max_length"]
    mask = (torch.arange(length)[None] < torch.randint(1, length + 1, (batch, 1), generator=generator)).long()
    return (torch.randn(batch, config["in_channels"], *grid, generator=generator),
            torch.randn(batch, 1, length, config["caption_channels"], generator=generator), mask)


def write_model(folder, name, sizes, seed, naming, batch, grid, times):
    """A weights file and a forward case of ``model/`` form."""
    config = {**SIZES[sizes], "weight_seed": seed}
    state, _ = weights_of(config, seed)
    named = {k: v.contiguous() for k, v in convert(state, spec_of(config), naming).items()}
    save_file(named, folder / f"{name}_w.safetensors", metadata={"meta": json.dumps({"config": config})})
    latent, caption, mask = inputs(config, batch, grid, torch.Generator().manual_seed(seed + 1))
    times = torch.tensor(times)
    frames = times[:, 0] if times.ndim == 3 else times[:, None].expand(-1, grid[0])
    out = Literal(spec_of(config), state)(latent, frames, caption[:, 0], mask, [grid[0]]).float().contiguous()
    case = {"name": name, "timestep": times.tolist(), "latent_thw": list(grid), "batch": batch}
    save_file({"in.latent": latent, "in.timestep": times, "in.caption": caption, "in.mask": mask, "orig.output": out},
              folder / f"{name}.safetensors", metadata={"meta": json.dumps({"case": case, "config": config})})


def write_chunked(folder, name, sizes, seed, batch, chunks, size, noisy):
    """A weights file and a chunked forward of ``causal/`` form; outputs by explicit masks, states by our own commits."""
    config = {"model": SIZES[sizes], "weight_seed": seed, "chunk_sizes": chunks, "t_noisy": noisy}
    state, model = weights_of(config, seed)
    meta = {"config": json.dumps(config)}
    save_file({**state, "y_embedder.y_embedding": torch.zeros(2, 2)}, folder / f"{name}_w.safetensors", metadata=meta)
    x, y, mask = inputs(SIZES[sizes], batch, (sum(chunks), *size), torch.Generator().manual_seed(seed + 1))
    literal, t = Literal(spec_of(config), state), {"x": x, "y": y, "mask": mask}
    zero = torch.zeros(batch, sum(chunks))
    t["full/out_t0"] = literal(x, zero, y[:, 0], mask, chunks).float().contiguous()
    t["bidirectional/out_t0"] = literal(x, zero, y[:, 0], mask, [sum(chunks)]).float().contiguous()
    history, start = None, 0
    for i, n in enumerate(chunks):
        part, times = slice(start, start + n), zero.clone()
        times[:, part] = noisy
        noised = literal(x, times, y[:, 0], mask, chunks).float().contiguous()
        t[f"chunk{i}/out_t{noisy}_nosave"] = noised[:, :, part].contiguous()
        t[f"chunk{i}/out_t0_save"] = t["full/out_t0"][:, :, part].contiguous()
        put(t, f"chunk{i}/kv_in", history.layers if history else ())
        own = model.commit(x[:, :, part], y[:, 0], mask, state=history and history._replace(window=1, recent=()), window=1)[1]
        put(t, f"chunk{i}/kv_out", own.layers)
        history = model.commit(x[:, :, part], y[:, 0], mask, state=history)[1]
        start += n
    put(t, "history_after_all_chunks", history.layers)
    t[f"full/out_frames_last_chunk_t{noisy}"] = noised
    save_file(t, folder / f"{name}.safetensors", metadata=meta)


def put(t, prefix, layers):
    for b, layer in enumerate(layers):
        parts = layer.vk, layer.ksum, layer.tail.permute(0, 3, 1, 2)
        t.update({f"{prefix}/block{b}/{k}": v.contiguous() for k, v in zip(("vk", "k_sum", "tconv"), parts)})


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A directory that mixes both forms, two sizes, four seeds and both namings."""
    folder = tmp_path_factory.mktemp("held")
    with torch.no_grad():
        write_model(folder, "held_a", "deep", 71, "diffusers", 3, (2, 6, 10), [1000.0, 3.2, 640.0])
        write_model(folder, "held_b", "flat", 72, "original", 1, (1, 1, 1), [77.0])
        write_model(folder, "held_c", "flat", 73, "diffusers", 2, (4, 3, 1), [[[0.0, 5.5, 999.9, 12.0]], [[0.0, 0.0, 0.0, 31.0]]])
        write_chunked(folder, "held_d", "deep", 74, 2, [2, 1, 1, 3], (2, 4), 960)
    return folder


def test_other_sizes_seeds_names_and_namings_pass(held):
    rows = check.check_directory(held)
    assert {row.verdict for row in rows} == {check.PASS}, [(r.name, r.reason, r.misses[:3]) for r in rows]
    assert sorted({row.kind for row in rows}) == ["chunked forward", "forward", "weights"] and len(rows) == 8


def test_the_right_weights_are_needed(held, tmp_path):
    """The weights of another seed, under the seed that the case asks for."""
    for path in held.glob("held_c*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = {**SIZES["flat"], "weight_seed": 73}
    state, _ = weights_of(config, 75)
    save_file(state, tmp_path / "held_c_w.safetensors", metadata={"meta": json.dumps({"config": config})})
    rows = {row.kind: row for row in check.check_directory(tmp_path)}
    assert rows["weights"].verdict == check.PASS and rows["forward"].verdict == check.FAIL
    assert rows["forward"].misses[0].startswith("orig.output")


def test_weights_that_do_not_fit_their_own_sizes_fail(held, tmp_path):
    (tmp_path / "case.safetensors").write_bytes((held / "held_b.safetensors").read_bytes())
    config = {**SIZES["flat"], "weight_seed": 72}
    state, _ = weights_of({**config, "hidden_size": 32}, 72)
    save_file(state, tmp_path / "w.safetensors", metadata={"meta": json.dumps({"config": config})})
    rows = check.check_directory(tmp_path)
    assert [row.verdict for row in rows] == [check.FAIL] * 2 and all("does not fit" in row.reason for row in rows)
