"""Size of a page, and how long headless Chromium takes until a reader can use it.

    python benchmarks/performance/report_page.py runs/demo-1a2b3c4d/report.html --rounds 5
    python benchmarks/performance/report_page.py --smollm2

`--smollm2` makes a page at least as large as SmolLM2's: 200 steps, five snapshots of 16 completions
of 128 tokens, 49,152 ids; the values are random. Every round starts a fresh browser.
Seconds are from the start of the navigation: `open_s` to the end of the load event, by when the
scripts have run; `interactive_s` to the frame that shows a curve's value under the pointer.
`views_s` are from the click on a tab to the frame that shows it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from tutelage.report.run_page import write_report

LOADED = """() => new Promise((done) => {
  const look = () => {
    const [t] = performance.getEntriesByType("navigation");
    if (t.loadEventEnd) done(t.loadEventEnd / 1000); else setTimeout(look, 5);
  };
  look();
})"""
POINTED = """() => new Promise((done) => {
  const svg = document.querySelector("svg.curves"), box = svg.getBoundingClientRect();
  const start = performance.now(), at = document.querySelector(".key .at").textContent;
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 3 }));
  if (document.querySelector(".key .at").textContent === at) throw new Error("no value");
  requestAnimationFrame(() => setTimeout(() => done((performance.now() - start) / 1000)));
})"""
CLICKED = """(tab) => new Promise((done) => {
  const start = performance.now();
  tab.click();
  requestAnimationFrame(() => setTimeout(() => done((performance.now() - start) / 1000)));
})"""
NUM_STEPS, NUM_TOKENS, NUM_COMPLETIONS, VOCABULARY = 200, 128, 16, 49_152
RULES = ("soft_or", "q3", "entropy", "divergence", "random")


def main() -> None:
    """Print one JSON object."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("page", type=Path, nargs="?")
    options.add_argument("--smollm2", action="store_true", help="make a page of SmolLM2's size")
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    if given.smollm2 == (given.page is not None):
        options.error("name a page, or let --smollm2 make one")
    with tempfile.TemporaryDirectory() as folder:
        page = smollm2_page(Path(folder)) if given.smollm2 else given.page
        print(json.dumps(measured(page, given.rounds), indent=1))


def measured(path: Path, rounds: int) -> dict[str, Any]:
    """Medians and the largest values over rounds."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    loads: list[float] = []
    interactive: list[float] = []
    views: dict[str, list[float]] = {}
    for _ in range(rounds):
        with sync_playwright() as playwright:
            opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = opened.new_page()
            page.goto(path.resolve().as_uri())
            loads.append(page.evaluate(LOADED))
            interactive.append(loads[-1] + page.evaluate(POINTED))
            for tab in page.locator("[role=tab]").all():
                name = tab.get_attribute("data-view") or ""
                views.setdefault(name, []).append(tab.evaluate(CLICKED))
            opened.close()
    return {
        "page_bytes": path.stat().st_size,
        "open_s": {"median": statistics.median(loads), "largest": max(loads)},
        "interactive_s": {"median": statistics.median(interactive), "largest": max(interactive)},
        "views_s": {name: statistics.median(found) for name, found in views.items()},
        "rounds": rounds,
    }


def smollm2_page(run: Path) -> Path:
    """A run folder with random values, and its page."""
    rng = random.Random(0)
    metrics = [
        {"step": step, "loss": rng.random(), "num_rows": 2000, "num_kept": 2000,
         "reverse_kl_nats": rng.random(), "entropy_nats": rng.random(),
         "teacher_entropy_nats": rng.random(), "seconds": {"rollout_s": 3 + rng.random()}}
        for step in range(1, NUM_STEPS + 1)
    ]  # fmt: skip
    tokens = [
        token_line(rng, step, "held-out" if i % 2 else "training", i)
        for step in range(0, NUM_STEPS + 1, NUM_STEPS // 4)
        for i in range(NUM_COMPLETIONS)
    ]
    (run / "manifest.json").write_text("{}")
    for name, lines in (("metrics", metrics), ("tokens", tokens)):
        (run / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return write_report(run)


def token_line(rng: random.Random, step: int, kind: str, number: int) -> dict[str, Any]:
    """One recorded completion."""

    def column(high: float) -> list[float]:
        return [float(f"{rng.random() ** 3 * high:.4g}") for _ in range(NUM_TOKENS)]

    def ids() -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(5)]

    tops = {who: [ids() for _ in range(NUM_TOKENS)] for who in ("student", "teacher")}
    token = [top[0] for top in tops["student"]]
    ranks = {rule: rng.sample(range(1, NUM_TOKENS + 1), NUM_TOKENS) for rule in RULES}
    named = {i for rows in tops.values() for row in rows for i in row}
    shares = [[0.5123, 0.2512, 0.1251, 0.0612, 0.0312]] * NUM_TOKENS
    return {
        "step": step, "kind": kind, "prompt_id": f"{kind}-{number}", "sample": 0,
        "prompt": "A question of some length about apples and pears. " * 6,
        "num_tokens": NUM_TOKENS, "token": token, "entropy": column(2), "reverse_kl": column(9),
        "forward_kl": column(5), "teacher_entropy": column(2), "log_p": column(-3),
        "log_q": column(-9), "gate": column(1), "rank": ranks,
        "kept": {rule: [i for i, r in enumerate(rank) if r <= 26] for rule, rank in ranks.items()},
        "student_top": tops["student"], "teacher_top": tops["teacher"], "student_share": shares,
        "teacher_share": shares, "texts": {str(i): f" word{i % 999}" for i in named},
    }  # fmt: skip


if __name__ == "__main__":
    main()
