"""A run from start to end: evaluate, take steps, checkpoint, evaluate, export."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from tutelage.errors import ConfigError, RunError
from tutelage.evaluation.evaluate import Evaluation, evaluate, held_out_reverse_kl
from tutelage.models.load import save_model
from tutelage.models.sampling import SamplingConfig
from tutelage.models.tokenizers import decode, pad_id
from tutelage.run.checkpoint import list_checkpoints, load_optimizer, save_checkpoint
from tutelage.run.config import Config, OptimizerConfig
from tutelage.run.folder import RunFolder, environment
from tutelage.run.parse import changed_keys, fingerprint, to_table
from tutelage.run.setup import Parts, build
from tutelage.run.step import Step

_EVALUATION_SEED = 424242
"""Evaluations draw the same numbers in every run, so that runs can be compared in pairs."""
_NUM_SAVED_SAMPLES = 8

Say = Callable[[str], None]
OnStep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class RunResult:
    """Where a run ended."""

    folder: Path
    step: int
    """Updates done."""
    is_finished: bool
    """False when a signal stopped the run early; the same command continues it."""


def run_folder(config: Config, name: str = "run") -> Path:
    """The folder of a run: `out`, or runs/NAME-FINGERPRINT."""
    return Path(config.out) if config.out else Path("runs") / f"{name}-{fingerprint(config)}"


def train(
    config: Config,
    name: str = "run",
    allow_change: tuple[str, ...] = (),
    say: Say = print,
    on_step: OnStep | None = None,
) -> RunResult:
    """Train the student, or continue an earlier run in the same folder.

    Args:
        config: the run.
        name: stem of the default folder's name.
        allow_change: keys that may differ from the run being continued.
        say: receives one line of text for every event a user should see.
        on_step: receives the metrics of every step.

    Returns:
        `RunResult`.

    Raises:
        TutelageError: whatever a user can mend.
    """
    folder = RunFolder(run_folder(config, name))
    folder.open()
    try:
        with _stop_requested() as stop:
            return _Run(config, folder, allow_change, say, on_step).go(stop)
    finally:
        folder.close()


class _Run:
    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        allow_change: tuple[str, ...],
        say: Say,
        on_step: OnStep | None,
    ) -> None:
        self.config, self.folder, self.say, self.on_step = config, folder, say, on_step
        self._check_same_run(allow_change)
        self.first_step, self.parts = self._start()
        self.accelerator = Accelerator(cpu=self.parts.device.type == "cpu")
        if config.prompts_per_step % self.accelerator.num_processes:
            raise ConfigError(
                f"prompts_per_step must be a multiple of the {self.accelerator.num_processes} "
                f"processes, got {config.prompts_per_step}."
            )
        optimizer = _optimizer(config.optimizer, self.parts)
        if self.first_step > 1:
            load_optimizer(self._last_checkpoint(), self.parts.student.model, optimizer)
        student, self.optimizer = self.accelerator.prepare(self.parts.student, optimizer)
        self.step = Step(config, self.parts, self.accelerator, student, self.optimizer)

    def go(self, stop: _Stop) -> RunResult:
        """Steps `first_step` to `num_steps`, with evaluations around them."""
        config = self.config
        if self.first_step == 1:
            self._evaluate(0)
        done = self.first_step - 1
        while done < config.num_steps and not stop:
            done += 1
            self._set_learning_rate(done)
            metrics = self.step.take(done)
            self.folder.append("metrics.jsonl", [metrics])
            if self.on_step is not None:
                self.on_step(metrics)
            if stop or self._is_due(done, config.checkpoint_every):
                self._save(done)
            if done < config.num_steps and self._is_due(done, config.evaluation.every):
                self._evaluate(done)
        if done < config.num_steps:
            self.say(f"stopped after step {done}; the same command continues from there")
            return RunResult(self.folder.path, done, False)
        if done >= self.first_step:
            self._evaluate(done)
            self._export()
        return RunResult(self.folder.path, done, True)

    def _check_same_run(self, allow_change: tuple[str, ...]) -> None:
        """Refuse to continue a run under another configuration, then write the manifest."""
        old = self.folder.read_manifest()
        table = to_table(self.config)
        if old is not None:
            changed = [k for k in changed_keys(old["config"], table) if k not in allow_change]
            if changed:
                raise RunError(
                    f"run folder {self.folder.path} holds another run: {', '.join(changed)} "
                    "differ. Choose another out=FOLDER, or pass --allow-change KEY."
                )
        manifest = {"config": table, "fingerprint": fingerprint(self.config), **environment()}
        self.folder.write_manifest(manifest)

    def _start(self) -> tuple[int, Parts]:
        checkpoints = list_checkpoints(self.folder.path)
        if not checkpoints:
            self.folder.rewind(-1)
            return 1, build(self.config)
        step, path = checkpoints[-1]
        self.folder.rewind(step)
        done = step >= self.config.num_steps
        what = "is finished" if done else "continues"
        self.say(f"run {self.folder.path} {what}: found {path.name} of {self.config.num_steps}")
        return step + 1, build(self.config, str(path / "model"))

    def _last_checkpoint(self) -> Path:
        return list_checkpoints(self.folder.path)[-1][1]

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.config.num_steps or (every > 0 and step % every == 0)

    def _set_learning_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, step, self.config.num_steps)

    def _save(self, step: int) -> None:
        save_checkpoint(
            self.folder.path,
            step,
            self.parts.student.model,
            self.parts.tokenizer,
            self.optimizer,
            self.config.keep_checkpoints,
        )

    def _evaluate(self, step: int) -> None:
        settings = self.config.evaluation
        if not settings.num_problems:
            return
        student = self._evaluate_model("student", self.parts.student.model, step)
        kl = held_out_reverse_kl(
            self.parts.student,
            self.parts.teacher,
            student.rollouts,
            pad_id(self.parts.tokenizer),
            self.config.micro_batch_size,
        )
        self._record("student", step, student, kl)
        if step == 0 and settings.teacher:
            with self.parts.teacher.awake():
                teacher = self._evaluate_model("teacher", self.parts.teacher.model, step)
            self._record("teacher", step, teacher, None)

    def _evaluate_model(self, who: str, model: Any, step: int) -> Evaluation:
        settings, task = self.config.evaluation, self.parts.task
        sampling = SamplingConfig(
            settings.temperature,
            settings.top_p,
            0,
            self.config.sampling.max_new_tokens,
            settings.num_samples,
        )
        return evaluate(
            model,
            self.parts.tokenizer,
            task.grade,
            task.held_out(settings.num_problems),
            sampling,
            (_EVALUATION_SEED,),
            max(self.config.sampling_batch_size, settings.num_samples),
        )

    def _record(self, who: str, step: int, result: Evaluation, kl: float | None) -> None:
        head = {"step": step, "model": who}
        summary = {**head, **result.summary(), "held_out_reverse_kl_nats": kl}
        self.folder.append("evaluation_rows.jsonl", [{**head, **row} for row in result.rows()])
        self.folder.append("evaluation.jsonl", [summary])
        if who == "student":
            self.folder.append("samples.jsonl", self._samples(step, result))
        self.say(describe(summary))

    def _samples(self, step: int, result: Evaluation) -> list[dict[str, Any]]:
        chosen = range(0, len(result.rollouts), result.num_samples)
        return [
            {
                "step": step,
                "prompt_id": result.rollouts[i].prompt.id,
                "prompt": decode(self.parts.tokenizer, result.rollouts[i].prompt_ids),
                "completion": result.rollouts[i].text,
                "is_correct": result.is_correct[i],
            }
            for i in list(chosen)[:_NUM_SAVED_SAMPLES]
        ]

    def _export(self) -> None:
        target = self.folder.path / "student"
        save_model(self.parts.student.model, self.parts.tokenizer, target, self._card())
        self.say(f"student exported to {target}")

    def _card(self) -> str:
        config = self.config
        return (
            "# Student of an on-policy distillation run\n\n"
            f"Student `{config.student.model}`, teacher `{config.teacher.model}`, "
            f"{config.num_steps} steps of {config.prompts_per_step} prompts, "
            f"selection `{config.selection.rule}`, seed {config.seed}, "
            f"configuration fingerprint `{fingerprint(config)}`.\n"
        )


def describe(summary: dict[str, Any]) -> str:
    """One line on an evaluation record."""
    parts = [f"{summary['model']} at step {summary['step']}:"]
    for name, title in (("mean_at_k", "mean"), ("pass_at_k", "pass")):
        if summary[name] is not None:
            low, high = summary[f"{name}_low"], summary[f"{name}_high"]
            value = f"{title}@{summary['k']} {100 * summary[name]:.1f} %"
            parts.append(f"{value} [{100 * low:.1f}, {100 * high:.1f}]")
    if summary["held_out_reverse_kl_nats"] is not None:
        parts.append(f"held-out reverse KL {summary['held_out_reverse_kl_nats']:.4f} nats")
    return " ".join(parts)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of update `step` (from 1): linear warm-up, then the schedule.

    The last update of `linear` and `cosine` still learns: they reach 0 one step later.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1 - done)
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _optimizer(config: OptimizerConfig, parts: Parts) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in parts.student.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


class _Stop:
    """Becomes true when a signal asks the run to stop."""

    def __init__(self) -> None:
        self.is_set = False

    def __bool__(self) -> bool:
        return self.is_set


@contextmanager
def _stop_requested() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM asks to stop after the step; a second one interrupts at once."""
    stop = _Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set:
            raise KeyboardInterrupt
        stop.is_set = True

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
