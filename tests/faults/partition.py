"""However a batch is shared out, the gradient is that of one process and one batch.

Random completions, some of them empty, go in any order to two gloo ranks, of which one may get
nothing to learn from, and there into random micro-batches. One process, DDP and FSDP2 are compared
with one pass over everything. In float64 nothing but the sharing out could show; in float32
rounding shows too, most where a gradient is small, and is reported.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.core import LazyLogits, Objective
from tutelage.data.batch import collate
from tutelage.data.types import Prompt, Rollout
from tutelage.models.load import load_model
from tutelage.models.student import Student
from tutelage.models.teacher import Teacher

NUM_RANKS = 2
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
ROUNDED = 1e-6
"""Differences in float32 above this are counted, not failures."""
VOCAB = 40
MODES = ("one process", "ddp", "fsdp2")


def random_rollouts(rng: random.Random) -> list[Rollout]:
    """1 to 8 completions of 0 to 12 tokens, at least one of them with a token."""
    rollouts = []
    for i in range(rng.randint(1, 8)):
        length = rng.choice([0, 1, rng.randint(2, 12)]) if i else rng.randint(1, 12)
        prompt, completion = (
            tuple(rng.randrange(VOCAB) for _ in range(n)) for n in (rng.randint(1, 6), length)
        )
        rollouts.append(Rollout(Prompt(str(i), "-"), 0, prompt, completion))
    return rollouts


def cut(names: list[int], count: int, rng: random.Random) -> list[list[int]]:
    """`count` micro-batches of random sizes, some of them empty."""
    places = sorted(rng.randint(0, len(names)) for _ in range(count - 1))
    return [names[a:b] for a, b in zip([0, *places], [*places, len(names)], strict=True)]


class Case:
    """A batch, the rows of it that are kept, and who gets what."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.rollouts = random_rollouts(rng)
        rows = [(c, t) for c, r in enumerate(self.rollouts) for t in range(len(r.completion_ids))]
        self.kept = set(rng.sample(rows, rng.randint(1, len(rows))))
        order = list(range(len(self.rollouts)))
        rng.shuffle(order)
        bound = rng.choice([0, rng.randint(0, len(order)), rng.randint(0, len(order))])
        self.shares = [order[:bound], order[bound:]]
        count = rng.randint(1, 4)
        # FSDP gathers weights in every forward pass, so ranks need as many.
        self.cuts = [cut(share, count, rng) for share in self.shares]
        self.side: Any = rng.choice(["left", "right"])

    def backward(
        self,
        module: nn.Module,
        teacher: Teacher,
        groups: Sequence[Sequence[int]],
        world: int,
        divisor: int,
    ) -> None:
        """Back-propagate micro-batches, as a training step does."""
        for number, names in enumerate(groups):
            held = names or [0]  # a model reads at least one sequence; nothing is learned from it
            batch = collate([self.rollouts[i] for i in held], 0, self.side, held)
            pairs = zip(batch.completion.tolist(), batch.position.tolist(), strict=True)
            kept = self.kept if names else set()
            rows = torch.tensor([i for i, p in enumerate(pairs) if p in kept], dtype=torch.long)
            view: LazyLogits = teacher.read(batch)
            is_last = number == len(groups) - 1
            is_ddp = isinstance(module, nn.parallel.DistributedDataParallel)
            with module.no_sync() if is_ddp and not is_last else nullcontext():
                objective: Objective = module(batch, view, rows)
                (objective.total * world / divisor).backward()


