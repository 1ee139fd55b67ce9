"""TRL's settings for the steps that ours are compared with."""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "constant",
    "beta": 1.0,  # reverse KL
    "adam_beta2": 0.95,
    "shuffle_dataset": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 0,
}
"""Those of the tool's that decide what is computed, and none that writes a file."""


def trl_settings(**own: Any) -> Any:
    """A `DistillationConfig` of these and of a comparison's own settings."""
    from trl import DistillationConfig

    return DistillationConfig(**COMMON, **own)
