"""However a batch is shared out, the gradient is that of one process and one batch.

Random completions, some of them empty, go in any order to two gloo ranks, of which one may get
nothing to learn from, and there into random micro-batches. One process, DDP and FSDP2 are compared
with one pass over everything. In float64 nothing but the sharing out could show. In float32
rounding shows too: each gradient, that of one pass as well, is also compared with the float64 one.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
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
from tutelage.models.sharding import gathered, sharding_mesh
from tutelage.models.student import Student
from tutelage.models.teacher import Teacher

NUM_RANKS = 2
LIMIT = 1e-12
"""Largest relative difference in float64."""
ROUNDED = 1e-6
"""Differences in float32 above this are counted."""
EXCESS = 10.0
"""In float32, sharing out may change the gradient by so many times what rounding does anyway."""
NUM_CONTROLS = 100
"""The first batches are also given to code that is known to be wrong."""
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
            view: LazyLogits = teacher.forward(batch)
            is_last = number == len(groups) - 1
            is_ddp = isinstance(module, nn.parallel.DistributedDataParallel)
            with module.no_sync() if is_ddp and not is_last else nullcontext():
                objective: Objective = module(batch, view, rows)
                (objective.total * world / divisor).backward()


def gradients(module: nn.Module) -> Tensor:
    """The whole gradient of all weights, flat; it is taken away."""
    found = []
    for parameter in module.parameters():
        gradient = parameter.grad
        if gradient is None:
            found.append(torch.zeros(parameter.numel(), dtype=parameter.dtype))
        else:
            found.append(gathered(gradient).detach().flatten())
        parameter.grad = None
    return torch.cat(found)


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    exact = expected.double()
    return float((found.double() - exact).norm() / exact.norm())


def modules(models: Path, dtype: torch.dtype) -> tuple[dict[str, nn.Module], Teacher]:
    """The same student three times, twice shared between the ranks, and the teacher."""
    student = Student(load_model(str(models / "student")).to(dtype), VOCAB)
    teacher = Teacher(load_model(str(models / "teacher")).to(dtype), VOCAB)
    sharded = Student(copy.deepcopy(student.model), VOCAB, sharding_mesh(torch.device("cpu")))
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(student))
    return {"one process": student, "ddp": ddp, "fsdp2": sharded}, teacher


def shared_out(
    case: Case, made: dict[str, nn.Module], teacher: Teacher, index: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of one pass over everything, and of each mode."""
    plain, divisor = made["one process"], len(case.kept)
    both = [group for groups in case.cuts for group in groups]
    # Each rank computes one of the two that need no other rank, and is given the other.
    groups = both if index else [list(range(len(case.rollouts)))]
    case.backward(plain, teacher, groups, 1, divisor)
    mine = gradients(plain)
    expected, found = mine.clone(), {"one process": mine.clone()}
    torch.distributed.broadcast(expected, 0)
    torch.distributed.broadcast(found["one process"], 1)
    for mode, factor in (("ddp", NUM_RANKS), ("fsdp2", 1)):  # one averages, the other sums
        case.backward(made[mode], teacher, case.cuts[index], factor, divisor)
        found[mode] = gradients(made[mode])
    return expected, found


def mean_of_means(case: Case, ddp: nn.Module, teacher: Teacher, index: int) -> Tensor:
    """A gradient that is wrong: each rank divides by its own rows."""
    num_rows = sum(c in case.shares[index] for c, _ in case.kept)
    case.backward(ddp, teacher, case.cuts[index], 1, max(num_rows, 1))
    return gradients(ddp)


def rank(models: Path, size: int, out: Path) -> None:
    """One rank: distances of every batch and mode."""
    from ranks import process_group

    torch.set_num_threads(1)
    with process_group() as index:
        seen = compared(models, size, index)
        (out / f"rank{index}.json").write_text(json.dumps(seen))


def compared(models: Path, size: int, index: int) -> list[dict[str, Any]]:
    """Every batch in every mode, as rank `index` sees it."""
    exact, rounded = modules(models, torch.float64), modules(models, torch.float32)
    seen = []
    for seed in range(size):
        case = Case(seed)
        truth, by64 = shared_out(case, *exact, index)
        one_pass, by32 = shared_out(case, *rounded, index)
        entry = {
            "float64": {mode: distance(found, truth) for mode, found in by64.items()},
            "float32": {mode: distance(found, one_pass) for mode, found in by32.items()},
            "float32 from float64": {mode: distance(found, truth) for mode, found in by32.items()}
            | {"one pass": distance(one_pass, truth)},
            "without completions": min(map(len, case.shares)) == 0,
            "without rows": len({c in case.shares[0] for c, _ in case.kept}) == 1,
        }
        if seed < NUM_CONTROLS:
            wrong = mean_of_means(case, exact[0]["ddp"], exact[1], index)
            entry["wrong"] = distance(wrong, truth)
        seen.append(entry)
    return seen


def is_bad(entry: dict[str, Any]) -> bool:
    """Whether sharing out changed a gradient by more than rounding."""
    anyway = max(ROUNDED, entry["float32 from float64"]["one pass"])
    limits = {"float64": LIMIT, "float32": EXCESS * anyway}
    return any(not max(entry[dtype].values()) <= limit for dtype, limit in limits.items())


def launch(size: int) -> list[list[dict[str, Any]]]:
    """What each rank saw."""
    from ranks import run_script
    from tiny import save_tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for who, seed in (("student", 1), ("teacher", 2)):
            save_tiny_model(folder / who, seed=seed)
        run_script(Path(__file__), (folder, size, folder), NUM_RANKS)
        return [json.loads((folder / f"rank{i}.json").read_text()) for i in range(NUM_RANKS)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "largest": max(values)}


def run(size: int) -> Any:
    """`size` batches, each shared out in three ways."""
    from .record import Outcome

    ranks = launch(size)
    bad = {i for found in ranks for i, entry in enumerate(found) if is_bad(entry)}
    cases = ranks[0]
    controls = [entry["wrong"] for entry in cases if "wrong" in entry]
    sources = (*MODES, "one pass")
    return Outcome(
        "the gradient does not depend on how a batch is shared out over ranks and micro-batches",
        trials=size,
        failures=len(bad),
        control={
            f"of {len(controls)}, batches in which a mean of means is seen": sum(
                wrong > LIMIT for wrong in controls
            )
        },
        details={
            "limit_float64": LIMIT,
            "largest relative difference from one pass": {
                dtype: {m: max(e[dtype][m] for found in ranks for e in found) for m in MODES}
                for dtype in ("float64", "float32")
            },
            "relative distance of float32 from float64": {
                m: _spread([e["float32 from float64"][m] for e in cases]) for m in sources
            },
            f"batches above {ROUNDED} in float32": {
                "shared out, from one pass": sum(
                    max(e["float32"].values()) > ROUNDED for e in cases
                ),
                "one pass, from float64": sum(
                    e["float32 from float64"]["one pass"] > ROUNDED for e in cases
                ),
            },
            "batches in each mode": dict.fromkeys(MODES, size),
            "of them, with a rank without completions": sum(
                e["without completions"] for e in cases
            ),
            "of them, with a rank without rows": sum(e["without rows"] for e in cases),
        },
    )


if __name__ == "__main__":
    rank(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
