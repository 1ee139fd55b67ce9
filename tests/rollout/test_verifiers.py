"""Rollouts of environments of verifiers: what was sampled is what is trained on, or nothing is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_verifiers
from fake_verifiers import turns_of
from tutelage.config.sampling import SamplingConfig
from tutelage.config.verifiers import VerifiersData
from tutelage.data.batch import collate
from tutelage.data.types import Rollout
from tutelage.envs import verifiers
from tutelage.envs.verifiers import Loading, VerifiersTask, Worker
from tutelage.errors import ConfigError, RunError, TutelageError
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.tokenizers import stop_ids
from tutelage.rollout import verifiers_sampler
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.rollout.verifiers_endpoint import Asked
from tutelage.rollout.verifiers_sampler import VerifiersSampler, VerifiersService, _groups

SAMPLING = SamplingConfig(max_new_tokens=18, num_samples=2)
Make = Callable[..., VerifiersSampler]


class Logging(TransformersSampler):
    """Keeps what it sampled."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.sampled: list[Rollout] = []
        self.sizes: list[int] = []

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        found = super().sample(request)
        self.sampled += found
        self.sizes.append(len(found))
        return found


@pytest.fixture
def make(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(verifiers, "_PROGRAM", Path(fake_verifiers.__file__))
    folder = str(tiny_models / "student")
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    made = []

    def maker(environment: str = "fine", **settings: Any) -> VerifiersSampler:
        data = VerifiersData(environment=environment, **{"max_turn_tokens": 6, **settings})
        worker = Worker(Loading(environment, data.arguments, None, 3, 0, data.timeout_s))
        inner, stops = Logging(model, tokenizer), stop_ids(model, tokenizer)
        service = VerifiersService(worker, tokenizer, "tiny", stops, data)
        made.append(VerifiersSampler(inner, service, is_owner=True))
        return made[-1]

    yield maker
    for sampler in made:
        sampler.close()


def request(sampler: VerifiersSampler, **changes: Any) -> RolloutRequest:
    task = VerifiersTask("fake", sampler.service.worker, 2)
    return replace(RolloutRequest(task.prompts(0, 3, 0), SAMPLING, (0, 1)), **changes)


def test_ids_and_mask_are_those_that_were_sampled(make: Make) -> None:
    sampler = make()
    rollouts = sampler.sample(request(sampler, record_hidden=True))
    assert [(r.prompt.id, r.sample) for r in rollouts] == [
        (p.id, s) for p in request(sampler).prompts for s in range(2)
    ]
    assert isinstance(sampler.inner, Logging)
    sampled = {(t.prompt_ids, t.completion_ids): t.logprobs for t in sampler.inner.sampled}
    assert len(sampled) == 3 * len(rollouts)
    for rollout in rollouts:
        assert rollout.prompt_ids == tuple(fake_verifiers.prompt_ids(int(rollout.prompt.id)))
        found = [sampled.pop(turn) for turn in turns_of(rollout)]
        assert rollout.logprobs == tuple(x for logprobs in found for x in logprobs)
        inserted = [not is_ours for is_ours in rollout.is_generated]
        assert list(compress(rollout.completion_ids, inserted)) == 2 * fake_verifiers.BETWEEN
        assert rollout.hidden is not None
        assert len(rollout.hidden) == len(rollout.generated_ids)
    rows = [id for rollout in rollouts for id in rollout.generated_ids]
    assert collate(rollouts, 0).tokens.tolist() == rows
    assert not sampled


def test_a_conversation_has_its_turns_and_its_score(make: Make) -> None:
    sampler = make(success_reward=2.0, arguments={"reward": 2.0})
    rollout = sampler.sample(request(sampler))[0]
    found = rollout.conversation
    assert found is not None
    roles = ["assistant", "tool", "assistant", "tool", "assistant"]
    assert [message["role"] for message in found.messages] == roles
    assert found.messages[-1]["content"] == rollout.text
    assert (found.num_turns, found.num_tool_calls, found.num_tool_errors) == (3, 3, 1)
    assert (found.outcome.score, found.outcome.is_success) == (2.0, True)
    assert found.outcome.details == {"num_calls": 2.0, "is_right": 1.0, "stop": "agent_completed"}
    sampler = make(success_reward=2.1, arguments={"reward": 2.0})
    other = sampler.sample(request(sampler))[0].conversation
    assert other is not None
    assert not other.outcome.is_success


def test_tokens_do_not_depend_on_when_they_are_asked_for(make: Make) -> None:
    """Nor on the other rollouts, nor on a worker that announces a trace late."""
    first = make()
    wanted = first.sample(request(first))
    assert len({rollout.completion_ids for rollout in wanted}) > 3
    assert isinstance(first.inner, Logging)
    assert first.inner.sizes == [6, 6, 6]  # all that wait are sampled together
    delays = {"0-0": 0.5, "1-1": 0.6, "2-0": 0.4}
    for sampler in (make(arguments={"delays": delays}), make("late"), make(num_concurrent=1)):
        assert ids_of(sampler.sample(request(sampler))) == ids_of(wanted)
    alone = make()
    asked = request(alone)
    asked = replace(asked, prompts=asked.prompts[1:2])
    assert ids_of(alone.sample(asked)) == ids_of(wanted[2:4])


def test_turns_under_different_limits_are_sampled_together(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit of a turn, every rollout has another number of tokens left."""
    monkeypatch.setattr(verifiers_sampler, "_GRACE_S", 60.0)
    limits = {"max_turn_tokens": 0, "arguments": {"num_turns": 4}}
    settings = SamplingConfig(max_new_tokens=40, num_samples=8)
    together, alone = make(**limits), make(num_concurrent=1, **limits)
    asked = request(together, sampling=settings, record_hidden=True)
    found, wanted = together.sample(asked), alone.sample(asked)
    assert isinstance(together.inner, Logging)
    assert isinstance(alone.inner, Logging)
    assert len(together.inner.sizes) <= 4
    assert len(alone.inner.sizes) == len(alone.inner.sampled)
    assert len({len(turn.completion_ids) for turn in alone.inner.sampled}) > 3
    assert sum(map(len, (t.completion_ids for t in together.inner.sampled))) > sum(
        len(rollout.generated_ids) for rollout in wanted
    )  # some turns were cut to their own limits
    for one, other in zip(found, wanted, strict=True):
        assert replace(one, logprobs=()) == replace(other, logprobs=())
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.hidden is not None
        assert other.hidden is not None
        assert len(one.hidden) == len(one.generated_ids)
        torch.testing.assert_close(one.hidden, other.hidden)


def test_requests_that_fit_no_larger_limit_are_sampled_apart() -> None:
    short, long = Asked("a", (1,) * 10, 0), Asked("b", (1,) * 30, 0)
    left = [(short, 30), (long, 10), (short, 20)]
    assert list(_groups(left, None)) == [left]
    assert list(_groups(left, 60)) == [left]
    assert list(_groups(left, 40)) == [[left[0], left[2]], [left[1]]]


def test_seed_and_sample_decide_the_tokens(make: Make) -> None:
    sampler = make()
    wanted = ids_of(sampler.sample(request(sampler)))
    assert ids_of(sampler.sample(request(sampler))) == wanted
    other = ids_of(sampler.sample(request(sampler, seed=(0, 2))))
    assert all(a != b for a, b in zip(other, wanted, strict=True))
    one = SamplingConfig(max_new_tokens=18, num_samples=1)
    second = sampler.sample(request(sampler, sampling=one, first_sample=[1, 1, 1]))
    assert ids_of(second) == wanted[1::2]


def ids_of(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.prompt_ids + rollout.completion_ids for rollout in rollouts]


def test_limits_of_tokens_cut_a_conversation_off(make: Make) -> None:
    long = {"arguments": {"num_turns": 50}}
    whole = make(**long)
    for rollout in whole.sample(request(whole)):
        assert len(rollout.generated_ids) == SAMPLING.max_new_tokens
        assert rollout.is_truncated
        assert rollout.is_generated[-1]
    narrow = make(max_inserted_tokens=3, **long)
    for rollout in narrow.sample(request(narrow)):
        assert rollout.is_generated.count(False) == 3
        assert rollout.is_truncated
        assert rollout.conversation is not None
        assert rollout.conversation.num_turns == 2


def test_an_error_of_scoring_fails_a_conversation_that_was_cut_off(make: Make) -> None:
    sampler = make("error", arguments={"num_turns": 50})
    with pytest.raises(RunError, match="failed: TaskError: no such sum: ProviderError: Error code"):
        sampler.sample(request(sampler))


def test_greedy_samples_are_the_same(make: Make) -> None:
    sampler = make()
    greedy = replace(SAMPLING, temperature=0.0)
    ids = ids_of(sampler.sample(request(sampler, sampling=greedy)))
    assert ids[::2] == ids[1::2]


def test_progress_counts_each_rollout(make: Make) -> None:
    sampler, counts = make(), []
    sampler.sample(request(sampler, progress=counts.append))
    assert counts == [1] * 6


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ("dies", "ended or did not answer: no more memory"),
        ("hangs", "asked for no turn and ended no rollout within 0.2 s"),
        ("no_json", "ended or did not answer"),
        ("other_fields", "a reply that cannot be used: rollout.error: Field required"),
        ("unordered", "reported a rollout '7-7' that was not ordered"),
        ("says_error", "failed: ValueError: no such task"),
        ("forgets", "gave no trace of task"),
        ("error", "failed: TaskError: no such sum"),
        ("two_branches", "has 2 branches: its history was rewritten between turns"),
        ("two_traces", "has 2 traces of agents that are trained"),
        ("no_trace", "has 0 traces"),
        ("other_ids", "has other ids than were sampled"),
        ("inserted_is_sampled", "has other ids than were sampled"),
        ("sampled_is_inserted", "has other ids than were sampled"),
        ("short_mask", "has other ids than were sampled"),
        ("other_logprobs", "has other log-probabilities than were sampled"),
        ("no_ids", "has no token that was sampled"),
        ("other_temperature", "a request with temperature = 0.25, where the run has 1.0"),
    ],
)
def test_what_cannot_be_trained_on_fails_the_step(make: Make, environment: str, part: str) -> None:
    timeout = {"timeout_s": 0.2} if environment == "hangs" else {}
    sampler = make(environment, **timeout)
    asked = request(sampler, sampling=replace(SAMPLING, num_samples=1))
    with pytest.raises(RunError) as error:
        sampler.sample(asked)
    assert part in str(error.value)
    assert "\n" not in str(error.value)
    names = [thread.name for thread in threading.enumerate() if thread.name == "verifiers"]
    assert names == []


def test_after_a_failure_the_next_step_starts_a_worker(make: Make) -> None:
    sampler, good = make("dies"), make()
    with pytest.raises(RunError):
        sampler.sample(request(sampler))
    sampler.service.worker.loading = good.service.worker.loading
    assert ids_of(sampler.sample(request(good))) == ids_of(good.sample(request(good)))


def test_an_environment_that_is_not_there_is_one_line(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"'unknown' failed: ModuleNotFoundError: taskset 'unk"):
        request(make("unknown"))


def test_a_worker_without_verifiers_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "worker.py"
    program.write_text("import no_such_library")
    monkeypatch.setattr(verifiers, "_PROGRAM", program)
    with pytest.raises(ConfigError, match="does not run verifiers: ModuleNotFoundError: No module"):
        Worker(Loading("x", {}, None, 3, 0, 60.0)).tasks()
    with pytest.raises(ConfigError, match="'no/python' is no program"):
        Worker(Loading("x", {}, "no/python", 3, 0, 60.0)).tasks()


def test_another_version_of_verifiers_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "worker.py"
    program.write_text(
        """print('{"ready": true}', flush=True)\ninput()\nprint('{"version": "0.40.1"}')\n"""
    )
    monkeypatch.setattr(verifiers, "_PROGRAM", program)
    with pytest.raises(ConfigError, match=r"has verifiers '0\.40\.1', which is not tested"):
        Worker(Loading("x", {}, None, 3, 0, 60.0)).tasks()


def test_the_worker_gets_no_key_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text("import os, sys; sys.exit(' '.join(sorted(os.environ)))")
    monkeypatch.setattr(verifiers, "_PROGRAM", program)
    monkeypatch.setenv("TUTELAGE_API_KEY", "secret")
    monkeypatch.setenv("VARIABLE_OF_THE_USER", "x")
    with pytest.raises(TutelageError) as error:
        Worker(Loading("x", {}, None, 3, 0, 60.0)).tasks()
    assert "TUTELAGE_API_KEY" not in str(error.value)


def test_held_out_tasks_are_never_trained_on(make: Make) -> None:
    task = VerifiersTask("fake", make(arguments={"num_tasks": 700}).service.worker, 5)
    held_out = {prompt.id for prompt in task.held_out(5)}
    trained = {prompt.id for step in range(4) for prompt in task.prompts(step, 200, 0)}
    assert held_out | trained == {str(i) for i in range(700)}
    assert not held_out & trained
