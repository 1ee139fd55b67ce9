"""Whether log-probabilities and hidden states known from sampling are the student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tutelage.config.sampling import TransformersEngine
from tutelage.config.schema import Config
from tutelage.data.batch import Batch
from tutelage.data.types import Rollout
from tutelage.errors import RunError
from tutelage.models.student import Student
from tutelage.train.distributed import Ranks

HALF_MISMATCH_NATS = 0.05
FULL_MISMATCH_NATS = 1e-3
"""Mean differences at which two engines no longer hold the same weights. One model in two engines
differs by 2e-7 in float32 on a CPU (measured); half precision rounds a logit of 16 to within
1/16."""


def engine_mismatch(
    config: Config,
    student: torch.nn.Module,
    batches: Sequence[Batch],
    rollouts: Mapping[int, Rollout],
    step: int,
) -> float:
    """Mean difference in nats between the engine's log-probabilities and the student's.

    The first micro-batch with tokens is enough: weights of another step would show in any.

    Args:
        config: the run.
        student: scores the rows.
        batches: micro-batches of the rollouts.
        rollouts: by the name that `Batch.completion` gives them.
        step: for the message.

    Raises:
        RunError: it is too large, so the engine does not hold the student's weights.
    """
    batch = next((batch for batch in batches if batch.num_rows), None)
    if batch is None:
        return 0.0
    reported = torch.tensor([x for name in batch.names for x in rollouts[name].logprobs])
    with torch.no_grad():
        log_p = student(batch, None).log_p
    mismatch = float((log_p - reported.to(log_p)).abs().mean())
    limit = _limit(config)
    if not mismatch <= limit:
        raise RunError(
            f"the engine's completions of step {step} are not the student's: their "
            f"log-probabilities differ by {mismatch:.3g} nats on average, more than {limit:.3g}. "
            'Its weights were not replaced; use engine.kind = "transformers".'
        )
    return mismatch


def _limit(config: Config) -> float:
    given = None if isinstance(config.engine, TransformersEngine) else config.engine.max_logprob_gap
    if given is not None:
        return given
    return FULL_MISMATCH_NATS if config.student.dtype == "float32" else HALF_MISMATCH_NATS


def hidden_mismatch(student: Student, batch: Batch, hidden: Tensor, ranks: Ranks) -> float:
    """Largest relative error of hidden states that were recorded while sampling.

    Args:
        student: computes them again.
        batch: a micro-batch with N rows.
        hidden: what was recorded `[N, D]`.
        ranks: the largest of all processes counts.

    Raises:
        RunError: rounding does not explain it.
    """
    mismatch, limit = ranks.max(student.hidden_gap(batch, hidden))
    if not mismatch <= limit:
        raise RunError(
            f"hidden states recorded while sampling differ from a fresh forward pass by "
            f"{mismatch:.3g}, more than rounding explains ({limit:.3g}). Use scoring = 'forward'."
        )
    return mismatch
