"""A page stays below 5 MB, and says what it leaves out for that."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from token_lines import token_lines

from tutelage.config.schema import RecordingConfig
from tutelage.report import token_viewer
from tutelage.report.run_page import write_report

MakeRun = Callable[..., Path]


def completions_of(page: Path) -> list[dict[str, Any]]:
    """The recorded completions that a page embeds, which may be none."""
    found = re.search(r'id="tokens">(.*?)</script>', page.read_text("utf-8"))
    return [] if found is None else [*json.loads(found[1])["completions"]]


def test_the_largest_recording_gives_a_page_below_five_megabytes(make_run: MakeRun) -> None:
    run, lines = make_run(num_steps=200), token_lines([f" word{i}" for i in range(200)])
    size, limit = 0, RecordingConfig().max_bytes
    with (run / "tokens.jsonl").open("w") as file:
        for number, line in enumerate(itertools.cycle(lines)):
            # ids as long as those of a vocabulary of 49,152 entries
            moved = {
                k: [[i + 48_000 for i in row] for row in line[k]]
                for k in ("student_top", "teacher_top")
            }
            text = json.dumps(line | moved | {"step": number // 6, "texts": {}}) + "\n"
            size += len(text)
            if size > limit:
                break
            file.write(text)
    assert 0.9 * limit < (run / "tokens.jsonl").stat().st_size
    page = write_report(run)
    assert page.stat().st_size <= 5_000_000
    shown = completions_of(page)
    steps = sorted({line["step"] for line in shown})
    assert (steps[0], steps[-1]) == (0, (number - 1) // 6)
    said = f"shows {len(shown):,} of {number:,} recorded completions, of {len(steps):,} of"
    assert said in page.read_text("utf-8")
    assert len(shown) > 0.8 * number


@pytest.mark.parametrize(
    ("share", "shown"), [(1.0, [0] * 3 + [10] * 3), (0.8, [0, 0, 10, 10]), (0.01, [])]
)
def test_completions_are_left_out_where_the_page_would_be_too_large(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, share: float, shown: list[int]
) -> None:
    run = make_run(num_steps=3)
    (run / "tokens.jsonl").write_text("\n".join(map(json.dumps, token_lines([" a", " b"]))))
    (size,) = re.findall(r'id="tokens">(.*?)</script>', write_report(run).read_text("utf-8"))
    monkeypatch.setattr(token_viewer, "MAX_BYTES", share * len(size))
    page = write_report(run)
    assert [line["step"] for line in completions_of(page)] == shown
    said = f"shows {len(shown)} of 6 recorded completions"
    assert (said in page.read_text("utf-8")) == (share < 1)
