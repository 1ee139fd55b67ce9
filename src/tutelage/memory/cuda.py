"""What a run will need of a CUDA device and of main memory, from shapes and a few facts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutelage.config.rollouts import has_teacher_prefix, prefix_tokens
from tutelage.config.sampling import TransformersEngine, VLLMEngine
from tutelage.config.schema import Config
from tutelage.core._block import ACCELERATOR_CHUNK_BYTES
from tutelage.core.kernels.buffers import Buffers
from tutelage.errors import ModelError
from tutelage.memory.cpu import Sizes, copied_bytes, plan_memory, shards_of
from tutelage.memory.facts import Facts, with_uncounted
from tutelage.memory.further_teachers import further_shadows, with_further
from tutelage.memory.meta_model import (
    Learning,
    learning_from,
    reading,
    shadows,
    stored_bytes,
)
from tutelage.memory.plan import MemoryPlan, Phase
from tutelage.memory.rollout_cuda import RolloutMemory, draw_memory
from tutelage.memory.shards import Shards, TeacherParts
from tutelage.memory.stored import of_steps
from tutelage.memory.student import student_in_shards, whole_student
from tutelage.memory.teacher_weights import teacher_weights, told_bytes
from tutelage.models.teacher import DEVICE_SHARE
from tutelage.setup.components import Components
from tutelage.setup.objective import needs_scoring, needs_teacher, scores_teacher
from tutelage.setup.process_counts import ONE_PROCESS, ProcessCounts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_run(
    config: Config,
    components: Components,
    prompt_tokens: int,
    processes: ProcessCounts = ONE_PROCESS,
) -> MemoryPlan:
    """The plan of a run on the device it has; arguments as for `plan_memory`."""
    if components.device.type != "cuda":
        return plan_memory(config, components, prompt_tokens, processes)
    try:
        sides, facts = shadows(components), Facts.of(components.device)
        copied = processes.copied_bytes(config, *sides)
        plan = plan_cuda(config, *sides, facts, prompt_tokens, processes, copied)
        return with_further(config, plan, further_shadows(components))
    except ModelError:  # a class that cannot do without numbers, or weights of few bits
        return plan_memory(config, components, prompt_tokens, processes)


def plan_cuda(
    config: Config,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    facts: Facts,
    prompt_tokens: int,
    processes: ProcessCounts = ONE_PROCESS,
    copied_bytes: int = 0,
) -> MemoryPlan:
    """What each phase of a step needs on a CUDA device, and what all of them need beside it.

    Every tensor is counted where it lives: passes of the models run on shapes alone, slots and
    buffers by the functions that allocate them. A phase's `allocated_bytes` are what
    `torch.cuda.max_memory_allocated` shows; context and allocator come on top.

    Args:
        config: the run.
        student: from `shadow`, with its adapter and its checkpointed activations.
        teacher: from `shadow`.
        facts: of the device.
        prompt_tokens: length of the longest prompt.
        processes: of the run, each with a device like that; the plan is that of one of them, and
            of its part of a host's main memory.
        copied_bytes: of models that it copies to main memory before it keeps its parts.

    Raises:
        ModelError: a class cannot be run without numbers.
        ConfigError: the processes cannot share models or prompts evenly.
    """
    plan = _Plan(config, student, teacher, facts, prompt_tokens, processes)
    prefix = [plan.prefix()] if has_teacher_prefix(config.rollouts) else []
    phases = [
        *prefix,
        plan.rollout(),
        *([plan.teacher_reads()] if plan.has_teacher else []),
        plan.learn(),
    ]
    if needs_scoring(config) or not isinstance(config.engine, TransformersEngine):
        phases.insert(-1, plan.score())
    if config.evaluation.num_problems and config.evaluation.teacher:
        phases.insert(0, plan.evaluate())
    room = facts.host_bytes // processes.per_host
    loading = [Phase("load", {"read at once": copied_bytes})] if copied_bytes else []
    host = MemoryPlan((*loading, plan.host(room)), room, what="main memory")
    head = plan.teacher_head.nbytes
    phases = [with_uncounted(of_steps(config, phase, head)) for phase in phases]
    return MemoryPlan(tuple(phases), facts.available_bytes, host, title=processes.title(config))


class _Plan:
    def __init__(
        self,
        config: Config,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        facts: Facts,
        prompt_tokens: int,
        processes: ProcessCounts,
    ) -> None:
        self.config, self.facts = config, facts
        self.student, self.teacher = student, teacher
        self.prompt_tokens, self.processes = prompt_tokens, processes
        self.sizes = sizes = Sizes(config, prompt_tokens, processes)
        self.shape = (sizes.micro_batch // sizes.length, sizes.length)
        """Sequences of the largest micro-batch, and their length."""
        completions = sizes.completions
        each = completions // config.updates_per_step
        is_packed = config.micro_batches == "packed"
        if is_packed:  # one row, which need not hold whole sequences
            most = min(config.micro_batch_size, completions) * sizes.length
            limit = config.micro_batch_tokens or most
            self.shape = (1, max(sizes.length, min(most, limit)))
        tokens = self.shape[0] * self.shape[1]
        self.num_rows = sizes.rows_among(tokens)
        self.num_passes = -(-each * sizes.length // tokens)
        """Micro-batches of an update."""
        self.has_teacher = needs_teacher(config)
        """Whether steps read it."""
        self.head: Tensor = student.get_output_embeddings().weight
        self.teacher_head: Tensor = teacher.get_output_embeddings().weight
        self.vocab_size = min(len(self.head), len(self.teacher_head))
        self.held = teacher_weights(config, teacher, student)
        self.told = told_bytes(config)
        self.given = "log-probabilities" if self.told else "hidden states"
        self.row_bytes = self.told or self.teacher_head.shape[1] * self.teacher_head.itemsize
        self.is_drawn_here = isinstance(config.engine, TransformersEngine)
        self.shards = shards_of(config, student, processes)
        self.own = (
            whole_student(config, student)
            if self.shards is None
            else student_in_shards(config, self.shards)
        )
        group, sharding = processes.teacher_group(config), config.teacher.sharding
        self.parts = TeacherParts.of(teacher, sharding, group) if group > 1 else None
        trained: list[Tensor] = [w for w in student.parameters() if w.requires_grad]
        self.trained_bytes = _bytes(trained)
        self.largest = max((w.numel() for w in trained), default=0)
        self.masters = sum(4 * w.numel() for w in trained if w.itemsize < 4)

    # --- what is there all the time

    @cached_property
    def draws(self) -> RolloutMemory:
        """Of the student's draws; evaluation may open more completions than a step."""
        config = self.config
        most = max(self.sizes.decoded, self.sizes.evaluated)
        rows = min(config.sampling_batch_size, most)
        length = prefix_tokens(config.rollouts, 1)
        samples = 1 if length else config.sampling.num_samples
        return draw_memory(config, self.student, self.prompt_tokens, rows, samples, length)

    @cached_property
    def rest(self) -> dict[str, int]:
        """Without the teacher. Of a draw nothing is left behind it."""
        return {"workspaces": self.facts.workspace_bytes, **self.own.device}

    @property
    def teacher_bytes(self) -> int:
        """Of what this process has of the teacher, and of the whole head beside parts."""
        if self.parts is not None:
            return self.parts.stored_bytes + self.parts.head_bytes
        return self.held.while_read(self.config.teacher.mode)

    @property
    def teacher_at_rest(self) -> int:
        """All of it, or the head, which the objective reads."""
        mode = self.config.teacher.mode
        is_cut = self.parts is not None and mode == "resident"
        if mode != "resident" and not self.has_teacher:
            return 0
        return self.teacher_bytes if is_cut else self.held.at_rest(mode)

    @property
    def _all_hidden(self) -> int:
        return self.sizes.rows * self.row_bytes * self.has_teacher

    @property
    def _kept_hidden(self) -> int:
        """The teacher's rows that stay on the device."""
        is_resident = self.config.teacher.mode == "resident" and not self.told
        return min(self._all_hidden, self.facts.total_bytes // DEVICE_SHARE) if is_resident else 0

    @property
    def hidden_states(self) -> int:
        """The same, and those of the micro-batch that come back from main memory."""
        return min(self._all_hidden, self._kept_hidden + self.num_rows * self.row_bytes)

    @property
    def recorded(self) -> int:
        """The student's hidden states from when a step's tokens were drawn."""
        is_recorded = self.is_drawn_here and self.config.scoring == "recorded"
        if not (is_recorded and needs_scoring(self.config)):
            return 0
        return self.sizes.rows * self.head.shape[1] * self.head.itemsize

    # --- phases

    def evaluate(self) -> Phase:
        """The teacher draws, when what the student's draws needed has been given back."""
        evaluation = self.config.evaluation
        rows = min(self.config.sampling_batch_size, self.sizes.evaluated)
        mine = self._teacher_draws(rows, evaluation.num_samples)
        mine |= {"teacher": stored_bytes(self.teacher), "whole weights": self.own.whole}
        return Phase("evaluate", self.rest | {"optimizer": 0} | mine)

    def prefix(self) -> Phase:
        """The teacher draws the first tokens of completions, before the student does."""
        mine = self._teacher_draws(self.sizes.decoded, self.config.sampling.num_samples)
        return Phase("prefix", self.rest | mine | {"teacher": self.teacher_bytes})

    def _teacher_draws(self, rows: int, num_samples: int) -> dict[str, int]:
        draws = draw_memory(self.config, self.teacher, self.prompt_tokens, rows, num_samples)
        return {"KV cache": draws.cache, "decoding step": draws.step, "prefill": draws.prefill}

    def rollout(self) -> Phase:
        """The student draws, or vLLM does; weights in shards are gathered in either case."""
        rest = self.rest | {"teacher": self.teacher_at_rest, "recorded states": self.recorded}
        rest["whole weights"] = self.own.whole
        if isinstance(self.config.engine, VLLMEngine):
            share = self.config.engine.gpu_memory_utilization
            rest["vLLM"] = int(share * self.facts.total_bytes)
        elif self.is_drawn_here:
            rest["KV cache"], rest["decoding step"] = self.draws.cache, self.draws.step
            rest["prefill"] = self.draws.prefill
        return Phase("rollout", rest)

    def teacher_reads(self) -> Phase:
        """A pass of the teacher."""
        activations = 0 if self.told else reading(self.teacher, self.shape).peak
        parts = {
            "recorded states": self.recorded,
            "teacher": self.teacher_bytes,
            "activations": activations,
            "gathered weights": 0 if self.parts is None else self.parts.gathered_bytes,
            self.given: 0 if self.told else self.hidden_states,
        }
        return Phase("teacher", self.rest | parts)

    def score(self) -> Phase:
        """Statistics of all tokens; where states were recorded, the first step compares them."""
        activations = reading(self.student, self.shape).peak
        width = self.num_rows * self.head.shape[1]
        if self.recorded:
            # the fresh states, theirs and the difference in float64
            activations = max(activations, 3 * 8 * width)
        parts = {
            "teacher": self.teacher_at_rest,
            self.given: self.hidden_states,
            # those of each micro-batch are put together, and the rollouts still hold theirs
            "recorded states": 2 * self.recorded,
            "gathered weights": self.own.forward,
        }
        head = self._buffers(has_gradient=False)
        if activations > head:
            return Phase("score", self.rest | parts | {"activations": activations})
        return Phase("score", self.rest | parts | {"activations": 0, "head": head})

    def learn(self) -> Phase:
        """The largest of some moments: the objective, the backward pass, the sum of gradients."""
        parts = {"teacher": self.teacher_at_rest, self.given: self.hidden_states}
        moments = self._moments() if self.shards is None else self._moments_of(self.shards)
        largest = max(moments, key=lambda moment: sum(moment.values()))
        return Phase("learn", self.rest | parts | largest)

    def _moments(self) -> list[dict[str, int]]:
        """Of a student that this process has whole."""
        is_later = self.num_passes > 1
        own = self.trained_bytes if is_later and not self.masters else 0
        found = learning_from(self.student, self.shape, self.num_rows, has_gradients=own > 0)
        summed = 0 if self.config.optimizer.offload else self.masters
        before = own + summed * is_later
        return [
            {"gradients": before, "activations": found.forward.kept, "head": self._objective()},
            {"gradients": before, "activations": found.forward.peak},
            {"gradients": before + self._made(found), "activations": self._beside(found)},
            {"gradients": self._collected(summed, is_later)},
        ]

    def _moments_of(self, shards: Shards) -> list[dict[str, int]]:
        """Of a student in shards, whose layers' gradients are summed as soon as they are whole."""
        layers = [w for w in shards.weights if not shards.is_root(w)]
        found = learning_from(self.student, self.shape, self.num_rows, False, layers)
        gradients = 0 if self.config.optimizer.offload else shards.trained_bytes
        before = gradients * (self.num_passes > 1)
        last = shards.root.gathered_bytes + shards.layer.gathered_bytes
        return [
            {"gradients": before, "gathered weights": shards.first_bytes},
            {
                "gradients": before,
                "activations": found.forward.kept,
                "head": self._objective(),
                "gathered weights": last,
            },
            {
                "gradients": before,
                "activations": found.forward.peak,
                "gathered weights": shards.forward_bytes,
            },
            {
                "gradients": gradients,
                "activations": found.backward,
                "gathered weights": shards.backward_bytes,
                "summed gradients": shards.summing_bytes,
            },
            {"gradients": gradients, "summed gradients": shards.last_sum_bytes},
        ]

    def _made(self, found: Learning) -> int:
        """Gradients at the end of a backward pass that were not there before it."""
        is_added = self.num_passes > 1 and not self.masters
        return 0 if is_added else min(self.trained_bytes, found.backward)

    def _beside(self, found: Learning) -> int:
        return found.backward - self._made(found)

    def _collected(self, summed: int, is_later: bool) -> int:
        """Gradients while those of narrow weights are added to float32 sums."""
        if not self.masters:
            return self.trained_bytes
        if is_later or not summed:
            return self.trained_bytes + summed + 4 * self.largest
        return max(summed, self.trained_bytes + 4 * self.largest)

    def _buffers(self, has_gradient: bool) -> int:
        """What the objective's chunks take."""
        if not self.facts.has_kernels:
            return min(ACCELERATOR_CHUNK_BYTES, 5 * 4 * self.num_rows * self.vocab_size)
        return self._chunks(has_gradient).num_bytes

    def _chunks(self, has_gradient: bool) -> Buffers:
        is_narrow = has_gradient and self.head.itemsize < 4
        has_teacher = scores_teacher(self.config) or (has_gradient and self.has_teacher)
        return Buffers.of(self.num_rows, self.vocab_size, has_teacher, is_narrow)

    def _objective(self) -> int:
        """Chunks of logits, rows of both sides, and gradients as they are summed and handed on."""
        width, itemsize = self.head.shape[1], self.head.itemsize
        other = (self.told or self.teacher_head.shape[1] * itemsize) * self.has_teacher
        rows = self.num_rows * (width * itemsize + other)
        hidden, buffers = self.num_rows * width, self._buffers(has_gradient=True)
        weight = self.vocab_size * width * self.head.requires_grad
        narrow = self.head.itemsize * (hidden + weight)
        if self.facts.has_kernels and self._chunks(has_gradient=True).is_one_chunk:
            return rows + buffers + 4 * hidden + narrow
        summed = 4 * (hidden + weight)
        return rows + summed + max(buffers, narrow)

    def host(self, available_bytes: int) -> Phase:
        """Main memory: what was moved there, and the copy that checkpoints are written from."""
        config = self.config
        hidden = self._all_hidden - self._kept_hidden
        parts = self.own.host | {
            "teacher weights": self.held.resting * (config.teacher.mode == "offload"),
            self.given: hidden if self.told else min(hidden, config.teacher.hidden_budget_bytes),
        }
        copy = self._checkpoint_copy()
        is_asked = config.checkpoint_writer == "thread"
        if is_asked or sum(parts.values()) + copy <= available_bytes:
            parts["checkpoint copy"] = copy
        return Phase("run", parts)

    def _checkpoint_copy(self) -> int:
        config = self.config
        is_inline = config.checkpoint_writer == "inline" or self.shards is not None
        if is_inline or not config.can_copy_checkpoints:
            return 0
        trained = [w for w in self.student.parameters() if w.requires_grad]
        return copied_bytes(config, trained, torch.device("cuda"))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
