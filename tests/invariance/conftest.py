"""Rollouts that all steps of these tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from stepping import ragged_rollouts

from tiny import tiny_config
from tutelage.data.types import Rollout
from tutelage.setup.components import build_components


@pytest.fixture(scope="session")
def rollouts(tiny_models: Path) -> list[Rollout]:
    return ragged_rollouts(build_components(tiny_config(tiny_models, Path("unused"))))
