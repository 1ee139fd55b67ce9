"""A process alone that has its student in shards: writes how far it is from one without.

Usage: offload_rank.py MODEL OUT DEVICE; on a GPU the shards lie in main memory. The usual variables
name rank, world size and master.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from ranks import leave_group
from tutelage.core import Objective
from tutelage.data.batch import collate
from tutelage.data.types import Prompt, Rollout
from tutelage.models.load import load_model
from tutelage.models.optimizer import MasterWeights, make_optimizer
from tutelage.models.sharding import sharding_mesh
from tutelage.models.student import Student
from tutelage.train.sharded_checkpoint import gathered_to_main, trained_parts

VOCAB = 20


def learned(ref: str, device: torch.device, is_sharded: bool) -> list[dict[str, Tensor]]:
    """Whole weights after two updates, as a draw has them and as a checkpoint does."""
    model, other = load_model(ref, device=str(device)), load_model(ref, device=str(device))
    other.model.layers[0].mlp.up_proj.weight.data.neg_()
    mesh = sharding_mesh(device) if is_sharded else None
    is_offloaded = is_sharded and device.type != "cpu"
    student, teacher = Student(model, VOCAB, mesh, is_offloaded), Student(other, VOCAB)
    masters = MasterWeights(student.model.parameters(), "cpu" if is_offloaded else None)
    optimizer = make_optimizer("adamw", masters.masters, 1e-3, (0.9, 0.95), 0.0)
    masters.register_hook(optimizer)
    rollouts = [
        Rollout(Prompt("p", ""), 0, (5, 6), (7, 8, 9)),
        Rollout(Prompt("p", ""), 0, (5,), (4,)),
    ]
    batch = collate(rollouts, 0).to(device)
    rows = torch.arange(4, device=device)
    for _ in range(2):
        for _ in range(2):
            found = student(batch, teacher.logits(batch), rows)
            assert isinstance(found, Objective)
            torch.autograd.backward(found.total)
            masters.accumulate_grads()
        optimizer.step()
        masters.zero_grad()
    with student.whole() as whole:
        drawn = {name: weight.detach().cpu().clone() for name, weight in whole.named_parameters()}
    return [drawn, gathered_to_main(trained_parts(student)) if is_sharded else drawn]


def main(ref: str, out: Path, device: torch.device) -> None:
    backend = "gloo" if device.type == "cpu" else "nccl"
    torch.distributed.init_process_group(backend)
    try:
        plain, shards = (learned(ref, device, is_sharded) for is_sharded in (False, True))
        gaps = [
            float((found[name] - weight).abs().max())
            for found in shards
            for name, weight in plain[0].items()
        ]
        (out / "gap").write_text(str(max(gaps)))
    finally:
        leave_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), torch.device(sys.argv[3]))
