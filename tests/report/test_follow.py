"""A page that follows a run: written as the run grows, it keeps the reader's place, and it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from token_lines import token_lines

from patience import HANG_S
from tutelage.cli import main
from tutelage.commands import compare as compare_command
from tutelage.commands import report as command
from tutelage.commands.compare import write_page
from tutelage.errors import RunError
from tutelage.report.follow import follow
from tutelage.report.run_page import write_report

MakeRun = Callable[..., Path]


def test_the_page_grows_with_the_run_and_ends_with_its_student(make_run: MakeRun) -> None:
    run = make_run(num_steps=4)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.unlink()
    said: list[str] = []
    seen: list[str | None] = []

    def train(_seconds: float) -> None:
        """What the run does between two looks: nothing, two steps, nothing, two steps, the end."""
        page = run / "report.html"
        seen.append(page.read_text("utf-8") if page.exists() else None)
        match len(seen):
            case 2:
                metrics.write_text("".join(lines[:2]))
            case 4:
                metrics.write_text("".join(lines))
            case 6:
                (run / "student").mkdir()
                os.utime(run / "student")

    page = follow([run], partial(write_report, run, None), said.append, train)
    assert seen[:2] == [None, None]
    live = [text for text in seen if text is not None]
    assert ["<dt>steps</dt><dd>2</dd>" in text for text in live] == [True, True, False, False]
    assert live[0] == live[1]
    assert all('http-equiv="refresh" content="5"' in text for text in live)
    last = page.read_text("utf-8")
    assert "<dt>steps</dt><dd>4</dd>" in last
    assert "refresh" not in last
    assert said == ["waiting for the first step of the run",
                    f"{page} follows the run; Ctrl-C stops that and leaves the run alone",
                    "the run has ended"]  # fmt: skip


def test_a_continued_run_is_followed_again(make_run: MakeRun) -> None:
    """Its student is older than its newest step."""
    run = make_run(num_steps=2)
    (run / "student").mkdir()
    os.utime(run / "student", ns=(0, 0))
    looks = []

    def wait(_seconds: float) -> None:
        looks.append("<noscript>" in (run / "report.html").read_text("utf-8"))
        os.utime(run / "student")

    follow([run], partial(write_report, run, None), lambda _: None, wait)
    assert looks == [True]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a folder"):
        follow([tmp_path / "none"], pytest.fail, wait=lambda _: pytest.fail("waited"))


def test_a_comparison_grows_with_its_runs_until_all_have_ended(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run("a", num_steps=4), make_run("b", num_steps=4, seed=1)]
    page = tmp_path / "page.html"
    metrics = runs[1] / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.unlink()
    said: list[str] = []
    seen: list[str | None] = []

    def train(_seconds: float) -> None:
        """What the runs do between two looks: the second one starts, both train and end."""
        seen.append(page.read_text("utf-8") if page.exists() else None)
        match len(seen):
            case 1:
                metrics.write_text("".join(lines[:2]))
            case 2:
                metrics.write_text("".join(lines))
                (runs[0] / "student").mkdir()
            case 3:
                (runs[1] / "student").mkdir()
                os.utime(runs[1] / "student")

    assert follow(runs, partial(write_page, runs, page), said.append, train) == page
    assert seen[0] is None
    first, second = (text for text in seen if text is not None)
    assert all('http-equiv="refresh" content="5"' in text for text in (first, second))
    assert first != second
    last = page.read_text("utf-8")
    assert "refresh" not in last
    assert last.count("<tr>") == second.count("<tr>")
    assert said == ["waiting for the first step of the runs",
                    f"{page} follows the runs; Ctrl-C stops that and leaves the runs alone",
                    "the runs have ended"]  # fmt: skip


def interrupted(_: Any, write: Callable[[int | None], Path], *__: Any) -> Path:
    write(5)
    raise KeyboardInterrupt


def test_an_interrupted_page_loads_itself_no_more(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(num_steps=2)
    monkeypatch.setattr(command, "follow", interrupted)
    assert main(["report", str(run), "--follow"]) == 0
    assert "refresh" not in (run / "report.html").read_text("utf-8")
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "report.html")


def test_an_interrupted_comparison_loads_itself_no_more_and_is_printed(
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    runs = [str(make_run(name, num_steps=2)) for name in ("a", "b")]
    page = tmp_path / "page.html"
    monkeypatch.setattr(compare_command, "follow", interrupted)
    assert main(["compare", *runs, "--html", str(page), "--follow", "--json"]) == 0
    assert "refresh" not in page.read_text("utf-8")
    (line,) = capsys.readouterr().out.splitlines()
    assert [run["name"] for run in json.loads(line)["runs"]] == ["a", "b"]


def test_a_page_loads_itself_again_and_keeps_the_place(browser: Any, make_run: MakeRun) -> None:
    run = make_run(num_steps=12)
    lines = token_lines(["a", "b", " c"])
    (run / "tokens.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    metrics = run / "metrics.jsonl"
    steps = metrics.read_text()
    metrics.write_text("".join(steps.splitlines(keepends=True)[:10]))
    with browser.new_context(viewport={"width": 1100, "height": 500}) as context:
        context.set_default_timeout(1000 * HANG_S)
        page, complaints = context.new_page(), []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(write_report(run, reload_s=1).as_uri())
        page.fill("#smoothing", "0.5")
        page.check("#log-axis")
        page.locator("figure .box").first.focus()
        page.keyboard.press("+")
        page.click("#tab-viewer")
        page.locator("#texts button").nth(2).click()
        page.select_option("#text-colour", "reverse_kl")
        page.locator("#readings .token").nth(4).click()
        page.evaluate("scrollTo(0, 120)")
        before = page.inner_text("#detail")
        metrics.write_text(steps)
        write_report(run, reload_s=1)
        page.locator("header .facts dd", has_text="12").wait_for(state="attached")
        assert page.is_visible("#view-viewer")
        assert page.inner_text("#detail") == before
        assert page.input_value("#text-colour") == "reverse_kl"
        assert page.locator("#texts button[aria-pressed=true]").get_attribute("data-text") == "2"
        assert page.evaluate("scrollY") == 120
        assert page.input_value("#smoothing") == "0.5"
        assert page.is_checked("#log-axis")
        assert page.is_enabled("#zoom-reset")
        assert complaints == []
