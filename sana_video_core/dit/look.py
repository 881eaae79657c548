"""What one look at a device tells about a call: a choice that Python makes by values has to wait for them, so all are fetched at
one time. Not covered: compiled graphs and training, where nobody waits and nothing is known."""

from __future__ import annotations

import torch
from torch import Tensor


def look(mask: Tensor | None, *parts: Tensor) -> tuple[tuple[int, ...] | None, bool]:
    """(how many valid text tokens each row has, where they come first in every row, else None; whether all rows of the batch are
    the same in each of ``parts``, as those of classifier-free guidance are).

    ``mask [B, L]`` bool. Where it is None, or on the CPU beside parts on a device, the parts are not waited for: False.
    """
    if mask is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None, False
    counts = mask.sum(-1)
    first = torch.arange(mask.shape[1], device=mask.device) < counts[:, None]
    answers = [counts, ((first == mask).all() & (counts > 0).all())[None]]
    if parts and len(mask) > 1 and all(part.device == mask.device for part in parts):
        answers.append(torch.stack([(part[1:] == part[:1]).all() for part in parts]).all()[None])
    found = torch.cat([answer.long() for answer in answers]).tolist()
    leading, *same = found[len(mask):]
    return tuple(found[:len(mask)]) if leading else None, same == [1]
