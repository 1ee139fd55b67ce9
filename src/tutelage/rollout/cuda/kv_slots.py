"""Static caches of keys and values, and the graphs of the steps that run over them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutelage.config.sampling import SamplingConfig
from tutelage.models.forward import Ids
from tutelage.rollout.cuda.blocks import num_splits, num_vocab_blocks
from tutelage.rollout.cuda.cuda_graph import Capture, CudaGraph, Graph
from tutelage.rollout.cuda.decode_step import DecodeStep, sizes_of
from tutelage.rollout.cuda.extend import Following, passes, read_behind
from tutelage.rollout.cuda.operators import Operators, TokenSampling
from tutelage.rollout.cuda.state import Sizes, Work, make_rows, make_work
from tutelage.rollout.cuda.transfer import send

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 4
"""Steps of a segment, after which finished completions are taken out."""
_TRIAL = 8
"""Tokens that a step is tried on; beyond a window, as many more."""
_COLUMNS = 256
"""The room of a row grows by so many columns, so that batches of similar length share graphs."""


@dataclass(frozen=True)
class Device:
    """What a decoding step runs with."""

    operators: Operators
    capture: Capture
    processors: int
    """Multiprocessors of the device."""


def cuda_device(device: torch.device) -> Device:
    """Triton kernels in CUDA graphs."""
    from tutelage.rollout.cuda.triton_operators import TritonOperators

    pool = torch.cuda.graph_pool_handle()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Device(TritonOperators(), lambda run: CudaGraph(run, pool), processors)


class KVSlots:
    """Static caches of one model, and the graphs that were captured over them."""

    def __init__(
        self, model: PreTrainedModel, device: Device, num_rows: int, capacity: int
    ) -> None:
        self.device = device
        self.step = DecodeStep(model, device.operators)
        self.sizes = sizes = sizes_of(model)
        self.rows = make_rows(sizes, bucket(num_rows), STEPS)
        self.cache = make_cache(sizes, num_rows, capacity)
        self.num_slots, self.capacity = self.cache.shape[2], self.cache.shape[4]
        self.turn = _angles(model, self.capacity, sizes)
        self._graphs: dict[tuple[int, int, SamplingConfig, int, tuple[int, ...]], Graph] = {}
        self._extends: bool | None = None

    def fits(self, model: PreTrainedModel, num_rows: int, capacity: int) -> bool:
        """Whether a batch of so many rows and columns can use these slots."""
        is_large = num_rows <= self.num_slots and capacity <= self.capacity
        return is_large and self.step.is_current(model)

    def num_splits(self, count: int, length: int) -> int:
        """Splits of attention; they depend on the batch alone, as results do in their last bits."""
        return num_splits(count, self.sizes.num_groups, length, self.device.processors)

    def graph(
        self, count: int, splits: int, config: SamplingConfig, num_ids: int, stops: tuple[int, ...]
    ) -> Graph:
        """The graph of a step of the first `count` rows."""
        key = (count, splits, config, num_ids, stops)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        return self._graphs[key]

    def _capture(
        self, count: int, splits: int, config: SamplingConfig, num_ids: int, stops: tuple[int, ...]
    ) -> Graph:
        rows, work = self.rows.first(count), self.work(count, splits, num_ids)
        sampling = make_token_sampling(config, num_ids, stops, self.sizes.device)
        changed = (rows.token, rows.position, rows.done, rows.column, rows.hidden)
        kept = [tensor.clone() for tensor in changed]
        rows.done.fill_(1)  # so that a first run writes nothing into the caches
        rows.column.zero_()
        # Not `self`, which holds the graphs: in a cycle its memory would outlive it.
        step, cache, turn = self.step, self.cache, self.turn
        graph = self.device.capture(lambda: step(rows, work, cache, turn, sampling))
        for tensor, value in zip(changed, kept, strict=True):
            tensor.copy_(value)
        return graph

    def work(self, count: int, splits: int, num_ids: int) -> Work:
        """Memory for a step of so many rows."""
        return make_work(self.sizes, count, num_vocab_blocks(num_ids), splits)

    def prefill(
        self, model: PreTrainedModel, prompts: Sequence[Ids], pad: int
    ) -> tuple[Tensor, Any]:
        """Hidden states `[P, width, D]` and the cache of prompts, by the model's own forward."""
        from transformers import DynamicCache

        width = max(len(ids) for ids in prompts)
        # Padded on the right nothing needs a mask: a token never sees what comes after it.
        padded = [list(ids) + [pad] * (width - len(ids)) for ids in prompts]
        ids = send(padded, self.rows.token)
        base: Any = model.base_model
        # A cache without a configuration keeps every column, beyond a window too.
        with _attention(self.sizes.device):
            output = base(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
        return output.last_hidden_state, output.past_key_values

    def copy_prompts(self, read: Any, sources: list[int], slots: list[int]) -> None:
        """Copy prompts that have been read into slots."""
        source, slot = send([sources, slots], self.rows.token)
        for i, layer in enumerate(read.layers):
            width = layer.keys.shape[2]
            for kind, values in enumerate((layer.keys, layer.values)):
                self.cache[i, kind][slot, :, :width] = values[source]

    def extend(self, model: PreTrainedModel, following: Sequence[Following], pad: int) -> Tensor:
        """Read ids behind what R slots hold, by the model's own forward; no id is read twice.

        Returns:
            The hidden states after each slot's last id `[R, D]`.
        """
        states = self.rows.hidden.new_empty(len(following), self.sizes.width)
        with _attention(self.sizes.device):
            for batch in passes(following):
                index = send([i for i, _ in batch], self.rows.token)
                states[index] = read_behind(model, self.cache, [part for _, part in batch], pad)
        return states

    def matches_model(self, model: PreTrainedModel, prompt: Ids, pad: int) -> bool:
        """Whether a step gives the model's own hidden states, in two rows at once."""
        ids, lengths, expected = self._trial(model, prompt, pad)
        rows = self.rows.first(2)
        rows.slot.copy_(torch.arange(2))
        rows.token.copy_(torch.tensor([ids[n] for n in lengths]))
        rows.position.copy_(torch.tensor(lengths))
        rows.done.zero_()
        rows.column.zero_()
        self.step.feed(rows, self.work(2, 2, 1), self.cache, self.turn)
        rows.done.fill_(1)
        return self._is_close(rows.hidden, expected)

    def extends_exactly(self, model: PreTrainedModel, prompt: Ids, pad: int) -> bool:
        """Whether `extend` gives the model's own hidden states, in two rows at once."""
        if self._extends is None:
            ids, lengths, expected = self._trial(model, prompt, pad)
            rows = [Following(i, n // 2, ids[n // 2 : n + 1]) for i, n in enumerate(lengths)]
            self._extends = self._is_close(self.extend(model, rows, pad), expected)
        return self._extends

    def _trial(
        self, model: PreTrainedModel, prompt: Ids, pad: int
    ) -> tuple[Ids, list[int], Tensor]:
        """Ids that the first two slots hold now, two places among them, and the states there."""
        num_ids = len(self.step.table)
        length = _TRIAL + (self.step.window if self.step.window + _TRIAL <= self.capacity else 0)
        # Different tokens: among equal ones, wrong positions and scales cancel out.
        others = range(min(_TRIAL, num_ids))
        ids = (tuple(dict.fromkeys((*prompt[:_TRIAL], *others))) * length)[:length]
        own, read = self.prefill(model, [ids], pad)
        self.copy_prompts(read, [0, 0], [0, 1])
        lengths = [length - 1, length // 2]
        return ids, lengths, own[0, lengths]

    def _is_close(self, hidden: Tensor, expected: Tensor) -> bool:
        """Whether rounding explains how hidden states differ."""
        error = (hidden.double() - expected.double()).norm() / expected.double().norm()
        eps = max(torch.finfo(dtype).eps for dtype in (self.sizes.dtype, torch.float32))
        return bool(error <= eps**0.5)


def make_cache(sizes: Sizes, num_rows: int, capacity: int) -> Tensor:
    """Keys and values `[layers, 2, slots, groups, capacity, head_dim]` for so many columns."""
    room = -(-capacity // _COLUMNS) * _COLUMNS
    return torch.empty(
        *(sizes.num_layers, 2, max(2, num_rows), sizes.num_groups, room, sizes.head_dim),
        dtype=sizes.dtype,
        device=sizes.device,
    )


def bucket(num_rows: int) -> int:
    """The number of rows, at least these, that a graph is captured for."""
    power = 1 << max(num_rows - 1, 1).bit_length()
    between = 3 * power // 4
    return between if power >= 32 and num_rows <= between else power


def make_token_sampling(
    config: SamplingConfig, num_ids: int, stops: Sequence[int], device: torch.device
) -> TokenSampling:
    """How tokens are sampled, with its tensors on the device."""
    room = 1 << max(len(stops) - 1, 0).bit_length()
    padded = [*stops, *[-1] * (room - len(stops))]
    return TokenSampling(
        config,
        num_ids,
        torch.tensor(padded, device=device),
        torch.tensor([config.top_p], dtype=torch.float64, device=device),
    )


def _angles(model: PreTrainedModel, count: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the model's own rotary embedding, as exact as it gives them."""
    base: Any = model.base_model
    wide = torch.promote_types(sizes.dtype, torch.float32)
    like = torch.empty(0, dtype=sizes.dtype, device=sizes.device)
    tables = base.rotary_emb(like, torch.arange(count, device=sizes.device)[None])
    half = sizes.head_dim // 2
    cos, sin = (table[0, :, :half].to(wide).contiguous() for table in tables)
    return cos, sin


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """Fused attention without cuDNN's, which plans anew for every width."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kinds)
