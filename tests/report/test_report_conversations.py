"""Recorded conversations on the page: turns, what was inserted in its place, outcomes, measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_run_page import HOSTILE, cells, page_of, parsed, shape
from token_lines import NUM_TOKENS, conversation_lines, token_lines

from tutelage.cli import main
from tutelage.errors import RunError
from tutelage.report import text
from tutelage.report.compare_runs import compare_runs
from tutelage.report.conversations import TurnRecord, outcome_line, turns_of
from tutelage.report.panels import panels_across, panels_of
from tutelage.report.records import OutcomeRecord, TokenRecord, read_run
from tutelage.report.run_page import write_report
from tutelage.report.tokens import QUADRANTS

MakeRun = Callable[..., Path]
MEASURES = {
    "success_share": 0.25,
    "score_mean": 0.5,
    "turns_mean": 3.5,
    "tokens_per_turn": 11.0,
    "tool_calls_mean": 2.5,
    "tool_error_share": 0.125,
    "inserted_tokens_mean": 80.0,
}
CONVERSATION_PANELS = {
    "Success", "Turns and tool calls", "Tokens a turn", "Inserted tokens", "Tool errors"
}  # fmt: skip


def with_tokens(run: Path, lines: list[dict[str, Any]]) -> Path:
    (run / "tokens.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run


def with_measures(run: Path) -> Path:
    """The run with measures of conversations that grow with the step."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step in steps:
        step |= {name: value * (1 + step["step"]) for name, value in MEASURES.items()}
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    return run


def articles(page: str) -> list[ElementTree.Element]:
    return parsed(page).findall(".//article[@class='conversation']")


