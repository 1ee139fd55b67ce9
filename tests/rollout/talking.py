"""An environment of a few turns, whose answers depend on what it was told."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from tutelage.config.conversations import LedgerToolsData
from tutelage.data.types import Outcome, Prompt, Turn
from tutelage.envs.environment import Opening, Reply
from tutelage.rollout.request import Agent


@dataclass
class Talk:
    """Answers every turn with letters of a hash of all that it was told; ends by its seed."""

    heard: list[str] = field(default_factory=list)
    num_turns: int = 0

    def start(self, prompt: Prompt, seed: int) -> Opening:
        self.num_turns = 1 + seed % 4
        return Opening(({"role": "user", "content": prompt.id},))

    def act(self, turn: Turn) -> Reply:
        self.heard.append(turn.text)
        if len(self.heard) == self.num_turns:
            return Reply(is_done=True)
        digest = hashlib.sha256(repr(self.heard).encode()).hexdigest()
        letters = "".join(letter for letter in digest if letter.isalpha())[
            : 1 + len(self.heard) * 3
        ]
        return Reply(({"role": "tool", "name": "f", "content": letters},), num_errors=1)

    def score(self) -> Outcome:
        return Outcome(
            len(self.heard) / 4, len(self.heard) == self.num_turns, {"n": self.num_turns}
        )


def agent(**limits: float) -> Agent:
    return Agent(Talk, LedgerToolsData(**{"max_turns": 8, **limits}))  # type: ignore[arg-type]
