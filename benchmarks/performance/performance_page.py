"""docs/results/performance.md and its plots, from the published JSON alone.

    python benchmarks/performance/performance_page.py

Takes the newest `results/NAME-*.json` of every part; a part without results is left out. Single
rounds and single operators are left to the JSON.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from performance_gpu import gpu
from performance_processes import processes_goals, processes_table

HERE = Path(__file__).resolve().parents[1]
DOCS = HERE.parent / "docs" / "results"
MIB = 1 << 20
LOOKS = {
    "all_tokens": ("#0072B2", "o"),
    "soft_or_50": ("#56B4E9", "s"),
    "entropy_10": ("#009E73", "^"),
    "materialised": ("#E69F00", "v"),
    "trl": ("#D55E00", "X"),
    "trl_tuned": ("#CC79A7", "P"),
    "bare_products": ("#000000", "x"),
}
Goal = tuple[str, float, float | None]
"""What was aimed at, its limit, and what was reached; None where it was not measured."""
INTRO = """\
# Performance

This page is generated from `benchmarks/results` by
`python benchmarks/performance/performance_page.py`; do not edit it. `make bench` takes
the measurements. Seconds are medians of runs in turns; a figure belongs to the machine and the
versions beside it and to nothing else.
"""
OBJECTIVE = """\
## The objective

From hidden states and heads to the summed reverse KL and its gradients for hidden states and head.
Ours computes both KLs and both entropies of every row besides. `bare_products` are the four matrix
products that nobody can do without, in our chunks and by the library that ours takes; they compute
no loss. `trl_tuned` is TRL in the tile {tile} (tokens, ids), the fastest of those tried, where
`trl` keeps its own, and `liger_tuned` is Liger in chunks of {chunk} rows, likewise;
`liger_compiled` is Liger under `torch.compile`. Liger computes a cross-entropy too, for which it
has a weight, here 0, but no switch. Extra memory is what one call needs beyond what was resident,
gradients included. *error* is the largest relative distance of value and gradients from float64.
The selecting rows include their scoring pass over all rows, which projects the teacher only where
the rule looks at it.

