"""Recorded conversations: text between turns up to the cut, outcomes, and whole panels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiny import tiny_config
from tutelage.data.types import Conversation, Outcome, Prompt, Rollout
from tutelage.models.tiny import tiny_tokenizer
from tutelage.rollout.request import RolloutRequest
from tutelage.setup.shares import ALONE
from tutelage.train.snapshot import _between, _panel

TOKENIZER = tiny_tokenizer()
COMPONENTS: Any = SimpleNamespace(tokenizer=TOKENIZER)
ENDED = Conversation((), 3, 2, 1, Outcome(0.5, False, {"n": 2}))


def conversation(*parts: tuple[str, bool]) -> Rollout:
    """A rollout of texts that were generated, or inserted."""
    encoded = [(TOKENIZER.encode(text), is_generated) for text, is_generated in parts]
    ids = tuple(i for part, _ in encoded for i in part)
    mask = tuple(is_generated for part, is_generated in encoded for _ in part)
    prompt = Prompt("a", "a")
    return Rollout(prompt, 0, (1,), ids, is_generated=mask, conversation=ENDED)


def test_text_between_turns_has_its_place_among_the_generated_tokens() -> None:
    rollout = conversation(("abc", True), ("1+2", False), ("de", True), ("3", False), ("f", True))
    assert _between(COMPONENTS, rollout, 6) == {
        "inserted": [[3, "1+2"], [5, "3"]],
        "outcome": {
            "score": 0.5,
            "is_success": False,
            "num_turns": 3,
            "num_tool_errors": 1,
            "details": {"n": 2},
        },
    }


@pytest.mark.parametrize(
    ("num_shown", "places"), [(1, [0]), (2, [0]), (3, [0, 2]), (5, [0, 2]), (6, [0, 2, 6])]
)
def test_text_behind_the_cut_is_not_recorded(num_shown: int, places: list[int]) -> None:
    """What ends a conversation whose tokens were all recorded is."""
    parts = (("1", False), ("ab", True), ("2", False), ("cdef", True), ("3", False))
    found = _between(COMPONENTS, conversation(*parts), num_shown)["inserted"]
    assert [place for place, _ in found] == places


def test_a_conversation_without_a_mask_is_all_generated() -> None:
    prompt = Prompt("a", "a")
    rollout = Rollout(prompt, 0, (1,), (1, 2), conversation=ENDED)
    assert _between(COMPONENTS, rollout, 2)["inserted"] == []
    assert _between(COMPONENTS, Rollout(prompt, 0, (1,), (1, 2)), 2) == {}


class AgentTask:
    """A task whose prompts are answered in conversations."""

    name = "agent"

    def prompts(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        raise NotImplementedError

    def held_out(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        return [Prompt(str(i), "a") for i in range(num_prompts)]

    def grade(self, prompt: Prompt, text: str, is_truncated: bool = False) -> bool | None:
        raise NotImplementedError

    def environment(self) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(("kind", "longest"), [("ledger_tools", 90), ("ledger", 20)])
def test_conversations_of_the_panel_are_sampled_whole(
    tiny_models: Path, tmp_path: Path, kind: str, longest: int
) -> None:
    """Their outcomes would otherwise be those of conversations that the recording cut off."""
    config = tiny_config(
        tiny_models,
        tmp_path,
        data={"kind": kind},
        sampling={"max_new_tokens": 90},
        recording={"every": 1, "num_prompts": 2, "max_new_tokens": 20},
    )
    asked: list[RolloutRequest] = []

    def sample(request: RolloutRequest) -> list[None]:
        asked.append(request)
        return [None] * len(request.prompts)

    sampler = SimpleNamespace(sample=sample)
    components: Any = SimpleNamespace(task=AgentTask(), sampler=sampler, forget_draws=lambda: None)
    _panel(config, components, ALONE)
    assert [request.sampling.max_new_tokens for request in asked] == [longest]
    assert (asked[0].agent is not None) == (kind == "ledger_tools")
