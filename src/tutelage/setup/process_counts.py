"""How many processes a run has, on how many hosts, and whether they can share it evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.config.schema import Config
from tutelage.errors import ConfigError
from tutelage.models.load import DTYPES, file_dtype

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ProcessCounts:
    """How many there are, and where."""

    count: int = 1
    hosts: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or self.hosts < 1 or self.count % self.hosts:
            raise ConfigError(
                "the number of processes must be a multiple of the number of hosts, both at least "
                f"1, got {self.count} and {self.hosts}."
            )

    @property
    def per_host(self) -> int:
        """Processes that share the main memory of one machine."""
        return self.count // self.hosts

    def student_group(self, config: Config) -> int:
        """Processes that hold one copy of the student together; 1 is a whole copy in each."""
        return self._group("student", config.student.sharding, config.student.sharding_group_size)

    def teacher_group(self, config: Config) -> int:
        """The same of the teacher."""
        return self._group("teacher", config.teacher.sharding, config.teacher.sharding_group_size)

    def copied_bytes(self, config: Config, student: nn.Module, teacher: nn.Module) -> int:
        """What a process copies to main memory before it keeps its parts: models whose files have
        another dtype than the run. Others are mapped from their files.

        Args:
            config: the run.
            student: whole; it may be without numbers.
            teacher: likewise.
        """
        sides = (
            (config.student, student, self.student_group(config)),
            (config.teacher, teacher, self.teacher_group(config)),
        )
        return sum(
            weight.nbytes
            for side, model, group in sides
            if group > 1 and file_dtype(side.model) not in (None, DTYPES[side.dtype])
            for weight in model.parameters()
        )

    def _group(self, who: str, sharding: str, size: int) -> int:
        if sharding == "none" or self.count == 1:
            return 1
        if self.count % (size or self.count):
            raise ConfigError(
                f"{who}.sharding_group_size must divide the number of processes, {self.count}, got "
                f"{size}. Use 0 for one group of all processes."
            )
        return size or self.count

    def prompts(self, config: Config) -> int:
        """Prompts of a step that one process has.

        Raises:
            ConfigError: they cannot be shared out evenly.
        """
        shares = self.count * config.updates_per_step
        if config.prompts_per_step % shares:
            raise ConfigError(
                f"prompts_per_step must be a multiple of {shares} (processes times "
                f"updates_per_step), got {config.prompts_per_step}."
            )
        return config.prompts_per_step // self.count

    def refuse_uneven(self, config: Config) -> None:
        """Refuses processes that cannot share prompts or models evenly.

        Raises:
            ConfigError: they cannot.
        """
        self.prompts(config)
        self.student_group(config)
        self.teacher_group(config)

    def title(self, config: Config) -> str:
        """Of a plan of one of them: the processes and what they share; empty for one that
        shares nothing."""
        if self.count == 1:
            is_shared = {config.student.sharding, config.teacher.sharding} != {"none"}
            shown = "plan of one process, which holds all weights; --processes N plans N"
            return shown if is_shared else ""
        hosts = f", {self.hosts} hosts" if self.hosts > 1 else ""
        sides = [
            f"{who} {side.sharding} in groups of {group}"
            for who, side, group in (
                ("student", config.student, self.student_group(config)),
                ("teacher", config.teacher, self.teacher_group(config)),
            )
            if group > 1
        ]
        return f"of each of {self.count} processes{hosts}" + "".join(f", {side}" for side in sides)


ONE_PROCESS = ProcessCounts()
