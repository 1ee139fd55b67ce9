"""Small wrong changes to the code: does the test that guards it fail?

Each mutant replaces one text in a temporary copy of the repository and runs the narrow test files
that should notice. It is killed if they fail. First the unchanged copy has to pass the same files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .mutant_list import MUTANTS
from .record import ROOT, Outcome

PASSED, FAILED = 0, 1
"""Exit codes of pytest; others mean that it could not run."""
TIMEOUT_S = 300.0
"""A mutant that makes the tests hang is seen, too."""


@dataclass(frozen=True)
class Mutant:
    """One replacement and the test files that should notice."""

    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}: {self.old.strip()!r} → {self.new.strip()!r}"


def mutants() -> Iterator[Mutant]:
    """The list, one object each."""
    for pattern, (tests, pairs) in MUTANTS.items():
        for old, new in pairs:
            yield Mutant(pattern, old, new, tuple(tests))


def applicable() -> list[Mutant]:
    """Mutants whose text occurs exactly once in the code as it is, with their file."""
    found = []
    for mutant in mutants():
        files = sorted((ROOT / "src" / "tutelage").glob(mutant.path))
        places = [f for f in files for _ in range(f.read_text("utf-8").count(mutant.old))]
        if len(places) == 1:
            path = str(places[0].relative_to(ROOT))
            found.append(Mutant(path, mutant.old, mutant.new, _test_files(mutant.tests)))
    return found


def _test_files(patterns: tuple[str, ...]) -> tuple[str, ...]:
    files = [path for pattern in patterns for path in sorted((ROOT / "tests").glob(pattern))]
    return tuple(str(path.relative_to(ROOT)) for path in files)


def copy_of_the_code(folder: Path) -> Path:
    """The parts of the repository that tests read."""
    ignored = shutil.ignore_patterns("__pycache__", ".pytest_cache", ".hypothesis")
    for name in ("src", "tests", "configs", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, tests: tuple[str, ...]) -> int:
    """Exit code of pytest on some files of a copy; a hang counts as a failure."""
    environment = os.environ | {
        "PYTHONPATH": str(folder / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "TUTELAGE_SWEEP": "100",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            [*command, "-p", "no:randomly"],
            cwd=folder,
            env=environment,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return FAILED
    return done.returncode


def judge(folder: Path, mutant: Mutant) -> int:
    """Exit code of the tests with the mutant in place, which is taken out again."""
    path = folder / mutant.path
    text = path.read_text("utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    try:
        return run_tests(folder, mutant.tests)
    finally:
        path.write_text(text, "utf-8")


def run(size: int) -> Outcome:
    """The first `size` mutants that apply, or all with 0."""
    chosen = applicable()[: size or None]
    stale = sum(1 for _ in mutants()) - len(applicable())
    survivors, broken = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = copy_of_the_code(Path(name))
        unmutated = {tests: run_tests(folder, tests) for tests in {m.tests for m in chosen}}
        failing = sorted({t for tests, code in unmutated.items() if code != PASSED for t in tests})
        for number, mutant in enumerate(chosen, 1):
            code = judge(folder, mutant)
            if code == PASSED:
                survivors.append(str(mutant))
            elif code != FAILED:
                broken.append(str(mutant))
            print(
                f"{number}/{len(chosen)} {'SURVIVED' if code == PASSED else code} {mutant}",
                flush=True,
            )
    killed = len(chosen) - len(survivors) - len(broken)
    return Outcome(
        "a small wrong change to the code is noticed by the tests that guard it (goal: 95 %)",
        trials=len(chosen),
        failures=len(survivors) + len(broken) + len(failing),
        control={"test files that fail without a mutant": failing},
        details={
            "killed": killed,
            "killed_share": round(killed / max(len(chosen), 1), 4),
            "survivors": survivors,
            "tests_could_not_run": broken,
            "stale_mutants_left_out": stale,
        },
        is_sample=False,
    )
