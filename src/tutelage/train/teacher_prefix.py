"""Completions of which the teacher samples the first tokens, fewer from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from tutelage.config.rollouts import LiveRollouts
from tutelage.data.types import Rollout
from tutelage.models.tokenizers import decode, stop_ids
from tutelage.rollout.request import RolloutRequest, earlier_samples
from tutelage.rollout.sampler import TransformersSampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tutelage.train.step import Step

_PREFIX_SEED = 6
"""Keeps the random numbers of the teacher's tokens apart from those of the student's."""


class PrefixSource:
    """The teacher samples the first tokens of a step's completions, the student the others.

    A prefix is context as the prompt is: its tokens have no row, so nothing counts, selects or
    trains on them. Once its length has fallen to 0, steps are those of live rollouts.
    """

    has_logprobs = True
    num_stored = 0

    def __init__(self, step: Step, settings: LiveRollouts) -> None:
        self._step, self._settings = step, settings

    def take(self, step: int) -> list[Rollout]:
        """This process's share of the completions of a step."""
        length, request = self._settings.prefix_tokens(step), self._step.request(step)
        prefixes: list[Rollout] = []
        if not length:
            rollouts = self._step.sample(request, step)
        else:
            prefixes = self._prefixes(request, length)
            rest = self._step.sample(continued(request, prefixes, length), step)
            tokenizer = self._step.components.tokenizer
            pairs = zip(prefixes, rest, strict=True)
            rollouts = [joined(tokenizer, prefix, rollout) for prefix, rollout in pairs]
        ranks = self._step.ranks
        counts = [
            ranks.sum(sum(len(rollout.completion_ids) for rollout in found))
            for found in (prefixes, rollouts)
        ]
        self._step.checks |= {
            "teacher_prefix_tokens": length,
            "teacher_prefix_share": counts[0] / max(counts[1], 1),
        }
        return rollouts

    def _prefixes(self, request: RolloutRequest, length: int) -> list[Rollout]:
        """What the teacher samples, of each completion up to `length` tokens."""
        config, components = self._step.config, self._step.components
        teacher, tokenizer = components.teacher, components.tokenizer
        asked = replace(
            request,
            sampling=replace(request.sampling, max_new_tokens=length),
            seed=(*request.seed, _PREFIX_SEED),
            record_hidden=False,
        )
        with teacher.on_device():
            sampler = TransformersSampler(
                teacher.model, tokenizer, config.sampling_batch_size, components.enable_thinking
            )
            found = sampler.sample(asked)
            sampler.close()
            stops = stop_ids(teacher.model, tokenizer)
        stops |= stop_ids(components.student.plain, tokenizer)
        return [before_end(rollout, stops, components.student.vocab_size) for rollout in found]


def before_end(rollout: Rollout, stops: AbstractSet[int], num_ids: int) -> Rollout:
    """The same up to the first id that ends a text, or that is not among the first `num_ids`.

    Behind it the student goes on: no completion is the teacher's alone.
    """
    ids = takewhile(lambda i: i not in stops and i < num_ids, rollout.completion_ids)
    return replace(rollout, completion_ids=tuple(ids), logprobs=())


def continued(request: RolloutRequest, prefixes: Sequence[Rollout], length: int) -> RolloutRequest:
    """A request for the rest of every completion, one sample behind each prefix.

    Args:
        request: for the whole completions.
        prefixes: of each of them, a prompt's side by side.
        length: most tokens of a prefix, which are left to none of the completions.
    """
    sampling, first = request.sampling, request.first_sample
    if first is None:
        first = earlier_samples(request.prompts, sampling.num_samples)
    places = [place for place in range(len(first)) for _ in range(sampling.num_samples)]
    return replace(
        request,
        prompts=[prefix.prompt for prefix in prefixes],
        sampling=replace(sampling, num_samples=1, max_new_tokens=sampling.max_new_tokens - length),
        first_sample=[
            first[place] + prefix.sample for place, prefix in zip(places, prefixes, strict=True)
        ],
        prompt_ids=[prefix.prompt_ids + prefix.completion_ids for prefix in prefixes],
    )


def joined(tokenizer: PreTrainedTokenizerBase, prefix: Rollout, rest: Rollout) -> Rollout:
    """A completion whose first tokens are the prefix, which the student did not generate."""
    ids, count = prefix.completion_ids + rest.completion_ids, len(rest.completion_ids)
    return replace(
        rest,
        sample=prefix.sample,
        prompt_ids=prefix.prompt_ids,
        completion_ids=ids,
        text=decode(tokenizer, ids),
        thought=prefix.thought,
        is_generated=(False,) * len(prefix.completion_ids) + (True,) * count,
    )
