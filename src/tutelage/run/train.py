"""A run from start to end: evaluate, take steps, checkpoint, evaluate, export."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from tutelage.errors import ConfigError, RunError
from tutelage.evaluation.evaluate import Evaluation, evaluate, held_out_reverse_kl
from tutelage.models.load import save_model
from tutelage.models.optimizer import MasterWeights, make_optimizer
from tutelage.models.sampling import SamplingConfig
from tutelage.models.tokenizers import decode, pad_id
from tutelage.run.checkpoint import list_checkpoints, load_optimizer, save_checkpoint
from tutelage.run.config import Config, OptimizerConfig, TransformersEngine
from tutelage.run.folder import EVALUATION_LOGS, RunFolder, environment
from tutelage.run.parse import changed_keys, fingerprint, flat_keys, to_table
from tutelage.run.setup import Parts, build, pick_device, plain_student, warnings_of
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
    is_writer: bool = True
    """False in every process but the main one, which alone writes files."""


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
    # The main process evaluates alone while the others wait for its next gradient.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    is_cpu = pick_device(config.device).type == "cpu"
    accelerator = Accelerator(cpu=is_cpu, kwargs_handlers=[patience])
    folder = RunFolder(run_folder(config, name), accelerator.is_main_process)
    folder.open()
    try:
        with _stop_requested(say) as stop:
            run = _Run(config, folder, accelerator, allow_change, say, on_step)
            try:
                return run.go(stop)
            finally:
                run.parts.sampler.close()
    finally:
        folder.close()


class _Run:
    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        accelerator: Accelerator,
        allow_change: tuple[str, ...],
        say: Say,
        on_step: OnStep | None,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.say = say if accelerator.is_main_process else _say_nothing
        self.on_step = on_step if accelerator.is_main_process else None
        shares = accelerator.num_processes * config.updates_per_step
        if config.prompts_per_step % shares:
            raise ConfigError(
                f"prompts_per_step must be a multiple of {shares} (processes times "
                f"updates_per_step), got {config.prompts_per_step}."
            )
        if accelerator.num_processes > 1 and not isinstance(config.engine, TransformersEngine):
            raise ConfigError(
                f"engine.kind {config.engine.kind!r} works with one process, got "
                f'{accelerator.num_processes}. Use engine.kind = "transformers".'
            )
        self._refuse_another_run(allow_change)
        self.first_step, self.parts = self._start()
        self._write_manifest()
        optimizer = _optimizer(config.optimizer, self.parts.masters)
        if self.first_step > 1:
            load_optimizer(self._last_checkpoint(), self.parts, optimizer)
        student, self.optimizer = accelerator.prepare(self.parts.student, optimizer)
        self.step = Step(config, self.parts, accelerator, student, self.optimizer)

    def go(self, stop: _Stop) -> RunResult:
        """Steps `first_step` to `num_steps`, with evaluations around them."""
        num_steps, done = self.config.num_steps, self.first_step - 1
        for line in warnings_of(self.config):
            self.say(f"warning: {line}")
        if self._is_evaluation_due(done) and not self.folder.has_evaluation(done):
            self._evaluate(done, stop)
        while done < num_steps and not self._any_process(stop):
            done += 1
            self._set_learning_rate(done)
            metrics = self.step.take(done)
            self.folder.append("metrics.jsonl", [metrics])
            if self.on_step is not None:
                self.on_step(metrics)
            if self._any_process(stop) or self._is_due(done, self.config.checkpoint_every):
                self._save(done)
            if self._is_evaluation_due(done) and not stop:
                self._evaluate(done, stop)
        if done < num_steps:
            self.say(f"stopped after step {done}; the same command continues from there")
            return RunResult(self.folder.path, done, False, self.folder.is_writer)
        if done >= self.first_step or not (self.folder.path / "student").exists():
            self._export()
        return RunResult(self.folder.path, done, True, self.folder.is_writer)

    def _any_process(self, stop: _Stop) -> bool:
        """Whether a signal reached any process: all of them have to stop after the same step."""
        if self.accelerator.num_processes == 1:
            return bool(stop)
        flag = torch.tensor([int(bool(stop))], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())

    def _refuse_another_run(self, allow_change: tuple[str, ...]) -> None:
        old = self.folder.read_manifest()
        unknown = set(allow_change) - set(flat_keys(to_table(self.config)))
        if unknown:
            raise ConfigError(f"--allow-change {min(unknown)!r} is no key of the configuration.")
        if old is None:
            return
        changed = changed_keys(old["config"], to_table(self.config))
        changed = [key for key in changed if key not in allow_change]
        if changed:
            raise RunError(
                f"run folder {self.folder.path} holds another run: {', '.join(changed)} "
                "differ. Choose another out=FOLDER, or pass --allow-change KEY."
            )

    def _write_manifest(self) -> None:
        table = to_table(self.config)
        manifest = {"config": table, "fingerprint": fingerprint(self.config), **environment()}
        self.folder.write_manifest(manifest)

    def _start(self) -> tuple[int, Parts]:
        """The first step to take, and the models as they are before it."""
        checkpoints = list_checkpoints(self.folder.path)
        if not checkpoints:
            self.folder.rewind(-1)
            return 1, build(self.config, scratch=self.folder.path)
        step, path = checkpoints[-1]
        self.folder.rewind(step)
        if not self.folder.has_evaluation(step):  # it died while it evaluated
            self.folder.rewind(step - 1, EVALUATION_LOGS)
        self.accelerator.wait_for_everyone()
        what = "is finished" if step >= self.config.num_steps else "continues"
        self.say(f"run {self.folder.path} {what}: found {path.name} of {self.config.num_steps}")
        return step + 1, build(self.config, str(path / "model"), self.folder.path)

    def _last_checkpoint(self) -> Path:
        return list_checkpoints(self.folder.path)[-1][1]

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.config.num_steps or (every > 0 and step % every == 0)

    def _is_evaluation_due(self, step: int) -> bool:
        return step == 0 or self._is_due(step, self.config.evaluation.every)

    def _set_learning_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, step, self.config.num_steps)

    def _save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.folder.path,
                step,
                self.parts,
                self.optimizer,
                self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _evaluate(self, step: int, stop: _Stop) -> None:
        """The main process evaluates; the others wait for it at the next gradient."""
        settings = self.config.evaluation
        if not settings.num_problems or not self.accelerator.is_main_process:
            return
        student = self._evaluate_model("student", self.parts.student.model, step)
        kl = held_out_reverse_kl(
            self.parts.student,
            self.parts.teacher,
            student.rollouts,
            pad_id(self.parts.tokenizer),
            self.config.micro_batch_size,
            self.config.micro_batch_tokens,
        )
        self._record("student", step, student, kl)
        is_graded = student.mean_at_k is not None
        if step == 0 and settings.teacher and is_graded and not stop:
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
        if not self.accelerator.is_main_process:
            return
        target = self.folder.path / "student"
        model = plain_student(self.config, self.parts.student.model)
        save_model(model, self.parts.tokenizer, target, self._card())
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


def _say_nothing(_: str) -> None:
    """The voice of every process but the main one."""


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


def _optimizer(config: OptimizerConfig, masters: MasterWeights) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    rate, decay = config.learning_rate, config.weight_decay
    optimizer = make_optimizer(config.kind, masters.masters, rate, betas, decay)
    masters.follow(optimizer)
    return optimizer


class _Stop:
    """Becomes true when a signal asks the run to stop."""

    def __init__(self) -> None:
        self.is_set = False

    def __bool__(self) -> bool:
        return self.is_set


@contextmanager
def _stop_requested(say: Say) -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM asks to stop after the step; a second one interrupts at once."""
    stop = _Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set:
            raise KeyboardInterrupt
        stop.is_set = True
        say("stopping after this step; once more to stop at once")

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