def said(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def record(**changes: Any) -> TokenRecord:
    line = conversation_lines(["a", "b"], "x")[0] | changes
    return TokenRecord.model_validate(line)


def spans(found: list[TurnRecord]) -> list[tuple[int, int, int, str]]:
    return [(turn.number, turn.start, turn.stop, turn.inserted) for turn in found]


def test_turns_are_what_stands_between_the_inserted_texts() -> None:
    assert spans(turns_of(record())) == [(1, 0, 5, "x"), (2, 5, 9, "x"), (3, 9, 12, "")]
    first = record(inserted=[[0, "head"], [12, "tail"]])
    assert spans(turns_of(first)) == [(0, 0, 0, "head"), (1, 0, 12, "tail")]
    assert spans(turns_of(record(inserted=[]))) == [(1, 0, 12, "")]
    assert turns_of(record(inserted=None)) == []


def test_what_was_inserted_behind_the_cut_is_left_out() -> None:
    cut = {"num_tokens": NUM_TOKENS + 8}
    pieces = [[5, "kept"], [NUM_TOKENS, "behind"], [15, "far behind"]]
    assert spans(turns_of(record(inserted=pieces, **cut))) == [(1, 0, 5, "kept"), (2, 5, 12, "")]


def test_an_outcome_is_one_line_of_what_is_known() -> None:
    full = OutcomeRecord(
        score=0.25, is_success=True, num_turns=1, num_tool_errors=2, details={"f1": 0.5, "n": "x"}
    )
    assert outcome_line(full) == "success · score 0.25 · 1 turn · 2 tool errors · f1 0.5 · n x"
    assert outcome_line(OutcomeRecord(is_success=False)) == "no success"


@pytest.mark.parametrize("length", [400, 401])
def test_the_page_shows_turns_with_inserted_text_in_its_place(
    make_run: MakeRun, length: int
) -> None:
    """Without any script; long text is closed until it is asked for."""
    inserted = "tool says ".ljust(length, ".")
    lines = conversation_lines(["a", " b", "\n"], inserted)
    page = page_of(with_tokens(make_run(num_steps=3), lines))
    found = articles(page)
    last = [line for line in lines if line["step"] == 10]
    names = [f"{n['kind']} · {n['prompt_id']} · sample 0 · step 10" for n in last]
    assert [article.findtext("h3") for article in found] == names
    for article, line in zip(found, last, strict=True):
        flow = [child for child in article if child.tag in ("h4", "p", "details")]
        kinds = [child.tag for child in flow]
        turn = ["h4", "p", "details"]
        assert kinds == ["p", "details", *turn, *turn, "h4", "p"]
        assert said(flow[0]).startswith("no success · score 0.75 · 3 turns · 1 tool error · ")
        assert [said(child) for child in flow if child.tag == "h4"] == [
            "Turn 1",
            "Turn 2",
            "Turn 3",
        ]
        details = [child for child in flow if child.tag == "details"][1:]
        assert [child.findtext("pre") for child in details] == [inserted] * 2
        assert ["open" in child.attrib for child in details] == [length == 400] * 2
        tokens = [[*child] for child in flow if child.get("class") == "prose"]
        assert [len(group) for group in tokens] == [5, 4, 3]
        texts = [line["texts"][str(token)] for token in line["token"]]
        assert ["".join(span.itertext()) for group in tokens for span in group] == texts


def test_only_generated_tokens_are_coloured_and_by_their_quadrant(make_run: MakeRun) -> None:
    run = with_tokens(make_run(num_steps=3), conversation_lines(["a", "b"], "q1 q2 q3 q4"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["quadrant_thresholds"] = [0.4, 0.6]
    (run / "manifest.json").write_text(json.dumps(manifest))
    lines = [n for n in conversation_lines(["a", "b"], "x") if n["step"] == 10]
    for article, line in zip(articles(page_of(run)), lines, strict=True):
        classes = [span.get("class", "") for span in article.findall("p[@class='prose']/span")]
        pairs = zip(line["entropy"], line["reverse_kl"], strict=True)
        assert classes == [f"token q{4 - 2 * (h > 0.4) - (kl > 0.6)}" for h, kl in pairs]
        inside = [e for details in article.iter("details") for e in details.iter()]
        marked = {f"q{number}" for number in QUADRANTS} | {"token"}
        assert not any(marked & {*e.get("class", "").split()} for e in inside)


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_text_of_tools_changes_no_element(make_run: MakeRun, value: str) -> None:
    """In tool output, in names and values of details, in tokens, prompts and names."""
    harmless, hostile = (
        with_tokens(
            make_run(f"{name}/run", num_steps=3),
            conversation_lines([string], string, prompt_id=string),
        )
        for name, string in (("benign", "harmless"), ("hostile", value))
    )
    page = page_of(hostile)
    assert shape_without_data(page) == shape_without_data(page_of(harmless))
    article = articles(page)[0]
    shown = [pre.text for pre in article.iter("pre")]
    assert shown == [text.visible(value)] * 3
    assert f"{text.visible(value)} {text.visible(value)} · match 2" in said(article)
    (_, data, _) = parsed(page).iter("script")
    first = json.loads(data.text or "")["completions"][0]
    assert [turn["inserted"] for turn in first["turns"]] == [text.visible(value)] * 2 + [""]


def shape_without_data(page: str) -> Any:
    tree = parsed(page)
    for meta in tree.iter("meta"):
        meta.attrib.pop("content", None)
    return shape(tree)


def test_pages_without_conversations_have_nothing_of_them(make_run: MakeRun) -> None:
    run = with_tokens(make_run(num_steps=3), token_lines(["a", "b"]))
    page = page_of(run)
    assert "turn" not in page.lower().replace("return", "")
    assert "onversation" not in page
    assert "inserted" not in page
    conversation = page_of(with_tokens(run, conversation_lines(["a", "b"], "x")))
    for word in ("onversation", "details.inserted", "decorations.push", "Turn 3"):
        assert word in conversation
    assert not CONVERSATION_PANELS & {panel.title for panel in panels_of(read_run(run))}


def test_measures_of_conversations_are_drawn_and_listed(make_run: MakeRun) -> None:
    run = with_measures(make_run(num_steps=3))
    panels = {panel.title: panel for panel in panels_of(read_run(run))}
    assert panels.keys() >= CONVERSATION_PANELS
    drawn = {
        curve.label: curve.points for title in CONVERSATION_PANELS for curve in panels[title].curves
    }
    labels = {
        "success": "success_share", "mean score": "score_mean", "turns": "turns_mean",
        "tool calls": "tool_calls_mean", "tokens a turn": "tokens_per_turn",
        "errors": "tool_error_share", "inserted tokens": "inserted_tokens_mean",
    }  # fmt: skip
    assert labels.keys() == drawn.keys()
    for label, name in labels.items():
        assert drawn[label] == [(step, MEASURES[name] * (1 + step)) for step in range(3)]
    assert panels["Success"].is_share
    assert panels["Tool errors"].alt == (
        "Tool errors (share of tool calls). errors: 12.5 % at step 0, 37.5 % at step 2."
    )
    shown = {row[0]: row[2:] for row in cells(page_of(run), "figures")}
    for name, value in MEASURES.items():
        assert shown[name.replace("_", " ")] == [text.number(value), text.number(3 * value)]


@pytest.mark.parametrize(
    "change",
    [
        {"inserted": [[5, 1]]},
        {"inserted": [["5", "x"]]},
        {"inserted": [[-1, "x"]]},
        {"inserted": [[9, "x"], [5, "x"]]},
        {"inserted": [[NUM_TOKENS + 1, "x"]]},
        {"outcome": {"score": "1"}},
    ],
)
def test_conversations_that_do_not_fit_are_refused(
    make_run: MakeRun, change: dict[str, Any]
) -> None:
    line = conversation_lines(["a"], "x")[0] | change
    with pytest.raises(RunError, match=r"tokens.jsonl line 1 does not fit"):
        write_report(with_tokens(make_run(num_steps=3), [line]))


def test_compared_runs_show_turns_in_the_token_viewer(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [
        with_tokens(make_run(name, num_steps=3), conversation_lines(["a"], "the answer"))
        for name in ("one", "two")
    ]
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "--html", str(page)]) == 0
    (_, data, script) = parsed(page.read_text("utf-8")).iter("script")
    assert "decorations.push" in (script.text or "")
    for completion in json.loads(data.text or "")["completions"]:
        assert [turn["number"] for turn in completion["turns"]] == [1, 2, 3]
        assert "no success" in completion["outcome"]


def test_compared_runs_show_what_their_conversations_reached(make_run: MakeRun) -> None:
    """A run without conversations has dashes; where no run has any, there is no row."""
    plain, agent = make_run("plain", num_steps=3), with_measures(make_run("agent", num_steps=3))
    comparison = compare_runs([plain, agent])
    rows = {row[0]: row[1:] for row in comparison.tables()[0].rows}
    assert {name: cells for name, cells in rows.items() if cells[0] == text.MISSING} == {
        "last success": ["–", "75.0 %"],
        "last score": ["–", "1.5"],
        "last turns": ["–", "10.5"],
        "last tokens a turn": ["–", "33"],
        "last tool errors": ["–", "37.5 %"],
    }
    alone = compare_runs([plain, make_run("other", num_steps=3)])
    others = [row[0] for row in alone.tables()[0].rows]
    assert others == [name for name in rows if rows[name][0] != text.MISSING]
    runs = [(name, read_run(run)) for name, run in (("plain", plain), ("agent", agent))]
    panels = {panel.title: panel for panel in panels_across(runs)}
    assert [curve.label for curve in panels["Success"].curves] == ["agent"]
    assert panels["Turns"].curves[0].points == [(0, 3.5), (1, 7.0), (2, 10.5)]
    assert "Success" not in {panel.title for panel in panels_across(runs[:1])}


def test_rules_agree_only_on_conversations_with_the_same_answers_of_tools(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """Equal tokens behind other answers of tools are no equal completions."""
    found = []
    for answer in ("same", "same", "other"):
        run = with_tokens(make_run(f"{len(found)}"), conversation_lines(["a"], answer))
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["config"] |= {"selection": {"rule": "q3"}, "quadrant_thresholds": [0.5, 0.5]}
        (run / "manifest.json").write_text(json.dumps(manifest))
        found.append(run)
    page = tmp_path / "page.html"
    for other, is_alike in ((found[1], True), (found[2], False)):
        assert main(["compare", str(found[0]), str(other), "--html", str(page)]) == 0
        assert ("How far the rules agree" in page.read_text("utf-8")) is is_alike
