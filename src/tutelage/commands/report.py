"""`tutelage report`: a run's report as one HTML file, or its plots as files."""

from __future__ import annotations

import argparse
from functools import partial

from tutelage.errors import ConfigError
from tutelage.report.follow import follow
from tutelage.report.run_page import write_report


def run(arguments: argparse.Namespace) -> int:
    """Write the report or the plots, and print where they are."""
    if arguments.figures is None:
        print(_page(arguments))
        return 0
    if arguments.follow:
        raise ConfigError("--figures draws once and follows no run. Leave --follow out.")
    from tutelage.report.figures import write_figures

    print(*write_figures(arguments.run_folder, arguments.figures), sep="\n")
    return 0


def _page(arguments: argparse.Namespace) -> str:
    folder = arguments.run_folder
    if arguments.follow:
        try:
            return str(follow([folder], partial(write_report, folder, arguments.out)))
        except KeyboardInterrupt:
            print()  # behind the ^C of a terminal; what follows no run loads itself no more
    return str(write_report(folder, arguments.out))
