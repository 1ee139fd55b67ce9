"""Completions from a causal language model, exactly reproducible token by token.

Every token is drawn by inverting the cumulative distribution at one uniform number, and that
number is a hash of (seed, prompt, sample, position). A token therefore does not depend on which
other prompts share its batch, on their order, or on how many tokens were drawn before a restart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError
from tutelage.models.head import head, output_embeddings
from tutelage.models.limits import refuse_beyond_table
from tutelage.models.tokenizers import pad_id, refuse_ids_beyond, stop_ids, vocabulary_size
from tutelage.rollout.cuda.generate import GraphWriter, graph_writer, tell_own_step
from tutelage.rollout.request import (
    Drawn,
    Job,
    Open,
    earlier_samples,
    in_reading_order,
    jobs_of,
    rollout_of,
)
from tutelage.rollout.sample_token import check_finite, draw, uniforms
from tutelage.rollout.slots import open_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Drawn", "SamplingConfig", "draw_rollouts", "earlier_samples", "sample"]

_SEGMENT = 64
"""Most steps between two looks at who has finished."""


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    seed: tuple[int, ...],
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    enable_thinking: bool | None = None,
    first_sample: Sequence[int] | None = None,
) -> list[Rollout]:
    """The rollouts of `draw_rollouts`, with the same arguments."""
    return draw_rollouts(
        model, tokenizer, prompts, config, seed, batch_size, progress, enable_thinking, first_sample
    ).rollouts


def draw_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    seed: tuple[int, ...],
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    enable_thinking: bool | None = None,
    first_sample: Sequence[int] | None = None,
    record: bool = False,
    is_fast: bool = True,
) -> Drawn:
    """Draw completions, `config.num_samples` for each prompt.

    Ids beyond the tokenizer's vocabulary (padding rows of the head) are never drawn. Recorded
    log-probabilities are those of the temperature distribution before top-k and top-p; for greedy
    sampling, those at temperature 1.

    Args:
        model: Causal language model; its mode and settings are left as they were.
        tokenizer: The model's tokenizer.
        prompts: Prompts to complete.
        config: How to draw.
        seed: Integers naming this draw, say (run seed, step).
        batch_size: Completions decoded at the same time.
        progress: Called with the number of completions that have just been finished.
        enable_thinking: Passed to the chat template when not None.
        first_sample: For each prompt the number of its samples that are drawn before under the same
            seed, here or in another process; a prompt that comes again draws further samples. When
            None, `earlier_samples(prompts, config.num_samples)`: nobody else draws.
        record: Keep the hidden state that every token was drawn from.
        is_fast: False forces the model's own forward pass for every token.

    Returns:
        Rollouts, all samples of the first prompt first, with their hidden states.

    Raises:
        ConfigError: batch_size is below 1.
        DataError: A prompt cannot be encoded.
        ModelError: The model gave logits that are not numbers.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}. Use 1 or more.")
    jobs = jobs_of(tokenizer, prompts, config.num_samples, seed, first_sample, enable_thinking)
    done: dict[int, tuple[Rollout, list[Tensor]]] = {}
    with _evaluating(model), torch.no_grad():
        writer = _writer(model, tokenizer, config, batch_size, record, is_fast, jobs)
        for finished in writer.write(jobs):
            for row in finished:
                done[row.job.place] = (writer.rollout(row), row.hidden)
            if progress is not None:
                progress(len(finished))
    order = [done[place] for place in range(len(jobs))]
    hidden = [torch.cat(parts) for _, parts in order] if record else None
    return Drawn([rollout for rollout, _ in order], hidden)


def _writer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig,
    batch_size: int,
    record: bool,
    is_fast: bool,
    jobs: Sequence[Job],
) -> _Writer | GraphWriter:
    """Captured steps on a GPU where the model has them, the hand-written step on a CPU."""
    if is_fast and jobs and model.device.type == "cuda":
        writer = graph_writer(model, tokenizer, config, batch_size, record)
        if writer is not None and writer.open_slots(jobs):
            return writer
        tell_own_step(model)
    is_fast = is_fast and model.device.type == "cpu"
    return _Writer(model, tokenizer, config, batch_size, record, is_fast)


