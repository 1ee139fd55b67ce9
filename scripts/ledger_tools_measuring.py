"""Figures of the ledger-tools models on held-out prompts, in float32, at temperature 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from tutelage.config.conversations import LedgerToolsData
from tutelage.config.sampling import SamplingConfig
from tutelage.data.batch import collate
from tutelage.data.types import Conversation, Rollout
from tutelage.envs.ledger_tools import LedgerToolsTask
from tutelage.rollout.generate import generate
from tutelage.rollout.request import Agent, RolloutRequest

NUM_SAMPLES = 8
CUT_NATS = 0.5
WRONG_NATS = 3.0
"""Surprise of the teacher at a token that it would hardly have written (5 %)."""


@dataclass(frozen=True)
class Figures:
    """What a model card and the final table report; shares are in [0, 1]."""

    num_parameters: int
    num_prompts: int
    success: float
    """Share of conversations in which every call and the final answer are right."""
    pass_at_8: float
    """Share of prompts with at least one such conversation among 8."""
    distinct: float
    """Distinct successful conversations per prompt among 8."""
    score: float
    """Mean of the environment's score."""
    answer_only: float
    """Share of conversations whose final answer is right, however it was reached."""
    wrong_tool: float
    """Share of conversations with a look-up by the wrong tool."""
    ignored_answer: float
    """Share of conversations in which an answer is replaced with another number."""
    entropy: float
    """Mean entropy of the generated tokens, nats."""
    wrong_entropy: float
    """Median entropy where a token was generated that the teacher gives less than 5 %, nats."""
    q3_rows: float
    """Share of generated tokens in Q3: entropy below and KL to the teacher above 0.5 nats."""
    q3_kl: float
    """Share of the whole KL to the teacher that these tokens hold."""


def converse(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_prompts: int, seed: int = 0
) -> list[Rollout]:
    """Eight sampled conversations about each held-out prompt."""
    task = LedgerToolsTask()
    request = RolloutRequest(
        prompts=task.held_out(num_prompts, seed),
        sampling=SamplingConfig(num_samples=NUM_SAMPLES, max_new_tokens=128),
        seed=(seed,),
        agent=Agent(task.environment, LedgerToolsData(tool_format="json")),
    )
    return generate(model, tokenizer, request, batch_size=512)


def measure(
    model: Qwen3ForCausalLM,
    teacher: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    num_prompts: int,
) -> Figures:
    """Figures of a model, strictly graded, and of its distance to the teacher."""
    rollouts = converse(model, tokenizer, num_prompts)
    talks = [rollout.conversation for rollout in rollouts if rollout.conversation is not None]
    right = torch.tensor([talk.outcome.is_success for talk in talks]).view(num_prompts, -1)
    distinct = {
        (rollout.prompt.id, rollout.generated_ids)
        for rollout, is_right in zip(rollouts, right.flatten().tolist(), strict=True)
        if is_right
    }
    entropy, kl, is_wrong = token_figures(model, teacher, rollouts)
    q3 = (entropy < CUT_NATS) & (kl > CUT_NATS)
    return Figures(
        num_parameters=model.num_parameters(),
        num_prompts=num_prompts,
        success=right.float().mean().item(),
        pass_at_8=right.any(1).float().mean().item(),
        distinct=len(distinct) / num_prompts,
        score=sum(talk.outcome.score for talk in talks) / len(talks),
        answer_only=_share(talks, "answer_only"),
        wrong_tool=_share(talks, "wrong_tool"),
        ignored_answer=_share(talks, "ignored_answer"),
        entropy=entropy.mean().item(),
        wrong_entropy=entropy[is_wrong].median().item(),
        q3_rows=q3.float().mean().item(),
        q3_kl=(kl[q3].sum() / kl.sum().clamp_min(1e-12)).item(),
    )


def _share(talks: Sequence[Conversation], name: str) -> float:
    return sum(bool(talk.outcome.details[name]) for talk in talks) / len(talks)


@torch.inference_mode()
def token_figures(
    model: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, rollouts: Sequence[Rollout]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every generated token: the model's entropy, the reverse KL, and whether it is wrong."""
    parts = []
    for start in range(0, len(rollouts), 256):
        batch = collate(rollouts[start : start + 256], 0)
        log_p, log_q = (
            batch.flatten(one(batch.input_ids, batch.attention_mask).logits).log_softmax(-1)
            for one in (model, teacher)
        )
        entropy = -(log_p.exp() * log_p).sum(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        is_wrong = log_q.gather(-1, batch.tokens[:, None])[:, 0] < -WRONG_NATS
        parts.append((entropy, kl, is_wrong))
    entropy, kl, is_wrong = (torch.cat(column) for column in zip(*parts, strict=True))
    return entropy, kl, is_wrong
