"""The shopping task as the rest of the package sees it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tutelage.data.types import Prompt, ToolCall, Turn
from tutelage.envs.environment import AgentTask
from tutelage.envs.shopping import ShoppingTask
from tutelage.envs.shopping.tools import schemas
from tutelage.errors import ConfigError, DataError

TASK = ShoppingTask(2, num_products=60, max_items=2)
PROMPT = TASK.prompts(0, 1, 0)[0]


def test_it_is_an_agent_task_whose_grade_is_the_outcome() -> None:
    assert isinstance(TASK, AgentTask)
    assert TASK.name == "shopping"
    assert TASK.grade(PROMPT, "Your cart is ready.") is None


def test_a_conversation_opens_with_the_prompt_and_all_tools() -> None:
    opening = TASK.environment().start(PROMPT, 0)
    assert opening.messages == PROMPT.content
    assert [message["role"] for message in opening.messages] == ["system", "user"]
    assert "budget" in opening.messages[0]["content"]
    assert opening.tools == PROMPT.tools == schemas()
    assert len(TASK.case(PROMPT).world.products) == 60
    assert len(TASK.case(PROMPT).query.slots) == 2


def test_a_turn_has_an_answer_for_every_call_and_one_without_calls_ends_it() -> None:
    environment = TASK.environment()
    environment.start(PROMPT, 0)
    calls = (ToolCall("get_user_info"), ToolCall("nothing"), ToolCall("get_cart_info"))
    reply = environment.act(Turn("", calls))
    assert not reply.is_done
    assert reply.num_errors == 1
    assert [message["name"] for message in reply.messages] == [call.name for call in calls]
    assert "address" in json.loads(reply.messages[0]["content"])
    ended = environment.act(Turn("Here is your cart."))
    assert ended.is_done
    assert ended.messages == ()
    assert environment.score().score == 0


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"level": 0}, "data.level"),
        ({"level": 4}, "data.level"),
        ({"num_products": 59}, "data.num_products"),
        ({"max_items": 1}, "data.max_items"),
        ({"max_items": 6}, "data.max_items"),
    ],
)
def test_unusable_parameters_are_refused_in_one_line(arguments: dict[str, int], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}[^\n]+got[^\n]+$"):
        ShoppingTask(**arguments)


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        (TASK, Prompt("p", "text")),
        (TASK, replace(PROMPT, id="shopping2-train-0-0")),
        (ShoppingTask(1), PROMPT),
        (TASK, replace(PROMPT, id="shopping2-train-0-0-1")),
        (ShoppingTask(2), PROMPT),
    ],
    ids=["no id", "half an id", "another level", "another text", "other parameters"],
)
def test_prompts_of_other_tasks_are_refused_in_one_line(task: ShoppingTask, prompt: Prompt) -> None:
    with pytest.raises(DataError, match=r"^prompt [^\n]+$"):
        task.environment().start(prompt, 0)


def test_an_environment_that_has_not_begun_says_so() -> None:
    with pytest.raises(DataError, match=r"Call start\(\) first"):
        TASK.environment().score()
