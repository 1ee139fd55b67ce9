"""The program as the operating system sees it: exit codes, streams, pipes, missing packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from calling import LEDGER, TEACHER, Outcome

from patience import HANG_S

# Python buffers what it writes to a pipe, as it does for a user.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1"}


def run(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    command = [sys.executable, "-m", "tutelage", *map(str, arguments)]
    environment = ENVIRONMENT | changes
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run("train", tmp_path / "no.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "no.toml does not exist" in done.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """The pipe is closed before the first line is written, as by `| head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tutelage", "sample", TEACHER, "--num-prompts", "2"]
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            [*command, "--num-samples", "1"],
            env=ENVIRONMENT, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    progress = ("sampling", "loading", "ledger: completions")
    assert all(line.startswith(progress) for line in done.stderr.splitlines())


def test_a_terminal_that_knows_only_ascii(trained: tuple[Path, Outcome]) -> None:
    done = run("compare", trained[0], trained[0], PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"\u2212" in done.stdout


def test_missing_extras_name_what_to_install(tmp_path: Path) -> None:
    """One process without any optional package runs the commands that need one."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    commands = [
        (["eval", str(tmp_path / "model.gguf")], "gguf", "gguf"),
        (["eval", TEACHER, "--prompts", "owner/set"], "datasets", "data"),
    ]
    program = (
        "import sys\n"
        "for name in ('gguf', 'datasets'): sys.modules[name] = None\n"
        "from tutelage.cli import main\n"
        "from tutelage.commands import progress\n"
        f"progress.DELAY_S = {HANG_S}\n"
        f"print([main(arguments) for arguments in {[c for c, _, _ in commands]!r}])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "[2, 2]\n", done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands)
    for line, (_, package, extra) in zip(lines, commands, strict=True):
        assert f"needs the package '{package}'" in line
        assert f"pip install '{package}' (the project's extra '{extra}')" in line


@pytest.mark.slow
def test_libraries_of_adapters_and_8_bits_are_silent(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    settings = ("student.lora.rank=2", "optimizer.kind=adamw_8bit", f"out={tmp_path / 'run'}")
    done = run("check", LEDGER, *settings)
    assert (done.returncode, done.stderr) == (0, "")
