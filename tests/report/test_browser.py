"""The page in a browser: every control, the recorded numbers, hostile text, nothing fetched."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from opened import BENIGN, Opened
from test_run_page import HOSTILE
from token_lines import NUM_TOKENS, RULES, conversation_lines, token_lines

from patience import HANG_S
from tutelage.report.compare_page import write_comparison
from tutelage.report.compare_runs import compare_records
from tutelage.report.records import read_run
from tutelage.report.run_page import write_report
from tutelage.report.token_plots import highest, map_bins
from tutelage.report.tokens import rows_of, snapshots

MakeRun = Callable[..., Path]
VIEWS = ("overview", "viewer", "map", "rules", "gate")
CUTS = (0.5, 0.5)


def quadrant(line: dict[str, Any], index: int, cuts: tuple[float, float] = CUTS) -> int:
    return 4 - 2 * (line["entropy"][index] > cuts[0]) - (line["reverse_kl"][index] > cuts[1])


def test_every_control_works_without_complaint_and_nothing_is_fetched(show: Any) -> None:
    opened = show()
    for view in VIEWS:
        opened.page.click(f"#tab-{view}")
        assert opened.page.is_visible(f"#view-{view}")
        assert sum(opened.page.is_visible(f"#view-{v}") for v in VIEWS) == 1
        for select in opened.page.locator(f"#view-{view} select").all():
            for value in [o.get_attribute("value") for o in select.locator("option").all()]:
                select.select_option(value)
            select.select_option(index=0)
    assert opened.complaints == []
    assert len(opened.requests) == 1
    assert opened.requests[0].startswith("file:")


def test_curves_tell_the_recorded_values_and_can_be_zoomed_smoothed_and_put_on_a_log_axis(
    show: Any, make_run: MakeRun
) -> None:
    page, run = show().page, make_run("long", num_steps=24)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    page.goto(write_report(run).as_uri())
    figure = page.locator("figure", has=page.locator("figcaption", has_text="Divergence"))
    figure.locator("svg").scroll_into_view_if_needed()
    box, values = figure.locator("svg").bounding_box(), figure.locator("[data-curve]")
    at = figure.locator(".at")

    def told() -> tuple[int, list[float]]:
        texts = values.all_inner_texts()
        return int(at.inner_text().removeprefix("step ")), [float(t.split(",")[0]) for t in texts]

    def recorded(step: int) -> list[float]:
        return [steps[step]["reverse_kl_nats"], steps[step]["forward_kl_nats"]]

    seen = set()
    for share in (0.3, 0.5, 0.9):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 60)
        step, shown = told()
        seen.add(step)
        assert shown == pytest.approx(recorded(step), rel=1e-5)
    assert len(seen) == 3
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 60)
    page.mouse.up()
    figure.locator(".box").focus()
    zoomed = []
    for _ in range(24):
        page.keyboard.press("ArrowLeft")
        zoomed.append(told()[0])
    assert 6 < min(zoomed) < max(zoomed) < 16
    assert told()[1] == pytest.approx(recorded(min(zoomed)), rel=1e-5)
    page.keyboard.press("ArrowRight")
    assert told()[0] == min(zoomed) + 1
    page.keyboard.press("ArrowLeft")
    page.fill("#smoothing", "0.5")
    first = values.first.inner_text()
    weights = [0.5 ** (min(zoomed) - i) for i in range(min(zoomed) + 1)]
    mean = sum(w * s["reverse_kl_nats"] for w, s in zip(weights, steps, strict=False))
    smooth = float(first.partition("smoothed ")[2])
    assert smooth == pytest.approx(mean / sum(weights), rel=1e-5)
    page.click("#zoom-reset")
    before = figure.locator("svg text").all_text_contents()
    page.check("#log-axis")
    assert "0" in before
    assert "0" not in figure.locator("svg text[text-anchor=end]").all_text_contents()


def number(text: str) -> float:
    return float(text.removeprefix("< ").removesuffix(" nats"))


def test_a_token_shows_what_was_recorded_when_chosen_and_when_pointed_at(show: Any) -> None:
    opened = show()
    page = opened.page
    page.click("#tab-viewer")
    open_text(page, "held-out", "a")
    page.select_option("#text-step", "10")
    line = opened.line(10)
    for index, act in ((0, "click"), (7, "hover")):
        getattr(page.locator("#readings .token").nth(index), act)()
        for name in ("entropy", "reverse_kl", "forward_kl", "teacher_entropy", "log_p", "log_q"):
            shown = number(page.inner_text(f'#detail [data-name="{name}"]'))
            assert shown == pytest.approx(line[name][index], rel=1e-3), name
        pairs = {r.get_attribute("data-id"): r.locator("td").all_inner_texts()
                 for r in page.locator("#detail .mirrored tbody tr").all()}  # fmt: skip
        for who, cell in (("student", 0), ("teacher", 3)):
            recorded = dict(zip(line[f"{who}_top"][index][::-1], line[f"{who}_share"][index][::-1],
                                strict=True))  # fmt: skip
            assert {i: number(pairs[str(i)][cell]) for i in recorded} == recorded
        rows = page.locator("#detail table").last.locator("tbody tr").all()
        assert [r.locator("th,td").all_inner_texts() for r in rows] == [
            [rule, str(line["rank"][rule][index]), "yes" if index in line["kept"][rule] else "no"]
            for rule in RULES
        ]
        words = page.inner_text("#detail p")
        choices = round(math.exp(line["entropy"][index]), 6)
        if line["entropy"][index] >= 0.02:
            assert f"The student's entropy is that of an even choice among {choices:.2g} " in words
        assert f"student {100 * math.exp(line['log_p'][index]):.3g} %" in words
    assert page.locator("#readings span.chosen").get_attribute("data-index") == "0"
    page.mouse.move(0, 0)
    shown = number(page.inner_text('#detail [data-name="log_p"]'))
    assert shown == pytest.approx(line["log_p"][0], rel=1e-3)


def open_text(page: Any, kind: str, prompt: str) -> None:
    """Choose a completion in the list, which has the texts of the lines and not their ids."""
    key = f"{kind} · {prompt} · sample 0"
    index = page.evaluate(
        """(key) => {
        const found = JSON.parse(document.getElementById("tokens").textContent).completions;
        const mean = (c) => c.reverse_kl.reduce((a, b) => a + b, 0) / c.reverse_kl.length;
        const best = {};
        for (const c of found) {
          const name = `${c.kind} · ${c.prompt_id} · sample ${c.sample}`;
          best[name] = Math.max(best[name] ?? 0, mean(c));
        }
        return Object.keys(best).sort((a, b) => best[b] - best[a]).indexOf(key);
      }""",
        key,
    )
    page.locator("#texts button").nth(index).click()


def test_completions_stand_by_falling_kl_and_special_tokens_in_frames(show: Any) -> None:
    opened = show(["<|im_end|>", "b", " c", "\n", "", "9"])
    page = opened.page
    page.click("#tab-viewer")
    listed = page.locator("#texts .about").all_inner_texts()
    kls = [max(float(kl) for kl in line.partition("KL ")[2].split(" → ")) for line in listed]
    assert kls == sorted(kls, reverse=True)
    assert len(listed) == 4
    open_text(page, "held-out", "a")
    line = opened.line(0)
    chips = page.locator("#readings .chip").all_inner_texts()
    expected = [opened.lines[0]["texts"][str(i)] for i in line["token"] if i in (0, 4)]
    assert chips == [text or "∅" for text in expected]
    page.locator("#texts button").first.focus()
    page.keyboard.press("ArrowDown")
    pressed = page.locator("#texts button[aria-pressed=true]")
    assert pressed.get_attribute("data-text") == "1"
    strip = page.locator("#readings svg.strip rect")
    assert strip.count() == NUM_TOKENS
    strip.nth(5).click()
    assert page.evaluate("document.activeElement.dataset.index") == "5"


def test_tokens_are_coloured_filtered_and_walked_by_keyboard(show: Any) -> None:
    opened = show()
    opened.page.click("#tab-viewer")
    open_text(opened.page, "held-out", "a")
    line, tokens = opened.line(0), opened.page.locator("#readings .token")
    for index in range(NUM_TOKENS):
        classes = (tokens.nth(index).get_attribute("class") or "").split()
        assert f"q{quadrant(line, index)}" in classes
        assert ("kept" in classes) == (index in line["kept"]["soft_or"])
    opened.page.select_option("#text-filter", "3")
    shown = [i for i in range(NUM_TOKENS) if quadrant(line, i) == 3]
    assert opened.page.locator("#readings .token:not(.off)").count() == len(shown)
    opened.page.locator("#readings .token").nth(4).focus()
    opened.page.keyboard.press("ArrowRight")
    assert "Position 5 " in opened.page.inner_text("#detail")
    opened.page.select_option("#text-other", label="step 10")
    assert opened.page.locator(".reading").count() == 2


@pytest.mark.parametrize("answer", ["short", "long " * 100, HOSTILE[1]])
def test_turns_and_inserted_text_stand_between_the_tokens(
    browser: Any, make_run: MakeRun, answer: str
) -> None:
    run = make_run(num_steps=3)
    lines = conversation_lines(BENIGN, answer)
    (run / "tokens.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with browser.new_context() as context:
        context.set_default_timeout(1000 * HANG_S)
        opened = Opened(context.new_page(), lines)
        opened.page.goto(write_report(run).as_uri())
        opened.page.click("#tab-viewer")
        group = opened.page.locator("#readings .prose").first
        order = group.evaluate("e => [...e.children].map((c) => c.localName)")
        turn = ["h4", *["span"] * 5, "details", "h4", *["span"] * 4, "details", "h4"]
        assert order == [*turn, *["span"] * 3]
        details = group.locator("details").first
        assert details.locator("pre").text_content() == answer
        is_open = details.get_attribute("open") is not None
        assert is_open == (len(answer) <= 400)
        details.locator("summary").click()
        assert details.locator("pre").is_visible() is not is_open
        assert opened.page.inner_text("#readings .outcome").startswith("no success · score 0.75")
        opened.page.click("#jump")
        assert opened.page.evaluate("document.activeElement.className").startswith("token")
        assert opened.complaints == []


def test_the_jump_goes_through_q3_by_falling_kl(show: Any) -> None:
    opened = show()
    opened.page.click("#tab-viewer")
    found = sorted(
        (
            n["reverse_kl"][i]
            for n in opened.lines
            for i in range(NUM_TOKENS)
            if quadrant(n, i) == 3
        ),
        reverse=True,
    )
    for expected in found[:3]:
        opened.page.click("#jump")
        shown = number(opened.page.inner_text('#detail [data-name="reverse_kl"]'))
        assert shown == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("how", ["fixed", "median"])
def test_the_map_counts_quadrants(show: Any, how: str) -> None:
    opened = show()
    opened.page.click("#tab-map")
    opened.page.select_option("#map-cut", how)
    opened.page.fill("#map-step", "1")
    lines = [n for n in opened.lines if (n["step"], n["kind"]) == (10, "held-out")]
    cuts = CUTS
    if how == "median":
        cuts = tuple(median(x for n in lines for x in n[c]) for c in ("entropy", "reverse_kl"))
    where = [(quadrant(n, i, cuts), n["reverse_kl"][i]) for n in lines for i in range(NUM_TOKENS)]
    for row, q in zip(opened.cells("#map-table"), (1, 2, 3, 4), strict=True):
        here = [kl for number, kl in where if number == q]
        mass = sum(here) / sum(kl for _, kl in where)
        share = f"{100 * len(here) / len(where):.1f} %"
        assert row[1:3] == [str(len(here)), share]
        assert float(row[3].removesuffix(" %")) == pytest.approx(100 * mass, abs=0.06)


def test_rules_and_gates_are_those_of_the_recording(show: Any) -> None:
    opened = show()
    opened.page.click("#tab-rules")
    lines = [n for n in opened.lines if (n["step"], n["kind"]) == (0, "held-out")]
    kept = {r: {(n["prompt_id"], i) for n in lines for i in n["kept"][r]} for r in RULES}
    table = opened.cells("#rules-tables div:nth-child(1)")
    for row, a in zip(table, RULES, strict=True):
        expected = [len(kept[a] & kept[b]) / len(kept[a] | kept[b]) for b in RULES]
        assert [float(cell) for cell in row[1:]] == pytest.approx(expected, abs=0.006)
    opened.page.click("#tab-gate")
    gates = [g for n in lines for g in n["gate"]]
    assert opened.cells("#gate-table")[0][1] == f"{100 * sum(gates) / len(gates):.1f} %"


def test_figures_and_page_count_the_same_bins(show: Any, tmp_path: Path) -> None:
    opened = show()
    opened.page.click("#tab-map")
    titles = opened.page.locator("#map-plot rect.bin title").all_text_contents()
    counts = [title.partition(":")[0] for title in titles]
    tokens = read_run(tmp_path / "run0").tokens
    rows = rows_of(snapshots(tokens)[0, "held-out"])
    bins = map_bins(rows, highest(rows_of(tokens)))
    expected = [f"{count} token{'s' * (count > 1)}" for count in bins.values()]
    assert sorted(counts) == sorted(expected)


def test_the_map_plays_its_steps_and_its_cells_lead_to_their_tokens(show: Any) -> None:
    opened = show()
    page = opened.page
    page.click("#tab-map")
    page.click("#map-play")
    page.locator("#map-step-value", has_text="step 10").wait_for()
    assert page.inner_text("#map-play") == "Play"
    tokens = [n for n in opened.lines if (n["step"], n["kind"]) == (10, "held-out")]
    total = sum(len(n["token"]) for n in tokens)
    for axis in "ij":
        titles = page.locator(f"#map-plot .marginal.{axis} title").all_text_contents()
        assert sum(int(title.split()[0]) for title in titles) == total
    page.locator("#map-plot .bin").first.focus()
    before = page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Enter")
    assert before in page.inner_text("#map-cell h3")
    assert page.locator("#map-cell li").count() == int(before.split()[0])
    kl = float(page.locator("#map-cell li .about").first.inner_text().removeprefix(" KL "))
    moved = set()
    for key in ("ArrowUp", "ArrowRight", "ArrowLeft", "ArrowDown"):
        page.keyboard.press(key)
        moved.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert len(moved) > 1
    page.locator("#map-cell li button").first.click()
    assert page.is_visible("#view-viewer")
    assert page.input_value("#text-step") == "10"
    shown = number(page.inner_text('#detail [data-name="reverse_kl"]'))
    assert shown == pytest.approx(kl, rel=5e-3)


def test_runs_side_by_side_in_one_token_viewer(
    show: Any, make_run: MakeRun, tmp_path: Path
) -> None:
    """A rule of its own in one run, and the other run's completion beside it."""
    opened, runs = show(), [make_run("a", num_steps=3), make_run("b", num_steps=3, seed=1)]
    for run, name in zip(runs, ("soft_or", "own"), strict=True):
        lines = token_lines(BENIGN)
        for line in lines:
            line["rank"][name], line["kept"][name] = line["rank"]["q3"], line["kept"]["q3"]
        (run / "tokens.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    records = [read_run(run) for run in runs]
    write_comparison(compare_records(records), records, tmp_path / "compare.html")
    page = opened.page
    page.goto((tmp_path / "compare.html").as_uri())
    assert not page.locator("#tab-gate").count(), "no run used EOPD"
    for view in VIEWS[:-1]:
        page.click(f"#tab-{view}")
        assert page.is_visible(f"#view-{view}")
    page.click("#tab-viewer")
    assert page.locator("#texts button").count() == 2 * 4
    open_text(page, "a · held-out", "a")
    page.select_option("#text-other", label="b · held-out, step 10")
    titles = page.locator(".reading h3").all_inner_texts()
    expected = ["a · held-out, step 0", "b · held-out, step 10"]
    assert [title.partition(" mean KL")[0] for title in titles] == expected
    page.locator('.token[data-side="1"]').nth(2).click()
    assert len(page.locator("#detail table").last.locator("tbody tr").all()) == len(RULES) + 1
    page.click("#tab-rules")
    page.select_option("#rules-kind", "b · held-out")
    assert [row[0] for row in opened.cells("#rules-tables div:nth-child(1)")] == [*RULES, "own"]
    page.select_option("#rules-kind", "a · held-out")
    assert [row[0] for row in opened.cells("#rules-tables div:nth-child(1)")] == [*RULES]
    assert opened.complaints == []


SHAPE = """() => {
  const walk = (e) => [e.localName, ...[...e.attributes].map((a) => a.name).sort(),
    ...[...e.children].map(walk)];
  return JSON.stringify(walk(document.querySelector("main")));
}"""


def test_hostile_text_changes_nothing_but_text(show: Any) -> None:
    texts = (HOSTILE * 4)[:100]
    benign, hostile = show([f"t{i}" for i in range(100)]), show(texts)
    for view in VIEWS:
        for opened in (benign, hostile):
            opened.page.click(f"#tab-{view}")
        assert hostile.page.evaluate(SHAPE) == benign.page.evaluate(SHAPE)
        for index in range(NUM_TOKENS) if view == "viewer" else ():
            for opened in (benign, hostile):
                opened.page.locator("#readings .token").nth(index).dispatch_event("pointerover")
            assert hostile.page.evaluate(SHAPE) == benign.page.evaluate(SHAPE)
        if view == "map":
            for opened in (benign, hostile):
                opened.page.locator("#map-plot .bin").first.dispatch_event("click")
            assert hostile.page.evaluate(SHAPE) == benign.page.evaluate(SHAPE)
    assert hostile.complaints == []
    assert len(hostile.requests) == 1


def test_a_markup_element_would_be_noticed(show: Any) -> None:
    """Negative control for the comparison above, and for the policy: a script does not run."""
    opened = show()
    before = opened.page.evaluate(SHAPE)
    opened.page.evaluate(
        "document.querySelector('h1').innerHTML += '<img src=\"//evil.example\" onerror=alert(1)>'"
    )
    assert opened.page.evaluate(SHAPE) != before
    assert any("Content Security Policy" in line for line in opened.complaints)
