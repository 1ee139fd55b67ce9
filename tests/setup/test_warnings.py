"""Legal settings that seldom do what is meant: `check` and `train` say each in one line, once."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny import save_tiny_model, tiny_config
from tutelage.commands.check import check
from tutelage.config.schema import Config
from tutelage.errors import TutelageError
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.tiny import Architecture
from tutelage.models.tiny import save_tiny_model as save_tiny_family
from tutelage.setup.warnings import _turn_warnings, context_warnings
from tutelage.train.loop import train


def said(config: Config, command: str) -> list[str]:
    """Warnings of a command."""
    if command == "check":
        lines = list(check(config, "run"))
    else:
        lines = []
        train(config, log=lines.append)
    return [line for line in lines if line.startswith("warning: ")]


def prompts(folder: Path, records: list[dict[str, Any]], **data: Any) -> dict[str, Any]:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    table = {"kind": "file", "path": str(path), "chat": False, "num_held_out": 2}
    return {"data": table | data}


LEDGER = [{"prompt": f"a{i}+2;>", "answer": "7"} for i in range(8)]
EVALUATED = {"evaluation": {"num_problems": 2, "num_samples": 1, "teacher": False}}


def of_file(records: list[dict[str, Any]], **data: Any) -> Any:
    return lambda folder: prompts(folder, records, **data) | EVALUATED


TRAPS: dict[str, tuple[Any, str]] = {
    "long completions": (
        lambda _: {"sampling": {"max_new_tokens": 130, "num_samples": 1}, "prompts_per_step": 1},
        r"the longest prompt has 7 tokens and sampling\.max_new_tokens is 130: more than the 128 "
        r"positions of the student, which was trained on no more. Lower .* to 121",
    ),
    "long prompts": (
        of_file([{"prompt": "a1+2;" * 40 + ">", "answer": "7"}] * 1
                + [{"prompt": "a1+3;" * 40 + ">", "answer": "7"}] + LEDGER, grader="number"),
        r"the longest prompt has 202 tokens .* Set data\.max_prompt_tokens below 128",
    ),
    "a large learning rate": (
        lambda _: {"optimizer": {"learning_rate": 10}},
        r"optimizer\.learning_rate = 10 moves every weight",
    ),
    "an adapter at the rate of a whole model": (
        lambda _: {"optimizer": {"learning_rate": 1e-6}, "student": {"lora": {"rank": 2}}},
        r"optimizer\.learning_rate = 1e-06 hardly changes an adapter",
    ),
    "warm-up longer than the run": (
        lambda _: {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 10}},
        r"optimizer\.warmup_steps = 10 outlast the run of num_steps = 1: .* ends at 0\.0001",
    ),
    "a budget of no token": (
        lambda _: {"selection": {"rule": "entropy", "keep": 0.001}},
        r"selection\.keep = 0\.001 of at most 10 tokens of a completion rounds to 0",
    ),
    "a budget of no token at both ends": (
        lambda _: {"selection": {"rule": "extreme_advantage", "keep": 0.001}},
        r"selection\.keep = 0\.001 of at most 10 tokens .* rounds to 0, so 1 is kept at each end",
    ),
    "a budget of no token in the batch": (
        lambda _: {"selection": {"rule": "entropy", "keep": 0.001, "scope": "batch"}},
        r"selection\.keep = 0\.001 of at most 40 tokens of the batch rounds to 0",
    ),
    "a grader without answers": (
        of_file([{"prompt": r["prompt"]} for r in LEDGER], grader="number"),
        r"2 of 2 held-out prompts have no reference answer, so no accuracy is measured",
    ),
    "answers without a grader": (
        of_file(LEDGER), r"held-out prompts have reference answers, but data\.grader = 'none'",
    ),
    "fewer problems than asked for": (
        lambda folder: prompts(folder, LEDGER, grader="number")
        | {"evaluation": {"num_problems": 64, "num_samples": 1, "teacher": False}},
        r"evaluation\.num_problems = 64, but the number of held-out prompts is 2",
    ),
    "unknown tokens": (
        of_file([{"prompt": f"What is {i}?"} for i in range(8)]),
        r"\d\d% of the prompts' tokens are unknown to the student's tokenizer",
    ),
    "a teacher that is the student": (
        lambda folder: {"teacher": {"model": str(folder / "models" / "student")}},
        r"student and teacher have the same weights",
    ),
    "a teacher that is a copy of the student": (
        lambda folder: {"teacher": {"model": str(save_tiny_model(folder / "copy", seed=1))}},
        r"student and teacher have the same weights",
    ),
    "a teacher smaller than the student": (
        lambda folder: {
            "teacher": {"model": str(save_tiny_model(folder / "s", 9, num_hidden_layers=1))}
        },
        r"the teacher has [\d,]+ parameters and the student [\d,]+: it is smaller",
    ),
    "a switch of thoughts without a chat": (
        of_file(LEDGER, grader="number", enable_thinking=False),
        r"data\.enable_thinking = false has no effect: no prompt is rendered",
    ),
    "a split of a file": (
        of_file(LEDGER, grader="number", split="test"),
        r"is a file, which has no splits .*: data\.split",
    ),
    "moments of adafactor": (
        lambda _: {"optimizer": {"kind": "adafactor", "beta1": 0.5, "learning_rate": 1e-3}},
        r"optimizer\.beta1 and beta2 have no effect",
    ),
    "other temperatures": (
        lambda _: {"sampling": {"temperature": 0.5, "max_new_tokens": 4}},
        r"completions are not sampled from the distribution that is trained",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["check", pytest.param("train", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_said_once(tiny_models: Path, tmp_path: Path, name: str, command: str) -> None:
    if "adapter" in name:
        pytest.importorskip("peft")
    (tmp_path / "models").symlink_to(tiny_models)
    change, pattern = TRAPS[name]
    table = change(tmp_path)
    for who in ("student", "teacher"):
        table[who] = {"model": str(tmp_path / "models" / who)} | table.get(who, {})
    changes = {"num_steps": 1, "prompts_per_step": 2} | table
    found = said(tiny_config(tmp_path / "models", tmp_path / "run", **changes), command)
    assert sum(bool(re.search(pattern, line)) for line in found) == 1, found
    assert all(len(line.splitlines()) == 1 for line in found)


def test_a_usual_run_has_no_warning(tiny_models: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", num_steps=1, **EVALUATED)
    assert said(config, "check") == []
    assert said(config, "train") == []


@pytest.mark.parametrize("rule", ["lowest_logprob", "entropy"])
def test_a_student_is_sharpened_at_tokens_that_are_chosen_by_what_was_sampled(
    tiny_models: Path, tmp_path: Path, rule: str
) -> None:
    changes = {"objective": {"kind": "opsa"}, "selection": {"rule": rule}}
    changes |= {"teacher": {"model": str(tiny_models / "student")}}  # which no step reads
    config = tiny_config(tiny_models, tmp_path / "run", num_steps=1, **changes, **EVALUATED)
    found = said(config, "check")
    assert len(found) == (rule == "entropy")
    assert all("Set selection.rule = 'lowest_logprob'" in line for line in found)


def test_rewards_may_have_the_student_itself_as_their_reference(
    tiny_models: Path, tmp_path: Path
) -> None:
    changes = {"objective": {"kind": "grpo", "distillation_weight": 0.1}}
    changes |= {"teacher": {"model": str(tiny_models / "student")}}
    config = tiny_config(tiny_models, tmp_path / "run", num_steps=1, **changes, **EVALUATED)
    assert said(config, "check") == []


def with_end_beyond_the_head(models: Path, folder: Path, sides: tuple[str, ...]) -> Path:
    """Both models with tokens added beyond their heads, which end texts and pad for some."""
    for who in ("student", "teacher"):
        shutil.copytree(models / who, folder / who)
        tokenizer = load_tokenizer(str(folder / who))
        tokenizer.add_special_tokens({"extra_special_tokens": [f"<extra{i}>" for i in range(8)]})
        if who in sides:
            tokenizer.eos_token = tokenizer.pad_token = "<extra7>"
        tokenizer.save_pretrained(folder / who)
        path = folder / who / "generation_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"eos_token_id": tokenizer.eos_token_id}))
    return folder


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_stop_token_beyond_the_head_stops_nothing(
    tiny_models: Path, tmp_path: Path, command: str
) -> None:
    models = with_end_beyond_the_head(tiny_models, tmp_path / "models", ("student", "teacher"))
    changes = {"num_steps": 1, "prompts_per_step": 2} | EVALUATED
    found = said(tiny_config(models, tmp_path / "run", **changes), command)
    assert len(found) == 1
    assert re.search(r"no end-of-sequence token among its \d+ ids, only \[\d+\], so", found[0])


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_stop_tokens_that_cannot_trade_places_are_refused(
    tiny_models: Path, tmp_path: Path, who: str
) -> None:
    models = with_end_beyond_the_head(tiny_models, tmp_path / "models", (who,))
    with pytest.raises(TutelageError, match=rf"the {who}'s tokenizer ends texts with id \d+, but"):
        said(tiny_config(models, tmp_path / "run", num_steps=1), "check")


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("chat")
    for seed, who in enumerate(("student", "teacher")):
        config = AutoConfig.for_model("gpt2" if who == "student" else "llama")
        config.max_position_embeddings = 32
        save_tiny_family(Architecture(config, "a test", False), 267, seed, folder / who)
    return folder


def test_a_chat_model_without_its_template(chat_models: Path, tmp_path: Path) -> None:
    config = tiny_config(
        chat_models, tmp_path / "run", num_steps=1, **prompts(tmp_path, LEDGER), **EVALUATED
    )
    assert any("which data.chat = false leaves" in line for line in said(config, "check"))


def test_a_template_that_opens_no_turn_for_the_answer(chat_models: Path, tmp_path: Path) -> None:
    shutil.copytree(chat_models, tmp_path / "models")
    for who in ("student", "teacher"):
        template = "{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        (tmp_path / "models" / who / "chat_template.jinja").write_text(template)
    table = prompts(tmp_path, LEDGER, chat=True)
    config = tiny_config(tmp_path / "models", tmp_path / "run", num_steps=1, **table, **EVALUATED)
    lines = [line for line in said(config, "check") if "opens no turn for the answer" in line]
    assert [line.split(" prompts end with")[0] for line in lines] == ["warning: 6"]


@pytest.mark.parametrize("command", ["check", "train"])
def test_positions_that_do_not_exist_are_refused(
    chat_models: Path, tmp_path: Path, command: str
) -> None:
    """GPT-2 looks its positions up in a table, which ends."""
    config = tiny_config(
        chat_models, tmp_path / "run", num_steps=1, sampling={"max_new_tokens": 100}
    )
    with pytest.raises(TutelageError, match=r"32 positions of the student, which has no more"):
        said(config, command)


def test_what_is_inserted_between_turns_needs_positions_too(
    tmp_path: Path, tiny_models: Path
) -> None:
    data = {"kind": "ledger_tools", "max_inserted_tokens": 110}
    config = tiny_config(tiny_models, tmp_path, data=data)
    student = load_model(str(tiny_models / "student"))
    (text,) = context_warnings(config, [("student", student, 9), ("teacher", student, 9)])
    assert re.search(
        r"9 tokens and sampling\.max_new_tokens \+ data\.max_inserted_tokens is 120: more than the "
        r"128 .* Lower sampling\.max_new_tokens \+ data\.max_inserted_tokens to 119",
        text,
    )
    assert not list(context_warnings(config, [("student", student, 8), ("teacher", student, 8)]))


def test_a_turn_that_is_longer_than_a_conversation(tmp_path: Path, tiny_models: Path) -> None:
    for most, is_said in ((10, False), (11, True)):
        data = {"kind": "ledger_tools", "max_turn_tokens": most}
        config = tiny_config(tiny_models, tmp_path, data=data)  # 10 tokens a conversation
        found = [line for line in _turn_warnings(config) if "data.max_turn_tokens = 11" in line]
        assert bool(found) == is_said
