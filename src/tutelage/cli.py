"""The command line: `tutelage init | check | train | eval | sample | score | report | …`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.commands.completion import VARIABLE, complete
from tutelage.commands.launch import num_processes, print_once
from tutelage.commands.options import INTERRUPTED, USER_ERROR, make_parser
from tutelage.errors import (
    ConfigError,
    TutelageError,
    explained,
    is_out_of_memory,
)

if TYPE_CHECKING:
    from tutelage.config.schema import Config

_LESS_MEMORY = "Lower the setting that needs it; `tutelage check` shows what memory is used for."
_ALONE = ("demo", "init", "config", "check", "report", "push", "compare", "serve-teacher")
"""Commands that one process does whole."""
_NO_DOCSTRINGS = (
    "transformers reads its own docstrings, which Python leaves out with -OO or PYTHONOPTIMIZE=2, "
    f"got optimisation {sys.flags.optimize}. Use -O at most."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = _parse(argv)
    if sys.flags.optimize > 1:
        print(f"tutelage: {_NO_DOCSTRINGS}", file=sys.stderr)
        return USER_ERROR
    _quiet_libraries()
    _print_any_character()
    try:
        _refuse_processes(arguments.command)
        code: int = _COMMANDS[arguments.command](arguments)
        sys.stdout.flush()  # so that a closed pipe is noticed here and not at exit
    except TutelageError as error:
        print_once(" ".join(str(error).split()))
        return USER_ERROR
    except KeyboardInterrupt:
        is_saved = arguments.command == "train" or vars(arguments).get("suite")
        left = "the same command continues" if is_saved else "nothing was saved"
        print_once(f"interrupted; {left}")
        return INTERRUPTED
    except BrokenPipeError:  # head or less closed the pipe
        _close_output()
        return 0
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0][-200:] if str(error).strip() else "Python"
        print_once(f"out of memory: {reason.rstrip('.')}. {_LESS_MEMORY}")
        return USER_ERROR
    except OSError as error:
        print(f"tutelage: {explained(error, _has_output_failed())}", file=sys.stderr)
        return USER_ERROR
    return code


def _refuse_processes(command: str) -> None:
    """Several processes of a command that shares nothing out would each do all of it."""
    count = num_processes()
    if command in _ALONE and count > 1:
        plans = f"; `tutelage check --processes {count}` plans a run of {count}"
        raise ConfigError(
            f"`tutelage {command}` works in one process, got {count}. Start it without the "
            f"launcher{plans if command == 'check' else ''}."
        )


def _has_output_failed() -> bool:
    """Whether standard output cannot be written; its buffer is dropped then."""
    try:
        sys.stdout.flush()
    except OSError:
        _close_output()
        return True
    return False


def _close_output() -> None:
    """Redirect standard output, so that Python does not fail to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(_version())
    if VARIABLE in os.environ:
        complete(parser)
    arguments, rest = parser.parse_known_args(argv)
    options = [text for text in rest if text.startswith("-")]
    # argparse takes overrides only before the first option; a user writes them anywhere.
    if rest and ("overrides" not in arguments or options):
        hint = _as_override(argv, options[0]) if "overrides" in arguments else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _as_override(argv: Sequence[str], option: str) -> str:
    """The override for an option that is a key of the configuration."""
    from tutelage.config.suggest import find_key

    name, equals, value = option.lstrip("-").partition("=")
    key = find_key(name.replace("-", "_"))
    if key is None:
        return ""
    following = [*argv[argv.index(option) + 1 :], "VALUE"][0] if option in argv else "VALUE"
    value = value if equals else "VALUE" if following.startswith("-") else following
    return f". Settings of the configuration are written without dashes: {key}={value}"


def _quiet_libraries() -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "HF_DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A process that is lost is one line of ours; torch and NCCL print a page for each connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # it would search every package
    # It warns of missing kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _print_any_character() -> None:
    """Print characters that the encoding of a terminal or pipe lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _version() -> str:
    from tutelage import __version__

    return __version__


def _load(arguments: argparse.Namespace) -> Config:
    """The configuration, read before torch is imported: a mistake in it is reported at once."""
    from tutelage.config.parse import load_config

    return load_config(arguments.config, arguments.overrides)


def _demo(arguments: argparse.Namespace) -> int:
    from tutelage.commands.demo import run

    return run(arguments)


def _init(arguments: argparse.Namespace) -> int:
    from tutelage.commands.init import run

    return run(arguments)


def _config(arguments: argparse.Namespace) -> int:
    from tutelage.commands.configuration import run

    return run(arguments)


def _check(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    from tutelage.commands.check import run

    return run(config, arguments)


def _train(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    from tutelage.setup.run_folder import run_folder
    from tutelage.train.peers import peers_of

    folder = run_folder(config, Path(arguments.config).stem)
    with peers_of(folder, config.process_timeout_s) as peers:
        peers.watch()  # before what takes long to import
        from tutelage.commands.train import run

        return run(config, arguments, peers)


def _eval(arguments: argparse.Namespace) -> int:
    from tutelage.commands.evaluate import run

    return run(arguments)


def _sample(arguments: argparse.Namespace) -> int:
    from tutelage.commands.evaluate import run_sample

    return run_sample(arguments)


def _score(arguments: argparse.Namespace) -> int:
    if arguments.out not in (None, "-"):
        _require_new_file(Path(arguments.out))
    config = _load(arguments)
    from tutelage.commands.score import run

    return run(config, arguments)


def _require_new_file(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"--out {out} exists and stays as it is. Name a new file.")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out} cannot be written: {out.parent} is no folder. Make it.")


def _report(arguments: argparse.Namespace) -> int:
    from tutelage.commands.report import run

    return run(arguments)


def _push(arguments: argparse.Namespace) -> int:
    from tutelage.commands.push import run

    return run(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from tutelage.commands.compare import run

    return run(arguments)


def _serve_teacher(arguments: argparse.Namespace) -> int:
    from tutelage.commands.serve import run

    return run(arguments)


_COMMANDS = {
    "demo": _demo,
    "init": _init,
    "config": _config,
    "check": _check,
    "train": _train,
    "eval": _eval,
    "sample": _sample,
    "score": _score,
    "report": _report,
    "push": _push,
    "compare": _compare,
    "serve-teacher": _serve_teacher,
}
