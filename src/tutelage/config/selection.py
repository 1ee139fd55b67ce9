"""Which tokens a run trains on, as configuration: one class for each shape of rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from tutelage.config.bounds import STRICT, require

Scope: TypeAlias = Literal["completion", "batch"]
Normalization: TypeAlias = Literal["minmax_p98", "minmax", "minmax_p98_both", "quantile_05_95"]


def _require_keep(keep: float) -> None:
    hint = "Use keep = 1.0 to train on every token."
    require(0.0 < keep <= 1.0, "selection.keep", "in (0, 1]", keep, hint)


@dataclass(frozen=True)
class AllTokens:
    """Train on every token."""

    __pydantic_config__ = STRICT
    rule: Literal["all"] = "all"


@dataclass(frozen=True)
class SomeTokens:
    """Train on the tokens that a rule scores highest."""

    __pydantic_config__ = STRICT
    rule: Literal[
        "entropy",
        "soft_or",
        "q3",
        "divergence",
        "forward_divergence",
        "bottom",
        "lowest_logprob",
        "teachability",
        "gradient_norm",
        "local_oracle",
        "local_gain",
    ]
    keep: float = 0.5
    """Fraction of each completion's tokens to train on, in (0, 1]."""
    scope: Scope = "completion"
    """One budget per completion, or one for the whole global batch."""
    normalization: Normalization = "minmax_p98"
    """How entropy and divergence are brought to [0, 1] over the global batch."""

    def __post_init__(self) -> None:
        _require_keep(self.keep)


@dataclass(frozen=True)
class SampledTokens:
    """Train on tokens sampled without replacement, with probability proportional to a score."""

    __pydantic_config__ = STRICT
    rule: Literal["entropy_sample", "soft_or_sample"]
    keep: float = 0.5
    """Fraction of each completion's tokens to train on, in (0, 1]."""
    scope: Scope = "completion"
    """One budget per completion, or one for the whole global batch."""
    normalization: Normalization = "minmax_p98"
    """How entropy and divergence are brought to [0, 1] over the global batch."""
    correct_sampling: bool = False
    """Weigh kept tokens by 1/π, which estimates the all-token gradient without bias."""

    def __post_init__(self) -> None:
        _require_keep(self.keep)


@dataclass(frozen=True)
class RandomTokens:
    """Train on tokens sampled uniformly without replacement: the control of every other rule."""

    __pydantic_config__ = STRICT
    rule: Literal["random"]
    keep: float = 0.5
    """Fraction of each completion's tokens to train on, in (0, 1]."""
    scope: Scope = "completion"
    """One budget per completion, or one for the whole global batch."""
    correct_sampling: bool = False
    """Weigh kept tokens by 1/π, which estimates the all-token gradient without bias."""

    def __post_init__(self) -> None:
        _require_keep(self.keep)


@dataclass(frozen=True)
class GapTokens:
    """Train on the tokens whose probability differs most between student and teacher (DIAL).

    Tokens that end a text are never kept.
    """

    __pydantic_config__ = STRICT
    rule: Literal["probability_gap"]
    b: float = 1.0
    """Share of the probability gap in abs(log q − log p)^(1−b)·abs(q − p)^b, in [0, 1]."""
    keep: float = 0.5
    """Fraction of each completion's tokens to train on, in (0, 1]."""
    scope: Scope = "completion"
    """One budget per completion, or one for the whole global batch."""

    def __post_init__(self) -> None:
        _require_keep(self.keep)
        require(0.0 <= self.b <= 1.0, "selection.b", "in [0, 1]", self.b, "1.0 is usual.")


@dataclass(frozen=True)
class ExtremeTokens:
    """Train on the few tokens of the largest or smallest log q − log p (Sparse OPD)."""

    __pydantic_config__ = STRICT
    rule: Literal["extreme_advantage"]
    end: Literal["max", "min", "both"] = "both"
    """Where the token is likelier for the teacher than for the student, less likely, or both."""
    keep: float = 0.0005
    """Fraction of each completion's tokens to train on at each end, in (0, 1]; at least one."""
    scope: Scope = "completion"
    """One budget per completion, or one for the whole global batch."""

    def __post_init__(self) -> None:
        _require_keep(self.keep)


@dataclass(frozen=True)
class InfluenceTokens:
    """Train on the tokens whose sampled gradient has the most signal for its noise (IER)."""

    __pydantic_config__ = STRICT
    rule: Literal["influence"]
    combine: Literal["none", "soft_or", "soft_and"] = "soft_or"
    """How the rank r of the signal and a usefulness u, both in [0, 1], make the score: r alone,
    r + u − r·u (r + u where either is 1), or r·u."""
    usefulness: Literal["soft_or", "teachability"] = "soft_or"
    """Rule whose score is u."""
    keep: float = 0.01
    """Fraction of each completion's tokens to train on, in (0, 1]."""
    scope: Scope = "completion"
    """One budget, and one ranking, per completion, or one for the whole global batch."""
    normalization: Normalization = "minmax_p98"
    """How entropy and divergence are brought to [0, 1] over the global batch."""

    def __post_init__(self) -> None:
        _require_keep(self.keep)


@dataclass(frozen=True)
class FirstTokens:
    """Train on the first tokens of every completion."""

    __pydantic_config__ = STRICT
    rule: Literal["first_n"]
    num_tokens: int
    """Tokens of each completion, at least 1."""

    def __post_init__(self) -> None:
        count, hint = self.num_tokens, "Use rule 'all' for every token."
        require(count >= 1, "selection.num_tokens", "at least 1", count, hint)


SelectionConfig: TypeAlias = Annotated[
    AllTokens
    | SomeTokens
    | SampledTokens
    | RandomTokens
    | GapTokens
    | ExtremeTokens
    | InfluenceTokens
    | FirstTokens,
    Field(discriminator="rule"),
]
