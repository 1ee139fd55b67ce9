"""Neither variables nor settings of the process change a number of a run: same, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tiny import MEASURED, tiny_config
from tutelage.errors import RunError
from tutelage.evaluation.evaluate import evaluate
from tutelage.evaluation.request import EvaluationRequest
from tutelage.setup.numerics import plain_arithmetic, refuse_requests
from tutelage.train.loop import train
from tutelage.train.snapshot import score_for_page
from tutelage.train.token_scores import ScoreRequest, score

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REFUSED_BY_RUNS = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.1",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "XLA_USE_BF16": "1",
}
REFUSED_BY_ALL = {
    "DNNL_DEFAULT_FPMATH_MODE": "BF16",
    "ONEDNN_DEFAULT_FPMATH_MODE": "ANY",
    "NVIDIA_TF32_OVERRIDE": "1",
    "CUBLAS_EMULATE_SINGLE_PRECISION": "1",
}
PLAIN = {
    # what `accelerate launch` sets where nothing was asked for
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_CPU_AFFINITY": "0",
    # ignored without the switch that would turn them on
    "FSDP_SHARDING_STRATEGY": "1",
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
    "MEGATRON_LM_TP_DEGREE": "2",
    "FP8_BACKEND": "TE",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "True",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    # of the libraries below
    "NVIDIA_TF32_OVERRIDE": "0",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "USE_HUB_KERNELS": "NO",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def metrics_of(models: Path, out: Path) -> list[dict[str, Any]]:
    """Two steps, and what of their metrics repeats."""
    train(tiny_config(models, out, num_steps=2), log=lambda _: None)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in MEASURED} for x in lines]


@pytest.fixture(scope="module")
def expected(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return metrics_of(tiny_models, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(("name", "value"), (REFUSED_BY_RUNS | REFUSED_BY_ALL).items())
def test_a_request_for_other_arithmetic_is_refused_before_anything_is_loaded(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=f"{name}='{value}' .* unset the variable") as caught:
        train(tiny_config(tiny_models, tmp_path / "run"), log=lambda _: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), REFUSED_BY_ALL.items())
def test_evaluations_and_scores_refuse_what_concerns_them(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    model = str(tiny_models / "student")
    calls: list[Callable[[], object]] = [
        lambda: score(tiny_config(tiny_models, Path("unused")), ScoreRequest()),
        lambda: score_for_page(tiny_config(tiny_models, Path("unused")), ScoreRequest()),
        lambda: evaluate(EvaluationRequest(model)),
        lambda: evaluate(EvaluationRequest(model, "gsm8k")),
    ]
    for call in calls:
        with pytest.raises(RunError, match=name):
            call()


def test_another_device_than_the_configured_one_is_refused() -> None:
    refuse_requests({"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}, CPU)
    refuse_requests({"ACCELERATE_USE_CPU": "False", "ACCELERATE_TORCH_DEVICE": "cuda:1"}, CUDA)
    for name, value in (("ACCELERATE_USE_CPU", "true"), ("ACCELERATE_TORCH_DEVICE", "cpu")):
        with pytest.raises(RunError, match=name):
            refuse_requests({name: value}, CUDA)


def test_all_other_variables_leave_every_number_as_it_is(
    tmp_path: Path, tiny_models: Path, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    assert metrics_of(tiny_models, tmp_path / "run") == expected


SETTINGS: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "dtype": (torch.set_default_dtype, torch.float64, torch.float32),
    "precision": (torch.set_float32_matmul_precision, "medium", "highest"),
    "autocast": (lambda on: torch.set_autocast_enabled("cpu", on), True, False),
    "deterministic": (torch.use_deterministic_algorithms, True, False),
    "anomaly": (torch.autograd.set_detect_anomaly, True, False),
    "denormals": (torch.set_flush_denormal, True, False),
    "gradients": (torch.set_grad_enabled, False, True),
}


@pytest.fixture
def unusual() -> Iterator[None]:
    """Every setting of the process that numbers could depend on, another than torch's own."""
    for change, value, _ in SETTINGS.values():
        change(value)
    yield
    for change, _, usual in SETTINGS.values():
        change(usual)


@pytest.mark.usefixtures("unusual")
def test_settings_of_the_process_leave_every_number_as_it_is_and_come_back(
    tmp_path: Path, tiny_models: Path, expected: object
) -> None:
    assert metrics_of(tiny_models, tmp_path / "run") == expected
    assert torch.get_default_dtype() == torch.float64
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.is_autocast_enabled("cpu")
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_anomaly_enabled()
    assert not torch.is_grad_enabled()


def test_gradients_exist_under_inference_mode() -> None:
    with torch.inference_mode(), plain_arithmetic():
        x = torch.ones(2, requires_grad=True)
        x.sum().backward()
    assert x.grad is not None


def test_another_default_device_is_refused() -> None:
    refused = pytest.raises(RunError, match="default device is meta")
    with torch.device("meta"), refused, plain_arithmetic():
        pass


def test_settings_of_precision_that_contradict_one_another_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read() -> str:
        raise RuntimeError("PyTorch is checking whether allow_tf32 is set. Mixed use of both APIs.")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", read)
    with pytest.raises(RunError, match=r"precision of products cannot be read: .*Leave") as told:
        plain_arithmetic().__enter__()
    assert "\n" not in str(told.value)


def test_what_an_earlier_accelerator_of_the_process_asked_for_is_refused(
    tmp_path: Path, tiny_models: Path
) -> None:
    AcceleratorState._reset_state(True)
    try:
        Accelerator(cpu=True, mixed_precision="bf16")
        with pytest.raises(RunError, match="accelerate cannot be set up") as caught:
            train(tiny_config(tiny_models, tmp_path / "run"), log=lambda _: None)
        assert str(caught.value).count("\n") == 0
    finally:
        AcceleratorState._reset_state(True)
