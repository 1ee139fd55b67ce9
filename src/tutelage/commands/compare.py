"""`tutelage compare`: runs, or evaluations, side by side."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tutelage.config.parse import current_table
from tutelage.errors import ConfigError
from tutelage.report.compare_evaluations import compare_evaluations, is_evaluation
from tutelage.report.compare_page import write_comparison, write_evaluations
from tutelage.report.compare_runs import Comparison, compare_records
from tutelage.report.follow import follow
from tutelage.report.records import read_run


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison, and write it as a page if one was asked for."""
    folders, page = arguments.run_folders, arguments.html
    log = partial(print, file=sys.stderr if arguments.json else sys.stdout)
    are_evaluations = any(map(is_evaluation, folders))
    if arguments.follow:
        if page is None:
            raise ConfigError("--follow writes a page. Name it with --html FILE.")
        if are_evaluations or len(folders) < 2:
            got = "evaluations" if are_evaluations else f"{len(folders)} run"
            raise ConfigError(f"--follow needs at least two runs, got {got}. Leave --follow out.")
        try:
            follow(folders, partial(write_page, folders, page), log)
        except KeyboardInterrupt:
            log()  # behind the ^C of a terminal; the comparison is made once more below
    comparison: Any
    if are_evaluations:
        comparison = compare_evaluations(folders)
        if page is not None:
            write_evaluations(comparison, page)
    else:
        comparison = _compare_runs(folders, page)
    print(json.dumps(comparison.as_dict()) if arguments.json else comparison.as_text())
    if page is not None:
        log(f"page: {page}")
    return 0


def _compare_runs(
    folders: list[Path], page: Path | None, reload_s: int | None = None
) -> Comparison:
    # The configuration of an earlier version is completed: later keys are no difference.
    records = [read_run(folder).with_config(current_table) for folder in folders]
    comparison = compare_records(records)
    if page is not None:
        write_comparison(comparison, records, page, reload_s)
    return comparison


def write_page(folders: list[Path], page: Path, reload_s: int | None) -> Path:
    """Compare runs on a page that loads itself again after so many seconds, if any."""
    _compare_runs(folders, page, reload_s)
    return page
