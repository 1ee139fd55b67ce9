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
from tutelage.train.selection import assign
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
    drawn = step.generate(1)
    micro_batches = step.pack(drawn)
    step.teacher_forward(micro_batches)
    selection = step.select(micro_batches, drawn, 1)
    assert selection is not None
    assign(config, micro_batches, selection)
    given = {}
    for micro_batch in micro_batches:
        assert micro_batch.rows is not None
        batch, kept = micro_batch.batch, micro_batch.rows
        weights = torch.as_tensor(micro_batch.terms[0][1])
        names = zip(batch.completion[kept], batch.position[kept], strict=True)
        given |= {(int(c), int(t)): float(w) for (c, t), w in zip(names, weights, strict=True)}
    everything, rows = selection, selection.rows
    chosen = step.choose(everything, 1)
    completion, position = everything.completion[rows].tolist(), everything.position[rows].tolist()
    names = zip(completion, position, strict=True)
    assert given == dict(zip(names, chosen.weights.tolist(), strict=True))
    assert any(weight > 1 for weight in given.values()) == is_corrected
