"""Random weights of any size, in the three public layouts, for benchmarks and tests without downloads.

The map to diffusers' names is written down here a second time, on purpose: a loader that agrees with it is tested by it.
Source: model spec 2.1-2.3. Not covered: loading.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

BLOCK_NAMES = {
    "scale_shift_table": "scale_shift_table", "attn.q_norm.weight": "attn1.norm_q.weight",
    "attn.k_norm.weight": "attn1.norm_k.weight", "attn.proj.weight": "attn1.to_out.0.weight",
    "attn.proj.bias": "attn1.to_out.0.bias", "cross_attn.q_linear.weight": "attn2.to_q.weight",
    "cross_attn.q_linear.bias": "attn2.to_q.bias", "cross_attn.q_norm.weight": "attn2.norm_q.weight",
    "cross_attn.k_norm.weight": "attn2.norm_k.weight", "cross_attn.proj.weight": "attn2.to_out.0.weight",
    "cross_attn.proj.bias": "attn2.to_out.0.bias", "mlp.inverted_conv.conv.weight": "ff.conv_inverted.weight",
    "mlp.inverted_conv.conv.bias": "ff.conv_inverted.bias", "mlp.depth_conv.conv.weight": "ff.conv_depth.weight",
    "mlp.depth_conv.conv.bias": "ff.conv_depth.bias", "mlp.point_conv.conv.weight": "ff.conv_point.weight",
    "mlp.t_conv.weight": "ff.conv_temp.weight",
}
OUTER_NAMES = {
    "x_embedder.proj": "patch_embedding", "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2", "t_block.1": "time_embed.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1", "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
SINGLE_NAMES = {"attention_y_norm.weight": "caption_norm.weight", "final_layer.scale_shift_table": "scale_shift_table"}


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values that keep activations finite and of order one: N(0, 1 / fan in), norms near one, small gates.

    The caption norm is 0.01 as in training, so that the cross attention is neither flat nor saturated.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, device=device)
            if name == "attention_y_norm.weight":
                value = 0.01 * (1 + 0.1 * noise)
            elif name.endswith("norm.weight"):
                value = 1 + 0.1 * noise
            elif name.endswith("scale_shift_table"):
                value = 0.3 * noise
            elif name.endswith("bias"):
                value = 0.02 * noise
            else:
                value = noise * p[0].numel() ** -0.5
            p.copy_(value)
    return model


def official(state: dict[str, Tensor], spec) -> dict[str, Tensor]:
    """Native tensors in the shapes of the official files (model spec 2.1), without the two buffers."""
    patch, out = spec.patch, {}
    for name, t in state.items():
        if name == "x_embedder.proj.weight":
            t = t.reshape(spec.width, spec.channels, *patch)
        elif name.endswith(("inverted_conv.conv.weight", "point_conv.conv.weight")):
            t = t[:, :, None, None]
        elif name.endswith("t_conv.weight"):  # Linear over (tap, channel) -> convolution (channel, tap)
            t = t.view(spec.width, 3, spec.width).transpose(1, 2)[..., None]
        out[name] = t.contiguous()
    return out


def diffusers(state: dict[str, Tensor], spec) -> dict[str, Tensor]:
    """Official tensors under diffusers' names, q, k and v apart (model spec 2.2)."""
    out = {}
    for name, t in state.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            prefix = f"transformer_blocks.{index}."
            if rest == "attn.qkv.weight":
                out |= {f"{prefix}attn1.to_{letter}.weight": part for letter, part in zip("qkv", t.chunk(3))}
            elif rest.startswith("cross_attn.kv_linear."):
                kind = rest.rsplit(".", 1)[1]
                out |= {f"{prefix}attn2.to_{letter}.{kind}": part for letter, part in zip("kv", t.chunk(2))}
            else:
                out[prefix + BLOCK_NAMES[rest]] = t
        elif name in SINGLE_NAMES:
            out[SINGLE_NAMES[name]] = t
        else:
            base, kind = name.rsplit(".", 1)
            out[f"{OUTER_NAMES[base]}.{kind}"] = t
    return {name: t.contiguous() for name, t in out.items()}


def diffusers_config(spec) -> dict:
    """config.json of diffusers' SanaVideoTransformer3DModel."""
    return {
        "_class_name": "SanaVideoTransformer3DModel", "in_channels": spec.channels, "out_channels": spec.channels,
        "num_attention_heads": spec.linear_heads, "attention_head_dim": spec.linear_head_dim, "num_layers": spec.depth,
        "num_cross_attention_heads": spec.cross_heads, "cross_attention_head_dim": spec.width // spec.cross_heads,
        "cross_attention_dim": spec.width, "caption_channels": spec.caption_channels,
        "mlp_ratio": spec.ffn_hidden / spec.width, "attention_bias": False, "patch_size": list(spec.patch),
        "qk_norm": "rms_norm_across_heads", "sample_size": 30, "norm_eps": 1e-6,
    }


def write_pth(path: Path, state: dict[str, Tensor], spec) -> None:
    """The official container: fp32 tensors under 'state_dict', with the two buffers that inference does not read."""
    tensors = {"pos_embed": torch.zeros(1, 1800 if spec.patch[1] == 2 else 484, spec.width)}
    tensors |= {name: t.float() for name, t in official(state, spec).items()}
    tensors["y_embedder.y_embedding"] = torch.zeros(spec.caption_tokens, spec.caption_channels, dtype=torch.bfloat16)
    torch.save({"state_dict": tensors}, path)


def write_safetensors(path: Path, state: dict[str, Tensor], spec) -> None:
    """Official names and shapes, in the dtype of ``state``."""
    save_file(official(state, spec), path)


def write_diffusers(folder: Path, state: dict[str, Tensor], spec, shards: int = 3) -> None:
    """A transformer folder as diffusers saves it: config, index and shards."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list(diffusers(official(state, spec), spec).items())
    (folder / "config.json").write_text(json.dumps(diffusers_config(spec)), encoding="utf-8")
    size = -(-len(tensors) // shards)
    index: dict[str, str] = {}
    for i in range(shards):
        name = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(tensors[i * size:(i + 1) * size])
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    total = sum(t.numel() * t.element_size() for _, t in tensors)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}), encoding="utf-8")


def diffusers_model(state: dict[str, Tensor], spec, dtype: torch.dtype, device: str):
    """The peer: diffusers' network with the same weights, loaded strictly."""
    from diffusers import SanaVideoTransformer3DModel

    config = {k: v for k, v in diffusers_config(spec).items() if k != "_class_name"} | {"patch_size": spec.patch}
    with torch.device("meta"):
        model = SanaVideoTransformer3DModel(**config)
    rope = type(model.rope)(spec.linear_head_dim, spec.patch, 1024)  # its tables are not in the state
    weights = {k: t.to(device, dtype) for k, t in diffusers(official(state, spec), spec).items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.rope = rope.to(device)
    return model.eval().requires_grad_(False)
