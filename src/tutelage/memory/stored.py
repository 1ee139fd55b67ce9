"""What stored rollouts take of a disk, before they are sampled."""

from __future__ import annotations

from dataclasses import replace

from tutelage.config.rollouts import LiveRollouts, StoredRollouts, stores_teacher
from tutelage.config.schema import Config
from tutelage.memory.plan import Phase

_TOKEN_BYTES = 36
"""A sampled token in a line of JSON: its id, its log-probability, its text."""
_GIVEN_TOKEN_BYTES, _PROMPT_TOKEN_BYTES = 14, 8
_LINE_BYTES = 512
"""The other keys of a line."""


def stored_rollout_bytes(config: Config, prompt_tokens: int, num_steps: int) -> int:
    """About the bytes of the completions of so many steps, were each as long as it may be.

    Texts are counted as English ones; other scripts, which JSON escapes, take more.

    Args:
        config: the run.
        prompt_tokens: length of the longest prompt.
        num_steps: that are to be stored.
    """
    if isinstance(config.rollouts, LiveRollouts):
        return 0
    token = _TOKEN_BYTES if config.rollouts.path is None else _GIVEN_TOKEN_BYTES
    line = prompt_tokens * _PROMPT_TOKEN_BYTES + config.sampling.max_new_tokens * token
    count = num_steps * config.prompts_per_step * config.sampling.num_samples
    return count * (line + _LINE_BYTES)


def stored_state_bytes(config: Config, width: int) -> int:
    """About the bytes of the teacher's hidden states of all steps, `width` numbers a token."""
    rollouts = config.rollouts
    if not isinstance(rollouts, StoredRollouts) or rollouts.teacher_states == "none":
        return 0
    count = config.num_steps * config.prompts_per_step * config.sampling.num_samples
    size = {"float32": 4, "bfloat16": 2}[rollouts.teacher_states]
    return count * config.sampling.max_new_tokens * width * size


def of_steps(config: Config, phase: Phase, head_bytes: int) -> Phase:
    """A phase as the steps have it, which need the teacher's head alone once states are stored."""
    if not stores_teacher(config.rollouts) or phase.name not in ("score", "learn"):
        return phase
    return replace(phase, parts=phase.parts | {"teacher": head_bytes})
