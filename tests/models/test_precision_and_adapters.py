"""Master weights, activation checkpointing, adapters and low-bit weights, in whole runs."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import save_tiny_model, tiny_config
from tiny_runs import (
    LORA,
    are_equal,
    metrics_of,
    needs_bitsandbytes,
    needs_peft,
    run,
    weights_of,
)
from tutelage.errors import ConfigError, MissingExtraError, ModelError
from tutelage.models.llama_cpu.layers import is_fast_family
from tutelage.models.load import load_model
from tutelage.models.lora import add_lora, checkpoint_activations, learning
from tutelage.models.optimizer import MasterWeights, make_optimizer
from tutelage.setup.components import build_components


@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"dtype": "bfloat16"}},
        pytest.param(
            {"student": {"lora": LORA, "activation_checkpointing": True}}, marks=needs_peft
        ),
        {"optimizer": {"kind": "adamw_on_disk"}},
        {"optimizer": {"kind": "adamw_on_disk"}, "student": {"dtype": "bfloat16"}},
        pytest.param({"optimizer": {"kind": "adamw_8bit"}}, marks=needs_bitsandbytes),
        {"optimizer": {"kind": "adafactor", "offload": True}, "student": {"dtype": "bfloat16"}},
    ],
    ids=["bfloat16", "lora", "on_disk", "on_disk_bfloat16", "adamw_8bit", "adafactor"],
)
def test_a_continued_run_ends_in_the_same_bits(
    tmp_path: Path, tiny_models: Path, changes: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    optimizer = {"learning_rate": 2e-3} | changes.get("optimizer", {})
    once = run(tiny_models, out, **changes | {"optimizer": optimizer})
    metrics = metrics_of(out)
    assert not are_equal(once, weights_of(tiny_models / "student"))
    shutil.rmtree(out / "checkpoint-000004")
    shutil.rmtree(out / "student")
    assert are_equal(run(tiny_models, out, **changes | {"optimizer": optimizer}), once)
    assert metrics_of(out) == metrics


def test_master_weights_add_up_what_bfloat16_rounds_away() -> None:
    plain = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    mastered = torch.nn.Parameter(plain.detach().clone())
    exact = torch.nn.Parameter(torch.ones(64))
    masters = MasterWeights([mastered, exact])
    assert masters.masters[1] is exact
    optimizers = [torch.optim.SGD([w], lr=1e-3) for w in (plain, masters.masters[0], exact)]
    masters.register_hook(optimizers[1])
    for _ in range(20):
        plain.grad = torch.ones_like(plain)
        exact.grad = torch.ones_like(exact)
        for part in (1.0, 2.0**-9, -(2.0**-9)):  # bfloat16 would lose the small ones
            mastered.grad = torch.full_like(mastered, part)
            masters.accumulate_grads()
            assert mastered.grad is None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(masters.masters[0], exact)
    assert torch.equal(mastered, exact.bfloat16())
    assert mastered[0] < 0.99
    assert plain[0] == 1  # the control: each update alone is below half a unit


def test_checkpointed_activations_leave_rollouts_as_they_are(tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "student"))
    assert is_fast_family(model)
    checkpoint_activations(model)
    assert is_fast_family(model)


def test_activations_computed_twice_give_the_same_gradient(tiny_models: Path) -> None:
    def gradients(is_checkpointed: bool) -> tuple[list[Tensor], int]:
        model = load_model(str(tiny_models / "student"))
        if is_checkpointed:
            checkpoint_activations(model)
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        with learning(model, (0,)):
            model(torch.arange(12)[None] % 20, use_cache=False).logits.square().sum().backward()
        assert not any(module.training for module in model.modules())
        return [p.grad for p in model.parameters() if p.grad is not None], len(calls)

    (plain, once), (found, twice) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@needs_peft
def test_an_adapter_starts_as_nothing_and_is_exported_as_a_plain_model(
    tmp_path: Path, tiny_models: Path
) -> None:
    base = load_model(str(tiny_models / "student"))
    ids = torch.arange(12)[None] % 20
    expected = base(ids).logits
    add_lora(base, 4, 8.0)
    assert torch.equal(base(ids).logits, expected)
    student = {"lora": LORA | {"dropout": 0.0}}
    out = tmp_path / "out"
    merged = run(tiny_models, out, student=student)
    names = sorted(p.name for p in (out / "checkpoint-000004" / "model").iterdir())
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    assert merged.keys() == weights_of(tiny_models / "student").keys()
    config = tiny_config(
        tiny_models, out, student={"model": str(tiny_models / "student")} | student
    )
    trained = build_components(config, str(out / "checkpoint-000004" / "model")).student.model
    exported = load_model(str(out / "student"))
    assert (trained(ids).logits - exported(ids).logits).abs().max() < 1e-4
    assert (exported(ids).logits - expected).abs().max() > 1e-3
    assert not trained.get_output_embeddings().weight.requires_grad


@needs_peft
def test_dropout_is_off_while_the_student_writes_and_is_scored(
    tmp_path: Path, tiny_models: Path
) -> None:
    found = []
    for dropout in (0.0, 0.5):
        out = tmp_path / str(dropout)
        lora = {"rank": 4, "dropout": dropout}
        rule = {"rule": "soft_or", "keep": 0.5}
        run(tiny_models, out, student={"lora": lora}, selection=rule, num_steps=2)
        found.append(metrics_of(out))
    (first, second), (first_dropped, second_dropped) = found
    assert first["reverse_kl_nats"] == first_dropped["reverse_kl_nats"]
    assert first["grad_norm"] != first_dropped["grad_norm"]
    assert second["reverse_kl_nats"] != second_dropped["reverse_kl_nats"]


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher whose widths are multiples of 64, as 4-bit kernels ask."""
    folder = tmp_path_factory.mktemp("wide")
    for seed, who in enumerate(("student", "teacher")):
        save_tiny_model(folder / who, seed, hidden_size=64, intermediate_size=128, head_dim=16)
    return folder


