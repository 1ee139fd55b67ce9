"""Conversations of a batch: whenever the model ends a turn, its environment answers.

Token in, token out: what the model generated stays as it was sampled and is never tokenized again.
The ids that stand between two turns are the chat template's own (`TurnTemplate`); the model reads
them and is never supervised on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from tutelage.config.conversations import ConversationData
from tutelage.data.types import Conversation, Message, Outcome, Prompt, Rollout, ToolCall, Turn
from tutelage.envs.environment import Environment, Opening, Reply
from tutelage.envs.guard import Failure, attempt_all
from tutelage.errors import RunError
from tutelage.models.forward import Ids
from tutelage.models.tokenizers import decode, encode_prompt
from tutelage.models.tool_format import format_of, parse_calls
from tutelage.models.tool_prompt import with_tools
from tutelage.models.turn_template import turn_template
from tutelage.rollout.request import Agent, OpenRollout, RolloutRequest, to_rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass
class _Dialogue:
    """One conversation under way."""

    environment: Environment
    tools: Sequence[dict[str, object]]
    messages: list[Message] = field(default_factory=list)
    num_turns: int = 0
    num_calls: int = 0
    num_errors: int = 0
    is_truncated: bool = False
    lost: str = ""
    """Why its environment answers no more; "" while it does."""


class Conversations:
    """The conversations of one batch, each with an environment of its own.

    Args:
        agent: environments, and how long a conversation may become.
        tokenizer: the model's tokenizer.
        stops: ids that end a turn.
        max_new_tokens: most generated ids of a conversation.
        enable_thinking: passed to the chat template when not None.

    Raises:
        TutelageError: the chat template cannot be continued turn by turn.
    """

    def __init__(
        self,
        agent: Agent,
        tokenizer: PreTrainedTokenizerBase,
        stops: AbstractSet[int],
        max_new_tokens: int,
        enable_thinking: bool | None = None,
    ) -> None:
        self.agent = agent
        self.limits: ConversationData = agent.limits
        self.tokenizer = tokenizer
        self.stops = stops
        self.max_new_tokens = max_new_tokens
        self.enable_thinking = enable_thinking
        self.template = turn_template(tokenizer, stops, enable_thinking)
        self.format = format_of(tokenizer, self.limits.tool_format)
        self._dialogues: dict[int, _Dialogue] = {}
        self._encoded: dict[str, Ids] = {}

    def start(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Ids]:
        """Open one conversation a prompt; each is named by its index here.

        Args:
            prompts: one for every conversation.
            keys: seeds of their environments.

        Returns:
            The ids that the model reads first.

        Raises:
            RunError: an environment cannot begin.
            DataError: what it says first cannot be encoded.
        """
        environments = [self.agent.environment() for _ in prompts]
        openings: list[Opening | Failure] = _guarded(
            [
                partial(environment.start, prompt, key)
                for environment, prompt, key in zip(environments, prompts, keys, strict=True)
            ],
            self.limits.tool_timeout_s,
        )
        found = []
        for index, opening in enumerate(openings):
            prompt = prompts[index]
            if isinstance(opening, Failure):
                raise RunError(
                    f"the environment of prompt {prompt.id!r} does not start: {opening.reason}. "
                    "Mend the environment, or raise data.tool_timeout_s if it is slow."
                )
            self._dialogues[index] = _Dialogue(environments[index], opening.tools)
            found.append(self._encode(prompt, opening))
        return found

    def num_left(self, row: OpenRollout) -> int:
        """How many more ids the model may generate in its present turn."""
        left = self.max_new_tokens - len(row.tokens)
        limit = self.limits.max_turn_tokens
        return min(left, limit - (len(row.tokens) - row.turn_start)) if limit else left

    def answer(self, rows: Sequence[OpenRollout]) -> list[Ids | None]:
        """Answer the turns that these rows have ended.

        Returns:
            The ids to insert behind each; None where the conversation is over.
        """
        turns = [self._turn(row) for row in rows]
        asked = [i for i, turn in enumerate(turns) if self._reaches_environment(rows[i], turn)]
        replies = _guarded(
            [partial(self._dialogue(rows[i]).environment.act, _of(turns[i])) for i in asked],
            self.limits.tool_timeout_s,
        )
        by_row: dict[int, Reply | Failure] = dict(zip(asked, replies, strict=True))
        return [
            None if turn is None else self._inserted(row, turn, by_row.get(i))
            for i, (row, turn) in enumerate(zip(rows, turns, strict=True))
        ]

    def rollout(self, row: OpenRollout) -> Rollout:
        """The record of a conversation that is over, with its score."""
        dialogue = self._dialogue(row)
        last = row.tokens[row.turn_start :] or row.tokens
        plain = to_rollout(self.tokenizer, row.request, last, row.logprobs, self.stops)
        ids, mask = completion_of(row)
        return replace(
            plain,
            completion_ids=ids,
            is_generated=mask,
            is_truncated=dialogue.is_truncated,
            conversation=Conversation(
                tuple(dialogue.messages),
                dialogue.num_turns,
                dialogue.num_calls,
                dialogue.num_errors,
                self._score(dialogue),
            ),
        )

    def _dialogue(self, row: OpenRollout) -> _Dialogue:
        return self._dialogues[row.request.index]

    def _encode(self, prompt: Prompt, opening: Opening) -> Ids:
        """Ids of an opening; samples of a prompt usually share one."""
        key = json.dumps([opening.messages, opening.tools])
        if key not in self._encoded:
            first = replace(prompt, content=opening.messages, tools=opening.tools)
            first = with_tools(self.tokenizer, first, self.format)
            ids = encode_prompt(self.tokenizer, first, self.enable_thinking)
            self._encoded[key] = tuple(ids)
        return self._encoded[key]

    def _turn(self, row: OpenRollout) -> Turn | None:
        """The turn that a row has ended; None where a limit cut it off."""
        dialogue = self._dialogue(row)
        tokens = row.tokens[row.turn_start :]
        text = decode(self.tokenizer, tokens)
        dialogue.num_turns += 1
        dialogue.messages.append({"role": "assistant", "content": text})
        if tokens[-1] not in self.stops:
            dialogue.is_truncated = True
            return None
        calls = parse_calls(self.format, text, row.request.thought)
        dialogue.num_calls += len(calls)
        return Turn(text, calls)

    def _reaches_environment(self, row: OpenRollout, turn: Turn | None) -> bool:
        return turn is not None and not self._dialogue(row).lost

    def _inserted(self, row: OpenRollout, turn: Turn, reply: Reply | Failure | None) -> Ids | None:
        """What to insert behind a turn; None where the conversation ends with it."""
        dialogue = self._dialogue(row)
        if isinstance(reply, Failure):
            if reply.is_timeout:  # its thread may still change it
                dialogue.lost = reply.reason
            reply = _failed_reply(turn, reply.reason)
        elif reply is None:
            reply = _failed_reply(turn, dialogue.lost)
        dialogue.num_errors += reply.num_errors
        if reply.is_done or not reply.messages:
            return None
        dialogue.messages += reply.messages
        ids = self.template.between(reply.messages, dialogue.tools, row.request.prompt.id)
        num_inserted = sum(len(inserted) for _, inserted in row.inserted) + len(ids)
        if (
            dialogue.num_turns >= self.limits.max_turns
            or len(row.tokens) >= self.max_new_tokens
            or num_inserted > self.limits.max_inserted_tokens
        ):
            dialogue.is_truncated = True
            return None
        return ids

    def _score(self, dialogue: _Dialogue) -> Outcome:
        if dialogue.lost:
            return Outcome(0.0, False, {"environment_error": dialogue.lost})
        (found,) = _guarded([dialogue.environment.score], self.limits.tool_timeout_s)
        if isinstance(found, Failure):
            return Outcome(0.0, False, {"environment_error": found.reason})
        return found


def _of(turn: Turn | None) -> Turn:
    return turn if turn is not None else Turn("")


def _guarded(functions: Sequence[Callable[[], T]], seconds: float) -> list[T | Failure]:
    return attempt_all(functions, seconds) if functions else []


def _failed_reply(turn: Turn, reason: str) -> Reply:
    """What the model reads of an environment that failed or hung; a final answer ends it."""
    error = json.dumps({"error": f"the tools do not answer: {reason}"}, ensure_ascii=False)
    messages = [_tool_message(call, error) for call in turn.calls]
    return Reply(tuple(messages), is_done=not messages, num_errors=max(1, len(messages)))


def _tool_message(call: ToolCall, content: str) -> Message:
    return {"role": "tool", "name": call.name, "content": content}


def conversations_of(
    request: RolloutRequest,
    tokenizer: PreTrainedTokenizerBase,
    stops: AbstractSet[int],
    enable_thinking: bool | None,
) -> Conversations | None:
    """The conversations of a request; None where its completions are single answers.

    Raises:
        TutelageError: the chat template cannot be continued turn by turn.
    """
    if request.agent is None:
        return None
    limit = request.sampling.max_new_tokens
    return Conversations(request.agent, tokenizer, stops, limit, enable_thinking)


def completion_of(row: OpenRollout) -> tuple[Ids, tuple[bool, ...]]:
    """All ids behind the prompt, and whether the model generated each."""
    ids: list[int] = []
    mask: list[bool] = []
    start = 0
    for end, inserted in row.inserted:
        ids += [*row.tokens[start:end], *inserted]
        mask += [True] * (end - start) + [False] * len(inserted)
        start = end
    ids += row.tokens[start:]
    mask += [True] * (len(row.tokens) - start)
    return tuple(ids), tuple(mask)
