"""`tutelage report`: a run's report as one HTML file, or its plots as files."""

from __future__ import annotations

import argparse

from tutelage.report.run_page import write_report


def run(arguments: argparse.Namespace) -> int:
    """Write the report or the plots, and print where they are."""
    if arguments.figures is None:
        print(write_report(arguments.run_folder, arguments.out))
        return 0
    from tutelage.report.figures import write_figures

    print(*write_figures(arguments.run_folder, arguments.figures), sep="\n")
    return 0
