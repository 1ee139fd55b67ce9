"""Step time of N learners and M replicas, simulated from what one card was measured to take.

    python benchmarks/scale.py  # writes results/scale.json and its part of docs/scale.md

A model, no measurement: nothing here was run on more than one card. It takes the seconds of the
phases of one step on one card from the committed results of `benchmarks/performance/gpu.py`, shares
them out and adds what processes have to send to one another. `ASSUMPTIONS` is all that it assumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "scale.md"
MEASURED = HERE / "results" / "gpu-nvidia-h200-2026-11-27.json"
RESULT = HERE / "results" / "scale.json"
BEGIN, END = "<!-- scale.py -->", "<!-- end of scale.py -->"
STUDENT_NUMEL = 1_720_574_976
"""Weights of Qwen3-1.7B, of which the measured step trains all."""
LEARNERS, REPLICAS = (1, 2, 4, 8, 16), (0, 1, 2, 4)
ASSUMPTIONS = (
    "The forward passes of the teacher and of the update take 1/N of their measured seconds on N "
    "learners: work is shared out evenly, and a micro-batch is no smaller than on one.",
    "A decoding step takes what was measured at 8, 64 and 256 open completions, between them in "
    "proportion, below 8 as much as at 8. What sampling took beyond its decoding steps stays.",
    "A replica decodes as fast as the student's own rollouts do on one card. vLLM was not "
    "measured on this card.",
    "Gradients are summed in float32 around a ring of learners, 2 (N − 1) / N times their bytes, "
    "at {link_gb_s:.0f} GB/s, while nothing else is done.",
    "The optimizer's step moves 30 bytes of memory a weight at the measured rate of a copy. With "
    "sharding none every learner takes it whole. It is a part of the update's measured seconds.",
    "With fsdp2 each learner takes 1/N of the optimizer's step, and gathers the weights in "
    "bfloat16 for sampling, for each forward and for each backward pass at the same rate, while "
    "nothing else is done.",
    "Weights are handed over to all replicas at once, in bfloat16, at {handover_gb_s:.0f} GB/s.",
    "With staleness 1 sampling and the rest of the step take as long as the longer of both, after "
    "the handover. The rest of the measured step, that no phase has, stays as it is.",
)


@dataclass(frozen=True)
class Rates:
    """What one card was measured to take, and what is assumed of links."""

    rollout_s: float
    teacher_s: float
    learn_s: float
    rest_s: float
    """Of the step, outside its phases."""
    completions: int
    new_tokens: int
    decode_ms: tuple[tuple[int, float], ...]
    """Milliseconds of a decoding step by open completions, from few to many."""
    copy_gb_s: float
    numel: int = STUDENT_NUMEL
    link_gb_s: float = 200.0
    """Assumed of learners on one host."""
    handover_gb_s: float = 10.0
    """Assumed of the way from learners to replicas."""
    passes: int = 3
    """How often fsdp2 gathers the weights: for the draw, the forward and the backward pass."""


@dataclass(frozen=True)
class Step:
    """Seconds of a simulated step and of what it consists of."""

    step_s: float
    draw_s: float
    teacher_s: float
    learn_s: float
    sums_s: float
    handover_s: float


def measured_rates(path: Path = MEASURED) -> tuple[Rates, dict[str, Any]]:
    """The rates of one card, and where they come from."""
    record = json.loads(path.read_text(encoding="utf-8"))
    parts = record["parts"]
    step, phases = parts["step_ours"], parts["step_ours"]["phases_s"]
    draws = {**parts["rollout_8_256"], **parts["rollout_64"]}
    decode = sorted(
        (int(name.removeprefix("batch ")), found["ms/step"])
        for name, found in draws.items()
        if name.startswith("batch ")
    )
    rates = Rates(
        rollout_s=phases["rollout_s"],
        teacher_s=phases["teacher_s"],
        learn_s=phases["learn_s"],
        rest_s=step["step_s"] - sum(phases.values()),
        completions=64,
        new_tokens=round(step["tokens"] / 64),
        decode_ms=tuple(decode),
        copy_gb_s=1000 * parts["ceilings"]["copy_tb_s"],
    )
    source = {name: record[name] for name in ("device", "driver", "cuda", "packages", "date")}
    commits = {parts[part]["commit"] for part in ("step_ours", "rollout_8_256", "rollout_64")}
    return rates, source | {"file": path.name, "commits": sorted(commits)}


def decode_s(rates: Rates, completions: float) -> float:
    """Seconds to decode so many completions together."""
    points = rates.decode_ms
    if completions <= points[0][0]:
        return points[0][1] * rates.new_tokens / 1000
    for (low, less), (high, more) in pairwise(points):
        if completions <= high:
            share = (completions - low) / (high - low)
            return (less + share * (more - less)) * rates.new_tokens / 1000
    raise ValueError(f"{completions} completions are more than the {points[-1][0]} measured.")


def draw_s(rates: Rates, workers: int) -> float:
    """Seconds of a draw that so many cards share out."""
    whole = decode_s(rates, rates.completions)
    return rates.rollout_s - whole + decode_s(rates, rates.completions / workers)


def simulate(
    rates: Rates, learners: int, replicas: int, staleness: int = 0, sharding: str = "none"
) -> Step:
    """A step of N learners and M replicas; without replicas the learners sample by themselves."""
    if staleness and not replicas:
        raise ValueError("staleness needs replicas.")
    n, is_sharded = learners, sharding == "fsdp2" and learners > 1
    optimizer = 30 * rates.numel / rates.copy_gb_s / 1e9
    ring = (n - 1) / n / rates.link_gb_s / 1e9
    gathered = rates.passes * 2 * rates.numel * ring if is_sharded else 0.0
    sums = 2 * 4 * rates.numel * ring
    if is_sharded:  # a reduce-scatter instead of an all-reduce
        sums = sums / 2 + gathered
    draw = draw_s(rates, replicas or n)
    teacher = rates.teacher_s / n
    learn = (rates.learn_s - optimizer) / n + optimizer / (n if is_sharded else 1)
    handover = 2 * rates.numel / rates.handover_gb_s / 1e9 if replicas else 0.0
    rest = teacher + learn + sums
    both = max(draw, rest) if staleness else draw + rest
    return Step(handover + both + rates.rest_s, draw, teacher, learn, sums, handover)


def cases(rates: Rates) -> list[dict[str, Any]]:
    """All numbers of learners and replicas."""
    found = []
    for sharding in ("none", "fsdp2"):
        for replicas in REPLICAS:
            for staleness in (0, 1) if replicas else (0,):
                for learners in LEARNERS:
                    step = simulate(rates, learners, replicas, staleness, sharding)
                    sizes = {"learners": learners, "replicas": replicas, "staleness": staleness}
                    found.append({"sharding": sharding, **sizes, **asdict(step)})
    return found


def assumptions(rates: Rates) -> list[str]:
    """With the rates that they are about."""
    return [line.format(**asdict(rates)) for line in ASSUMPTIONS]


def block(record: dict[str, Any]) -> str:
    """The page's part: a table, where it comes from, and all that is assumed."""
    source, rates = record["measured"], record["rates"]
    versions = ", ".join(
        f"{k} {source['packages'][k]}" for k in ("torch", "triton", "transformers")
    )
    lines = [
        f"Measured on one {source['device']} (driver {source['driver']}, {versions}, "
        f"{source['date']}): {rates['completions']} completions of {rates['new_tokens']} tokens, "
        "Qwen3-1.7B from Qwen3-4B. Seconds of a step, all but the first **simulated**:",
        "",
        "| sharding | replicas, staleness | " + " | ".join(f"N = {n}" for n in LEARNERS) + " |",
        "| --- | --- |" + " --- |" * len(LEARNERS),
        *_rows(record["cases"]),
        "",
        *(f"* {line}" for line in record["assumptions"]),
    ]
    return "\n".join([BEGIN, "", *lines, "", END])


