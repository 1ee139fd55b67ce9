"""What one backward pass works on, and how it is cut in two when memory does not hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tutelage.config.schema import Config
from tutelage.core import LazyLogits, TokenStats
from tutelage.data.batch import Batch
from tutelage.setup.objective import guided_terms, plain_terms
from tutelage.train.selection import Lesson, Plan, lessons_of


@dataclass(frozen=True)
class Portion:
    """A micro-batch with the teacher's logits and what is to be learned from it."""

    batch: Batch
    view: LazyLogits
    lesson: Lesson


@dataclass(frozen=True)
class Attempt:
    """Backward passes over the micro-batches of an update, up to one that memory did not hold."""

    portions: Sequence[Portion]
    total: Tensor
    """Sum of the objective over this process's rows, nats, a number on the device."""
    stats: Sequence[TokenStats]
    num_splits: int
    """Micro-batches that were cut in two before."""
    too_large: int | None = None
    """Index of the micro-batch that memory did not hold; None after success."""


def portions_of(
    config: Config, batches: Sequence[Batch], views: Sequence[LazyLogits], plan: Plan | None
) -> list[Portion]:
    """Each micro-batch with its logits and its lesson."""
    lessons = lessons_of(config, batches, plan)
    return [Portion(*parts) for parts in zip(batches, views, lessons, strict=True)]


def halves_of(config: Config, portion: Portion) -> tuple[Portion, Portion]:
    """The same rows in two micro-batches; sums and their divisor are as before."""
    rows, guide = portion.lesson.rows, portion.lesson.guide
    first, last = portion.batch.halves()
    cut, hidden = first.num_rows, portion.view.hidden
    halves = []
    for batch, start in ((first, 0), (last, cut)):
        stop = start + batch.num_rows
        is_here = (rows >= start) & (rows < stop)
        part = None if guide is None else guide[is_here]
        terms = (
            plain_terms(config.objective) if part is None else guided_terms(config.objective, part)
        )
        view = replace(portion.view, hidden=hidden[start:stop])
        halves.append(Portion(batch, view, Lesson(rows[is_here] - start, terms, part)))
    return halves[0], halves[1]
