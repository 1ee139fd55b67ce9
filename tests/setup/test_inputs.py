"""What can be refused without weights is refused before any are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_config
from tutelage.commands.check import check
from tutelage.errors import ModelError
from tutelage.models.tiny import tiny_tokenizer
from tutelage.setup import components as setup
from tutelage.setup.inputs import load_inputs
from tutelage.train.loop import train


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(setup, "load_model", load_model)


@pytest.mark.parametrize("command", ["check", "train"])
def test_tokenizers_are_compared_before_weights_are_loaded(
    tiny_models: Path, tmp_path: Path, command: str
) -> None:
    other = tmp_path / "other"
    tiny_tokenizer().save_pretrained(other)
    (other / "config.json").write_text("{}")
    config = tiny_config(tiny_models, tmp_path / "run", teacher={"model": str(other)})
    with pytest.raises(ModelError, match="different vocabularies"):
        list(check(config, "run")) if command == "check" else train(config)


def test_one_tokenizer_serves_student_and_teacher_that_name_the_same_model(
    tiny_models: Path, tmp_path: Path
) -> None:
    student, teacher = tiny_models / "student", tiny_models / "teacher"
    pair = load_inputs(tiny_config(tiny_models, tmp_path / "run"))
    same = load_inputs(tiny_config(tiny_models, tmp_path / "run", teacher={"model": str(student)}))
    assert same.teacher_tokenizer is same.tokenizer
    assert pair.teacher_tokenizer is not pair.tokenizer
    assert pair.teacher_tokenizer.name_or_path == str(teacher)
