"""Builds the models, tokenizer and task of a run and checks that they fit each other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutelage.config.conversations import ConversationData
from tutelage.config.models import TeacherConfig
from tutelage.config.sampling import TransformersEngine, VLLMEngine, VLLMServer
from tutelage.config.schema import Config
from tutelage.config.self_teacher import SelfTeacher
from tutelage.config.verifiers import VerifiersData
from tutelage.core.shared_ids import SharedIds
from tutelage.data.tasks import Task
from tutelage.envs.environment import AgentTask
from tutelage.envs.verifiers import VerifiersTask
from tutelage.models.chat.turn_template import turn_template
from tutelage.models.device import keep_freed_memory
from tutelage.models.head import output_embeddings
from tutelage.models.liger import use_liger_layers
from tutelage.models.limits import context_limit
from tutelage.models.load import load_model
from tutelage.models.lora import (
    add_lora,
    checkpoint_activations,
    load_adapter,
    merge,
    set_adapter_weights,
)
from tutelage.models.optimizer import MasterWeights
from tutelage.models.privileged import Reading
from tutelage.models.prune import prune_layers
from tutelage.models.reference import resolve_model
from tutelage.models.self_teacher import StudentAsTeacher
from tutelage.models.sharding import num_processes, require_shardable_student, sharding_mesh
from tutelage.models.student import Student
from tutelage.models.teacher_protocol import AnyTeacher
from tutelage.models.tokenizers import refuse_remap_beyond, stop_ids
from tutelage.rollout.cuda.generate import forget
from tutelage.rollout.nccl_transfer import NCCLTransfer, require_nccl
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.rollout.replicas import Replicas
from tutelage.rollout.request import Agent
from tutelage.rollout.sampler import Sampler, TransformersSampler
from tutelage.rollout.verifiers_sampler import VerifiersSampler, VerifiersService
from tutelage.rollout.vllm_engine import VLLMSampler
from tutelage.rollout.vllm_server import VLLMServerSampler
from tutelage.rollout.weight_transfer import FolderTransfer, WeightTransfer
from tutelage.setup.alignment import compared_ids, compared_sizes
from tutelage.setup.further_teachers import few_positions, gathered, load_further_teachers
from tutelage.setup.inputs import Inputs, load_inputs, pick_device, thinking
from tutelage.setup.phases import PhaseCallback, no_phases
from tutelage.setup.savable import refuse_quantized, require_savable
from tutelage.setup.teacher import (
    as_stored,
    build_self_teacher,
    build_teacher,
    kept_teacher,
    load_teacher,
    needs_start,
    set_attention,
)
from tutelage.setup.trial import refuse_nonfinite, try_model
from tutelage.setup.warnings import pair_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Components:
    """Everything a run works with."""

    student: Student
    masters: MasterWeights
    """The tensors that the optimizer updates for the student."""
    teacher: AnyTeacher
    sampler: Sampler
    """Samples the student's completions."""
    tokenizer: PreTrainedTokenizerBase
    task: Task
    device: torch.device
    enable_thinking: bool | None = None
    """Passed to the chat template of every prompt when not None."""
    warnings: tuple[str, ...] = ()
    """Warnings about settings that are valid but seldom intended."""
    reading: Reading | None = None
    """What the teacher reads; None where that is what the student does."""
    verifiers: VerifiersService | None = None
    """What leads the conversations of every model where the task is verifiers'."""

    @property
    def stops(self) -> frozenset[int]:
        """Every id that ends a completion of the student."""
        return stop_ids(self.student.plain, self.tokenizer)

    @contextmanager
    def whole(self) -> Iterator[Components]:
        """The same with a student that has all weights, for the time of the block.

        Behind the block nothing is left on the device of what was sampled in it. Where the weights
        lie in parts, every process has to enter together. Inside none waits for another.
        """
        if not self.student.is_sharded:
            try:
                yield self
            finally:
                self.forget_draws()
            return
        with self.student.whole() as model:
            ours = self.student
            student = Student(model, ours.vocab_size, stops=ours.stops, shared=ours.shared)
            whole = replace(self, student=student)
            try:
                yield whole
            finally:
                whole.forget_draws()

    def forget_draws(self) -> None:
        """Free caches and captured steps of the student's draws, whose memory other phases need.

        The next draw captures its steps again, which takes hundredths of a second.
        """
        forget(self.student.model)


def _student(
    config: Config, saved: str | None, teacher: PreTrainedModel | None, device: torch.device
) -> PreTrainedModel:
    """The student with saved weights, or as configured, pruned if asked for."""
    start = config.student
    if start.lora is None and saved is not None:
        model = load_model(saved, start.dtype, str(device))
    else:
        model = _start(config, teacher, device)
    if start.quantization == "none":
        refuse_quantized(model, start.model)
    if start.lora is not None:
        _add_adapter(model, config)
        if saved is not None:
            load_adapter(model, Path(saved))
    if start.activation_checkpointing:
        checkpoint_activations(model)
    if start.layers == "liger":
        use_liger_layers(model, f"student {start.model!r}")
    set_attention(config, model, f"student {start.model!r}", device)
    return model


