"""A step from packed micro-batches is the step from padded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import RULES, Taken, distance, take_step

from tiny import MEASURED, tiny_config
from tutelage.data.batch import pack
from tutelage.data.types import Rollout
from tutelage.errors import ConfigError, RunError
from tutelage.models.student import Student
from tutelage.setup.components import build_components
from tutelage.train.loop import train


def step(models: Path, rollouts: list[Rollout], **changes: Any) -> Taken:
    return take_step(models, rollouts, torch.float64, **{"micro_batch_tokens": 60} | changes)


@pytest.mark.parametrize("rule", ["all", "soft_or", "random"])
def test_packing_changes_no_gradient_and_no_choice(
    tiny_models: Path, rollouts: list[Rollout], rule: str
) -> None:
    padded = step(tiny_models, rollouts, selection=RULES[rule])
    packed = step(tiny_models, rollouts, selection=RULES[rule], micro_batches="packed")
    assert packed.kept == padded.kept
    assert distance(packed.gradients, padded.gradients) <= 1e-12
    for key in ("loss", "grad_norm", "reverse_kl_nats", "num_rows", "num_kept"):
        assert packed.metrics[key] == pytest.approx(padded.metrics[key], rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True},
        {"lora": {"rank": 2}, "activation_checkpointing": True},
    ],
)
def test_packed_layers_are_computed_again_as_they_were(
    tiny_models: Path, rollouts: list[Rollout], changes: dict[str, Any]
) -> None:
    if "lora" in changes:
        pytest.importorskip("peft")
    student = {"model": str(tiny_models / "student"), **changes}
    padded = step(tiny_models, rollouts, student=student)
    packed = step(tiny_models, rollouts, student=student, micro_batches="packed")
    assert distance(packed.gradients, padded.gradients) <= 1e-12


@pytest.mark.parametrize("tokens", [1, 40])
def test_how_many_lie_in_a_row_changes_nothing(
    tiny_models: Path, rollouts: list[Rollout], tokens: int
) -> None:
    changes = {"selection": RULES["soft_or"], "micro_batches": "packed"}
    whole = step(tiny_models, rollouts, micro_batch_size=64, **changes)
    found = step(tiny_models, rollouts, micro_batch_tokens=tokens, **changes)
    assert found.kept == whole.kept
    assert distance(found.gradients, whole.gradients) <= 1e-12


def test_the_order_of_rollouts_changes_nothing(tiny_models: Path, rollouts: list[Rollout]) -> None:
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    changes = {"selection": RULES["soft_or"], "micro_batches": "packed"}
    plain = step(tiny_models, rollouts, **changes)
    moved = step(tiny_models, [rollouts[i] for i in order], **changes)
    assert {(order[c], t) for c, t in moved.kept} == plain.kept
    assert distance(moved.gradients, plain.gradients) <= 1e-12


def test_a_row_that_memory_does_not_hold_is_cut_between_sequences(
    tiny_models: Path, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"selection": RULES["soft_or"], "micro_batches": "packed", "micro_batch_tokens": 0}
    expected = step(tiny_models, rollouts, **changes)
    forward, most = Student.forward, 1

    def full(student: Student, batch: Any, teacher: Any, rows: Any = None, *rest: Any,
             **options: Any) -> Any:  # fmt: skip
        if rows is not None and batch.num_sequences > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(student, batch, teacher, rows, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Student, "forward", full)
        found = step(tiny_models, rollouts, **changes)
        assert found.metrics["num_memory_splits"] > 4
        assert distance(found.gradients, expected.gradients) <= 1e-12
        most = 0
        with pytest.raises(RunError, match="ran out of memory while it trained on"):
            step(tiny_models, rollouts, **changes)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_halves_of_a_packed_row_hold_the_same_rows(rollouts: list[Rollout], count: int) -> None:
    batch = pack(rollouts[:count])
    halves = batch.halves()
    for name in ("tokens", "completion", "position"):
        both = torch.cat([getattr(half, name) for half in halves])
        assert torch.equal(both, getattr(batch, name))
    hidden = torch.rand(*batch.input_ids.shape, 4)
    parts = hidden.split([half.input_ids.numel() for half in halves], dim=1)
    flat = torch.cat([half.flatten(part) for half, part in zip(halves, parts, strict=True)])
    assert torch.equal(flat, batch.flatten(hidden))
    for half in halves:
        assert half.packed is not None
        assert half.packed.starts.diff().tolist() == list(half.packed.lengths)
        assert (half.position_ids == 0).sum() == half.num_sequences


@pytest.mark.slow
def test_a_run_from_packed_rows_resumes_bit_for_bit(tiny_models: Path, tmp_path: Path) -> None:
    """Also with a teacher that is read anew in every step."""
    changes = {
        "micro_batches": "packed",
        "teacher": {"model": str(tiny_models / "teacher"), "mode": "reload"},
        "selection": RULES["soft_or"],
        "num_steps": 3,
        "checkpoint_every": 1,
    }
    seen: dict[str, list[dict[str, Any]]] = {}
    for arm, stop_after in (("whole", None), ("stopped", 2)):
        config, steps = tiny_config(tiny_models, tmp_path / arm, **changes), []

        def on_step(metrics: dict[str, Any], steps: Any = steps, last: Any = stop_after) -> None:
            steps.append({k: v for k, v in metrics.items() if k not in MEASURED})
            if metrics["step"] == last:
                raise KeyboardInterrupt

        try:
            train(config, log=lambda _: None, on_step=on_step)
        except KeyboardInterrupt:
            del steps[1:]  # the second step's checkpoint was not written
            last: list[dict[str, Any]] = []
            train(config, log=lambda _: None, on_step=last.append)
            steps += [{k: v for k, v in m.items() if k not in MEASURED} for m in last]
        seen[arm] = steps
    assert seen["stopped"] == seen["whole"]
    weights = [(tmp_path / arm / "student" / "model.safetensors").read_bytes() for arm in seen]
    assert weights[0] == weights[1]


def test_a_teacher_that_cannot_be_packed_is_one_line(tiny_models: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tiny import TOKENIZER
    from tutelage.models.load import load_tokenizer, save_model

    tokenizer = load_tokenizer(TOKENIZER)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 128}
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer) + 3, **sizes))
    save_model(teacher, tokenizer, tmp_path / "gpt2")
    changes = {"teacher": {"model": str(tmp_path / "gpt2")}, "micro_batches": "packed"}
    config = tiny_config(tiny_models, tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=r"got the teacher .*, a GPT2LMHeadModel. Use") as error:
        build_components(config)
    assert "\n" not in str(error.value)
