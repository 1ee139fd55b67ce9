"""The proof that completions of an engine with weights of its own are the student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tutelage.config.sampling import TransformersEngine
from tutelage.config.schema import Config
from tutelage.data.batch import Batch
from tutelage.data.types import Rollout
from tutelage.errors import RunError

HALF_GAP_NATS = 0.05
FULL_GAP_NATS = 1e-3
"""Mean gaps at which two engines no longer hold the same weights. One model in two engines differs
by 2e-7 in float32 on a CPU (measured); half precision rounds a logit of 16 to within 1/16."""


def engine_gap(
    config: Config,
    student: torch.nn.Module,
    batches: Sequence[Batch],
    rollouts: Mapping[int, Rollout],
    step: int,
) -> float:
    """Mean gap in nats between the sampler's log-probabilities and the student's.

    The first micro-batch with tokens is enough: weights of another step would show in any.

    Args:
        config: the run.
        student: scores the rows.
        batches: micro-batches of the rollouts.
        rollouts: by the name that `Batch.completion` gives them.
        step: for the message.

    Raises:
        RunError: the gap is too large, so the sampler does not hold the student's weights.
    """
    batch = next((batch for batch in batches if batch.num_rows), None)
    if batch is None:
        return 0.0
    reported = torch.tensor([x for name in batch.names for x in rollouts[name].logprobs])
    with torch.no_grad():
        log_p = student(batch, None).log_p
    gap = float((log_p - reported.to(log_p)).abs().mean())
    limit = _limit(config)
    if not gap <= limit:
        raise RunError(
            f"the engine's completions of step {step} are not the student's: their "
            f"log-probabilities differ by {gap:.3g} nats on average, more than {limit:.3g}. "
            'Its weights were not replaced; use engine.kind = "transformers".'
        )
    return gap


def _limit(config: Config) -> float:
    given = None if isinstance(config.engine, TransformersEngine) else config.engine.max_logprob_gap
    if given is not None:
        return given
    return FULL_GAP_NATS if config.student.dtype == "float32" else HALF_GAP_NATS
