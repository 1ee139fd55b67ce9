"""What stored rollouts take of a disk, before they are sampled."""

from __future__ import annotations

from tutelage.config.rollouts import LiveRollouts
from tutelage.config.schema import Config

_TOKEN_BYTES = 36
"""A sampled token in a line of JSON: its id, its log-probability, its text."""
_GIVEN_TOKEN_BYTES, _PROMPT_TOKEN_BYTES = 14, 8
_LINE_BYTES = 512
"""The other keys of a line."""


def stored_rollout_bytes(config: Config, prompt_tokens: int, num_steps: int) -> int:
    """Most bytes of the completions of so many steps, were each as long as it may be.

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
