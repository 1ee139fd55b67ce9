"""Figures of the embedded ledger models on held-out prompts, in float32, at temperature 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from tutelage.data.tasks.ledger import LedgerTask
from tutelage.data.types import Prompt

NUM_SAMPLES = 8
MAX_NEW_TOKENS = 48
CUT_NATS = 0.5
BATCH_SIZE = 512


@dataclass(frozen=True)
class Figures:
    """What a model card and the final table report; shares are in [0, 1]."""

    num_parameters: int
    num_prompts: int
    greedy: float
    """Share of greedy completions in which every step is right."""
    mean_at_8: float
    """Share of sampled completions in which every step is right."""
    pass_at_8: float
    """Share of prompts with at least one such completion among 8."""
    distinct: float
    """Distinct right completions per prompt among 8."""
    answer_mean_at_8: float
    """Share of sampled completions whose final answer is right, however it was reached."""
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
    task = LedgerTask()
    prompts = task.held_out(num_prompts)
    repeated = [prompt for prompt in prompts for _ in range(NUM_SAMPLES)]
    greedy = _decode(tokenizer, _write(model, tokenizer, prompts, is_sampled=False))
    torch.manual_seed(0)
    ids = _write(model, tokenizer, repeated, is_sampled=True)
    texts = _decode(tokenizer, ids)
    right = [bool(task.grade(p, text)) for p, text in zip(repeated, texts, strict=True)]
    answered = [bool(task.grade_answer(p, text)) for p, text in zip(repeated, texts, strict=True)]
    by_prompt = torch.tensor(right).view(num_prompts, NUM_SAMPLES)
    distinct = {(p.id, text) for p, text, ok in zip(repeated, texts, right, strict=True) if ok}
    rows, kl = _q3_shares(model, teacher, tokenizer, ids)
    return Figures(
        num_parameters=model.num_parameters(),
        num_prompts=num_prompts,
        greedy=sum(bool(task.grade(p, t)) for p, t in zip(prompts, greedy, strict=True))
        / num_prompts,
        mean_at_8=by_prompt.float().mean().item(),
        pass_at_8=by_prompt.any(1).float().mean().item(),
        distinct=len(distinct) / num_prompts,
        answer_mean_at_8=sum(answered) / len(answered),
        q3_rows=rows,
        q3_kl=kl,
    )


@torch.inference_mode()
def _write(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[Prompt],
    is_sampled: bool,
) -> Tensor:
    """Prompt and completion ids [B, T]; completions that ended early are padded on the right."""
    texts = [str(prompt.content) for prompt in prompts]
    ids = tokenizer(texts, return_tensors="pt")["input_ids"]
    untruncated = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} if is_sampled else {}
    pieces = [
        model.generate(
            input_ids=piece,
            attention_mask=torch.ones_like(piece),
            do_sample=is_sampled,
            max_new_tokens=MAX_NEW_TOKENS,
            **untruncated,
        )
        for piece in ids.split(BATCH_SIZE)
    ]
    width = max(piece.shape[1] for piece in pieces)
    pad = tokenizer.pad_token_id
    padded = [torch.nn.functional.pad(p, (0, width - p.shape[1]), value=pad) for p in pieces]
    return torch.cat(padded)


def _decode(tokenizer: PreTrainedTokenizerFast, ids: Tensor) -> list[str]:
    prompt_length = int((ids[0] == tokenizer.convert_tokens_to_ids(">")).nonzero()[0]) + 1
    decoded: list[str] = tokenizer.batch_decode(ids[:, prompt_length:], skip_special_tokens=True)
    return decoded


@torch.inference_mode()
def _q3_shares(
    model: Qwen3ForCausalLM,
    teacher: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
) -> tuple[float, float]:
    """Share of the sampled tokens in Q3, and of the reverse KL that they hold."""
    prompt_length = int((ids[0] == tokenizer.convert_tokens_to_ids(">")).nonzero()[0]) + 1
    ids = ids[:BATCH_SIZE]
    log_p = model(input_ids=ids).logits[:, prompt_length - 1 : -1].log_softmax(-1)
    log_q = teacher(input_ids=ids).logits[:, prompt_length - 1 : -1].log_softmax(-1)
    counts = ids[:, prompt_length:] != tokenizer.pad_token_id  # pads stand only after the end
    entropy = -(log_p.exp() * log_p).sum(-1)[counts]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[counts]
    wrong = (entropy < CUT_NATS) & (kl > CUT_NATS)
    return wrong.float().mean().item(), (kl[wrong].sum() / kl.sum().clamp_min(1e-12)).item()
