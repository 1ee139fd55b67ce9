"""What an import loads: the command line and the report need neither torch nor models."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "transformers",
    "accelerate",
    "matplotlib",
    "datasets",
    "pydantic",
    "rich",
    "jinja2",
    "httpx2",
)


def loaded(program: str) -> set[str]:
    """Heavy packages in memory after a program has run in a fresh interpreter."""
    report = f"import sys\n{program}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in done.stderr.split()} & set(HEAVY)


@pytest.mark.parametrize(
    "program",
    [
        "import tutelage, tutelage.data.tasks",
        "from tutelage.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass",
    ],
)
def test_a_light_import_loads_nothing_heavy(program: str) -> None:
    assert loaded(program) == set()


def test_reading_a_run_loads_no_model_library_and_no_plots() -> None:
    assert loaded("import tutelage.report.run_page, tutelage.report.compare_runs") <= {
        "pydantic",
        "rich",
    }


def test_the_loading_detector_can_fail() -> None:
    assert loaded("import pydantic") == {"pydantic"}
