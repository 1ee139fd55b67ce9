"""What the page for users of TRL and verl says of our keys is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands.calling import succeed
from tests.test_readme import ROOT, blocks, commands
from tutelage.config.keys import KEYS, TABLES
from tutelage.config.parse import load_config

PAGE = (ROOT / "docs" / "coming-from-trl-and-verl.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| ") and "| here |" not in line
]
OURS = [name for row in ROWS for name in re.findall(r"`([a-z_.]+)(?:`| = )", row[2])]


def test_the_keys_in_the_table_are_keys() -> None:
    lasts = {key.rpartition(".")[2] for key in KEYS}
    unknown = [name for name in OURS if name not in {*KEYS, *TABLES, *lasts}]
    assert len(OURS) > 30
    assert unknown == []


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(PAGE):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
            config = load_config(block.file)
            assert (config.out, config.prompts_per_step) == ("runs/mine", 32)
        elif block.language == "bash":
            for command in commands(block.text):
                assert succeed(*command.split()[1:]).out


def test_links() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", PAGE)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
