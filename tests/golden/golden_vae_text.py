"""The files of ``vae_text/``: the Wan 2.1 VAE with its streaming cache, and the Gemma-2 caption encoder."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import torch
from golden_files import Golden, GoldenError, Report, Weights
from torch import Tensor

from sana_video_core.text import Gemma2, GemmaConfig
from sana_video_core.text.encode import select_rows
from sana_video_core.vae import wan

CODER = 1e-5  # relative, float32


def check_wan(case: Golden, weights: Weights, report: Report) -> None:
    """Decode whole, in every listed partition, and as a prefix; encode; statistics."""
    t = case.tensors
    vae = _wan(case)
    z = vae.z_dim
    report.abs("const.latents_mean", torch.tensor(wan.WAN21_MEAN[:z]), t["const.latents_mean"], 0.0)
    report.abs("const.latents_std", torch.tensor(wan.WAN21_STD[:z]), t["const.latents_std"], 0.0)
    raw, expected = t["in.latent_raw"], t["out.decode_full_unclamped"]
    report.rel("in.latent_raw", wan.denormalize(t["in.latent_norm"]), raw, 1e-6)
    full = vae.decode(raw)
    report.rel("out.decode_full_unclamped", full, expected, CODER)
    report.rel("out.decode_full_unclamped, at once", vae.decode_parallel(raw), expected, CODER)
    _partitions(case, vae, raw, full, report)
    video = t["in.video"]
    mean = vae.encode(video)
    report.rel("out.encode_mean", mean, t["out.encode_mean"], CODER)
    report.rel("out.encode_mean_norm", wan.normalize(mean), t["out.encode_mean_norm"], CODER)
    moments = torch.cat(list(vae.encode_moments_stream(video, wan.WanCache())), 2)
    report.rel("out.encode_logvar", moments[:, z:], t["out.encode_logvar"], CODER)
    for name, found in zip(("out.encode_mean", "out.encode_logvar"), vae.encode_parallel(video)):
        report.rel(f"{name}, at once", found, t[name], CODER)
    if frames := case.info.get("encode_frames_per_latent"):
        cache, start, pieces = wan.WanCache(), 0, []
        for n in frames:
            pieces.append(vae.encode(video[:, :, start:start + n], cache))
            start += n
        report.exact("encode frame by frame, cache carried", torch.cat(pieces, 2), mean)


def _wan(case: Golden) -> wan.WanVAE:
    config = case.info.get("config_diffusers", {})
    fixed = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
    if any(config.get(k, v) != v for k, v in fixed.items()):
        raise GoldenError(f"not the layout of the Wan 2.1 VAE: {config}")
    vae = wan.WanVAE(int(config["base_dim"]), int(config["z_dim"]))
    vae.load_state_dict(case.tensors.prefixed("vae."))
    return vae.eval().requires_grad_(False)


def _partitions(case: Golden, vae: wan.WanVAE, raw: Tensor, full: Tensor, report: Report) -> None:
    pixels = case.info.get("decode_chunk_boundaries_pixel", [])
    for i, partition in enumerate(case.info.get("decode_chunk_boundaries_latent", [])):
        cache, pieces = wan.WanCache(), []
        for piece in raw.split(partition, 2):
            pieces.append(vae.decode(piece, cache))
        report.exact(f"decode as {'+'.join(map(str, partition))}, cache carried", torch.cat(pieces, 2), full)
        if i < len(pixels):
            report.that(f"pixel frames of {partition}", [p.shape[2] for p in pieces] == pixels[i])
    for n in range(1, raw.shape[2]):
        report.exact(f"first {n} latents decoded alone", vae.decode(raw[:, :, :n]), full[:, :, :1 + 4 * (n - 1)])


def check_gemma(case: Golden, weights: Weights, report: Report) -> None:
    """Hidden states with and without the soft-cap; the rows SANA keeps; the negative row."""
    t = case.tensors
    config = GemmaConfig.from_json(json.dumps(case.config))
    state = {f"model.{k.removeprefix('model.')}": v for k, v in t.prefixed("te.").items()}
    for match, expected in t.matching(r"out\.(neg_)?last_hidden_state\.(.+)"):
        ids, mask = t[f"in.{match[1] or ''}input_ids"], t[f"in.{match[1] or ''}attention_mask"]
        found, _ = _hidden(replace(config, softcap=_softcap(match[2])), state, ids, mask)
        report.rel(match[0], found, expected, CODER)
    ids, mask = t["in.input_ids"], t["in.attention_mask"]
    length, keep = int(case.info["max_length_all"]), int(case.info["model_max_length"])
    report.that("padded length", length == int(case.info["num_chi_tokens"]) + keep - 2 == ids.shape[1])
    rows = select_rows(length, keep)
    report.exact("in.select_index", rows, t["in.select_index"])
    report.exact("out.sana_mask", mask[:, rows], t["out.sana_mask"])
    for match, expected in t.matching(r"out\.(sana_embed|hidden_states_m2)\.(.+)"):
        last, before = _hidden(replace(config, softcap=_softcap(match[2])), state, ids, mask)
        report.rel(match[0], last[:, rows] if match[1] == "sana_embed" else before, expected, CODER)
    report.that("without soft-cap by default", config.softcap is None)


def _softcap(variant: str) -> float | None:
    if variant == "no_softcap":
        return None
    if match := re.fullmatch(r"softcap([\d.]+)", variant):
        return float(match[1])
    raise GoldenError(f"unknown variant {variant}")


def _hidden(config: GemmaConfig, state: dict[str, Tensor], ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(last hidden state, the one before the last layer)."""
    network = Gemma2(config)
    network.load_state_dict(state)
    network.eval().requires_grad_(False)
    before: list[Tensor] = []
    handle = network.model.layers[-1].register_forward_pre_hook(lambda module, args: before.append(args[0]))
    try:
        return network(ids, mask), before[0]
    finally:
        handle.remove()
