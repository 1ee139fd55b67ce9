"""What a run keeps of its teacher's weights: a model, or other values of the student's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.config.schema import Config
from tutelage.config.self_teacher import SelfTeacher
from tutelage.config.teachers import LogprobServerTeacher
from tutelage.memory.meta_model import stored_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TeacherWeights:
    """Bytes of a teacher that one process has whole."""

    resting: int
    """Of the weights where they rest."""
    reading: int
    """Of those on the device while it reads, if others rest in main memory."""
    head: int
    """Of the head beside the student's, which the objective reads."""
    rounded: int = 0
    """Of a copy in the model's dtype that a pass makes of wider weights."""

    def at_rest(self, mode: str) -> int:
        """Bytes on the device between teacher forwards."""
        if mode != "resident":
            return self.head
        return self.resting + (self.head if self.rounded or not self.resting else 0)

    def while_read(self, mode: str) -> int:
        """Bytes on the device while it reads."""
        return self.resting + self.rounded if mode == "resident" else self.reading


def teacher_weights(
    config: Config, model: PreTrainedModel, student: PreTrainedModel
) -> TeacherWeights:
    """What the teacher of a run takes.

    Args:
        config: the run.
        model: the teacher's, without numbers.
        student: the student's, without numbers.
    """
    teacher, head = config.teacher, model.get_output_embeddings().weight.nbytes
    if isinstance(teacher, LogprobServerTeacher):
        return TeacherWeights(0, 0, 0)
    if not isinstance(teacher, SelfTeacher):
        num_bytes = stored_bytes(model)
        return TeacherWeights(num_bytes, num_bytes, head)
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    head = head if config.student.lora is None else 0
    is_changing = teacher.weights != "frozen" and config.updates_per_step > 1
    if not teacher.is_copied:
        return TeacherWeights(0, 0, head if is_changing else 0)
    every = sum(weight.nbytes for weight in weights)
    if teacher.weights == "frozen":
        return TeacherWeights(every, every, head)
    narrow = sum(weight.nbytes for weight in weights if weight.itemsize < 4)
    return TeacherWeights(sum(4 * weight.numel() for weight in weights), every, head, narrow)


def told_bytes(config: Config) -> int:
    """Bytes of what a server of log-probabilities tells of a token; 0 of other teachers.

    An id in int64 and its log-probability in float32, of the likeliest and of the sampled one.
    """
    teacher = config.teacher
    return 12 * (teacher.num_logprobs + 1) if isinstance(teacher, LogprobServerTeacher) else 0