def _rows(found: Sequence[dict[str, Any]]) -> list[str]:
    rows: dict[tuple[str, str], list[str]] = {}
    for case in found:
        if case["sharding"] == "fsdp2" and case["replicas"]:
            continue  # as much longer as without replicas
        replicas, staleness = case["replicas"], case["staleness"]
        name = f"{replicas}, {staleness}" if replicas else "none"
        rows.setdefault((case["sharding"], name), []).append(f"{case['step_s']:.2f}")
    return [f"| {' | '.join([*key, *cells])} |" for key, cells in rows.items()]


def record_of(path: Path = MEASURED) -> dict[str, Any]:
    """Everything that is written."""
    rates, source = measured_rates(path)
    return {
        "what": "simulated from rates of one card; nothing was run on several",
        "measured": source,
        "rates": asdict(rates),
        "assumptions": assumptions(rates),
        "cases": cases(rates),
    }


def with_block(page: str, record: dict[str, Any]) -> str:
    """The page with today's part."""
    start, end = page.index(BEGIN), page.index(END) + len(END)
    return page[:start] + block(record) + page[end:]


def main() -> None:
    """Print the table, and write it with the JSON."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    record = record_of()
    print(block(record))
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_block(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    print(f"written to {RESULT} and {PAGE}")


if __name__ == "__main__":
    main()
