"""Conversations of the student with environments of verifiers."""

from __future__ import annotations

import hashlib
import queue
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.config.sampling import SamplingConfig
from tutelage.config.verifiers import VerifiersData
from tutelage.data.types import Prompt, Rollout
from tutelage.envs.verifiers import Began, TracedRollout, Worker, order
from tutelage.errors import RunError, TutelageError
from tutelage.models.tokenizers import decode, save_tokenizer
from tutelage.rollout.request import RolloutRequest, earlier_samples
from tutelage.rollout.sampler import Sampler
from tutelage.rollout.verifiers_endpoint import TOKEN_LIMIT, Asked, Endpoint, Refused, Turn
from tutelage.rollout.verifiers_traces import Sampled, to_rollout
from tutelage.rollout.vllm_server import VLLMServerSampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GRACE_S = 0.25
"""Seconds that requests wait for those of the other open rollouts, to be sampled together."""


@dataclass
class _Open:
    """A rollout under way."""

    prompt: Prompt
    sample: int
    """Index among the samples of the prompt in this request."""
    number: int
    """Index among all samples of the prompt under this seed."""
    asked: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """How often it asked for a continuation of the same ids."""
    turns: list[Rollout] = field(default_factory=list)
    is_cut: bool = False
    traced: TracedRollout | None = None


class VerifiersService:
    """What the samplers of a run share: the worker, and the endpoint that it asks.

    Args:
        worker: runs the environment.
        tokenizer: the student's, which verifiers renders messages with.
        student: its name, by which verifiers may know how its messages are rendered.
        stops: ids that end a turn.
        data: limits and settings.
        context_limit: most tokens of a sequence that the student reads; None: no limit.
    """

    def __init__(
        self,
        worker: Worker,
        tokenizer: PreTrainedTokenizerBase,
        student: str,
        stops: frozenset[int],
        data: VerifiersData,
        context_limit: int | None = None,
    ) -> None:
        self.worker, self.tokenizer, self.data = worker, tokenizer, data
        self.context_limit = context_limit
        self._student, self._stops = student, stops
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._endpoint: Endpoint | None = None

    def endpoint(self, sampling: SamplingConfig) -> Endpoint:
        """The endpoint, for requests that must not change these settings."""
        if self._endpoint is None:
            self._endpoint = Endpoint(self.worker.key, self._stops)
        self._endpoint.sampling = sampling
        return self._endpoint

    def order(self, url: str, rollouts: dict[str, _Open], max_new_tokens: int) -> dict[str, Any]:
        """The order of rollouts for the worker."""
        settings = {
            "url": url,
            "tokenizer": self._tokenizer_folder(),
            "student": self._student,
            "renderer": self.data.renderer,
            "enable_thinking": self.data.enable_thinking,
            "max_output_tokens": max_new_tokens,
            "num_concurrent": self.data.num_concurrent,
        }
        return order(list(rollouts), [one.prompt for one in rollouts.values()], settings)

    def stop(self) -> None:
        """End the worker and the endpoint, also while another thread waits for them."""
        self.worker.stop()
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.close()

    def close(self) -> None:
        """End them and remove their files; the next request starts new ones."""
        self.stop()
        self.worker.close()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _tokenizer_folder(self) -> str:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tutelage-")
            save_tokenizer(self.tokenizer, Path(self._folder.name))
        return self._folder.name


