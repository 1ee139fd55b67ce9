"""`tutelage push` uploads the exported student with a complete card, and changes no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tutelage.commands import push
from tutelage.commands.options import make_parser
from tutelage.errors import RunError

CARD = """---
library_name: transformers
tags: [on-policy-distillation, tutelage]
---

# Student
"""


class Hub:
    """Notes what it is asked; refuses a repository of another owner."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
        if not repository.startswith("me/"):
            raise OSError("403 Forbidden\nand a page about it")
        self.seen["repository"] = repository, private, exist_ok
        return f"https://hub/{repository}"

    def upload_folder(self, **options: Any) -> None:
        self.seen["folder"] = options

    def upload_file(self, **options: Any) -> None:
        self.seen["file"] = options


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    (student / "README.md").write_text(CARD)
    manifest = {"config": {"data": {"kind": "file", "path": "openai/gsm8k"}}}
    (student.parent / "manifest.json").write_text(json.dumps(manifest))
    return student.parent


def pushed(*arguments: object) -> dict[str, Any]:
    hub = Hub()
    parsed = make_parser("0").parse_args(["push", *map(str, arguments)])
    assert push.run(parsed, lambda: hub) == 0
    return hub.seen


def test_the_card_has_what_the_hub_shows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = pushed(folder, "me/x", "--license", "mit", "--base-model", "a/b", "--private")
    assert seen["repository"] == ("me/x", True, True)
    assert Path(seen["folder"]["folder_path"]) == folder / "student"
    assert seen["folder"]["ignore_patterns"] == [seen["file"]["path_in_repo"]] == ["README.md"]
    data = ModelCard(seen["file"]["path_or_fileobj"].decode()).data
    assert (data.license, data.base_model, data.datasets) == ("mit", "a/b", ["openai/gsm8k"])
    assert data.tags == ["on-policy-distillation", "tutelage"]
    assert capsys.readouterr().out == "https://hub/me/x\n"
    assert (folder / "student" / "README.md").read_text() == CARD


def test_data_sets_may_be_named(folder: Path) -> None:
    options = ("--license", "mit", "--base-model", "a/b", "--dataset", "c/d", "--dataset", "e/f")
    card = pushed(folder, "me/x", *options)["file"]["path_or_fileobj"].decode()
    assert ModelCard(card).data.datasets == ["c/d", "e/f"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("me/x", "--license", "mit"), "add --base-model"),
        (("me/x",), "add --license and --base-model"),
        (("you/x", "--license", "mit", "--base-model", "a/b"), "you/x was not uploaded: 403"),
    ],
)
def test_what_is_missing_or_refused_is_one_line(
    folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(RunError, match=said) as caught:
        pushed(folder, *arguments)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_student_has_nothing_to_upload(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no exported student"):
        pushed(tmp_path, "me/x")
