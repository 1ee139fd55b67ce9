"""What a run measures between its steps: evaluations, snapshots of tokens, and its verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from accelerate import Accelerator

from tutelage.config.conversations import ConversationData
from tutelage.config.schema import Config
from tutelage.data.types import Rollout
from tutelage.evaluation.best import Best, best_of
from tutelage.evaluation.measure import describe, measure
from tutelage.evaluation.verdict import Verdict, verdict_of
from tutelage.setup.components import Components
from tutelage.setup.objective import needs_teacher
from tutelage.setup.phases import PhaseCallback
from tutelage.setup.run_folder import RunFolder
from tutelage.setup.shares import Shares
from tutelage.setup.trackers import numbers
from tutelage.train.agreement import in_main
from tutelage.train.checkpoint import checkpoint_path, list_checkpoints
from tutelage.train.signals import Stop, StoppedError
from tutelage.train.snapshot import snapshot


class Measurements:
    """The measurements of one run, and the logs that hold them.

    Args:
        config: the run.
        components: its models.
        accelerator: its processes and trackers.
        folder: receives the logs.
        stop: may interrupt an evaluation.
        log: receives a line for every event.
        on_phase: told what is done.
    """

    def __init__(
        self,
        config: Config,
        components: Components,
        accelerator: Accelerator,
        folder: RunFolder,
        stop: Stop,
        log: Callable[[str], None],
        on_phase: PhaseCallback,
    ) -> None:
        self.config, self.components = config, components
        self.accelerator, self.folder = accelerator, folder
        self.stop, self.log, self.on_phase = stop, log, on_phase
        count, index = accelerator.num_processes, accelerator.process_index
        self.shares = Shares(count, index)
        self.interruptible_shares = Shares(
            count, index, StoppedError, partial(stop.interruptible, is_agreed=True)
        )

    def evaluate(self, step: int) -> None:
        """All processes evaluate their share of the held-out prompts; the main one logs it.

        Raises:
            StoppedError: a signal came to one of them meanwhile; the evaluation is repeated by the
                next start.
        """
        if not self.config.evaluation.num_problems:
            return
        shares = self.interruptible_shares
        with self.components.whole() as components, self.stop.interruptible():
            measured = measure(self.config, components, step, self.on_phase, shares)

        def write() -> None:
            for name, rows in measured.logs().items():
                self.folder.append(name, rows)

        in_main(self.accelerator, write)
        for summary in measured.summaries:
            found = numbers(summary, f"evaluation.{summary['model']}.")
            self.accelerator.log(found, step=step)
            self.log(describe(summary))

    def record(
        self, step: int, rollouts: Sequence[Rollout], places: Sequence[int], is_last: bool = False
    ) -> None:
        """A snapshot of tokens for the report; all processes score, and the main one logs it.

        Args:
            step: updates done.
            rollouts: what the step learned from, this process's.
            places: their indices among those of all processes.
            is_last: no step follows, though the run has more.
        """
        settings = self.config.recording
        is_due = step == 0 or is_last or self.is_due(step, settings.every)
        if not settings.every or not is_due:
            return
        self.on_phase("recording tokens")
        with self.components.whole() as components:
            lines = snapshot(self.config, components, rollouts, step, self.shares, places)

        def write() -> None:
            if self.folder.size("tokens.jsonl") + sum(map(len, lines)) > settings.max_bytes:
                limit = settings.max_bytes
                self.log(f"no tokens recorded at step {step}: recording.max_bytes is {limit:,}")
            else:
                self.folder.append_text("tokens.jsonl", "".join(lines))

        in_main(self.accelerator, write)

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that is done every so many steps, and at the end, is due."""
        return step == self.config.num_steps or (every > 0 and step % every == 0)

    def best(self, step: int) -> Best | None:
        """The best evaluation whose checkpoint stands, or which is the one after `step`."""
        return best_checkpoint(self.folder, self.config.keep_best, step)

    def verdict(self, step: int, ends: str | None = None) -> Verdict | None:
        """What the evaluations say, the last of which was after `step`.

        Args:
            step: updates done.
            ends: why no step follows, though the run has more.
        """
        has_turns = isinstance(self.config.data, ConversationData)
        rows = self.folder.read("evaluation_rows.jsonl")
        found = verdict_of(rows, step, has_turns, needs_teacher(self.config))
        if found is None or ends is None:
            return found
        return replace(found, reason=f"{found.reason}; stopped early: {ends}")

    def conclude(self, step: int, is_logged: bool, ends: str | None = None) -> None:
        """Keep the verdict and what else is known at the end in the manifest, and perhaps log it.

        Args:
            step: updates done.
            is_logged: whether to log it.
            ends: as for `verdict`.
        """
        lines: list[str] = []
        known: dict[str, Any] = {}
        if (verdict := self.verdict(step, ends)) is not None:
            known["verdict"] = asdict(verdict)
            lines.append(f"verdict: {verdict}")
        if ends is not None:
            known["stopped_early"] = {"step": step, "reason": ends}
        if (best := self.best(step)) is not None:
            place = checkpoint_path(self.folder.path, best.step) / "model"
            known["best"] = {**asdict(best), "model": f"{place.parent.name}/{place.name}"}
            lines.append(f"best: {best}, in {place}")
        elif self.config.keep_best != "none":
            lines.append(f"no best checkpoint: {self.config.keep_best} was not measured")
        if known:
            self.folder.write_manifest((self.folder.read_manifest() or {}) | known)
        for line in lines if is_logged else ():
            self.log(line)


def best_checkpoint(folder: RunFolder, metric: str, step: int | None = None) -> Best | None:
    """The best evaluation whose checkpoint stands; None without any.

    Args:
        folder: of the run.
        metric: `keep_best`.
        step: one that counts without a checkpoint.
    """
    if metric == "none":
        return None
    standing = {number for number, _ in list_checkpoints(folder.path)}
    among = standing if step is None else standing | {step}
    return best_of(folder.read("evaluation.jsonl"), metric, among)
