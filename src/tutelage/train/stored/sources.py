"""Where the completions of a step come from: sampled live, stored before, or some of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from tutelage.config.rollouts import LiveRollouts, MixedRollouts, has_teacher_prefix
from tutelage.core.counter import counter_uniform
from tutelage.data.types import Rollout
from tutelage.errors import RunError
from tutelage.train.ahead import restored
from tutelage.train.stored.states import States
from tutelage.train.stored.store import Store
from tutelage.train.teacher_prefix import PrefixSource

if TYPE_CHECKING:
    from tutelage.train.step import Step

_MIX_SEED = 5
"""Keeps the random numbers that mix apart from those of sampling and selection."""
LINES = "rollouts.jsonl"
"""File of a stored step: a line for each completion, as checkpoints have of a step drawn ahead."""


class Source(Protocol):
    """Gives the completions of each step; every process calls it at the same points."""

    has_logprobs: bool
    """Whether the log-probabilities are known that every token was sampled with."""
    num_stored: int
    """Completions of the last step, of this process, that were stored before."""

    def take(self, step: int) -> list[Rollout]:
        """This process's share of the completions of a step."""


class LiveSource:
    """The student's present weights sample."""

    has_logprobs = True
    num_stored = 0

    def __init__(self, step: Step) -> None:
        self._step = step

    def take(self, step: int) -> list[Rollout]:
        """This process's share of the completions of a step."""
        return self._step.sample(self._step.request(step), step)


class StoredSource:
    """The store has all completions."""

    def __init__(
        self, step: Step, store: Store, has_logprobs: bool, states: States | None = None
    ) -> None:
        self._step, self.store, self.has_logprobs = step, store, has_logprobs
        self._states = states
        self.num_stored = 0

    def take(self, step: int) -> list[Rollout]:
        """This process's share of the completions of a step.

        Raises:
            RunError: its part of the store is missing, damaged, or of other prompts.
        """
        path = self.store.read(step) / LINES
        num_samples = self._step.config.sampling.num_samples
        text = path.read_text(encoding="utf-8")
        found = restored(text, self._step.prompts(step), num_samples)
        if found is None:
            raise RunError(
                f"{path} has completions of other prompts, or another number of them, than step "
                f"{step} has now. Restore what changed, or choose another out=FOLDER."
            )
        share = self._step.share(len(found) // self._step.ranks.count)
        self.num_stored = len(share)
        if self._states is not None:
            self._states.open(step)
        return [found[i] for i in share]


class MixedSource:
    """Each prompt of a step gets live completions by chance, or its stored ones.

    The chance is a pure function of seed, step and the prompt's place in the step.
    """

    def __init__(self, step: Step, stored: StoredSource, on_policy_share: float) -> None:
        self._step, self._stored, self._share = step, stored, on_policy_share
        self.has_logprobs = stored.has_logprobs
        self.num_stored = 0

    def is_live(self, step: int) -> list[bool]:
        """Whether each prompt of a step, of all processes, gets live completions."""
        places = torch.arange(self._step.config.prompts_per_step)
        seed = (self._step.config.seed, step, _MIX_SEED)
        return (counter_uniform(seed, places) < self._share).tolist()

    def take(self, step: int) -> list[Rollout]:
        """This process's share of the completions of a step.

        Raises:
            RunError: the step's part of the store cannot be used.
        """
        request, is_live = self._step.request(step), self.is_live(step)
        mine = [is_live[place] for place in self._step.share(len(request.prompts))]
        if all(is_live):
            self.num_stored = 0
            return self._step.sample(request, step)
        stored = self._stored.take(step)
        first = request.first_sample or [0] * len(mine)
        chosen = [i for i, live in enumerate(mine) if live]
        live = self._step.sample(
            replace(
                request,
                prompts=[request.prompts[i] for i in chosen],
                first_sample=[first[i] for i in chosen],
                record_hidden=False,  # of the stored ones there are none
            ),
            step,
        )
        return self._merged(mine, live, stored)

    def _merged(
        self, is_live: Sequence[bool], live: Sequence[Rollout], stored: Sequence[Rollout]
    ) -> list[Rollout]:
        """The completions of each prompt, in their order."""
        sampled, k = iter(live), self._step.config.sampling.num_samples
        self.num_stored = len(stored) - len(live)
        return [
            next(sampled) if is_live[place // k] else rollout
            for place, rollout in enumerate(stored)
        ]


def source_of(step: Step, store: Store | None) -> Source:
    """The source that a run configures.

    Args:
        step: takes the steps.
        store: holds stored completions; None for a live run.
    """
    settings = step.config.rollouts
    if isinstance(settings, LiveRollouts):
        return PrefixSource(step, settings) if has_teacher_prefix(settings) else LiveSource(step)
    if store is None:
        raise ValueError("stored rollouts need a store.")
    stored = StoredSource(step, store, settings.path is None, step.states)
    if isinstance(settings, MixedRollouts):
        return MixedSource(step, stored, settings.on_policy_share)
    return stored
