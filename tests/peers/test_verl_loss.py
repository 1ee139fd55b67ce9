"""The loss in verl 0.9.1 itself, on the CPU; `make test-peers` puts verl where this test finds it.

The module that registers it is the one that docs/integrations.md shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_readme import blocks

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venvs" / "verl"
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not FOLDER.exists(), reason="needs verl: make test-peers"),
]


def test_verls_own_sum_of_the_loss_is_the_weighted_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    (plugin,) = [block for block in blocks(page) if block.file == "soft_or_half.py"]
    (tmp_path / "soft_or_half.py").write_text(plugin.text, encoding="utf-8")
    paths = [ROOT / "src", tmp_path, FOLDER]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("verl_loss.py"))],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "VERL_USE_EXTERNAL_MODULES": "soft_or_half",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["gap"] < 1e-12
    assert found["gradient_gap"] < 1e-12
    assert found["num_kept"] == 2 + 1 + 2
    assert found["kept_share"] == pytest.approx(5 / 11)
