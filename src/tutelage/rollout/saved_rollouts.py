"""Rollouts as lines of JSON, to be read again with the prompts they belong to."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from tutelage.data.types import Conversation, Outcome, Prompt, Rollout

_APART = ("prompt", "hidden", "conversation")
_TUPLES = ("prompt_ids", "completion_ids", "logprobs", "is_generated")


def to_line(rollout: Rollout) -> str:
    """All of a rollout but its prompt, of which only the id is kept, and its hidden states."""
    names = [field.name for field in fields(Rollout) if field.name not in _APART]
    talk = None if rollout.conversation is None else asdict(rollout.conversation)
    record = {name: getattr(rollout, name) for name in names}
    record |= {"prompt_id": rollout.prompt.id, "conversation": talk}
    return json.dumps(record, allow_nan=False)


def from_line(line: str, prompt: Prompt) -> Rollout | None:
    """The rollout of a prompt; None if it is of another."""
    record: dict[str, Any] = json.loads(line)
    if record.pop("prompt_id") != prompt.id:
        return None
    talk = record.pop("conversation")
    if talk is not None:
        outcome = Outcome(**talk.pop("outcome"))
        talk = Conversation(messages=tuple(talk.pop("messages")), outcome=outcome, **talk)
    record |= {name: tuple(record[name]) for name in _TUPLES}
    return Rollout(prompt=prompt, conversation=talk, **record)
