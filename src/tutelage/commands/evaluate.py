"""`tutelage eval` and `tutelage sample`: from options to a request, from results to text."""

from __future__ import annotations

import argparse
import json

from tutelage.commands.processes import sharing
from tutelage.evaluation.evaluate import Evaluation, evaluate
from tutelage.evaluation.request import EvaluationRequest

_ABOUT_OUTPUT = ("command", "json")


def run(arguments: argparse.Namespace) -> int:
    """Print the accuracies of a model, or the table of a suite."""
    found = _evaluate(arguments)
    if found is None:
        return 0
    scores = found.results[0].scores
    if arguments.json:
        print(json.dumps(scores.summary() if found.folder is None else found.record))
        return 0
    if found.folder is not None:
        print(f"{found.table}\n\nsamples and tables: {found.folder}")
        return 0
    named = {"mean": scores.mean_at_k, "pass": scores.pass_at_k, "maj": scores.maj_at_k}
    for title, interval in named.items():
        if interval is not None:
            print(
                f"{title}@{scores.num_samples}  {100 * interval.value:.1f} %  "
                f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
            )
    print(f"{scores.num_problems} problems, {scores.num_samples} samples each; {found.conditions}")
    print("no samples were saved: --suite saves them, also those of a file")
    return 0


def run_sample(arguments: argparse.Namespace) -> int:
    """Print completions with their verdicts."""
    found = _evaluate(arguments)
    if found is None:
        return 0
    (result,) = found.results
    marks = {True: "right", False: "wrong", None: "ungraded"}
    for row in result.rows:
        record = {"prompt_id": row["prompt_id"], "sample": row["sample"]}
        if arguments.json:
            shown = record | {"text": row["completion"], "is_correct": row["is_correct"]}
            print(json.dumps(shown))
        else:
            mark = marks[row["is_correct"]]
            print(f"[{row['prompt_id']} #{row['sample']}, {mark}]\n{row['completion']}\n")
    if not arguments.json:
        scores = result.scores
        print(f"{scores.num_problems} prompts, {scores.num_samples} samples each; "
              f"{found.conditions}")  # fmt: skip
    return 0


def _evaluate(arguments: argparse.Namespace) -> Evaluation | None:
    """Options that were not given keep the request's defaults; None in all processes but one."""
    given = {
        name: value
        for name, value in vars(arguments).items()
        if value is not None and name not in _ABOUT_OUTPUT
    }
    request = EvaluationRequest(**given)
    with sharing(request.device or "auto", is_saved=bool(request.suite)) as processes:
        found = evaluate(request, processes.on_phase, processes.log, processes.shares)
        return found if processes.shares.is_main else None
