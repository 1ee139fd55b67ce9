"""Whether log-probabilities and hidden states known from sampling are the student's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tutelage.config.sampling import TransformersEngine, VLLMServer
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
    ranks: Ranks,
) -> float:
    """Largest mean difference in nats between an engine's log-probabilities and the student's.

    The first micro-batch with tokens is enough: weights of another step would show in any. Of
    several servers each has its own mean, over the first micro-batches with tokens of all of them.

    Args:
        config: the run.
        student: scores the rows; every process scores as many micro-batches.
        batches: micro-batches of this process's rollouts.
        rollouts: by the name that `Batch.completion` gives them.
        step: for the message.
        ranks: the largest of all processes counts.

    Raises:
        RunError: it is too large, so the engine does not hold the student's weights.
    """
    replicas = [rollouts[name].replica for batch in batches for name in batch.names]
    known = sorted(set(replicas), key=lambda replica: (replica is not None, replica))
    count = int(ranks.max([_num_needed(batches, rollouts)])[0])
    sums = torch.zeros(len(known), 2, dtype=torch.float64)
    for batch in batches[:count]:
        with torch.no_grad():
            log_p = student(batch, None, has_stops=False).log_p
        gap = (log_p - sampler_logprobs([batch], rollouts).to(log_p)).abs().double().cpu()
        sizes = [len(rollouts[name].logprobs) for name in batch.names]
        for name, part in zip(batch.names, gap.split(sizes), strict=True):
            place = known.index(rollouts[name].replica)
            sums[place] += torch.tensor([part.sum(), len(part)], dtype=torch.float64)
    means = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
    (mismatch,) = ranks.max([max(means, default=0.0)])
    limit = _limit(config)
    if not mismatch <= limit:
        bad = [replica for replica, mean in zip(known, means, strict=True) if not mean <= limit]
        raise RunError(
            f"the engine's completions of step {step} are not the student's: their "
            f"log-probabilities differ by {mismatch:.3g} nats on average, more than {limit:.3g}. "
            f'Its weights were not replaced{_named(config, bad)}; use engine.kind = "transformers".'
        )
    return mismatch


def sampler_logprobs(batches: Sequence[Batch], rollouts: Mapping[int, Rollout]) -> Tensor:
    """What the sampler reported of every row, in the order of the micro-batches `[N]`."""
    names = [name for batch in batches for name in batch.names]
    return torch.tensor([x for name in names for x in rollouts[name].logprobs])


def staleness(rollouts: Sequence[Rollout], step: int) -> int:
    """Steps between the weights that sampled and those that a step begins with."""
    return max((step - 1 - (r.weights_version or 0) for r in rollouts), default=0)


def ratio_metrics(log_p: Tensor, reported: Tensor, ranks: Ranks) -> dict[str, float | None]:
    """Mean, least and largest ``log p(y) − log p_sampler(y)`` over rows of all processes, nats.

    Args:
        log_p: the student's log-probabilities `[N]`; rows where one is not finite do not count.
        reported: the sampler's `[N]`.
        ranks: the processes.

    Returns:
        0 where there are no rows: the student is what sampled.
    """
    ratio = (log_p - reported.to(log_p)).double()
    ratio = ratio[torch.isfinite(ratio)]
    count = ranks.sum(len(ratio))
    if not count:
        low = high = total = 0.0
    else:
        bounds = [float(x.max()) if len(x) else -math.inf for x in (-ratio, ratio)]
        low, high = ranks.max(bounds)
        total = ranks.sum(float(ratio.sum()))
    return {
        "log_ratio_mean_nats": total / max(count, 1),
        "log_ratio_min_nats": -low if count else 0.0,
        "log_ratio_max_nats": high,
    }


def _num_needed(batches: Sequence[Batch], rollouts: Mapping[int, Rollout]) -> int:
    """How many of the first micro-batches have a token of every server among the rollouts."""
    seen: set[int | None] = set()
    needed = 0
    for number, batch in enumerate(batches, start=1):
        found = {rollouts[name].replica for name in batch.names if rollouts[name].logprobs}
        if not found <= seen:
            seen |= found
            needed = number
    return needed


def _named(config: Config, replicas: Sequence[int | None]) -> str:
    """Which of several servers are meant."""
    if not isinstance(config.engine, VLLMServer) or len(config.engine.urls) == 1:
        return ""
    urls = [config.engine.urls[replica] for replica in replicas if replica is not None]
    return f" (replica {', '.join(urls)})" if urls else ""


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
