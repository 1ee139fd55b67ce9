"""The page: hostile text stays text, numbers are those of the run, nothing leaves the file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import html5lib
import pytest
from token_lines import token_lines

from tutelage.errors import RunError
from tutelage.report import page as page_module
from tutelage.report import plots, text
from tutelage.report.embed import template_text
from tutelage.report.panels import MAX_POINTS, panels_of
from tutelage.report.plots import draw_panel
from tutelage.report.records import read_run
from tutelage.report.run_page import write_report

MakeRun = Callable[..., Path]
Tree = tuple[Any, ...]

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    '"><script>alert(1)</script>',
    "'><img src=x onerror=alert(1)>",
    "</pre><iframe src=javascript:alert(1)></iframe>",
    "</style><script>alert(1)</script>",
    "<style>*{display:none}</style>",
    "<!--",
    "--><script>alert(1)</script><!--",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<a href='javascript:alert(1)'>x</a>",
    "<body onload=alert(1)>",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<form action=//evil.example><input name=a>",
    "<object data=//evil.example>",
    "<math><mtext></mtext><mglyph><style><img src=x onerror=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "{{ 7 * 7 }}{% for x in ().__class__.__bases__ %}{{ x }}{% endfor %}",
    "${7*7} <%= 7*7 %>",
    "<scr\x00ipt>alert(1)</scr\x00ipt>",
    "\u202e<b>reversed</b>",
    "\x1b[31mred\x1b]0;title\x07",
    "\ud800 lone surrogate \udfff",
    "$\\frac{broken mathtext",
    "<plaintext>",
    "<textarea><title><noscript><xmp>",
]


def page_of(run: Path) -> str:
    return write_report(run).read_text("utf-8")


def shape(element: ElementTree.Element) -> Tree:
    """Element tree with attributes but without text; picture data and policy are left out."""
    attributes = {k: v for k, v in element.attrib.items() if k not in ("src", "srcset", "alt")}
    return (element.tag, sorted(attributes.items()), [shape(child) for child in element])


def parsed(page: str) -> ElementTree.Element:
    return html5lib.parse(page, namespaceHTMLElements=False)


def cells(page: str, table: str) -> list[list[str]]:
    """Text of the rows of a table with this id."""
    found = parsed(page).find(f".//table[@id='{table}']")
    assert found is not None
    rows = found.findall(".//tr")
    return [["".join(cell.itertext()).strip() for cell in row] for row in rows]


def fill_strings(run: Path, value: str) -> None:
    """Put one string wherever the files of a run hold free text, keys of mappings included."""
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        sample |= {"prompt": value, "completion": value}
    (run / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step in metrics:
        step["seconds"][value] = 1.0
        step["quadrants"][value] = {"share": 1.0}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    manifest = {
        "commit": value,
        "versions": {value: value, "torch": value},
        "config": {value: value, "student": {"path": value, "more": [value, {value: value}]}},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_strings_change_no_element_and_stay_readable(make_run: MakeRun, value: str) -> None:
    benign, hostile = make_run("benign/run", num_steps=3), make_run("hostile/run", num_steps=3)
    fill_strings(benign, "harmless")
    fill_strings(hostile, value)
    page = page_of(hostile)
    assert shape(parsed(page)) == shape(parsed(page_of(benign)))
    shown = {"".join(pre.itertext()) for pre in parsed(page).iter("pre")}
    assert text.visible(value) in shown


def test_the_shape_of_a_page_does_notice_an_injection() -> None:
    """Negative control for the comparison above."""
    benign = "<p>harmless</p>"
    for value in ("<b>x</b>", "</p><p>", "<script>1</script>"):
        assert shape(parsed(benign)) != shape(parsed(f"<p>{value}</p>"))
    assert shape(parsed("<p class='a'>")) != shape(parsed("<p class='a' onclick='b'>"))


@pytest.mark.parametrize("value", ["<script>x</script>", '"><b>'])
def test_a_hostile_folder_name_stays_text(make_run: MakeRun, value: str) -> None:
    name = value.replace("/", "")
    page = parsed(page_of(make_run(name)))
    heading, title = page.find(".//h1"), page.find(".//title")
    assert heading is not None
    assert title is not None
    assert heading.text == name
    assert title.text == f"{name} · tutelage"


class References(HTMLParser):
    """Collects every attribute that could make a browser fetch or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in {"src", "srcset", "href", "action", "data", "poster", "style"}:
                self.found.append(value or "")
            assert not name.startswith("on"), f"event handler {name}"


