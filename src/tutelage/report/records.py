"""What a run folder holds, read and checked line by line: the only input of a report."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tutelage.errors import RunError

JsonObject = dict[str, Any]


Count = Annotated[int, Field(ge=0, lt=2**53)]
"""A count or step: whole, not negative, and exact as a float when it is drawn."""


class _Line(BaseModel):
    """Strict: a number in quotes or a boolean in place of a number is a fault, not a value."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="ignore")


Record = TypeVar("Record", bound=_Line)


class Quadrant(_Line):
    """One cell of the student-entropy by divergence table; every field is a share in [0, 1]."""

    share: float | None = None
    """Share of the step's tokens that fall into the quadrant."""
    kl_mass: float | None = None
    """Share of the step's summed reverse KL that those tokens carry."""
    kept_share: float | None = None
    """Share of the quadrant's tokens that were trained on."""


class HighEntropy(_Line):
    """Tokens with an entropy of 0.8 nats or more, and the divergences where it is the teacher's."""

    teacher_share: float | None = None
    student_share: float | None = None
    reverse_kl_nats: float | None = None
    forward_kl_nats: float | None = None


class StepRecord(_Line):
    """One line of metrics.jsonl. A value the run did not measure is None."""

    step: Count
    loss: float | None = None
    num_rows: Count | None = None
    num_kept: Count | None = None
    kept_kl_share: float | None = None
    """The kept tokens' share of the summed reverse KL."""
    reverse_kl_nats: float | None = None
    forward_kl_nats: float | None = None
    entropy_nats: float | None = None
    teacher_entropy_nats: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    completion_length_mean: float | None = None
    truncated_share: float | None = None
    quadrants: dict[str, Quadrant] | None = None
    seconds: dict[str, float | None] | None = None
    gate_share: float | None = None
    gated_forward_kl_nats: float | None = None
    high_entropy: HighEntropy | None = None
    peak_rss_bytes: dict[str, Count] | None = None
    """By phase, the most main memory that the process had held by its end."""
    peak_device_bytes: dict[str, Count] | None = None
    """By phase, the most memory of the accelerator within it."""
    reward_mean: float | None = None
    no_signal_share: float | None = None
    """Of the step's prompts, those whose completions all have one reward."""
    success_share: float | None = None
    """Of the step's conversations, as all that follow."""
    score_mean: float | None = None
    turns_mean: float | None = None
    tokens_per_turn: float | None = None
    tool_calls_mean: float | None = None
    tool_error_share: float | None = None
    inserted_tokens_mean: float | None = None

    @property
    def keep(self) -> float | None:
        """Fraction of the step's rows that were trained on, in [0, 1]."""
        if self.num_kept is None or not self.num_rows:
            return None
        return self.num_kept / self.num_rows


class EvaluationRecord(_Line):
    """One line of evaluation.jsonl: the accuracy of a model at a step, with its interval."""

    step: Count
    model: str
    mean_at_k: float | None = None
    mean_at_k_low: float | None = None
    mean_at_k_high: float | None = None
    pass_at_k: float | None = None
    pass_at_k_low: float | None = None
    pass_at_k_high: float | None = None
    k: Count | None = None
    num_problems: Count | None = None
    num_samples: Count | None = None
    held_out_reverse_kl_nats: float | None = None


class SampleRecord(_Line):
    """One line of samples.jsonl: text written by a model, hence never trusted."""

    step: Count
    prompt_id: str
    prompt: str
    completion: str
    is_correct: bool | None = None


class VerdictRecord(_Line):
    """One line of evaluation_rows.jsonl: whether one sample of one problem is correct."""

    step: Count
    model: str
    prompt_id: str
    sample: Count
    is_correct: bool | None = None
    is_truncated: bool | None = None
    num_tokens: Count | None = None
    num_rows: Count | None = None
    """Tokens that have a teacher; None in runs of earlier versions, where all have one."""
    reverse_kl_nats: float | None = None
    """Sum over these tokens of the completion."""