class VerifiersSampler:
    """Samples the turns of conversations that verifiers runs in a process of its own.

    The process asks an endpoint on this machine, which samples every turn with `inner`. A turn's
    tokens depend on the request's seed, the task, the sample and the ids before it, and neither on
    when it is asked for nor on what is sampled beside it.

    Args:
        inner: samples from given ids.
        service: worker and endpoint.
        is_owner: whether `close` ends them.
    """

    def __init__(self, inner: Sampler, service: VerifiersService, is_owner: bool = False) -> None:
        self.has_own_weights = inner.has_own_weights
        self.inner, self.service, self.is_owner = inner, service, is_owner

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        """One conversation for each sample of each prompt, or an error and none.

        Raises:
            RunError: the worker or one of the rollouts failed.
        """
        service, rollouts = self.service, _opened(request)
        endpoint = service.endpoint(request.sampling)
        work = service.order(endpoint.url, rollouts, request.sampling.max_new_tokens)
        replies = service.worker.run(work)
        pump = threading.Thread(target=_pump, args=(replies, endpoint.events.put), name="verifiers")
        pump.start()
        with ExitStack() as stack:
            stack.callback(pump.join)
            with ExitStack() as on_failure:
                on_failure.callback(service.stop)
                _Step(self.inner, service, request, endpoint, rollouts).run()
                on_failure.pop_all()
        return [self._rollout(rollout) for rollout in rollouts.values()]

    def cancel(self) -> None:
        """End a draw that another thread waits for."""
        if isinstance(self.inner, VLLMServerSampler):
            self.inner.cancel()
        self.service.stop()

    def close(self) -> None:
        """Release the engine's memory; the owner ends worker and endpoint."""
        if self.is_owner:
            self.service.close()
        self.inner.close()

    def _rollout(self, rollout: _Open) -> Rollout:
        if rollout.traced is None:
            raise RunError(
                f"the worker of verifiers gave no trace of task {rollout.prompt.id}. Nothing of "
                "this step was kept; run the command again to continue."
            )
        sampled, reward = Sampled(rollout.turns, rollout.is_cut), self.service.data.success_reward
        prompt, sample, tokenizer = rollout.prompt, rollout.sample, self.service.tokenizer
        return to_rollout(tokenizer, prompt, sample, rollout.traced, sampled, reward)


def _opened(request: RolloutRequest) -> dict[str, _Open]:
    """All samples of the first prompt, then those of the second, by their names."""
    prompts, num_samples = request.prompts, request.sampling.num_samples
    first = request.first_sample
    if first is None:
        first = earlier_samples(prompts, num_samples)
    return {
        f"{i}-{s}": _Open(prompts[i], s, first[i] + s)
        for i in range(len(prompts))
        for s in range(num_samples)
    }


def _pump(replies: Iterator[Any], put: Callable[[Any], None]) -> None:
    """Pass on the worker's replies, or its failure; then None."""
    try:
        for reply in replies:
            put(reply)
        put(None)
    except TutelageError as error:
        put(error)
    except (OSError, ValueError) as error:
        put(RunError(f"the worker of verifiers cannot be read: {error}. Run the command again."))


