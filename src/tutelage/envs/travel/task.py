"""Travel prompts from a counter."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tutelage.data.types import Prompt
from tutelage.envs.environment import Environment
from tutelage.envs.travel.environment import TravelEnvironment, messages_of
from tutelage.envs.travel.generate import LEVELS, World, make_world
from tutelage.errors import ConfigError, DataError

_IDENTITY = re.compile(r"travel([123])-(?:train-(-?\d+)-\d+|(held_out)-(-?\d+))-\d+", re.ASCII)


@dataclass(frozen=True)
class TravelTask:
    """Trips in invented countries, with nine tools and a plan in JSON for an answer.

    The tools have the names and arguments of DeepPlanning's travel domain, and the queries its 38
    kinds of hard constraints; countries, texts, commonsense rules and scores are ours, and nothing
    here is the benchmark. Training and held-out prompts cannot collide, whatever the seeds: a hash
    of the two cities that a trip begins with assigns it to a side, and every text names both.
    """

    level: int = 1
    """1: 2 to 3 days; 2: 4 to 5 days; 3: 6 to 7 days in one or two cities."""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ConfigError(
                f"data.level must be 1, 2 or 3, got {self.level}. "
                "1 has trips of 2 to 3 days, 3 of 6 to 7."
            )

    @property
    def name(self) -> str:
        """Name of the task in configurations, logs and reports."""
        return "travel"

    def prompts(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        """Training prompts of one step: a pure function of (seed, step, position in the list)."""
        return [
            _prompt(f"travel{self.level}-train-{seed}-{step}-{index}")
            for index in range(num_prompts)
        ]

    def held_out(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Evaluation prompts: a pure function of (seed, position), never met in training."""
        return [
            _prompt(f"travel{self.level}-held_out-{seed}-{index}") for index in range(num_prompts)
        ]

    def grade(self, prompt: Prompt, text: str, is_truncated: bool = False) -> bool | None:
        """None: a conversation is graded by its environment."""
        return None

    def environment(self) -> Environment:
        """A new environment, for one conversation."""
        return TravelEnvironment(world_of)


def world_of(prompt: Prompt) -> World:
    """The country and query of a travel prompt, from its id.

    Raises:
        DataError: the id is not one that `TravelTask` gives.
    """
    match = _IDENTITY.fullmatch(prompt.id)
    if match is None:
        raise DataError(f"prompt {prompt.id!r} is not a travel prompt. Use TravelTask.prompts().")
    return make_world(prompt.id, int(match[1]), is_held_out=match[3] is not None)


def _prompt(identity: str) -> Prompt:
    query = world_of(Prompt(identity, "")).query
    return Prompt(identity, messages_of(query))
