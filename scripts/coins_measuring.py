"""Figures of the embedded coins models on held-out prompts, in float32, at temperature 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ledger_tools_measuring import CUT_NATS, NUM_SAMPLES, token_figures
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from tutelage.config.sampling import SamplingConfig
from tutelage.data.tasks import CoinsTask
from tutelage.data.types import Rollout
from tutelage.rollout.generate import generate
from tutelage.rollout.request import RolloutRequest

MAX_NEW_TOKENS = 64
CHOICE_NATS = 0.3
"""Entropy above which a token is counted as a choice; two ways at 9 to 1 have 0.33 nats."""


@dataclass(frozen=True)
class Figures:
    """What a model card and the final table report; shares are in [0, 1]."""

    num_parameters: int
    num_prompts: int
    greedy: float
    """Share of greedy completions that are right."""
    mean_at_8: float
    """Share of sampled completions that are right."""
    pass_at_8: float
    """Share of prompts with at least one such completion among 8."""
    distinct: float
    """Distinct right completions per prompt among 8."""
    num_tokens: float
    """Mean length of a sampled completion."""
    entropy: float
    """Mean entropy of the sampled tokens, nats."""
    choices: float
    """Share of the sampled tokens whose entropy is above 0.3 nats."""
    kl: float
    """Mean KL to the teacher of the sampled tokens, nats."""
    q3_rows: float
    """Share of sampled tokens in Q3: entropy below and KL to the teacher above 0.5 nats."""
    q3_kl: float
    """Share of the whole KL to the teacher that these tokens hold."""


def measure(
    model: Qwen3ForCausalLM,
    teacher: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    num_prompts: int,
) -> Figures:
    """Figures of a model, strictly graded, and of its distance to the teacher."""
    greedy = sample(model, tokenizer, num_prompts, SamplingConfig(0.0))
    rollouts = sample(model, tokenizer, num_prompts, SamplingConfig(num_samples=NUM_SAMPLES))
    right = torch.tensor([is_right(rollout) for rollout in rollouts]).view(num_prompts, -1)
    distinct = {(rollout.prompt.id, rollout.text) for rollout in rollouts if is_right(rollout)}
    entropy, kl, _ = token_figures(model, teacher, rollouts)
    q3 = (entropy < CUT_NATS) & (kl > CUT_NATS)
    return Figures(
        num_parameters=model.num_parameters(),
        num_prompts=num_prompts,
        greedy=sum(map(is_right, greedy)) / num_prompts,
        mean_at_8=right.float().mean().item(),
        pass_at_8=right.any(1).float().mean().item(),
        distinct=len(distinct) / num_prompts,
        num_tokens=len(entropy) / len(rollouts),
        entropy=entropy.mean().item(),
        choices=(entropy > CHOICE_NATS).float().mean().item(),
        kl=kl.mean().item(),
        q3_rows=q3.float().mean().item(),
        q3_kl=(kl[q3].sum() / kl.sum().clamp_min(1e-12)).item(),
    )


def sample(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    num_prompts: int,
    sampling: SamplingConfig,
    seed: int = 0,
) -> list[Rollout]:
    """Completions of held-out prompts, cut off at 64 tokens."""
    limited = SamplingConfig(
        sampling.temperature, num_samples=sampling.num_samples, max_new_tokens=MAX_NEW_TOKENS
    )
    request = RolloutRequest(CoinsTask().held_out(num_prompts, seed), limited, (seed,))
    return generate(model, tokenizer, request, batch_size=512)


def is_right(rollout: Rollout) -> bool:
    """Whether a completion is right as a whole."""
    return bool(CoinsTask().grade(rollout.prompt, rollout.text, rollout.is_truncated))