class _Writer:
    """Prefill once per prompt, then one token a step for the completions that are open."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SamplingConfig,
        batch_size: int,
        record: bool,
        is_fast: bool,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.batch_size = batch_size
        self.record = record
        self.is_fast = is_fast
        self.stops = frozenset(stop_ids(model, tokenizer))

    def write(self, jobs: Sequence[Job]) -> Iterator[list[Open]]:
        """Completions as they are finished."""
        waiting = deque(in_reading_order(jobs))
        if not waiting:
            return
        self.open: list[Open | None] = [None] * min(self.batch_size, len(waiting))
        self.waiting = waiting
        longest = len(waiting[-1].ids) + self.config.max_new_tokens
        refuse_beyond_table(self.model, longest)
        embeddings: Any = self.model.get_input_embeddings()
        num_ids = min(
            vocabulary_size(self.tokenizer),
            embeddings.weight.shape[0],
            output_embeddings(self.model).weight.shape[0],
        )
        for job in waiting:
            refuse_ids_beyond(self.tokenizer, job.ids, embeddings.weight.shape[0], job.prompt.id)
        self.rows = open_rows(
            self.model,
            waiting[0].ids,
            pad_id(self.tokenizer, num_ids),
            len(self.open),
            longest,
            self.is_fast,
        )
        self._change_members()
        self.head = head(self.model, self.rows.hidden, num_ids)
        self.logits = torch.empty(
            len(self.open), num_ids, dtype=self.head.dtype, device=self.model.device
        )
        while any(self.open):
            yield self._write_segment()
            self._change_members()

    def rollout(self, row: Open) -> Rollout:
        """A finished completion."""
        return rollout_of(self.tokenizer, row.job, row.tokens, row.logprobs, self.stops)

    def _is_due(self, num_open: int) -> bool:
        """Whether so few rows are open that others should take the free places, or none."""
        num_rows = len(self.open)
        if self.waiting and self.rows.refills:
            return num_rows - num_open >= max(1, num_rows // 8)
        return num_open <= 3 * num_rows // 4 if num_open else bool(self.waiting)

    def _change_members(self) -> None:
        """Let waiting completions in or, when none can come in, let finished rows go."""
        places = [i for i, row in enumerate(self.open) if row is not None]
        if not self._is_due(len(places)):
            return
        if places and not (self.waiting and self.rows.refills):
            self.open = [self.open[i] for i in places]
            self.rows.keep(torch.tensor(places, device=self.model.device))
            return
        if not self.rows.refills:
            self.open = [None] * min(self.batch_size, len(self.waiting))
        free = [i for i, row in enumerate(self.open) if row is None][: len(self.waiting)]
        jobs = [self.waiting.popleft() for _ in free]
        for place, job in zip(free, jobs, strict=True):
            self.open[place] = Open(job)
        following = [job.ids for job in islice(self.waiting, len(self.open))]
        self.rows.admit(free, [job.ids for job in jobs], following)

    def _write_segment(self) -> list[Open]:
        """Steps until somebody should come or go; the completions that they finished."""
        left = {i: self._num_left(row) for i, row in enumerate(self.open) if row is not None}
        count = min(_SEGMENT, *left.values())
        uniform = self._uniforms(count)
        tokens: list[list[int]] = []
        logprobs: list[Tensor] = []
        hidden: list[Tensor] = []
        ended: dict[int, int] = {}
        for step in range(count):
            size = len(self.open)
            logits = self.head.project(self.rows.hidden, self.logits[:size])
            token, logprob = draw(logits, uniform[step], self.config)
            tokens.append(token.tolist())
            logprobs.append(logprob)
            if self.record:
                hidden.append(self.rows.hidden)
            if not self.stops.isdisjoint(tokens[-1]) or step + 1 == count:
                self._note_ends(tokens[-1], step + 1, left, ended)
            if len(ended) == len(left):
                break
            self.rows.advance(token)
            if self._is_due(len(left) - len(ended)):
                break
        return self._keep_written(tokens, logprobs, hidden, ended)

    def _num_left(self, row: Open) -> int:
        return self.config.max_new_tokens - len(row.tokens)

    def _uniforms(self, count: int) -> Tensor:
        """The next numbers of every row `[count, B]`."""
        keys = [row.job.key if row else 0 for row in self.open]
        first = [len(row.tokens) if row else 0 for row in self.open]
        return uniforms(keys, count, first).t().contiguous().to(self.model.device)

    def _note_ends(
        self, tokens: list[int], step: int, left: dict[int, int], ended: dict[int, int]
    ) -> None:
        """Rows that have drawn a stop token or their last one, and how many they drew."""
        for i, num_left in left.items():
            if i not in ended and (tokens[i] in self.stops or num_left == step):
                ended[i] = step

    def _keep_written(
        self,
        tokens: list[list[int]],
        logprobs: list[Tensor],
        hidden: list[Tensor],
        ended: dict[int, int],
    ) -> list[Open]:
        """Hand each row what it drew; rows that have ended leave their places."""
        finished = []
        by_row = list(zip(*tokens, strict=True))
        logprobs_by_row = torch.stack(logprobs, dim=1).tolist()
        hidden_by_row = torch.stack(hidden, dim=1) if hidden else None
        for i, row in enumerate(self.open):
            if row is None:
                continue
            stop = ended.get(i, len(tokens))
            check_finite(logprobs_by_row[i][:stop], len(row.tokens))
            row.tokens += by_row[i][:stop]
            row.logprobs += logprobs_by_row[i][:stop]
            if hidden_by_row is not None:
                row.hidden.append(hidden_by_row[i, :stop])
            if i in ended:
                finished.append(row)
                self.open[i] = None
        return finished


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
