"""Leaving the teacher out of scoring changes what is logged, and nothing that is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import distance, take_step

from tiny import tiny_config
from tutelage.core import LazyLogits
from tutelage.data.types import Rollout
from tutelage.models.teacher import Teacher
from tutelage.setup.objective import scores_teacher

SPARED: dict[str, dict[str, Any]] = {
    "entropy": {"selection": {"rule": "entropy", "keep": 0.4}},
    "random": {"selection": {"rule": "random", "keep": 0.4, "scope": "batch"}},
    "first_n": {"selection": {"rule": "first_n", "num_tokens": 2}},
    "entropy_sample": {
        "selection": {"rule": "entropy_sample", "keep": 0.4, "correct_sampling": True},
        "objective": {"kind": "jsd"},
    },
    "sampled": {"selection": {"rule": "entropy"}, "objective": {"kind": "sampled"}},
    "eopd": {
        "selection": {"rule": "entropy"},
        "objective": {"kind": "eopd", "gate": "soft", "threshold": 2.5},
    },
}
READ: dict[str, dict[str, Any]] = {
    "soft_or": {"selection": {"rule": "soft_or"}},
    "akl": {"selection": {"rule": "entropy"}, "objective": {"kind": "akl"}},
    "fire": {"selection": {"rule": "entropy"}, "weighting": {"kind": "fire"}},
    "percentile": {
        "selection": {"rule": "entropy"},
        "objective": {"kind": "eopd", "gate": "percentile", "threshold": 0.5},
    },
}


@pytest.mark.parametrize("case", [*SPARED, *READ])
def test_kept_diagnostics_learn_the_same_and_describe_the_kept(
    tiny_models: Path, rollouts: list[Rollout], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (SPARED | READ)[case]
    whole = take_step(tiny_models, rollouts, torch.float64, **changes)
    views, view = [], Teacher.to_device

    def counted(self: Teacher, logits: LazyLogits) -> LazyLogits:
        views.append(len(logits))
        return view(self, logits)

    monkeypatch.setattr(Teacher, "to_device", counted)
    found = take_step(tiny_models, rollouts, torch.float64, diagnostics="kept", **changes)
    num_rows = found.metrics["num_rows"]
    assert sum(views) == num_rows * (1 if case in SPARED else 2)
    assert found.kept == whole.kept
    assert distance(found.gradients, whole.gradients) <= 1e-12
    for key in ("loss", "num_rows", "num_kept", "num_nonfinite"):
        assert found.metrics[key] == pytest.approx(whole.metrics[key], rel=1e-12)
    assert found.metrics["kept_kl_share"] is None
    mass = whole.metrics["kept_kl_share"] * whole.metrics["reverse_kl_nats"] * num_rows
    kept_mean = found.metrics["reverse_kl_nats"]
    assert kept_mean * found.metrics["num_kept"] == pytest.approx(mass, rel=1e-9)
    assert kept_mean != pytest.approx(whole.metrics["reverse_kl_nats"], rel=1e-3)


def test_only_what_looks_at_the_student_alone_spares_the_teacher(tiny_models: Path) -> None:
    for case, changes in (SPARED | READ).items():
        config = tiny_config(tiny_models, Path("unused"), diagnostics="kept", **changes)
        assert scores_teacher(config) == (case in READ)
        assert scores_teacher(tiny_config(tiny_models, Path("unused"), **changes))


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_the_gate_of_the_kept_is_logged(
    tiny_models: Path, rollouts: list[Rollout], gate: str
) -> None:
    """With every token kept, both ways of logging describe the same tokens."""
    changes: dict[str, Any] = {
        "selection": {"rule": "entropy", "keep": 1.0},
        "objective": {"kind": "eopd", "gate": gate, "threshold": 2.5},
    }
    whole = take_step(tiny_models, rollouts, torch.float64, **changes).metrics
    found = take_step(tiny_models, rollouts, torch.float64, diagnostics="kept", **changes).metrics
    assert 0 < whole["gate_share"] < 1
    for key in (
        "gate_share",
        "gated_forward_kl_nats",
        "entropy_nats",
        "teacher_entropy_nats",
        "teacher_top16_mass",
    ):
        assert found[key] == pytest.approx(whole[key], rel=1e-9)
