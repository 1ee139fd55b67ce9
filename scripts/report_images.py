"""Pictures of the report for the README: `docs/images/report-*.png` from a finished demo.

    python scripts/report_images.py runs/demo-1a2b3c4d/report.html [compare.html]

The second page is one of `tutelage compare RUN… --html`. Needs Chromium, playwright and Pillow,
which comes with matplotlib.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDTH, HEIGHT = 980, 2000
NAMES = {"gate": "eopd", "map": "entropy-kl-map", "viewer": "token-viewer"}


def main() -> None:
    """Write one picture a view."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("run", type=Path)
    options.add_argument("comparison", type=Path, nargs="?")
    given = options.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto(given.run.resolve().as_uri())
        for view in ("overview", "map", "viewer", "rules", "gate"):
            page.click(f"#tab-{view}")
            if view == "viewer":
                page.click("#jump")
            save(page, NAMES.get(view, view))
        if given.comparison is not None:
            page.goto(given.comparison.resolve().as_uri())
            save(page, "compare")
        opened.close()


def save(page: Any, name: str) -> None:
    """The page from its top, in few colours."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    path = IMAGES / f"report-{name}.png"
    picture.crop((0, 0, WIDTH, min(HEIGHT, picture.height))).quantize(64).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
