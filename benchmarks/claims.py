"""Which claims about TIP and EOPD hold on the embedded task? Seeds, controls, intervals, verdicts.

    python benchmarks/claims.py              # all arms, five seeds; continues where it stopped
    python benchmarks/claims.py --quick      # fewer arms, two seeds: a check, not evidence
    python benchmarks/claims.py --judge      # tables and verdicts again, from finished cells
    python benchmarks/claims.py --page       # docs/claims.md and figures again, from the JSON
    python benchmarks/claims.py --verify 4   # run four random cells again and compare exactly

Every finished cell (setting, arm, seed) is a line of runs/claims-NAME.jsonl; the published JSON,
figures and page follow from these lines.
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
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from claims_design import (
    DESIGNS,
    GRID,
    TUNING_SEEDS,
    Cell,
    Design,
    as_table,
    cells,
    tuning_cells,
)
from claims_table import Record, Table, as_list, correlations, summary
from claims_verdicts import judge
from claims_work import do
from tutelage.run.folder import environment, write_atomically

ROOT = Path(__file__).resolve().parents[1]
NOT_PUBLISHED = ("problems", "tokens", "seconds", "commit")
"""What the JSON leaves out of a cell: one number a problem or token, and what is noted once."""


def working_file(design: Design) -> Path:
    """Where finished cells are kept."""
    return ROOT / "runs" / f"claims-{design.name}.jsonl"


def results_file(design: Design) -> Path:
    """The published JSON."""
    return ROOT / "benchmarks" / "results" / f"claims-{design.name}.json"


def finished(path: Path) -> dict[str, Record]:
    """Records of finished cells by key; a line torn by an interruption is left out."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("}\n")]
    return {record["key"]: record for record in records}


def timed(cell: Cell) -> Record:
    """A cell's record, the seconds it took and the commit it was run at."""
    start = time.perf_counter()
    record = do(cell)
    return {**record, "seconds": time.perf_counter() - start, "commit": commit()}


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
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_workers) as pool, path.open("a", encoding="utf-8") as file:
        for number, record in enumerate(pool.imap_unordered(timed, todo), 1):
            file.write(json.dumps(record) + "\n")
            file.flush()
            records[record["key"]] = record
            left = (time.monotonic() - start) / number * (len(todo) - number)
            print(
                f"{number}/{len(todo)} {record['kind']} {record['setting']} {record['arm']} "
                f"seed {record['seed']}: mean@8 {record.get('mean', float('nan')):.3f}, "
                f"{left / 60:.1f} min left",
                flush=True,
            )
    return records


def tuned_rate(records: dict[str, Record], design: Design) -> tuple[float, dict[str, float]]:
    """The learning rate with the highest mean@8 of the all-token arm, and all of the grid."""
    work = tuning_cells(design)
    by_rate = {
        rate: fmean(records[cell.key]["mean"] for cell in work if cell.learning_rate == rate)
        for rate in GRID
    }
    best = max(GRID, key=lambda rate: (by_rate[rate], -rate))
    return best, {str(rate): mean for rate, mean in by_rate.items()}


def sensitivity(records: list[Record], design: Design, rate: float) -> dict[str, dict[str, Any]]:
    """mean@8 of the sensitivity arms at half, once and double the learning rate."""
    found: dict[str, dict[str, Any]] = {}
    for factor in (0.5, 1.0, 2.0):
        table = Table(records, design.sensitivity_seeds, factor * rate)
        found[str(factor)] = {
            arm: as_list(table.interval("overconfident", arm, "mean"))
            for arm in design.sensitivity_arms
            if table.has("overconfident", arm)
        }
    return found


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


def core_minutes(records: list[Record]) -> float:
    """What the cells cost, pauses of the machine included."""
    return sum(record["seconds"] for record in records) / 60


def published(records: dict[str, Record], design: Design) -> dict[str, Any]:
    """Everything the page is made from."""
    rate, grid = tuned_rate(records, design)
    work = [*tuning_cells(design), *cells(design, rate)]
    found = [records[cell.key] for cell in work if cell.key in records]
    missing = {f"{c.setting}/{c.arm} at {c.learning_rate:g}" for c in work if c.key not in records}
    table = Table(found, design.seeds, rate)
    worth = correlations(table)
    return {
        "environment": machine(),
        "design": as_table(design),
        "learning_rate": {"chosen": rate, "mean_at_8": grid, "seeds": TUNING_SEEDS},
        "not_run": sorted(missing),
        "commits": sorted({str(record["commit"]) for record in found}),
        "core_minutes": core_minutes(found),
        "claims": judge(table, worth),
        "arms": summary(table, design),
        "sensitivity": sensitivity(found, design, rate),
        "token_worth": worth,
        "cells": [{k: v for k, v in r.items() if k not in NOT_PUBLISHED} for r in found],
    }


def publish(records: dict[str, Record], design: Design) -> None:
    """Write the JSON; what a run before this one measured is replaced."""
    text = json.dumps(published(records, design), indent=1)
    results_file(design).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(results_file(design), text + "\n")
    print(f"written to {results_file(design)}")


def make_page(design: Design) -> None:
    """Write docs/claims.md and its figures from the published JSON alone."""
    from claims_figures import draw_all
    from claims_page import page

    results = json.loads(results_file(design).read_text(encoding="utf-8"))
    docs = ROOT / "docs" if design.name == "full" else ROOT / "runs" / f"claims-{design.name}"
    (docs / "images").mkdir(parents=True, exist_ok=True)
    draw_all(results, docs / "images")
    write_atomically(docs / "claims.md", page(results))
    print(f"written to {docs / 'claims.md'}")


def verify(design: Design, count: int, num_workers: int) -> bool:
    """Run random cells of the published JSON again; whether every number is the same."""
    results = json.loads(results_file(design).read_text(encoding="utf-8"))
    rate = results["learning_rate"]["chosen"]
    work = {cell.key: cell for cell in (*tuning_cells(design), *cells(design, rate))}
    old = random.sample(results["cells"], min(count, len(results["cells"])))
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        new = pool.map(do, [work[record["key"]] for record in old], chunksize=1)
    is_same = True
    for before, after in zip(old, new, strict=True):
        differing = [name for name, value in before.items() if after[name] != value]
        is_same = is_same and not differing
        print(f"{before['key']}: {'differs in ' + ', '.join(differing) if differing else 'same'}")
    return is_same


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    is_quick = os.environ.get("CLAIMS") == "quick"
    parser.add_argument("--quick", action="store_true", default=is_quick)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--judge", action="store_true", help="JSON and page from finished cells")
    parser.add_argument("--page", action="store_true", help="page and figures from the JSON only")
    parser.add_argument("--verify", type=int, metavar="N", help="run N random cells again")
    return parser.parse_args()


def main() -> None:
    """Run, judge, draw, write; or the part that was asked for."""
    arguments = _arguments()
    design = DESIGNS["quick" if arguments.quick else "full"]
    if arguments.verify:
        sys.exit(0 if verify(design, arguments.verify, arguments.workers) else 1)
    if not arguments.page:
        path = working_file(design)
        if not arguments.judge:
            records = complete(tuning_cells(design), path, arguments.workers)
            rate, grid = tuned_rate(records, design)
            print(f"learning rate {rate}; mean@8 of the grid: {grid}")
            complete(cells(design, rate), path, arguments.workers)
        publish(finished(path), design)
    make_page(design)


if __name__ == "__main__":
    main()
