"""A step in which no token is supervised is a counted zero that is connected to every weight."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import take_step

from tutelage.data.types import Rollout

METHODS: dict[str, dict[str, Any]] = {
    "all": {},
    "soft_or": {"selection": {"rule": "soft_or", "keep": 0.5}},
    "batch": {"selection": {"rule": "local_gain", "scope": "batch"}},
    "sampled": {"selection": {"rule": "random", "correct_sampling": True}},
    "eopd": {"objective": {"kind": "eopd", "gate": "percentile", "threshold": 0.5}},
    "akl": {"objective": {"kind": "akl"}},
    "fire": {"weighting": {"kind": "fire"}},
}


@pytest.mark.parametrize("method", METHODS)
def test_completions_without_tokens_give_a_counted_connected_zero(
    tiny_models: Path, rollouts: list[Rollout], method: str
) -> None:
    empty = [replace(r, completion_ids=()) for r in rollouts]
    taken = take_step(tiny_models, empty, torch.float32, **METHODS[method])
    for key in ("loss", "grad_norm", "num_rows", "num_kept", "num_nonfinite", "kept_kl_share"):
        assert taken.metrics[key] == 0
    assert taken.metrics["reverse_kl_nats"] is None  # a mean of nothing
    assert all(bool((g == 0).all()) for g in taken.gradients)
    assert not any(isinstance(x, float) and math.isnan(x) for x in taken.metrics.values())
    one = [rollouts[1], *empty[1:]]  # negative control: a single completion is learned from
    assert take_step(tiny_models, one, torch.float32, **METHODS[method]).metrics["grad_norm"] > 0
