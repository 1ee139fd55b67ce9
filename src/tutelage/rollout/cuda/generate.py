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
from tutelage.rollout.conversation import Conversations
from tutelage.rollout.cuda.decode_step import is_covered
from tutelage.rollout.cuda.extend import Following
from tutelage.rollout.cuda.kv_slots import STEPS, Device, KVSlots, bucket, cuda_device
from tutelage.rollout.cuda.state import Rows
from tutelage.rollout.cuda.transfer import Fetched, send
from tutelage.rollout.request import CompletionRequest, OpenRollout, in_prefill_order, to_rollout
from tutelage.rollout.sample_token import check_finite, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFILL_TOKENS = 16384
"""Most tokens, padding included, of one prefill."""

_SLOTS: WeakKeyDictionary[Any, KVSlots] = WeakKeyDictionary()
"""The slots of each model that has sampled, until `forget`."""
_TOLD: WeakSet[Any] = WeakSet()


@dataclass
class _Row(OpenRollout):
    """A completion that occupies a row."""

    slot: int = 0
    """Where its keys and values are."""
    num_started: int = 0
    """Tokens whose steps have been started."""
    has_ended: bool = False
    """Its turn is over; it waits for an answer, or its slot is free."""


@dataclass(frozen=True)
class _Segment:
    """Steps that have been started, and the rows that they are of."""

    rows: list[_Row | None]
    turns: list[int]
    """The turn of each row; what it generated behind its end is dropped."""
    count: int
    sampled: Fetched
    """Tokens and their log-probabilities `[2, B, count]`."""
    states: Tensor | None
    """The hidden states that they were sampled from `[B, count, D]`, if they are kept."""


