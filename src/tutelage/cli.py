"""The command line: `tutelage check | train | eval | sample | score | report | compare`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.errors import ConfigError, MissingExtraError, TutelageError, explained, remedy
from tutelage.run.launch import say_once

if TYPE_CHECKING:
    from tutelage.run.config import Config

USER_ERROR = 2
"""Exit code for everything a user can mend."""
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM; the same command continues the run."""

_EXAMPLES = {
    "check": "tutelage check configs/ledger.toml",
    "train": "tutelage train configs/ledger.toml selection.rule=soft_or selection.keep=0.5",
    "eval": "tutelage eval package:tutelage/assets/ledger-teacher --json",
    "sample": "tutelage sample package:tutelage/assets/ledger-teacher --num-prompts 3",
    "score": "tutelage score configs/ledger.toml --rules soft_or,entropy,q3 --out tokens.jsonl",
    "report": "tutelage report runs/ledger-1a2b3c4d",
    "compare": "tutelage compare runs/ledger-1a2b3c4d runs/ledger-5e6f7a8b",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = _parse(argv)
    _quiet_libraries()
    _speak_any_encoding()
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()  # so that a reader who left is noticed here and not at exit
    except TutelageError as error:
        say_once(f"tutelage: {' '.join(str(error).split())}")
        return USER_ERROR
    except KeyboardInterrupt:
        say_once("tutelage: interrupted; the same command continues the run")
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has seen enough
        _close_output()
        return 0
    except OSError as error:
        print(f"tutelage: {explained(error, _has_output_failed())}", file=sys.stderr)
        return USER_ERROR
    return code


def _has_output_failed() -> bool:
    """What could not be written is still there and fails again; then it is given up."""
    try:
        sys.stdout.flush()
    except OSError:
        _close_output()
        return True
    return False


def _close_output() -> None:
    """Nothing more can be printed; keep Python from trying at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes overrides only before the first option; a user writes them anywhere.
    if rest and ("overrides" not in arguments or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _quiet_libraries() -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "HF_DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # it would search every package


def _speak_any_encoding() -> None:
    """A terminal or pipe that lacks a character gets its escape; printing never fails."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """Argument errors in the form of every other user error: one line, exit code 2."""

    def error(self, message: str) -> Any:
        self.exit(USER_ERROR, f"{self.prog}: {message}. Try {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tutelage", description="On-policy distillation of language models.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {_EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    check = command("check", _check, "Load everything a run needs and say if it fits.")
    _config_arguments(check)
    check.add_argument("--decontaminate", nargs="?", const="", metavar="SUITES",
                       help="prompts that repeat benchmark problems (default all)")  # fmt: skip
    check.add_argument("--dry-run", action="store_true", help="run one step on tiny random models "
                       "of the same architectures; nothing is downloaded")  # fmt: skip
    train = command("train", _train, "Train a student, or continue an interrupted run.")
    _config_arguments(train)
    train.add_argument("--allow-change", action="append", default=[], metavar="KEY",
                       help="continue although this key of the configuration changed")  # fmt: skip
    train.add_argument("--json", action="store_true", help="print every step as a JSON line")
    _eval_arguments(command("eval", _eval, "Measure mean@k, pass@k and maj@k of a model."))
    _model_arguments(command("sample", _sample, "Print completions of ledger prompts or a file."))
    score = command("score", _score, "Write statistics of every token, without training.")
    _config_arguments(score)
    score.add_argument("--num-prompts", type=int, default=8, help="prompts to score (default 8)")
    score.add_argument("--rules", default="", help="comma-separated, e.g. soft_or,entropy,q3")
    score.add_argument("--keep", type=float, default=0.2, help="budget of the rules (default 0.2)")
    score.add_argument("--completions", metavar="FILE",
                       help="score these prompts and completions instead of sampling")  # fmt: skip
    score.add_argument("--html", type=Path, metavar="FILE", help="also write a page to look at")
    score.add_argument("--out", default="-", help="JSONL file, - for standard output (default)")
    report = command("report", _report, "Write a run's report as one HTML file, or its plots.")
    report.add_argument("run_folder", metavar="RUN", type=Path)
    report.add_argument("--out", type=Path, help="HTML file (default RUN/report.html)")
    report.add_argument("--figures", type=Path, metavar="DIR",
                        help="write its plots as SVG and PNG files instead")  # fmt: skip
    compare = command("compare", _compare, "Compare runs, or evaluations, side by side.")
    compare.add_argument("run_folders", metavar="RUN", type=Path, nargs="+",
                         help="folders of runs, or all of them of eval --suite")  # fmt: skip
    compare.add_argument("--html", type=Path, metavar="FILE", help="also write a page to look at")
    compare.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE",
                        help="e.g. num_steps=10")  # fmt: skip


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    # None: a suite brings its own values; without one the defaults of `sample` hold.
    values = ("num_samples", "max_new_tokens", "temperature", "top_p", "suffix", "chat")
    parser.set_defaults(num_prompts=None, **dict.fromkeys(values))
    parser.add_argument("--suite", metavar="NAME|FILE", help="tip, eopd, benchmarks such as "
                        "gsm8k,math500, a .jsonl file, or held-out with a run folder")  # fmt: skip
    parser.add_argument("--num-problems", dest="num_prompts", type=int, metavar="N",
                        help="first N problems of each benchmark (default all)")  # fmt: skip
    parser.add_argument("--model-name", default="", help="name of the model on a server")
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction,
                        help="passed to the chat template as enable_thinking")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="dtype of the weights (default float32)")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder of a suite's samples and tables; the "
                        "same command continues there (default evaluations/...)")  # fmt: skip


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder, run folder, .gguf file, package:NAME/folder, hub id;"
                        " eval also takes a server, http://host:port/v1")  # fmt: skip
    parser.add_argument("--prompts", metavar="FILE", help="JSONL prompts (default: ledger)")
    parser.add_argument("--grader", choices=("none", "number", "math", "exact"),
                        help="how answers of a file are compared (default number where all of them "
                        "are numbers, else math)")  # fmt: skip
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=False,
                        help="use the chat template (a suite does if there is one)")  # fmt: skip
    parser.add_argument("--suffix", default="", help="text appended to every prompt")
    parser.add_argument("--num-prompts", type=int, default=64, metavar="N",
                        help="prompts (default 64)")  # fmt: skip
    parser.add_argument("--num-samples", type=int, default=8, help="completions of each, k")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=64, help="completions decoded at once")
    parser.add_argument("--seed", type=int, default=424242)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _version() -> str:
    from tutelage import __version__

    return __version__


def _load(arguments: argparse.Namespace) -> Config:
    from tutelage.run.parse import load_config

    return load_config(arguments.config, arguments.overrides)


def _check(arguments: argparse.Namespace) -> int:
    config = _load(arguments)  # before the libraries that a mistake in it can do without
    from tutelage.run.check import check
    from tutelage.run.contamination import ALL, decontaminate
    from tutelage.run.dryrun import dry_run

    lines = dry_run(config) if arguments.dry_run else check(config, Path(arguments.config).stem)
    for line in lines:
        print(line, flush=True)
    if arguments.decontaminate is not None:
        for line in decontaminate(config, arguments.decontaminate or ALL):
            print(line)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    config = _load(arguments)  # before the libraries that a mistake in it can do without
    from tutelage.report.report import write_report
    from tutelage.run.progress import Reporter
    from tutelage.run.train import train

    with Reporter(config.num_steps, as_json=arguments.json) as reporter:
        result = train(
            config,
            Path(arguments.config).stem,
            tuple(arguments.allow_change),
            reporter.say,
            reporter.on_step,
        )
    if not result.is_finished:
        return INTERRUPTED
    if not result.is_writer:
        return 0
    try:
        path = write_report(result.folder)
    except MissingExtraError as error:
        print(f"no report: {error}", file=sys.stderr)
        return 0
    if not arguments.json:
        print(f"report: {path}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.suite:
        return _eval_suite(arguments)
    from tutelage.run.inspect import evaluate_model

    result = evaluate_model(_inspection(arguments))
    if arguments.json:
        print(json.dumps(result.summary()))
        return 0
    named = {"mean": result.mean_at_k, "pass": result.pass_at_k, "maj": result.maj_at_k}
    for title, interval in named.items():
        if interval is not None:
            print(
                f"{title}@{result.num_samples}  {100 * interval.value:.1f} %  "
                f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
            )
    print(f"{result.num_problems} problems, {result.num_samples} samples each")
    return 0


def _eval_suite(arguments: argparse.Namespace) -> int:
    from tutelage.run.evaluation import SuiteRequest, evaluate_suite

    given = vars(arguments) | {"num_problems": arguments.num_prompts}
    names = [field.name for field in fields(SuiteRequest)]
    progress = _show_progress if sys.stderr.isatty() else None
    result = evaluate_suite(SuiteRequest(**{name: given[name] for name in names}), progress)
    print(json.dumps(result.record) if arguments.json else result.table)
    if not arguments.json:
        print(f"\nsamples and tables: {result.folder}")
    return 0


def _show_progress(name: str, done: int, total: int) -> None:
    print(f"{name}: {done} of {total} problems", end="\n" if done == total else "\r",
          file=sys.stderr, flush=True)  # fmt: skip


def _sample(arguments: argparse.Namespace) -> int:
    from tutelage.run.inspect import evaluate_model

    result = evaluate_model(_inspection(arguments))
    marks = {True: "right", False: "wrong", None: "ungraded"}
    for rollout, verdict in zip(result.rollouts, result.is_correct, strict=True):
        if arguments.json:
            record = {"prompt_id": rollout.prompt.id, "sample": rollout.sample}
            print(json.dumps(record | {"text": rollout.text, "is_correct": verdict}))
        else:
            print(f"[{rollout.prompt.id} #{rollout.sample}, {marks[verdict]}]\n{rollout.text}\n")
    return 0


def _inspection(arguments: argparse.Namespace) -> Any:
    from tutelage.run.inspect import Inspection

    given = {f.name: getattr(arguments, f.name) for f in fields(Inspection)}
    return Inspection(**{name: value for name, value in given.items() if value is not None})


def _score(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if arguments.out != "-" and out.exists():
        raise ConfigError(f"--out {out} exists and stays as it is. Name a new file.")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out} cannot be written: {out.parent} is no folder. Make it.")
    config = _load(arguments)  # before the libraries that a mistake in it can do without
    from tutelage.run.record import score_for_page
    from tutelage.run.score import ScoreRequest, score

    rules = tuple(rule.strip() for rule in arguments.rules.split(",") if rule.strip())
    request = ScoreRequest(arguments.num_prompts, rules, arguments.keep, arguments.completions)
    if arguments.html is not None:
        scores, lines = score_for_page(config, request)
        _score_page(arguments, config, lines)
    else:
        scores = score(config, request)
    if arguments.out == "-":
        for row in scores.rows() if arguments.html is None else ():
            print(json.dumps(row))
        print(scores.table(), file=sys.stderr if arguments.html is None else sys.stdout)
        return 0
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
    print(f"{scores.table()}\n{len(scores.tokens)} tokens written to {out}")
    return 0


def _score_page(arguments: argparse.Namespace, config: Config, lines: list[dict[str, Any]]) -> None:
    from tutelage.report.report import write_score_page
    from tutelage.run.parse import to_table

    table = json.loads(json.dumps(to_table(config)))
    print(f"page: {write_score_page(lines, table, arguments.keep, arguments.html)}")


def _report(arguments: argparse.Namespace) -> int:
    from tutelage.report.report import write_report

    if arguments.figures is not None:
        from tutelage.report.figures import write_figures

        print(*write_figures(arguments.run_folder, arguments.figures), sep="\n")
        return 0
    print(write_report(arguments.run_folder, arguments.out))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from tutelage.report.compare import compare_records
    from tutelage.report.comparison import write_comparison, write_evaluations
    from tutelage.report.evaluations import compare_evaluations, is_evaluation
    from tutelage.report.records import read_run
    from tutelage.run.parse import current_table

    folders, page = arguments.run_folders, arguments.html
    comparison: Any
    if any(map(is_evaluation, folders)):
        comparison = compare_evaluations(folders)
        if page is not None:
            write_evaluations(comparison, page)
    else:
        # what an earlier version saved is completed, so that keys which came later do not differ
        records = [read_run(folder).with_config(current_table) for folder in folders]
        comparison = compare_records(records)
        if page is not None:
            write_comparison(comparison, records, page)
    print(json.dumps(comparison.as_dict()) if arguments.json else comparison.as_text())
    if page is not None:
        print(f"page: {page}", file=sys.stderr if arguments.json else sys.stdout)
    return 0
