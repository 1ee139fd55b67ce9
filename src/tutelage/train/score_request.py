"""What `tutelage score` is asked for, and the completions that it scores."""

from __future__ import annotations

import difflib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tutelage.config.schema import Config
from tutelage.core import RULES
from tutelage.data.columns import notes_of
from tutelage.data.prompts import load_completions
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError, DataError
from tutelage.models.tokenizers import encode_completion, encode_prompt
from tutelage.rollout.request import RolloutRequest
from tutelage.setup.components import Components, agent_of
from tutelage.setup.inputs import prompt_format, told_fields
from tutelage.setup.phases import PhaseCallback, no_log, no_phases
from tutelage.setup.shares import ALONE, Shares


@dataclass(frozen=True)
class ScoreRequest:
    """What `tutelage score` is asked for."""

    num_prompts: int = 8
    """Held-out prompts that the student completes; not used with `completions`."""
    rules: tuple[str, ...] = ()
    """Selection rules whose importance and choice each row reports."""
    keep: float = 0.2
    """Budget of the rules, in (0, 1]."""
    completions: str | None = None
    """JSONL file of prompts with completions to score instead of sampling."""
    num_top: int = 0
    """Likeliest tokens of student and teacher to return for every row."""

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ConfigError(f"--num-prompts must be at least 1, got {self.num_prompts}.")
        if not 0.0 < self.keep <= 1.0:
            raise ConfigError(f"--keep must be in (0, 1], got {self.keep}.")
        unknown = [rule for rule in self.rules if rule not in RULES]
        if unknown:
            near = difflib.get_close_matches(unknown[0], RULES, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            names = ", ".join(RULES)
            raise ConfigError(f"--rules must be among {names}, got {unknown[0]!r}.{hint}")


def rollouts_of(
    config: Config,
    components: Components,
    request: ScoreRequest,
    on_phase: PhaseCallback = no_phases,
    log: Callable[[str], None] = no_log,
    shares: Shares = ALONE,
) -> dict[int, Rollout]:
    """The given completions, or the student's own of held-out prompts, by the run's engine.

    Args:
        config: names data and sampling.
        components: the student, which has all weights, and its task.
        request: which completions.
        on_phase: told what is being done.
        log: receives a line for what was left out of the prompts' records.
        shares: the processes that share the completions.

    Returns:
        Those of this process's share, by their indices among all.

    Raises:
        DataError: the file, or a completion in it, cannot be used.
    """
    if request.completions is not None:
        pairs = load_completions(
            request.completions, prompt_format(config.data, told_fields(config))
        )
        prompts = list({prompt.id: prompt for prompt, _ in pairs}.values())
        rollouts = shares.apart(partial(_given_of, components, pairs, shares))
    else:
        prompts = components.task.held_out(request.num_prompts)
        rollouts = _sampled(config, components, prompts, on_phase, shares)
    for note in notes_of(prompts):
        log(f"warning: {note}")
    return rollouts


def _sampled(
    config: Config,
    components: Components,
    prompts: Sequence[Prompt],
    on_phase: PhaseCallback,
    shares: Shares,
) -> dict[int, Rollout]:
    """All samples of the first prompt, then those of the second."""
    k, mine = config.sampling.num_samples, shares.mine(len(prompts))
    request = RolloutRequest(
        [prompts[i] for i in mine],
        config.sampling,
        (config.seed, 0),
        progress=shares.progress(on_phase, "sampling: completions", len(prompts) * k),
        agent=agent_of(config, components.task),
    )
    with shares.uninterrupted(components.sampler.has_own_weights):
        rollouts = shares.apart(partial(components.sampler.sample, request))
    components.forget_draws()
    places = [i * k + sample for i in mine for sample in range(k)]
    return dict(zip(places, rollouts, strict=True))


def _given_of(
    components: Components, pairs: Sequence[tuple[Prompt, str | list[int]]], shares: Shares
) -> dict[int, Rollout]:
    number: dict[str, Iterator[int]] = defaultdict(itertools.count)
    samples = [next(number[prompt.id]) for prompt, _ in pairs]
    return {
        i: _given(components, pairs[i][0], samples[i], pairs[i][1]) for i in shares.mine(len(pairs))
    }


def _given(
    components: Components, prompt: Prompt, sample: int, completion: str | list[int]
) -> Rollout:
    ids = completion
    if isinstance(ids, str):
        ids = encode_completion(components.tokenizer, ids)
    beyond = [i for i in ids if i >= components.student.vocab_size]
    if beyond or not ids:
        raise DataError(
            f"completion of prompt {prompt.id!r} must have ids from 0 to "
            f"{components.student.vocab_size - 1}, got {beyond[:1] or 'none'}."
        )
    prompt_ids = encode_prompt(components.tokenizer, prompt, components.enable_thinking)
    return Rollout(prompt, sample, tuple(prompt_ids), tuple(ids))
