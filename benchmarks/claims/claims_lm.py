"""Which rules win on a real language model? Seeds, tuned rates, controls, intervals, verdicts.

    python scripts/build_lm_pair.py --task stories --out pairs/stories  # once, see there
    python benchmarks/claims/claims_lm.py --pair pairs/stories  # a CPU; continues where it stopped
    python benchmarks/claims/claims_lm.py --pair pairs/gsm8k --device cuda --minutes 9
    python benchmarks/claims/claims_lm.py --pair pairs/stories --cells exact/gap-20 stored
    python benchmarks/claims/claims_lm.py --pair pairs/stories --choices  # tokens that rules keep
    python benchmarks/claims/claims_lm.py --pair pairs/stories --verify 2  # cells again, compared
    python benchmarks/claims/claims_lm.py --merge other.json  # cells from another machine
    python benchmarks/claims/claims_lm.py --page  # verdicts and page again, from the JSON

A cell is one run of one arm with one seed, measured on the pair's test. The JSON is written after
every cell and holds all that the page, the verdicts and a later run need. A cell that other code
made is run again unless `--any-source` is given, one of another configuration always; the page says
how many versions there are.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

from claims_file import differing
from claims_lm_design import (
    SCALES,
    Cell,
    Pair,
    Scale,
    as_table,
    cell_of,
    cells,
    is_current,
    source,
    tuning_cells,
)
from claims_lm_page import page
from claims_lm_rules import LOSSES
from claims_lm_table import Place, Record, place_of, rates_of, tuned
from claims_lm_work import CHOICE_PROMPTS, choices_of, do
from tutelage.files.atomic import write_atomically
from tutelage.setup.run_folder import environment

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "claims-lm.json"
PAGE = ROOT / "docs" / "results" / "claims-lm.md"
CHOOSING = ("random-10", "soft_or-20", "gap-20", "opsa-20")
"""Arms whose choices are recorded before and after training."""
NOT_COMPARED = ("source", "environment", "train_s", "measure_s")
"""What of a cell may differ when it is run again."""
FACTS = ("task", "num_texts", "minutes", "parameters", "test")
"""What the JSON keeps of the cards of a pair."""


def main() -> None:
    given = _options().parse_args()
    results = read(given.result)
    for other in given.merge:
        merge(results, read(other))
    if given.verify:
        sys.exit(0 if verify(results, given) else 1)
    if given.pair is not None and given.choices:
        record_choices(results, given)
    elif given.pair is not None:
        run(results, given)
    write(given.result, results)
    write_atomically(given.page_file, page(results))
    print(f"{given.result}\n{given.page_file}")


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--pair", type=Path, help="folder of scripts/build_lm_pair.py")
    options.add_argument(
        "--others", type=Path, help="JSON lines with other problems, for forgetting"
    )
    options.add_argument("--device", default="cpu")
    options.add_argument("--scale", choices=SCALES, help="default: cpu on a CPU, gpu elsewhere")
    options.add_argument("--cells", nargs="*", default=[], help="only names with one of these in")
    options.add_argument("--losses", nargs="*", choices=LOSSES, default=list(LOSSES))
    options.add_argument("--minutes", type=float, default=float("inf"), help="then no more cells")
    options.add_argument("--list", action="store_true", help="name the cells that are left")
    options.add_argument("--any-source", action="store_true", help="keep cells of other code")
    options.add_argument("--choices", action="store_true", help="record which tokens rules keep")
    options.add_argument("--verify", type=int, default=0, metavar="N", help="run N cells again")
    options.add_argument("--merge", type=Path, nargs="*", default=[])
    options.add_argument("--page", action="store_true", help="nothing but the page (as no --pair)")
    options.add_argument("--result", type=Path, default=RESULT)
    options.add_argument("--page-file", type=Path, default=PAGE)
    return options


# --- the file -------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """What earlier runs left."""
    if not path.exists():
        return {"pairs": {}, "sizes": {}, "environments": {}, "cells": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, results: dict[str, Any]) -> None:
    """JSON with a line a cell."""
    head = json.dumps({k: v for k, v in results.items() if k != "cells"}, indent=1)
    lines = ",\n  ".join(json.dumps(cell) for cell in results["cells"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f'{head[:-2]},\n "cells": [\n  {lines}\n ]\n}}\n')


def merge(results: dict[str, Any], other: dict[str, Any]) -> None:
    """Take over what another machine measured; of one cell that of `other`.

    A cell that the present code and configuration made stays where that of `other` is not so.
    """
    for name in ("pairs", "sizes", "environments"):
        results[name] |= other[name]
    if found := results.get("choices", {}) | other.get("choices", {}):
        results["choices"] = found
    present = {_identity(r) for r in results["cells"] if _is_present(r)}
    for record in other["cells"]:
        if _identity(record) not in present or _is_present(record):
            keep(results, record)


def _is_present(record: Record) -> bool:
    return record["source"] == source() and is_current(record)


def keep(results: dict[str, Any], record: Record) -> None:
    """Add a cell, in place of an earlier one of its name, kind of device and pair.

    The earlier one may have been run in another configuration: the two are not one setting's.
    """
    others = [r for r in results["cells"] if _identity(r) != _identity(record)]
    results["cells"] = [*others, record]


def _identity(record: Record) -> tuple[str, ...]:
    return cell_of(record).name, *place_of(record)


# --- running --------------------------------------------------------------------------------------


def run(results: dict[str, Any], given: argparse.Namespace) -> None:
    """Run what is left of tuning and arms until the time is over; the file is always whole."""
    pair = _pair(given)
    scale = SCALES[given.scale or ("cpu" if given.device == "cpu" else "gpu")]
    results["pairs"][pair.digest()] = facts_of(pair, scale.num_problems)
    results["sizes"][scale.name] = as_table(scale)
    machine = environment()
    results["environments"][name := name_of(machine)] = machine
    start, longest = time.monotonic(), 0.0
    while left := todo(results, pair, scale, given):
        if given.list:
            print("\n".join(cell.name for cell in left))
            return
        before = time.monotonic()
        if before - start + longest > 60 * given.minutes:
            print(f"{len(left)} cells are left; the same command continues.")
            return
        record = {**do(left[0], pair, given.device), "environment": name}
        gc.collect()  # models in cycles are gigabytes that the collector takes for a few objects
        longest = max(longest, time.monotonic() - before)
        keep(results, record)
        write(given.result, results)
        print(
            f"{left[0].name}: accuracy {100 * record['mean']:.1f} %, "
            f"reverse KL {record['reverse_kl']:.4f}, training {record['train_s']} s, "
            f"measuring {record['measure_s']} s; {len(left) - 1} left",
            flush=True,
        )


def verify(results: dict[str, Any], given: argparse.Namespace) -> bool:
    """Run random cells of the pair again, or those of `--cells`; whether every number is equal."""
    if given.pair is None:
        raise SystemExit("--verify needs the pair of the cells. Give --pair FOLDER.")
    pair, device = _pair(given), given.device.split(":")[0]
    mine = [
        record
        for record in results["cells"]
        if place_of(record)[2:] == (device, pair.digest())
        and is_current(record)
        and _is_asked(cell_of(record), given)
    ]
    if not mine:
        raise SystemExit(
            f"{given.result} has no cell of the pair {pair.digest()} on {device}. Another build of "
            "the models, or another --others, is another pair."
        )
    chosen = random.sample(mine, min(given.verify, len(mine)))
    num_equal = 0
    for before in chosen:
        again = do(cell_of(before), pair, given.device)
        names = differing(before, again, NOT_COMPARED)
        num_equal += not names
        print(f"{cell_of(before).name}: {'differs in ' + ', '.join(names) if names else 'equal'}")
        gc.collect()
    print(f"{num_equal} of {len(chosen)} cells have the same numbers")
    return num_equal == len(chosen)


def record_choices(results: dict[str, Any], given: argparse.Namespace) -> None:
    """Which tokens rules keep, and how the choices of trained arms move: docs/results/why.md."""
    pair = _pair(given)
    scale = SCALES[given.scale or ("cpu" if given.device == "cpu" else "gpu")]
    place: Place = (pair.task, scale.name, given.device.split(":")[0], pair.digest())
    rates = rates_of(tuned(_known(results, given), place))
    found = {
        cell.arm: cell
        for cell in cells(scale, pair.task, rates)
        if cell.seed == scale.seeds[0] and cell.loss in ("exact", "own") and cell.arm in CHOOSING
    }
    if not found:
        raise SystemExit("No learning rate is tuned yet. Run the cells of `tune` first.")
    machine = environment()
    results["environments"][name := name_of(machine)] = machine
    results["choices"] = results.get("choices", {}) | {
        "/".join(place): {
            "task": pair.task,
            "num_prompts": CHOICE_PROMPTS,
            "seed": scale.seeds[0],
            "rates": rates,
            "source": source(),
            "environment": name,
            "arms": choices_of(list(found.values()), pair, given.device),
        }
    }


def _known(results: dict[str, Any], given: argparse.Namespace) -> list[Record]:
    """Cells of the present configuration and, unless any will do, of the present code."""
    return [
        record
        for record in results["cells"]
        if (given.any_source or record["source"] == source()) and is_current(record)
    ]


def name_of(machine: dict[str, Any]) -> str:
    """A short hash of an environment: versions of the libraries, hardware and commit."""
    text = json.dumps(machine, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _pair(given: argparse.Namespace) -> Pair:
    path = given.pair / "teacher.json"
    if not path.exists():
        raise SystemExit(f"{given.pair} has no teacher.json. Fill it: scripts/build_lm_pair.py.")
    return Pair(given.pair, json.loads(path.read_text(encoding="utf-8"))["task"], given.others)


def facts_of(pair: Pair, num_problems: int) -> dict[str, Any]:
    """What is published of both models."""
    found: dict[str, Any] = {}
    for who in ("teacher", "student"):
        facts = json.loads((pair.folder / f"{who}.json").read_text(encoding="utf-8"))
        found[who] = {name: facts[name] for name in (*FACTS, "recipe", "machine")}
    if pair.task == "stories":
        found["shared"] = shared(pair, found["teacher"]["num_texts"], num_problems)
    return found


def shared(pair: Pair, num_texts: int, num_problems: int) -> dict[str, int]:
    """Judged stories that have numbers and signs of one that rates are tuned on, or of a text that
    the teacher was trained on; their words differ from the latter's."""

    def asked(split: str) -> list[tuple[str, ...]]:
        lines = (pair.folder / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        stories = map(json.loads, lines)
        return [(story["signs"], *re.findall("[0-9]+", story["prompt"])) for story in stories]

    test = asked("test")
    judged = test[:num_problems]
    others = {"tuning": test[-num_problems:], "teacher": asked("train")[:num_texts]}
    kept = {name: set(stories) for name, stories in others.items()}
    return {name: sum(one in stories for one in judged) for name, stories in kept.items()}


def _is_asked(cell: Cell, given: argparse.Namespace) -> bool:
    """Whether `--cells` names a cell, or nothing."""
    return not given.cells or any(text in cell.name for text in given.cells)


def todo(
    results: dict[str, Any], pair: Pair, scale: Scale, given: argparse.Namespace
) -> list[Cell]:
    """Cells that are not there yet, those of tuning first.

    A cell of another configuration is not there, and chooses no learning rate.
    """
    known = _known(results, given)
    done = {record["key"] for record in known}
    place: Place = (pair.task, scale.name, given.device.split(":")[0], pair.digest())
    rates = rates_of(tuned(known, place))
    work = [
        *(cell for cell in tuning_cells(scale, pair.task) if cell.loss not in rates),
        *(cell for cell in cells(scale, pair.task, rates)),
    ]
    wanted = [*given.losses, *(["own"] if "sampled" in given.losses else [])]
    return [
        cell
        for cell in work
        if cell.loss in wanted
        and _is_asked(cell, given)
        and cell.key(pair, given.device) not in done
    ]


if __name__ == "__main__":
    main()
