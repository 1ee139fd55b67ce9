"""Which claims of nine papers hold on two embedded tasks? Seeds, controls, intervals, verdicts.

    python benchmarks/claims/claims.py  # everything; continues where it stopped
    python benchmarks/claims/claims.py --quick  # two seeds, fewer problems: a check, no evidence
    python benchmarks/claims/claims.py --judge  # tables and verdicts again, from finished cells
    python benchmarks/claims/claims.py --page  # page and figures again, from the JSON
    python benchmarks/claims/claims.py --verify 4  # run four random cells again and compare exactly
    python benchmarks/claims/claims.py --verify all  # every cell

Every finished cell (setting, arm, seed) is a line of runs/claims-NAME.jsonl; the published JSON,
figures and page follow from these lines. The full design lands in benchmarks/results and docs, the
quick one in runs/claims-quick. A cell is taken up again only if the source that made it, whose hash
ends its key, is still the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import sys
import time
from dataclasses import fields
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from claims_arms import TUNED, Loss
from claims_controls import controls
from claims_design import (
    DESIGNS,
    GRID,
    LIMIT_CORE_MINUTES,
    SENSITIVITY_FACTORS,
    SETTINGS,
    TUNING_SEEDS,
    Cell,
    Design,
    Rates,
    as_table,
    cells,
    losses_of,
    source,
    tuning_cells,
)
from claims_file import differing, end_line, finished
from claims_table import Record, Table, correlations, summary
from claims_verdicts import judge, sensitivity
from claims_work import NUM_SAMPLES, do
from tutelage.files.atomic import write_atomically
from tutelage.setup.run_folder import environment

ROOT = Path(__file__).resolve().parents[2]
NOT_PUBLISHED = ("key", "problems", "tokens", "commit")
"""What the JSON leaves out of a cell: what a digest stands for, and what is noted once."""
EARLIER = ROOT / "benchmarks" / "results" / "claims-earlier.json"
"""Verdicts of the run before this design."""
OF_MODELS = ROOT / "benchmarks" / "results" / "claims-lm.json"
"""Which tokens rules keep of a real language model's completions; see claims_lm.py."""
LEAST_ACCURACY = 0.8
"""What a rate that is chosen by forward KL has to keep of the grid's best accuracy."""
TIMES = ("cpu_s", "wall_s")
"""What differs from run to run."""


Tuning: TypeAlias = dict[str, dict[Loss, dict[str, Any]]]
"""By setting and loss: the chosen rate and the grid."""


def working_file(design: Design) -> Path:
    """Where finished cells are kept."""
    return ROOT / "runs" / f"claims-{design.name}.jsonl"


def results_file(design: Design) -> Path:
    """The published JSON; a quick check publishes nothing."""
    folder = ROOT / "benchmarks" / "results" if design.name == "full" else page_folder(design)
    return folder / f"claims-{design.name}.json"


def page_folder(design: Design) -> Path:
    """Where claims.md and its images are written."""
    return (
        ROOT / "docs" / "results"
        if design.name == "full"
        else ROOT / "runs" / f"claims-{design.name}"
    )


def timed(cell: Cell) -> Record:
    """A cell's record, its processor and wall time, and the commit it was run at."""
    start, cpu_start = time.perf_counter(), time.process_time()
    record = do(cell)
    times = {"cpu_s": time.process_time() - cpu_start, "wall_s": time.perf_counter() - start}
    return {**record, **times, "commit": commit()}


@cache
def commit() -> str | None:
    """Commit of the checkout when this process first asked."""
    found: str | None = environment()["commit"]
    return found


def complete(work: list[Cell], path: Path, num_workers: int) -> dict[str, Record]:
    """Do what is not done yet, one process a core; every record is on disk as soon as it exists."""
    records = finished(path)
    todo = [cell for cell in work if cell.key not in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not todo:
        return records
    start = time.monotonic()
    end_line(path)
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_workers) as pool, path.open("a", encoding="utf-8") as file:
        for number, record in enumerate(pool.imap_unordered(timed, todo), 1):
            file.write(json.dumps(record) + "\n")
            file.flush()
            records[record["key"]] = record
            left = (time.monotonic() - start) / number * (len(todo) - number)
            print(
                f"{number}/{len(todo)} {record['kind']} {record['setting']} {record['arm']} "
                f"seed {record['seed']}: {record['cpu_s']:.1f} s, {left / 60:.1f} min left",
                flush=True,
            )
    return records


