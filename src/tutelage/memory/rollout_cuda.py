"""Bytes that rollouts take on a CUDA device, by shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutelage.config.schema import Config
from tutelage.memory.meta_model import reading
from tutelage.rollout.cuda.blocks import num_splits, num_vocab_blocks
from tutelage.rollout.cuda.decode_step import is_covered, sizes_of
from tutelage.rollout.cuda.extend import EXTEND_CHUNK, EXTEND_TOKENS
from tutelage.rollout.cuda.generate import PREFILL_TOKENS
from tutelage.rollout.cuda.kv_slots import STEPS, bucket, make_cache
from tutelage.rollout.cuda.state import Sizes, make_rows, make_work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROCESSORS = 160
"""Multiprocessors of the largest device there is: more of them split a cache further."""


@dataclass(frozen=True)
class RolloutMemory:
    """Bytes of the rollouts of one model."""

    cache: int
    """Keys and values: of all slots, or of all tokens where the model's own step runs."""
    step: int
    """What the captured steps of every batch size write into, or the own step's logits."""
    prefill: int
    """The largest pass over prompts, with its own cache, or over ids that are inserted."""


def draw_memory(
    config: Config,
    twin: PreTrainedModel,
    prompt_tokens: int,
    num_rows: int,
    num_samples: int,
    num_before: int = 0,
) -> RolloutMemory:
    """What a model's draws of a run take.

    Completions of a prompt lie side by side, of which the first and last may be some.

    Args:
        config: the run.
        twin: the model, from `shadow`.
        prompt_tokens: length of the longest prompt.
        num_rows: completions that are open at the same time.
        num_samples: of each prompt.
        num_before: tokens of a completion that are there already.
    """
    most = config.max_completion_tokens
    lengths = (prompt_tokens + num_before, most - num_before)
    inserted = most - config.sampling.max_new_tokens
    prompts = min(num_rows, 1 + -(-(num_rows - 1) // num_samples))
    return rollout_memory(twin, num_rows, prompts, lengths, inserted)


def rollout_memory(
    twin: PreTrainedModel,
    num_rows: int,
    num_prompts: int,
    lengths: tuple[int, int],
    num_inserted: int = 0,
) -> RolloutMemory:
    """What sampling takes.

    Args:
        twin: the model, from `shadow`.
        num_rows: completions that are open at the same time.
        num_prompts: prompts that are prefilled for them.
        lengths: tokens of the longest prompt and completion, inserted ones included.
        num_inserted: most tokens that are inserted at once; 0 where completions have one turn.
    """
    prompt, length = lengths[0], sum(lengths)
    at_once = max(1, min(num_prompts, PREFILL_TOKENS // prompt))
    prefill = reading(twin, (at_once, prompt), is_cached=True)
    # during a prefill, the result of the one before is still there
    read = prefill.peak + (prefill.kept if num_prompts > at_once else 0)
    if not is_covered(twin):
        cache = reading(twin, (num_rows, length), is_cached=True).kept
        vocab_size = twin.get_output_embeddings().weight.shape[0]
        # the logits in the model's dtype, then probabilities and their sums in float64
        return RolloutMemory(cache, num_rows * vocab_size * (16 + twin.dtype.itemsize), read)
    sizes = replace(sizes_of(twin), device=torch.device("meta"))
    cache = make_cache(sizes, num_rows, length).nbytes
    if num_inserted:
        read = max(read, _extension(twin, sizes, num_rows, length, num_inserted))
    blocks = num_vocab_blocks(sizes.num_rows_of_head)
    step = _bytes(make_rows(sizes, bucket(num_rows), STEPS))
    for count in _buckets(num_rows):
        splits = num_splits(count, sizes.num_groups, length, _PROCESSORS)
        step += _bytes(make_work(sizes, count, blocks, splits))
    return RolloutMemory(cache, step, read)


def _extension(
    twin: PreTrainedModel, sizes: Sizes, num_rows: int, length: int, num_inserted: int
) -> int:
    """The largest pass over ids that are inserted, before or after the widest tensors of one."""
    rows = max(1, min(num_rows, EXTEND_TOKENS // length))
    width = min(EXTEND_CHUNK, num_inserted + 1)
    # of one layer: what the slots hold, and the same for every head, as a mask needs it
    heads = 2 * (sizes.num_groups + sizes.num_heads)
    held = rows * length * heads * sizes.head_dim * sizes.dtype.itemsize
    # whether a new token sees a column, and the same as a bias
    mask = rows * width * length * (1 + 2 * sizes.dtype.itemsize)
    return reading(twin, (rows, width)).peak + held + mask


def _buckets(num_rows: int) -> Iterable[int]:
    """Every number of rows that a step may be captured for."""
    return sorted({bucket(n) for n in range(1, num_rows + 1)})


def _bytes(part: Any) -> int:
    tensors: list[Tensor] = [part.__dict__[field.name] for field in fields(part)]
    return sum(tensor.nbytes for tensor in tensors)
