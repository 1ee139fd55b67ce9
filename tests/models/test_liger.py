"""Liger's layers in a model: only in that one, and only if they compute the same."""

from __future__ import annotations

import copy
import importlib.machinery
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packing import CONFIGS, OTHERS, model_of
from test_padded_neighbours import SIZES, rollouts
from torch import Tensor
from transformers import LlamaConfig

from tiny import tiny_config
from tutelage.data.batch import collate
from tutelage.errors import ConfigError, MissingExtraError, ModelError
from tutelage.models.head import hidden_rows
from tutelage.models.liger import use_liger_layers, with_own_layers
from tutelage.models.llama_cpu.ops import rms_norm, swiglu
from tutelage.models.lora import add_lora, checkpoint_activations, learning
from tutelage.setup.validate import validate

FACTOR = {"norm": 1.0}
"""What the stand-in's norms are off by."""


class _Norm(torch.autograd.Function):
    """In the signature of Liger's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def apply(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        return rms_norm(x, weight, eps) * FACTOR["norm"]


class _Unit(_Norm):
    @staticmethod
    def apply(gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        return swiglu(gate, up)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with Liger's names, in torch: the kernels themselves need a GPU or interpreter."""
    package, ops = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.ops")
    package.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    ops.__dict__.update(LigerRMSNormFunction=_Norm, LigerSiLUMulFunction=_Unit)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)


def gradients(model: Any) -> list[Tensor]:
    batch = collate(rollouts(), 0)
    with learning(model, (1,)):
        read = hidden_rows(model, batch)
        (read * torch.arange(read.numel()).view_as(read).cos()).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", CONFIGS)
def test_one_model_computes_by_other_layers_and_no_other_does(name: str) -> None:
    model, plain = model_of(CONFIGS[name]), model_of(CONFIGS[name])
    names = {n: type(m).__name__ for n, m in model.named_modules()}
    use_liger_layers(model, "student", 16)
    changed = [m for m in model.modules() if "forward" in vars(m)]
    per_layer = 5 if name == "qwen3" else 3
    assert len(changed) == 3 * per_layer + 1
    assert {n: type(m).__name__ for n, m in model.named_modules()} == names
    assert not any("forward" in vars(m) for m in model_of(CONFIGS[name]).modules())
    twin = with_own_layers(copy.deepcopy(model))
    assert not any("forward" in vars(m) for m in twin.modules())
    assert all(m.forward.__self__ is m for m in changed)
    for found, expected in zip(gradients(model), gradients(plain), strict=True):
        gap = float((found - expected).norm() / expected.norm())
        assert gap < 1e-5  # transformers' norms are float32 in any case


@pytest.mark.usefixtures("stand_in")
def test_adapters_and_layers_computed_again() -> None:
    pytest.importorskip("peft")
    found = []
    for is_fused in (True, False):
        model = model_of(CONFIGS["qwen3"])
        add_lora(model, 2, 4.0)
        checkpoint_activations(model)
        if is_fused:
            use_liger_layers(model, "student", 16)
        found.append(gradients(model))
    assert len(found[0]) == 2 * 7 * 3
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())


@pytest.mark.usefixtures("stand_in")
def test_layers_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FACTOR, "norm", 1.01)
    with pytest.raises(ModelError, match=r"do not compute what those of the student do.*by 0\.0"):
        use_liger_layers(model_of(CONFIGS["llama"]), "student", 16)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", [*OTHERS, "llama_gelu"])
def test_other_models_are_refused_in_one_line(name: str) -> None:
    gelu = LlamaConfig(**SIZES | {"hidden_act": "gelu"})
    with pytest.raises(ConfigError, match=r'Use student\.layers = "transformers"\.$') as error:
        use_liger_layers(model_of(OTHERS.get(name, gelu)), "student")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("stand_in")
def test_a_run_on_a_cpu_is_refused_before_weights_are_read(
    tiny_models: Path, tmp_path: Path
) -> None:
    student = {"model": str(tiny_models / "student"), "layers": "liger"}
    config = tiny_config(tiny_models, tmp_path / "run", student=student)
    with pytest.raises(ConfigError, match=r"^student.layers 'liger' runs on CUDA, got .* cpu"):
        validate(config, tmp_path / "run")


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="Liger is installed")
def test_without_liger_the_line_says_what_to_install(tiny_models: Path, tmp_path: Path) -> None:
    student = {"model": str(tiny_models / "student"), "layers": "liger"}
    config = tiny_config(tiny_models, tmp_path / "run", student=student)
    with pytest.raises(ConfigError, match="'liger' runs on CUDA, got a run on cpu"):
        validate(config, tmp_path / "run")  # an installation would not help here
    with pytest.raises(MissingExtraError, match="pip install 'liger-kernel'"):
        use_liger_layers(model_of(CONFIGS["llama"]), "student", 16)


INTERPRETED = """
import sys
import numpy as np, torch, triton.language as tl
from triton.runtime import interpreter
import liger_kernel.ops.rms_norm
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from tutelage.models.liger import use_liger_layers, with_own_layers

# As on a GPU: numbers are float32 scalars of the kernel, and rsqrt is Triton's own.
plain = interpreter._implicit_cvt
def converted(x):
    if type(x) is not float:
        return plain(x)
    return tl.tensor(interpreter.TensorHandle(np.array([x], np.float32), tl.float32), tl.float32)
interpreter._implicit_cvt = converted
liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)

sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.25)
for config in (LlamaConfig(**sizes), Qwen3Config(**sizes)):
    pair = []
    for is_fused in (True, False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        if is_fused:
            use_liger_layers(model, "student", 6)
        ids = torch.arange(1, 15).view(2, 7)
        read = model.model(input_ids=ids, use_cache=False).last_hidden_state
        (read * torch.arange(read.numel()).view_as(read).cos()).sum().backward()
        pair.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.skipif(
    find_spec("liger_kernel") is None or find_spec("triton") is None,
    reason="Liger's kernels need the packages liger-kernel and triton",
)
def test_the_kernels_themselves_interpreted() -> None:
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
