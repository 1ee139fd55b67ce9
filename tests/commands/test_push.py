"""`tutelage push` uploads the exported student with a complete card, and changes no file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from httpx2 import ConnectError
from huggingface_hub import ModelCard

from tutelage.commands import push
from tutelage.commands.options import make_parser
from tutelage.errors import RunError

GIVEN = ("--license", "mit", "--base-model", "a/b")
CARD = """---
library_name: transformers
tags: [on-policy-distillation, tutelage]
---

# Student
"""


class Hub:
    """Notes what it is asked; refuses a repository of another owner, and knows a public one."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def model_info(self, repository: str) -> SimpleNamespace:
        return SimpleNamespace(private=repository != "me/public")

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
        if repository == "me/offline":
            raise ConnectError("")
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
        (("you/x", *GIVEN), "'you/x' was not uploaded: 403"),
        (("me/offline", *GIVEN), "'me/offline' was not uploaded: ConnectError"),
    ],
)
def test_what_is_missing_or_refused_is_one_line(
    folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(RunError, match=said) as caught:
        pushed(folder, *arguments)
    assert "\n" not in str(caught.value)


def test_a_public_repository_receives_nothing_that_was_to_be_private(folder: Path) -> None:
    hub = Hub()
    parsed = make_parser("0").parse_args(["push", str(folder), "me/public", *GIVEN, "--private"])
    with pytest.raises(RunError, match="me/public is there and public"):
        push.run(parsed, lambda: hub)
    assert set(hub.seen) == {"repository"}
    assert set(pushed(folder, "me/public", *GIVEN)) == {"repository", "folder", "file"}


@pytest.mark.parametrize("card", [b"---\na: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe"])
def test_a_card_that_cannot_be_read_is_one_line(folder: Path, card: bytes) -> None:
    (folder / "student" / "README.md").write_bytes(card)
    with pytest.raises(RunError, match="is no model card") as caught:
        pushed(folder, "me/x", *GIVEN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "datasets"),
    [
        ({"path": "gsm8k-train"}, ["openai/gsm8k"]),
        ({"path": "a/data-v1.5"}, ["a/data-v1.5"]),
        ({"path": "a/b.jsonl"}, None),
        ({"path": "/a/b"}, None),
        (5, None),
    ],
)
def test_data_sets_are_those_of_the_hub(folder: Path, data: Any, datasets: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps({"config": {"data": data}}))
    card = pushed(folder, "me/x", *GIVEN)["file"]["path_or_fileobj"].decode()
    assert ModelCard(card).data.datasets == datasets


def test_a_run_without_a_student_has_nothing_to_upload(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no exported student"):
        pushed(tmp_path, "me/x")
