"""Pictures of the demo: its terminal and its report, light and dark, from one run of it.

    script -qec "tutelage demo" demo.txt
    python scripts/report_images.py runs/demo-1a2b3c4d demo.txt --eopd RUN --compare RUN…

One command makes all of them: the terminal, each view of the report cropped to what it shows, and
whole screens of 1400 and 420 pixels. Reports are written anew. `docs/images/demo.json` has the
run's numbers and the checksum of each picture, which a test compares with README. Needs Chromium
and playwright; Pillow comes with matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from demo_terminal import picture, settled
from PIL import Image
from playwright.sync_api import sync_playwright

from tutelage.commands.demo import totals
from tutelage.report.compare_page import write_comparison
from tutelage.report.compare_runs import compare_records
from tutelage.report.records import read_run
from tutelage.report.run_page import write_report

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SCHEMES = ("light", "dark")
WIDTH = 1200
NAMES = {"viewer": "token-viewer", "map": "entropy-kl-map", "rules": "rules", "gate": "eopd"}
NUM_COLORS = 256
MAX_BYTES = 150_000


def main() -> None:
    """Write every picture and print its size."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("run", type=Path)
    options.add_argument("recorded", type=Path, help="what script(1) recorded of it")
    options.add_argument("--eopd", type=Path, required=True, help="a run with EOPD, for its view")
    options.add_argument("--compare", type=Path, nargs="+", required=True, help="side by side")
    given = options.parse_args()
    recorded = given.recorded.read_bytes().decode("utf-8")
    tokens, phases = totals(given.run)
    if f"{tokens:,} tokens trained; seconds: {phases}" not in settled(recorded):
        raise SystemExit(f"{given.recorded} is of another run than {given.run}.")
    (IMAGES / "demo-terminal.svg").write_text(picture(recorded), encoding="utf-8")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        pages = pages_of(given, Path(name))
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for scheme in SCHEMES:
            crops(opened, scheme, pages)
            for width in (1400, 420):
                screens(opened, scheme, width, pages["run"])
        opened.close()
    (IMAGES / "demo.json").write_text(json.dumps(numbers(given.run), indent=1) + "\n")


def numbers(run: Path) -> dict[str, Any]:
    """What the run measured, where, and the checksum of each picture."""
    record = read_run(run)
    tokens, phases = totals(run)
    pictures = [IMAGES / "demo-terminal.svg", *sorted(IMAGES.glob("*.png"))]
    return {
        "commit": record.manifest["commit"],
        "versions": record.manifest["versions"],
        "evaluations": [
            found.model_dump(exclude_none=True)
            for model in ("student", "teacher")
            for found in record.evaluations_of(model)
        ],
        "num_tokens": tokens,
        "phases": phases,
        "pictures": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in pictures},
    }


def pages_of(given: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Addresses of fresh pages, apart from the runs."""
    records = [read_run(run) for run in given.compare]
    found = {
        "run": write_report(given.run, folder / "run.html"),
        "eopd": write_report(given.eopd, folder / "eopd.html"),
        "compare": folder / "compare.html",
    }
    write_comparison(compare_records(records), records, found["compare"])
    return {name: page.as_uri() for name, page in found.items()}


def crops(browser: Any, scheme: str, pages: dict[str, str]) -> None:
    """Each view of the README, cut to what it shows."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme=scheme)
    page.goto(pages["run"])
    cut(page, "overview", scheme, "header", "#curve-controls + .panels figure:nth-child(4)")
    for view in ("viewer", "map", "rules"):
        show(page, view)
        end = {"viewer": "#detail .mirrored", "map": "#map-table"}.get(view, f"#view-{view}")
        cut(page, NAMES[view], scheme, f"#view-{view} h2", end)
    page.goto(pages["eopd"])
    show(page, "gate")
    cut(page, NAMES["gate"], scheme, "#view-gate h2", "#gate-table")
    page.goto(pages["compare"])
    cut(page, "compare", scheme, "header", "#curve-controls + .panels figure:nth-child(2)")
    page.close()


def screens(browser: Any, scheme: str, width: int, address: str) -> None:
    """The first screen of the overview and of the token viewer, as a reader has them."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(address)
    for view in ("overview", "viewer"):
        show(page, view)
        first = ".viewer .text" if view == "viewer" and width < 1000 else "body"
        page.evaluate("(where) => document.querySelector(where).scrollIntoView()", first)
        page.evaluate("scrollBy(0, -60)")  # behind the sticky navigation
        save(page.screenshot(), f"screen-{NAMES.get(view, view)}-{width}-{scheme}")
    page.close()


def show(page: Any, view: str) -> None:
    """Open a view at what is worth seeing in it."""
    page.click(f"#tab-{view}")
    if view == "viewer":
        page.click("#jump")
    if view == "map":
        page.locator("#map-plot .bin").nth(2).focus()
        page.keyboard.press("Enter")
    page.mouse.move(0, 0)


def cut(page: Any, name: str, scheme: str, first: str, last: str) -> None:
    """The page from the top of one element to the foot of another."""
    edge = """(where) => { const b = document.querySelector(where).getBoundingClientRect();
      return [b.top + scrollY, b.bottom + scrollY]; }"""
    top, foot = page.evaluate(edge, first)[0] - 16, page.evaluate(edge, last)[1] + 16
    page.set_viewport_size({"width": WIDTH, "height": int(foot) + 200})
    clip = {"x": 0, "y": max(0, top), "width": WIDTH, "height": foot - max(0, top)}
    save(page.screenshot(clip=clip), f"report-{name}-{scheme}")
    page.set_viewport_size({"width": WIDTH, "height": 900})


def save(content: bytes, name: str) -> None:
    """A picture in few colours."""
    path = IMAGES / f"{name}.png"
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    picture.quantize(NUM_COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    size = path.stat().st_size
    print(f"{path.name}: {size:,} bytes")
    if size > MAX_BYTES:
        raise SystemExit(f"{path} has {size:,} bytes, more than {MAX_BYTES:,}.")


if __name__ == "__main__":
    main()
