"""Conversations of the scripted agent, as token ids and targets."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from ledger_training import NOT_A_TARGET, Schedule, Shape
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from tutelage.data.types import Prompt
from tutelage.envs.ledger_tools import LedgerToolsTask
from tutelage.envs.ledger_tools_agent import NO_MISTAKES, Mistakes, Piece, ScriptedAgent

_ASKED = "vq0kz7jx"


@dataclass(frozen=True)
class Conversations:
    """Which conversations a model is shown."""

    mistakes: Mistakes = NO_MISTAKES
    """Mistakes that are targets like everything else."""
    reverse: float = 0.0
    """Share of conversations that look up in the reverse order of the prompt."""
    accidents: float = 0.0
    """Share of conversations with mistakes that are context only: the model learns to go on."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines one model."""

    name: str
    summary: str
    stages: tuple[tuple[Schedule, Conversations], ...]
    """What it is trained on, one after the other."""
    shape: Shape = field(default_factory=Shape)
    is_student: bool = False
    """Whether its first stages are those of its teacher."""


def batches(
    tokenizer: PreTrainedTokenizerFast, schedule: Schedule, conversations: Conversations
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """From a step to token ids [B, T] and targets [B, T], in which the agent's tokens count."""
    task = LedgerToolsTask()

    @functools.cache
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def lesson(prompt: Prompt, rng: random.Random) -> tuple[Tensor, Tensor]:
        is_accident = rng.random() < conversations.accidents
        mistakes = conversations.mistakes
        if is_accident:
            mistakes = Mistakes(tools=0.3, sums=0.3, seed=int(rng.random() * 2**30))
        agent = ScriptedAgent(prompt, rng, mistakes, conversations.reverse)
        ids: list[int] = []
        targets: list[int] = []
        for piece, is_agent in conversation(prompt, agent, tokenizer):
            is_target = is_agent and not (is_accident and piece.is_mistake)
            found = encode(piece.text)
            ids += found
            targets += found if is_target else [NOT_A_TARGET] * len(found)
        return torch.tensor(ids), torch.tensor(targets)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{schedule.seed}/{step}")
        prompts = task.prompts(step, schedule.batch_size, seed=schedule.seed)
        pairs = [lesson(prompt, rng) for prompt in prompts]
        pad = float(tokenizer.pad_token_id)
        ids = pad_sequence([ids for ids, _ in pairs], batch_first=True, padding_value=pad)
        targets = [targets for _, targets in pairs]
        return ids, pad_sequence(targets, batch_first=True, padding_value=float(NOT_A_TARGET))

    return batch


def conversation(
    prompt: Prompt, agent: ScriptedAgent, tokenizer: PreTrainedTokenizerFast
) -> list[tuple[Piece, bool]]:
    """A whole conversation as the chat template renders it, and which pieces the agent wrote."""
    environment = LedgerToolsTask().environment()
    opening = environment.start(prompt, 0)
    first = _opening(tokenizer, json.dumps(opening.tools))
    pieces = [(Piece(first.replace(_ASKED, opening.messages[0]["content"])), False)]
    answers: list[str] = []
    while True:
        scripted = agent.act(answers)
        pieces += [(piece, True) for piece in (*scripted.pieces, Piece("<|end|>"))]
        reply = environment.act(scripted.turn)
        if reply.is_done:
            return pieces
        answers = [message["content"] for message in reply.messages]
        shown = "".join(f"<|tool|>{answer}<|end|>" for answer in answers)
        pieces.append((Piece(f"{shown}<|assistant|>"), False))


@functools.cache
def _opening(tokenizer: PreTrainedTokenizerFast, tools: str) -> str:
    """How conversations begin, with a mark for what is asked."""
    messages = [{"role": "user", "content": _ASKED}]
    rendered = tokenizer.apply_chat_template(
        messages, tools=json.loads(tools), add_generation_prompt=True, tokenize=False
    )
    return str(rendered)
