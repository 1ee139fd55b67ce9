"""Metrics sent to TensorBoard, wandb or trackio, besides the run folder's own logs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator

from tutelage.config.parse import flat_values, to_table
from tutelage.config.schema import Config
from tutelage.errors import MissingExtraError


def require_trackers(config: Config) -> None:
    """Refuses trackers whose package is missing; accelerate would leave them out silently.

    Raises:
        MissingExtraError: a package is not installed.
    """
    for name in config.trackers:
        if find_spec(name) is None:
            raise MissingExtraError(name, name, f"trackers = [{name!r}]")


def start_trackers(accelerator: Accelerator, config: Config, run_name: str) -> None:
    """Begin a run of this name with every configured tracker."""
    if not config.trackers:
        return
    values = flat_values(to_table(config))
    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in values.items()}
    accelerator.init_trackers("tutelage", plain, {"wandb": {"name": run_name}})


def numbers(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested record by their dotted names; texts, lists and None are left out."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and key != "step":
            found[f"{prefix}{key}"] = value
    return found
