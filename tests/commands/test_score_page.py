"""`score --html`: the page holds the numbers of the rows, and a bad place is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tutelage.cli import main

ARGUMENTS = ("num_threads=1", "sampling.max_new_tokens=12", "--num-prompts", "2")
CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "examples" / "ledger.toml")


def test_the_page_holds_the_numbers_of_the_rows(tmp_path: Path) -> None:
    page, rows = tmp_path / "page.html", tmp_path / "rows.jsonl"
    arguments = ["score", CONFIG, *ARGUMENTS, "--rules", "q3", "--out", str(rows)]
    assert main([*arguments, "--html", str(page)]) == 0
    found = re.search(r'id="tokens">(.*?)</script>', page.read_text("utf-8"))
    assert found is not None
    shown = json.loads(found[1])
    expected = [json.loads(line) for line in rows.read_text().splitlines()]
    columns = {
        "token": "token_id",
        "entropy": "entropy_nats",
        "reverse_kl": "reverse_kl_nats",
        "forward_kl": "forward_kl_nats",
        "teacher_entropy": "teacher_entropy_nats",
    }
    for name, column in columns.items():
        values = [value for c in shown["completions"] for value in c[name]]
        assert values == pytest.approx([row[column] for row in expected], rel=1e-3, abs=1e-12)
    kept = [i in c["kept"]["q3"] for c in shown["completions"] for i in range(len(c["token"]))]
    assert kept == [row["kept.q3"] for row in expected]
    assert "http" not in page.read_text("utf-8").replace("http://www.w3.org/2000/svg", "").replace(
        "http-equiv", ""
    )


def test_a_page_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    page = str(tmp_path / "file" / "page.html")
    assert main(["score", CONFIG, *ARGUMENTS, "--html", page]) == 2
    assert "cannot be written" in capsys.readouterr().err
