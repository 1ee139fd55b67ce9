"""axe-core on every kind of page, light and dark, wide and narrow.

axe-core is a JavaScript package that `make install` fetches with npm, where npm is there, to `axe`
in the virtual environment; TUTELAGE_AXE names another axe.min.js. test_browser.py has an audit of
its own that needs neither.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from token_lines import conversation_lines, token_lines

from patience import HANG_S
from tutelage.report.compare_evaluations import compare_evaluations
from tutelage.report.compare_page import write_comparison, write_evaluations
from tutelage.report.compare_runs import compare_records
from tutelage.report.records import read_run
from tutelage.report.run_page import write_report, write_score_page

AXE = Path(os.environ.get("TUTELAGE_AXE") or Path(sys.prefix) / "axe" / "axe.min.js")
pytestmark = pytest.mark.skipif(not AXE.is_file(), reason=f"axe-core is not at {AXE}")
MakeRun = Callable[..., Path]
TEXTS = ["a", "b", " c", "\n", "def", "9"]
FINDINGS = """async () => (await axe.run()).violations.flatMap((v) =>
  v.nodes.map((n) => `${v.impact} ${v.id}: ${n.html.slice(0, 120)}`))"""


def recorded(run: Path) -> Path:
    lines = "".join(f"{json.dumps(line)}\n" for line in token_lines(TEXTS))
    (run / "tokens.jsonl").write_text(lines)
    return run


def run_page(make_run: MakeRun, folder: Path) -> Path:
    return write_report(recorded(make_run("run", num_steps=3)), folder / "run.html")


def conversation_page(make_run: MakeRun, folder: Path) -> Path:
    run = make_run("run", num_steps=3)
    lines = conversation_lines(TEXTS, "what a tool answers", kind="training")
    lines += conversation_lines(TEXTS, "a long answer " * 40)
    (run / "tokens.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return write_report(run, folder / "conversations.html")


def compare_page(make_run: MakeRun, folder: Path) -> Path:
    runs = [recorded(make_run(name, num_steps=3, seed=i)) for i, name in enumerate("abc")]
    records = [read_run(run) for run in runs]
    write_comparison(compare_records(records), records, folder / "compare.html")
    return folder / "compare.html"


def score_page(make_run: MakeRun, folder: Path) -> Path:
    lines = [line for line in token_lines(TEXTS) if line["step"] == 0]
    return write_score_page(lines, {}, 0.2, folder / "score.html")


def evaluations_page(make_run: MakeRun, folder: Path) -> Path:
    for name in "ab":
        (folder / name).mkdir()
        settings = {"model": name, "benchmarks": {"m": {"max_new_tokens": 9}}}
        (folder / name / "settings.json").write_text(json.dumps(settings))
        row = {"benchmark": "m", "prompt_id": "1", "sample": 0, "is_correct": name == "a"}
        (folder / name / "rows.jsonl").write_text(f"{json.dumps(row)}\n")
    write_evaluations(compare_evaluations([folder / "a", folder / "b"]), folder / "evals.html")
    return folder / "evals.html"


@pytest.mark.parametrize(
    "make_page",
    [
        run_page,
        *(
            pytest.param(make, marks=pytest.mark.slow)
            for make in (conversation_page, compare_page, score_page, evaluations_page)
        ),
    ],
)
def test_axe_finds_nothing(
    browser: Any, make_run: MakeRun, tmp_path: Path, make_page: Callable[[MakeRun, Path], Path]
) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    address = make_page(make_run, folder).as_uri()
    for scheme, width in (("light", 1100), ("dark", 420)):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        context.set_default_timeout(1000 * HANG_S)
        page = context.new_page()
        page.goto(address)
        page.evaluate(AXE.read_text("utf-8"))
        for tab in page.locator("[role=tab]").all() or [None]:
            if tab is not None:
                tab.click()
            assert page.evaluate(FINDINGS) == [], (scheme, tab and tab.inner_text())
        context.close()


def test_axe_notices_what_is_wrong(browser: Any, make_run: MakeRun, tmp_path: Path) -> None:
    """Negative control: a nameless button and faint ink are found."""
    context = browser.new_context()
    context.set_default_timeout(1000 * HANG_S)
    page = context.new_page()
    page.goto(run_page(make_run, tmp_path).as_uri())
    page.evaluate("""() => {
      const main = document.querySelector("main");
      main.append(document.createElement("button"));
      main.append(Object.assign(document.createElement("p"), { textContent: "faint" }));
      main.lastChild.style.color = "#bbb";
    }""")
    page.evaluate(AXE.read_text("utf-8"))
    found = " ".join(page.evaluate(FINDINGS))
    context.close()
    assert "critical button-name" in found
    assert "serious color-contrast" in found
