"""The student as its own teacher, as configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from string import Formatter
from typing import Literal

from tutelage.config.bounds import STRICT, require
from tutelage.config.models import StudentConfig, UnsharedTeacher
from tutelage.errors import ConfigError


@dataclass(frozen=True)
class SelfTeacher(UnsharedTeacher):
    """The student is its own teacher: with other weights, or a prompt with more context, or both.

    The teacher is the student's own architecture in the student's dtype, with its adapter or its
    low bits; nothing is loaded for it.
    """

    __pydantic_config__ = STRICT
    kind: Literal["self"]
    weights: Literal["frozen", "ema", "live"] = "frozen"
    """The teacher's weights: frozen, those that the student starts with (under an adapter the base,
    which takes no memory); ema, an exponential moving average of the trained ones in float32; live,
    those of the step itself, without a copy and without a gradient."""
    ema_decay: float | None = None
    """Share of the average that an update keeps, in [0, 1); with ema alone, where it is needed."""
    context: str = ""
    """The teacher's context beyond the prompt: a template over the prompt's fields, such as
    "Reference solution:\\n{answer}"; "" for nothing. A name is a column of the record, or answer,
    the reference answer. In a chat it follows the last message of the user after a blank line; it
    stands directly before a prompt of plain text."""
    mode: Literal["resident", "offload"] = "resident"
    """Where the weights of frozen and ema are between teacher forwards: resident on the
    device, offload in main memory."""
    hidden_budget_bytes: int = 4 << 30
    """Hidden states of one step kept in main memory; more go to a file in the run folder."""

    def __post_init__(self) -> None:
        decay, key, budget = self.ema_decay, "teacher.ema_decay", self.hidden_budget_bytes
        if self.weights == "ema":
            given = "none" if decay is None else decay
            is_right = decay is not None and 0 <= decay < 1
            require(is_right, key, "in [0, 1) with ema", given, "0.999 is usual.")
        else:
            rule = f"left out with teacher.weights = {self.weights}"
            require(decay is None, key, rule, decay, "Only ema has an average.")
        rule, hint = "resident with live weights", "There is no copy that could be moved."
        require(self.weights != "live" or self.mode == "resident", "teacher.mode", rule, self.mode,
                hint)  # fmt: skip
        hint = "0 writes all hidden states to disk."
        require(budget >= 0, "teacher.hidden_budget_bytes", "at least 0", budget, hint)
        _ = self.fields

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields in the template, each once."""
        try:
            parts = list(Formatter().parse(self.context))
        except ValueError as error:
            raise ConfigError(
                f"teacher.context is no template: {error}. Write a field as {{answer}}, and a "
                "brace as {{ or }}."
            ) from None
        names = [(name, spec, conversion) for _, name, spec, conversion in parts]
        for name, spec, conversion in names:
            if name is not None and (not name or set(name) & set(".[]") or spec or conversion):
                raise ConfigError(
                    f"teacher.context has a field that is no plain name, got {name!r}. Write "
                    "{answer} or {COLUMN}, and a brace as {{ or }}."
                )
        return tuple(dict.fromkeys(name for name, _, _ in names if name))

    def of(self, student: StudentConfig) -> SelfTeacher:
        """The teacher of a student, whose model and dtype it has."""
        bound = replace(self)
        object.__setattr__(bound, "_student", student)
        return bound

    @property
    def student(self) -> StudentConfig:
        """The student that it is."""
        student: StudentConfig | None = self.__dict__.get("_student")
        if student is None:
            raise ValueError("a teacher of kind self belongs to a configuration with a student.")
        return student

    @property
    def model(self) -> str:
        """The student's."""
        return self.student.model

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The student's."""
        return self.student.dtype

    @property
    def quantization(self) -> Literal["none", "8bit", "4bit"]:
        """The student's."""
        return self.student.quantization

    @property
    def stop_token(self) -> Literal["refuse"]:
        """One tokenizer has one end."""
        return "refuse"

    @property
    def is_copied(self) -> bool:
        """Whether weights beside the student's are kept; of an adapter only an average is."""
        return self.weights == "ema" or (self.weights == "frozen" and self.student.lora is None)
