"""Where the cells of claims_lm.py come from: pairs, sizes, code and versions, for its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from claims_lm_design import SCALES, Scale, is_current
from claims_lm_table import Place, places
from claims_markdown import table

CONTINUE = "python benchmarks/claims/claims_lm.py --pair FOLDER"


def pairs(results: dict[str, Any]) -> str:
    """The section on the models of the cells."""
    rows = []
    for pair in _used(results):
        for who in ("teacher", "student"):
            facts = results["pairs"][pair][who]
            test, recipe = facts["test"], facts["recipe"]
            accuracy = f"{100 * test['mean_at_k']:.1f} %"
            rows.append(
                [
                    f"{facts['task']}, {who}",
                    f"{facts['parameters']:,}",
                    str(recipe["num_layers"] or "all"),
                    f"{facts['num_texts']} × {recipe['num_epochs']}",
                    f"{facts['minutes']:.0f} ({facts['machine']['device']})",
                    accuracy,
                ]
            )
    if not rows:
        return ""
    heads = ["model", "parameters", "layers", "texts × epochs", "minutes of training", "accuracy"]
    return (
        "## The pairs\n\nThe accuracy is that of one draw when the models were built; the tables "
        "above have it from other draws, of every seed.\n\n" + table(heads, rows)
    )


def _used(results: dict[str, Any]) -> list[str]:
    used = [pair for *_, pair in places(results["cells"])]
    return [pair for pair in results["pairs"] if pair in used]


def provenance(results: dict[str, Any]) -> str:
    """The section on sizes, code, versions and commits."""
    records = results["cells"]
    if not records:
        return ""
    lines = []
    for place in places(records):
        lines.append(_sizes(place, records, results["pairs"].get(place[-1], {})))
    made = Counter((r["source"], r["environment"]) for r in records)
    for (source, name), count in made.items():
        e = results["environments"].get(name, {})
        versions = ", ".join(f"{k} {v}" for k, v in e.get("versions", {}).items())
        commit = str(e.get("commit"))[:12]
        lines.append(f"* {count} cells by source `{source}`, commit `{commit}`; {versions}.")
    if other := sum(not is_current(record) for record in records):
        lines.append(
            f"* **{other} cells were run in another configuration or size than the present one**; "
            f"`{CONTINUE}` runs them again."
        )
    return "## Where the numbers come from\n\n" + "\n".join(lines)


def _shared(facts: dict[str, Any], scale: Scale) -> str:
    """How many of the judged problems have been met in other words."""
    if "shared" not in facts:
        return ""
    tuning, teacher = (facts["shared"][name] for name in ("tuning", "teacher"))
    return (
        f": {tuning} of the {scale.num_problems} judged stories have the numbers and signs of one "
        f"of those, {teacher} have those of a text that the teacher was trained on, in other words"
    )


def _sizes(place: Place, records: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    task, name, device, _ = place
    scale = SCALES[name]
    mine = [r for r in records if (r["task"], r["scale"]) == (task, name)]
    seconds = sorted(r["train_s"] + r["measure_s"] for r in mine)
    return (
        f"* {task} ({name}, {device}): {scale.num_steps} steps of {scale.prompts_per_step} "
        f"prompts, linear schedule; {scale.num_problems} fixed problems of the test, "
        f"{scale.num_samples} completions each at temperature 1; divergences and entropy on the "
        f"first completion of {scale.num_scored} of them; loss on {scale.num_other_texts} other "
        "texts. Rates are tuned on the last problems of the test and arms judged on the first"
        f"{_shared(facts, scale)}. A cell took {seconds[0]:.0f} to {seconds[-1]:.0f} s, median "
        f"{seconds[len(seconds) // 2]:.0f} s, beside other work."
    )
