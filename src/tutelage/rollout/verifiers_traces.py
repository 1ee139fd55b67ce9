"""From the traces of verifiers to rollouts: ids and mask as they are, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

import torch

from tutelage.data.types import Conversation, Message, Outcome, Prompt, Rollout
from tutelage.envs.verifiers import Branch, Trace, TracedMessage, TracedRollout
from tutelage.errors import RunError
from tutelage.models.tokenizers import decode
from tutelage.rollout.verifiers_endpoint import TOKEN_LIMIT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampled:
    """What the endpoint sampled for one rollout."""

    turns: Sequence[Rollout]
    """Every answer, in the order of the requests; their ids are what the student generated."""
    is_cut: bool
    """A further turn was denied because a limit of tokens was reached."""


def to_rollout(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    sample: int,
    traced: TracedRollout,
    sampled: Sampled,
    success_reward: float,
) -> Rollout:
    """The record of a rollout; the first sampled token ends its prompt.

    A step has a fixed number of completions, so a rollout is one branch of one trace: where
    history was rewritten, or several agents are trained, there is none to be had.

    Raises:
        RunError: the rollout failed, is not one branch, or has other ids than were sampled.
    """
    trace = _only_trace(prompt, traced, sampled)
    branch = trace.branches[0]
    turns = _turns_of(prompt, branch, sampled.turns)
    start = branch.sampled_mask.index(True)
    logprobs = tuple(x for turn in turns for x in turn.logprobs)
    if tuple(compress(branch.logprobs, branch.sampled_mask)) != logprobs:
        raise _refusal(prompt, "has other log-probabilities than were sampled")
    hidden = [turn.hidden for turn in turns if turn.hidden is not None]
    return Rollout(
        prompt=prompt,
        sample=sample,
        prompt_ids=tuple(branch.token_ids[:start]),
        completion_ids=tuple(branch.token_ids[start:]),
        is_truncated=trace.is_truncated or sampled.is_cut,
        logprobs=logprobs,
        text=turns[-1].text,
        thought=turns[-1].thought,
        hidden=torch.cat(hidden) if hidden else None,
        is_generated=tuple(branch.sampled_mask[start:]),
        conversation=_conversation(tokenizer, trace, branch, turns, success_reward),
        replica=turns[0].replica if len({turn.replica for turn in turns}) == 1 else None,
    )


def _only_trace(prompt: Prompt, traced: TracedRollout, sampled: Sampled) -> Trace:
    errors = [error for error in (traced.error, *(t.error for t in traced.traces)) if error]
    for error in errors:
        if not (sampled.is_cut and _is_denial(error)):
            raise _refusal(prompt, f"failed: {error}")
    if len(traced.traces) != 1:
        raise _refusal(
            prompt,
            f"has {len(traced.traces)} traces of agents that are trained, and must have one",
            "Make the others untrainable in the environment.",
        )
    trace = traced.traces[0]
    if len(trace.branches) != 1:
        raise _refusal(
            prompt,
            f"has {len(trace.branches)} branches: its history was rewritten between turns",
            "Use a renderer that extends turns (data.renderer) and a harness that does not compact "
            "its history.",
        )
    if not any(trace.branches[0].sampled_mask):
        raise _refusal(prompt, f"has no token that was sampled (it ended with {trace.stop!r})")
    measures = {"the reward": trace.reward, **trace.metrics, **trace.rewards}
    for name, value in measures.items():
        if not math.isfinite(value):
            raise _refusal(prompt, f"has {value} as {name}")
    return trace


def _is_denial(error: str) -> bool:
    """Whether an error is the library's of a denied turn; the rollout was not scored then."""
    return error.startswith("ProviderError: ") and TOKEN_LIMIT in error


def _turns_of(prompt: Prompt, branch: Branch, turns: Sequence[Rollout]) -> list[Rollout]:
    """The turns that a branch consists of; what was sampled for other branches is left out."""
    ids, found = tuple(branch.token_ids), {}
    mask = [False] * len(ids)
    for turn in turns:
        start = len(turn.prompt_ids)
        end = start + len(turn.completion_ids)
        if ids[:start] == turn.prompt_ids and ids[start:end] == turn.completion_ids:
            mask[start:end] = [True] * (end - start)
            found[start] = turn
    if len(branch.logprobs) != len(ids) or mask != branch.sampled_mask:
        raise _refusal(
            prompt,
            "has other ids than were sampled",
            "Use a renderer that extends turns (data.renderer).",
        )
    return [found[start] for start in sorted(found)]


def _conversation(
    tokenizer: PreTrainedTokenizerBase,
    trace: Trace,
    branch: Branch,
    turns: Sequence[Rollout],
    success_reward: float,
) -> Conversation:
    """Messages from the first turn on. A tool's message that begins with `error:`, verifiers' own
    mark, counts as an error."""
    first = next(i for i, message in enumerate(branch.messages) if message.is_sampled)
    following = branch.messages[first:]
    texts = iter([decode(tokenizer, turn.completion_ids) for turn in turns])
    messages = tuple(_message(m, next(texts) if m.is_sampled else m.content) for m in following)
    errors = [m for m in following if m.role == "tool" and m.content.startswith("error:")]
    details: dict[str, float | int | str] = {**trace.metrics, **trace.rewards}
    details["stop"] = trace.stop
    outcome = Outcome(trace.reward, trace.reward >= success_reward, details)
    num_calls = sum(message.num_calls for message in following)
    return Conversation(messages, len(turns), num_calls, len(errors), outcome)


def _message(message: TracedMessage, text: str) -> Message:
    return {"role": message.role, "content": text}


def _refusal(prompt: Prompt, what: str, hint: str = "Check the environment.") -> RunError:
    return RunError(
        f"the rollout of task {prompt.id} {what}. Nothing of this step was kept. {hint}"
    )
