"""Completions from a causal language model, exactly reproducible token by token.

Every token is sampled by inverting the cumulative distribution at one uniform number, and that
number is a hash of (seed, prompt, sample, position). A token therefore does not depend on which
other prompts share its batch, on their order, or on how many tokens were sampled before a restart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Rollout
from tutelage.errors import ConfigError
from tutelage.models.forward import Ids
from tutelage.models.head import head, output_embeddings
from tutelage.models.limits import refuse_beyond_table
from tutelage.models.llama_cpu.decode import FastSlots
from tutelage.models.tokenizers import pad_id, refuse_ids_beyond, stop_ids, vocabulary_size
from tutelage.rollout.conversation import Conversations, conversations_of
from tutelage.rollout.cuda.generate import GraphGenerator, graph_generator, warn_uncaptured
from tutelage.rollout.request import (
    CompletionRequest,
    OpenRollout,
    RolloutRequest,
    completion_requests,
    in_prefill_order,
    to_rollout,
)
from tutelage.rollout.sample_token import check_finite, sample_token, uniforms
from tutelage.rollout.slots import open_slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SEGMENT = 64
"""Most steps of a segment, after which finished completions are taken out."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: RolloutRequest,
    batch_size: int = 64,
    enable_thinking: bool | None = None,
    is_fast: bool = True,
) -> list[Rollout]:
    """Sample completions, `request.sampling.num_samples` for each prompt.

    Ids beyond the tokenizer's vocabulary (padding rows of the head) are never sampled. Recorded
    log-probabilities are those of the temperature distribution before top-k and top-p; for greedy
    sampling, those at temperature 1.

    Args:
        model: Causal language model; its mode and settings are left as they were.
        tokenizer: The model's tokenizer.
        request: What to sample.
        batch_size: Completions decoded at the same time.
        enable_thinking: Passed to the chat template when not None.
        is_fast: False forces the model's own forward pass for every token.

    Raises:
        ConfigError: batch_size is below 1.
        DataError: A prompt cannot be encoded.
        ModelError: The model gave logits that are not numbers.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}. Use 1 or more.")
    stops = stop_ids(model, tokenizer)
    conversations = conversations_of(request, tokenizer, stops, enable_thinking)
    requests = completion_requests(tokenizer, request, enable_thinking, conversations)
    done: dict[int, Rollout] = {}
    with _evaluating(model), torch.no_grad():
        generator = _generator(
            model, tokenizer, request, batch_size, is_fast, requests, conversations
        )
        for finished in generator.generate(requests):
            for row in finished:
                rollout = generator.rollout(row)
                if request.record_hidden:
                    rollout = replace(rollout, hidden=torch.cat(row.hidden))
                done[row.request.index] = rollout
            if request.progress is not None:
                request.progress(len(finished))
    return [done[index] for index in range(len(requests))]


def _generator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: RolloutRequest,
    batch_size: int,
    is_fast: bool,
    requests: Sequence[CompletionRequest],
    conversations: Conversations | None,
) -> _Generator | GraphGenerator:
    """Captured steps on a GPU where the model has them, the hand-written step on a CPU."""
    config, record = request.sampling, request.record_hidden
    if is_fast and requests and model.device.type == "cuda":
        captured = graph_generator(model, tokenizer, config, batch_size, record, conversations)
        if captured is not None and captured.open_slots(requests):
            return captured
        warn_uncaptured(model)
    is_fast = is_fast and model.device.type == "cpu"
    return _Generator(model, tokenizer, config, batch_size, record, is_fast, conversations)


class _Generator:
    """Prefill once per prompt, then one token a step for the completions that are open.

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
        is_fast: bool,
        conversations: Conversations | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.batch_size = batch_size
        self.record = record
        self.is_fast = is_fast
        self.conversations = conversations
        self.stops = frozenset(stop_ids(model, tokenizer))

    def generate(self, requests: Sequence[CompletionRequest]) -> Iterator[list[OpenRollout]]:
        """Completions as they are finished."""
        waiting = deque(in_prefill_order(requests))
        if not waiting:
            return
        self.open: list[OpenRollout | None] = [None] * min(self.batch_size, len(waiting))
        self.waiting = waiting
        longest = len(waiting[-1].ids) + self.config.max_new_tokens
        if self.conversations is not None:
            longest += self.conversations.limits.max_inserted_tokens
        refuse_beyond_table(self.model, longest)
        embeddings: Any = self.model.get_input_embeddings()
        num_ids = min(
            vocabulary_size(self.tokenizer),
            embeddings.weight.shape[0],
            output_embeddings(self.model).weight.shape[0],
        )
        for request in waiting:
            refuse_ids_beyond(
                self.tokenizer, request.ids, embeddings.weight.shape[0], request.prompt.id
            )
        self.slots = open_slots(
            self.model,
            waiting[0].ids,
            pad_id(self.tokenizer, num_ids),
            len(self.open),
            longest,
            self.is_fast,
        )
        self._fill_slots()
        self.head = head(self.model, self.slots.hidden, num_ids)
        self.logits = torch.empty(
            len(self.open), num_ids, dtype=self.head.dtype, device=self.model.device
        )
        while any(self.open):
            yield self._end_turns(self._generate_segment())
            self._fill_slots()

    def rollout(self, row: OpenRollout) -> Rollout:
        """A finished completion."""
        if self.conversations is not None:
            return self.conversations.rollout(row)
        return to_rollout(self.tokenizer, row.request, row.tokens, row.logprobs, self.stops)

    def _is_due(self, num_open: int) -> bool:
        """Whether enough slots are free to fill them, or to go on with fewer."""
        num_rows = len(self.open)
        if self.waiting and self.slots.refills:
            return num_rows - num_open >= max(1, num_rows // 8)
        return num_open <= 3 * num_rows // 4 if num_open else bool(self.waiting)

    def _fill_slots(self) -> None:
        """Start waiting completions in free slots or, when none can start, drop the free slots."""
        occupied = [i for i, row in enumerate(self.open) if row is not None]
        if not self._is_due(len(occupied)):
            return
        if occupied and not (self.waiting and self.slots.refills):
            self.open = [self.open[i] for i in occupied]
            self.slots.keep(torch.tensor(occupied, device=self.model.device))
            return
        if not self.slots.refills:
            self.open = [None] * min(self.batch_size, len(self.waiting))
        free = [i for i, row in enumerate(self.open) if row is None][: len(self.waiting)]
        requests = [self.waiting.popleft() for _ in free]
        for slot, request in zip(free, requests, strict=True):
            self.open[slot] = OpenRollout(request)
        following = [request.ids for request in islice(self.waiting, len(self.open))]
        self.slots.prefill(free, [request.ids for request in requests], following)

    def _end_turns(self, ended: list[int]) -> list[OpenRollout]:
        """Rows that are finished, whose slots are free; the others go on with an answer."""
        rows = [row for i in ended if (row := self.open[i]) is not None]
        answers: list[Ids | None] = [None] * len(rows)
        if self.conversations is not None:
            answers = self.conversations.answer(rows)
        finished: list[OpenRollout] = []
        extended: list[tuple[int, int, Ids]] = []
        for slot, row, ids in zip(ended, rows, answers, strict=True):
            if ids is None:
                finished.append(row)
                self.open[slot] = None
                continue
            if isinstance(self.slots, FastSlots):
                extended.append((slot, row.length, ids))
            else:
                row.pending = ids  # read step by step
            row.insert(ids)
        if extended and isinstance(self.slots, FastSlots):
            self.slots.extend(extended)
        return finished

    def _generate_segment(self) -> list[int]:
        """Steps until slots should be filled or dropped; the slots whose rows ended a turn."""
        left = {i: self._num_left(row) for i, row in enumerate(self.open) if row is not None}
        count = min(_SEGMENT, *left.values())
        uniform = self._uniforms(count)
        pending = self._pending(count)
        tokens: list[list[int]] = []
        logprobs: list[Tensor] = []
        hidden: list[Tensor] = []
        ended: dict[int, int] = {}
        for step in range(count):
            size = len(self.open)
            logits = self.head.project(self.slots.hidden, self.logits[:size])
            token, logprob = sample_token(logits, uniform[step], self.config)
            if pending is not None:
                token = torch.where(pending[step] >= 0, pending[step], token)
            tokens.append(token.tolist())
            logprobs.append(logprob)
            if self.record:
                hidden.append(self.slots.hidden)
            if not self.stops.isdisjoint(tokens[-1]) or step + 1 == count:
                self._note_ends(tokens[-1], step + 1, left, ended)
            if len(ended) == len(left) and self.conversations is None:
                break
            self.slots.decode_step(token)  # of a turn's end, too: what follows is read behind it
            if self._is_due(len(left) - len(ended)) or self._is_turn_due(len(ended), len(left)):
                break
        return self._append_tokens(tokens, logprobs, hidden, ended)

    def _num_left(self, row: OpenRollout) -> int:
        """Steps until a row ends at the latest."""
        if self.conversations is not None:
            return len(row.pending) + self.conversations.num_left(row)
        return self.config.max_new_tokens - len(row.tokens)

    def _is_turn_due(self, num_ended: int, num_open: int) -> bool:
        """Whether turns should be answered: at once, unless ended rows can be left to wait."""
        if self.conversations is None or not num_ended:
            return False
        return not isinstance(self.slots, FastSlots) or 8 * num_ended >= num_open

    def _uniforms(self, count: int) -> Tensor:
        """The next numbers of every row `[count, B]`."""
        keys = [row.request.key if row else 0 for row in self.open]
        first = [len(row.tokens) - len(row.pending) if row else 0 for row in self.open]
        return uniforms(keys, count, first).t().contiguous().to(self.model.device)

    def _pending(self, count: int) -> Tensor | None:
        """Inserted ids that every row reads next, -1 behind them `[count, B]`; None without any."""
        ids = [row.pending[:count] if row else () for row in self.open]
        if not any(ids):
            return None
        padded = [[*one, *[-1] * (count - len(one))] for one in ids]
        return torch.tensor(padded, device=self.model.device).t().contiguous()

    def _note_ends(
        self, tokens: list[int], step: int, left: dict[int, int], ended: dict[int, int]
    ) -> None:
        """Note rows whose token is a stop token or their last one, with their number of tokens."""
        for i, num_left in left.items():
            row = self.open[i]
            if i in ended or row is None or step <= len(row.pending):
                continue
            if tokens[i] in self.stops or num_left == step:
                ended[i] = step

    def _append_tokens(
        self,
        tokens: list[list[int]],
        logprobs: list[Tensor],
        hidden: list[Tensor],
        ended: dict[int, int],
    ) -> list[int]:
        """Append each row's tokens; the slots of the rows that have ended."""
        by_row = list(zip(*tokens, strict=True))
        logprobs_by_row = torch.stack(logprobs, dim=1).tolist()
        hidden_by_row = torch.stack(hidden, dim=1) if hidden else None
        for i, row in enumerate(self.open):
            if row is None:
                continue
            start, stop = min(len(row.pending), len(tokens)), ended.get(i, len(tokens))
            row.pending = row.pending[start:]
            check_finite(logprobs_by_row[i][start:stop], len(row.tokens))
            row.tokens += by_row[i][start:stop]
            row.logprobs += logprobs_by_row[i][start:stop]
            if hidden_by_row is not None:
                row.hidden.append(hidden_by_row[i, start:stop])
        return sorted(ended)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode (no dropout, no checkpointing); afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