def tuned(records: dict[str, Record], design: Design) -> Tuning:
    """By setting and loss: the chosen rate of the all-token arm, and the grid.

    It is the rate with the lowest reverse KL, which that arm descends, on held-out prompts that no
    arm is judged on. In a setting that is tuned by forward KL it is the lowest of that, among the
    rates whose worst seed keeps four fifths of the accuracy of the grid's best worst seed.
    """
    table: dict[tuple[str, str, float], list[Record]] = {}
    for cell in tuning_cells(design):
        table.setdefault((cell.setting, cell.arm, cell.learning_rate), []).append(records[cell.key])
    return {
        setting: {loss: _best(table, setting, TUNED[loss]) for loss in losses_of(arms)}
        for setting, arms in design.arms.items()
    }


def _best(
    table: dict[tuple[str, str, float], list[Record]], setting: str, arm: str
) -> dict[str, Any]:
    grid = {}
    for rate in GRID:
        mine = table[setting, arm, rate]
        grid[rate] = {m: fmean(r[m] for r in mine) for m in ("reverse_kl", "forward_kl", "mean")}
        grid[rate]["lowest_mean"] = min(record["mean"] for record in mine)
    by = SETTINGS[setting].tuned_by
    least = LEAST_ACCURACY * max(figures["lowest_mean"] for figures in grid.values())
    allowed = [rate for rate in GRID if by == "reverse_kl" or grid[rate]["lowest_mean"] >= least]
    best = min(allowed, key=lambda rate: (grid[rate][by], rate))
    return {
        "chosen": best,
        "by": by,
        "grid": {str(rate): figures for rate, figures in grid.items()},
    }


def chosen_rates(tuning: Tuning, factor: float = 1.0) -> Rates:
    """The learning rate of every setting and loss, times a factor."""
    return {
        setting: {loss: factor * entry["chosen"] for loss, entry in losses.items()}
        for setting, losses in tuning.items()
    }


def machine() -> dict[str, Any]:
    """What the figures were obtained on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        **environment(),
        "cpu": names[0] if names else platform.processor(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def core_minutes(records: list[Record]) -> dict[str, float]:
    """What the cells cost: processor time, and wall time with all that others did meanwhile."""
    return {name[:-2]: sum(record[name] for record in records) / 60 for name in TIMES}


def published(records: dict[str, Record], design: Design) -> dict[str, Any]:
    """Everything the page is made from."""
    tuning = tuned(records, design)
    rates = chosen_rates(tuning)
    work = [*tuning_cells(design), *cells(design, rates)]
    found = [records[cell.key] for cell in work if cell.key in records]
    missing = [c for c in work if c.key not in records]
    tables = {
        factor: Table(found, design.sensitivity_seeds, chosen_rates(tuning, factor))
        for factor in sorted({1.0, *SENSITIVITY_FACTORS})
    }
    table = Table(found, design.seeds, rates)
    worth = correlations(table)
    return {
        "environment": machine(),
        "design": {**as_table(design), "num_samples": NUM_SAMPLES},
        "learning_rate": tuning,
        "tuning_seeds": TUNING_SEEDS,
        "not_run": [f"{c.setting}/{c.arm} seed {c.seed} at {c.learning_rate:g}" for c in missing],
        "commits": sorted({str(record["commit"]) for record in found}),
        "source": source(),
        "core_minutes": core_minutes(found),
        "claims": judge(table, worth),
        "arms": summary(table, design),
        "sensitivity": sensitivity({str(factor): t for factor, t in tables.items()}),
        "token_worth": worth,
        "controls": controls(found, design),
        "earlier": json.loads(EARLIER.read_text(encoding="utf-8")),
        "cells": [{k: v for k, v in r.items() if k not in NOT_PUBLISHED} for r in found],
    }


def as_text(results: dict[str, Any]) -> str:
    """JSON with a line a cell."""
    head = json.dumps({k: v for k, v in results.items() if k != "cells"}, indent=1)
    lines = ",\n  ".join(json.dumps(cell) for cell in results["cells"])
    return f'{head[:-2]},\n "cells": [\n  {lines}\n ]\n}}\n'


def estimated_minutes(work: list[Cell], recorded: list[Record]) -> float:
    """Core-minutes of cells by what such cells took when the published JSON was made.

    Cells of a setting that has no record count by their rollouts, at what one took on average.
    """
    of: dict[tuple[str, str], list[float]] = {}
    for record in recorded:
        of.setdefault((record["kind"], record["setting"]), []).append(record["cpu_s"])
    known = [r for r in recorded if r["kind"] == "arm" and r["setting"] in SETTINGS]
    num_rollouts = sum(SETTINGS[r["setting"]].num_rollouts for r in known)
    of_rollout = sum(r["cpu_s"] for r in known) / max(num_rollouts, 1)

    def seconds(cell: Cell) -> float:
        kind = "arm" if cell.kind == "control" else cell.kind
        if found := of.get((kind, cell.setting)):
            return fmean(found)
        return SETTINGS[cell.setting].num_rollouts * of_rollout if cell.setting else 0.0

    return sum(map(seconds, work)) / 60


def say_estimate(work: list[Cell], design: Design) -> None:
    """Print what the cells that are left will take."""
    records = finished(working_file(design))
    todo = [cell for cell in work if cell.key not in records]
    path = results_file(DESIGNS["full"])
    recorded = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []
    print(
        f"{len(todo)} of {len(work)} cells to run, about {estimated_minutes(todo, recorded):.0f} "
        f"core-minutes by earlier runs on an idle machine (limit {LIMIT_CORE_MINUTES})",
        flush=True,
    )


def publish(records: dict[str, Record], design: Design) -> None:
    """Write the JSON; what a run before this one measured is replaced."""
    results_file(design).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(results_file(design), as_text(published(records, design)))
    print(f"written to {results_file(design)}")


def make_page(design: Design) -> None:
    """Write claims.md, its figures and why.md from the published JSON alone."""
    from claims_figures import draw_all
    from claims_page import page
    from claims_why import why_page

    results = json.loads(results_file(design).read_text(encoding="utf-8"))
    docs = page_folder(design)
    (docs / "images").mkdir(parents=True, exist_ok=True)
    draw_all(results, docs / "images")
    of_models = json.loads(OF_MODELS.read_text(encoding="utf-8")).get("choices", {})
    pages = {"claims.md": page(results), "why.md": why_page(results, of_models)}
    for name, text in pages.items():
        write_atomically(docs / name, text)
        print(f"written to {docs / name}")


def verify(design: Design, count: int, num_workers: int) -> bool:
    """Run random cells of the published JSON again; whether every number is the same."""
    results = json.loads(results_file(design).read_text(encoding="utf-8"))
    if results["source"] != source():
        print(f"the source is {source()}; the results are of {results['source']}")
    old = random.sample(results["cells"], min(count, len(results["cells"])))
    num_different = 0
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        for done, (before, again) in enumerate(pool.imap_unordered(_repeated, old), 1):
            names = differing(before, again, TIMES)
            num_different += bool(names)
            what = f"differs in {', '.join(names)}" if names else "same"
            print(f"{done}/{len(old)} {again['key']}: {what}", flush=True)
    print(f"{len(old) - num_different} of {len(old)} cells have the same numbers")
    return num_different == 0


def _repeated(published: Record) -> tuple[Record, Record]:
    """A published cell's record, and that of the same cell run again."""
    return published, do(Cell(**{field.name: published[field.name] for field in fields(Cell)}))


