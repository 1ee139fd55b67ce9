"""Rollouts by captured decoding steps: slots are refilled while other rows go on."""

from __future__ import annotations

import importlib.util
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Rollout
from tutelage.models.forward import Ids
from tutelage.models.head import output_embeddings
from tutelage.models.limits import refuse_beyond_table
from tutelage.models.tokenizers import pad_id, refuse_ids_beyond, stop_ids, vocabulary_size
from tutelage.rollout.cuda.decode_step import is_covered
from tutelage.rollout.cuda.kv_slots import STEPS, Device, Slots, bucket, cuda_device
from tutelage.rollout.cuda.state import Rows
from tutelage.rollout.cuda.transfer import Fetched, send
from tutelage.rollout.request import Job, Open, in_reading_order, rollout_of
from tutelage.rollout.sample_token import check_finite, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFILL_TOKENS = 16384
"""Most tokens, padding included, that are read at once."""
KEPT_SHARE = 16
"""Caches that need more than this part of the device's memory are given back after a draw."""


_SLOTS: WeakKeyDictionary[Any, Slots] = WeakKeyDictionary()
"""The slots of each model that has drawn."""
_TOLD: WeakSet[Any] = WeakSet()


@dataclass
class _Row(Open):
    """A completion that occupies a row."""

    slot: int = 0
    """Where its keys and values are."""
    num_started: int = 0
    """Tokens whose steps have been started."""
    has_ended: bool = False


@dataclass(frozen=True)
class _Segment:
    """Steps that have been started, and the rows that they are of."""

    rows: list[_Row | None]
    count: int
    written: Fetched
    """Tokens and their log-probabilities `[2, B, count]`."""
    states: Tensor | None
    """The hidden states that they were drawn from `[B, count, D]`, if they are kept."""


