"""Where the completions of the steps come from, as configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from tutelage.config.bounds import STRICT, require, require_counts, require_least
from tutelage.config.conversations import ConversationData
from tutelage.config.method import needs_sampler
from tutelage.config.models import TeacherConfig
from tutelage.config.sampling import TransformersEngine, VLLMServer

if TYPE_CHECKING:
    from tutelage.config.schema import Config


@dataclass(frozen=True)
class LiveRollouts:
    """The student's present weights sample the completions of every step."""

    __pydantic_config__ = STRICT
    source: Literal["live"] = "live"
    teacher_prefix_tokens: int = 0
    """First tokens of every completion that the teacher samples in step 1, behind which the student
    goes on; context, never trained on. 0 is none."""
    teacher_prefix_steps: int = 0
    """Steps over which they become fewer, linearly; all later steps have none."""

    def __post_init__(self) -> None:
        require_counts("rollouts.", self.__dict__, teacher_prefix_tokens=0, teacher_prefix_steps=0)
        tokens, steps = self.teacher_prefix_tokens, self.teacher_prefix_steps
        rule, hint = "at least 1 with rollouts.teacher_prefix_steps", "Or leave both out."
        require(tokens > 0 or not steps, "rollouts.teacher_prefix_tokens", rule, tokens, hint)
        rule = "at least 1 with rollouts.teacher_prefix_tokens"
        require(steps > 0 or not tokens, "rollouts.teacher_prefix_steps", rule, steps, hint)

    def prefix_tokens(self, step: int) -> int:
        """Tokens of every completion that the teacher samples in a step (from 1), rounded up:

        ceil(teacher_prefix_tokens · max(0, 1 − (step − 1) / teacher_prefix_steps)).
        """
        steps = self.teacher_prefix_steps
        left = max(0, steps - (step - 1))
        return -(-self.teacher_prefix_tokens * left // max(steps, 1))


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
    """Most bytes that the store may take of the disk, by an estimate for completions of full
    length."""

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


def prefix_tokens(rollouts: RolloutsConfig, step: int) -> int:
    """Most tokens of every completion of a step (from 1) that the teacher samples."""
    return rollouts.prefix_tokens(step) if isinstance(rollouts, LiveRollouts) else 0


def has_teacher_prefix(rollouts: RolloutsConfig) -> bool:
    """Whether the teacher samples the first tokens of some steps' completions."""
    return prefix_tokens(rollouts, 1) > 0


def has_older_weights(config: Config) -> bool:
    """Whether weights from before the step may have sampled its completions."""
    is_stored = not isinstance(config.rollouts, LiveRollouts)
    return is_stored or _is_ahead(config)


def _is_ahead(config: Config) -> bool:
    """Whether a server samples the completions of the next step during the present one."""
    return isinstance(config.engine, VLLMServer) and bool(config.engine.max_staleness)


def require_rollouts(config: Config) -> None:
    """What works with completions that are not those of a step's student alone.

    Raises:
        ConfigError: another table does not fit.
    """
    if isinstance(config.rollouts, LiveRollouts):
        if has_teacher_prefix(config.rollouts):
            _require_sampling_teacher(config, config.rollouts)
        return
    rollouts, engine = config.rollouts, config.engine
    key, name = "rollouts.source", rollouts.source
    is_single, hint = not isinstance(config.data, ConversationData), "Conversations are live."
    require(is_single, key, f"live with data.kind = {config.data.kind}", name, hint)
    hint = "Stored rollouts are not sampled ahead."
    require(not _is_ahead(config), key, "live with engine.max_staleness = 1", name, hint)
    is_own = isinstance(rollouts, MixedRollouts) and not isinstance(engine, TransformersEngine)
    hint = "Mixed rollouts are sampled by engine.kind = transformers."
    require(not is_own, key, f"live or stored with engine.kind = {engine.kind}", name, hint)
    is_ratio = rollouts.path is not None and needs_sampler(config.objective)
    rule = f"left out with objective.kind = {config.objective.kind}"
    hint = "Its ratio needs the log-probabilities of what sampled, which a file lacks."
    require(not is_ratio, "rollouts.path", rule, rollouts.path, hint)
    temperature = config.sampling.temperature
    is_warm = needs_sampler(config.objective) and temperature != 1
    rule = f"1 with {key} = {name} and objective.kind = {config.objective.kind}"
    hint = "Its ratio is to probabilities at temperature 1."
    require(not is_warm, "sampling.temperature", rule, temperature, hint)
    if stores_teacher(rollouts):
        _require_teacher_states(config)


def _require_teacher_states(config: Config) -> None:
    """What needs no teacher once its hidden states are stored."""
    teacher, every = config.teacher, config.recording.every
    with_states = "with rollouts.teacher_states"
    hint = "A snapshot needs the teacher."
    require(not every, "recording.every", f"0 {with_states}", every, hint)
    hint = "Leave rollouts.teacher_states out."
    policy = teacher.stop_token
    rule = f"map or refuse {with_states}"
    require(policy != "class", "teacher.stop_token", rule, policy, hint)
    kind, sharding = teacher.kind, teacher.sharding
    require(kind == "local", "teacher.kind", f"local {with_states}", kind, hint)
    require(sharding == "none", "teacher.sharding", f"none {with_states}", sharding, hint)


def _require_sampling_teacher(config: Config, rollouts: LiveRollouts) -> None:
    """A teacher that samples here, with the student's tokenizer, before a student that does."""
    teacher, engine, data = config.teacher, config.engine, config.data
    key, tokens = "rollouts.teacher_prefix_tokens", rollouts.teacher_prefix_tokens
    most = config.sampling.max_new_tokens
    hint = "The student's tokens follow."
    require(tokens < most, key, f"below sampling.max_new_tokens = {most}", tokens, hint)
    hint = "Its model has to be here, whole, with the student's tokenizer."
    kind, sharding = teacher.kind, teacher.sharding
    require(kind == "local", key, f"0 with teacher.kind = {kind}", tokens, hint)
    require(sharding == "none", key, f"0 with teacher.sharding = {sharding}", tokens, hint)
    is_same = not isinstance(teacher, TeacherConfig) or teacher.vocabulary == "same"
    require(is_same, key, "0 with teacher.vocabulary = aligned", tokens, hint)
    require(not config.teachers, key, "0 with teachers", tokens, "One teacher begins them all.")
    hint = "Behind a prefix, engine.kind = transformers samples."
    is_own = isinstance(engine, TransformersEngine)
    require(is_own, key, f"0 with engine.kind = {engine.kind}", tokens, hint)
    is_single, hint = not isinstance(data, ConversationData), "Only single answers have a prefix."
    require(is_single, key, f"0 with data.kind = {data.kind}", tokens, hint)