def test_the_page_refers_to_nothing_outside_itself(make_run: MakeRun) -> None:
    page = page_of(make_run())
    references = References()
    references.feed(page)
    assert references.found == []
    assert not references.tags & {"link", "iframe", "object", "embed", "base", "img", "picture"}
    assert set(re.findall(r"https?://[^\"]*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(", page)


def test_pictures_hold_no_scripts_and_fetch_nothing(make_run: MakeRun) -> None:
    for panel in panels_of(read_run(make_run()))[:2]:
        svg = ElementTree.fromstring(plots.render(partial(draw_panel, panel), plots.LIGHT))
        for element in svg.iter():
            assert not element.tag.endswith(("script", "image", "foreignObject"))
            for name, value in element.attrib.items():
                is_link = name.endswith("href")
                assert not is_link or value.startswith("#")


def test_the_policy_forbids_everything_but_the_own_style_and_script(make_run: MakeRun) -> None:
    page = parsed(page_of(make_run()))
    (policy,) = [
        meta.get("content", "")
        for meta in page.iter("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    (style,), (_, script) = page.iter("style"), page.iter("script")
    hashes = [
        base64.b64encode(hashlib.sha256((part.text or "").encode()).digest()).decode()
        for part in (style, script)
    ]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{hashes[0]}'",
        "script-src": f"'sha256-{hashes[1]}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_numbers_on_the_page_are_those_of_the_files(make_run: MakeRun) -> None:
    run = make_run()
    page = page_of(run)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = {row[0]: row[2:] for row in cells(page, "figures")}
    for label, key in {
        "loss": "loss",
        "reverse KL": "reverse_kl_nats",
        "forward KL": "forward_kl_nats",
        "entropy": "entropy_nats",
        "teacher entropy": "teacher_entropy_nats",
        "grad norm": "grad_norm",
        "learning rate": "learning_rate",
        "completion length mean": "completion_length_mean",
        "truncated share": "truncated_share",
    }.items():
        expected = [metrics[0][key], metrics[-1][key]]
        assert [float(cell) for cell in shown[label]] == pytest.approx(expected, rel=1e-3)
    total_rows = sum(step["num_rows"] for step in metrics)
    total_kept = sum(step["num_kept"] for step in metrics)
    assert f"<dd>{total_rows:,}</dd>" in page
    assert f"<dd>{total_kept:,} ({100 * total_kept / total_rows:.1f} %)</dd>" in page


def test_the_quadrant_table_shows_first_and_last_step(make_run: MakeRun) -> None:
    run = make_run()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = cells(page_of(run), "quadrants")
    assert rows[0][1:] == ["step 0", "step 23"]
    for row, key in zip(rows[2:], ("q1", "q2", "q3", "q4"), strict=True):
        expected = [
            f"{100 * step['quadrants'][key][column]:.1f} %"
            for step in (metrics[0], metrics[-1])
            for column in ("share", "kl_mass", "kept_share")
        ]
        assert row[1:] == expected
        assert row[0].endswith(key.upper())


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        ("median", "high means above the median of the step."),
        ([0.5, 1], "high means entropy above 0.5 nats and divergence above 1 nats."),
        ("<b>", "entropy and the reverse KL. Tokens"),
    ],
)
def test_the_page_says_what_counts_as_high(make_run: MakeRun, cuts: object, words: str) -> None:
    run = make_run()
    (run / "manifest.json").write_text(json.dumps({"config": {"quadrant_thresholds": cuts}}))
    assert words in page_of(run)


def test_the_page_says_why_a_run_ended_early_and_which_checkpoint_is_the_best(
    make_run: MakeRun,
) -> None:
    run = make_run(drop=("metrics.jsonl",))
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": null}\n')
    best = {"metric": "mean_at_k", "step": 20, "value": 0.625, "model": "checkpoint-000020/model"}
    ending = {"stopped_early": {"step": 40, "reason": "no better <one>"}, "best": best}
    (run / "manifest.json").write_text(json.dumps(ending))
    page = page_of(run)
    assert "Stopped early: no better &lt;one&gt;." in page
    assert "Best checkpoint: mean_at_k 0.625 after step 20." in page


def test_a_run_without_a_grader_shows_no_accuracy(make_run: MakeRun) -> None:
    run = make_run()
    lines = [
        {"step": step, "model": "student", "k": 8, "num_problems": 3, "num_samples": 8,
         "mean_at_k": None, "held_out_reverse_kl_nats": kl}
        for step, kl in ((0, 1.5), (24, 0.5))
    ]  # fmt: skip
    (run / "evaluation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert cells(page_of(run), "evaluations") == [
        ["model", "held-out reverse KL"],
        ["student, step 0", "1.5"],
        ["student, step 24", "0.5"],
    ]


def test_before_after_and_teacher_are_shown_with_their_intervals(make_run: MakeRun) -> None:
    rows = cells(page_of(make_run()), "evaluations")
    assert rows[0][2:5:2] == ["mean@8", "pass@8"]
    assert rows[1] == [
        "student, step 0",
        "",
        "26.2 %",
        "20.2 – 31.2",
        "54.0 %",
        "46.0 – 61.0",
        "0.71",
    ]
    assert rows[2][:4] == ["student, step 24", "", "85.1 %", "79.1 – 90.1"]
    assert rows[3] == ["teacher", "", "96.3 %", "90.3 – 100.0", "100.0 %", "92.0 – 100.0", "–"]


def test_the_paired_change_is_that_of_the_saved_verdicts(make_run: MakeRun) -> None:
    run = make_run()
    rows = [json.loads(line) for line in (run / "evaluation_rows.jsonl").read_text().splitlines()]
    shares = {step: [row["is_correct"] for row in rows if row["step"] == step] for step in (0, 24)}
    change = 100 * (sum(shares[24]) - sum(shares[0])) / len(shares[0])
    assert f"<strong>{change:+.1f} points</strong>" in page_of(run)


def test_a_torn_line_is_said_on_the_page(make_run: MakeRun) -> None:
    run = make_run(num_steps=4)
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 4, "lo')
    assert "metrics.jsonl (line 5) is cut off" in page_of(run)
    assert "<dt>steps</dt><dd>4</dd>" in page_of(run)


def test_a_run_that_measured_almost_nothing_still_has_a_page(make_run: MakeRun) -> None:
    run = make_run(drop=("evaluation.jsonl", "samples.jsonl", "evaluation_rows.jsonl"))
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": null}\n{"step": 1}\n')
    (run / "manifest.json").write_text("{}")
    page = page_of(run)
    assert "<dt>steps</dt><dd>2</dd>" in page
    assert "<figure>" not in page
    assert "nan" not in page.lower()


def test_panels_without_values_are_left_out(make_run: MakeRun) -> None:
    run = make_run(drop=("evaluation.jsonl",))
    lines = [{"step": 0, "loss": 2.0}, {"step": 1, "loss": None}, {"step": 2, "loss": 1.0}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (panel,) = panels_of(read_run(run))
    assert panel.title == "Loss"
    assert panel.curves[0].points == [(0.0, 2.0), (2.0, 1.0)]
    assert panel.alt == "Loss (per kept token). loss: 2 at step 0, 1 at step 2."


def test_curves_draw_what_the_run_measured(make_run: MakeRun) -> None:
    record = read_run(make_run(num_steps=6))
    panels = {panel.title: panel for panel in panels_of(record)}
    assert list(panels)[:2] == ["Accuracy", "Divergence from the teacher"]
    reverse = panels["Divergence from the teacher"].curves[0]
    assert reverse.points == [(s.step, s.reverse_kl_nats) for s in record.steps]
    accuracy = panels["Accuracy"].curves
    assert accuracy[0].points == [(0, 0.262), (3, 0.655), (6, 0.851)]
    assert accuracy[0].band[0] == pytest.approx((0, 0.202, 0.312))
    assert accuracy[2].is_reference
    seconds = [dict(curve.points)[4] for curve in panels["Time"].curves]
    assert sum(seconds) == pytest.approx(sum((record.steps[4].seconds or {}).values()))


def test_long_runs_are_averaged_in_groups_that_keep_the_mean(make_run: MakeRun) -> None:
    run = make_run(num_steps=1600)
    record = read_run(run)
    page = write_report(run)
    (loss,) = next(p for p in panels_of(record) if p.title == "Loss").curves
    assert len(loss.points) == 800 < MAX_POINTS
    mean = sum(step.loss or 0.0 for step in record.steps) / 1600
    assert sum(value for _, value in loss.points) / 800 == pytest.approx(mean)
    assert "Each point of a curve is the mean of 2 steps." in page.read_text("utf-8")
    assert page.stat().st_size <= 2_000_000


def test_large_samples_and_configurations_keep_the_page_small(make_run: MakeRun) -> None:
    run = make_run(num_steps=2)
    fill_strings(run, "<x>" * 100_000)
    assert write_report(run).stat().st_size <= 2_000_000


def test_the_same_run_gives_the_same_page(make_run: MakeRun) -> None:
    run = make_run(num_steps=5)
    assert page_of(run) == page_of(run)


def test_every_curve_is_in_words_without_a_script(make_run: MakeRun) -> None:
    run = make_run(num_steps=5)
    page = parsed(page_of(run))
    (data, _) = page.iter("script")
    embedded = json.loads(data.text or "")
    figures = list(page.iter("figure"))
    panels = {panel.title: panel for panel in panels_of(read_run(run))}
    assert [f.findtext("p") for f in figures] == [panel["words"] for panel in embedded]
    assert {"Accuracy", "Loss", "Time"} <= {f.findtext("figcaption").split("  ")[0].strip()
                                          for f in figures}  # fmt: skip
    flat = page.find(".//dl[@class='flat']")
    assert flat is not None
    assert "".join(flat.itertext()).split()[:2] == ["Kept", "tokens"]
    loss = next(p for p in embedded if p["curves"][0]["label"] == "loss")["curves"][0]
    points = panels["Loss"].curves[0].points
    assert [*zip(loss["x"], loss["y"], strict=True)] == [
        pytest.approx(point, rel=1e-8) for point in points
    ]


def test_the_page_goes_where_it_is_asked_to(make_run: MakeRun, tmp_path: Path) -> None:
    run, folder = make_run(num_steps=2), tmp_path / "pages"
    folder.mkdir()
    assert write_report(run) == run / "report.html"
    assert write_report(run, folder) == folder / "report.html"
    assert write_report(run, folder / "new" / "a.html") == folder / "new" / "a.html"
    assert sorted(os.listdir(folder)) == ["new", "report.html"]


def test_a_page_that_cannot_be_written_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot be written"):
        write_report(make_run(num_steps=2), tmp_path / "file" / "report.html")


def test_recorded_tokens_bring_one_script_and_its_hash(make_run: MakeRun) -> None:
    run = make_run(num_steps=3)
    (run / "tokens.jsonl").write_text("\n".join(map(json.dumps, token_lines(HOSTILE))))
    source = page_of(run)
    page = parsed(source)
    _, data, script = page.iter("script")
    assert data.attrib == {"type": "application/json", "id": "tokens"}
    assert not set(data.text or "") & set("<>&")
    assert json.loads(data.text or "")["texts"]["0"] == text.visible(HOSTILE[0], 40)
    digest = base64.b64encode(hashlib.sha256((script.text or "").encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in source
    assert not re.search(
        "innerHTML|outerHTML|insertAdjacent|document.write|eval|Function", script.text or ""
    )


@pytest.mark.parametrize("change", [{"entropy": [1.0]}, {"kept": {}}, {"token": "x"}])
def test_token_lines_that_do_not_fit_are_refused(make_run: MakeRun, change: Any) -> None:
    run, (line, *_) = make_run(num_steps=3), token_lines(["a"])
    (run / "tokens.jsonl").write_text(json.dumps(line | change) + "\n")
    with pytest.raises(RunError, match=r"tokens.jsonl line 1 does not fit"):
        write_report(run)


def test_the_script_finds_every_element_that_it_names() -> None:
    """Ids in the scripts stand on the page, and every tab and control has a view."""
    folder = Path(page_module.__file__).parent / "templates"
    script = "".join(path.read_text("utf-8") for path in sorted(folder.glob("*.js")))
    html = "".join(path.read_text("utf-8") for path in sorted(folder.glob("*.html")))
    called = set(re.findall(r'\$\("([\w-]+)"\)', script))
    chosen = dict(re.findall(r'control\("(\w+)", \w+, \{(.*?)\}\);', script, re.DOTALL))
    called |= {name for choices in chosen.values() for name in re.findall(r'"([\w-]+)":', choices)}
    ids = {n for pair in re.findall(r'id="([\w-]+)"|choice\("([\w-]+)"', html) for n in pair}
    assert len(called) > 20
    assert called - {"tab-viewer"} <= ids
    tabs = re.findall(r'\("(\w+)", "[^"]+"\)', template_text("report.html"))
    views = set(re.findall(r'id="view-(\w+)"', html))
    assert set(tabs) - {"overview"} == set(chosen) == views - {"overview"}
    controls = re.findall(r'data-for="(\w+)"|choice\("[\w-]+", "[^"]+", "(\w+)"\)', html)
    assert {name for pair in controls for name in pair if name} <= set(chosen)


def test_a_run_on_rewards_shows_them(make_run: MakeRun) -> None:
    run = make_run(num_steps=3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "Reward" not in {panel.title for panel in panels_of(read_run(run))}
    for number, line in enumerate(lines):
        line |= {"reward_mean": 0.25 * number, "no_signal_share": 0.5}
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    panels = {panel.title: panel for panel in panels_of(read_run(run))}
    assert [y for _, y in panels["Reward"].curves[0].points] == [0.0, 0.25, 0.5]
    assert [y for _, y in panels["Reward"].curves[1].points] == [0.5] * 3
    assert "reward mean" in write_report(run).read_text()