class GraphWriter:
    """Completions of one draw; every step is one launch, and every few are looked at at once."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SamplingConfig,
        batch_size: int,
        record: bool,
        device: Device,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.batch_size = batch_size
        self.record = record
        self.device = device
        self.stops = stop_ids(model, tokenizer)
        embeddings: Any = model.get_input_embeddings()
        self.num_embeddings = embeddings.weight.shape[0]
        num_rows = output_embeddings(model).weight.shape[0]
        self.num_ids = min(vocabulary_size(tokenizer), self.num_embeddings, num_rows)
        self.pad = pad_id(tokenizer, self.num_ids)
        self.looks = 0
        """Transfers from the device so far."""

    def open_slots(self, jobs: Sequence[Job]) -> bool:
        """Prepare the slots for these completions; False if a step is not the model's own."""
        num_rows = min(self.batch_size, len(jobs))
        capacity = max(len(job.ids) for job in jobs) + self.config.max_new_tokens
        refuse_beyond_table(self.model, capacity)
        for job in jobs:
            refuse_ids_beyond(self.tokenizer, job.ids, self.num_embeddings, job.prompt.id)
        slots = _SLOTS.get(self.model)
        if slots is None or not slots.serves(self.model, num_rows, capacity):
            if slots is not None:
                num_rows = max(num_rows, slots.num_slots)
                capacity = max(capacity, slots.capacity)
            _SLOTS.pop(self.model, None)
            slots = None  # its memory is free before the next is taken
            slots = Slots(self.model, self.device, num_rows, capacity)
            if not slots.agrees(self.model, jobs[0].ids, self.pad):
                return False
            _SLOTS[self.model] = slots
        self.slots = slots
        return True

    def write(self, jobs: Sequence[Job]) -> Iterator[list[Open]]:
        """Completions as they are finished; `open_slots` comes first."""
        self.waiting = deque(in_reading_order(jobs))
        self.length = max(len(job.ids) for job in jobs) + self.config.max_new_tokens
        num_rows = min(self.batch_size, len(jobs))
        self.open: list[_Row | None] = [None] * bucket(num_rows)
        self.free_slots = list(range(num_rows))
        self._upload()
        ahead: _Segment | None = None
        while True:
            # The device has the next steps to do while the host looks at the last ones.
            self._change_members()
            segment = self._start_segment()
            if ahead is not None:
                yield self._finish_segment(ahead)
            elif segment is None:
                break
            ahead = segment
        self._give_back()

    def rollout(self, row: Open) -> Rollout:
        """A finished completion."""
        return rollout_of(self.tokenizer, row.job, row.tokens, row.logprobs, self.stops)

    def _rows(self) -> Rows:
        return self.slots.rows.first(len(self.open))

    def _upload(self) -> None:
        """Tell the device which rows are open, and where."""
        rows = self._rows()
        done = [int(row is None) for row in self.open]
        state = send([done, [row.slot if row else 0 for row in self.open]], rows.slot)
        rows.done.copy_(state[0])
        rows.slot.copy_(state[1])

    def _change_members(self) -> None:
        """Let waiting completions in; when none waits, go on with fewer rows."""
        free = [i for i, row in enumerate(self.open) if row is None]
        num_rows = len(self.open)
        num_open = num_rows - len(free)
        if self.waiting:
            num_free = len(self.free_slots)
            if num_free >= max(1, (num_open + num_free) // 8):
                self._start(free[: min(num_free, len(self.waiting))])
        elif num_open and bucket(num_open) <= num_rows // 2:
            self._keep(free, bucket(num_open))

    def _keep(self, free: list[int], count: int) -> None:
        """Go on with so many rows; the others are free."""
        places = [i for i, row in enumerate(self.open) if row is not None]
        places = (places + free)[:count]
        rows = self._rows()
        index = send(places, rows.token)
        for state in (rows.token, rows.position, rows.hidden):
            state[:count] = state[index]
        self.open = [self.open[i] for i in places]
        self._upload()

    def _start(self, places: list[int]) -> None:
        """Read the next prompts into these rows."""
        jobs = [self.waiting.popleft() for _ in places]
        by_prompt: dict[Ids, list[int]] = {}
        for place, job in zip(places, jobs, strict=True):
            self.open[place] = _Row(job, slot=self.free_slots.pop(0))
            by_prompt.setdefault(job.ids, []).append(place)
        rows = self._rows()
        for prompts in _portions(list(by_prompt)):
            states, read = self.slots.read(self.model, prompts, self.pad)
            pairs = [(i, place) for i, ids in enumerate(prompts) for place in by_prompt[ids]]
            sources, here = [i for i, _ in pairs], [place for _, place in pairs]
            opened = [self.open[place] for place in here]
            self.slots.place(read, sources, [row.slot for row in opened if row is not None])
            lengths = [len(prompts[i]) for i in sources]
            source, to, length = send([sources, here, lengths], rows.token)
            rows.hidden[to] = states[source, length - 1]
            rows.position[to] = length.int()
        self._upload()

    def _start_segment(self) -> _Segment | None:
        """Start a few steps; None if every open row has all its steps already."""
        rows, limit = self._rows(), self.config.max_new_tokens
        left = [limit - row.num_started for row in self.open if row is not None]
        count = min(STEPS, max(left, default=0))
        if count == 0:
            return None
        keys = [row.job.key if row else 0 for row in self.open]
        drawn = [row.num_started if row else 0 for row in self.open]
        stops = tuple(sorted(self.stops))
        splits = self.slots.num_splits(len(self.open), self.length)
        graph = self.slots.graph(len(self.open), splits, self.config, self.num_ids, stops)
        rows.uniform[:, :count] = send(uniforms(keys, count, drawn), rows.uniform)
        rows.column.zero_()
        for _ in range(count):
            graph.replay()
        for row in self.open:
            if row is not None:
                row.num_started += count
        states = rows.states[:, :count].clone() if self.record else None
        both = (rows.tokens[:, :count].double(), rows.logprobs[:, :count].double())
        return _Segment(list(self.open), count, Fetched(torch.stack(both)), states)

    def _finish_segment(self, segment: _Segment) -> list[Open]:
        """Hand each row what it drew; rows that have ended leave their places."""
        tokens, logprobs = segment.written.tolist()
        self.looks += 1
        finished: list[Open] = []
        for i, row in enumerate(segment.rows):
            if row is None or row.has_ended:
                continue
            most = min(segment.count, self.config.max_new_tokens - len(row.tokens))
            new = [int(token) for token in tokens[i][:most]]
            end = next((n for n, token in enumerate(new, 1) if token in self.stops), most)
            check_finite(logprobs[i][:end], len(row.tokens))
            row.tokens += new[:end]
            row.logprobs += logprobs[i][:end]
            if segment.states is not None:
                row.hidden.append(segment.states[i, :end])
            row.has_ended = new[end - 1] in self.stops or (
                len(row.tokens) == self.config.max_new_tokens
            )
            if row.has_ended:
                finished.append(row)
                self.free_slots.append(row.slot)
        if finished:
            self.open = [None if row is None or row.has_ended else row for row in self.open]
            self._upload()
        return finished

    def _give_back(self) -> None:
        """Large caches are memory that learning needs."""
        cache = self.slots.cache
        if cache.is_cuda:
            total = torch.cuda.get_device_properties(cache.device).total_memory
            if cache.nbytes > total // KEPT_SHARE:
                _SLOTS.pop(self.model, None)


def _portions(prompts: Sequence[Ids]) -> Iterator[list[Ids]]:
    """Prompts in portions that are read at once."""
    portion: list[Ids] = []
    width = 0
    for ids in prompts:
        width = max(width, len(ids))
        if portion and (len(portion) + 1) * width > PREFILL_TOKENS:
            yield portion
            portion, width = [], len(ids)
        portion.append(ids)
    if portion:
        yield portion


def forget(model: PreTrainedModel) -> None:
    """Give up a model's slots: its caches, and the memory of weights that are about to move."""
    _SLOTS.pop(model, None)


def graph_writer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig,
    batch_size: int,
    record: bool,
) -> GraphWriter | None:
    """A writer for models on a CUDA device whose step is written here; else None."""
    is_cuda = model.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if not is_cuda or not is_covered(model):
        return None
    device = cuda_device(model.device)
    return GraphWriter(model, tokenizer, config, batch_size, record, device)


def tell_own_step(model: PreTrainedModel) -> None:
    """Say once that a model on a GPU is slower than it could be."""
    if model not in _TOLD:
        _TOLD.add(model)
        warnings.warn(
            f"{type(model).__name__} has no captured decoding step here, so rollouts run its own "
            "forward pass for every token, which is several times slower.",
            stacklevel=2,
        )
