"""What a run will take of the disk of its folder, before it starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from tutelage.config.evaluation import IS_MORE_BETTER
from tutelage.config.schema import Config
from tutelage.errors import RunError
from tutelage.memory.stored import stored_rollout_bytes, stored_state_bytes
from tutelage.setup.components import Components
from tutelage.setup.inputs import PromptStats
from tutelage.train.agreement import in_main
from tutelage.train.saving import checkpoint_bytes, state_bytes

_SPARE_BYTES = 16 << 20
"""Tokenizers, headers, the report."""
_STEP_BYTES, _COMPLETION_BYTES = 4096, 256
"""Of a step in metrics.jsonl, and of a graded completion in evaluation_rows.jsonl."""
_GIB, _MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that are still to be written, by what for."""

    folder: Path
    parts: dict[str, int]
    free: int
    """Bytes that the disk of the folder has left."""

    @property
    def needed(self) -> int:
        """All of them together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        shown = [f"{name} {_size(size)}" for name, size in self.parts.items() if size >= _MIB]
        inside = f" ({', '.join(shown)})" if shown else ""
        return f"needs about {_size(self.needed)} of disk{inside}, {_size(self.free)} free"

    def require(self) -> None:
        """Refuse a run that the disk has no room for: better now than after hours.

        Raises:
            RunError: it has too little.
        """
        if self.needed + _SPARE_BYTES > self.free:
            raise RunError(
                f"the run {self} for {self.folder}. Free some space, choose out=FOLDER on a "
                "larger disk, or lower keep_checkpoints, recording.max_bytes or what rollouts "
                "stores."
            )


def plan_disk(config: Config, components: Components, folder: Path, longest: int) -> DiskPlan:
    """What a run, new or continued, still writes to its folder at most.

    Checkpoints are counted as they stand at once, one of them being written; of what a continued
    run has already, as much is taken off.

    Args:
        config: the run.
        components: its models.
        folder: its folder, which need not exist.
        longest: tokens of the longest prompt.
    """
    checkpoints = num_checkpoints(config) * checkpoint_bytes(config, components)
    stored = stored_rollout_bytes(config, longest, config.num_steps)
    if states := stored_state_bytes(config, components.teacher.head_shape[1]):
        stored += states + components.teacher.head_bytes
    parts = {
        "checkpoints": max(0, checkpoints - _bytes_of(folder, "checkpoint-*")),
        "exported student": _exported_bytes(config, components),
        "rollouts": max(0, stored - _bytes_of(folder, "rollouts")),
        "recordings": config.recording.max_bytes if config.recording.every else 0,
        "logs": _log_bytes(config),
    }
    if config.optimizer.state_is_on_disk:
        parts["optimizer"] = state_bytes(config, components.masters)
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return DiskPlan(folder, parts, shutil.disk_usage(nearest).free)


def required_disk(
    accelerator: Accelerator,
    config: Config,
    components: Components,
    folder: Path,
    prompts: PromptStats | None,
) -> str:
    """One line on what a run takes of the disk.

    Raises:
        RunError: the disk has no room for it; the same in every process.
    """

    def planned() -> str:
        plan = plan_disk(config, components, folder, 0 if prompts is None else prompts.longest)
        plan.require()
        return f"run: {plan}"

    return in_main(accelerator, planned)


def num_checkpoints(config: Config) -> int:
    """Checkpoints that stand at once, one of them being written, at most."""
    has_best, every = config.keep_best in IS_MORE_BETTER, config.checkpoint_every
    written = -(-config.num_steps // every) if every else 1
    if has_best:
        written += -(-config.num_steps // config.evaluation.every)
    return min(config.keep_checkpoints + has_best + 1, written)


def _exported_bytes(config: Config, components: Components) -> int:
    """The student as a plain model; adapters are merged into weights of the configured dtype."""
    weights = list(components.student.plain.parameters())
    if config.student.lora is None:
        return sum(weight.nbytes for weight in weights)
    packed = 2 if config.student.quantization == "4bit" else 1
    numels = (
        w.numel() * (1 if w.is_floating_point() else packed) for w in weights if not w.requires_grad
    )
    count = int(sum(numels))
    return count * {"float32": 4, "bfloat16": 2}[config.student.dtype]


def _log_bytes(config: Config) -> int:
    settings = config.evaluation
    count = 2 + (config.num_steps // settings.every if settings.every else 0) + settings.teacher
    completions = count * settings.num_problems * settings.num_samples
    return config.num_steps * _STEP_BYTES + completions * _COMPLETION_BYTES


def _bytes_of(folder: Path, pattern: str) -> int:
    """Of the files below the folders of that name."""
    files = (file for place in folder.glob(pattern) for file in place.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _size(num_bytes: int) -> str:
    if num_bytes >= _GIB // 10:
        return f"{num_bytes / _GIB:,.1f} GiB"
    return f"{num_bytes / _MIB:,.1f} MiB"
