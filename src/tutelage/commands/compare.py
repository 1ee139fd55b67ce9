"""`tutelage compare`: runs, or evaluations, side by side."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from tutelage.config.parse import current_table
from tutelage.report.compare_evaluations import compare_evaluations, is_evaluation
from tutelage.report.compare_page import write_comparison, write_evaluations
from tutelage.report.compare_runs import compare_records
from tutelage.report.records import read_run


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison, and write it as a page if one was asked for."""
    folders, page = arguments.run_folders, arguments.html
    comparison: Any
    if any(map(is_evaluation, folders)):
        comparison = compare_evaluations(folders)
        if page is not None:
            write_evaluations(comparison, page)
    else:
        # The configuration of an earlier version is completed: later keys are no difference.
        records = [read_run(folder).with_config(current_table) for folder in folders]
        comparison = compare_records(records)
        if page is not None:
            write_comparison(comparison, records, page)
    print(json.dumps(comparison.as_dict()) if arguments.json else comparison.as_text())
    if page is not None:
        print(f"page: {page}", file=sys.stderr if arguments.json else sys.stdout)
    return 0