class GraphGenerator:
    """Completions of one batch; a step is one launch, and tokens are fetched every few steps.

    Where completions are conversations, a row that ends a turn keeps its slot while there are
    further turns: the slot reads what is inserted, and nothing before it again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SamplingConfig,
        batch_size: int,
        record: bool,
        device: Device,
        conversations: Conversations | None = None,
    ) -> None:
        self.conversations = conversations
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
        self.num_transfers = 0
        """Transfers from the device so far."""

    def open_slots(self, requests: Sequence[CompletionRequest]) -> bool:
        """Prepare the slots for these completions; False if a step is not the model's own."""
        num_rows = min(self.batch_size, len(requests))
        capacity = self._most_columns(requests)
        refuse_beyond_table(self.model, capacity)
        for request in requests:
            refuse_ids_beyond(self.tokenizer, request.ids, self.num_embeddings, request.prompt.id)
        slots = _SLOTS.get(self.model)
        if slots is None or not slots.fits(self.model, num_rows, capacity):
            if slots is not None:
                num_rows = max(num_rows, slots.num_slots)
                capacity = max(capacity, slots.capacity)
            _SLOTS.pop(self.model, None)
            slots = None  # its memory is free before the next is taken
            slots = KVSlots(self.model, self.device, num_rows, capacity)
            if not slots.matches_model(self.model, requests[0].ids, self.pad):
                return False
            _SLOTS[self.model] = slots
        if self.conversations is not None and not slots.extends_exactly(
            self.model, requests[0].ids, self.pad
        ):
            return False
        self.slots = slots
        return True

    def generate(self, requests: Sequence[CompletionRequest]) -> Iterator[list[OpenRollout]]:
        """Completions as they are finished; `open_slots` comes first."""
        self.waiting = deque(in_prefill_order(requests))
        self.length = self._most_columns(requests)
        num_rows = min(self.batch_size, len(requests))
        self.open: list[_Row | None] = [None] * bucket(num_rows)
        self.free_slots = list(range(num_rows))
        self._upload()
        ahead: _Segment | None = None
        while True:
            # The device runs the next steps while the host handles the last ones.
            self._fill_slots()
            segment = self._start_segment()
            if ahead is not None:
                yield self._finish_segment(ahead)
            elif segment is None:
                break
            ahead = segment

    def rollout(self, row: OpenRollout) -> Rollout:
        """A finished completion."""
        if self.conversations is not None:
            return self.conversations.rollout(row)
        return to_rollout(self.tokenizer, row.request, row.tokens, row.logprobs, self.stops)

    def _most_columns(self, requests: Sequence[CompletionRequest]) -> int:
        """Most ids of a sequence."""
        longest = max(len(request.ids) for request in requests) + self.config.max_new_tokens
        if self.conversations is not None:
            longest += self.conversations.limits.max_inserted_tokens
        return longest

    def _num_left(self, row: _Row) -> int:
        """Most tokens behind those that have arrived, in the present turn."""
        if self.conversations is not None:
            return self.conversations.num_left(row)
        return self.config.max_new_tokens - len(row.tokens)

    def _rows(self) -> Rows:
        return self.slots.rows.first(len(self.open))

    def _upload(self) -> None:
        """Copy to the device which rows go on, and their slots."""
        rows = self._rows()
        done = [int(row is None or row.has_ended) for row in self.open]
        state = send([done, [row.slot if row else 0 for row in self.open]], rows.slot)
        rows.done.copy_(state[0])
        rows.slot.copy_(state[1])

    def _fill_slots(self) -> None:
        """Start waiting completions in free slots; when none waits, go on with fewer rows."""
        free = [i for i, row in enumerate(self.open) if row is None]
        num_rows = len(self.open)
        num_open = num_rows - len(free)
        if self.waiting:
            num_free = len(self.free_slots)
            if num_free >= max(1, (num_open + num_free) // 8):
                self._prefill(free[: min(num_free, len(self.waiting))])
        elif num_open and bucket(num_open) <= num_rows // 2:
            self._keep(free, bucket(num_open))

    def _keep(self, free: list[int], count: int) -> None:
        """Go on with so many rows; the others are free."""
        indices = [i for i, row in enumerate(self.open) if row is not None]
        indices = (indices + free)[:count]
        rows = self._rows()
        index = send(indices, rows.token)
        for state in (rows.token, rows.position, rows.hidden):
            state[:count] = state[index]
        self.open = [self.open[i] for i in indices]
        self._upload()

    def _prefill(self, indices: list[int]) -> None:
        """Prefill the next prompts in these rows."""
        requests = [self.waiting.popleft() for _ in indices]
        by_prompt: dict[Ids, list[int]] = {}
        for index, request in zip(indices, requests, strict=True):
            self.open[index] = _Row(request, slot=self.free_slots.pop(0))
            by_prompt.setdefault(request.ids, []).append(index)
        rows = self._rows()
        for prompts in _prefill_batches(list(by_prompt)):
            states, read = self.slots.prefill(self.model, prompts, self.pad)
            pairs = [(i, index) for i, ids in enumerate(prompts) for index in by_prompt[ids]]
            sources, here = [i for i, _ in pairs], [index for _, index in pairs]
            opened = [self.open[index] for index in here]
            self.slots.copy_prompts(read, sources, [row.slot for row in opened if row is not None])
            lengths = [len(prompts[i]) for i in sources]
            source, to, length = send([sources, here, lengths], rows.token)
            rows.hidden[to] = states[source, length - 1]
            rows.position[to] = length.int()
        self._upload()

    def _start_segment(self) -> _Segment | None:
        """Start a few steps; None if every open row has all its steps already."""
        rows = self._rows()
        left = [
            self._num_left(row) + len(row.tokens) - row.num_started
            for row in self.open
            if row is not None and not row.has_ended
        ]
        count = min(STEPS, max(left, default=0))
        if count <= 0:  # a row may have more steps than it needs, beside one that goes on
            return None
        keys = [row.request.key if row else 0 for row in self.open]
        started = [row.num_started if row else 0 for row in self.open]
        stops = tuple(sorted(self.stops))
        splits = self.slots.num_splits(len(self.open), self.length)
        graph = self.slots.graph(len(self.open), splits, self.config, self.num_ids, stops)
        rows.uniform[:, :count] = send(uniforms(keys, count, started), rows.uniform)
        rows.column.zero_()
        for _ in range(count):
            graph.replay()
        for row in self.open:
            if row is not None:
                row.num_started += count
        states = rows.states[:, :count].clone() if self.record else None
        both = (rows.tokens[:, :count].double(), rows.logprobs[:, :count].double())
        turns = [len(row.inserted) if row else 0 for row in self.open]
        return _Segment(list(self.open), turns, count, Fetched(torch.stack(both)), states)

    def _finish_segment(self, segment: _Segment) -> list[OpenRollout]:
        """Append each row's tokens; the completions that are finished."""
        tokens, logprobs = segment.sampled.tolist()
        self.num_transfers += 1
        for i, (row, turn) in enumerate(zip(segment.rows, segment.turns, strict=True)):
            if row is None or row.has_ended or len(row.inserted) != turn:
                continue
            most = min(segment.count, self._num_left(row))
            new = [int(token) for token in tokens[i][:most]]
            end = next((n for n, token in enumerate(new, 1) if token in self.stops), most)
            check_finite(logprobs[i][:end], len(row.tokens))
            row.tokens += new[:end]
            row.logprobs += logprobs[i][:end]
            if segment.states is not None:
                row.hidden.append(segment.states[i, :end])
            row.has_ended = new[end - 1] in self.stops or self._num_left(row) == 0
        return self._end_turns()

    def _end_turns(self) -> list[OpenRollout]:
        """Rows that are finished, whose slots are free; the others go on with an answer."""
        ended = [(i, row) for i, row in enumerate(self.open) if row is not None and row.has_ended]
        answers: list[Ids | None] = [None] * len(ended)
        if self.conversations is not None:
            num_open = sum(row is not None for row in self.open)
            if 8 * len(ended) < num_open:  # a pass is for several rows
                return []
            answers = self.conversations.answer([row for _, row in ended])
        finished: list[OpenRollout] = []
        extended: list[tuple[int, Following]] = []
        for (i, row), ids in zip(ended, answers, strict=True):
            if ids is None:
                finished.append(row)
                self.free_slots.append(row.slot)
                self.open[i] = None
                continue
            # The id that ended the turn was not read: a step ends with it.
            held = row.length - 1
            extended.append((i, Following(row.slot, held, (row.tokens[-1], *ids))))
            row.insert(ids)
            row.num_started, row.has_ended = len(row.tokens), False
        if extended:
            self._extend(extended)
        if ended:
            self._upload()
        return finished

    def _extend(self, extended: Sequence[tuple[int, Following]]) -> None:
        """Read what is inserted in these rows; they go on behind it."""
        rows, following = self._rows(), [found for _, found in extended]
        states = self.slots.extend(self.model, following, self.pad)
        index, end = send([[i for i, _ in extended], [x.end for x in following]], rows.token)
        rows.hidden[index] = states
        rows.position[index] = end.int()


def _prefill_batches(prompts: Sequence[Ids]) -> Iterator[list[Ids]]:
    """Prompts in batches of at most `PREFILL_TOKENS` tokens."""
    batch: list[Ids] = []
    width = 0
    for ids in prompts:
        width = max(width, len(ids))
        if batch and (len(batch) + 1) * width > PREFILL_TOKENS:
            yield batch
            batch, width = [], len(ids)
        batch.append(ids)
    if batch:
        yield batch


def forget(model: PreTrainedModel) -> None:
    """Free a model's slots: its caches, and the memory of weights that are about to move."""
    _SLOTS.pop(model, None)


def graph_generator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig,
    batch_size: int,
    record: bool,
    conversations: Conversations | None = None,
) -> GraphGenerator | None:
    """A generator for models on a CUDA device that `DecodeStep` covers; else None."""
    is_cuda = model.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if not is_cuda or not is_covered(model):
        return None
    device = cuda_device(model.device)
    return GraphGenerator(model, tokenizer, config, batch_size, record, device, conversations)


def warn_uncaptured(model: PreTrainedModel) -> None:
    """Warn once that a model on a GPU is slower than it could be."""
    if model not in _TOLD:
        _TOLD.add(model)
        warnings.warn(
            f"{type(model).__name__} has no captured decoding step here, so rollouts run its own "
            "forward pass for every token, which is several times slower.",
            stacklevel=2,
        )
