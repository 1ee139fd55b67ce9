"""`tutelage score`: statistics of every token as JSON lines, a table, or a page."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tutelage.commands.processes import sharing
from tutelage.config.parse import to_table
from tutelage.config.schema import Config
from tutelage.errors import ConfigError, remedy
from tutelage.report.run_page import write_score_page
from tutelage.train.score_request import ScoreRequest
from tutelage.train.snapshot import score_for_page
from tutelage.train.token_scores import Scores, score


def run(config: Config, arguments: argparse.Namespace) -> int:
    """Score tokens and write them to every place that was asked for."""
    request = _request(arguments)
    with sharing(config.device, config.process_timeout_s) as processes:
        told = (processes.on_phase, processes.log, processes.shares)
        lines: list[dict[str, Any]] = []
        if arguments.html is None:
            scores = score(config, request, *told)
        else:
            scores, lines = score_for_page(config, request, *told)
        processes.on_phase("")
        if processes.shares.is_main:
            _write(arguments, config, request, scores, lines)
    return 0


def _write(
    arguments: argparse.Namespace,
    config: Config,
    request: ScoreRequest,
    scores: Scores,
    lines: list[dict[str, Any]],
) -> None:
    to_stdout = arguments.out == "-" or (arguments.out is None and arguments.html is None)
    if arguments.html is not None:
        _write_page(arguments, config, lines, request.keep)
    if to_stdout:
        for row in scores.rows():
            print(json.dumps(row))
    print(scores.table(), file=sys.stderr if to_stdout else sys.stdout)
    if arguments.out not in (None, "-"):
        out = Path(arguments.out)
        _write_rows(out, scores)
        print(f"{len(scores.tokens)} tokens written to {out}")


def _request(arguments: argparse.Namespace) -> ScoreRequest:
    rules = tuple(rule.strip() for rule in arguments.rules.split(",") if rule.strip())
    if arguments.keep is not None and not rules and arguments.html is None:
        raise ConfigError(
            f"--keep is the budget of --rules, got {arguments.keep} without rules. Add --rules."
        )
    chosen = {name: vars(arguments)[name] for name in ("num_prompts", "keep", "completions")}
    given = {name: value for name, value in chosen.items() if value is not None}
    return ScoreRequest(rules=rules, **given)


def _write_rows(out: Path, scores: Scores) -> None:
    try:
        with out.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in scores.rows())
    except OSError as error:
        if not isinstance(error, FileExistsError):
            with suppress(OSError):
                out.unlink()  # a part of it would be in the way of the next try
        raise ConfigError(
            f"--out {out} cannot be written: {error.strerror}. "
            + remedy(error, "Name another file.")
        ) from None


def _write_page(
    arguments: argparse.Namespace, config: Config, lines: list[dict[str, Any]], keep: float
) -> None:
    table = json.loads(json.dumps(to_table(config)))
    page = write_score_page(lines, table, keep, arguments.html)
    print(f"page: {page}", file=sys.stderr if arguments.out == "-" else sys.stdout)
