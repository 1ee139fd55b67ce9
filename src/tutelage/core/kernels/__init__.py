"""Fused kernels for CUDA devices; where they are not, the torch code of `core` is what runs."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from tutelage.core.lazy import LazyLogits

CHUNK_BYTES = 5 << 29
"""Bytes of the logits of a chunk; its gradient takes their place. 2,048 rows of 151,936 ids."""

DTYPES = (torch.bfloat16, torch.float32)
"""Dtypes of hidden states that the kernels take."""


def suits(*sides: LazyLogits) -> bool:
    """Whether the kernels compute what these logits need: one device, and dtypes of `DTYPES`.

    Ids that count as one have a logit beyond what a soft cap leaves to any. Sides with different
    vocabularies are left to torch.
    """
    device = sides[0].hidden.device
    if sides[0].one_class and any(side.softcap is not None for side in sides):
        return False
    if sides[0].shared is not None:
        return False
    return all(
        side.hidden.dtype in DTYPES and side.hidden.device == side.weight.device == device
        for side in sides
    ) and is_supported(device)


@cache
def is_supported(device: torch.device) -> bool:
    """Whether kernels run on `device`: CUDA of compute capability 8.0 or more, and Triton."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
