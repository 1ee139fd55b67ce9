"""Write the table of architectures in docs/models.md from what the sweep over them saw.

`make faults NAMES=families` runs the sweep and writes benchmarks/results/faults-families.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "faults-families.json"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
DECODING = {
    "by hand": "by hand",
    "plain": "padded batches",
    "aligned": "batches of one length",
    "reread": "without a cache",  # of results before the form was renamed
    "recomputed": "without a cache",
}


def table(result: dict[str, Any]) -> str:
    """The text between the two marks."""
    cases: dict[str, dict[str, Any]] = result["details"]["cases"]
    counts = result["details"]["results"]
    versions = result["versions"]
    largest = result["details"]["largest_gap_nats"]
    exact = {name: case for name, case in cases.items() if case["result"] == "exact"}
    lines = [
        f"transformers {versions['transformers']}, torch {versions['torch']}: "
        f"{counts.get('exact', 0)} exact, {counts.get('refused', 0)} refused, "
        f"{counts.get('BROKEN', 0)} broken, {counts.get('not built', 0)} not built from their "
        f"configuration alone. Largest difference: {largest:.1g} nats.",
        "",
        "| exact, decoded | model types |",
        "|---|---|",
    ]
    for key, words in DECODING.items():
        found = sorted(name for name, case in exact.items() if case["decoding"] == key)
        if found:
            lines.append(f"| {words} ({len(found)}) | {', '.join(found)} |")
    lines += ["", "| refused | why |", "|---|---|"]
    refused: dict[str, list[str]] = {}
    for name, case in sorted(cases.items()):
        if case["result"] == "refused":
            refused.setdefault(reason(case), []).append(name)
    lines += [f"| {', '.join(found)} | {why} |" for why, found in sorted(refused.items())]
    rest = sorted(name for name, case in cases.items() if case["result"] == "not built")
    lines += ["", f"Not built: {', '.join(rest)}."] if rest else []
    return "\n".join(lines)


def reason(case: dict[str, Any]) -> str:
    """Why an architecture was refused, in a few words."""
    message = str(case["message"])
    for part, words in (
        ("has layers between", "layers between backbone and head"),
        ("what follows them", "tokens attend to what follows them"),
        ("more than its head", "logits are more than a scaled and capped product"),
        ("are not its head", "logits are not head times hidden states"),
    ):
        if part in message:
            return words
    return "cannot be run on text alone"


def page(text: str, result: dict[str, Any]) -> str:
    """The page with a table that is up to date."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{table(result)}\n{END}{after}"


def main() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
