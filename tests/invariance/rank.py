"""One rank of a run of several: takes two steps of every case and writes what it saw.

Usage: rank.py MODELS OUT; the usual environment variables name rank, world size and master.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from ranks import process_group
from tiny import MEASURED, tiny_config
from tutelage.config.schema import Config
from tutelage.core import TokenSelection
from tutelage.data.types import Prompt
from tutelage.models.student import trained_names
from tutelage.setup.components import build_components
from tutelage.train.distributed import StepRows
from tutelage.train.step import Step

CASES: dict[str, dict[str, Any]] = {
    "all": {"selection": {"rule": "all"}},
    "soft_or": {"selection": {"rule": "soft_or", "keep": 0.5}},
    "random": {"selection": {"rule": "random", "keep": 0.3}, "micro_batch_size": 1},
    "soft_or_sample": {
        "selection": {"rule": "soft_or_sample", "keep": 0.3, "correct_sampling": True}
    },
    "teachability": {"selection": {"rule": "teachability", "keep": 0.2, "scope": "batch"}},
    "local_oracle": {"selection": {"rule": "local_oracle", "keep": 0.2}},
    "percentile": {"objective": {"kind": "eopd", "gate": "percentile", "threshold": 0.7}},
    "fire": {"weighting": {"kind": "fire"}},
    "tropd": {"objective": {"kind": "tropd", "k": 5, "clip": 0.05}, "updates_per_step": 2},
    "ida": {"weighting": {"kind": "ida"}, "objective": {"kind": "sampled"}},
    "grpo": {"objective": {"kind": "grpo", "clip_low": 0.05}, "updates_per_step": 2},
    "opsa": {
        "objective": {"kind": "opsa", "clip": 0.05},
        "selection": {"rule": "lowest_logprob", "keep": 0.3},
        "updates_per_step": 2,
        "seed": 1,  # with others no completion of step 2 ends
    },
    "influence": {"selection": {"rule": "influence", "keep": 0.2, "scope": "batch"}},
    # Ranks need different numbers of micro-batches by themselves.
    "tokens": {"micro_batch_tokens": 40, "micro_batch_size": 64},
    "updates": {
        "updates_per_step": 2,
        "objective": {"kind": "sampled", "clip": 0.05},
        "selection": {"rule": "soft_or", "keep": 0.5, "scope": "batch"},
    },
    "recorded": {"scoring": "recorded", "selection": {"rule": "soft_or", "keep": 0.4}},
    # Both halves of a step have the same prompts.
    "repeated": {"selection": {"rule": "entropy", "keep": 0.4}},
    # The student's head is 0 at first, so that all entropies are equal.
    "ties": {"selection": {"rule": "entropy", "keep": 0.3, "scope": "batch"}},
    # One row of the whole batch: one of two ranks keeps none, and so do most micro-batches.
    "one": {"selection": {"rule": "divergence", "keep": 0.001, "scope": "batch"}},
    # One completion at a time, so that rounding of the half precision is the same everywhere.
    "bfloat16": {"micro_batch_size": 1, "sampling_batch_size": 1},
}
HALF = ("bfloat16",)
"""Cases that keep their own dtype; in all others float64 leaves next to no rounding."""


def case_config(models: Path, case: str) -> Config:
    """Configuration of a case; completions are long enough to be ragged."""
    sampling = {"num_samples": 2, "max_new_tokens": 30}
    # Recorded states are rounded with the batch they were drawn in; the rest is exact.
    changes = {"scoring": "forward"} | CASES[case]
    if case in HALF:
        changes["student"] = {"model": str(models / "student"), "dtype": case}
    return tiny_config(models, Path("unused"), sampling=sampling, **changes)


class Watched(Step):
    """Remembers the rows it chose."""

    chosen: list[list[int]]

    def choose(self, gathered: StepRows, step: int) -> TokenSelection:
        chosen = super().choose(gathered, step)
        self.chosen.append(chosen.rows.tolist())
        return chosen


class Repeated:
    """A task that asks everything twice in a step."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def prompts(self, step: int, count: int, seed: int) -> list[Prompt]:
        half: list[Prompt] = self.task.prompts(step, count // 2, seed)
        return [*half, *half]


class Graded:
    """A task whose grader finds something right of what a random student writes."""

    def __init__(self, task: Any) -> None:
        self.prompts = task.prompts

    def grade(self, prompt: Prompt, text: str, is_truncated: bool) -> bool:
        return sum(map(ord, text)) % 3 == 0


def two_steps(case: str, models: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Kept rows, metrics and final weights of two AdamW steps, in float64 unless `HALF`."""
    config = case_config(models, case)
    components = build_components(config)
    if case == "repeated":
        object.__setattr__(components, "task", Repeated(components.task))
    if case == "grpo":
        object.__setattr__(components, "task", Graded(components.task))
    if case == "ties":
        torch.nn.init.zeros_(components.student.model.get_output_embeddings().weight)
    if case not in HALF:
        components.student.model.double()
        components.teacher.model.double()
    optimizer = torch.optim.AdamW(components.masters.masters, lr=1e-2)
    components.masters.register_hook(optimizer)
    step = Watched(config, components, accelerator, components.student, optimizer)
    step.chosen = []
    metrics = [step.take(1), step.take(2)]
    metrics = [{k: v for k, v in m.items() if k not in MEASURED} for m in metrics]
    rollouts = step.generate(2)
    names = [str(i) for i in step.share(len(rollouts))]
    share = {i: r.completion_ids for i, r in zip(names, rollouts, strict=True)}
    pairs = zip(trained_names(components.student), components.masters.masters, strict=True)
    weights = {name: master.detach().clone() for name, master in pairs}
    return {"chosen": step.chosen, "metrics": metrics, "completions": share, "weights": weights}


def main(models: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with process_group() as index:
        accelerator = Accelerator(cpu=True)
        out = out / f"rank{index}"
        out.mkdir()
        for name in CASES:
            seen = two_steps(name, models, accelerator)
            accelerator.free_memory()  # it would hold every student it wrapped
            save_file(seen.pop("weights"), out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
