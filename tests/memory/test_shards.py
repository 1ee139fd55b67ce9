"""What a process of several holds: the plan's arithmetic against tensors that FSDP2 cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.profiler import profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from ranks import leave_group
from tiny import save_tiny_model, tiny_config
from tutelage.data.batch import collate
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError
from tutelage.memory.cuda import plan_cuda
from tutelage.memory.facts import Facts
from tutelage.memory.meta_model import shadow
from tutelage.memory.shards import Shards, TeacherParts, shard_numel
from tutelage.models import head, sharding
from tutelage.models.llama_cpu.forward import last_hidden
from tutelage.models.load import load_model
from tutelage.models.lora import add_lora
from tutelage.models.sharding import (
    GROUP_TIMEOUT,
    local,
    plain_copy,
    shard_model,
    sharding_mesh,
    whole_weights,
)
from tutelage.models.student import Student
from tutelage.models.teacher_shards import TeacherShards, held_bytes
from tutelage.setup.process_counts import ProcessCounts

COUNT = 3
CPU = torch.device("cpu")


@contextmanager
def one_of(count: int, rank: int) -> Iterator[None]:
    """One of several processes without the others: collectives move nothing."""
    dist.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        leave_group()


def storages(tensors: Any) -> int:
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that tensors took beyond what was there before."""
    with profile(profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.fixture(params=["layers", "at once"])
def are_layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether layers are gathered one by one, as large ones are."""
    found: bool = request.param == "layers"
    if found:
        monkeypatch.setattr(sharding, "SMALL_BYTES", 0)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of enough layers for one to arrive while another is used."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "student", seed=0, num_hidden_layers=4)
    return folder


def sharded(models: Path, dtype: str, has_lora: bool = False) -> tuple[PreTrainedModel, Shards]:
    """A model in shards, and what is planned of it."""
    model = load_model(str(models / "student"), dtype)
    if has_lora:
        add_lora(model, 4, 8.0, 0.0, ())
    plan = Shards.of(plain_copy(model), model, COUNT)
    shard_model(model, model, sharding_mesh(CPU))
    return model, plan


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_lora", [False, True])
def test_shards_are_as_large_as_planned(models: Path, dtype: str, has_lora: bool) -> None:
    with one_of(COUNT, 0):
        model, plan = sharded(models, dtype, has_lora)
        shards = [local(weight.detach()) for weight in model.parameters()]
        assert storages(shards) == plan.stored_bytes
        trained = [local(w.detach()) for w in model.parameters() if w.requires_grad]
        assert sum(shard.numel() for shard in trained) == plan.trained_numel
        assert sum(shard.nbytes for shard in trained) == plan.trained_bytes
        del model


def test_whole_weights_are_as_large_as_planned(models: Path) -> None:
    with one_of(COUNT, 1):
        model = load_model(str(models / "student"), "bfloat16")
        plain = plain_copy(model)
        plan = Shards.of(plain, model, COUNT)
        shard_model(model, model, sharding_mesh(CPU))
        with whole_weights(model, plain) as whole:
            assert storages(whole.parameters()) == plan.whole_bytes
        del model, plain, whole


def peaks(models: Path, dtype: str) -> tuple[Shards, int, int]:
    """The plan, and what a forward pass and a whole one were measured to take.

    Of two tokens, so that activations are next to nothing.
    """
    model, plan = sharded(models, dtype)
    ids = torch.zeros(1, 2, dtype=torch.int64)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    def learn() -> None:
        model(input_ids=ids, use_cache=False).logits.sum().backward()

    learn()
    return plan, peak_bytes(forward), peak_bytes(learn)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_passes_gather_and_sum_as_planned(models: Path, dtype: str, are_layers: bool) -> None:
    with one_of(COUNT, 0):
        plan, gathered, spent = peaks(models, dtype)
    assert (plan.layer.gathered_bytes > 0) == are_layers
    assert gathered == pytest.approx(max(plan.first_bytes, plan.forward_bytes), rel=0.1)
    if are_layers:
        head = plan.root.trained_bytes / 2  # its gradient is the first that is there
        assert spent == pytest.approx(plan.backward_bytes + plan.summing_bytes + head, rel=0.1)
    else:  # a CPU fills up gradients that cannot be cut evenly in copies of them
        copies = plan.root.trained_bytes
        assert plan.last_sum_bytes <= spent <= plan.last_sum_bytes + copies


def test_small_layers_are_whole_together_and_read_the_fast_way(
    models: Path, monkeypatch: pytest.MonkeyPatch, are_layers: bool
) -> None:
    read: list[int] = []
    monkeypatch.setattr(head, "last_hidden", lambda *given: read.append(1) or last_hidden(*given))
    rollout = Rollout(Prompt("p", ""), 0, (1, 2), (3, 4, 5))
    with one_of(COUNT, 0):
        student = Student(load_model(str(models / "student")), 41, sharding_mesh(CPU))
        units = [module for module in student.modules() if isinstance(module, FSDPModule)]
        student(collate([rollout], 0), None)
        del student
    assert len(units) == 1 + 4 * are_layers
    assert len(read) == 1 - are_layers
    units.clear()


def test_a_teacher_in_parts_is_as_large_as_planned(models: Path) -> None:
    """By FSDP2 as above, beside a head by rows; by transformers' plan, all but the norms."""
    with one_of(2, 0):
        model = load_model(str(models / "student")).requires_grad_(False)
        found = {kind: TeacherParts.of(model, kind, 2) for kind in ("fsdp2", "tp")}
        shards = TeacherShards("fsdp2", CPU)
        head = model.get_output_embeddings().weight.nbytes
        shards.shard(model)
        assert held_bytes(model) == found["fsdp2"].stored_bytes
        assert found["fsdp2"].head_bytes == head
        del model, shards
    with one_of(2, 0):
        model = load_model(str(models / "student")).requires_grad_(False)
        shards = TeacherShards("tp", CPU)
        shards.shard(model)
        assert held_bytes(model) == found["tp"].stored_bytes
        assert found["tp"].gathered_bytes == 0 < found["fsdp2"].gathered_bytes
        del model, shards


def test_processes_that_cannot_share_evenly_are_refused(tmp_path: Path, models: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of the number of hosts"):
        ProcessCounts(4, 3)
    sharded = {"model": str(models / "student"), "sharding": "fsdp2", "sharding_group_size": 3}
    config = tiny_config(models, tmp_path, student=sharded)
    with pytest.raises(ConfigError, match="must divide the number of processes"):
        ProcessCounts(4).student_group(config)
    assert ProcessCounts(6).student_group(config) == 3
    assert ProcessCounts(1).student_group(config) == 1
    with pytest.raises(ConfigError, match="prompts_per_step must be a multiple of 3"):
        ProcessCounts(3).prompts(config)
    assert ProcessCounts(6, 2).title(config) == (
        "of each of 6 processes, 2 hosts, student fsdp2 in groups of 3"
    )
    assert ProcessCounts(1).title(config) == (
        "plan of one process, which holds all weights; --processes N plans N"
    )
    assert ProcessCounts(1).title(tiny_config(models, tmp_path)) == ""


def test_rows_are_cut_as_torch_cuts_them() -> None:
    for rows, group in ((7, 3), (2, 4), (6, 3)):
        parts = torch.zeros(rows, 5).chunk(group)
        assert shard_numel(torch.zeros(rows, 5), group) == parts[0].numel()
    assert shard_numel(torch.zeros(()), 4) == 1


def test_groups_within_a_run_wait_as_long_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    make, waits = dist.distributed_c10d.new_group, []

    def new_group(*given: Any, **named: Any) -> Any:
        waits.append(named.get("timeout"))
        return make(*given, **named)

    monkeypatch.setattr(dist.distributed_c10d, "new_group", new_group)
    with one_of(4, 3):
        mesh = sharding_mesh(CPU, 2)
        groups = [mesh.get_group(name) for name in ("replicate", "shard")]
        assert [dist.get_process_group_ranks(group) for group in groups] == [[1, 3], [2, 3]]
        assert sharding_mesh(CPU).get_group() is dist.group.WORLD
        del mesh, groups
    assert waits == [GROUP_TIMEOUT] * 4


def test_models_of_another_dtype_than_their_files_are_counted_twice(
    models: Path, tmp_path: Path
) -> None:
    student, teacher = ({"model": str(models / "student"), "sharding": "fsdp2"} for _ in range(2))
    config = tiny_config(models, tmp_path, student=student, teacher=teacher | {"dtype": "bfloat16"})
    sides = [load_model(str(models / "student"), dtype) for dtype in ("float32", "bfloat16")]
    size = sum(weight.nbytes for weight in sides[1].parameters())
    processes = ProcessCounts(4, 2)
    assert processes.copied_bytes(config, *sides) == size
    assert ProcessCounts(1).copied_bytes(config, *sides) == 0
    twins = [shadow(side) for side in sides]
    facts = Facts(1 << 34, 1 << 34, (9, 0), True, 2 * size)
    plan = plan_cuda(config, *twins, facts, 8, processes, size)
    assert plan.host is not None
    assert plan.host.phases[0].parts == {"read at once": size}
    assert plan.host.available_bytes == size  # of each of a host's two processes