class _Step:
    """The rollouts of one request, from the first turn to the last trace."""

    def __init__(
        self,
        inner: Sampler,
        service: VerifiersService,
        request: RolloutRequest,
        endpoint: Endpoint,
        rollouts: dict[str, _Open],
    ) -> None:
        self.inner, self.data, self.request = inner, service.data, request
        self.tokenizer, self.context_limit = service.tokenizer, service.context_limit
        self.endpoint, self.rollouts = endpoint, rollouts
        self.names: dict[str, str] = {}
        """Rollouts by the sessions of their traces."""
        self.first: dict[str, int] = {}
        """Ids of the first request of every session: its prompt."""
        self.used: Counter[str] = Counter()
        """Tokens sampled so far in every session."""
        self.unknown: list[Asked] = []
        """Requests of sessions that the worker has not yet announced."""
        self.is_done = False

    def run(self) -> None:
        """Answer requests until the worker has reported every rollout.

        Raises:
            RunError: it failed, sent nothing in time, or asked for what cannot be sampled.
        """
        while True:
            asked = self._gathered()
            if self.is_done:
                return
            self._answer(asked)

    @property
    def _num_open(self) -> int:
        left = sum(rollout.traced is None for rollout in self.rollouts.values())
        return min(left, self.data.num_concurrent)

    def _gathered(self) -> list[Asked]:
        """Requests that are sampled together: of all open rollouts, or of those that came."""
        asked: list[Asked] = []
        while not self.is_done and (not asked or len(asked) < self._num_open):
            try:
                event = self.endpoint.events.get(timeout=_GRACE_S if asked else self.data.timeout_s)
            except queue.Empty:
                if asked:
                    break
                raise RunError(
                    f"data.environment {self.data.environment!r} asked for no turn and ended no "
                    f"rollout within {self.data.timeout_s:g} s. Nothing of this step was kept. "
                    "Raise data.timeout_s if it needs longer, or check the environment."
                ) from None
            asked += self._noted(event)
        return asked

    def _noted(self, event: Any) -> list[Asked]:
        """Note what happened; the requests that can be answered now."""
        if isinstance(event, TutelageError):
            raise event
        if isinstance(event, Refused):
            raise RunError(
                f"data.environment {self.data.environment!r} made {event.reason}. Nothing of this "
                "step was kept. Leave sampling to [sampling], and see data.renderer."
            )
        if isinstance(event, Asked):
            if event.session in self.names:
                return [event]
            self.unknown.append(event)
        elif isinstance(event, Began):
            self._rollout(event.name)
            self.names[event.session] = event.name
            known = [asked for asked in self.unknown if asked.session == event.session]
            self.unknown = [asked for asked in self.unknown if asked not in known]
            return known
        elif isinstance(event, TracedRollout):
            self._rollout(event.name).traced = event
            if self.request.progress is not None:
                self.request.progress(1)
        else:
            self.is_done = True
        return []

    def _rollout(self, name: str) -> _Open:
        if name not in self.rollouts:
            raise RunError(
                f"the worker of verifiers reported a rollout {name[:40]!r} that was not ordered. "
                "Nothing of this step was kept; run the command again to continue."
            )
        return self.rollouts[name]

    def _answer(self, asked: Sequence[Asked]) -> None:
        """Sample a turn for each request that has tokens left."""
        left: list[tuple[Asked, int]] = []
        for one in sorted(asked, key=lambda one: (self.names[one.session], one.ids)):
            most = self._num_left(one)
            if most > 0:
                left.append((one, most))
            else:
                self.rollouts[self.names[one.session]].is_cut = True
                one.answer(TOKEN_LIMIT)
        for group in _groups(left, self.context_limit):
            sampled = self._sampled([one for one, _ in group], max(most for _, most in group))
            for (one, most), longest in zip(group, sampled, strict=True):
                turn = _prefix(self.tokenizer, longest, most)
                self.used[one.session] += len(turn.completion_ids)
                self.rollouts[self.names[one.session]].turns.append(turn)
                one.answer(Turn(turn.completion_ids, turn.logprobs, turn.is_truncated))

    def _num_left(self, one: Asked) -> int:
        """Most tokens of a turn; 0 or less where the conversation has reached a limit."""
        first = self.first.setdefault(one.session, len(one.ids))
        inserted = len(one.ids) - first - self.used[one.session]
        if inserted > self.data.max_inserted_tokens:
            return 0
        left = self.request.sampling.max_new_tokens - self.used[one.session]
        return min(n for n in (left, self.data.max_turn_tokens or left, one.max_tokens or left))

    def _sampled(self, group: Sequence[Asked], most: int) -> list[Rollout]:
        request = RolloutRequest(
            [Prompt(self._key(one), "") for one in group],
            replace(self.request.sampling, num_samples=1, max_new_tokens=most),
            self.request.seed,
            [0] * len(group),
            self.request.record_hidden,
            prompt_ids=[one.ids for one in group],
        )
        return self.inner.sample(request)

    def _key(self, one: Asked) -> str:
        """Names the random numbers of a turn, together with the seed."""
        rollout = self.rollouts[self.names[one.session]]
        times = rollout.asked[one.ids]
        rollout.asked[one.ids] += 1
        digest = hashlib.blake2b(repr(one.ids).encode(), digest_size=16).hexdigest()
        return f"{rollout.prompt.id} {rollout.number} {digest} {times}"


def _groups(
    left: Sequence[tuple[Asked, int]], context_limit: int | None
) -> Iterator[list[tuple[Asked, int]]]:
    """Requests with their limits, by what is sampled together: all, with the largest limit.

    Those that would not fit the context with that limit are sampled after the others.
    """
    while left:
        largest = max(most for _, most in left)
        group: list[tuple[Asked, int]] = []
        others: list[tuple[Asked, int]] = []
        for one, most in left:
            fits = context_limit is None or len(one.ids) + largest <= context_limit
            (group if fits or most == largest else others).append((one, most))
        yield group
        left = others


def _prefix(tokenizer: PreTrainedTokenizerBase, turn: Rollout, most: int) -> Rollout:
    """What a turn is under a smaller limit: tokens depend on none, so its first ones."""
    if len(turn.completion_ids) <= most:
        return turn
    ids = turn.completion_ids[:most]
    return replace(
        turn,
        completion_ids=ids,
        is_truncated=True,
        logprobs=turn.logprobs[:most],
        text=decode(tokenizer, ids),
        hidden=None if turn.hidden is None else turn.hidden[:most],
    )
