"""Loads the teacher of a run, and places it where the processes of the run hold it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutelage.config.models import TeacherConfig, TeacherMode
from tutelage.config.rollouts import stores_teacher
from tutelage.config.schema import Config
from tutelage.config.self_teacher import SelfTeacher
from tutelage.config.teachers import HiddenServerTeacher, LogprobServerTeacher
from tutelage.errors import ConfigError, RunError
from tutelage.files.checksums import DamagedError, unseal
from tutelage.models.head_model import load_head_model, shape_of_head
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.optimizer import MasterWeights
from tutelage.models.packing import require_packed, use_own_attention
from tutelage.models.reference import ResolvedModel, resolve_model
from tutelage.models.self_teacher import StudentAsTeacher, first_values
from tutelage.models.sharding import num_processes
from tutelage.models.stored_teacher import StoredTeacher
from tutelage.models.student import Student, trained_names
from tutelage.models.teacher import HiddenStore, Teacher
from tutelage.models.teacher_protocol import AnyTeacher
from tutelage.models.teacher_shards import TeacherShards, require_shardable_teacher
from tutelage.setup.served_teacher import connect, served_teacher
from tutelage.setup.trial import refuse_nonfinite, try_model
from tutelage.teachers.hidden import ServedTeacher
from tutelage.teachers.logprob import LogprobTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROLLOUTS, STATES, HEAD = "rollouts", "teacher", "head"
"""Folder of the run's that holds stored rollouts, in it that of the teacher's states, and in that
the one of its head, which is written last."""


def has_states(config: Config, run: Path) -> bool:
    """Whether a run goes on from a checkpoint with all that its steps need of its teacher."""
    is_stored = stores_teacher(config.rollouts) and (run / ROLLOUTS / STATES / HEAD).is_dir()
    return is_stored and any(run.glob("checkpoint-*"))


def kept_teacher(
    config: Config, saved: str | None, run: Path | None, device: torch.device
) -> StoredTeacher | None:
    """What a run has stored of its teacher; None where the teacher is to be loaded.

    Args:
        config: the run.
        saved: its checkpoint's student; None for a start, which measures the teacher.
        run: its folder.
        device: of the head.

    Raises:
        RunError: it is damaged.
    """
    if saved is None or run is None or not has_states(config, run):
        return None
    folder = run / ROLLOUTS / STATES / HEAD
    try:
        unseal(folder)
    except (DamagedError, OSError) as error:
        raise RunError(
            f"{folder} cannot be used: {error}. Remove it: the teacher is then loaded once more."
        ) from None
    return StoredTeacher.read(folder, device)


def as_stored(config: Config, teacher: AnyTeacher | None, is_run: bool) -> AnyTeacher | None:
    """The same, ready to let its model go where a run stores its states."""
    if isinstance(teacher, Teacher) and is_run and stores_teacher(config.rollouts):
        return StoredTeacher(teacher)
    return teacher


def set_attention(config: Config, model: PreTrainedModel, who: str, device: torch.device) -> None:
    """Attention for packed rows, or on CUDA one that needs no synchronization for its mask."""
    if config.micro_batches == "packed":
        require_packed(model, who)
    elif device.type == "cuda":
        use_own_attention(model)


def load_teacher(config: Config, device: torch.device) -> Callable[[], PreTrainedModel]:
    """A function that loads the teacher to where it is kept; an error if its files changed.

    Of a teacher on a server it loads the head, or its shape alone where that is all that is needed.
    """
    teacher = config.teacher
    if isinstance(teacher, LogprobServerTeacher):
        return partial(shape_of_head, teacher.model)
    if not isinstance(teacher, TeacherConfig):
        return partial(load_head_model, teacher.model, teacher.dtype, device)
    found = resolve_model(teacher.model)
    if teacher.mode == "reload" and found.gguf_file is not None:
        raise ConfigError(
            f"teacher.mode 'reload' would unpack {teacher.model!r} in every step: it is a GGUF "
            "file. Use offload, or a folder with safetensors."
        )
    if teacher.sharding != "none" and found.gguf_file is not None:
        raise ConfigError(
            f"teacher.sharding {teacher.sharding!r} would unpack {teacher.model!r} in every "
            "process: it is a GGUF file. Give a folder with safetensors."
        )
    is_mapped = teacher.mode == "offload" or teacher.sharding != "none"
    place = "cpu" if is_mapped else str(device)
    known = _versions(found)

    def load() -> PreTrainedModel:
        if _versions(found) != known:
            raise RunError(
                f"the files of teacher {teacher.model!r} have changed since the run began. "
                "Restore them and start the same command again."
            )
        model = load_model(teacher.model, teacher.dtype, place, quantization=teacher.quantization)
        set_attention(config, model, f"teacher {teacher.model!r}", device)
        return model

    return load


def build_teacher(
    config: Config,
    model: PreTrainedModel,
    load: Callable[[], PreTrainedModel],
    vocab_size: int,
    device: torch.device,
    swap: tuple[int, int] | None = None,
    scratch: Path | None = None,
    is_run: bool = True,
) -> AnyTeacher:
    """The teacher where it rests; of several processes that share it each has its part.

    Args:
        config: the run's configuration.
        model: what `load` gave.
        load: from `load_teacher`.
        vocab_size: ids that both models know.
        device: the run's.
        swap: ids that trade places.
        scratch: folder for hidden states beyond the budget; None for the system's temporary one.
        is_run: False where it is only looked at: one that processes share stays in its files.

    Raises:
        ModelError: its architecture cannot be shared so.
    """
    settings, who = config.teacher, f"teacher {config.teacher.model!r}"
    store = HiddenStore(settings.hidden_budget_bytes, scratch)
    if isinstance(settings, HiddenServerTeacher):
        return served_teacher(settings, model, vocab_size, swap, store)
    if isinstance(settings, LogprobServerTeacher):
        tokenizer = load_tokenizer(settings.model)
        return LogprobTeacher(settings, vocab_size, device, swap, model, tokenizer)
    if not isinstance(settings, TeacherConfig):
        raise ValueError(f"a teacher of kind {settings.kind!r} is not loaded.")
    mode, shards, kind = _mode_at_rest(settings, device), None, settings.sharding
    if kind != "none" and not is_run:
        require_shardable_teacher(model, kind, who, settings.sharding_group_size)
        device = torch.device("cpu")
    elif kind != "none" and num_processes() > 1:
        shards = TeacherShards(kind, device, settings.sharding_group_size, who)
    return Teacher(model, vocab_size, device, mode, swap, load, store, shards)


def needs_start(config: Config) -> bool:
    """Whether the weights that the student started with teach, and it has them no more."""
    teacher = config.teacher
    return isinstance(teacher, SelfTeacher) and teacher.weights == "frozen" and teacher.is_copied


def build_self_teacher(
    config: Config,
    student: Student,
    masters: MasterWeights,
    start: PreTrainedModel | None,
    device: torch.device,
    scratch: Path | None = None,
) -> StudentAsTeacher:
    """The student as its own teacher.

    Args:
        config: the run's configuration.
        student: has all weights.
        masters: keep the averages of `ema`.
        start: the student as it was at first; None where it is so now, or where `needs_start` says
            that nobody asks.
        device: the run's.
        scratch: as in `build_teacher`.
    """
    settings = config.teacher
    if not isinstance(settings, SelfTeacher):
        raise ValueError(f"a teacher of kind {settings.kind!r} is not the student.")
    values: dict[str, Tensor] = {}
    if settings.weights == "frozen":
        values = first_values(student.model, start, settings.mode)
    elif settings.weights == "ema":
        values = dict(zip(trained_names(student), masters.averages, strict=True))
    is_changing = settings.weights != "frozen" and config.updates_per_step > 1
    is_trained = student.model.get_output_embeddings().weight.requires_grad
    store = HiddenStore(settings.hidden_budget_bytes, scratch)
    return StudentAsTeacher(
        student.model,
        student.vocab_size,
        values,
        device,
        settings.mode,
        store,
        is_changing and is_trained,
    )


def try_teacher(config: Config, teacher: AnyTeacher) -> list[str]:
    """Warnings of a teacher that computes what it should; see `try_model`."""
    who = f"teacher {config.teacher.model!r}"
    if isinstance(teacher, ServedTeacher):
        connect(config, teacher)
        return []
    if isinstance(teacher, LogprobTeacher):
        teacher.connect()
        return []
    with teacher.on_device():
        refuse_nonfinite(teacher.model, who)
        is_packed = config.micro_batches == "packed"
        return try_model(teacher.model, who, teacher.vocab_size, False, is_packed)


def _versions(found: ResolvedModel) -> dict[Path, tuple[int, int]]:
    """Size and time of change of each file of a folder; a hub's cache does not change."""
    try:
        folders = [found.source] * found.is_local + [found.adapter] * (found.adapter is not None)
        files = {path: path.stat() for name in folders for path in Path(str(name)).iterdir()}
    except OSError:
        return {}  # missing or unreadable
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in files.items()}


def _mode_at_rest(config: TeacherConfig, device: torch.device) -> TeacherMode:
    """The teacher's mode: on a CPU, offload maps the files of a folder instead of copying them."""
    found = resolve_model(config.model)
    is_mapped = found.is_local and found.gguf_file is None and config.quantization == "none"
    if config.mode == "offload" and device.type == "cpu" and is_mapped:
        return "reload"
    return config.mode
