"""Forward passes of any architecture: backbone, rounding, and one line for what it raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutelage.errors import ModelError, TutelageError
from tutelage.models.sharding import is_of_connection, is_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Ids = tuple[int, ...]
_LLAMA_LIKE = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""Pre-norm decoders with RMS norms, rotary positions and nothing between attention and MLP."""
_TABLE_ROPES = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings that depend on the position alone, not on the length of the sequence."""
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ROUNDING_LOW_BITS = 0.1


@contextmanager
def foreign(what: str, model: object) -> Iterator[None]:
    """Turn what a model's own code raises into one line; memory that runs out stays what it is.

    Args:
        what: what failed, such as "cannot be run".
        model: whose code runs inside.

    Raises:
        ModelError: it raised something.
    """
    try:
        yield
    except (TutelageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "not enough memory" in str(error):  # what torch's allocator of main memory raises
            raise
        if is_of_connection(error):  # a layer in shards asked another process for its part
            raise
        reason = " ".join(str(error).split())[:200].rstrip(".") or "no reason given"
        raise ModelError(
            f"{type(model).__name__} {what}: {reason} ({type(error).__name__}). "
            "Check the model's config.json and the length of its sequences."
        ) from error


def run(module: Any, **inputs: Any) -> Any:
    """The output of a module that belongs to transformers.

    Raises:
        ModelError: it cannot be computed.
    """
    with foreign("cannot be run", module):
        return module(**inputs)


def rounding(model: PreTrainedModel) -> float:
    """Largest relative difference between two ways to hidden states that rounding explains.

    In the Euclidean norm, by the dtype. Reading padding or a neighbour changes a tenth or more.
    """
    is_low = model.__dict__.get("hf_quantizer") is not None
    return _ROUNDING_LOW_BITS if is_low else _ROUNDING[model.dtype]


def backbone(model: PreTrainedModel) -> Any:
    """The part of a causal language model before its head.

    Raises:
        ModelError: there is none.
    """
    base: Any = model.base_model
    if base is not model:
        return base
    # Some classes of transformers name their backbone otherwise than they declare.
    inner = dict(model.named_children()).get("model")
    if inner is None:
        raise ModelError(
            f"{type(model).__name__} has no backbone apart from its head. "
            "Use a causal language model."
        )
    return inner


@torch.no_grad()
def read_alone(model: PreTrainedModel, ids: Ids) -> Tensor:
    """Hidden states of one sequence by a plain forward pass `[T, D]`."""
    row = torch.tensor([ids], device=model.device)
    states: Tensor = run(backbone(model), input_ids=row, use_cache=False).last_hidden_state[0]
    return states


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ of the row where that is largest; nan where one is no number."""
    wide, expected = ours.double(), theirs.double()
    gaps = (wide - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(gaps.max())


def trial_ids(model: PreTrainedModel, length: int, number: int = 0) -> Ids:
    """Different ids among the first of a vocabulary, where no placeholder of an image lies."""
    embeddings: Any = model.get_input_embeddings()
    size = min(embeddings.num_embeddings, 64)
    return tuple((5 + 11 * number + 7 * i) % size for i in range(length))


def is_llama_like(model: PreTrainedModel) -> bool:
    """Whether a model has the layers of the Llama family and no others, with windows or without."""
    base: Any = model.base_model
    if type(base).__name__ not in _LLAMA_LIKE:
        return False
    rope = base.config.to_dict().get("rope_parameters") or {}
    is_table = rope.get("rope_type") in _TABLE_ROPES
    is_table = is_table and rope.get("partial_rotary_factor", 1) == 1
    same_dtype = base.norm.weight.dtype == base.embed_tokens.weight.dtype
    # Hooks (sharding, offloading) belong to the modules' own calls, some of which a step skips.
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    hooked = hooked or any(is_shard(weight) for weight in base.parameters())
    # So does the choice of dtypes.
    kind = model.device.type
    is_cast = kind != "meta" and torch.is_autocast_enabled(kind)
    return is_table and same_dtype and not (hooked or is_cast)