def gradients(module: nn.Module) -> list[Tensor]:
    """Whole gradients of all weights, which are taken away."""
    found = []
    for parameter in module.parameters():
        gradient = parameter.grad
        if gradient is None:
            found.append(torch.zeros(parameter.shape))
        else:
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found.append(whole.detach().clone())
        parameter.grad = None
    return found


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all weights together."""
    pairs = list(zip(found, expected, strict=True))
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return math.sqrt(error / sum(float(b.double().square().sum()) for _, b in pairs))


def modules(models: Path, dtype: torch.dtype) -> tuple[dict[str, nn.Module], Teacher]:
    """The same student three times, twice shared between the ranks, and the teacher."""
    from torch.distributed.fsdp import fully_shard

    student = Student(load_model(str(models / "student")).to(dtype), VOCAB)
    teacher = Teacher(load_model(str(models / "teacher")).to(dtype), VOCAB)
    sharded = copy.deepcopy(student)
    for layer in sharded.model.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(student))
    return {"one process": student, "ddp": ddp, "fsdp2": sharded}, teacher


def compared(
    case: Case, made: dict[str, nn.Module], teacher: Teacher, index: int
) -> tuple[dict[str, float], float]:
    """Distance of each mode, and of a mean of each rank's mean, from one pass over everything."""
    plain, divisor = made["one process"], len(case.kept)
    case.backward(plain, teacher, [list(range(len(case.rollouts)))], 1, divisor)
    expected = gradients(plain)
    both = [group for groups in case.cuts for group in groups]
    found = {}
    for mode, module in made.items():
        groups, world = (both, 1) if module is plain else (case.cuts[index], NUM_RANKS)
        case.backward(module, teacher, groups, world, divisor)
        found[mode] = distance(gradients(module), expected)
    mine = [p for p in case.kept if p[0] in case.shares[index]]
    case.backward(made["ddp"], teacher, case.cuts[index], 1, max(len(mine), 1))
    return found, distance(gradients(made["ddp"]), expected)


def rank(models: Path, size: int, out: Path) -> None:
    """One rank: distances of every case, dtype and mode."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    index = torch.distributed.get_rank()
    seen = []
    for dtype in LIMITS:
        made, teacher = modules(models, dtype)
        for seed in range(size):
            case = Case(seed)
            found, wrong = compared(case, made, teacher, index)
            is_empty = min(map(len, case.shares)) == 0
            seen.append({"dtype": str(dtype), "by": found, "wrong": wrong, "is_empty": is_empty})
    (out / f"rank{index}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


def run(size: int) -> Any:
    """`size` batches, each shared out in three ways."""
    from tiny import save_tiny_model

    from .record import ROOT, Outcome

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for who, seed in (("student", 1), ("teacher", 2)):
            save_tiny_model(folder / who, seed=seed)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={NUM_RANKS}", __file__, name, str(size), name]  # fmt: skip
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        subprocess.run(command, check=True, env=environment, timeout=3600)
        ranks = [json.loads((folder / f"rank{i}.json").read_text()) for i in range(NUM_RANKS)]
    limits = {str(dtype): limit for dtype, limit in LIMITS.items()}
    cases = [case for found in ranks for case in found]
    bad = {i % size for found in ranks for i, case in enumerate(found)
           if not max(case["by"].values()) <= limits[case["dtype"]]}  # fmt: skip
    exact = [case for case in ranks[0] if case["dtype"] == str(torch.float64)]
    rounded = [case for case in ranks[0] if case["dtype"] == str(torch.float32)]
    return Outcome(
        "the gradient does not depend on how a batch is shared out over ranks and micro-batches",
        trials=size,
        failures=len(bad),
        control={
            f"of {size}, batches in which a mean of means is seen": sum(
                case["wrong"] > limits[case["dtype"]] for case in exact
            )
        },
        details={
            "limits": limits,
            "largest_relative_difference": {
                dtype: {m: max(c["by"][m] for c in cases if c["dtype"] == dtype) for m in MODES}
                for dtype in limits
            },
            f"batches above {ROUNDED} in float32": sum(
                max(case["by"].values()) > ROUNDED for case in rounded
            ),
            "with a rank that has nothing": sum(case["is_empty"] for case in exact),
        },
    )


if __name__ == "__main__":
    rank(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
