"""A run computes what its configuration says, whatever the environment and torch's settings are.

accelerate, torch and the libraries below them take precision, gradient accumulation, compilers and
sharding from environment variables and from settings of the process. A request that would change
the numbers and that the configuration does not hold is refused in one line; settings of the process
are set to torch's defaults for the time of a run, and restored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)

from tutelage.config.schema import Config
from tutelage.errors import RunError
from tutelage.models.sharding import GROUP_TIMEOUT

_OFF = ("", "no", "none", "false", "f", "n", "off", "0")
"""Values that request nothing, in lower case."""
_SHARDING = "Use student.sharding and teacher.sharding"
_CPU_PRECISION = "float32 is float32; use student.dtype and teacher.dtype"
_OF_ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": (_OFF, "Use student.dtype and teacher.dtype"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ((*_OFF, "1"), "Use micro_batch_tokens"),
    "ACCELERATE_GRADIENT_CLIPPING": (_OFF, "Use optimizer.max_grad_norm"),
    "ACCELERATE_DYNAMO_BACKEND": (_OFF, "A run is not compiled"),
    "ACCELERATE_DOWNCAST_BF16": (_OFF, "Use student.dtype and teacher.dtype"),
    "ACCELERATE_USE_FSDP": (_OFF, _SHARDING),
    "ACCELERATE_USE_DEEPSPEED": (_OFF, _SHARDING),
    "ACCELERATE_USE_MEGATRON_LM": (_OFF, _SHARDING),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_OFF, _SHARDING),
    "XLA_USE_BF16": (_OFF, "Use student.dtype and teacher.dtype"),
    "XLA_DOWNCAST_BF16": (_OFF, "Use student.dtype and teacher.dtype"),
}
_OF_LIBRARIES = {
    "DNNL_DEFAULT_FPMATH_MODE": (("", "strict"), _CPU_PRECISION),
    "ONEDNN_DEFAULT_FPMATH_MODE": (("", "strict"), _CPU_PRECISION),
    "NVIDIA_TF32_OVERRIDE": (("", "0"), _CPU_PRECISION),
    "CUBLAS_EMULATE_SINGLE_PRECISION": (_OFF, _CPU_PRECISION),
    "CUBLAS_EMULATE_DOUBLE_PRECISION": (_OFF, "float64 is float64"),
}
"""Variables that may request other arithmetic: values that request nothing, and what to do."""
_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU")
"""Ways of accelerate to distribute that leave a model whole."""


def refuse_requests(environment: Mapping[str, str], device: torch.device) -> None:
    """Refuse variables for accelerate that ask for other arithmetic than the configuration's.

    Args:
        environment: names and values, such as `os.environ`.
        device: the run's.

    Raises:
        RunError: one of them does; it is named with its value.
    """
    _refuse_any(environment, _OF_ACCELERATE)
    remedy = "Use the key device"
    if device.type != "cpu" and environment.get("ACCELERATE_USE_CPU", "").lower() not in _OFF:
        _refuse("ACCELERATE_USE_CPU", environment["ACCELERATE_USE_CPU"], remedy)
    place = environment.get("ACCELERATE_TORCH_DEVICE", "")
    if place and place.partition(":")[0] != device.type:
        _refuse("ACCELERATE_TORCH_DEVICE", place, remedy)


def _refuse_any(
    environment: Mapping[str, str], requests: Mapping[str, tuple[tuple[str, ...], str]]
) -> None:
    for name, (neutral, remedy) in requests.items():
        value = environment.get(name, "")
        if value.strip().lower() not in neutral:
            _refuse(name, value, remedy)


def _refuse(name: str, value: str, remedy: str) -> None:
    raise RunError(
        f"the environment variable {name}={value!r} requests what only the configuration may "
        f"change. {remedy}, and unset the variable."
    )


def open_accelerator(config: Config, folder: Path, device: torch.device) -> Accelerator:
    """The processes of a run: plain float32 bookkeeping, one update a backward pass, no compiler.

    Args:
        config: the run.
        folder: where trackers write.
        device: the run's.

    Raises:
        RunError: the environment, or an earlier `Accelerator` of this process, asks for more.
    """
    refuse_requests(os.environ, device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Their functions have the group of the time of import as the default of an argument: a run
        # that imports them later could not let go of its own.
        import torch.distributed.fsdp
        import torch.distributed.nn
        import torch.distributed.optim  # noqa: F401
    patience = InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend="no"),
            log_with=list(config.trackers) or None,
            project_dir=folder,
            kwargs_handlers=[patience],
        )
    except (ValueError, NotImplementedError) as error:  # the state of an earlier one is kept
        raise RunError(
            f"accelerate cannot be set up for a run: {error}. Start a new process, without an "
            "Accelerator of its own."
        ) from None
    _refuse_other_state(accelerator, device)
    return accelerator


def _refuse_other_state(accelerator: Accelerator, device: torch.device) -> None:
    """Whatever asked for it: what accelerate would do has to be what the run asked for."""
    state = {
        "mixed precision": (accelerator.mixed_precision, "no"),
        "gradient accumulation": (accelerator.gradient_accumulation_steps, 1),
        "device": (accelerator.device.type, device.type),
        "compiler": (accelerator.state.dynamo_plugin.backend.value.lower(), "no"),
    }
    kind = accelerator.distributed_type.value
    state["distribution"] = (kind, kind if kind in _KINDS else "NO")
    for what, (found, wanted) in state.items():
        if found != wanted:
            raise RunError(
                f"accelerate's {what} is {found!r}, a run needs {wanted!r}. Start a new process, "
                "without an Accelerator of its own and without variables for accelerate."
            )


_Setting: TypeAlias = tuple[Callable[[], Any], Callable[[Any], Any], Any]
"""How to read a setting of the process, how to write it, and a run's value."""


