"""Links of documents lead to files, and to headings, that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / ".github").rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """Of the headings of a page, as hosts of repositories make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-{sum(s.startswith(slug) for s in found)}")
    return found


def broken(text: str, page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in (first or second for first, second in LINK.findall(FENCED.sub("", text))):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = page.parent / path
        is_there = not path or target.exists()
        if not is_there or (
            anchor and anchor not in anchors(target.read_text("utf-8") if path else text)
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken(page.read_text("utf-8"), page) == []


def test_a_broken_link_is_seen() -> None:
    text = "# A `b` c\n[x](#a-b-c) [x](no.md) [x](#none) [x](README.md) [x](README.md#none)\n"
    assert broken(text, ROOT / "x.md") == ["no.md", "#none", "README.md#none"]
