"""Conversations: what is sampled, what is read, what an environment may do, and every limit."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from talking import Talk, agent

from tutelage.config.conversations import LedgerToolsData
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Outcome, Prompt, Rollout, ToolCall, Turn
from tutelage.envs.environment import Environment, Opening, Reply
from tutelage.envs.guard import Failure, attempt_all
from tutelage.envs.tools import reply_to
from tutelage.errors import RunError
from tutelage.models.chat.turn_template import TurnTemplate
from tutelage.models.llama_cpu.decode import FastSlots
from tutelage.models.tiny import tiny_tokenizer
from tutelage.models.tokenizers import decode, stop_ids
from tutelage.rollout import conversation as conversation_module
from tutelage.rollout import slots
from tutelage.rollout.generate import generate
from tutelage.rollout.request import Agent, RolloutRequest

TOKENIZER = tiny_tokenizer()
PROMPTS = [Prompt(letter * (1 + index % 3), letter) for index, letter in enumerate("abcdefgh")]


@pytest.fixture(scope="module")
def model(make_qwen3: Callable[..., Any]) -> Any:
    return make_qwen3(len(TOKENIZER)).double()


def sample(
    model: Any, batch_size: int = 64, is_fast: bool = True, who: Agent | None = None, **options: Any
) -> list[Rollout]:
    limits = {"max_new_tokens": 120, "num_samples": 2} | options
    request = RolloutRequest(
        PROMPTS, SamplingConfig(**limits), (1,), record_hidden=True, agent=who or agent()
    )
    return generate(model, TOKENIZER, request, batch_size, is_fast=is_fast)


def ids_of(rollouts: list[Rollout]) -> list[Any]:
    return [(r.prompt_ids, r.completion_ids, r.is_generated) for r in rollouts]


@torch.no_grad()
def largest_gap(model: Any, rollouts: list[Rollout]) -> float:
    """Of hidden states and log-probabilities, against one pass over each whole sequence."""
    gap = 0.0
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        states = model.base_model(input_ids=ids, use_cache=False)[0][0]
        start = len(rollout.prompt_ids) - 1
        rows = [start + i for i, is_generated in enumerate(rollout.is_generated) if is_generated]
        assert rollout.hidden is not None
        gap = max(gap, float((states[rows] - rollout.hidden).abs().max()))
        log_p = model(input_ids=ids).logits[0, rows].log_softmax(-1)
        own = log_p[torch.arange(len(rows)), list(rollout.generated_ids)]
        gap = max(gap, float((own - torch.tensor(rollout.logprobs)).abs().max()))
    return gap


def spans(rollout: Rollout, is_generated: bool) -> list[tuple[int, ...]]:
    """Runs of ids that were generated, or that were not."""
    pairs = zip(rollout.completion_ids, rollout.is_generated, strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [tuple(token for token, _ in ids) for kind, ids in groups if kind == is_generated]


def test_every_form_of_slots_samples_the_same_conversations(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = sample(model)
    assert max(r.conversation.num_turns for r in fast if r.conversation) == 4
    assert largest_gap(model, fast) < 1e-5
    assert ids_of(sample(model, batch_size=3)) == ids_of(fast)
    short = sample(model, max_new_tokens=40)
    for form in (slots.PlainSlots, slots.AlignedSlots, slots.RecomputedSlots):
        monkeypatch.setitem(slots._KNOWN, model, form)
        for batch_size in (64, 3):
            rollouts = sample(model, batch_size, False, max_new_tokens=40)
            assert ids_of(rollouts) == ids_of(short), form
            assert largest_gap(model, rollouts) < 1e-5


def test_nothing_is_read_twice(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every inserted id goes through the layers once, and no prompt more than once."""
    read: list[int] = []
    prefilled: list[tuple[int, ...]] = []
    extend, batch = FastSlots.extend, FastSlots._prefill_batch

    def counted(self: FastSlots, following: Any) -> None:
        read.extend(len(ids) for _, _, ids in following)
        extend(self, following)

    def listed(self: FastSlots, prompts: Any) -> Any:
        prefilled.extend(prompts)
        return batch(self, prompts)

    monkeypatch.setattr(FastSlots, "extend", counted)
    monkeypatch.setattr(FastSlots, "_prefill_batch", listed)
    rollouts = sample(model, batch_size=3)
    assert sum(read) == sum(r.is_generated.count(False) for r in rollouts) > 100
    assert sorted(prefilled) == sorted({r.prompt_ids for r in rollouts})