def _start(
    config: Config, teacher: PreTrainedModel | None, device: torch.device
) -> PreTrainedModel:
    """The configured start, perhaps pruned or quantised."""
    start, other = config.student, config.teacher
    is_whole = isinstance(other, TeacherConfig)  # of one on a server, the head alone is here
    same = (start.model, start.dtype, start.quantization)
    is_same = same == (other.model, other.dtype, other.quantization)
    is_mapped = other.sharding != "none" and num_processes() > 1
    is_here = teacher is not None and teacher.device.type == device.type and not is_mapped
    # A copy of what is only mapped would take main memory; a GGUF file takes seconds to unpack.
    is_copied = is_here or resolve_model(start.model).gguf_file is not None
    if is_whole and teacher is not None and is_same and start.quantization == "none" and is_copied:
        model = copy.deepcopy(teacher)
        model.to(device)
    else:
        model = load_model(start.model, start.dtype, str(device), quantization=start.quantization)
    return model if start.num_layers is None else prune_layers(model, start.num_layers)


def _add_adapter(model: PreTrainedModel, config: Config) -> None:
    lora = config.student.lora
    if lora is not None:
        names = lora.target_modules
        add_lora(model, lora.rank, lora.alpha, lora.dropout, names, config.seed)


def plain_student(
    config: Config, student: PreTrainedModel, adapter: dict[str, Tensor] | None = None
) -> PreTrainedModel:
    """The student as a plain model: an adapter is added to a fresh copy of the weights.

    Args:
        config: the run.
        student: the trained model.
        adapter: weights of its adapter by name in it, if it has none itself.
    """
    if config.student.lora is None:
        return student
    model = load_model(config.student.model, config.student.dtype)
    if config.student.num_layers is not None:
        prune_layers(model, config.student.num_layers)
    _add_adapter(model, config)
    set_adapter_weights(model, student.get_adapter_state_dict(state_dict=adapter))
    return merge(model)


def shared_student(
    config: Config,
    model: PreTrainedModel,
    vocab_size: int,
    device: torch.device,
    stops: tuple[int, ...] = (),
    shared: SharedIds | None = None,
) -> Student:
    """The student, its weights in parts where several processes share them; alone one has all."""
    start = config.student
    if start.sharding == "fsdp2":
        require_shardable_student(model)
    if start.sharding == "none" or num_processes() == 1:
        return Student(model, vocab_size, stops=stops, shared=shared)
    mesh = sharding_mesh(device, start.sharding_group_size)
    is_offloaded = config.optimizer.offload and device.type != "cpu"
    return Student(model, vocab_size, mesh, is_offloaded, stops, shared)


def masters_of(config: Config, student: Student) -> MasterWeights:
    """The tensors that the optimizer updates, in main memory where it is to update there."""
    trained = (weight for weight in student.model.parameters() if weight.requires_grad)
    masters = MasterWeights(trained, "cpu" if config.optimizer.offload else None)
    if isinstance(config.teacher, SelfTeacher) and config.teacher.ema_decay is not None:
        place = "cpu" if config.teacher.mode == "offload" else student.model.device
        masters.keep_averages(config.teacher.ema_decay, place)
    return masters


def agent_of(config: Config, task: Task) -> Agent | None:
    """How a task's prompts become conversations; None where they have single answers."""
    if isinstance(task, AgentTask) and isinstance(config.data, ConversationData):
        return Agent(task.environment, config.data)
    return None


