"""Rollouts of the next step, drawn by the weights a step begins with while it learns.

Step n learns from what the weights after step n − 2 sampled, the first step of a run from what its
initial weights did. Which weights sample for a step is fixed, so a run repeats. A checkpoint holds
the rollouts of the step after it: the weights that sampled them are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tutelage.data.types import Prompt, Rollout
from tutelage.models.student import Student
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.saved_rollouts import from_line, to_line
from tutelage.train.distributed import Ranks


class Ahead:
    """Draws a step ahead. Every process calls the same methods in the same order.

    Args:
        sampler: draws beside learning.
        student: whose weights are handed over.
        request: what this process samples for a step.
        num_steps: of the run; nothing is drawn beyond.
    """

    def __init__(
        self,
        sampler: ReplicaSampler,
        student: Student,
        request: Callable[[int], RolloutRequest],
        num_steps: int,
    ) -> None:
        self._sampler, self._student, self._request = sampler, student, request
        self._num_steps = num_steps
        self._drawing: tuple[int, int] | None = None
        """The step whose rollouts are being drawn, and the version of the weights that do."""
        self._known: dict[int, list[Rollout]] = {}
        """Rollouts by their step."""

    def take(self, step: int) -> list[Rollout]:
        """The rollouts of a step, once they are drawn; those of the next begin to be.

        Raises:
            ModelError: a completion could not be had.
            RunError: the weights cannot be handed over.
        """
        found = self.known(step)
        if found is None:
            self._begin(step, step - 1)
            found = self.known(step)
        if found is None:
            raise ValueError(f"the completions that were begun are not those of step {step}.")
        self._known = {step: found}
        if step < self._num_steps:
            self._begin(step + 1, step - 1)
        return found

    def known(self, step: int) -> list[Rollout] | None:
        """The rollouts of a step, after a wait if they are being drawn; None if nobody draws them.

        Raises:
            ModelError: a completion could not be had.
        """
        if self._drawing is not None and self._drawing[0] == step:
            drawn = self._sampler.settle()
            self._known[step] = [replace(r, weights_version=self._drawing[1]) for r in drawn]
            self._drawing = None
        return self._known.get(step)

    def restore(self, step: int, rollouts: list[Rollout]) -> None:
        """Let a step learn from rollouts that were drawn before the run stopped."""
        self._known[step] = rollouts

    def _begin(self, step: int, version: int) -> None:
        with self._student.whole():
            self._sampler.begin(self._request(step))
        self._drawing = (step, version)


def saved_lines(ranks: Ranks, rollouts: Sequence[Rollout], share: Sequence[int]) -> str:
    """A line for each rollout of a step, in the order of its completions, of all processes.

    Args:
        ranks: the processes.
        rollouts: this one's.
        share: which of the step's completions they are.
    """
    own = [(index, to_line(r)) for index, r in zip(share, rollouts, strict=True)]
    lines = sorted(line for found in ranks.gathered(own) for line in found)
    return "".join(f"{line}\n" for _, line in lines)


def restored(text: str, prompts: Sequence[Prompt], num_samples: int) -> list[Rollout] | None:
    """The rollouts of a step; None if they are of other prompts, or of another number.

    Args:
        text: `saved_lines` of a checkpoint.
        prompts: those of the step.
        num_samples: completions of each.
    """
    lines = text.splitlines()
    wanted = [prompt for prompt in prompts for _ in range(num_samples)]
    if len(lines) != len(wanted):
        return None
    found = [from_line(line, prompt) for line, prompt in zip(lines, wanted, strict=True)]
    rollouts = [rollout for rollout in found if rollout is not None]
    return rollouts if len(rollouts) == len(wanted) else None
