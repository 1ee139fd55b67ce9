"""What a run measures between its steps: evaluations, snapshots of tokens, and its verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

from accelerate import Accelerator

from tutelage.config.conversations import ConversationData
from tutelage.config.schema import Config
from tutelage.data.types import Rollout
from tutelage.evaluation.measure import describe, measure
from tutelage.evaluation.verdict import Verdict, verdict_of
from tutelage.setup.components import Components
from tutelage.setup.objective import needs_teacher
from tutelage.setup.phases import PhaseCallback
from tutelage.setup.run_folder import RunFolder
from tutelage.setup.shares import Shares
from tutelage.setup.trackers import numbers
from tutelage.train.agreement import in_main
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

    def record(self, step: int, rollouts: Sequence[Rollout], places: Sequence[int]) -> None:
        """A snapshot of tokens for the report; all processes score, and the main one logs it.

        Args:
            step: updates done.
            rollouts: what the step learned from, this process's.
            places: their indices among those of all processes.
        """
        settings = self.config.recording
        is_due = step == 0 or self.is_due(step, settings.every)
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

    def verdict(self, step: int) -> Verdict | None:
        """What the evaluations say, the last of which was after `step`."""
        has_turns = isinstance(self.config.data, ConversationData)
        rows = self.folder.read("evaluation_rows.jsonl")
        return verdict_of(rows, step, has_turns, needs_teacher(self.config))

    def conclude(self, step: int, is_logged: bool) -> None:
        """Keep the verdict in the manifest, and perhaps log it."""
        verdict = self.verdict(step)
        if verdict is not None:
            manifest = self.folder.read_manifest() or {}
            self.folder.write_manifest(manifest | {"verdict": asdict(verdict)})
            if is_logged:
                self.log(f"verdict: {verdict}")
