"""One rank of several that share a student: gradients and weights of every case.

Usage: sharded_rank.py MODELS OUT SHARDING CASE...; the usual environment variables name rank, world
size and master. SHARDING is none, fsdp2, or hsdp: fsdp2 in groups of two.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from stepping import RULES, Recorder, Watched, ragged_rollouts
from torch import Tensor

from ranks import process_group
from tiny import MEASURED, tiny_config
from tutelage.config.schema import Config
from tutelage.data.types import Rollout
from tutelage.models import sharding as models_sharding
from tutelage.models.sharding import SMALL_BYTES, gathered_parts, is_shard, sharding_mesh
from tutelage.models.student import Student, trained_names
from tutelage.setup.components import Components, build_components, make_sampler, masters_of
from tutelage.train.optimizer import build_optimizer
from tutelage.train.step import Step

EOPD = {"kind": "eopd", "gate": "percentile", "threshold": 0.7}
ONE_BY_ONE = {"micro_batch_size": 1, "sampling_batch_size": 1}
"""So that half precision rounds alike everywhere."""
HALF = "bfloat16"
"""The case that keeps its dtype and float32 masters; all other gradients are float64."""
GRADIENTS: dict[str, dict[str, Any]] = {
    "all": {},
    "soft_or": {"selection": RULES["soft_or"]},
    "q3": {"selection": RULES["q3"]},
    "eopd": {"objective": EOPD},
    "eopd_sampled": {"objective": EOPD | {"estimator": "sampled"}},
    "lora": {"student": {"lora": {"rank": 2}}},
    "lora_checkpointed": {
        "student": {"lora": {"rank": 2, "dropout": 0.0}, "activation_checkpointing": True}
    },
    "checkpointed": {"student": {"activation_checkpointing": True}},
    "tied": {"student": {"model": "tied"}},
    "packed": {"micro_batches": "packed"},
    "pruned": {"student": {"num_layers": 1}},
    "no_rows": {},  # every process but the first has completions without tokens
    HALF: {"student": {"dtype": HALF}, "micro_batch_size": 4},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "four_steps": {"selection": RULES["soft_or"]},
    "on_disk": {"optimizer": {"learning_rate": 2e-3, "kind": "adamw_on_disk"}},
    "adapter": {"student": {"lora": {"rank": 2}}, "optimizer": {"learning_rate": 1e-2}},
    "half": {"student": {"dtype": HALF}, **ONE_BY_ONE},
    "half_adapter": {"student": {"dtype": HALF, "lora": {"rank": 2}}, **ONE_BY_ONE},
}
"""Cases of four steps of AdamW in the configuration's own dtype."""

CASES = (*GRADIENTS, *WEIGHTS)
AT_ONCE = ("q3", "eopd", "eopd_sampled", "checkpointed", "on_disk", "adapter", "half")
"""Cases whose layers are gathered at once, as small ones are; all others gather one by one."""


def case_config(models: Path, case: str, sharding: str = "none", **changes: Any) -> Config:
    given = (GRADIENTS | WEIGHTS)[case] | changes
    student = {"model": "student"} | given.get("student", {})
    student |= {"model": str(models / student["model"])}
    if sharding != "none":
        student |= {"sharding": "fsdp2", "sharding_group_size": 2 * (sharding == "hsdp")}
    optimizer = {"learning_rate": 1.0, "max_grad_norm": 0} if case in GRADIENTS else {}
    tables = {"student": student} | ({"optimizer": optimizer} if optimizer else {})
    return tiny_config(models, Path("unused"), **(given | tables))


def in_float64(config: Config, sharding: str) -> Components:
    """Components of a configuration, in the dtype that it has no name for."""
    components = build_components(config)
    for name, weight in components.student.model.named_parameters():
        if "lora_B" in name:  # where it is 0, the other half of an adapter has no gradient
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    model = components.student.model.double()
    components.teacher.model.double()
    mesh = None
    if sharding != "none":
        mesh = sharding_mesh(torch.device("cpu"), 2 * (sharding == "hsdp"))
    student = Student(model, components.student.vocab_size, mesh)
    sampler = make_sampler(config, student.plain, components.tokenizer, None)
    return replace(
        components, student=student, masters=masters_of(config, student), sampler=sampler
    )


