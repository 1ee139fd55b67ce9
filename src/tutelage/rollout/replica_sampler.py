"""Draws from replicas, all or none: every process of a run agrees on what a draw was made with."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tutelage.data.types import Rollout
from tutelage.errors import TutelageError
from tutelage.rollout.replicas import LostReplicaError, Replicas
from tutelage.rollout.request import RolloutRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LocalSampler(Protocol):
    """Samples from the weights that the replicas hold, for this process alone."""

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        """Completions, or an error and none; `LostReplicaError` for one without a reply."""

    def cancel(self) -> None:
        """End a draw that another thread waits for."""

    def close(self) -> None:
        """Release what the sampler holds."""


@dataclass(frozen=True)
class _Draw:
    """What a process has of a draw: its rollouts, or the replica that failed it, or an error."""

    rollouts: list[Rollout] = field(default_factory=list)
    lost: Mapping[int, str] = field(default_factory=dict)
    error: TutelageError | None = None


class ReplicaSampler:
    """Hands weights over to replicas and draws from them, together with other processes.

    All processes call `sample`, or `begin` and `settle`, as often and in the same order. If a
    replica fails one of them, none keeps its rollouts, and all draw again from those that are left,
    which hold the same weights. What is agreed on is agreed on in the thread that calls.

    Args:
        inner: draws for this process.
        replicas: the servers.
        model: the student, whose weights are handed over.
    """

    has_own_weights = True

    def __init__(self, inner: LocalSampler, replicas: Replicas, model: PreTrainedModel) -> None:
        self.inner, self.replicas, self.model = inner, replicas, model
        self._pool = ThreadPoolExecutor(1, "draw")
        self._begun: tuple[RolloutRequest, Future[_Draw]] | None = None
        self._settled: list[Rollout] | None = None

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        """Completions of the prompts, from the student's present weights, or an error and none.

        Raises:
            ModelError: a completion could not be had.
            RunError: the weights cannot be written.
        """
        with self.replicas.undisturbed():
            self._push()
            return self._agreed(request, self._draw(request))

    def begin(self, request: RolloutRequest) -> None:
        """Begin a draw from the student's present weights, which may change meanwhile.

        Raises:
            ModelError: too few replicas read the weights.
            RunError: the weights cannot be written.
        """
        with self.replicas.undisturbed():
            self._push()
            self._begun = (request, self._pool.submit(self._draw, request))

    def settle(self) -> list[Rollout]:
        """The rollouts that were begun last, once there are all of them.

        Raises:
            ModelError: a completion could not be had.
        """
        if self._begun is not None:
            request, future = self._begun
            with self.replicas.undisturbed():  # elsewhere a signal ends the wait, not the draw
                self._settled = self._agreed(request, future.result())
                self._begun = None
        if self._settled is None:
            raise ValueError("settle comes after begin.")
        return self._settled

    def cancel(self) -> None:
        """Give up the draw that was begun; there is none after it."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self.inner.cancel()
            wait([begun[1]])

    def close(self) -> None:
        """Give up a draw that was begun, and remove the weights that were handed over."""
        self.cancel()
        self._pool.shutdown()
        self.inner.close()
        self.replicas.close()

    def _push(self) -> None:
        if self._begun is not None:  # it is drawn by the weights before
            self.settle()
        self.replicas.push(self.model)

    def _draw(self, request: RolloutRequest) -> _Draw:
        try:
            return _Draw(self.inner.sample(request))
        except LostReplicaError as lost:
            return _Draw(lost={lost.number: lost.reason})
        except TutelageError as error:
            return _Draw(error=error)

    def _agreed(self, request: RolloutRequest, draw: _Draw) -> list[Rollout]:
        """A draw that failed in no process."""
        while self.replicas.agree(draw.lost, draw.error):
            draw = self._draw(request)
        return draw.rollouts