def _count(text: str) -> int:
    """A number of cells; more than there are for "all"."""
    return sys.maxsize if text == "all" else int(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    is_quick = os.environ.get("CLAIMS") == "quick"
    parser.add_argument("--quick", action="store_true", default=is_quick)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--judge", action="store_true", help="JSON and page from finished cells")
    parser.add_argument("--page", action="store_true", help="page and figures from the JSON only")
    parser.add_argument(
        "--verify", type=_count, metavar="N", help="run N random cells, or all, again"
    )
    return parser.parse_args()


def _require(is_met: bool, why_not: str) -> None:
    if not is_met:
        sys.exit(f"{why_not} Run without --judge and --page first.")


def main() -> None:
    """Run, judge, draw, write; or the part that was asked for."""
    arguments = _arguments()
    design = DESIGNS["quick" if arguments.quick else "full"]
    if arguments.verify:
        sys.exit(0 if verify(design, arguments.verify, arguments.workers) else 1)
    if arguments.page:
        _require(results_file(design).exists(), f"There is no {results_file(design)}.")
    else:
        path = working_file(design)
        if arguments.judge:
            records, tuning = finished(path), tuning_cells(design)
            found = sum(cell.key in records for cell in tuning)
            what = f"{path} has {found} of the {len(tuning)} cells that rates are tuned by, of"
            _require(found == len(tuning), f"{what} source {source()}: nothing can be judged.")
        else:
            guess = dict.fromkeys(design.arms, dict.fromkeys(TUNED, GRID[0]))
            say_estimate([*tuning_cells(design), *cells(design, guess)], design)
            records = complete(tuning_cells(design), path, arguments.workers)
            rates = chosen_rates(tuned(records, design))
            print(f"learning rates: {rates}")
            say_estimate(cells(design, rates), design)
            complete(cells(design, rates), path, arguments.workers)
            records = finished(path)
        publish(records, design)
    make_page(design)


if __name__ == "__main__":
    main()
