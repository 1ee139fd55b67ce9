"""Parts about reading and learning, at toy size on a CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import gpu
import gpu_learn
import gpu_step
from tutelage.config.parse import parse_config


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch, toy_card: None) -> None:
    sizes = {"SEQUENCES": 6, "PROMPT_TOKENS": 4, "NEW_TOKENS": 5, "NUM_STEPS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(gpu_learn, name, value)


def test_padded_and_packed_rows_are_learned_from_alike() -> None:
    assert gpu_learn.PARTS.keys() < gpu.parts().keys()
    found = gpu_learn.learn_rows()
    assert json.loads(json.dumps(found)) == found
    padded, packed = found["padded"], found["packed"]
    assert packed["tokens_with_padding"] == found["tokens"] < padded["tokens_with_padding"]
    assert packed["rows"] == padded["rows"] == found["tokens"] - 6 * 4
    assert packed["loss"] == pytest.approx(padded["loss"], rel=0.02)  # in bfloat16
    assert min(packed["learn_s"], padded["teacher_s"]) > 0


def test_layers_are_compared_over_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = gpu_learn._arm

    layers = []

    def on_a_cpu(folder: Any, rollouts: Any, student: Any = None, **changes: Any) -> Any:
        asked = parse_config(gpu_step.configuration(folder, student=student or {}, **changes))
        layers.append((asked.student.layers, asked.micro_batches))
        return plain(folder, rollouts, **changes)  # Liger's run on CUDA only

    monkeypatch.setattr(gpu_learn, "_arm", on_a_cpu)
    found = gpu_learn.learn_layers()
    assert layers == [("transformers", "padded"), ("liger", "padded"), ("liger", "packed")]
    assert json.loads(json.dumps(found)) == found
    assert found["tokens"] == found["liger, packed"]["tokens_with_padding"] == 6 * 9
    rates = [found[way]["tflop_s"] for way in ("transformers", "liger", "liger, packed")]
    assert min(rates) > 0
    assert torch.tensor(rates).isfinite().all()
