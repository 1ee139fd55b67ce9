"""What needs no model starts without the libraries of models."""

from __future__ import annotations

import subprocess
import sys

import pytest

from patience import HANG_S

HEAVY = ("torch", "transformers", "numpy", "accelerate", "safetensors", "tokenizers", "matplotlib")
PROBE = f"""
import sys
from tutelage.cli import main
try:
    code = main()
except SystemExit as end:
    code = end.code
print([name for name in {HEAVY} if name in sys.modules], code, file=sys.stderr)
"""
LEDGER = "configs/examples/ledger.toml"


def run(*arguments: str) -> tuple[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=HANG_S
    )
    *said, last = done.stderr.strip().split("\n")
    return last, said


def test_command_line_configuration_and_errors_import_no_torch() -> None:
    program = (
        "import pkgutil, sys, tutelage.cli, tutelage.errors, tutelage.config\n"
        "for module in pkgutil.iter_modules(tutelage.config.__path__, 'tutelage.config.'):\n"
        "    __import__(module.name)\n"
        "assert 'tutelage.config.schema' in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=HANG_S)


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("--version",)])
def test_help_and_version(arguments: tuple[str, ...]) -> None:
    assert run(*arguments) == ("[] 0", [])


@pytest.mark.parametrize(
    "arguments",
    [
        ("trian", LEDGER),
        ("train", LEDGER, "num_step=4"),
        ("check", LEDGER, "selection.kep=0.5"),
        ("score", LEDGER, "selection.rule=soft"),
        ("train", LEDGER, "sampling.temperature=-1"),
        ("check", "no-such-file.toml"),
    ],
)
def test_mistakes_in_commands_keys_and_values(arguments: tuple[str, ...]) -> None:
    found, said = run(*arguments)
    assert found == "[] 2"
    assert len(said) == 1


def test_docstrings_that_transformers_needs_are_missed_in_one_line() -> None:
    command = [sys.executable, "-OO", "-m", "tutelage", "check", LEDGER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "with -OO or PYTHONOPTIMIZE=2" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_public_names_are_there_when_asked_for() -> None:
    program = (
        "import sys, tutelage\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(getattr(tutelage, name) for name in tutelage.__all__)\n"
        "assert tutelage.core.entropy and set(tutelage.__all__) <= set(dir(tutelage))\n"
        "assert not hasattr(tutelage, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=HANG_S)
