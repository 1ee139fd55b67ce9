"""docs/architecture.md names files and symbols that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "tutelage"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ITEMS = re.findall(r"^(?:\d+\. |\| (?!to|---)).*(?:\n +.*)*", PAGE, re.MULTILINE)
"""The steps of a token and the rows of the table."""


def missing(item: str) -> list[str]:
    """Quoted paths that do not exist, and quoted names that none of the item's files contains."""
    quoted = re.findall(r"`([^`]+)`", item)
    paths = [name for name in quoted if "/" in name or name.endswith(".py")]
    found = [SOURCE / path for path in paths]
    texts = [
        file.read_text(encoding="utf-8")
        for path in found
        for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))
    ]
    names = {name for name in quoted if name not in paths and not name.endswith(".jsonl")}
    step = (SOURCE / "train" / "step.py").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", "\n".join([*texts, step])))
    return [str(path) for path in found if not path.exists()] + [
        name for name in sorted(names) if name.split(".")[-1] not in words
    ]


def test_the_page_has_ten_steps_and_a_table() -> None:
    assert len(ITEMS) == 23


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item[:30])
def test_files_and_names_exist(item: str) -> None:
    assert missing(item) == []


def test_a_wrong_name_or_path_is_found() -> None:
    assert missing("| a | `no_such_name` in `core/rules.py` |") == ["no_such_name"]
    assert missing("| a | `core/nothing.py` |") == [str(SOURCE / "core" / "nothing.py")]