Numbers = list[float | None]


class OutcomeRecord(_Line):
    """How a recorded conversation ended."""

    score: float | None = None
    is_success: bool | None = None
    num_turns: Count | None = None
    num_tool_errors: Count | None = None
    details: JsonObject = {}


Inserted = Annotated[tuple[Count, str], Field(strict=False)]
"""How many generated tokens are before a piece of text, and the text."""


class TokenRecord(_Line):
    """One line of tokens.jsonl: a completion with a column for each number, in nats."""

    step: Count
    kind: str
    prompt_id: str
    sample: Count
    prompt: str
    num_tokens: Count
    token: list[Count]
    entropy: Numbers
    reverse_kl: Numbers
    forward_kl: Numbers
    teacher_entropy: Numbers
    log_p: Numbers
    log_q: Numbers
    gate: Numbers
    rank: dict[str, list[Count]]
    kept: dict[str, list[Count]]
    student_top: list[list[Count]]
    teacher_top: list[list[Count]]
    student_share: list[Numbers]
    teacher_share: list[Numbers]
    texts: dict[str, str]
    """Text of every id that the line names."""
    inserted: list[Inserted] | None = None
    """What stands between the turns of a conversation; None where there is a single answer."""
    outcome: OutcomeRecord | None = None

    @model_validator(mode="after")
    def _one_entry_a_token(self) -> TokenRecord:
        numbers = [self.entropy, self.reverse_kl, self.forward_kl, self.teacher_entropy]
        numbers += [self.log_p, self.log_q, self.gate]
        tops = [self.student_top, self.teacher_top]
        shares = [self.student_share, self.teacher_share]
        lengths = {len(c) for part in (numbers, tops, shares, self.rank.values()) for c in part}
        if lengths != {len(self.token)}:
            raise ValueError("every column must have one entry a token")
        if self.rank.keys() != self.kept.keys():
            raise ValueError("rank and kept must name the same rules")
        places = [place for place, _ in self.inserted or []]
        if places != sorted(places) or any(place > self.num_tokens for place in places):
            raise ValueError("inserted must be in the order of the tokens, within the completion")
        return self


@dataclass(frozen=True)
class RunRecord:
    """A run folder in memory."""

    path: Path
    manifest: JsonObject
    steps: tuple[StepRecord, ...]
    """In increasing order of step, each step once, at least one."""
    evaluations: tuple[EvaluationRecord, ...] = ()
    samples: tuple[SampleRecord, ...] = ()
    verdicts: tuple[VerdictRecord, ...] = ()
    tokens: tuple[TokenRecord, ...] = ()
    notes: tuple[str, ...] = field(default=())
    """What a reader must know about the files, for example that the last line was cut off."""

    @property
    def config(self) -> JsonObject:
        """The resolved configuration, empty when the manifest has none."""
        config = self.manifest.get("config")
        return config if isinstance(config, dict) else {}

    def with_config(self, change: Callable[[JsonObject], JsonObject]) -> RunRecord:
        """The same run with its configuration changed, such as completed."""
        return replace(self, manifest={**self.manifest, "config": change(self.config)})

    def evaluations_of(self, model: str) -> list[EvaluationRecord]:
        """Evaluations of one model ("student" or "teacher") in increasing order of step."""
        return sorted((e for e in self.evaluations if e.model == model), key=lambda e: e.step)

    def problem_scores(self, model: str, step: int) -> dict[str, float]:
        """Share of correct samples by prompt id, for one model at one step."""
        verdicts: dict[str, list[bool]] = defaultdict(list)
        for row in self.verdicts:
            if row.model == model and row.step == step and row.is_correct is not None:
                verdicts[row.prompt_id].append(row.is_correct)
        return {prompt_id: sum(values) / len(values) for prompt_id, values in verdicts.items()}

    def evaluated_steps(self, model: str) -> list[int]:
        """Steps with saved verdicts of one model, in increasing order."""
        return sorted({row.step for row in self.verdicts if row.model == model})


