"""What a step hands to the objective: every row its own weight and its own gate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tiny import tiny_config
from tutelage.config.method import EOPDObjective
from tutelage.core import TokenStats
from tutelage.setup.components import build_components
from tutelage.setup.objective import gate_of
from tutelage.train.selection import lessons_of
from tutelage.train.step import Step


def test_the_gate_of_a_row_looks_at_the_teachers_entropy_of_that_row() -> None:
    entropy = torch.tensor([0.1, 0.9, 0.2, 0.8, 2.0], dtype=torch.float64)
    stats = TokenStats(*torch.zeros(6, 5, dtype=torch.float64))
    stats = TokenStats(stats.entropy, entropy, *torch.zeros(4, 5, dtype=torch.float64))
    assert gate_of(EOPDObjective("eopd"), stats).tolist() == [0, 1, 0, 1, 1]


@pytest.mark.parametrize("is_corrected", [True, False])
def test_kept_rows_carry_their_inverse_probability(
    tmp_path: Path, tiny_models: Path, is_corrected: bool
) -> None:
    rule = {"rule": "entropy_sample", "keep": 0.4, "correct_sampling": is_corrected}
    config = tiny_config(tiny_models, tmp_path / "run", selection=rule)
    components = build_components(config)
    optimizer = torch.optim.SGD(components.student.parameters(), lr=0.0)
    step = Step(config, components, Accelerator(cpu=True), components.student, optimizer)
    drawn = step.write(1)
    rollouts = drawn.rollouts
    batches = [batch for update in step.cut(rollouts) for batch in update]
    views = [components.teacher.read(batch) for batch in batches]
    plan = step._plan(batches, views, step._known(batches, drawn), rollouts, 1)
    lessons = lessons_of(config, batches, plan)
    given = {}
    for batch, lesson in zip(batches, lessons, strict=True):
        weights = torch.as_tensor(lesson.terms[0][1])
        names = zip(batch.completion[lesson.rows], batch.position[lesson.rows], strict=True)
        given |= {(int(c), int(t)): float(w) for (c, t), w in zip(names, weights, strict=True)}
    gathered, rows = plan.gathered, plan.chosen.rows
    names = zip(gathered.completion[rows].tolist(), gathered.position[rows].tolist(), strict=True)
    assert given == dict(zip(names, plan.chosen.weights.tolist(), strict=True))
    assert any(weight > 1 for weight in given.values()) == is_corrected
