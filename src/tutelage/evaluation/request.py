"""The options of `tutelage eval` and `tutelage sample`, and which of them fit together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tutelage.data.formats import is_file_name
from tutelage.data.prompts import Grader
from tutelage.errors import ConfigError

HELD_OUT = "held-out"


@dataclass(frozen=True)
class EvaluationRequest:
    """A model, problems and how to sample; None takes the value of the suite or of the run.

    The problems are those of `suite`, whose samples are saved, or of `prompts`, or without either
    an embedded task's, which is possible for models with its vocabulary alone.
    """

    model: str
    suite: str | None = None
    """Benchmarks, a file or `held-out`."""
    prompts: str | None = None
    """JSONL or parquet file."""
    model_name: str | None = None
    """Name of the model on a server; None asks the server, which must have one only."""
    num_problems: int | None = None
    """None takes all of a suite, else 64."""
    num_samples: int | None = None
    max_new_tokens: int | None = None
    """None takes the suite's own, where the model's context allows it, else 256."""
    temperature: float | None = None
    top_p: float | None = None
    grader: Grader | None = None
    """How answers of a file are compared; None takes `fitting_grader`. Benchmarks have theirs."""
    chat: bool | None = None
    """Use the chat template; None does if the model has one, or as a held-out part's run did."""
    thinking: bool | None = None
    """Passed to the chat template as enable_thinking; None leaves it to the template, or takes a
    held-out part's run's own."""
    suffix: str | None = None
    """Text appended to every prompt."""
    batch_size: int = 64
    seed: int = 424242
    device: str | None = None
    """Of a model here; None takes CUDA where it is."""
    dtype: str | None = None
    """Of the weights of a model here; None is float32."""
    out: str | None = None
    """Folder of a suite's samples; None takes one below `evaluations`."""

    @property
    def is_embedded(self) -> bool:
        """Whether the problems are an embedded task's."""
        return self.suite is None and self.prompts is None

    @property
    def file(self) -> str | None:
        """The file that holds the problems."""
        is_file = self.suite is not None and is_file_name(self.suite)
        return self.suite if is_file else self.prompts


def refuse_unused(request: EvaluationRequest) -> None:
    """Every option that was given is used, or refused in one line.

    Raises:
        ConfigError: an option has no use, or a number is below 1.
    """
    for name in ("num_problems", "num_samples", "max_new_tokens", "batch_size"):
        value = getattr(request, name)
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} must be at least 1, got {value}. Leave it out or raise it."
            )
    has_suite, is_server = request.suite is not None, is_url(request.model)
    if is_server and not has_suite:
        raise ConfigError(
            "a server is measured with `tutelage eval URL --suite SUITE`, which also takes a file; "
            "got no suite."
        )
    is_held_out, is_embedded = request.suite == HELD_OUT, request.is_embedded
    uses = [
        ("prompts", not has_suite, "and --suite both name the problems. Give one of them"),
        ("out", has_suite, "is the folder of a suite's samples. Add --suite or leave it out"),
        ("model_name", is_server, "names a model on a server. Leave it out"),
        ("device", not is_server, "is for a model here, not on a server. Leave it out"),
        ("dtype", not is_server, "is for a model here, not on a server. Leave it out"),
        *(
            (name, not is_embedded, "is for the prompts of a file. Add --prompts FILE or --suite")
            for name in ("grader", "chat", "thinking", "suffix")
        ),
        ("grader", request.file is not None, "is for the problems of a file. Leave it out"),
        ("chat", not is_held_out, "is decided by the run whose part is held out. Leave it out"),
        ("suffix", not is_held_out, "is decided by the run whose part is held out. Leave it out"),
    ]
    for name, is_used, what in uses:
        value = getattr(request, name)
        if value is not None and not is_used:
            reason, _, remedy = what.partition(". ")
            raise ConfigError(
                f"{option(name, value)} {reason}, got model {request.model!r} and suite "
                f"{request.suite!r}. {remedy}."
            )


def option(name: str, value: object) -> str:
    """An option as it was given, --no-chat for one."""
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def is_url(model: str) -> bool:
    """Whether a model is given as the address of a server."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", model) is not None


def student_of(model: str) -> str:
    """The student inside a run folder; any other reference as it is."""
    path = Path(model).expanduser()
    is_run = (path / "manifest.json").is_file() and (path / "student").is_dir()
    return str(path / "student") if is_run else model
