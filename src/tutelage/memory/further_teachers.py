"""What the weights of several teachers take of a device, beside those of the first one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from tutelage.config.schema import Config
from tutelage.config.teachers import LogprobServerTeacher
from tutelage.memory.meta_model import shadow, stored_bytes
from tutelage.memory.plan import MemoryPlan, Phase
from tutelage.setup.components import Components
from tutelage.teachers.group import TeacherGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "further teachers"


def further_shadows(components: Components) -> dict[str, PreTrainedModel]:
    """Models of `[teachers.NAME]` without numbers; those on a server have their head alone.

    Raises:
        ModelError: a class that cannot do without them.
    """
    group, found = components.teacher, {}
    for name, teacher in group.teachers.items() if isinstance(group, TeacherGroup) else ():
        if name:
            with teacher.on_device():
                found[name] = shadow(teacher.model)
    return found


def with_further(
    config: Config, plan: MemoryPlan, models: Mapping[str, PreTrainedModel]
) -> MemoryPlan:
    """A plan with the weights of further teachers, one of all teachers being read at a time.

    Args:
        config: the run.
        plan: of the first teacher.
        models: of the others, without numbers.
    """
    rest, moved, most = 0, 0, 0
    for name, model in models.items():
        teacher = config.teachers[name]
        if not isinstance(teacher, LogprobServerTeacher):
            size, head = stored_bytes(model), model.get_output_embeddings().weight.nbytes
            here = size if teacher.mode == "resident" else head
            rest, most = rest + here, max(most, size - here)
            moved += size * (teacher.mode == "offload")
    if not rest:
        return plan
    named = {phase.name: phase.parts.get("teacher", 0) for phase in plan.phases}
    # the largest of those that are loaded to be read, while the first one rests
    more = max(0, most - (named.get("teacher", 0) - named.get("learn", 0)))

    def wider(phase: Phase) -> Phase:
        size = rest + more * (phase.name == "teacher")
        return replace(phase, parts=phase.parts | {_NAME: size})

    host = plan.host
    if host is not None and moved:
        parts = [replace(one, parts=one.parts | {_NAME: moved}) for one in host.phases]
        host = replace(host, phases=tuple(parts))
    return replace(plan, phases=tuple(map(wider, plan.phases)), host=host)
