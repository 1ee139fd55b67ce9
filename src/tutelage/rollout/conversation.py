"""Conversations of a batch: whenever the model ends a turn, its environment answers.

Token in, token out: what the model generated stays as it was sampled and is never tokenized again.
The ids that stand between two turns are the chat template's own (`TurnTemplate`); the model reads
them and is never supervised on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from tutelage.config.conversations import ConversationData
from tutelage.data.types import Prompt, Rollout, Turn
from tutelage.envs.environment import Opening, Reply
from tutelage.models.chat.tool_format import format_of, parse_calls
from tutelage.models.chat.tool_prompt import with_tools
from tutelage.models.chat.turn_template import turn_template
from tutelage.models.forward import Ids
from tutelage.models.tokenizers import decode, encode_prompt
from tutelage.rollout.dialogue import Dialogue, answer_turns, open_dialogues
from tutelage.rollout.request import Agent, OpenRollout, RolloutRequest, to_rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


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
        self._dialogues: dict[int, Dialogue] = {}
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
        opened = open_dialogues(self.agent, prompts, keys)
        self._dialogues = {i: dialogue for i, (dialogue, _) in enumerate(opened)}
        pairs = zip(prompts, opened, strict=True)
        return [self._encode(prompt, opening) for prompt, (_, opening) in pairs]

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
        dialogues = [self._dialogue(row) for row in rows]
        replies = answer_turns(dialogues, turns, self.limits.tool_timeout_s)
        pairs = zip(rows, replies, strict=True)
        return [self._inserted(row, reply) if reply else None for row, reply in pairs]

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
            conversation=dialogue.record(self.limits.tool_timeout_s),
        )

    def _dialogue(self, row: OpenRollout) -> Dialogue:
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
        dialogue.add_turn(text)
        if tokens[-1] not in self.stops:
            dialogue.is_truncated = True
            return None
        return Turn(text, parse_calls(self.format, text, row.request.thought))

    def _inserted(self, row: OpenRollout, reply: Reply) -> Ids | None:
        """What to insert behind a turn; None where the conversation ends with it."""
        dialogue = self._dialogue(row)
        if not reply.messages:
            return None
        ids = self.template.between(reply.messages, dialogue.tools, row.request.prompt.id)
        num_inserted = sum(len(inserted) for _, inserted in row.inserted) + len(ids)
        if (
            dialogue.num_turns >= self.limits.max_turns
            or len(row.tokens) >= self.max_new_tokens
            or num_inserted > self.limits.max_inserted_tokens
        ):
            dialogue.cut_off()
            return None
        return ids


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
