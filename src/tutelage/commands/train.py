"""`tutelage train`: train a student, or continue an interrupted run, and write its report."""

from __future__ import annotations

import argparse
from pathlib import Path

from tutelage.commands.options import INTERRUPTED
from tutelage.commands.progress import Reporter
from tutelage.config.schema import Config
from tutelage.report.run_page import write_report
from tutelage.setup.run_folder import describe_contents
from tutelage.train.loop import train
from tutelage.train.peers import Peers


def run(config: Config, arguments: argparse.Namespace, peers: Peers) -> int:
    """Train; returns `INTERRUPTED` if a signal stopped the run."""
    with Reporter(config.num_steps, as_json=arguments.json) as reporter:
        result = train(
            config,
            Path(arguments.config).stem,
            tuple(arguments.allow_change),
            reporter.log,
            reporter.on_step,
            reporter.phase,
            peers,
        )
    if not result.is_finished:
        return INTERRUPTED
    if not result.is_writer:
        return 0
    path = write_report(result.folder)
    if not arguments.json:
        print(f"report: {path}")
        print(describe_contents(result.folder))
    return 0
