"""What loading and running the pack does to a ComfyUI process: nothing. Each test looks in a Python of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LOAD = """
import asyncio, importlib.util, json, os, sys, threading, time
sys.path.insert(0, os.environ["COMFYUI_PATH"])

def load_pack():
    folder = os.environ["SANA_VIDEO_PACK"]
    name = folder.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
"""


@pytest.fixture
def inside(root, comfyui_path):
    """Run lines in a new Python beside ComfyUI; gives the JSON that they print last."""
    def run(code: str, timeout: float = 200, **extra: str):
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
        environment |= {"COMFYUI_PATH": str(comfyui_path), "SANA_VIDEO_PACK": str(root), "CUDA_VISIBLE_DEVICES": ""} | extra
        result = subprocess.run([sys.executable, "-c", LOAD + code], capture_output=True, text=True, env=environment,
                                cwd=comfyui_path, timeout=timeout)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run


def test_the_pack_loads_without_a_gpu_and_without_the_cpu_flag(inside):
    seen = inside("nodes = load_pack()\n"
                  "schemas = [n.GET_SCHEMA().node_id for n in nodes]\n"
                  "print(json.dumps({'ids': schemas, 'heavy': 'comfy.model_management' in sys.modules}))")
    assert len(seen["ids"]) >= 8 and not seen["heavy"]


def test_loading_takes_less_than_a_second_after_comfyui(inside):
    seen = inside("import comfy.cli_args; comfy.cli_args.args.cpu = True\n"
                  "import nodes, comfy.sd, comfy_api.latest\n"
                  "start = time.process_time(); load_pack(); print(json.dumps(time.process_time() - start))")
    assert seen < 1.0


def test_loading_leaves_the_process_as_it_was(inside, tmp_path):
    seen = inside("""
import comfy.cli_args; comfy.cli_args.args.cpu = True
import logging, random, signal, warnings, torch
import nodes, comfy_api.latest, folder_paths

def state():
    return {
        "path": list(sys.path), "environment": dict(os.environ), "threads": threading.active_count(), "folder": os.getcwd(),
        "filters": len(warnings.filters), "handlers": [str(h) for h in logging.getLogger().handlers],
        "level": logging.getLogger().level, "signal": str(signal.getsignal(signal.SIGINT)), "random": hash(random.getstate()),
        "torch random": torch.get_rng_state().sum().item(), "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(), "torch threads": torch.get_num_threads(), "meta path": [str(f) for f in sys.meta_path],
        "precision": torch.get_float32_matmul_precision(), "files": sorted(os.listdir(".")),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "hook": str(sys.excepthook),
        "folders": {k: list(v[0]) for k, v in folder_paths.folder_names_and_paths.items()},
        "names": sorted(nodes.NODE_CLASS_MAPPINGS),
    }

before = state(); load_pack(); after = state()
print(json.dumps([k for k in before if before[k] != after[k]]))
""")
    assert seen == []


def test_no_global_of_comfyui_changes_by_loading_and_running(inside, tmp_path):
    """Functions, classes, their members, and the lists that packs like to patch: the same objects before and after."""
    code = f"sys.path[:0] = [{str(HERE.parent / 'comfy')!r}, {str(HERE)!r}]\n" + GLOBALS
    seen = inside(code, SANA_VIDEO_WORK=str(tmp_path), SANA_VIDEO_ROOT=str(HERE.parents[1]))
    assert seen["ran"] and seen["watched"] > 3000
    assert seen["changed"] == []
    assert seen["new nodes"] and all(name.startswith("SanaVideo") for name in seen["new nodes"])


GLOBALS = """
from pathlib import Path
import comfy.cli_args; comfy.cli_args.args.cpu = True
import inprocess as ip, nodes, execution, latent_preview, folder_paths
import comfy.sd, comfy.samplers, comfy.sample, comfy.ops, comfy.model_detection, comfy.supported_models, comfy.model_base
import comfy.ldm.wan.vae, comfy.text_encoders.pixeldit, comfy.text_encoders.llama, comfy.k_diffusion.sampling, comfy.lora
import comfy.latent_formats, comfy.model_patcher, comfy.quant_ops, comfy.utils, comfy.conds, comfy.weight_adapter

LISTS = (
    lambda: [id(m) for m in comfy.supported_models.models], lambda: list(comfy.samplers.KSampler.SAMPLERS),
    lambda: list(comfy.samplers.KSampler.SCHEDULERS), lambda: list(comfy.samplers.SAMPLER_NAMES),
    lambda: sorted(comfy.samplers.SCHEDULER_HANDLERS), lambda: sorted(folder_paths.folder_names_and_paths),
    lambda: [str(c) for c in comfy.sd.CLIPType], lambda: sorted(comfy.quant_ops.QUANT_ALGOS),
    lambda: sorted(map(str, folder_paths.supported_pt_extensions)))
WATCHED = ("comfy", "comfy_api", "comfy_execution", "nodes", "execution", "latent_preview", "folder_paths")
BOOKKEEPING = {"__doc__", "__annotations__", "__abstractmethods__", "_abc_impl", "__weakref__", "__dict__"}

def members():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in WATCHED:
            continue
        for key, value in list(vars(module).items()):
            if callable(value):
                found[name + "." + key] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                found.update({name + "." + key + "." + k: id(v) for k, v in list(vars(value).items())
                              if k not in BOOKKEEPING and (callable(v) or isinstance(v, (property, classmethod, staticmethod)))})
    return found

before, lists, known = members(), [call() for call in LISTS], set(nodes.NODE_CLASS_MAPPINGS)
keep = [list(vars(m).values()) for m in list(sys.modules.values())]  # so that no id is used twice
work = Path(os.environ["SANA_VIDEO_WORK"])
sys.path.insert(0, os.environ["COMFYUI_PATH"]); ip.COMFYUI = Path(os.environ["COMFYUI_PATH"])
ip.start(work)
assert asyncio.run(nodes.load_custom_node(os.environ["SANA_VIDEO_PACK"], known, module_parent="custom_nodes"))
sys.modules["sana_video_core"] = ip.pack_module("sana_video_core")
for name in [n for n in sys.modules if ".sana_video_core." in n]:
    sys.modules["sana_video_core." + name.split(".sana_video_core.")[1]] = sys.modules[name]
import tinyfiles
tinyfiles.write_models(work)
folder_paths.filename_list_cache.clear()
outcome = ip.run(tinyfiles.prompt())
assert outcome.ok, outcome.error
after = members()
print(json.dumps({
    "ran": outcome.ok, "watched": len(before),
    "changed": [k for k, v in before.items() if after.get(k) != v] + [str(i) for i, c in enumerate(LISTS) if c() != lists[i]],
    "new nodes": sorted(n for n in set(nodes.NODE_CLASS_MAPPINGS) - known if nodes.NODE_CLASS_MAPPINGS[n].__module__.startswith(
        os.environ["SANA_VIDEO_PACK"].replace(".", "_x_")))}))
"""
