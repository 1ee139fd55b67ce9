"""Figures for papers: the page's plots as files, named on standard output, errors in one line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import pytest
from token_lines import NUM_TOKENS, token_lines

from tutelage.cli import main
from tutelage.report.panels import panels_of
from tutelage.report.records import read_run
from tutelage.report.token_plots import highest, map_bins
from tutelage.report.tokens import cuts_of, jaccard, kept_share, quadrant, rows_of, snapshots

MakeRun = Callable[..., Path]
Lines = list[dict[str, Any]]


def recorded(make_run: MakeRun) -> tuple[Path, Lines]:
    run, lines = make_run(num_steps=3), token_lines(["a", "b", " c"])
    (run / "tokens.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run, lines


@pytest.mark.slow
def test_every_plot_becomes_an_svg_and_a_png(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = recorded(make_run)
    folder = tmp_path / "new" / "figures"
    assert main(["report", str(run), "--figures", str(folder)]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(printed) == sorted(folder.iterdir())
    names = {path.stem for path in printed}
    assert len(printed) == 2 * len(names)
    assert {"accuracy", "loss", "main-memory", "high-entropy-tokens"} <= names
    for part in ("entropy-kl-map", "entropies", "rules-overlap", "rules-kept"):
        found = {name for name in names if name.startswith(f"{part}-")}
        # A training rollout was recorded once, so its first snapshot is its last.
        steps = {f"{part}-{kind}-step-{s}" for kind in ("held-out", "training") for s in (0, 10)}
        assert found == steps
    for path in printed:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")
    assert not (run / "report.html").exists()
    assert "reverse KL δ, nats" in (folder / "entropy-kl-map-held-out-step-0.svg").read_text()
    assert "GiB, peak so far" in (folder / "main-memory.svg").read_text()


def test_the_numbers_drawn_are_those_recorded(make_run: MakeRun) -> None:
    run, lines = recorded(make_run)
    record = read_run(run)
    here = snapshots(record.tokens)[0, "held-out"]
    rows = rows_of(here)
    mine = [n for n in lines if (n["step"], n["kind"]) == (0, "held-out")]
    entropies = [x for n in mine for x in n["entropy"]]
    kls = [x for n in mine for x in n["reverse_kl"]]
    assert [(r.entropy, r.reverse_kl) for r in rows] == list(zip(entropies, kls, strict=True))
    cuts = cuts_of(rows, {"quadrant_thresholds": "median"})
    assert cuts == (median(entropies), median(kls))
    counts = Counter(quadrant(row, cuts) for row in rows)
    assert counts[3] == sum(
        h <= cuts[0] and kl > cuts[1] for h, kl in zip(entropies, kls, strict=True)
    )
    kept = {rule: {(k, i) for k, n in enumerate(mine) for i in n["kept"][rule]}
            for rule in ("q3", "entropy")}  # fmt: skip
    assert jaccard(rows, "q3", "entropy") == pytest.approx(
        len(kept["q3"] & kept["entropy"]) / len(kept["q3"] | kept["entropy"])
    )
    assert kept_share(rows, "q3") == pytest.approx(2 / NUM_TOKENS)
    bins = map_bins(rows, highest(rows))
    assert bins.total() == len(rows)
    assert bins[31, map_bins([max(rows, key=lambda r: r.entropy)], highest(rows)).popitem()[0][1]]


def test_statistics_that_are_missing_take_no_place(make_run: MakeRun) -> None:
    run, lines = recorded(make_run)
    lines[0]["entropy"][3] = None
    (run / "tokens.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert len(rows_of(read_run(run).tokens)) == len(lines) * NUM_TOKENS - 1


@pytest.mark.parametrize("problem", ["no run", "nothing to draw", "file in the way"])
def test_what_cannot_be_drawn_is_one_line(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str
) -> None:
    run, folder = make_run(num_steps=2), tmp_path / "figures"
    if problem == "no run":
        run = tmp_path / "missing"
    elif problem == "file in the way":
        folder.write_text("")
    else:
        for name in ("evaluation.jsonl", "samples.jsonl", "evaluation_rows.jsonl"):
            (run / name).unlink()
        (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert main(["report", str(run), "--figures", str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_memory_is_drawn_where_it_was_measured(make_run: MakeRun) -> None:
    run = make_run(num_steps=3)
    record = read_run(run)
    panels = {panel.title: panel for panel in panels_of(record)}
    assert "Accelerator memory" not in panels
    (curve,) = panels["Main memory"].curves
    peaks = [max((step.peak_rss_bytes or {}).values()) / 2**30 for step in record.steps]
    assert [value for _, value in curve.points] == peaks
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["peak_rss_bytes"]
        line["peak_device_bytes"] = {"rollout": 3 * 2**30, "learn": 5 * 2**30}
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    panels = {panel.title: panel for panel in panels_of(read_run(run))}
    assert "Main memory" not in panels
    by_phase = {c.label: {y for _, y in c.points} for c in panels["Accelerator memory"].curves}
    assert by_phase == {"rollout": {3.0}, "learn": {5.0}}


def test_the_gate_is_drawn_over_the_steps(make_run: MakeRun) -> None:
    run = make_run(num_steps=3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"gate_share": line["step"] / 10, "gated_forward_kl_nats": line["step"] / 5}
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    panels = {panel.title: panel for panel in panels_of(read_run(run))}
    gate = {c.label: c.points for c in panels["High-entropy tokens"].curves}["EOPD gate: open"]
    found = {c.label: c.points for c in panels["KL where teacher entropy is high"].curves}
    assert gate == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert found["forward KL, gated"] == [(0, 0.0), (1, 0.2), (2, 0.4)]
