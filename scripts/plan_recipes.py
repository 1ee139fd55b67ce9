"""Write into the headers of recipes for one GPU what they are planned to take.

    python scripts/plan_recipes.py            # writes configs/*/*_1gpu_*.toml
    python scripts/plan_recipes.py --check    # ends with status 1 where a header is stale

Plans are made from the sizes of the architectures alone, by what `tutelage check` plans on the
machine itself (`src/tutelage/memory/cuda.py`); measurements are those of
`benchmarks/performance/gpu.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "performance"))

import gpu_models  # noqa: E402
from tutelage.config.parse import load_config  # noqa: E402
from tutelage.config.schema import Config  # noqa: E402
from tutelage.memory.cuda import plan_cuda  # noqa: E402
from tutelage.memory.facts import Facts  # noqa: E402
from tutelage.memory.meta_model import shapes  # noqa: E402
from tutelage.memory.plan import MemoryPlan  # noqa: E402

GIB = 1 << 30
CARDS = {"80gb": 79 * GIB, "24gb": int(23.5 * GIB)}
"""What a driver leaves of cards that are sold as so large."""
_BLOCK = re.compile(r"#\n# Planned, not measured:.*?(?=\nbase = )", re.DOTALL)


def facts_of(card: str) -> Facts:
    """A card of that size, of Hopper's kind or, where it is small, of Ada's, and room beside it."""
    size = CARDS[card]
    capability = (9, 0) if card == "80gb" else (8, 9)
    return Facts(size, size, capability, has_kernels=True, host_bytes=1 << 50)


def plan_of(config: Config, card: str) -> MemoryPlan:
    """The plan of a recipe on such a card, its longest prompts and completions included."""
    student = shapes(gpu_models.architecture(config.student.model), student=config.student)
    teacher = shapes(
        gpu_models.architecture(config.teacher.model), quantization=config.teacher.quantization
    )
    longest = config.data.max_prompt_tokens  # type: ignore[union-attr]
    return plan_cuda(config, student, teacher, facts_of(card), longest)


def block_of(path: Path) -> str:
    """The lines of a recipe's header about its memory."""
    card = path.stem.rsplit("_", 1)[-1]
    plan = plan_of(load_config(path, []), card)
    assert plan.host is not None
    phases = ", ".join(f"{p.name} {p.total_bytes / GIB:.1f}" for p in plan.phases)
    parts = plan.host.peak.parts
    copy = parts.get("checkpoint copy", 0) / GIB
    text = (
        f"Planned, not measured: {plan.peak.total_bytes / GIB:.1f} GiB of the card's "
        f"{plan.available_bytes / GIB:.4g} at the peak ({phases}), and "
        f"{plan.host.peak.total_bytes / GIB - copy:.0f} GiB of main memory beside the process, "
        f"{copy:.0f} more where checkpoints are copied to be written beside training; for "
        "completions that are all of the full length. `tutelage check` plans the machine that it "
        "runs on."
    )
    lines = textwrap.wrap(text, 96) + _measured(path.stem)
    return "\n".join(["#", *(f"# {line}" for line in lines)])


def _measured(name: str) -> list[str]:
    """What cards held, by `benchmarks/performance/gpu.py`."""
    lines: list[str] = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json")):
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        part = record["parts"].get(f"recipe_{name}", {})
        if "measured_mib" in part:
            lines += textwrap.wrap(
                f"Measured on one {record['device']}, random weights, drawn by the student itself: "
                f"{part['measured_mib'] / 1024:.1f} GiB of tensors, {part['ratio']:.2f} of that "
                "planned for the same (docs/results/performance.md).",
                96,
            )
    return lines


def main() -> None:
    """Write headers, or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    stale: list[str] = []
    for path in sorted((ROOT / "configs").rglob("*_1gpu_*.toml")):
        before = path.read_text(encoding="utf-8")
        block = block_of(path)
        after = _BLOCK.sub(lambda _: block, before)  # noqa: B023
        if after != before:
            stale.append(path.name)
            if not given.check:
                path.write_text(after, encoding="utf-8")
    print("\n".join(stale) or "every header is as planned")
    if given.check and stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
