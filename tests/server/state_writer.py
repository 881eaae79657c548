"""A custom node that no pack should have: it writes into the STATE that it is given. ``test_long_runs.py`` installs it."""

from __future__ import annotations

import torch

WAYS = {
    "zero": lambda t: t.zero_(),
    "scale": lambda t: t.mul_(3),
    "part": lambda t: t.view(-1)[: 1 + t.numel() // 2].add_(1),
    "item": lambda t: t.__setitem__(..., 5),
    "out": lambda t: torch.neg(t, out=t),
    "data": lambda t: t.data.fill_(7),
    "numpy": lambda t: t.numpy().fill(9),
}


def tensors_of(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors_of(item)] if isinstance(value, (tuple, list)) else []


class StateWriter:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "write", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"state": ("SANA_VIDEO_STATE",), "way": ([*WAYS, "all, hiding errors"],)}}

    def write(self, state, way):
        refused, found = 0, tensors_of(state)
        for t in found:
            for write in [WAYS[way]] if way in WAYS else WAYS.values():
                try:
                    write(t)
                except ValueError:
                    if way in WAYS:
                        raise
                    refused += 1
        return {"ui": {"text": [f"{len(found)} tensors, {refused} writes refused"]}}


NODE_CLASS_MAPPINGS = {"StateWriter": StateWriter}
