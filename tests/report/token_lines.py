"""Recorded tokens made from a seed, as a run writes them."""

from __future__ import annotations

import random
from typing import Any

RULES = ("soft_or", "q3", "entropy", "divergence", "random")
NUM_TOKENS = 12


def token_lines(texts: list[str], seed: int = 0) -> list[dict[str, Any]]:
    """Two held-out prompts and a rollout at steps 0 and 10; ids name `texts` in turn."""
    rng = random.Random(seed)
    return [
        _line(rng, step, kind, prompt, texts)
        for step in (0, 10)
        for kind, prompt in (("held-out", "a"), ("held-out", "b"), ("training", f"c{step}"))
    ]


def _line(
    rng: random.Random, step: int, kind: str, prompt: str, texts: list[str]
) -> dict[str, Any]:
    def column(high: float) -> list[float]:
        return [float(f"{rng.random() ** 3 * high:.4g}") for _ in range(NUM_TOKENS)]

    def top() -> list[list[int]]:
        return [[rng.randrange(len(texts)) for _ in range(5)] for _ in range(NUM_TOKENS)]

    teacher_entropy = column(2)
    ranks = {rule: rng.sample(range(1, NUM_TOKENS + 1), NUM_TOKENS) for rule in RULES}
    shares = [[0.5, 0.25, 0.125, 0.0625, 0.03125]] * NUM_TOKENS
    return {
        "step": step, "kind": kind, "prompt_id": prompt, "sample": 0, "prompt": texts[0],
        "num_tokens": NUM_TOKENS, "token": [rng.randrange(len(texts)) for _ in range(NUM_TOKENS)],
        "entropy": column(2), "reverse_kl": column(9), "forward_kl": column(5),
        "teacher_entropy": teacher_entropy, "log_p": column(-3), "log_q": column(-9),
        "gate": [float(h >= 0.8) for h in teacher_entropy], "rank": ranks,
        "kept": {rule: [i for i, r in enumerate(rank) if r <= 2] for rule, rank in ranks.items()},
        "student_top": top(), "teacher_top": top(),
        "student_share": shares, "teacher_share": shares,
        "texts": {str(i): text for i, text in enumerate(texts)}, "seconds": 0.1,
    }  # fmt: skip


def conversation_lines(texts: list[str], inserted: str, **changes: Any) -> list[dict[str, Any]]:
    """The same as conversations of three turns: of 5, 4 and 3 tokens."""
    outcome = {
        "score": 0.75, "is_success": False, "num_turns": 3, "num_tool_errors": 1,
        "details": {inserted: inserted, "match": 2},
    }  # fmt: skip
    more = {"inserted": [[5, inserted], [9, inserted]], "outcome": outcome}
    return [line | more | changes for line in token_lines(texts)]
