"""Shared settings: one thread a process, and no deadline on a machine that may be busy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random `student` and `teacher`."""
    from tiny import save_tiny_model  # transformers takes seconds; most tests do not need it

    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "student", seed=1)
    save_tiny_model(folder / "teacher", seed=2)
    return folder
