"""The tables of evaluations, and what a run does by their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from tutelage.config.bounds import STRICT, require, require_counts, require_least
from tutelage.config.rollouts import stores_teacher
from tutelage.config.sampling import require_filters

if TYPE_CHECKING:
    from tutelage.config.schema import Config

Metric: TypeAlias = Literal["none", "mean_at_k", "pass_at_k", "held_out_reverse_kl_nats"]
"""Numbers of the student's evaluations, as evaluation.jsonl names them, or none of them."""
IS_MORE_BETTER: dict[str, bool] = {
    "mean_at_k": True,
    "pass_at_k": True,
    "held_out_reverse_kl_nats": False,
}
"""Of each of these numbers whether a larger one is better."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Measurements on held-out prompts, before, during and after training."""

    __pydantic_config__ = STRICT
    num_problems: int = 64
    """Held-out prompts; 0 measures nothing."""
    num_samples: int = 8
    """Completions per prompt, the k of mean@k and pass@k."""
    every: int = 0
    """Steps between evaluations; 0 for only before and after."""
    temperature: float = 1.0
    """Sampling temperature of the evaluation; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus of the evaluation, in (0, 1]."""
    teacher: bool = True
    """Evaluate the teacher too, once."""

    def __post_init__(self) -> None:
        require_least("evaluation.", self.__dict__, every=0)
        require_counts("evaluation.", self.__dict__, num_problems=0, num_samples=1)
        require_filters("evaluation.", self.temperature, self.top_p)


@dataclass(frozen=True)
class StopWhenConfig:
    """An end before the last step, by the evaluations after the first update."""

    __pydantic_config__ = STRICT
    metric: Metric = "none"
    """What decides: mean_at_k or pass_at_k, of which more is better, or held_out_reverse_kl_nats,
    of which less is; none takes every step."""
    patience: int = 0
    """Stop once so many evaluations in a row are not better than the best before them; 0 never."""
    value: float | None = None
    """Stop once the metric is at least this, or for the divergence at most; None never."""

    def __post_init__(self) -> None:
        require_least("stop_when.", self.__dict__, patience=0)
        has_any = self.patience > 0 or self.value is not None
        if self.metric == "none":
            rule = " or ".join(name for name in IS_MORE_BETTER)
            hint = "It is what patience and value are about."
            require(not has_any, "stop_when.metric", rule, self.metric, hint)
            return
        rule, hint = "at least 1 without stop_when.value", "Else nothing would stop the run."
        require(has_any, "stop_when.patience", rule, self.patience, hint)
        if self.value is not None:
            is_share = IS_MORE_BETTER[self.metric]
            is_possible = self.value >= 0 and not (is_share and self.value > 1)
            rule = "in [0, 1]" if is_share else "at least 0"
            require(
                is_possible,
                "stop_when.value",
                rule,
                self.value,
                "It is in the unit of evaluation.jsonl.",
            )


def require_measured(config: Config) -> None:
    """Refuses a number that decides, and that the run does not measure between its steps.

    Raises:
        ConfigError: the first such.
    """
    for key, metric in (
        ("keep_best", config.keep_best),
        ("stop_when.metric", config.stop_when.metric),
    ):
        if metric == "none":
            continue
        settings = config.evaluation
        hint = f"Or set {key} = none."
        for name, value in (("num_problems", settings.num_problems), ("every", settings.every)):
            rule = f"at least 1 with {key} = {metric}"
            require(value >= 1, f"evaluation.{name}", rule, value, hint)
        if IS_MORE_BETTER[metric]:
            is_graded = config.data.kind != "file" or config.data.grader != "none"
            rule = f"number, math or exact with {key} = {metric}"
            require(is_graded, "data.grader", rule, "none", hint)
        else:
            rule, hint = "another metric with rollouts.teacher_states", "It needs the teacher."
            require(not stores_teacher(config.rollouts), key, rule, metric, hint)
