"""Weights into networks: a new one, or one that exists. Either everything arrives or nothing does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..dit import SanaVideoTransformer
from ..errors import CheckpointError
from ..specs import ModelSpec
from .convert import convert_items, shapes_of
from .detect import HINTS, as_mode, detect_spec
from .families import refuse_foreign
from .source import Source, read_state_dict


def load_transformer(
    source, spec: ModelSpec | None = None, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", *,
    operations=nn, parity: bool = False, hint: str | None = None, verify: bool | None = None, **options,
) -> SanaVideoTransformer:
    """The network with the weights of ``source`` (see :func:`read_state_dict`), in evaluation mode.

    spec:    detected when None (see :func:`detect_spec`); ``hint`` 'clip' or 'long' decides the mode.
    dtype:   of every parameter. With the file's own dtype on the CPU the parameters are views of the mapped file: loading takes
             no memory until they are read, and writing to them does not change the file.
    options: ``cross_eps``, ``attention_eps``, ``truncate_times`` of the network. ``operations`` holds its layer classes.

    The network is built without memory first and gets its weights in one go, so a failure leaves nothing half loaded.
    """
    state, origin = read_state_dict(source, verify=verify)
    spec = _spec(state, origin, spec, hint)
    model = SanaVideoTransformer(spec, operations=operations, dtype=dtype, device="meta", parity=parity, **options)
    own_memory = origin.path is None  # a caller's dictionary must not change when the network is trained
    weights = {}
    for key, tensor in convert_items(state, spec, name=origin.name):
        moved = tensor.to(device=device, dtype=dtype)
        shared = own_memory and not moved.is_meta and moved.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        weights[key] = moved.clone() if shared else moved
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def load_weights(model: SanaVideoTransformer, source, *, verify: bool | None = None) -> Source:
    """Replace the weights of an existing network in place (device and dtype stay). Checked completely before the first write."""
    state, origin = read_state_dict(source, verify=verify)
    refuse_foreign(shapes_of(state), origin.name)
    weights = dict(convert_items(state, model.spec, name=origin.name))
    parameters = dict(model.named_parameters())
    if set(weights) != set(parameters):
        raise CheckpointError("The network does not have the layers of its spec",
                              found=", ".join(sorted(set(weights) ^ set(parameters))[:3]), expected=model.spec.name)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
    return origin


def _spec(state: dict[str, Tensor], origin: Source, spec: ModelSpec | None, hint: str | None) -> ModelSpec:
    shapes = shapes_of(state)
    if spec is None:
        return detect_spec(shapes, metadata=origin.metadata, container=origin.container, path=origin.path, hint=hint)
    refuse_foreign(shapes, origin.name)
    return spec if hint is None else as_mode(spec, HINTS[hint])
