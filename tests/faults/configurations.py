"""What `check` accepts, `train` can do: random configurations, tables and models.

Every trial writes a TOML file, checks it and, where it is accepted, trains one step. Whatever is
refused has to end in one line and exit code 2, by either command; nothing may end in a traceback.
Values come from `VALUES`, one list of usable and one of unusable ones for each key, so that every
key, rule, objective and weighting is met often.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
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
from tutelage.report import report

from .models import Models, saved_models
from .record import Outcome

_SCORED = ("keep", "scope", "normalization")
_RULES = "entropy soft_or q3 divergence forward_divergence bottom teachability gradient_norm"
SELECTIONS: dict[str, tuple[str, ...]] = {
    "all": (),
    **dict.fromkeys([*_RULES.split(), "local_oracle", "local_gain"], _SCORED),
    **dict.fromkeys(("entropy_sample", "soft_or_sample"), (*_SCORED, "correct_sampling")),
    "random": ("keep", "scope", "correct_sampling"),
    "first_n": ("num_tokens",),
}
"""Rules and the keys of each."""
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "kl": ("reverse_weight", "forward_weight"),
    "jsd": ("teacher_weight",),
    "skew_reverse_kl": ("alpha",),
    "akl": (),
    "topk": ("direction", "k"),
    "sampled": ("clip",),
    "eopd": ("estimator", "fkl", "forward_weight", "gate", "threshold", "width", "k", "clip"),
}
WEIGHTINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "selectkd": ("outside",),
    "fire": ("drop",),
    "paced": (),
    "reward": ("beta",),
}
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "student.dtype": (["float32", "bfloat16"], ["float8"]),
    "student.num_layers": ([1, 2], [0, -1, 99]),
    "student.activation_checkpointing": ([True, False], ["yes"]),
    "student.layers": (["transformers"], ["liger", "fused"]),
    "student.quantization": (["none"], ["8bit", "4bit", "3bit"]),
    "student.lora.rank": ([1, 4], [0]),
    "student.lora.alpha": ([8.0, 32], [0.0, -1]),
    "student.lora.dropout": ([0.0, 0.3], [1.0, -0.1]),
    "student.lora.target_modules": ([[]], [["no_such_layer"]]),
    "teacher.dtype": (["float32", "bfloat16", "float16"], ["float64"]),
    "teacher.mode": (["resident", "offload", "reload"], ["away"]),
    "teacher.quantization": (["none", "none", "8bit"], ["2bit"]),
    "teacher.hidden_budget_bytes": ([0, 1, 1 << 20], [-1]),
    "teacher.stop_token": (["map", "refuse"], ["keep"]),
    "data.num_items": ([1, 2, 5], [0, 17]),
    "data.split": (["train", "test"], [3]),
    "data.subset": (["main"], [3]),
    "data.prompt_column": (["prompt"], ["no_such_column"]),
    "data.answer_column": (["answer", "no_such_column"], [1]),
    "data.suffix": (["", "1"], [2]),
    "data.enable_thinking": ([True, False], ["on"]),
    "data.max_prompt_tokens": ([0, 40, 4096], [-1, 1]),
    "data.grader": (["none", "number", "math", "exact"], ["judge"]),
    "data.num_held_out": ([1, 4], [-1, 0, 1000]),
    "sampling.temperature": ([1.0, 0.7, 0], [-1.0, "inf"]),
    "sampling.top_p": ([1.0, 0.9], [0.0, 1.5]),
    "sampling.top_k": ([0, 5, 100000], [-1]),
    "sampling.max_new_tokens": ([1, 6, 10], [0, 1 << 21]),
    "sampling.num_samples": ([1, 2, 3], [0]),
    "engine.kind": (["transformers"], ["vllm", "sglang"]),
    "selection.keep": ([0.5, 1.0, 0.001], [0.0, 50]),
    "selection.scope": (["completion", "batch"], ["prompt"]),
    "selection.normalization": (
        ["minmax_p98", "minmax", "minmax_p98_both", "quantile_05_95"], ["none"],
    ),
    "selection.correct_sampling": ([True, False], ["maybe"]),
    "selection.num_tokens": ([1, 3, 1000], [0]),
    "objective.reverse_weight": ([1.0, 0.5], [-1.0]),
    "objective.forward_weight": ([0.5, 1.0], [-0.5]),
    "objective.teacher_weight": ([0.5, 0.1], [0.0, 1.0]),
    "objective.alpha": ([0.0, 0.1, 0.9], [1.0]),
    "objective.direction": (["reverse", "forward"], ["both"]),
    "objective.k": ([1, 16, 100000], [0]),
    "objective.clip": ([0.2], [0.0]),
    "objective.estimator": (["exact", "sampled"], ["k3"]),
    "objective.fkl": (["full", "topk_tail", "topk_renorm"], ["top"]),
    "objective.gate": (["hard", "soft", "percentile"], ["open"]),
    "objective.threshold": ([0.8, 0.0], [-1.0]),
    "objective.width": ([0.1], [0.0]),
    "weighting.outside": ([0.0, 0.01], [-0.1]),
    "weighting.drop": ([0.0, 0.2, 0.9], [1.0]),
    "weighting.beta": ([0.1, 1.0], [0.0]),
    "optimizer.kind": (
        ["adamw", "adamw_on_disk", "adamw_8bit", "adafactor"], ["paged_adamw_8bit", "sgd"],
    ),
    "optimizer.offload": ([True, False], ["disk"]),
    "optimizer.learning_rate": ([1e-3, 1e-6, 10.0], [0.0, -1.0]),
    "optimizer.schedule": (["constant", "linear", "cosine"], ["step"]),
    "optimizer.warmup_steps": ([0, 1, 50], [-1]),
    "optimizer.weight_decay": ([0.0, 0.1], [-0.1]),
    "optimizer.beta1": ([0.9, 0.0], [1.0]),
    "optimizer.beta2": ([0.95, 0.999], [1.0]),
    "optimizer.max_grad_norm": ([1.0, 0.0], [-1.0]),
    "evaluation.num_problems": ([0, 1, 3, 1000], [-1]),
    "evaluation.num_samples": ([1, 2], [0]),
    "evaluation.every": ([0, 1], [-1]),
    "evaluation.temperature": ([0.0, 1.0], [-1.0]),
    "evaluation.top_p": ([1.0, 0.5], [0.0]),
    "evaluation.teacher": ([True, False], ["once"]),
    "recording.every": ([0, 1], [-1]),
    "recording.num_prompts": ([0, 2], [-1]),
    "recording.num_rollouts": ([0, 2], [-1]),
    "recording.max_new_tokens": ([4, 8], [0]),
    "recording.max_bytes": ([1, 6_000_000], [0]),
    "seed": ([0, 7], [1.5]),
    "num_steps": ([1, 3], [0]),
    "prompts_per_step": ([2, 4], [0, 3 << 20]),
    "updates_per_step": ([1, 2], [0, 7]),
    "micro_batch_tokens": ([0, 64, 4096], [-1]),
    "micro_batch_size": ([1, 3, 64], [0]),
    "micro_batches": (["padded", "packed"], ["ragged"]),
    "sampling_batch_size": ([1, 2, 64], [0]),
    "scoring": (["recorded", "forward"], ["none"]),
    "diagnostics": (["all", "kept"], ["some"]),
    "quadrant_thresholds": (["median", [0.5, 0.1]], [[0.5], "mean"]),
    "renormalise": ([True, False], ["off"]),
    "checkpoint_every": ([0, 1], [-1]),
    "keep_checkpoints": ([1, 2], [0]),
    "max_skipped_steps": ([1, 3], [0]),
    "num_threads": ([1], [-1]),
    "device": (["cpu", "auto"], ["cuda", "tpu"]),
    "trackers": ([[]], [["wandb"], ["mlflow"], "wandb"]),
}  # fmt: skip
"""Usable and unusable values of each key. A few usable ones are so in some configurations only."""
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
    """The configuration of a trial: two in three have only usable values."""
    rng = random.Random(f"configuration {number}")
    table: dict[str, Any] = {}
    is_bad = rng.random() < 0.3
    where, pair = models.draw(rng, is_bad and rng.random() < 0.4)
    for who, name in zip(("student", "teacher"), pair, strict=True):
        put(table, f"{who}.model", name)
    names = {
        "selection": list(SELECTIONS)[number % len(SELECTIONS)],
        "objective": list(OBJECTIVES)[number // 2 % len(OBJECTIVES)],
        "weighting": list(WEIGHTINGS)[number // 3 % len(WEIGHTINGS)],
    }
    tag = {"selection": "rule", "objective": "kind", "weighting": "kind"}
    keys = {"selection": SELECTIONS, "objective": OBJECTIVES, "weighting": WEIGHTINGS}
    for part, name in names.items():
        put(table, f"{part}.{tag[part]}", name)
    data, file_keys = models.data(rng, where, is_bad and rng.random() < 0.4)
    for key, value in data.items():
        put(table, f"data.{key}", value)
    possible = [key for key in VALUES if "." not in key]
    for key in VALUES:
        part, _, name = key.partition(".")
        if part in keys:
            if name in keys[part][names[part]]:
                possible.append(key)
        elif part == "data":
            if name in file_keys:
                possible.append(key)
        elif name:
            possible.append(key)
    lora = rng.random() < 0.2
    possible = [k for k in possible if lora or not k.startswith("student.lora")]
    for key in possible:
        if rng.random() < 0.25 or (key == "selection.num_tokens"):
            put(table, key, rng.choice(VALUES[key][0]))
    for key, value in USUAL.items():
        if key not in dict(flat(table)):
            put(table, key, value)
    made_usable(table, rng)
    if is_bad:
        for key in rng.sample(possible, rng.choice([0, 1, 1, 2])):
            put(table, key, rng.choice(VALUES[key][1]))
        if rng.random() < 0.1:
            put(table, rng.choice(["typo", "student.typo", "data.typo", "optimizer.lr"]), 1)
    table["out"] = str(folder / "run")
    labels = {key for key, _ in flat(table)} | {f"{part}={name}" for part, name in names.items()}
    return Trial(table, labels | {f"model={where}"})


def made_usable(table: dict[str, Any], rng: random.Random) -> None:
    """Mend combinations that are known to be refused, in most configurations."""
    values = dict(flat(table))
    if rng.random() < 0.1:
        return
    if values["weighting.kind"] in ("paced", "reward") and values["data.kind"] == "file":
        put(table, "data.grader", "number")
        put(table, "data.answer_column", "answer")
    if values["weighting.kind"] == "paced":
        put(table, "sampling.num_samples", 2)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str) and value == "inf":
        return "inf"
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
    """Check a configuration, train it where it is accepted, and note what was wrong."""
    folder.mkdir()
    file = folder / "configuration.toml"
    file.write_text("".join(f"{key} = {toml(value)}\n" for key, value in trial.table.items()))
    code, out, err = run(["check", str(file)])
    trial.said = err.strip() or out.strip()
    if code == 0:
        trial.is_accepted = True
        code, _, err = run(["train", str(file), "num_steps=1"])
        if code:
            trial.problems.append(f"accepted, but train ended with {code}: {err[-1500:]}")
    elif code != 2 or len(err.strip().splitlines()) != 1:
        trial.problems.append(f"check ended with {code}: {err[-1500:]}")
    shutil.rmtree(folder)
    return trial


@contextmanager
def short_reports() -> Iterator[None]:
    """No report: its plots take longer than everything else, and have tests of their own."""
    write = report.write_report
    report.write_report = lambda folder, *_: folder / "report.html"
    try:
        yield
    finally:
        report.write_report = write


def too_generous(arguments: list[str]) -> tuple[int, str, str]:
    """A `check` that accepts everything: the detector has to see it."""
    return (0, "", "") if arguments[0] == "check" else command(arguments)


def run(size: int) -> Outcome:
    """Trials 0 to `size` − 1, and some that were refused under a check that accepts everything."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    unhurried()  # what is told of a slow start is no second line
    transformers.utils.logging.set_verbosity_error()  # as the command line asks before it imports
    with (
        tempfile.TemporaryDirectory(prefix="configurations-", dir=memory) as name,
        short_reports(),
        warnings.catch_warnings(),
    ):
        folder = Path(name)
        models = saved_models(folder)
        gc.freeze()  # a teacher that is given back asks the collector, which looks at every import
        trials = []
        for i in range(size):
            place = folder / f"trial-{i}"
            trials.append(judged(drawn(i, models, place), place))
        refused = [i for i, trial in enumerate(trials) if not trial.is_accepted]
        control = [
            judged(drawn(i, models, folder / f"control-{i}"), folder / f"control-{i}", too_generous)
            for i in refused[: max(5, size // 10)]
        ]
        gc.unfreeze()
    accepted = [trial for trial in trials if trial.is_accepted]
    counts = Counter(label for trial in accepted for label in trial.labels)
    labels = [*VALUES, *(f"selection={n}" for n in SELECTIONS)]
    labels += [f"objective={n}" for n in OBJECTIVES] + [f"weighting={n}" for n in WEIGHTINGS]
    rare = {label: counts[label] for label in labels if counts[label] < LEAST_EACH}
    problems = {str(i): trial.problems for i, trial in enumerate(trials) if trial.problems}
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
            "least often among the accepted": min((counts[label] for label in labels), default=0),
            f"fewer than {LEAST_EACH} times": rare,
            "problems": problems,
        },
    )