On AMD processors with AVX-512 ours multiplies by oneDNN, which comes with torch; torch itself, and
so everybody else here, multiplies float32 by MKL, which leaves AVX-512 unused on them. On other
processors ours does as torch does: `all_tokens_torch` and `torch_products` are ours and the bare
products that way. By torch's library ours takes {trl:.2f} of TRL's time ({trl_tuned:.2f} of tuned
TRL's), {liger_tuned:.2f} of tuned and {liger_compiled:.2f} of compiled Liger's.
"""
PROFILE = """\
### Where the time goes

Seconds in matrix products and in everything else at the first size, one call under torch's
profiler. The four products by torch's own library take **{floor:.2f}** of TRL's time; ours takes
{ours:.2f}, and {same:.2f} with that library. TRL projects both sides again in its backward, six
products against four, and makes more passes over the logits.
"""


def number(key: str, value: Any) -> str:
    """A cell: bytes in MiB, other numbers with three digits that matter."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if key.endswith("_bytes"):
        return f"{value / MIB:,.0f} MiB"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def newest(folder: Path, part: str) -> list[dict[str, Any]]:
    """The last result of a part; one for each pair of models where files name the pair."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"{part}-*.json")):
        if "quick" not in path.stem:
            found[re.sub(r"-\d{4}-\d\d-\d\d.*", "", path.stem)] = path
    return [json.loads(path.read_text()) for path in found.values()]


def where(record: dict[str, Any]) -> str:
    """Machine, versions and commit of a result in a line."""
    machine, versions = record.get("machine", {}), record.get("versions", {})
    told = (
        {**machine, **versions} if isinstance(machine, dict) else {"machine": machine, **versions}
    )
    load = record.get("load_average")
    told |= {"load average": load} if load else {}
    told = {k: [round(x, 1) for x in v] if "load" in k else v for k, v in told.items()}
    words = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in told.items() if v is not None)
    commit = str(record.get("commit") or "unknown")[:10]
    return f"*{record.get('date', '')[:10]}, commit {commit}: {words}.*\n"


def ratio(case: dict[str, Any], mine: str, other: str, key: str = "seconds") -> float | None:
    """One contestant's figure as a multiple of another's; None where either is unknown."""
    a, b = (case["results"].get(name, {}).get(key) for name in (mine, other))
    return a / b if a is not None and b else None


def goals(cases: Sequence[dict[str, Any]]) -> list[Goal]:
    """What was aimed at: a line, its limit, and what was reached."""
    first = cases[0]
    found = [("all tokens / bare products, time", 1.2, ratio(first, "all_tokens", "bare_products"))]
    trl, liger = (0.3, 0.16), (0.6, 0.16)
    limits = {"trl": trl, "trl_tuned": trl, "materialised": (0.8, 0.23)}
    limits |= dict.fromkeys(("liger", "liger_tuned", "liger_compiled"), liger)
    for other, (time, memory) in limits.items():
        found.append((f"all tokens / {other}, time", time, ratio(first, "all_tokens", other)))
        extra = ratio(first, "all_tokens", other, "extra_bytes")
        found.append((f"all tokens / {other}, extra memory", memory, extra))
    for mine, limit in (("soft_or_50", 1.1), ("soft_or_10", 0.85), ("entropy_10", 0.42)):
        found.append((f"{mine} / all tokens, time", limit, ratio(first, mine, "all_tokens")))
    return [*found, *growth(cases)]


def growth(cases: Sequence[dict[str, Any]]) -> Iterator[Goal]:
    """Extra memory, gradients aside, at 4096 rows against 512, for each vocabulary."""
    for vocab in dict.fromkeys(case["vocab_size"] for case in cases):
        size = {
            c["rows"]: c["results"]["all_tokens"]["extra_bytes"] - c["gradient_bytes"]
            for c in cases
            if c["vocab_size"] == vocab and c["rows"] in (512, 4096)
        }
        if {512, 4096} <= size.keys():
            line = f"extra memory without gradients, N = 4096 / 512, V = {vocab:,}"
            yield line, 1.15, size[4096] / size[512]


LEAN_ARMS = {
    "tutelage-offload": "an offloaded teacher",
    "tutelage-offload-disk": "an offloaded teacher and moments on disk",
    "tutelage-offload-disk-checkpointing": "an offloaded teacher, moments on disk and checkpointed "
    "activations",
}


def step_goals(record: dict[str, Any]) -> Iterator[Goal]:
    """What was aimed at for a whole step, against TRL's fastest and its leanest arm."""
    for pair, found in record["results"].items():
        arms, limit = found["arms"], 0.6 if pair == "embedded" else 0.8
        yield f"{pair}: step / TRL, time", limit, arms["tutelage"]["step_vs_trl"]
        for arm, words in LEAN_ARMS.items():
            if arm in arms:
                line = f"{pair}: step with {words} / TRL's leanest, peak memory"
                yield line, 0.6, arms[arm]["peak_vs_trl"]


def rollout_goals(record: dict[str, Any]) -> Iterator[Goal]:
    """What was aimed at for rollouts; tokens a second, so more is better."""
    is_embedded = record["arguments"]["model"].startswith("package:tutelage")
    for work in record["workloads"]:
        size, lengths = work["batch_size"], work["lengths"]
        limit = (2.0 if size <= 8 else 1.3) if is_embedded else 1.1
        limit = 1.5 if lengths == "ragged" else limit
        line = f"{'embedded' if is_embedded else 'SmolLM2'}, batch {size}, {lengths} lengths"
        yield f"{line}: tokens/s / generate", limit, work["times_generate"].get("ours")


def packing_goals(record: dict[str, Any]) -> Iterator[Goal]:
    """What was aimed at for ragged micro-batches; more is better."""
    pair = record["arguments"]["pair"]
    yield f"{pair}: tokens/s by length / as they come", 1.8, record["summary"]["times"]


def step_notes(record: dict[str, Any]) -> Iterator[str]:
    """What bounds a whole step, in time and in memory."""
    for pair, found in record["results"].items():
        seen, least = found.get("profiled_step", {}), found.get("needed_memory", {}).get("bytes")
        peers = [arm for name, arm in found["arms"].items() if name.startswith("trl")]
        if "tutelage" in seen:
            kernels = seen["tutelage"]["products_s"] + seen["tutelage"]["attention_s"]
            share = kernels / min(peer["step_s"] for peer in peers)
            yield (
                f"On the pair {pair} our products of matrices and attention alone take "
                f"**{share:.2f}** of the time of TRL's fastest step (seen by the profiler, which "
                "slows them); the rest of ours is passes over logits, the optimizer, small "
                "operators and Python.\n"
            )
        if least and found["arms"]["tutelage"]["peak_bytes"] > 1 << 30:
            phases = ("while_teacher_reads_bytes", "while_student_learns_bytes")
            reads, learns = (least[name] for name in phases)
            share = max(reads, learns) / min(peer["peak_bytes"] for peer in peers)
            yield (
                f"Weights, gradients, AdamW's moments and an idle process alone need "
                f"{number('_bytes', reads)} during the teacher forward (all of it in memory) and "
                f"{number('_bytes', learns)} while the student is trained: **{share:.2f}** of "
                "TRL's leanest, without a single activation. With the moments on disk they are not "
                "resident memory; the kernel may keep their file in its cache until somebody needs "
                "the room.\n"
            )


def rollout_table(record: dict[str, Any]) -> str:
    """A row for each workload and contestant."""
    header = ["batch", "lengths", "", "tokens/s", "× generate", "mean length"]
    header += ["products", "attention", "other operators"]
    rows = []
    for work in record["workloads"]:
        for name, r in work["results"].items():
            row = [str(work["batch_size"]), work["lengths"], name, f"{r['tokens_per_s']:,.0f}"]
            row += [f"{work['times_generate'].get(name, 1):.2f}", f"{r['mean_length']:.1f}"]
            seen = work.get("profiled_batch", {}).get(name, {})
            kinds = ("products", "attention", "other_operators")
            spent = [seen.get(f"{kind}_us_per_token") for kind in kinds]
            rows.append(row + ["" if us is None else f"{us:,.0f}" for us in spent])
    note = "The last three columns are µs a token under torch's profiler.\n\n"
    return note + table(header, rows)


def step_table(record: dict[str, Any]) -> str:
    """A row for each arm of each pair: medians of a step, and the largest memory."""
    header = ["pair", "", "step, s", "rollout", "teacher", "student", "tokens", "loss", "peak"]
    header += ["time / TRL", "s a token / TRL", "peak / TRL"]
    rows = []
    for pair, found in record["results"].items():
        for arm, r in found["arms"].items():
            seconds = [
                number("", r[f"{phase}_s"]) for phase in ("step", "rollout", "teacher", "student")
            ]
            sizes = [f"{r['tokens']:,.0f}", f"{r['loss']:.2f}", number("_bytes", r["peak_bytes"])]
            ratios = [f"{r[f'{key}_vs_trl']:.2f}" for key in ("step", "per_token", "peak")]
            rows.append([pair, arm, *seconds, *sizes, *ratios])
    return table(header, rows)


def packing_table(record: dict[str, Any]) -> str:
    """A row for micro-batches as they come and one for those by length."""
    rows = []
    for words, key in (("as they come", "padded"), ("by length", "neighbours")):
        speed, loss = record["summary"][f"{key}_tokens_per_s"], record["losses"][key]
        padded = f"{record['tokens_with_padding'][key]:,}"
        rows.append([words, f"{speed:,.0f}", f"{record['tokens']:,}", padded, f"{loss:.6f}"])
    return table(["", "tokens/s", "tokens", "with padding", "loss"], rows)


def memory_table(record: dict[str, Any]) -> str:
    """A row for each configuration: planned and measured peaks, and the phase with the peak."""
    rows = []
    for name, r in record["results"].items():
        phase = max(r["phases"], key=lambda phase: sum(r["phases"][phase].values()))
        sizes = [number("_bytes", r[key]) for key in ("planned", "measured")]
        rows.append([name, *sizes, f"{r['ratio']:.2f}", phase])
    return table(["configuration", "planned", "measured", "planned / measured", "in phase"], rows)


def nothing(record: dict[str, Any]) -> Iterator[Any]:
    """A part without goals or notes."""
    return iter(())


@dataclass(frozen=True)
class Part:
    """A section of the page from the results of one benchmark."""

    title: str
    table: Callable[[dict[str, Any]], str]
    goals: Callable[[dict[str, Any]], Iterable[Goal]] = nothing
    notes: Callable[[dict[str, Any]], Iterable[str]] = nothing
    is_more_better: bool = True


PARTS = {
    "rollout": Part("Rollouts", rollout_table, rollout_goals),
    "step": Part("The whole step", step_table, step_goals, step_notes, is_more_better=False),
    "processes": Part("Several processes", processes_table, processes_goals),
    "packing": Part("Micro-batches by length", packing_table, packing_goals),
    "memory": Part("The memory plan against measured memory", memory_table),
}


def goal_table(lines: Iterable[Goal], is_more_better: bool) -> str:
    """What was aimed at, and whether it was reached; a line that was not measured says so."""
    sign, rows = "≥" if is_more_better else "≤", []
    for line, limit, reached in lines:
        cells = [line, f"{sign} {limit}"]
        if reached is None:
            rows.append([*cells, "not measured", ""])
            continue
        is_met = reached >= limit if is_more_better else reached <= limit
        rows.append([*cells, f"{reached:.2f}", "yes" if is_met else "**no**"])
    return table(["", "goal", "reached", "met"], rows)


def case_table(case: dict[str, Any]) -> str:
    """All figures of one size."""
    rows = []
    for name, r in case["results"].items():
        multiples = [ratio(case, name, other) for other in ("all_tokens", "bare_products")]
        error = "" if r["error"] is None else f"{r['error']:.0e}"
        cells = [f"{r['seconds']:.2f}", *(number("", m) for m in multiples)]
        rows.append([name, *cells, number("extra_bytes", r["extra_bytes"]), error])
    title = f"### N = {case['rows']:,}, V = {case['vocab_size']:,}, D = {case['width']:,}\n\n"
    header = ["", "seconds", "× all tokens", "× bare products", "extra memory", "error"]
    return title + table(header, rows)


def draw(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds and extra memory against the number of rows, a column for each vocabulary."""
    # The same JSON gives the same bytes: no date, no random names of elements.
    matplotlib.rcParams.update({"svg.hashsalt": "tutelage", "svg.fonttype": "none", "font.size": 9})
    vocabularies = list(dict.fromkeys(case["vocab_size"] for case in cases))
    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    panels = figure.subplots(2, len(vocabularies), squeeze=False)
    units = {"seconds": ("seconds", 1), "extra_bytes": ("extra memory, MiB", MIB)}
    for column, vocab in enumerate(vocabularies):
        here = sorted((c for c in cases if c["vocab_size"] == vocab), key=lambda c: c["rows"])
        for row, (key, (label, unit)) in enumerate(units.items()):
            axes = panels[row][column]
            for name, (color, marker) in LOOKS.items():
                known = [(c["rows"], c["results"].get(name, {}).get(key)) for c in here]
                points = [(n, y / unit) for n, y in known if y is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
            axes.set(xscale="log", xlabel="rows N", ylabel=label)
            axes.set(yscale="log") if key == "seconds" else axes.set_ylim(bottom=0)
            axes.set_xticks(
                [c["rows"] for c in here], [f"{c['rows']:,}" for c in here], minor=False
            )
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axes.set_title(f"V = {vocab:,}, D = {here[0]['width']:,}")
            axes.grid(color="#e3e5e8")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def objective(record: dict[str, Any], images: Path) -> Iterator[str]:
    """The objective's section."""
    cases = record["cases"]
    draw(cases, images / "performance-objective.svg")
    told = {"tile": record["trl_tile"], "chunk": record["liger_chunk"]}
    for peer in ("trl", "trl_tuned", "liger_tuned", "liger_compiled"):
        told[peer] = ratio(cases[0], "all_tokens_torch", peer) or float("nan")
    yield OBJECTIVE.format(**told) + "\n" + where(record)
    yield "![seconds and extra memory against rows](images/performance-objective.svg)\n"
    yield "### What was aimed at\n\n" + goal_table(goals(cases), is_more_better=False)
    names = ("torch_products", "all_tokens", "all_tokens_torch")
    floor, ours, same = (ratio(cases[0], name, "trl") for name in names)
    spent = {k: r["profile_s"] for k, r in cases[0]["results"].items() if r["profile_s"]}
    if spent and floor and ours and same:
        cells = [[k, f"{v['products']:.2f}", f"{v['passes']:.2f}"] for k, v in spent.items()]
        yield (
            PROFILE.format(floor=floor, ours=ours, same=same)
            + "\n"
            + table(["", "products", "rest"], cells)
        )
    yield from map(case_table, cases)


def page(results: Path, images: Path) -> str:
    """The whole page."""
    parts = [INTRO, *gpu(results)]
    for record in newest(results, "objective"):
        if "cases" in record:
            parts += objective(record, images)
    for name, part in PARTS.items():
        for i, record in enumerate(newest(results, name)):
            parts += [f"## {part.title}\n"] * (i == 0) + [where(record)]
            lines = list(part.goals(record))
            parts += [goal_table(lines, part.is_more_better)] * bool(lines)
            parts += [*part.notes(record), part.table(record)]
    return "\n".join(parts)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=DOCS / "performance.md")
    arguments = parser.parse_args()
    images = arguments.out.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page(arguments.results, images))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
