"""Write the table of docs/scale.md: which sizes of models are planned to fit on which cards.

    python scripts/plan_scale.py            # writes docs/scale.md (minutes)
    python scripts/plan_scale.py --check    # ends with status 1 where the table is stale

Plans are made from the sizes of the architectures alone, by what `tutelage check --card-gib` plans
(`src/tutelage/memory/cuda.py`). Each run of a pair has the lightest of `WAYS` whose plan fits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "performance"))

import gpu_models  # noqa: E402
from tutelage.config.parse import parse_config  # noqa: E402
from tutelage.config.schema import Config  # noqa: E402
from tutelage.memory import cuda, rollout_cuda  # noqa: E402
from tutelage.memory.facts import Facts  # noqa: E402
from tutelage.memory.meta_model import learning_from, reading, shapes  # noqa: E402
from tutelage.memory.plan import UNKNOWN_BYTES, MemoryPlan  # noqa: E402
from tutelage.setup.process_counts import ProcessCounts  # noqa: E402

GIB = 1 << 30
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- plan_scale.py -->", "<!-- end of plan_scale.py -->"
CARDS = {24: 23.5, 80: 79.0, 141: 139.8}
"""Memory of a card in GB as it is sold, and what a driver leaves of it in GiB."""
COUNTS = (1, 4, 8, 16)
PROMPT_TOKENS, NEW_TOKENS = 1024, 4096
PROMPTS, SAMPLES = 64, 8
DECODED = (64, 32, 16, 8)
"""Completions that a process decodes at the same time; the most that fit."""


@dataclass(frozen=True)
class Pair:
    """A student and its teacher, by names on the hub."""

    student: str
    teacher: str

    @property
    def label(self) -> str:
        """As the table names it."""
        return " ← ".join(name.rpartition("/")[2] for name in (self.student, self.teacher))


LLAMA = ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct")
PAIRS = [
    *(Pair(f"Qwen/Qwen3-{size}", "Qwen/Qwen3-8B") for size in ("0.6B", "1.7B", "4B")),
    *(Pair(f"Qwen/Qwen3-{size}", "Qwen/Qwen3-32B") for size in ("8B", "14B", "32B")),
    Pair(*LLAMA),
]


@dataclass(frozen=True)
class Way:
    """Settings that save memory, from none to all."""

    letter: str
    what: str
    student: dict[str, Any]
    teacher: dict[str, Any]
    optimizer: dict[str, Any]
    needs_several: bool = False


FSDP2, MOVED = {"sharding": "fsdp2"}, {"offload": True}
AWAY = {"mode": "offload"}
WAYS = [
    Way("A", "both models whole on each card, moments too", {}, {}, {}),
    Way("B", "`student.sharding` and `teacher.sharding` = `fsdp2`", FSDP2, FSDP2, {}, True),
    Way("C", "whole, with `optimizer.offload` and `teacher.mode = offload`", {}, AWAY, MOVED),
    Way("D", "`fsdp2` of both, with `optimizer.offload`", FSDP2, FSDP2, MOVED, True),
]


def config_of(pair: Pair, way: Way, decoded: int) -> Config:
    """The run of a pair: all weights are trained by AdamW, of a rule that scores all tokens."""
    both = {"dtype": "bfloat16"}
    checkpointed = {"activation_checkpointing": True}
    return parse_config(
        {
            "student": {"model": pair.student, **both, **checkpointed, **way.student},
            "teacher": {"model": pair.teacher, **both, **way.teacher},
            "data": {"kind": "file", "path": "prompts", "max_prompt_tokens": PROMPT_TOKENS},
            "sampling": {"num_samples": SAMPLES, "max_new_tokens": NEW_TOKENS},
            "selection": {"rule": "soft_or", "keep": 0.5},
            "optimizer": way.optimizer,
            "evaluation": {"num_problems": 0},
            "num_steps": 1,
            "prompts_per_step": PROMPTS,
            "micro_batch_size": 1,
            "sampling_batch_size": decoded,
        }
    )


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a model without numbers, which finds the same for all counts and cards."""
    found: dict[Any, Any] = {}

    def call(twin: Any, *given: Any, **named: Any) -> Any:
        plain = [len(x) if isinstance(x, list) else x for x in given]
        key = (id(twin), *plain, *sorted(named.items()))
        if key not in found:
            found[key] = function(twin, *given, **named)
        return found[key]

    return call


@cache
def side(name: str, student: bool) -> Any:
    """A model without numbers."""
    table = config_of(PAIRS[0], WAYS[0], 1).student if student else None
    return shapes(gpu_models.architecture(name), student=table)


def plan(pair: Pair, way: Way, decoded: int, count: int, card: int) -> MemoryPlan:
    """The plan of one of `count` processes, eight a host."""
    size = int(CARDS[card] * GIB)
    processes = ProcessCounts(count, max(1, count // 8))
    room = UNKNOWN_BYTES * processes.per_host
    facts = Facts(size, size, (9, 0) if card >= 80 else (8, 9), True, room)
    sides = (side(pair.student, True), side(pair.teacher, False))
    return cuda.plan_cuda(config_of(pair, way, decoded), *sides, facts, PROMPT_TOKENS, processes)


def cell(pair: Pair, count: int, card: int) -> str:
    """The first way that fits, completions decoded together, and the GiB at its peak."""
    for way in WAYS:
        if way.needs_several and count == 1:
            continue
        for decoded in DECODED:
            found = plan(pair, way, decoded, count, card)
            if found.peak.total_bytes <= found.available_bytes:
                return f"{way.letter}/{decoded} {found.peak.total_bytes / GIB:.0f}"
    return "–"


def table(pairs: list[Pair] = PAIRS) -> Iterator[str]:
    """Lines of the table."""
    columns = [(count, card) for card in CARDS for count in COUNTS]
    yield "| | " + " | ".join(f"{count} × {card}" for count, card in columns) + " |"
    yield "| --- |" + " --- |" * len(columns)
    for pair in pairs:
        learned, read = remembered(learning_from), remembered(reading)
        with (
            mock.patch.object(cuda, "learning_from", learned),
            mock.patch.object(cuda, "reading", read),
            mock.patch.object(rollout_cuda, "reading", read),
        ):
            cells = [cell(pair, *column) for column in columns]
        side.cache_clear()
        yield f"| {pair.label} | " + " | ".join(cells) + " |"


def block() -> str:
    """What stands between the marks."""
    ways = (f"* **{way.letter}**: {way.what}." for way in WAYS)
    return "\n".join([BEGIN, "", *ways, "", *table(), "", END])


def main() -> None:
    """Write the table, or say that it is stale."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    start, end = before.index(BEGIN), before.index(END) + len(END)
    after = before[:start] + block() + before[end:]
    if not given.check:
        PAGE.write_text(after, encoding="utf-8")
    elif after != before:
        sys.exit("the table is stale")


if __name__ == "__main__":
    main()
