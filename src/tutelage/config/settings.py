"""Settings of models as they stand in configurations; reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tutelage.errors import ConfigError, as_share

TeacherMode = Literal["resident", "offload", "reload"]
OptimizerKind = Literal["adamw", "adamw_on_disk", "adamw_8bit", "paged_adamw_8bit", "adafactor"]

LARGEST_COUNT = 1 << 20
"""More prompts, samples or tokens than that are a slip of the pen, and would fill the memory."""


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn. Training is exact only at the defaults of the three filters."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # as in every table of a configuration
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Smallest set of likeliest tokens holding this probability, in (0, 1]; 1 keeps all."""
    top_k: int = 0
    """Number of likeliest tokens that may be drawn; 0 keeps all."""
    max_new_tokens: int = 256
    """Length in tokens at which a completion is cut off."""
    num_samples: int = 1
    """Completions per prompt."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"sampling.temperature must be at least 0, got {self.temperature}. "
                "Use 1.0 for the model's own distribution or 0 for greedy."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"sampling.top_p must be in (0, 1], got {self.top_p}. {as_share(self.top_p)}"
                "Use 1.0 to keep every token."
            )
        for name, least in (("top_k", 0), ("max_new_tokens", 1), ("num_samples", 1)):
            value = self.__dict__[name]
            if value < least:
                raise ConfigError(
                    f"sampling.{name} must be at least {least}, got {value}. Raise it."
                )
            if name != "top_k" and value > LARGEST_COUNT:
                raise ConfigError(
                    f"sampling.{name} must be at most {LARGEST_COUNT}, got {value}. Lower it."
                )
