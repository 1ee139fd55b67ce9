"""The notebook runs from its first cell to its last, without Jupyter, and holds no outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import BIN, ROOT

NOTEBOOK = ROOT / "examples" / "distill.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
SCRIPTS = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def as_python(script: str) -> str:
    """A cell as a script: lines with ! are commands, with the braces of an f-string."""
    lines = [
        f"subprocess.run(f{line[1:]!r}, shell=True, check=True)" if line.startswith("!") else line
        for line in script.splitlines()
    ]
    return "\n".join(lines)


def test_cells_are_stripped_and_are_python() -> None:
    assert len(SCRIPTS) >= 5
    assert all(cell.get("outputs", []) == [] for cell in CELLS)
    assert all(cell.get("execution_count") is None for cell in CELLS)
    for script in SCRIPTS:
        compile(as_python(script), "cell", "exec")


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path) -> None:
    text = "\n".join(["import subprocess", *map(as_python, SCRIPTS)])
    text += "\nassert (run / 'report.html').is_file() and (folder / 'kl.png').is_file()\n"
    (tmp_path / "notebook.py").write_text(text, encoding="utf-8")
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, "notebook.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "entropy" in done.stdout
    assert "KL" in done.stdout
