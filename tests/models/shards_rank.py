"""One process of several that hold teachers together: writes what each computes beside a whole one.

Usage: shards_rank.py MODELS OUT GROUP_SIZE FAMILY...; the usual variables name rank, world size
and master. MODELS has tiny students and teachers; a family is a key of `FAMILIES`.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from ranks import process_group
from tiny import tiny_config
from tutelage.config.models import TeacherSharding
from tutelage.core import LazyLogits
from tutelage.data.batch import Batch, collate, pack
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import TutelageError
from tutelage.models import sharding
from tutelage.models.packing import use_own_attention
from tutelage.models.sharding import SMALL_BYTES, local
from tutelage.models.teacher import Teacher
from tutelage.models.teacher_shards import TeacherShards
from tutelage.setup.components import build_components
from tutelage.setup.trial import refuse_nonfinite, try_model
from tutelage.train.step import Step

SINGLE = ("gemma2", "qwen3_moe", "tied")
"""Families whose caps or experts do not compute in float64, and one that has a twin which does."""
DTYPES = (torch.float32, torch.float64)
CPU = torch.device("cpu")
KINDS: tuple[TeacherSharding, ...] = ("fsdp2", "tp")
SIZES = {
    "vocab_size": 41,  # odd, so that shards of rows differ
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.25,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"head_dim": 8}),
    "tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "phi3": ("phi3", {}),  # queries, keys and values in one product
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 8}),  # scaled embeddings, capped logits
    "olmo2": ("olmo2", {}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}


def model_of(family: str, dtype: torch.dtype) -> Any:
    kind, sizes = FAMILIES[family]
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **SIZES | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def batches(rank: int, can_pack: bool) -> Iterator[Batch]:
    """As many in every process, of different shapes; one of them has no sequences."""
    rollouts = [
        Rollout(
            Prompt("p", ""), 0, tuple(range(1, 3 + rank)),
            tuple((5 + 7 * i + j) % 30 for i in range(4 + j + rank)),
        )
        for j in range(2 + rank)
    ]  # fmt: skip
    yield collate(rollouts, 0)
    yield collate(rollouts if rank else [], 0)
    yield collate(rollouts, 0, side="left")
    if can_pack:
        yield pack(rollouts)


def stored_bytes(model: Any) -> int:
    """Of the memory that the weights are parts of."""
    stores = [local(weight).untyped_storage() for weight in model.parameters()]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def logits_of(read: LazyLogits) -> torch.Tensor:
    return read.block(0, len(read))


def compared(
    family: str, kind: TeacherSharding, dtype: torch.dtype, group_size: int
) -> dict[str, Any]:
    """Largest difference of logits, and the part of the bytes that lies here."""
    rank = torch.distributed.get_rank()
    sharding.SMALL_BYTES = SMALL_BYTES * (family == "tied")  # others gather layer by layer
    model = model_of(family, dtype)
    can_pack = use_own_attention(model)
    shards = TeacherShards(kind, CPU, group_size, family)
    plain = Teacher(model, 40)
    mode: Any = "reload" if family == "tied" and dtype == torch.float32 else "resident"
    teacher = Teacher(
        copy.deepcopy(model), 40, CPU, mode, (3, 4), lambda: copy.deepcopy(model), shards=shards
    )
    gaps, whole = [], stored_bytes(model)
    for _ in range(1 + (mode == "reload")):  # a teacher that is loaded again is cut again
        with teacher.on_device(), plain.on_device():
            for batch in batches(rank, can_pack):
                found = logits_of(teacher.forward(batch))
                expected = found
                if batch.num_sequences:
                    expected = logits_of(plain.forward(batch))
                    expected[:, [3, 4]] = expected[:, [4, 3]]
                gaps.append(float((found - expected).abs().max()) if len(found) else 0.0)
    with teacher.on_device():
        try_model(teacher.model, family, 40, decodes=False, is_packed=can_pack)
        # what was gathered is gone
        return {"gap": max(gaps), "bytes": stored_bytes(teacher.model) / whole}


def refused(kind: TeacherSharding) -> str:
    """What every process says to a number that only one of them has."""
    model = model_of("qwen3", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[-1, -1] = torch.nan
    TeacherShards(kind, CPU).shard(model.requires_grad_(False))
    try:
        refuse_nonfinite(model, "teacher")
    except TutelageError as error:
        return str(error)
    return ""


def losses(
    models: Path, accelerator: Accelerator, num_steps: int = 2, **changes: Any
) -> list[float]:
    """Losses of the first steps of a run."""
    config = tiny_config(models, Path("unused"), prompts_per_step=8, **changes)
    components = build_components(config)
    optimizer = torch.optim.AdamW(components.masters.masters, lr=2e-3)
    components.masters.register_hook(optimizer)
    step = Step(config, components, accelerator, components.student, optimizer)
    return [step.take(number)["loss"] for number in range(1, num_steps + 1)]


def runs(models: Path, group_size: int) -> dict[str, list[float]]:
    accelerator = Accelerator(cpu=True)
    teacher = {"model": str(models / "teacher")}
    student = {"model": str(models / "student")}
    found = {"none": losses(models, accelerator)}
    for kind in KINDS:
        settings = teacher | {"sharding": kind, "sharding_group_size": group_size}
        found[kind] = losses(models, accelerator, teacher=settings)
    settings |= {"sharding": "tp", "mode": "reload"}
    student |= {"sharding": "fsdp2"}
    found["both"] = losses(models, accelerator, teacher=settings, student=student)
    # The student starts with the teacher's weights, which are then cut.
    same = {"teacher": student | {"sharding": "none"}, "student": student | {"sharding": "none"}}
    found["same"] = losses(models, accelerator, 1, **same)
    same["teacher"] |= {"sharding": "fsdp2"}
    found["same, cut"] = losses(models, accelerator, 1, **same)
    accelerator.free_memory()
    return found


def main(models: Path, out: Path, group_size: int, families: list[str]) -> None:
    torch.set_num_threads(1)
    with process_group() as rank:
        seen: dict[str, Any] = {
            f"{family} {kind} {dtype}": compared(family, kind, dtype, group_size)
            for family in families
            for kind in KINDS
            for dtype in DTYPES[: 1 + (family not in SINGLE)]
        }
        seen["refused"] = [refused(kind) for kind in KINDS]
        seen["losses"] = runs(models, group_size)
        (out / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