def verifiers_service(
    config: Config, task: Task, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> VerifiersService | None:
    """What leads conversations where verifiers does; None elsewhere."""
    if isinstance(task, VerifiersTask) and isinstance(config.data, VerifiersData):
        name, stops = config.student.model, stop_ids(student, tokenizer)
        limit = context_limit(student)
        return VerifiersService(task.worker, tokenizer, name, stops, config.data, limit)
    return None


def make_sampler(
    config: Config,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    service: VerifiersService | None,
) -> Sampler:
    """The sampler of the configured engine, for conversations that `service` leads if it is one."""
    engine, thinks = config.engine, thinking(config.data)
    if isinstance(engine, VLLMServer):
        at_once, least = engine.num_concurrent, engine.min_replicas
        transfer = make_transfer(engine, pick_device(config.device))
        replicas = Replicas(engine.urls, transfer, at_once, min_replicas=least)
        inner = VLLMServerSampler(student, tokenizer, replicas, thinks)
        local = inner if service is None else VerifiersSampler(inner, service, is_owner=True)
        return ReplicaSampler(local, replicas, student)
    sampler: Sampler
    if isinstance(engine, VLLMEngine):
        memory = engine.gpu_memory_utilization
        sampler = VLLMSampler(student, tokenizer, engine.max_model_len, memory, thinks)
    else:
        sampler = TransformersSampler(student, tokenizer, config.sampling_batch_size, thinks)
    return sampler if service is None else VerifiersSampler(sampler, service, is_owner=True)


def make_transfer(engine: VLLMServer, device: torch.device) -> WeightTransfer:
    """How the student's weights reach an engine's replicas from a device."""
    if engine.transfer == "folder":
        return FolderTransfer(Path(engine.folder))
    require_nccl(device)
    return NCCLTransfer()


def _refuse_other_ends(
    config: Config, task: Task, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Conversations need a student that stops where its chat template ends a turn."""
    if agent_of(config, task) is not None:
        turn_template(tokenizer, stop_ids(student, tokenizer), thinking(config.data))


def _self_teacher(
    config: Config,
    student: Student,
    masters: MasterWeights,
    saved: str | None,
    scratch: Path | None,
) -> StudentAsTeacher:
    """The student as its own teacher; where it goes on from saved weights, the start is loaded."""
    device, start = student.model.device, None
    if saved is not None and needs_start(config):
        start = _student(config, None, None, device)
    return build_self_teacher(config, student, masters, start, device, scratch)


def _try_student(config: Config, student: PreTrainedModel, vocab_size: int) -> list[str]:
    who = f"student {config.student.model!r}"
    refuse_nonfinite(student, who)
    decodes = isinstance(config.engine, TransformersEngine)
    is_packed = config.micro_batches == "packed"
    return try_model(student, who, vocab_size, decodes, is_packed)


def build_components(
    config: Config,
    student_model: str | None = None,
    scratch: Path | None = None,
    inputs: Inputs | None = None,
    on_phase: PhaseCallback = no_phases,
    is_run: bool = True,
) -> Components:
    """Load both models and check that they fit the task, the tokenizers and each other.

    Args:
        config: the run's configuration.
        student_model: folder of the student's weights or adapter; None for the configured start.
        scratch: folder for what does not fit in memory; None for the system's temporary one.
        inputs: the result of `validate` or `load_inputs`; None loads them now.
        on_phase: receives which model is being loaded.
        is_run: False where the models are only looked at: a teacher that processes share stays in
            its files and is not tried.

    Raises:
        TutelageError: a model, a tokenizer or the data cannot be used together.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    found = load_inputs(config) if inputs is None else inputs
    device, task, tokenizer = found.device, found.task, found.tokenizer
    if device.type == "cpu":
        keep_freed_memory()
    load, model = None, None
    kept = kept_teacher(config, student_model, scratch, device)
    if kept is None and not isinstance(config.teacher, SelfTeacher):
        load = load_teacher(config, device)
        on_phase(f"loading the teacher {config.teacher.model}")
        model = load()
    on_phase(f"loading the student {student_model or config.student.model}")
    student = _student(config, student_model, model, device)
    other = student if model is None else model
    rows = [output_embeddings(side).weight.shape[0] for side in (student, other)]
    rows[1] = kept.num_rows if kept else rows[1]
    sizes = compared_sizes(config, found, rows)
    further = load_further_teachers(config, tokenizer, rows[0], device, on_phase)
    vocab_size, teacher_size = (min((n, *(one.vocab_size for one in further))) for n in sizes)
    refuse_remap_beyond(found.remap, vocab_size)
    compared = compared_ids(config, found, student, None if kept else other, sizes)
    first = student if student_model is None else None
    pair = () if kept else pair_warnings(config, found, student, other, vocab_size, first)
    savable = () if inputs is None else require_savable(student, tokenizer)
    warnings = (*found.warnings, *pair, *savable, *few_positions(config, found.prompts, further))
    _refuse_other_ends(config, task, student, tokenizer)
    loading = (teacher_size, device, found.remap, scratch, is_run)
    loaded = None if load is None else build_teacher(config, other, load, *loading)
    del model, other
    on_phase("trying both models")
    notes = _try_student(config, student, vocab_size)
    loaded, more = gathered(config, loaded, further, vocab_size, device, scratch, is_run)
    trained = shared_student(config, student, vocab_size, device, compared.stops, compared.shared)
    masters = masters_of(config, trained)
    teacher: AnyTeacher | None = kept or as_stored(config, loaded, is_run)
    teacher = teacher or _self_teacher(config, trained, masters, student_model, scratch)
    service = verifiers_service(config, task, student, tokenizer)
    sampler = make_sampler(config, trained.plain, tokenizer, service)
    return Components(
        trained,
        masters,
        teacher,
        sampler,
        tokenizer,
        task,
        device,
        thinking(config.data),
        (*warnings, *notes, *more),
        compared.reading,
        service,
    )
