"""Where the completions of the steps come from, as configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from tutelage.config.bounds import STRICT, require, require_least


@dataclass(frozen=True)
class LiveRollouts:
    """The student's present weights sample the completions of every step."""

    __pydantic_config__ = STRICT
    source: Literal["live"] = "live"


@dataclass(frozen=True)
class StoredRollouts:
    """Completions of all steps, stored in the run folder before the first one."""

    __pydantic_config__ = STRICT
    source: Literal["stored"]
    path: str | None = None
    """JSONL or parquet file of completions, such as `tutelage sample` prints with --json; None lets
    the initial student sample them, with the seeds that the steps of a live run have."""
    teacher_states: Literal["none", "float32", "bfloat16"] = "none"
    """Dtype in which the teacher's hidden states are stored with the completions, once; its head
    and they are all that the steps need of it. none runs the teacher in every step."""
    max_bytes: int = 100 << 30
    """Most bytes that the store may take of the disk."""

    def __post_init__(self) -> None:
        require_least("rollouts.", self.__dict__, max_bytes=1)


@dataclass(frozen=True)
class MixedRollouts:
    """A share of every step's prompts gets live completions, the others get stored ones."""

    __pydantic_config__ = STRICT
    source: Literal["mixed"]
    on_policy_share: float
    """GKD's lambda, in [0, 1]: chance of each prompt of a step that the student's present weights
    sample its completions."""
    path: str | None = None
    """As of the stored."""
    max_bytes: int = 100 << 30
    """As of the stored."""

    def __post_init__(self) -> None:
        share, key = self.on_policy_share, "rollouts.on_policy_share"
        require(0 <= share <= 1, key, "in [0, 1]", share, "1 samples all of them live.")
        require_least("rollouts.", self.__dict__, max_bytes=1)


RolloutsConfig: TypeAlias = Annotated[
    LiveRollouts | StoredRollouts | MixedRollouts, Field(discriminator="source")
]


def stores_teacher(rollouts: RolloutsConfig) -> bool:
    """Whether the steps need no teacher but its head."""
    return isinstance(rollouts, StoredRollouts) and rollouts.teacher_states != "none"


def given_path(rollouts: RolloutsConfig) -> str | None:
    """The file of completions, where there is one."""
    return None if isinstance(rollouts, LiveRollouts) else rollouts.path
