"""On-policy distillation on one page: the public core of tutelage, transformers and torch.

    python examples/opd_in_one_file.py                             # every token, about a minute
    python examples/opd_in_one_file.py --rule soft_or --keep 0.1   # a tenth of the tokens

The student and the teacher are the embedded models of the ledger task. The settings are those of
configs/examples/ledger.toml, so the accuracy agrees with that of `tutelage train` within its
interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tutelage
from tutelage import LazyLogits, distillation_objective, select_tokens, token_stats
from tutelage.data.tasks import LedgerTask
from tutelage.data.types import Prompt
from tutelage.evaluation.metrics import Interval, clustered_interval, problem_means

ASSETS = Path(tutelage.__file__).parent / "assets"
TASK = LedgerTask()
NUM_STEPS, WARMUP_STEPS, LEARNING_RATE, PROMPTS_PER_STEP = 60, 5, 1e-3, 32
NUM_PROBLEMS, NUM_SAMPLES, MAX_NEW_TOKENS = 128, 8, 64

tokenizer = AutoTokenizer.from_pretrained(ASSETS / "ledger-teacher")


def generate(model: Any, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Sample one completion a prompt at temperature 1.

    Returns:
        Token ids `[B, T]`, prompts included, and the mask `[B, T]` of completion tokens, the
        end-of-sequence token included. The prompts of the task have one length: no padding.
    """
    ids = tokenizer([str(prompt.content) for prompt in prompts], return_tensors="pt").input_ids
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    is_end = tokens == tokenizer.eos_token_id
    is_completion = is_end.cumsum(1) - is_end.long() == 0
    is_completion[:, : ids.shape[1]] = False
    return tokens, is_completion


def logits_of(model: Any, tokens: Tensor, is_completion: Tensor) -> LazyLogits:
    """The logits of N completion tokens, as hidden states `[N, D]` and the LM head `[V, D]`."""
    hidden = model.model(tokens).last_hidden_state[:, :-1]  # position t predicts token t + 1
    return LazyLogits(hidden[is_completion[:, 1:]], model.lm_head.weight)


def accuracy(model: Any, num_problems: int) -> Interval:
    """Mean accuracy of 8 samples a held-out problem, all steps graded, with its 95 % interval."""
    samples = [problem for problem in TASK.held_out(num_problems) for _ in range(NUM_SAMPLES)]
    tokens, is_completion = generate(model, samples)
    verdicts: list[bool] = []
    for problem, ids, mask in zip(samples, tokens, is_completion, strict=True):
        text = tokenizer.decode(ids[mask], skip_special_tokens=True)
        is_truncated = tokenizer.eos_token_id not in ids
        verdicts.append(bool(TASK.grade(problem, text, is_truncated)))
    starts = range(0, len(verdicts), NUM_SAMPLES)
    return clustered_interval(problem_means([verdicts[i : i + NUM_SAMPLES] for i in starts]))


def train(rule: str, keep: float, num_steps: int, num_problems: int) -> tuple[Interval, Interval]:
    """The student's accuracy before and after `num_steps` steps of distillation."""
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_pretrained(ASSETS / "ledger-overconfident")
    teacher = AutoModelForCausalLM.from_pretrained(ASSETS / "ledger-teacher").requires_grad_(False)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / WARMUP_STEPS, 1 - (i - WARMUP_STEPS) / (NUM_STEPS - WARMUP_STEPS)),
    )
    before = accuracy(student, num_problems)
    print(f"before: {before.value:.1%} [{before.low:.1%}, {before.high:.1%}]")
    for step in range(num_steps):
        prompts = TASK.prompts(step, PROMPTS_PER_STEP, seed=0)
        tokens, is_completion = generate(student, prompts)
        teacher_logits = logits_of(teacher, tokens, is_completion)
        student_logits = logits_of(student, tokens, is_completion)
        stats = token_stats(student_logits, teacher_logits, tokens[is_completion])
        completion = is_completion.nonzero()[:, 0]
        rows = select_tokens(stats, completion, rule, keep).rows
        objective = distillation_objective(student_logits[rows], teacher_logits[rows])
        loss = objective.total / len(rows)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        print(f"step {step + 1}: {len(rows)} of {len(stats.entropy)} tokens, {loss:.4f} nats")
    after = accuracy(student, num_problems)
    print(f"after:  {after.value:.1%} [{after.low:.1%}, {after.high:.1%}]")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="On-policy distillation on one page.")
    parser.add_argument("--rule", default="all", help="selection rule")
    parser.add_argument("--keep", type=float, default=1.0, help="fraction of tokens to keep")
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    arguments = parser.parse_args()
    train(arguments.rule, arguments.keep, arguments.num_steps, NUM_PROBLEMS)
