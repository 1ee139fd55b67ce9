"""Metrics of a step: its tokens, its selection, its updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tutelage.config.method import EOPDObjective, TrOPDObjective, is_clipped
from tutelage.config.schema import Config
from tutelage.config.teachers import LogprobServerTeacher
from tutelage.core import (
    PartialLogits,
    TokenStats,
    quadrant_table,
    quadrants,
)
from tutelage.data.types import Rollout
from tutelage.train.distributed import Ranks
from tutelage.train.micro_batch import MicroBatch

HIGH_ENTROPY_NATS = 0.8
"""Entropy from which a token counts as high-entropy (EOPD's threshold)."""


def token_metrics(
    stats: TokenStats, is_kept: Tensor, gate: Tensor, config: Config
) -> dict[str, Any]:
    """Means over rows of the global batch, and the quadrant table.

    Args:
        stats: statistics of N rows, with the extra `teacher_top_mass` if a teacher was read.
        is_kept: whether each row was kept `[N]`.
        gate: how far the forward KL of each row is switched on `[N]`, of EOPD and TrOPD.
        config: for the quadrant thresholds.

    Returns:
        Plain JSON values. Rows with a non-finite statistic are counted in `num_nonfinite` and left
        out of every mean and share; a mean over no tokens is None, and so is what needs a teacher
        where none was read.
    """
    is_finite = torch.isfinite(stats.stack()).all(0) if stats.has_teacher else stats.is_finite()
    num_nonfinite = int((~is_finite).sum())
    stats, gate, is_kept = stats[is_finite], gate[is_finite], is_kept[is_finite]
    if not stats.has_teacher:
        return _without_teacher(stats, num_nonfinite)
    quadrant = quadrants(stats.entropy, stats.reverse_kl, config.quadrant_thresholds)
    share = _share(stats.reverse_kl[is_kept], stats.reverse_kl)
    names = ("reverse_kl", "forward_kl", "entropy", "teacher_entropy")
    return {
        "num_nonfinite": num_nonfinite,
        "kept_kl_share": share if config.diagnostics == "all" else None,
        **{f"{name}_nats": _mean(stats.__dict__[name]) for name in names},
        "teacher_top16_mass": _mean(stats.extras["teacher_top_mass"]),
        **_gated(gate if isinstance(config.objective, EOPDObjective) else None, stats),
        **_outside(gate[is_kept], config),
        "high_entropy": _high_entropy(stats),
        "quadrants": quadrant_table(quadrant, stats.reverse_kl, is_kept),
    }


def _without_teacher(stats: TokenStats, num_nonfinite: int) -> dict[str, Any]:
    names = ("kept_kl_share", "reverse_kl_nats", "forward_kl_nats", "teacher_entropy_nats")
    share = _mean(stats.entropy >= HIGH_ENTROPY_NATS)
    high = ("teacher_share", "reverse_kl_nats", "forward_kl_nats")
    return {
        "num_nonfinite": num_nonfinite,
        **dict.fromkeys(names),
        "entropy_nats": _mean(stats.entropy),
        "teacher_top16_mass": None,
        **_gated(None, stats),
        "high_entropy": {"student_share": share, **dict.fromkeys(high)},
        "quadrants": {},
    }


def teacher_metrics(
    stats: TokenStats, completion: Tensor, teachers: Sequence[str]
) -> dict[str, Any]:
    """Tokens and mean divergences of each teacher's prompts; nothing where there is one teacher.

    Args:
        stats: statistics of N rows.
        completion: completion of each row `[N]`.
        teachers: name of the teacher of each completion; "" for the first one.
    """
    names = sorted(set(teachers))
    if names in ([], [""]):
        return {}
    place = torch.tensor([names.index(name) for name in teachers], device=completion.device)
    is_finite, found = stats.is_finite(), {}
    for number, name in enumerate(names):
        here = place[completion] == number
        kept = stats[here & is_finite]
        found[name or "teacher"] = {
            "num_rows": int(here.sum()),
            "reverse_kl_nats": _mean(kept.reverse_kl),
            "forward_kl_nats": _mean(kept.forward_kl),
            "teacher_entropy_nats": _mean(kept.teacher_entropy),
        }
    return {"teachers": found}


def teacher_checks(
    config: Config,
    measured: Mapping[str, float | None],
    micro_batches: Sequence[MicroBatch],
    ranks: Ranks,
) -> dict[str, float | None]:
    """What was measured to trust the teachers of a step, over all processes.

    Args:
        config: names the teachers.
        measured: this process's `checks()` of the teacher, of which the largest counts.
        micro_batches: this process's, with their teachers' logits.
        ranks: the processes.

    Returns:
        Those checks, and of teachers that tell the likeliest ids alone means over all rows: mass of
        the ids that are not known, and with EOPD whether its gate is left open. None where a number
        is not known, or a teacher has no rows.
    """
    values = ranks.max([-1.0 if x is None else x for x in measured.values()]) if measured else []
    found = {name: None if x < 0 else x for name, x in zip(measured, values, strict=True)}
    for name, teacher in (("", config.teacher), *config.teachers.items()):
        if isinstance(teacher, LogprobServerTeacher):
            end = f":{name}" if name else ""
            logits = [m.teacher_logits for m in micro_batches if m.batch.teacher == name]
            known = [x for x in logits if isinstance(x, PartialLogits)]
            found[f"teacher_tail_mass{end}"] = _mean_over(ranks, [x.log_tail.exp() for x in known])
            if isinstance(config.objective, EOPDObjective):
                gate = config.objective.threshold
                bounds = (x.entropy_bounds() for x in known)
                is_open = [((low < gate) & (gate <= high)).double() for low, high in bounds]
                found[f"undecided_gate_share{end}"] = _mean_over(ranks, is_open)
    return found


def _mean_over(ranks: Ranks, parts: Sequence[Tensor]) -> float | None:
    count = ranks.sum(sum(len(part) for part in parts))
    total = ranks.sum(sum((float(part.sum()) for part in parts), 0.0))
    return total / count if count else None


def rollout_metrics(rollouts: Sequence[Rollout], num_rows: int, ranks: Ranks) -> dict[str, Any]:
    """Lengths and repetitions of the step's completions, over all processes."""
    count = max(ranks.sum(len(rollouts)), 1)
    num_generated = ranks.sum(sum(len(r.generated_ids) for r in rollouts))
    distinct = len({(r.prompt.id, r.completion_ids) for r in rollouts})
    return {
        "completion_length_mean": num_generated / count,
        "truncated_share": ranks.sum(sum(r.is_truncated for r in rollouts)) / count,
        "duplicate_share": 1 - ranks.sum(distinct) / count,
        **_conversation_metrics(rollouts, num_rows, count, ranks),
    }


def _conversation_metrics(
    rollouts: Sequence[Rollout], num_rows: int, count: float, ranks: Ranks
) -> dict[str, Any]:
    """Success, score, turns, calls and errors of conversations; nothing where there are none."""
    found = [r.conversation for r in rollouts if r.conversation is not None]
    if not ranks.sum(len(found)):
        return {}
    num_turns = ranks.sum(sum(c.num_turns for c in found))
    num_calls = ranks.sum(sum(c.num_tool_calls for c in found))
    num_errors = ranks.sum(sum(c.num_tool_errors for c in found))
    num_inserted = sum(len(r.completion_ids) - len(r.generated_ids) for r in rollouts)
    return {
        "success_share": ranks.sum(sum(c.outcome.is_success for c in found)) / count,
        "score_mean": ranks.sum(sum(c.outcome.score for c in found)) / count,
        "turns_mean": num_turns / count,
        "tokens_per_turn": num_rows / max(num_turns, 1),
        "tool_calls_mean": num_calls / count,
        "tool_error_share": num_errors / max(num_calls, 1),
        "inserted_tokens_mean": ranks.sum(num_inserted) / count,
    }


def clip_share(config: Config, num_clipped: int, num_rows: int) -> float | None:
    """Share of the trained rows whose PPO clip took effect; None for exact objectives."""
    return num_clipped / max(num_rows, 1) if is_clipped(config.objective) else None


def _high_entropy(stats: TokenStats) -> dict[str, float | None]:
    """Shares of tokens with H ≥ 0.8 nats, and the divergences where the teacher's is."""
    is_high = stats.teacher_entropy >= HIGH_ENTROPY_NATS
    return {
        "teacher_share": _mean(is_high),
        "student_share": _mean(stats.entropy >= HIGH_ENTROPY_NATS),
        "reverse_kl_nats": _mean(stats.reverse_kl[is_high]),
        "forward_kl_nats": _mean(stats.forward_kl[is_high]),
    }


def _gated(gate: Tensor | None, stats: TokenStats) -> dict[str, float | None]:
    """Mean gate g, and Σ g KL(q‖p) / Σ g in nats; None without a gate, or where none is open."""
    if gate is None:
        return {"gate_share": None, "gated_forward_kl_nats": None}
    weights = gate.double()
    total = weights.sum()
    mean = float(weights @ stats.forward_kl.double() / total) if total > 0 else None
    return {"gate_share": _mean(gate), "gated_forward_kl_nats": mean}


def _outside(gate: Tensor, config: Config) -> dict[str, float | None]:
    """Share of the kept tokens outside of TrOPD's trust region; nothing for other objectives."""
    is_trust = isinstance(config.objective, TrOPDObjective)
    return {"outside_trust_share": _mean(gate)} if is_trust else {}


def _mean(x: Tensor) -> float | None:
    return float(x.double().mean()) if len(x) else None


def _share(part: Tensor, whole: Tensor) -> float:
    """Sum of a part as a share of the sum of the whole; 0 where the whole is 0."""
    total = float(whole.sum())
    return float(part.sum()) / total if total > 0 else 0.0