def test_generated_ids_stand_as_sampled_between_the_templates_own(model: Any) -> None:
    stops = stop_ids(model, TOKENIZER)
    template = TurnTemplate(TOKENIZER, stops)
    for rollout in sample(model):
        talk = rollout.conversation
        assert talk is not None
        answers = [m for m in talk.messages if m["role"] == "tool"]
        expected = [template.between([answer], (), "p") for answer in answers]
        turns, found = spans(rollout, True), spans(rollout, False)
        said = [m["content"] for m in talk.messages if m["role"] == "assistant"]
        assert said == [decode(TOKENIZER, ids) for ids in turns]
        assert all(ids[-1] in stops for ids in turns[:-1])
        assert found == expected
        assert len(rollout.logprobs) == len(rollout.generated_ids) == rollout.num_tokens


# --- limits ---------------------------------------------------------------------------------------


def test_limits_cut_a_conversation_off(model: Any) -> None:
    free = sample(model)
    turns = [r.conversation.num_turns for r in free if r.conversation]
    for rollout in sample(model, who=agent(max_turns=2)):
        assert rollout.conversation is not None
        assert rollout.conversation.num_turns <= 2
    assert max(turns) > 2
    stops = stop_ids(model, TOKENIZER)
    short = sample(model, who=agent(max_turn_tokens=20))
    for rollout in short:
        turns = spans(rollout, True)
        assert max(map(len, turns)) <= 20
        assert all(ids[-1] in stops for ids in turns[:-1])
        assert rollout.is_truncated == (turns[-1][-1] not in stops)
    assert {r.is_truncated for r in short} == {True, False}
    for rollout in sample(model, max_new_tokens=30):
        assert len(rollout.generated_ids) <= 30
    for rollout, other in zip(sample(model, who=agent(max_inserted_tokens=30)), free, strict=True):
        assert rollout.is_generated.count(False) <= 30
        assert rollout.completion_ids == other.completion_ids[: len(rollout.completion_ids)]
        is_shorter = len(rollout.completion_ids) < len(other.completion_ids)
        assert rollout.is_truncated == (other.is_truncated or is_shorter)


# --- environments that fail -----------------------------------------------------------------------


@dataclass
class Trouble(Talk):
    """Fails in the way that its prompt names, at its second turn."""

    how: str = ""
    num_acts: ClassVar[int] = 0

    def start(self, prompt: Prompt, seed: int) -> Opening:
        self.how = prompt.id[0]
        if self.how == "s":
            raise OSError("no such world")
        super().start(prompt, seed)
        self.num_turns = 4
        return Opening(({"role": "user", "content": "x"},))

    def act(self, turn: Turn) -> Reply:
        Trouble.num_acts += 1
        if len(self.heard) == 1 and self.how == "r":
            self.heard.append("")
            raise ValueError("broken\nin two lines")
        if len(self.heard) == 1 and self.how == "h":
            threading.Event().wait(30)
        return super().act(Turn(turn.text, turn.calls))

    def score(self) -> Outcome:
        if self.how == "c":
            raise KeyError("score")
        if self.how == "n":
            return Outcome(1.0, True, {"match": float("nan")})
        return super().score()


def talk_of(
    model: Any, monkeypatch: pytest.MonkeyPatch, prompt: str, seconds: float = 10
) -> Rollout:
    """One conversation in which every turn has a call."""
    call = (ToolCall("f", {}),)
    monkeypatch.setattr(conversation_module, "parse_calls", lambda *_: call)
    limits = LedgerToolsData(tool_timeout_s=seconds, max_turns=3)
    request = RolloutRequest(
        [Prompt(prompt, "x")],
        SamplingConfig(max_new_tokens=400),
        (3,),
        agent=Agent(Trouble, limits),
    )
    return generate(model, TOKENIZER, request)[0]


