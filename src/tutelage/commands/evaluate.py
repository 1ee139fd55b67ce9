"""`tutelage eval` and `tutelage sample`: from options to a request, from results to text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

from tutelage.commands.processes import sharing
from tutelage.evaluation.evaluate import Evaluation, evaluate
from tutelage.evaluation.request import EvaluationRequest

_ABOUT_OUTPUT = ("command", "json")


def run(arguments: argparse.Namespace) -> int:
    """Print the accuracies of a model, or the table of a suite."""
    return _evaluate(arguments, partial(_print_scores, as_json=arguments.json))


def run_sample(arguments: argparse.Namespace) -> int:
    """Print completions with their verdicts."""
    return _evaluate(arguments, partial(_print_completions, as_json=arguments.json))


def _print_scores(found: Evaluation, as_json: bool) -> None:
    scores = found.results[0].scores
    if as_json:
        print(json.dumps(scores.summary() if found.folder is None else found.record))
        return
    if found.folder is not None:
        print(f"{found.table}\n\nsamples and tables: {found.folder}")
        return
    named = {"mean": scores.mean_at_k, "pass": scores.pass_at_k, "maj": scores.maj_at_k}
    for title, interval in named.items():
        if interval is not None:
            print(
                f"{title}@{scores.num_samples}  {100 * interval.value:.1f} %  "
                f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
            )
    print(f"{scores.num_problems} problems, {scores.num_samples} samples each; {found.conditions}")
    print("no samples were saved: --suite saves them, also those of a file")


def _print_completions(found: Evaluation, as_json: bool) -> None:
    (result,) = found.results
    marks = {True: "right", False: "wrong", None: "ungraded"}
    for row in result.rows:
        record = {"prompt_id": row["prompt_id"], "sample": row["sample"]}
        if as_json:
            shown = record | {"text": row["completion"], "is_correct": row["is_correct"]}
            shown |= {"is_truncated": row["is_truncated"]}
            print(json.dumps(shown))
        else:
            mark = marks[row["is_correct"]]
            print(f"[{row['prompt_id']} #{row['sample']}, {mark}]\n{row['completion']}\n")
    if not as_json:
        scores = result.scores
        print(f"{scores.num_problems} prompts, {scores.num_samples} samples each; "
              f"{found.conditions}")  # fmt: skip


def _evaluate(arguments: argparse.Namespace, show: Callable[[Evaluation], None]) -> int:
    """Options that were not given keep the request's defaults; the main process shows results."""
    given = {
        name: value
        for name, value in vars(arguments).items()
        if value is not None and name not in _ABOUT_OUTPUT
    }
    request = EvaluationRequest(**given)
    with sharing(request.device or "auto", is_saved=bool(request.suite)) as processes:
        found = evaluate(request, processes.on_phase, processes.log, processes.shares)
        processes.on_phase("")
        if processes.shares.is_main:
            show(found)
    return 0