def of_all(components: Components, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Whole tensors by the names of the weights, from this process's part of each."""
    names, weights = trained_names(components.student), components.masters.weights
    return {
        name: gathered_parts(part, weight) if is_shard(weight) else part
        for name, part, weight in zip(names, parts, weights, strict=True)
    }


def step_rollouts(components: Components, case: str, accelerator: Accelerator) -> list[Rollout]:
    """This process's of eight."""
    rollouts = ragged_rollouts(components)
    if case == "no_rows":
        rollouts[2:] = [replace(rollout, completion_ids=()) for rollout in rollouts[2:]]
    size = len(rollouts) // accelerator.num_processes
    first = size * accelerator.process_index
    return rollouts[first : first + size]


def gradients(
    case: str, models: Path, sharding: str, accelerator: Accelerator, **changes: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metrics and whole gradients of one step on given rollouts."""
    if case == HALF:
        config = case_config(models, case, sharding, **changes)
        components = build_components(config)
    else:
        config = case_config(models, case, **changes)
        components = in_float64(config, sharding)
    recorder = Recorder(components.masters.masters, lr=1.0)
    step = Watched(config, components, accelerator, components.student, recorder)
    step.rollouts = step_rollouts(components, case, accelerator)
    metrics = step.take(1)
    return metrics, of_all(components, recorder.gradients)


def held_bytes(components: Components, optimizer: torch.optim.Optimizer) -> int:
    """Memory of weights, gradients and moments in this process."""
    masters = components.masters
    tensors = [*masters.masters, *components.student.model.parameters()]
    tensors += [tensor.grad for tensor in tensors if tensor.grad is not None]
    tensors += [v for state in optimizer.state.values() for v in state.values()]
    tensors += [weight for weight in components.student.plain.parameters() if not weight.is_meta]
    local = [tensor.to_local() if is_shard(tensor) else tensor for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in local if tensor.dim()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def four_steps(
    case: str, models: Path, sharding: str, accelerator: Accelerator
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metrics and whole weights after four steps, and the bytes that the last step held."""
    config = case_config(models, case, sharding)
    components = build_components(config)
    student, masters = components.student, components.masters
    optimizer = build_optimizer(config.optimizer, student, masters, models)
    held: list[int] = []
    optimizer.register_step_post_hook(lambda *_: held.append(held_bytes(components, optimizer)))
    step = Step(config, components, accelerator, student, optimizer)
    every = [step.take(number) for number in range(1, 5)]
    metrics = {name: value for name, value in every[-1].items() if name not in MEASURED}
    whole = of_all(components, [master.detach() for master in masters.masters])
    with student.whole() as model:
        named = dict(model.named_parameters())
        drawn = max(
            float((named[n].detach().to(w.dtype) - w).abs().max() / w.abs().max())
            for n, w in whole.items()
        )
    return metrics | {"bytes": held[-1], "drawn": drawn}, whole


def taken(
    case: str, models: Path, sharding: str, accelerator: Accelerator
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a case gives: metrics, and gradients or weights by name."""
    work = gradients if case in GRADIENTS else four_steps
    return work(case, models, sharding, accelerator)


def main(models: Path, out: Path, sharding: str, cases: Sequence[str]) -> None:
    torch.set_num_threads(1)
    with process_group() as index:
        accelerator = Accelerator(cpu=True)
        for case in cases:
            models_sharding.SMALL_BYTES = SMALL_BYTES * (case in AT_ONCE)
            metrics, tensors = taken(case, models, sharding, accelerator)
            (out / f"{case}-{index}.json").write_text(json.dumps(metrics))
            if not index:
                save_file({n: t.contiguous() for n, t in tensors.items()}, out / f"{case}.st")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
