"""The options of each command, and the types of their values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tutelage.commands.completion import keys, overrides
from tutelage.errors import as_share

USER_ERROR = 2
"""Exit code of every error that a user can correct."""
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""

_EXAMPLES = {
    "demo": "tutelage demo",
    "init": "tutelage init mine.toml --student STUDENT --teacher TEACHER --prompts prompts.jsonl",
    "config": "tutelage config selection.keep",
    "check": "tutelage check configs/examples/ledger.toml",
    "train": "tutelage train configs/examples/ledger.toml selection.rule=soft_or",
    "eval": "tutelage eval package:tutelage/assets/ledger-teacher --json",
    "sample": "tutelage sample package:tutelage/assets/ledger-teacher --num-prompts 3",
    "score": "tutelage score configs/examples/ledger.toml --rules soft_or,q3 --out tokens.jsonl",
    "report": "tutelage report runs/ledger-1a2b3c4d",
    "push": "tutelage push runs/ledger-1a2b3c4d me/student --license mit --base-model me/base",
    "compare": "tutelage compare runs/ledger-1a2b3c4d runs/ledger-5e6f7a8b",
    "serve-teacher": "tutelage serve-teacher package:tutelage/assets/ledger-teacher",
}
_MORE = {
    "train": "\n\nin 2 processes, one a device:\n"
    "  python -m tutelage.commands.launch 2 train configs/examples/ledger.toml",
}
"""Further examples."""
_SUMMARIES = {
    "demo": "Train the embedded student and compare five selection rules, in about two minutes.",
    "init": "Write a commented configuration for your models and prompts; asks what is not given.",
    "config": "Print every key of a configuration, with default, unit and documentation.",
    "check": "Check that the models, tokenizers and data of a run fit, and plan its memory.",
    "train": "Train a student, or continue an interrupted run.",
    "eval": "Measure mean@k, pass@k and maj@k of a model.",
    "sample": "Print sampled completions of a file's prompts (embedded models: their task's).",
    "score": "Write entropy, divergence and selection of every token, without training.",
    "report": "Write a run's report as one HTML file, or its plots.",
    "push": "Upload a run's exported student, with its card, to the Hugging Face hub.",
    "compare": "Compare runs, or evaluations, side by side.",
    "serve-teacher": "Serve a teacher's final hidden states to runs with teacher.kind "
    "hidden_server.",
}
Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """Argument errors in the form of every other user error: one line, exit code 2."""

    def error(self, message: str) -> Any:
        message = re.sub(r"^argument ([^:]+): must", r"\1 must", message)
        self.exit(USER_ERROR, f"{self.prog}: {message}. Try {self.prog} --help.\n")


def make_parser(version: str) -> Parser:
    """The parser of all commands; `command` of its result names the one that was given."""
    parser = Parser(prog="tutelage", description="On-policy distillation of language models.")
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add_options in _COMMANDS.items():
        add_options(
            commands.add_parser(
                name,
                help=_SUMMARIES[name],
                description=_SUMMARIES[name],
                epilog=f"example:\n  {_EXAMPLES[name]}{_MORE.get(name, '')}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return parser


def _config(parser: Parser) -> None:
    parser.add_argument("config", help="TOML or YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE",
                        help="e.g. num_steps=10",
                        ).completer = overrides  # type: ignore[attr-defined] # fmt: skip


def _init(parser: Parser) -> None:
    parser.add_argument("config", metavar="FILE", help="TOML file to write, which must not exist")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE",
                        help="values to write instead of proposed ones",
                        ).completer = overrides  # type: ignore[attr-defined] # fmt: skip
    model = "folder, .gguf file, package:NAME/folder, or hub id"
    parser.add_argument("--student", metavar="MODEL", help=model)
    parser.add_argument("--teacher", metavar="MODEL", help=model)
    parser.add_argument("--prompts", metavar="FILE", help="JSONL or parquet file, or the hub id of "
                        "a data set; ledger for the embedded task")  # fmt: skip
    parser.add_argument("--grader", choices=("none", "number", "math", "exact"),
                        help="how answers are compared (default: what fits them)")  # fmt: skip


def _configuration(parser: Parser) -> None:
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("key", nargs="?", help="one key, such as selection.keep, or one table",
                       ).completer = keys  # type: ignore[attr-defined] # fmt: skip
    shown.add_argument("--markdown", action="store_true", help="print all as a Markdown page")
    shown.add_argument("--schema", action="store_true", help="print a JSON schema for editors")


def _check(parser: Parser) -> None:
    _config(parser)
    parser.add_argument("--decontaminate", nargs="?", const="", metavar="SUITES",
                        help="list prompts that repeat benchmark problems "
                        "(default: of all suites)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="run one step on tiny random models "
                        "of the same architectures; nothing is downloaded")  # fmt: skip
    parser.add_argument("--processes", type=count, metavar="N", help="plan the memory of each of "
                        "so many processes; 1 by default")  # fmt: skip
    parser.add_argument("--hosts", type=count, metavar="N",
                        help="machines that the processes are spread over")  # fmt: skip
    parser.add_argument("--card-gib", type=above_zero, metavar="GIB", help="plan cards of so much "
                        "memory, which need not be here; weights are not loaded")  # fmt: skip
    _allow_change(parser)


def _allow_change(parser: Parser) -> None:
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY",
                        help="continue although this key of the configuration changed")  # fmt: skip


def _train(parser: Parser) -> None:
    _config(parser)
    _allow_change(parser)
    parser.add_argument("--json", action="store_true", help="print every step as a JSON line")


def _eval(parser: Parser) -> None:
    """Every default is None: what was not given takes the value of the suite or of the request."""
    _model(parser)
    parser.add_argument("--suite", metavar="NAME|FILE", help="tip, eopd, benchmarks such as "
                        "gsm8k,math500, a .jsonl file, held-out with a run folder; of agents "
                        "deepplanning-shopping, deepplanning-travel, "
                        "deepplanning-shopping-official, ledger-tools")  # fmt: skip
    parser.add_argument("--model-name", help="name of the model on a server")
    parser.add_argument("--out", metavar="DIR", help="folder of a suite's samples and tables; the "
                        "same command continues there (default evaluations/...)")  # fmt: skip


def _model(parser: Parser) -> None:
    parser.add_argument("model", help="folder, run folder, .gguf file, package:NAME/folder, hub id;"
                        " eval also takes a server, http://host:port/v1")  # fmt: skip
    parser.add_argument("--prompts", metavar="FILE", help="JSONL or parquet prompts (the embedded "
                        "models have their own task as a default)")  # fmt: skip
    parser.add_argument("--grader", choices=("none", "number", "math", "exact"),
                        help="how answers of a file are compared (default number where all of them "
                        "are numbers, else math)")  # fmt: skip
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction,
                        help="use the chat template (default: if the model has one)")  # fmt: skip
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction,
                        help="passed to the chat template as enable_thinking")  # fmt: skip
    parser.add_argument("--suffix", help="text appended to every prompt")
    number = parser.add_mutually_exclusive_group()  # one option under two names
    for name in ("--num-problems", "--num-prompts"):
        number.add_argument(name, dest="num_problems", type=count, metavar="N",
                            help="first N problems (default 64; all of a suite)")  # fmt: skip
    parser.add_argument("--num-samples", type=count, metavar="K",
                        help="completions of each, k (default 8, or the suite's)")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=count, metavar="N",
                        help="length at which a completion is cut off (default 256, or the "
                        "suite's)")  # fmt: skip
    parser.add_argument("--temperature", type=temperature, metavar="T",
                        help="0 is greedy (default 1, or the suite's)")  # fmt: skip
    parser.add_argument("--top-p", type=share, metavar="P", help="default 1, or the suite's")
    parser.add_argument("--batch-size", type=count, metavar="N",
                        help="completions at once, here or on a server (default 64)")  # fmt: skip
    parser.add_argument("--seed", type=int, help="default 424242")
    parser.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="dtype of the weights (default float32)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def _score(parser: Parser) -> None:
    _config(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--num-prompts", type=count, metavar="N",
                        help="held-out prompts to complete and score (default 8)")  # fmt: skip
    source.add_argument("--completions", metavar="FILE",
                        help="score these prompts and completions instead of sampling")  # fmt: skip
    parser.add_argument("--rules", default="", help="comma-separated, e.g. soft_or,entropy,q3")
    parser.add_argument("--keep", type=share, help="budget of the rules (default 0.2)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write an HTML page")
    parser.add_argument("--out", help="JSONL file, - for standard output (default, without --html)")


def _report(parser: Parser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="run folder")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--out", type=Path, help="HTML file (default RUN/report.html)")
    kind.add_argument("--figures", type=Path, metavar="DIR",
                      help="write its plots as SVG and PNG files instead")  # fmt: skip
    text = "write it anew while the run trains; the page reloads itself"
    parser.add_argument("--follow", action="store_true", help=text)


def _push(parser: Parser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("repository", metavar="OWNER/NAME", help="of the hub; made if it is new")
    parser.add_argument("--license", help="of the student, as the hub names it: apache-2.0")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="what the student started from "
                        "(default: student.model, where it is a hub id)")  # fmt: skip
    parser.add_argument("--dataset", metavar="OWNER/NAME", action="append", help="of the prompts; "
                        "may be repeated (default: data.path, where it is a hub id)")  # fmt: skip
    parser.add_argument("--private", action="store_true", help="make a private repository")


def _compare(parser: Parser) -> None:
    parser.add_argument("run_folders", metavar="RUN", type=Path, nargs="+",
                        help="folders of runs, or all of them of eval --suite")  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write an HTML page")
    text = "write the page anew while the runs train; it reloads itself"
    parser.add_argument("--follow", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _serve_teacher(parser: Parser) -> None:
    parser.add_argument("model", help="folder, .gguf file, package:NAME/folder or hub id")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address to listen on (default 127.0.0.1)")  # fmt: skip
    parser.add_argument("--port", type=port, default=8100, help="default 8100; 0: a free one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of the weights, as teacher.dtype (default float32)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (cuda where it is), cpu or cuda")


_COMMANDS: dict[str, Callable[[Parser], None]] = {
    "demo": lambda _: None,
    "init": _init,
    "config": _configuration,
    "check": _check,
    "train": _train,
    "eval": _eval,
    "sample": _model,
    "score": _score,
    "report": _report,
    "push": _push,
    "compare": _compare,
    "serve-teacher": _serve_teacher,
}


# --- types of values ------------------------------------------------------------------------------


def count(text: str) -> int:
    """A number of things, at least 1."""
    value = _number(text, int, "a whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def port(text: str) -> int:
    """A port to listen on."""
    value = _number(text, int, "a whole number")
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, got {text}")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = _number(text, float, "a number")
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def share(text: str) -> float:
    """A number in (0, 1]."""
    value = _number(text, float, "a number")
    if not 0.0 < value <= 1.0:
        hint = as_share(value).rstrip(". ")
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}{hint and '. '}{hint}")
    return value


def temperature(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text, float, "a number")
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def _number(text: str, kind: Callable[[str], Number], what: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None
