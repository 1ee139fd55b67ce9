"""A teacher on servers: made from the head that is here, and compared with what they have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tutelage.config.schema import Config
from tutelage.config.teachers import HiddenServerTeacher
from tutelage.models.head import output_embeddings
from tutelage.models.teacher import HiddenStore
from tutelage.setup.trial import refuse_nonfinite
from tutelage.teachers.hidden import HiddenSource, ServedTeacher
from tutelage.teachers.identity import identity_of
from tutelage.teachers.tutelage_source import TutelageSource
from tutelage.teachers.vllm_source import VLLMSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def served_teacher(
    settings: HiddenServerTeacher,
    model: PreTrainedModel,
    vocab_size: int,
    swap: tuple[int, int] | None,
    store: HiddenStore,
) -> ServedTeacher:
    """The teacher whose head `load_head_model` gave; its servers are not asked yet."""
    source = hidden_source(settings, model)
    return ServedTeacher(model, source, vocab_size, settings.payload, swap, store)


def hidden_source(settings: HiddenServerTeacher, model: PreTrainedModel) -> HiddenSource:
    """The servers of a teacher whose head is here."""
    if settings.server == "vllm":
        return VLLMSource(settings, int(output_embeddings(model).weight.shape[1]))
    return TutelageSource(
        settings.urls, identity_of(model), settings.num_concurrent or 1, settings.timeout_s
    )


def connect(config: Config, teacher: ServedTeacher) -> None:
    """Compare the servers' model with the head; the teacher's notices tell about both.

    Raises:
        TutelageError: a server does not answer, or has another model.
    """
    refuse_nonfinite(teacher.model, f"teacher {config.teacher.model!r}")
    teacher.notices = (*teacher.source.connect(), *_lines(config))


def _lines(config: Config) -> Iterator[str]:
    """What a user has to know at the start of a run."""
    if isinstance(config.teacher, HiddenServerTeacher):
        more = config.teacher.logprob_url
        places = ", ".join([*config.teacher.urls, *([more] if more else [])])
        yield f"prompts and completions leave this machine: their token ids are sent to {places}"
    if config.evaluation.num_problems:
        yield "the teacher is not evaluated: of its model only the head is here"
