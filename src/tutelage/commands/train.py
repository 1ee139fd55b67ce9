"""`tutelage train`: train a student, or continue an interrupted run, and write its report."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from tutelage.commands.options import INTERRUPTED
from tutelage.commands.progress import Reporter
from tutelage.config.schema import Config, FileData
from tutelage.config.verifiers import VerifiersData
from tutelage.report.run_page import write_report
from tutelage.setup.run_folder import RunFolder, describe_contents
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
        reporter.phase("writing the report")
        path = write_report(result.folder)
        reporter.phase("")
    if not arguments.json:
        print(f"report: {path}")
        print(describe_contents(result.folder))
        manifest = RunFolder(result.folder, is_writer=False).read_manifest() or {}
        if (verdict := manifest.get("verdict")) is not None:
            found = (verdict["word"], config, arguments.config, result.folder)
            print(f"next: {next_command(*found, arguments.overrides)}")
    return 0


def next_command(
    word: str, config: Config, name: str, folder: Path, overrides: Sequence[str] = ()
) -> str:
    """The command that a run's verdict asks for.

    Args:
        word: of the verdict.
        config: the run's.
        name: of its configuration's file.
        folder: of the run.
        overrides: that its command had; another run has them too, in a folder of its own.
    """

    def again(key: str, value: object) -> str:
        replaced = (key, "out")
        kept = [text for text in overrides if text.partition("=")[0].strip() not in replaced]
        place = [f"out={config.out}-2"] if config.out else []
        return shlex.join(["tutelage", "train", name, *kept, f"{key}={value}", *place])

    if word == "cut off":
        return again("sampling.max_new_tokens", 2 * config.sampling.max_new_tokens)
    if word == "worse":
        return again("optimizer.learning_rate", f"{config.optimizer.learning_rate / 3:.2g}")
    if word == "too few problems to say":
        measured, there_are = config.evaluation.num_problems, _num_held_out(config)
        more = max(64, 4 * measured)
        more = more if there_are is None else min(more, there_are)
        if more > measured:
            command = shlex.join(["tutelage", "eval", str(folder), "--suite", "held-out"])
            return f"{command} --num-problems {more}"
    if word in ("unchanged", "too few problems to say"):
        return again("num_steps", 4 * config.num_steps)
    return shlex.join(["tutelage", "eval", str(folder), "--suite", "held-out"])


def _num_held_out(config: Config) -> int | None:
    """How many prompts are held out; None where there are as many as one likes."""
    data = config.data
    return data.num_held_out if isinstance(data, FileData | VerifiersData) else None
