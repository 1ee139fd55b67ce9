"""Small wrong changes to the code: does the test that guards it fail?

Each mutant replaces one text in a temporary copy of the repository and runs the narrow test files
that should notice. It is killed if they fail. First the unchanged copy has to pass the same files.
Tests run in forked children of a process that has imported the libraries, but nothing of ours.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import progress
from .mutant_list import MUTANTS
from .mutant_list_agents import AGENT_MUTANTS
from .mutant_list_core import CORE_MUTANTS
from .mutant_list_processes import PROCESS_MUTANTS
from .mutant_list_teachers import TEACHER_MUTANTS
from .mutant_list_vocabulary import VOCABULARY_MUTANTS
from .record import ROOT, Outcome

PASSED, FAILED = 0, 1
"""Exit codes of pytest; others mean that it could not run."""
TIMEOUT_S = 300
"""A mutant that makes the tests hang is seen, too."""
LIBRARIES = (
    "pytest",
    "hypothesis",
    "numpy",
    "torch",
    "scipy.special",
    "accelerate",
    "transformers",
)


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
    lists = (CORE_MUTANTS, MUTANTS, AGENT_MUTANTS, PROCESS_MUTANTS, TEACHER_MUTANTS)
    for groups in (*lists, VOCABULARY_MUTANTS):
        for pattern, (tests, pairs) in groups.items():
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
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", ".pytest_cache", ".hypothesis")
    for name in ("src", "tests", "reliability", "configs", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def warm_up() -> None:
    """Import what the tests import, once; a failure is enough, the smallest one is not wanted."""
    # Triton, which torch imports, decides now whether kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
    for name in LIBRARIES:
        importlib.import_module(name)
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate), database=None)
    settings.load_profile("mutants")
    from transformers import AutoTokenizer, Qwen3ForCausalLM  # noqa: F401 (it loads lazily)

    gc.collect()
    gc.freeze()


def run_tests(folder: Path, tests: tuple[str, ...]) -> int:
    """Exit code of pytest on some files of a copy; a hang counts as a failure."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            _move_to(folder)
            import pytest

            plugins = ["-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"]
            ignored = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
            code = int(pytest.main(["-x", "-q", "-m", "", *plugins, *ignored, *tests]))
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what a test that hung has started
    return FAILED if code == -signal.SIGALRM else code


def _move_to(folder: Path) -> None:
    """Make this process one that never saw the repository itself."""
    os.setsid()
    signal.alarm(TIMEOUT_S)
    null = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.chdir(folder)
    os.environ |= {
        "PYTHONPATH": str(folder / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "TUTELAGE_SWEEP": "200",
        "TUTELAGE_EXAMPLES": "100",
    }
    sys.dont_write_bytecode = True
    ours = {"", str(ROOT), str(ROOT / "src"), str(ROOT / "tests")}
    sys.path[:] = [str(folder / "src"), *(path for path in sys.path if path not in ours)]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith((str(ROOT / "src"), str(ROOT / "tests"))):
            del sys.modules[name]


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
    groups = sorted({mutant.tests for mutant in chosen})
    warm_up()
    with tempfile.TemporaryDirectory() as name:
        folder = copy_of_the_code(Path(name) / "copy")

        def one(number: int) -> progress.Result:
            if number < len(groups):
                return {"code": run_tests(folder, groups[number])}
            mutant = chosen[number - len(groups)]
            code = judge(folder, mutant)
            print(f"{'SURVIVED' if code == PASSED else code} {mutant}", flush=True)
            return {"code": code}

        codes = [r["code"] for r in progress.trials("mutants", len(groups) + len(chosen), one)]
    unmutated = zip(groups, codes, strict=False)
    failing = sorted({t for tests, code in unmutated if code != PASSED for t in tests})
    judged = list(zip(map(str, chosen), codes[len(groups) :], strict=True))
    survivors = [text for text, code in judged if code == PASSED]
    broken = [text for text, code in judged if code not in (PASSED, FAILED)]
    killed = len(chosen) - len(survivors) - len(broken)
    return Outcome(
        "a small wrong change to the code is noticed by the tests that guard it (goal: 95 %)",
        trials=len(chosen),
        failures=len(survivors) + len(broken) + len(failing) + stale,
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