def contents(rollout: Rollout) -> list[str]:
    assert rollout.conversation is not None
    return [m["content"] for m in rollout.conversation.messages if m["role"] == "tool"]


def test_an_environment_that_raises_is_an_error_that_the_model_reads(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = talk_of(model, monkeypatch, "r")
    error = '{"error": "the tools do not answer: ValueError: broken in two lines"}'
    assert contents(rollout)[1] == error
    assert error not in contents(rollout)[::2]  # it goes on after the error
    assert rollout.conversation is not None
    assert rollout.conversation.num_tool_errors == 3


def test_half_a_surrogate_pair_can_be_saved(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer: dict[str, str] = {"role": "tool", "name": "f", "content": "a\ud800b"}
    monkeypatch.setattr(Talk, "act", lambda *_: Reply((answer,)))
    rollout = talk_of(model, monkeypatch, "x")
    assert contents(rollout)[0] == r"a\ud800b"
    assert r"a\ud800b" in TOKENIZER.decode(rollout.completion_ids)


def test_an_environment_that_fails_on_a_final_answer_ends_it(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Reply:
        raise SystemExit(3)

    monkeypatch.setattr(Talk, "act", fail)
    for rollout in sample(model):
        assert rollout.conversation is not None
        assert rollout.conversation.num_turns == 1
        assert rollout.conversation.num_tool_errors == rollout.conversation.num_tool_calls == 0


def test_each_function_has_a_limit_of_its_own() -> None:
    """Of functions that together take longer than the limit, only those that do so alone fail."""

    def busy(seconds: float) -> float:
        threading.Event().wait(seconds)
        return seconds

    times = [0.15] * 8 + [30.0] + [0.15] * 8
    found = attempt_all([functools.partial(busy, seconds) for seconds in times], 1)
    assert found[8] == Failure("no answer within 1 s", is_timeout=True)
    assert found[:8] == found[9:] == [0.15] * 8


def test_an_environment_that_hangs_is_lost(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Trouble.num_acts
    rollout = talk_of(model, monkeypatch, "h", seconds=1)
    assert Trouble.num_acts - before == 2  # after it hung, it is asked for nothing
    error = '{"error": "the tools do not answer: no answer within 1 s"}'
    assert contents(rollout)[1:] == [error]  # the third turn is the last, and its answer not read
    assert rollout.conversation is not None
    reason = {"environment_error": "no answer within 1 s"}
    assert rollout.conversation.outcome == Outcome(0.0, False, reason)


def test_a_score_that_raises_is_no_success(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = talk_of(model, monkeypatch, "c").conversation
    assert found is not None
    assert found.outcome == Outcome(0.0, False, {"environment_error": "KeyError: 'score'"})


def test_a_score_that_logs_cannot_hold_is_no_success(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = talk_of(model, monkeypatch, "n").conversation
    assert found is not None
    assert (found.outcome.score, found.outcome.is_success) == (0.0, False)
    assert found.outcome.details == {
        "environment_error": "ValueError: detail 'match' of an outcome must be a finite number or "
        "a text, got nan"
    }
    wrong: list[Any] = [float("inf"), None, "1", [1]]
    for score in wrong:
        with pytest.raises(ValueError, match="the score of an outcome must be a finite number"):
            Outcome(score, True)


def test_an_environment_that_does_not_start_ends_the_step_in_one_line(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match="of prompt 's' does not start: OSError: no such world"):
        talk_of(model, monkeypatch, "s")


def test_a_turn_without_calls_is_the_answer() -> None:
    assert reply_to([], Turn("137")) == Reply(is_done=True)


def test_environments_have_the_protocol() -> None:
    environment: Environment = Trouble()
    assert environment.start(Prompt("x", "x"), 1).messages