def _settings() -> list[_Setting]:
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    found: list[_Setting] = [
        (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, False),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, False),
        (_flushes, torch.set_flush_denormal, False),
        (
            torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp,
            False,
        ),
    ]
    for kind in ("cpu", "cuda"):
        found.append(
            (
                partial(torch.is_autocast_enabled, kind),
                partial(torch.set_autocast_enabled, kind),
                False,
            )
        )
    attributes: list[tuple[Any, str, Any]] = [
        (matmul, "allow_fp16_reduced_precision_reduction", True),
        (matmul, "allow_bf16_reduced_precision_reduction", True),
        (matmul, "allow_fp16_accumulation", False),
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", False),
    ]
    # torch 2.9 and later have a precision for each kind of product besides the common one.
    kinds = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
    present = [kind for kind in kinds if _has(torch.backends, f"{kind}.fp32_precision")]
    attributes += [(attrgetter(kind)(torch.backends), "fp32_precision", "ieee") for kind in present]
    if "cudnn.conv" not in present:
        attributes.append((cudnn, "allow_tf32", False))
    found += [
        (partial(getattr, owner, name), partial(setattr, owner, name), value)
        for owner, name, value in attributes
        if _has(owner, name)
    ]
    return found


def _has(owner: Any, path: str) -> bool:
    try:
        attrgetter(path)(owner)
    except (AttributeError, AssertionError):  # some classes of settings raise the latter
        return False
    return True


def _flushes() -> bool:
    """Whether this thread rounds the smallest numbers to zero."""
    return float(torch.tensor(1e-310, dtype=torch.float64) * 1) == 0.0


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Inside, torch computes as it does by default, in whatever state the caller left it.

    Default dtype float32, products of float32 in float32 (no TF32, no bfloat16), no autocast, no
    deterministic or autotuned variants of kernels, no anomaly mode, gradients where they are asked
    for. What differed is given back at the end.

    Raises:
        RunError: a variable asks the libraries below torch for less than float32; or torch's
            default device is not the CPU, which it has no way to set aside.
    """
    _refuse_any(os.environ, _OF_LIBRARIES)
    if torch.get_default_device().type != "cpu":
        raise RunError(
            f"torch's default device is {torch.get_default_device()}, a run needs the CPU. Leave "
            "out torch.set_default_device, and use the key device."
        )
    settings = _settings()
    try:
        before = [read() for read, _, _ in settings]
    except RuntimeError as error:  # torch's older and newer settings of precision contradict
        raise RunError(
            f"torch's precision of products cannot be read: {str(error).split('. ')[0]}. Leave out "
            "torch.backends.…fp32_precision: a run multiplies in float32."
        ) from None
    changed = [
        (write, old)
        for (_, write, value), old in zip(settings, before, strict=True)
        if old != value
    ]
    try:
        for (_, write, value), old in zip(settings, before, strict=True):
            if old != value:
                write(value)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for write, old in changed:
            write(old)
