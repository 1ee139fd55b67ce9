"""What `check` accepts, `train` can do: random configurations, tables and models.

Every trial writes a TOML file, checks it and, where it is accepted, trains one step. Whatever is
refused has to end in one line and exit code 2, by either command; nothing may end in a traceback.
Values come from `config_values`, and every trial has a label that is due: a key, rule, objective or
weighting, so that all of them are met often.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import random
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from patience import unhurried
from tutelage import cli
from tutelage.commands import train as train_command

from .config_values import (
    ALWAYS_REFUSED,
    CONVERSATION_KEYS,
    ENGINES,
    FILE_KEYS,
    LABELS,
    LEDGER_KEYS,
    OBJECTIVES,
    SELECTIONS,
    VALUES,
    WEIGHTINGS,
    Keys,
)
from .models import Models, saved_models
from .record import Outcome

USUAL = {
    "sampling.max_new_tokens": 6,
    "prompts_per_step": 2,
    "evaluation.num_problems": 2,
    "evaluation.num_samples": 1,
    "num_steps": 1,
    "optimizer.learning_rate": 1e-3,
}
"""Values that keep a trial short, where nothing else was drawn."""
LEAST_EACH = 5
WHOLE = 500
"""Trials of which half have to be accepted, every label in `LEAST_EACH` of them."""


@dataclass
class Trial:
    """One configuration and what became of it."""

    table: dict[str, Any]
    labels: set[str]
    """Keys, rules, objectives, weightings and models in it."""
    problems: list[str] = field(default_factory=list)
    is_accepted: bool = False
    said: str = ""


def flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def put(table: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
    table[last] = value


def drawn(number: int, models: Models, folder: Path) -> Trial:
    """The configuration of a trial: most have only usable values, and one label that is due.

    One in five has an odd value, one in five is spoiled.
    """
    rng = random.Random(f"configuration {number}")
    due, odd = LABELS[number % len(LABELS)], None
    what = ("usable", "odd", "usable", "unusable", "usable")[number % 5]
    if what == "odd":
        due, odd = ODD[number // 5 % len(ODD)]
    table: dict[str, Any] = {}
    names = {part: rng.choice(fitting(part, kinds, due)) for part, kinds in _KINDS.items()}
    for (part, name), tag in zip(names.items(), ("rule", "kind", "kind"), strict=True):
        put(table, f"{part}.{tag}", name)
    is_broken = what == "unusable"
    kind = _kind_of_data(due)
    where, pair = models.draw(rng, is_broken and rng.random() < 0.4, kind)
    for who, model in zip(("student", "teacher"), pair, strict=True):
        put(table, f"{who}.model", model)
    for key, value in models.data(rng, where, is_broken and rng.random() < 0.4, kind).items():
        put(table, f"data.{key}", value)
    possible = _possible(names, table["data"]["kind"])
    has_lora = rng.random() < 0.2 or due.startswith("student.lora")
    for key in possible:
        if key.startswith("student.lora") and not has_lora:
            continue
        if rng.random() < 0.25 or key in (due, "selection.num_tokens"):
            put(table, key, rng.choice(VALUES[key][0]))
    for key, value in USUAL.items():
        if key not in dict(flat(table)):
            put(table, key, value)
    if rng.random() < 0.9:
        made_usable(table, models)
    if what == "odd":
        put(table, due, odd)
    if what == "unusable":
        spoil(table, possible, rng)
    table["out"] = str(folder / "run")
    labels = {key for key, _ in flat(table)} | {f"{part}={name}" for part, name in names.items()}
    labels |= {f"model={where}", f"data.kind={table['data']['kind']}"}
    return Trial(table, labels)


def fitting(part: str, kinds: Keys, due: str) -> list[str]:
    """The rules or kinds of a table that have the label which is due, or all."""
    if due.startswith(f"{part}="):
        return [due.partition("=")[2]]
    key = due.removeprefix(f"{part}.")
    return [name for name, keys in kinds.items() if due == key or key in keys]


def _kind_of_data(due: str) -> str | None:
    """The kind of data that the label asks for."""
    if due in ("data.kind=ledger", *(f"data.{key}" for key in LEDGER_KEYS)):
        return "ledger"
    if due in ("data.kind=ledger_tools", *(f"data.{key}" for key in CONVERSATION_KEYS)):
        return "ledger_tools"
    if due == "data.kind=coins":
        return "coins"
    return "file" if due.startswith("data.") else None


def _possible(names: dict[str, str], data: str) -> list[str]:
    """Keys that a configuration of these kinds may have."""
    keys = {part: kinds[names[part]] for part, kinds in _KINDS.items()}
    by_kind = {"ledger": LEDGER_KEYS, "coins": (), "ledger_tools": CONVERSATION_KEYS}
    keys["data"] = by_kind.get(data, FILE_KEYS)
    parts = {key: key.partition(".") for key in VALUES}
    return [key for key, (part, _, name) in parts.items() if name in keys.get(part, (name,))]


ODD = [(key, value) for key, (_, odd, _) in VALUES.items() for value in odd]
_KINDS = {"selection": SELECTIONS, "objective": OBJECTIVES, "weighting": WEIGHTINGS}


def spoil(table: dict[str, Any], possible: list[str], rng: random.Random) -> None:
    """Give some keys values that cannot be used, or add keys that do not exist."""
    for key in rng.sample(possible, rng.choice([0, 1, 1, 2])):
        put(table, key, rng.choice(VALUES[key][2]))
    if rng.random() < 0.1:
        put(table, rng.choice(["typo", "student.typo", "data.typo", "optimizer.lr"]), 1)
    if rng.random() < 0.1:
        put(table, "data.kind", rng.choice(["verifiers", "shopping", "travel"]))
        others = [key for key in ALWAYS_REFUSED if key.startswith("data.")]
        for key in rng.sample(others, 3):
            put(table, key, rng.choice(ALWAYS_REFUSED[key][1]))
    if rng.random() < 0.1:
        put(table, "teacher.mode", "resident")  # which a teacher on a server does not have
        others = [key for key in ALWAYS_REFUSED if key.startswith("teacher.")]
        for key in rng.sample(others, 3):
            put(table, key, rng.choice(ALWAYS_REFUSED[key][1]))
    if rng.random() < 0.2:
        name = rng.choice([*ENGINES, "sglang"])
        put(table, "engine.kind", name)
        for key in ENGINES.get(name, ()):
            if rng.random() < 0.7:
                put(table, f"engine.{key}", rng.choice(ALWAYS_REFUSED[f"engine.{key}"][1]))


def made_usable(table: dict[str, Any], models: Models) -> None:
    """Mend combinations that are known to be refused."""
    values = dict(flat(table))
    is_graded = (
        values["weighting.kind"] in ("paced", "reward") or values["objective.kind"] == "grpo"
    )
    if is_graded and values["data.kind"] == "file":
        put(table, "data.grader", "number")
        put(table, "data.answer_column", "answer")
        put(table, "data.path", models.answered(values["data.path"]))
    if values["weighting.kind"] == "paced" or values["objective.kind"] == "grpo":
        put(table, "sampling.num_samples", 2)
    if values.get("student.quantization") == "8bit":
        put(table, "student.lora.rank", values.get("student.lora.rank", 2))
    has_moments = values.get("optimizer.kind") != "adamw_on_disk"
    if not has_moments or values.get("student.quantization") == "8bit":
        put(table, "checkpoint_writer", "inline")
    if values.get("teacher.mode") == "reload" and values["teacher.model"].endswith(".gguf"):
        put(table, "teacher.mode", "offload")
    _measure_what_decides(table, values)


def _measure_what_decides(table: dict[str, Any], values: dict[str, Any]) -> None:
    """What `keep_best` and `stop_when` need, where they are drawn."""
    nats = "held_out_reverse_kl_nats"
    if values.get("rollouts.teacher_states", "none") != "none":
        put(table, "keep_best", "none")
        table.pop("stop_when", None)
        return
    stops = {key for key in ("metric", "patience", "value") if values.get(f"stop_when.{key}")}
    if stops - {"metric"}:
        put(table, "stop_when.metric", nats)
    elif values.get("stop_when.metric") == nats:
        put(table, "stop_when.patience", 1)
    if values.get("keep_best") == nats or dict(flat(table)).get("stop_when.metric") == nats:
        put(table, "evaluation.every", 1)
        put(table, "evaluation.num_problems", values.get("evaluation.num_problems") or 1)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str) and value in ("inf", "nan"):
        return value
    return json.dumps(value)


Run = Callable[[list[str]], tuple[int, str, str]]


def command(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error of a command, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:  # what a shell would show as a traceback
            code = 1
            traceback.print_exc(file=err)
        finally:
            torch.set_num_threads(1)
    return code, out.getvalue(), err.getvalue()


def judged(trial: Trial, folder: Path, run: Run = command) -> Trial:
    """Check a configuration, train it, and note what was wrong with either.

    What is accepted is trained one step. What is refused has to be refused by `train` in the same
    line, before anything is left in the run's folder.
    """
    folder.mkdir()
    file = folder / "configuration.toml"
    file.write_text("".join(f"{key} = {toml(value)}\n" for key, value in trial.table.items()))
    code, out, err = run(["check", str(file)])
    trial.said = err.strip() or out.strip()
    if code == 0:
        trial.is_accepted = True
        code, _, err = run(["train", str(file), "num_steps=1"])
        if code or err.strip():
            trial.problems.append(f"accepted, but train ended with {code}: {err[-1500:]}")
    elif not is_refusal(code, err):
        trial.problems.append(f"check ended with {code}: {err[-1500:]}")
    else:
        code, _, again = run(["train", str(file)])
        if not is_refusal(code, again) or again != err:
            trial.problems.append(f"check said {err!r}, but train {code}: {again[-1500:]}")
        if (folder / "run").exists():
            trial.problems.append(f"refused, but {folder / 'run'} is there")
    shutil.rmtree(folder)
    return trial


def is_refusal(code: int, err: str) -> bool:
    return code == 2 and len(err.strip().splitlines()) == 1


@contextmanager
def short_reports() -> Iterator[None]:
    """No report: its plots take longer than everything else, and have tests of their own."""
    write = train_command.write_report
    train_command.write_report = lambda folder, *_: folder / "report.html"
    try:
        yield
    finally:
        train_command.write_report = write


def too_generous(arguments: list[str]) -> tuple[int, str, str]:
    """A `check` that accepts everything: the detector has to see it."""
    return (0, "", "") if arguments[0] == "check" else command(arguments)


def shortfalls(trials: list[Trial]) -> list[str]:
    """What was met too seldom among the accepted configurations of a whole run."""
    accepted = [trial for trial in trials if trial.is_accepted]
    counts = Counter(label for trial in accepted for label in trial.labels)
    found = [f"{n} of {LEAST_EACH} times {k}" for k in LABELS if (n := counts[k]) < LEAST_EACH]
    if 2 * len(accepted) < len(trials):
        found.append(f"{len(accepted)} of {len(trials)} accepted, which is less than half")
    return found


def run(size: int) -> Outcome:
    """Trials 0 to `size` − 1, and the refused ones again under a check that accepts everything."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    unhurried()  # what is told of a slow start is no second line
    # as the command line asks before it imports them
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory(prefix="configurations-", dir=memory) as name,
        short_reports(),
        warnings.catch_warnings(),
    ):
        folder = Path(name)
        models = saved_models(folder)
        gc.collect()
        gc.freeze()  # a teacher that leaves has what it held collected: not the libraries each time
        places = [folder / f"trial-{i}" for i in range(size)]
        trials = [judged(drawn(i, models, place), place) for i, place in enumerate(places)]
        refused = [i for i, trial in enumerate(trials) if not trial.is_accepted]
        control = [judged(drawn(i, models, places[i]), places[i], too_generous) for i in refused]
        gc.unfreeze()
    accepted = [trial for trial in trials if trial.is_accepted]
    counts = Counter(label for trial in accepted for label in trial.labels)
    problems = {str(i): trial.problems for i, trial in enumerate(trials) if trial.problems}
    if size >= WHOLE and (rare := shortfalls(trials)):
        problems["too seldom"] = rare
    return Outcome(
        promise="what check accepts, train can do; what is refused is one line",
        trials=size,
        failures=len(problems),
        control={
            "seen under a check that accepts everything": sum(bool(t.problems) for t in control)
        },
        details={
            "accepted": len(accepted),
            "models": {k: n for k, n in sorted(counts.items()) if k.startswith("model=")},
            "least often among the accepted": min(counts[label] for label in LABELS),
            "problems": problems,
        },
    )
