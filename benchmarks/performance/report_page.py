"""Size of a page and how long headless Chromium takes to open it.

    python benchmarks/performance/report_page.py runs/ledger-1a2b3c4d/report.html --rounds 5

Every round starts a fresh browser. Seconds are those of the browser's navigation timing, from the
start of the navigation to the end of the load event: by then scripts have run and the first view
stands. `--views` are the seconds from the click on a tab to the frame that shows it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from playwright.sync_api import sync_playwright

LOADED = """() => new Promise((done) => {
  const look = () => {
    const [t] = performance.getEntriesByType("navigation");
    if (t.loadEventEnd) done(t.loadEventEnd / 1000); else setTimeout(look, 5);
  };
  look();
})"""
CLICKED = """(tab) => new Promise((done) => {
  const start = performance.now();
  tab.click();
  requestAnimationFrame(() => setTimeout(() => done((performance.now() - start) / 1000)));
})"""


def main() -> None:
    """Print one JSON object."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("page", type=Path)
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    loads: list[float] = []
    views: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        with sync_playwright() as playwright:
            opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = opened.new_page()
            page.goto(given.page.resolve().as_uri())
            loads.append(page.evaluate(LOADED))
            for tab in page.locator("[role=tab]").all():
                name = tab.get_attribute("data-view") or ""
                views.setdefault(name, []).append(tab.evaluate(CLICKED))
            opened.close()
    result = {
        "page_bytes": given.page.stat().st_size,
        "open_s": {"median": statistics.median(loads), "largest": max(loads)},
        "views_s": {name: statistics.median(found) for name, found in views.items()},
        "rounds": given.rounds,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