def read_run(run: Path) -> RunRecord:
    """Read manifest, metrics, evaluations and samples of a run folder.

    A last line that was cut off (the run was killed while writing it) is left out and noted.

    Args:
        run: folder with manifest.json and metrics.jsonl, and perhaps evaluation.jsonl,
            samples.jsonl, evaluation_rows.jsonl and tokens.jsonl.

    Returns:
        The checked records.

    Raises:
        RunError: the folder is no run folder, holds no metrics yet, or a line is malformed.
    """
    if not run.is_dir():
        raise RunError(f"{run} is not a folder. Name the output folder of a training run.")
    notes: list[str] = []
    steps = _read_lines(run / "metrics.jsonl", StepRecord, notes)
    if not steps:
        raise RunError(
            f"{run} has no metrics yet: metrics.jsonl is missing or empty. "
            f"Train for at least one step first."
        )
    return RunRecord(
        path=run,
        manifest=_read_manifest(run / "manifest.json"),
        steps=tuple(_each_step_once(steps, notes)),
        evaluations=tuple(_read_lines(run / "evaluation.jsonl", EvaluationRecord, notes)),
        samples=tuple(_read_lines(run / "samples.jsonl", SampleRecord, notes)),
        verdicts=tuple(_read_lines(run / "evaluation_rows.jsonl", VerdictRecord, notes)),
        tokens=tuple(_read_lines(run / "tokens.jsonl", TokenRecord, notes)),
        notes=tuple(notes),
    )


def _each_step_once(steps: Sequence[StepRecord], notes: list[str]) -> list[StepRecord]:
    """A resumed run repeats the steps after its checkpoint; the later lines count."""
    latest = {record.step: record for record in steps}
    if num_repeated := len(steps) - len(latest):
        notes.append(
            f"metrics.jsonl holds {num_repeated} repeated step(s), as a resumed run writes them; "
            f"the later line of each is shown."
        )
    return [latest[step] for step in sorted(latest)]


def _read_manifest(path: Path) -> JsonObject:
    content = _read_bytes(path)
    if content is None:
        raise RunError(f"{path} is missing. Name the output folder of a training run.")
    try:
        manifest = _parse_json(content)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not valid JSON ({_reason(error)}). Restore the file.") from error
    if not isinstance(manifest, dict):
        raise RunError(f"{path} must hold a JSON object, got {type(manifest).__name__}.")
    return manifest


def _read_lines(path: Path, record_type: type[Record], notes: list[str]) -> list[Record]:
    """Parse a JSONL file into records; a missing file has none."""
    # Split on the byte, not with splitlines: model text may hold U+2028 and its kin.
    lines = (_read_bytes(path) or b"").split(b"\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    records: list[Record] = []
    for number, line in numbered:
        try:
            value = _parse_json(line)
        except (ValueError, RecursionError) as error:
            if number == numbered[-1][0]:
                notes.append(
                    f"The last line of {path.name} (line {number}) is cut off, as when a run is "
                    f"killed while writing; it is left out."
                )
                break
            _refuse_line(path, number, f"is not valid JSON: {_reason(error)}", error)
        try:
            records.append(record_type.model_validate(value))
        except ValidationError as error:
            _refuse_line(path, number, f"does not fit: {_first_problem(error)}", error)
    return records


def _parse_json(content: bytes) -> Any:
    return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_line(path: Path, number: int, problem: str, cause: Exception) -> NoReturn:
    raise RunError(
        f"{path.name} line {number} {problem}. Repair or remove the line, then try again."
    ) from cause


def _reason(error: Exception) -> str:
    """A short reason on one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field_name = ".".join(str(part) for part in first["loc"]) or "the line"
    return f"{field_name!r}: {first['msg']}, got {_shortened(repr(first['input']))}"


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}. Check the file.") from error