@needs_bitsandbytes
@needs_peft
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_low_bit_weights_teach_and_carry_an_adapter(
    tmp_path: Path, wide_models: Path, bits: str
) -> None:
    model = load_model(str(wide_models / "student"))
    low = load_model(str(wide_models / "student"), quantization=bits)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(
        bits == "8bit"
    )
    exact, found = (m.model.layers[0].mlp.up_proj(x) for m in (model, low))
    bound = 0.02 if bits == "8bit" else 0.2
    assert 0 < (found - exact).norm() / exact.norm() < bound
    if bits == "8bit":  # an adapter learns through it
        (g_exact,), (g_found,) = (torch.autograd.grad(y.sum(), x) for y in (exact, found))
        assert 0 < (g_found - g_exact).norm() / g_exact.norm() < bound
    assert low.get_memory_footprint() < model.get_memory_footprint()
    student = {"quantization": bits if bits == "8bit" else "none", "lora": {"rank": 2}}
    teacher = {"quantization": bits, "mode": "offload"}
    out = tmp_path / "out"
    trained = run(wide_models, out, student=student, teacher=teacher, num_steps=2)
    start = weights_of(wide_models / "student")
    assert trained.keys() == start.keys()
    assert not are_equal(trained, start)


@needs_bitsandbytes
@needs_peft
def test_learning_through_4_bits_is_refused_on_a_cpu(tmp_path: Path, tiny_models: Path) -> None:
    # bitsandbytes packs the weights there for a kernel that has no gradient
    student = {"model": str(tiny_models / "student"), "quantization": "4bit", "lora": {}}
    with pytest.raises(ConfigError, match="needs CUDA"):
        build_components(tiny_config(tiny_models, tmp_path, student=student))


@needs_bitsandbytes
def test_rows_that_are_no_whole_blocks_of_4_bits_are_refused_on_a_cpu(tiny_models: Path) -> None:
    with pytest.raises(ModelError, match="a layer with 32 inputs, which on a CPU must be a mul"):
        load_model(str(tiny_models / "teacher"), quantization="4bit")


# --- what cannot be had ---------------------------------------------------------------------------


def test_what_is_missing_is_one_line(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if importlib.util.find_spec("bitsandbytes") is not None:
        with pytest.raises(ConfigError, match="Use adamw_8bit"):
            make_optimizer("paged_adamw_8bit", weights, 1e-3, (0.9, 0.95), 0.0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="extra 'lowbit'"):
        make_optimizer("adamw_8bit", weights, 1e-3, (0.9, 0.95), 0.0)
    with pytest.raises(MissingExtraError, match="extra 'lowbit'"):
        load_model(str(tiny_models / "student"), quantization="4bit")
    with pytest.raises(MissingExtraError, match="extra 'lora'"):
        add_lora(torch.nn.Linear(2, 2), 2, 4.0)  # type: ignore[arg-type]


def test_settings_that_exclude_each_other_are_one_line(tmp_path: Path, tiny_models: Path) -> None:
    student = {"model": "x", "quantization": "4bit"}
    with pytest.raises(ConfigError, match=r"student.quantization must be none, got '?4bit"):
        tiny_config(tiny_models, tmp_path, student=student)
    lora = {"model": "x", "lora": {"rnk": 3}}
    with pytest.raises(ConfigError, match=r"unknown key 'student.lora.rnk'. Did you mean 'rank'"):
        tiny_config(tiny_models, tmp_path, student=lora)


@needs_peft
def test_an_adapter_needs_layers_that_exist(tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "student"))
    with pytest.raises(ConfigError, match=r"student.lora cannot be added.*nosuch"):
        add_lora(model, 2, 4.0, target_modules=["nosuch"])
