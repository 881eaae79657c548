"""The real ComfyUI 0.30.0 inside the test process (comfyui spec 1.5), and tiny model files for it.

``start(work)`` once, then ``run(prompt)`` executes an API prompt through ComfyUI's own validation and executor.
"""

from __future__ import annotations

import asyncio
import io as stdio
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

PACK = Path(os.environ.get("SANA_VIDEO_PACK", Path(__file__).parents[2]))
COMFYUI = Path(os.environ.get("COMFYUI_PATH", PACK / ".runtime" / "ComfyUI"))
EXTRA = ("nodes_custom_sampler", "nodes_model_advanced", "nodes_easycache", "nodes_torch_compile", "nodes_model_merging",
         "nodes_video", "nodes_slg", "nodes_cond")


class Server:
    """The few members of PromptServer that the executor touches; collects the events."""

    client_id, last_node_id, last_prompt_id, sockets_metadata = "t", None, None, {}

    def __init__(self):
        self.events = []

    def send_sync(self, event, data, sid=None):
        self.events.append((event, data))

    def queue_updated(self):
        pass


def start(work: Path) -> None:
    """Import ComfyUI on the CPU, point its folders at ``work`` and load the pack. Repeated calls only move the folders."""
    first = str(COMFYUI) not in sys.path
    if first:
        sys.path.insert(0, str(COMFYUI))
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
    import folder_paths

    import nodes

    for kind in ("diffusion_models", "text_encoders", "vae", "loras"):
        (work / kind).mkdir(parents=True, exist_ok=True)
        folder_paths.folder_names_and_paths[kind] = ([str(work / kind)], folder_paths.supported_pt_extensions)
    folder_paths.filename_list_cache.clear()
    folder_paths.set_output_directory(str(work / "output"))
    folder_paths.set_temp_directory(str(work / "temp"))
    if first:
        core = set(nodes.NODE_CLASS_MAPPINGS)
        for name in EXTRA:
            path = str(COMFYUI / "comfy_extras" / f"{name}.py")
            assert asyncio.run(nodes.load_custom_node(path, module_parent="comfy_extras")), name
        assert asyncio.run(nodes.load_custom_node(str(PACK), core, module_parent="custom_nodes"))


def pack_module(name: str):
    """A module of the loaded pack, e.g. ``nodes.loading``."""
    import importlib

    import nodes

    root = nodes.NODE_CLASS_MAPPINGS["SanaVideoLoader"].__module__.removesuffix(".nodes.loader")
    return importlib.import_module(f"{root}.{name}")


class Outcome:
    """What one prompt did: ``ok``, ``error`` (message of the failing node), ``outputs`` by node id and slot, ``events``."""

    def __init__(self, executor, server, error=""):
        self.ok = executor is not None and executor.success
        self.events = server.events
        self.error = error
        self._executor = executor
        for event, data in executor.status_messages if executor else ():
            if event == "execution_error":
                self.error = data["exception_message"]

    def output(self, node: str, slot: int = 0):
        """The value that the node put on that output."""
        cached = asyncio.run(self._executor.caches.outputs.get(node))
        return cached.outputs[slot][0]


_EXECUTORS: dict[int, object] = {}


def run(prompt: dict, fresh: bool = True) -> Outcome:
    """Validate and execute an API prompt. ``fresh=False`` keeps the outputs of the last run cached."""
    import execution

    server = Server()
    executor = None if fresh else _EXECUTORS.get(0)
    if executor is None:
        executor = execution.PromptExecutor(server, cache_type=execution.CacheType.CLASSIC,
                                            cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
        _EXECUTORS[0] = executor
    executor.server = server
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("id", prompt, None))
    if not valid:
        return Outcome(None, server, json.dumps([error, node_errors], default=str))
    executor.execute(prompt, "id", {"client_id": "t"}, outputs)
    return Outcome(executor, server)


def node(kind: str, **inputs) -> dict:
    """One entry of an API prompt; a link is written as ("id", slot)."""
    return {"class_type": kind, "inputs": {k: list(v) if isinstance(v, tuple) else v for k, v in inputs.items()}}


def tiny_spec(core, **changes):
    """The mini model's row, small enough to run in milliseconds. Its width is a public one, so files need not name heads."""
    from dataclasses import replace

    sizes = {"name": "tiny", "depth": 2, "ffn_hidden": 48, "caption_channels": 64} | changes
    return replace(core.specs.SPECS["sana-video-mini"], **sizes)


def tiny_vae(path: Path, dim: int = 8) -> Path:
    """A random Wan 2.1 VAE in ComfyUI's naming."""
    import comfy.ldm.wan.vae
    import comfy.ops

    torch.manual_seed(1)
    network = comfy.ldm.wan.vae.WanVAE(dim=dim, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                                       temperal_downsample=[False, True, True])
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05) if p.ndim > 3 else torch.nn.init.ones_(p)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    return path


def tiny_tokenizer() -> bytes:
    """A SentencePiece model trained on a few words, with Gemma's special ids (pad 0, eos 1, bos 2, unk 3)."""
    import sentencepiece

    text = ("a red ball bounces on green grass while the blue square turns slowly in the sun motion score user prompt "
            "given generate an enhanced detailed visual description 0 1 2 3 4 5 6 7 8 9 . , : \" -")
    words = text.split()
    lines = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    model = stdio.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=160, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        model_type="bpe", character_coverage=1.0, minloglevel=2, byte_fallback=False, hard_vocab_limit=False)
    return model.getvalue()


def tiny_gemma(path: Path, width: int = 64) -> Path:
    """A random Gemma-2 of 2 layers with its tokenizer and sizes inside, as the embedded model stores it."""
    import comfy.ops
    from comfy.text_encoders import llama

    config = {"vocab_size": 256, "hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}
    torch.manual_seed(2)
    network = llama.Gemma2_2B({k: v for k, v in config.items() if k != "head_dim"}, torch.float32, "cpu", comfy.ops.manual_cast)
    state = {k: torch.randn(v.shape) * (0.1 if v.ndim > 1 else 0.02) for k, v in network.state_dict().items()}
    state["spiece_model"] = torch.frombuffer(bytearray(tiny_tokenizer()), dtype=torch.uint8).clone()
    save_file(state, path, metadata={"config": json.dumps(config)})
    return path
