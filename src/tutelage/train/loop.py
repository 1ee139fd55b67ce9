"""A run from start to end: evaluate, take steps, checkpoint, evaluate, export."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tutelage.config.schema import Config
from tutelage.errors import RunError
from tutelage.evaluation.best import stop_reason
from tutelage.models.chat.template import printed_date
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.setup.components import build_components
from tutelage.setup.inputs import pick_device
from tutelage.setup.launcher import Layout, launcher_warning, num_hosts
from tutelage.setup.manifest import input_digests, manifest_of, with_served
from tutelage.setup.numerics import open_accelerator, plain_arithmetic
from tutelage.setup.phases import PhaseCallback, no_log, no_phases
from tutelage.setup.run_folder import EVALUATION_LOGS, RunFolder, run_folder, started_at
from tutelage.setup.trackers import numbers, require_trackers, start_trackers
from tutelage.setup.validate import validate
from tutelage.train.agreement import in_all, in_main, require_shared
from tutelage.train.checkpoint import (
    ROLLOUTS,
    checkpoint_path,
    load_optimizer,
    newest_checkpoint,
    rotate,
)
from tutelage.train.disk import required_disk
from tutelage.train.distributed import Leaving, date_of_main
from tutelage.train.grades import GradeStep, grade_step
from tutelage.train.measurements import Measurements, best_checkpoint
from tutelage.train.optimizer import build_optimizer, learning_rate
from tutelage.train.peers import Peers, peers_of
from tutelage.train.saving import Saver
from tutelage.train.signals import Stop, StoppedError, listening
from tutelage.train.step import Step
from tutelage.train.stored.fill import Fill, store_of

Log = Callable[[str], None]
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
    """False in every process but the main one: no other writes files."""


@plain_arithmetic()
def train(
    config: Config,
    name: str = "run",
    allow_change: tuple[str, ...] = (),
    log: Log = print,
    on_step: OnStep | None = None,
    on_phase: PhaseCallback = no_phases,
    peers: Peers | None = None,
    grade: GradeStep = grade_step,
) -> RunResult:
    """Train the student, or continue an earlier run in the same folder.

    Args:
        config: the run.
        name: stem of the default folder's name.
        allow_change: keys that may differ from the run being continued.
        log: receives one line of text for every event a user should see.
        on_step: receives the metrics of every step.
        on_phase: told what is done between steps.
        peers: the other processes, if they are watched already.
        grade: grades a step's completions for methods that need verdicts.

    Returns:
        `RunResult`.

    Raises:
        TutelageError: whatever a user can mend.
    """
    require_trackers(config)
    path = run_folder(config, name)
    all_of = peers or peers_of(path, config.process_timeout_s)
    with nullcontext() if peers else all_of, ExitStack() as stack, all_of.told():
        all_of.meet()
        accelerator = open_accelerator(config, path, pick_device(config.device))
        stack.enter_context(Leaving(accelerator))
        folder = RunFolder(path, accelerator.is_main_process)
        stop = Stop(accelerator.num_processes == 1, all_of.is_lost)
        stack.callback(folder.close)
        in_main(accelerator, folder.open)
        require_shared(accelerator, path)
        earlier = started_at(folder.read_manifest())
        started = date_of_main(accelerator, earlier or datetime.now())
        stack.enter_context(listening(stop))
        stack.enter_context(printed_date(started))
        settings = (config, folder, accelerator, started, allow_change)
        return _go(*settings, log, on_step, stop, on_phase, grade)


def _go(*of_run: Any) -> RunResult:
    """A run, to which nothing refers afterwards."""
    run = _Run(*of_run)
    try:
        return run.go()
    finally:
        run.close()


class _Run:
    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        accelerator: Accelerator,
        started: datetime,
        allow_change: tuple[str, ...],
        log: Log,
        on_step: OnStep | None,
        stop: Stop,
        on_phase: PhaseCallback,
        grade: GradeStep,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.stop = stop
        self.ends: str | None = None
        self.log = log if accelerator.is_main_process else no_log
        self.on_step = on_step if accelerator.is_main_process else None
        self.on_phase = on_phase if accelerator.is_main_process else no_phases
        inputs = validate(config, folder.path, accelerator.num_processes, allow_change)
        known = (folder.read_manifest() or {}).get("inputs", {}) if not inputs.has_teacher else {}
        digests = {**known, **input_digests(config, inputs)}
        done, checkpoint = self._start()
        self.done = self.saved = done
        self.first_step = done + 1
        saved = None if checkpoint is None else str(checkpoint / "model")
        self.components = build_components(config, saved, folder.path, inputs, self.on_phase)
        sizes = (config, self.components, folder.path, inputs.prompts)
        disk = "" if self._takes_no_step() else required_disk(accelerator, *sizes)
        served = (self.components.teacher, folder.read_manifest(), allow_change)
        digests = with_served(config, digests, *served)
        self._write_manifest(manifest_of(config, digests, started))
        if disk:
            self.log(disk)
        start_trackers(accelerator, config, folder.path.name)
        optimizer = build_optimizer(
            config.optimizer, self.components.student, self.components.masters, folder.path
        )
        if checkpoint is not None:
            in_all(accelerator, lambda: load_optimizer(checkpoint, self.components, optimizer))
        self.saver = Saver(
            config, folder, accelerator, self.components, optimizer, self.on_phase, self.log
        )
        self.optimizer = optimizer
        store, student = store_of(config, folder.path, digests), self.components.student
        self.step = Step(config, self.components, accelerator, student, optimizer, stop, store)
        self.step.grade = grade
        parts = (self._any_process, self.log, self.on_phase)
        self.fill = None if store is None else Fill(self.step, store, *parts)
        if isinstance(self.components.sampler, ReplicaSampler):
            undisturbed = nullcontext if accelerator.num_processes == 1 else stop.deferred
            self.components.sampler.replicas.join(self.step.ranks, self.log, undisturbed)
        self._restore_ahead(checkpoint)
        self.measurements = Measurements(
            config, self.components, accelerator, folder, stop, self.log, self.on_phase
        )
        self._num_skipped = in_main(
            accelerator, lambda: _skipped_in_a_row(folder.read("metrics.jsonl"))
        )

    def _restore_ahead(self, checkpoint: Path | None) -> None:
        """The rollouts of the first step, where the run stopped after they were drawn."""
        path = None if checkpoint is None else checkpoint / ROLLOUTS
        if path is None or not path.exists():
            return
        if not self.step.restore_ahead(self.first_step, path.read_text(encoding="utf-8")):
            self.log(
                f"warning: {path} has completions of other prompts, or another number of them, "
                f"than step {self.first_step} has now; they are sampled anew"
            )

    def _save(self) -> None:
        if self.step.ahead is not None and self.done < self.config.num_steps:
            self.on_phase(f"sampling for step {self.done + 1}, which the checkpoint holds")
        self.saver.save(self.done, self.step.saved_ahead(self.done), self._best_step())
        self.saved = self.done

    def _best_step(self) -> int | None:
        """Of the step whose checkpoint is the best so far, this one included."""
        if self.config.keep_best == "none":
            return None
        self.saver.wait()  # one that is still being written is to choose from
        best = in_main(self.accelerator, lambda: self.measurements.best(self.done))
        return None if best is None else best.step

    def _evaluate(self) -> None:
        """Evaluate, save the weights if none were better, and see whether the run ends here."""
        self.measurements.evaluate(self.done)
        if self.done > self.saved and self._best_step() == self.done:
            self._save()
        self._see_whether_it_ends(self.done)

    def _see_whether_it_ends(self, step: int) -> None:
        """Whether the evaluation after a step is the last; none stops a run that has no more."""
        records, settings = self.folder, self.config.stop_when
        if settings.metric != "none" and step < self.config.num_steps:
            self.ends = in_main(
                self.accelerator, lambda: stop_reason(records.read("evaluation.jsonl"), settings)
            )

    def _end_early(self) -> None:
        """Save and record what a run does after its last step."""
        if self.done >= self.first_step:
            self.log(f"stopped early: {self.ends}")
            if not self.measurements.is_due(self.done, self.config.recording.every):
                self._record(is_last=True)
            if self.done > self.saved:
                self._save()

    def go(self) -> RunResult:
        """Steps `first_step` to `num_steps`, with evaluations around them."""
        num_steps = self.config.num_steps
        for line in self.components.teacher.notices:
            self.log(line)
        for line in self.components.warnings:
            self.log(f"warning: {line}")
        has_evaluation, has_tokens = in_main(self.accelerator, self._logged)
        if self.fill is not None:
            self.fill.begin(self.first_step)
        try:
            if self._is_evaluation_due() and not has_evaluation:
                self._evaluate()
            if self.done == 0 and not has_tokens:
                self._record()
            if self.fill is not None:
                self.fill.run()
            while self.done < num_steps and not self.ends and not self._any_process():
                self._take()
                self.saver.look()
                self._record()
                if self.measurements.is_due(self.done, self.config.checkpoint_every):
                    self._save()
                if self._is_evaluation_due():
                    self._evaluate()
            if self.ends and self.done < num_steps:
                self._end_early()
        except StoppedError:
            pass  # whatever it was given up for did not count yet
        self.on_phase("")
        if (self.done < num_steps and not self.ends) or self._any_process():
            if self.done > self.saved:
                self._save()
            self.saver.wait()
            self.log(f"stopped after step {self.done}; the same command continues from there")
            return RunResult(self.folder.path, self.done, False, self.folder.is_writer)
        has_student = in_main(self.accelerator, (self.folder.path / "student").exists)
        if self.done >= self.first_step or not has_student:
            self.saver.export(self.measurements.verdict(self.done, self.ends))
        self.saver.wait()
        self.measurements.conclude(self.done, self.done >= self.first_step, self.ends)
        return RunResult(self.folder.path, self.done, True, self.folder.is_writer)

    def _take(self) -> None:
        """One step, which is logged as soon as it is done."""
        step = self.done + 1
        self.on_phase("first step" if step == self.first_step else "")
        self._set_learning_rate(step)
        try:
            metrics = self.step.take(step)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"step {step} ran out of memory: {str(error).split('. ')[0]}. Lower "
                "sampling_batch_size or micro_batch_tokens; `tutelage check` shows what memory "
                "goes to."
            ) from None
        self.folder.append("metrics.jsonl", [metrics])
        self.accelerator.log(numbers(metrics), step=step)
        self.done = step
        if self.on_step is not None:
            self.on_step(metrics)
        self._report_skipped(metrics)

    def _report_skipped(self, metrics: dict[str, Any]) -> None:
        if not metrics["num_skipped_updates"]:
            self._num_skipped = 0
            return
        self._num_skipped += 1
        names = metrics["nonfinite"]
        what = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        self.log(f"warning: step {self.done} skipped {metrics['num_skipped_updates']} of "
                 f"{self.config.updates_per_step} updates: not finite in {what}")  # fmt: skip
        if self._num_skipped >= self.config.max_skipped_steps:
            raise RunError(
                f"{self._num_skipped} steps in a row skipped an update whose loss or gradient was "
                f"not finite, the last in {what}. Lower optimizer.learning_rate, use float32, or "
                "raise max_skipped_steps."
            )

    def _record(self, is_last: bool = False) -> None:
        rollouts = self.step.rollouts
        self.measurements.record(self.done, rollouts, self.step.share(len(rollouts)), is_last)

    def _logged(self) -> tuple[bool, bool]:
        """Whether there is an evaluation of the last step, and a snapshot of the start."""
        has_tokens = self.done == 0 and bool(self.folder.read("tokens.jsonl"))
        return self.folder.has_evaluation(self.done), has_tokens

    def _any_process(self) -> bool:
        """Whether a signal reached any process: all of them have to stop after the same step."""
        if self.accelerator.num_processes == 1:
            return bool(self.stop)
        flag = torch.tensor([int(bool(self.stop))], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        config, count = self.config, self.accelerator.num_processes
        layout = Layout(count, num_hosts(), config.student.sharding, config.teacher.sharding)

        def write() -> None:
            earlier = self.folder.read_manifest()
            if self._takes_no_step() and earlier is not None:
                kept = (*asdict(layout), "layouts")
                known = {key: earlier[key] for key in kept if key in earlier}
            else:
                known = layout.record(earlier, self.first_step)
            self.folder.write_manifest(manifest | known)

        in_main(self.accelerator, write)
        self.log(f"{layout} on {self.accelerator.device.type}")
        if warning := launcher_warning(count):
            self.log(f"warning: {warning}")

    def _start(self) -> tuple[int, Path | None]:
        """Steps that are done, and the checkpoint after them; the logs end there too."""
        step = in_main(self.accelerator, self._rewind)
        if step < 0:
            return 0, None
        path = checkpoint_path(self.folder.path, step)
        self._see_whether_it_ends(step)
        what = "is finished" if step >= self.config.num_steps or self.ends else "continues"
        why = f"; nothing is left to do: {self.ends}" if self.ends else ""
        self.log(
            f"run {self.folder.path} {what}: found {path.name} of {self.config.num_steps}{why}"
        )
        return step, path

    def _takes_no_step(self) -> bool:
        return self.first_step > self.config.num_steps or self.ends is not None

    def _rewind(self) -> int:
        """The step of the newest whole checkpoint, after which nothing is logged; -1 for none."""
        found = newest_checkpoint(self.folder.path, self.log)
        if found is None:
            self.folder.rewind(-1)
            return -1
        step, _ = found
        self.folder.rewind(step)
        if not self.folder.has_evaluation(step):  # it died while it evaluated
            self.folder.rewind(step - 1, EVALUATION_LOGS)
        # it may have died between a save and the removal of older ones
        best = best_checkpoint(self.folder, self.config.keep_best)
        rotate(self.folder.path, self.config.keep_checkpoints, None if best is None else best.step)
        return step

    def _is_evaluation_due(self) -> bool:
        every = self.config.evaluation.every
        return self.done == 0 or self.measurements.is_due(self.done, every)

    def _set_learning_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, step, self.config.num_steps)

    def close(self) -> None:
        """End what works beside the run."""
        self.saver.close()
        self.components.sampler.close()


def _skipped_in_a_row(metrics: list[dict[str, Any]]) -> int:
    """Steps at the end of the log with a skipped update."""
    return len(list(takewhile(lambda m: m["num_skipped_updates"], reversed(metrics))))
