"""`tutelage init` writes a configuration that `check` and `train` take."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from calling import ASSETS, STUDENT, TEACHER, call, succeed, write_jsonl

from tutelage.commands import train as command
from tutelage.config.parse import load_config
from tutelage.config.schema import FileData

SUM = "e4+7;j7-6;n3+7;m0-6;b9*7;>"
MODELS = ("--student", STUDENT, "--teacher", TEACHER)


class Answers(io.StringIO):
    """Standard input, of a person or of a pipe."""

    def __init__(self, *lines: str, is_person: bool = False) -> None:
        super().__init__("".join(f"{line}\n" for line in lines))
        self._is_person = is_person

    def isatty(self) -> bool:
        return self._is_person


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with prompts, and nobody who answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", Answers())
    records = [{"prompt": SUM.replace("7", str(i)), "answer": str(i)} for i in range(8)]
    write_jsonl(tmp_path / "prompts.jsonl", *records)
    return tmp_path


def written(*options: object) -> Any:
    succeed("init", "mine.toml", *options)
    return load_config("mine.toml")


def test_several_updates_a_step_divide_its_prompts() -> None:
    config = written(*MODELS, "--prompts", "prompts.jsonl", "updates_per_step=5")
    assert (config.updates_per_step, config.prompts_per_step) == (5, 30)


def test_an_empty_name_of_prompts_is_no_data_set() -> None:
    outcome = call("init", "mine.toml", *MODELS, "--prompts", "")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "prompt file '' does not exist" in outcome.err


def test_what_it_writes_is_checked_and_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = succeed("init", "mine.toml", *MODELS, "--prompts", "prompts.jsonl", "seed=3")
    assert "tutelage check mine.toml" in outcome.out
    text = Path("mine.toml").read_text()
    assert "# Every reference answer is a number.\ngrader = " in text
    assert max(map(len, text.splitlines())) <= 100
    config = load_config("mine.toml")
    assert isinstance(config.data, FileData)
    found = (config.data.chat, config.data.grader, config.data.num_held_out, config.seed)
    assert found == (False, "number", 2, 3)
    assert config.prompts_per_step == 6, "more than there are would repeat them in a step"
    succeed("check", "mine.toml")
    monkeypatch.setattr(command, "write_report", lambda folder: folder / "report.html")
    small = ("num_steps=1", "evaluation.num_samples=1", "sampling.max_new_tokens=4")
    succeed("train", "mine.toml", *small, "recording.every=0", "out=run")
    assert Path("run", "student", "config.json").is_file()


def test_questions_give_what_options_give(monkeypatch: pytest.MonkeyPatch) -> None:
    options = written(*MODELS, "--prompts", "prompts.jsonl", "--grader", "exact")
    Path("mine.toml").unlink()
    monkeypatch.setattr(sys, "stdin", Answers(STUDENT, TEACHER, "prompts.jsonl", "exact"))
    assert written() == options


def test_an_empty_answer_takes_what_is_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Answers("prompts.jsonl", ""))
    assert written(*MODELS).data.grader == "number"


def test_a_person_is_asked_again_and_a_pipe_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("no/such/folder.jsonl", "prompts.jsonl", "sums", "number")
    monkeypatch.setattr(sys, "stdin", Answers(*lines))
    assert call("init", "mine.toml", *MODELS).code == 2
    monkeypatch.setattr(sys, "stdin", Answers(*lines, is_person=True))
    outcome = succeed("init", "mine.toml", *MODELS)
    assert "does not exist" in outcome.err
    assert "grader must be one of" in outcome.err


def test_the_embedded_task_needs_no_file() -> None:
    config = written(*MODELS, "--prompts", "ledger")
    assert (config.data.kind, config.num_threads) == ("ledger", 1)


def test_one_model_on_both_sides_gives_a_shallower_student() -> None:
    config = written("--student", TEACHER, "--teacher", TEACHER, "--prompts", "ledger")
    depth = json.loads((ASSETS / "ledger-teacher" / "config.json").read_text())["num_hidden_layers"]
    assert 0 < config.student.num_layers < depth


def test_a_student_that_is_its_own_teacher_needs_no_second_model() -> None:
    own = ("teacher.kind=self", "teacher.weights=ema", "teacher.ema_decay=0.9")
    config = written("--student", STUDENT, "--prompts", "prompts.jsonl", *own)
    assert (config.teacher.kind, config.evaluation.teacher) == ("self", False)


def model(name: str, limit: int, template: str | None = None) -> str:
    """The embedded student with another context, and perhaps with a chat template."""
    folder = Path(name)
    shutil.copytree(ASSETS / "ledger-overconfident", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": limit}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return name


TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def test_the_chat_template_and_the_context_of_the_student_are_seen() -> None:
    name = model("own", 64, TEMPLATE)
    config = written("--student", name, "--teacher", TEACHER, "--prompts", "prompts.jsonl")
    assert config.data.chat
    assert config.sampling.max_new_tokens == 64 - len(SUM) - 1


def test_prompts_without_answers_are_not_graded() -> None:
    write_jsonl(Path("prompts.jsonl"), *({"text": f"a{i}+1;>"} for i in range(4)))
    named = ("--prompts", "prompts.jsonl", "data.prompt_column=text")
    assert call("init", "mine.toml", *MODELS, *named, "--grader", "number").code == 2
    assert written(*MODELS, *named).data.grader == "none"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("there.toml", *MODELS), "exists and stays as it is"),
        (("mine.yaml", *MODELS), "Name a file that ends in .toml"),
        (("no/mine.toml", *MODELS), "is no folder"),
        (("mine.toml", "--teacher", TEACHER), "student is missing. Give --student MODEL"),
        (("mine.toml", *MODELS), "prompts is missing. Give --prompts FILE"),
        (("mine.toml", *MODELS, "--prompts", "no.jsonl"), "does not exist"),
        (("mine.toml", "--student", "no/such", *MODELS[2:], "--prompts", "ledger"), "no/such"),
        (("mine.toml", *MODELS, "student.model=x"), "--student and student.model give the same"),
        (("mine.toml", *MODELS, "data=3"), "data is a table, got 3"),
        (("mine.toml", *MODELS, "--prompts", "ledger", "num_steps=many"), "num_steps: "),
        (("mine.toml", *MODELS, "--prompts", "ledger", "num_step=1"), "'num_steps'"),
        (("mine.toml", *MODELS, "--prompts", "ledger", "selection.keep=0.5"), "selection.rule"),
    ],
)
def test_a_refusal_is_one_line_and_writes_nothing(options: tuple[str, ...], said: str) -> None:
    Path("there.toml").write_text("x = 1")
    outcome = call("init", *options)
    assert (outcome.code, outcome.out) == (2, "")
    last = outcome.err.splitlines()[-1]
    assert last.startswith("tutelage: ")
    assert said in last
    assert not Path("mine.toml").exists()
    assert Path("there.toml").read_text() == "x = 1"


def test_models_of_different_tokenizers_are_refused(here: Path) -> None:
    other = "package:tutelage/assets/ledger-tools-teacher"
    outcome = call("init", "mine.toml", "--student", STUDENT, "--teacher", other,
                   "--prompts", "prompts.jsonl")  # fmt: skip
    assert outcome.code == 2
    assert not Path("mine.toml").exists()
