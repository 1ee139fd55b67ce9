"""No test finds the slots of another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from eager import make_tokenizer as make_letters
from random_models import gpt2, make_qwen3, make_tokenizer, qwen3, tokenizer
from tutelage.rollout.cuda import generate


@pytest.fixture(autouse=True)
def no_slots() -> Iterator[None]:
    """No slots of an earlier test."""
    generate._SLOTS.clear()
    yield
    generate._SLOTS.clear()


@pytest.fixture(scope="session")
def letters() -> Any:
    """A tokenizer with one token for each letter, and six more."""
    return make_letters()


__all__ = ["gpt2", "make_qwen3", "make_tokenizer", "qwen3", "tokenizer"]
