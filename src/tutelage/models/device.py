"""Devices by their names."""

from __future__ import annotations

import torch

from tutelage.errors import ConfigError


def find_device(name: str) -> torch.device:
    """A device by its name: cpu, cuda, cuda:N, or auto, which takes CUDA where it is.

    Raises:
        ConfigError: it is unknown or not there.
    """
    num_here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if num_here else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown. Use auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported. Use auto, cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= num_here:
        found = f"only {num_here} CUDA devices" if num_here else "no CUDA device"
        raise ConfigError(f"device {name!r} is not here: torch finds {found}. Use auto or cpu.")
    return device
