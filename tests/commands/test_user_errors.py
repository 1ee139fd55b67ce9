"""Every mistake a user can make: exit code 2, one line that helps, never a traceback."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calling import ASSETS, LEDGER, STUDENT, TEACHER, TINY, Outcome, call, succeed, write_jsonl
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.commands import check
from tutelage.config.parse import load_config
from tutelage.errors import TutelageError, is_out_of_memory

LONG = "x" * 300
"""Longer than any file system lets a name be."""


def assert_one_line(outcome: Outcome, *parts: str) -> None:
    """Exit code 2, nothing on standard output, and one line that contains every part."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("tutelage")
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err


def refused(*arguments: object) -> Callable[..., None]:
    """Run a command that must fail; the result checks the line it printed."""
    outcome = call(*arguments)
    return lambda *parts: assert_one_line(outcome, *parts)


def test_the_check_itself_can_fail() -> None:
    right = Outcome(2, "", "tutelage: x must be 1, got 2.\n")
    assert_one_line(right, "got 2")
    wrong = [
        Outcome(1, "", right.err),
        Outcome(2, "{}", right.err),
        Outcome(2, "", right.err + right.err),
        Outcome(2, "", "tutelage: Traceback\n"),
        Outcome(2, "", "tutelage: no\n"),
    ]
    for outcome in wrong:
        with pytest.raises(AssertionError):
            assert_one_line(outcome, "got 2")


# --- the command line itself ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "COMMAND"),
        (("distil",), "invalid choice: 'distil'"),
        (("train",), "required: config"),
        (("train", LEDGER, "--fast"), "unrecognized arguments: --fast"),
        (("train", LEDGER, "seed=1", "--fast", "seed=2"), "unrecognized arguments: --fast seed=2"),
        (("eval", TEACHER, "seed=1"), "unrecognized arguments: seed=1"),
        (
            ("score", LEDGER, "--num-prompts", "many"),
            "--num-prompts must be a whole number, got 'many'",
        ),
        (("eval", TEACHER, "--grader", "magic"), "invalid choice: 'magic'"),
        (("compare",), "required: RUN"),
    ],
)
def test_wrong_arguments(arguments: tuple[object, ...], part: str) -> None:
    refused(*arguments)(part, "--help")


def test_an_overlong_option_is_still_one_line() -> None:
    refused("train", LEDGER, "--" + "x" * 300)("unrecognized")


# --- configuration --------------------------------------------------------------------------------


def test_missing_configuration(tmp_path: Path) -> None:
    refused("train", tmp_path / "no.toml")("no.toml does not exist", "configs/examples/ledger.toml")
    refused("train", tmp_path)("cannot be read")


@pytest.mark.parametrize(
    "content",
    [
        b"num_steps = = 3\n",
        b"[student\n",
        b"a = 1\na = 2\n",
        b"[data]\n[data]\n",
        b"a = 'x",
        b"\xef\xbb\xbfa = ",
        b"a = 1\0\n",
        b"a = 2026-13-01\n",
        b"a = " + b"[" * 9999,
        b"a = " + b"{b=" * 9999,
    ],
    ids=range(10),
)
def test_bad_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    refused("train", path)("bad.toml is not valid TOML")


def test_a_configuration_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + LEDGER.read_bytes().replace(b"\n", b"\r\n"))
    assert load_config(path, []) == load_config(LEDGER, [])


def test_configuration_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe\x00")
    refused("check", path)("bad.toml cannot be read")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.lerning_rate=1", ("'optimizer.lerning_rate'", "'learning_rate'?")),
        ("lerning_rate=1", ("'lerning_rate'", "'optimizer.learning_rate'?")),
        ("sampling.temprature=1", ("'sampling.temprature'", "'temperature'?")),
        ("num_stps=3", ("'num_stps'", "'num_steps'?")),
        ("zzz=3", ("'zzz'", "Known keys:", "num_steps")),
        ("selection.keep=0.5", ("'selection.keep'", "Rule 'all'", "selection.rule")),
        ("selection.rule=softor", ("softor", "'soft_or'?")),
        ("data.kind=fle", ("data.kind", "'fle'", "'file'?")),
        ("data.kind=file", ("data.path is missing",)),
        ("weighting.keep=1", ("weighting.kind is missing", "Choose one of", "none")),
    ],
)
def test_unknown_keys_and_names_come_with_a_suggestion(
    override: str, parts: tuple[str, ...]
) -> None:
    refused("check", LEDGER, override)(*parts)


@pytest.mark.parametrize("keep", ["2", "0", "-0.1", "nan", "inf"])
def test_keep_out_of_range(keep: str) -> None:
    outcome = call("check", LEDGER, "selection.rule=soft_or", f"selection.keep={keep}")
    assert_one_line(outcome, "selection.keep must be in (0, 1], got", keep, "keep = 1.0")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("num_steps", ("'num_steps'", "key=value")),
        ("=3", ("'=3'", "key=value")),
        ("num_steps.x=3", ("'num_steps'", "not a table")),
        ("num_steps=abc", ("num_steps:", "'abc'")),
        ("num_steps=" + "[" * 9999, ("num_steps:",)),
        ("num_steps=0", ("num_steps must be at least 1, got 0",)),
        ("student=3", ("student:", "got 3")),
        ("student.dtype=float8", ("student.dtype:", "'float32'", "'float8'")),
        ("quadrant_thresholds=5", ("quadrant_thresholds: ", "'median'", "tuple", "got 5")),
        ("optimizer.max_grad_norm=nan", ("optimizer.max_grad_norm must be at least 0, got nan",)),
        ("objective.reverse_weight=inf", ("objective.reverse_weight must be finite, got inf",)),
        ("quadrant_thresholds=[0.1,nan]", ("quadrant_thresholds must be finite, got nan",)),
        ("objective.kind=js", ("objective.kind must be one of", "'js'", "'jsd'?")),
        ("sampling.top_p=0", ("sampling.top_p must be in (0, 1], got 0.0",)),
        ("device=tpu", ("device", "'tpu'")),
        ("data.num_items=0", ("num_items", "got 0")),
        ("student.num_layers=99", ("num_layers", "between 1 and 3, got 99")),
        ("student.model=./no/such/folder", ("'./no/such/folder' does not exist",)),
        ("teacher.model=package:nosuchpackage", ("'nosuchpackage'", "pip")),
    ],
)
def test_values_that_do_not_fit(tmp_path: Path, override: str, parts: tuple[str, ...]) -> None:
    refused("train", LEDGER, f"out={tmp_path / 'run'}", override)(*parts)


@pytest.mark.parametrize(
    "override",
    [
        "num_threads=-1",
        "checkpoint_every=-1",
        "optimizer.beta1=2",
        "optimizer.weight_decay=-1",
        "evaluation.num_samples=0",
        "evaluation.num_problems=-1",
    ],
)
def test_ranges_that_torch_would_refuse(tmp_path: Path, override: str) -> None:
    refused("train", LEDGER, *TINY, f"out={tmp_path / 'run'}", override)(override.split("=")[0])


def test_overrides_may_follow_options() -> None:
    """The last one is seen, and counts."""
    refused("train", LEDGER, "num_steps=3", "--json", "num_steps=0")("at least 1, got 0")


def test_two_mistakes_in_one_table_are_told_one_at_a_time() -> None:
    outcome = call("check", LEDGER, "student.dtype=float8", "student.num_layers=many")
    assert_one_line(outcome, "student.dtype: input should be 'float32' or 'bfloat16', got")
    assert "many" not in outcome.err


KEYS = st.sampled_from(
    (
        *("num_steps", "seed", "out", "device", "student", "student.model", "student.num_layers"),
        *("data", "data.kind", "data.path", "selection", "selection.rule", "selection.keep"),
        *("quadrant_thresholds", "sampling", "sampling.top_p", "evaluation.every", "renormalize"),
        *("a", "a.b", ".", "selection."),
    )
)
VALUES = st.one_of(
    st.text(max_size=8),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["true", "[]", "[1,'a']", "{a=1}", "2020-01-01", "'q3'", "file", "median"]),
)


@given(st.lists(st.tuples(KEYS, VALUES).map("=".join) | st.text(max_size=6), max_size=3))
@settings(max_examples=150)
def test_any_overrides_give_a_configuration_or_a_line(overrides: list[str]) -> None:
    text = ""
    with contextlib.suppress(TutelageError):
        text = repr(load_config(LEDGER, overrides))
    assert text == "" or text.startswith("Config(")


# --- prompts --------------------------------------------------------------------------------------


def with_prompts(path: Path, *overrides: str) -> tuple[object, ...]:
    data = ("data.kind=file", f"data.path={path}", "data.chat=false", "data.num_held_out=0")
    out = f"out={path.parent / 'run'}"
    return ("check", LEDGER, *TINY, *data, out, *overrides)


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "a1+1;>"}, "", '{"prompt": "a1+')
    refused(*with_prompts(path))(f"{path}, line 3: not JSON", "got")
    refused("eval", TEACHER, "--prompts", path)(f"{path}, line 3: not JSON")


@pytest.mark.parametrize(
    ("line", "part"),
    [("[1]", "must be a JSON object"), ('{"text": 1}', "needs one of the keys 'prompt'")],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, part: str) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "a1+1;>"}, line)
    refused(*with_prompts(path))(f"{path}, line 2: {part}")


def test_empty_and_missing_prompt_files(tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "p.jsonl")
    refused(*with_prompts(empty))("p.jsonl holds no prompts")
    refused(*with_prompts(tmp_path / "q.jsonl"))("q.jsonl", "does not exist", "TUTELAGE_DATA")


def test_chat_prompts_for_a_tokenizer_without_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "a1+1;>"})
    train = ("train", *with_prompts(path, "data.chat=true")[1:])
    refused(*train)("p/1", "no chat template", "chat = false")


def test_nothing_left_to_evaluate_or_to_train_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "a1+1;>"})
    refused(*with_prompts(path, "data.num_held_out=1"))("no training prompts left of 1")
    train = ("train", *with_prompts(path, "evaluation.num_problems=4")[1:])
    refused(*train)("data.num_held_out is 0")


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """The embedded student with two letters of its vocabulary exchanged."""
    folder = tmp_path / "foreign"
    shutil.copytree(ASSETS / "ledger-overconfident", folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", ["check", "score", "train"])
def test_a_student_with_another_vocabulary(tmp_path: Path, foreign: Path, command: str) -> None:
    out = f"out={tmp_path / 'run'}"
    check = refused(command, LEDGER, *TINY, f"student.model={foreign}", out)
    check("different vocabularies: 2 tokens differ", "Choose models that share a tokenizer")


def test_a_student_with_a_larger_vocabulary(tmp_path: Path, foreign: Path) -> None:
    path = foreign / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] |= {"a": tokenizer["model"]["vocab"]["b"], "é": 999}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    out = f"out={tmp_path / 'run'}"
    refused("train", LEDGER, f"student.model={foreign}", out)("different vocabularies")


def test_unknown_models(tmp_path: Path) -> None:
    refused("eval", "./nowhere")("'./nowhere' does not exist", "hub id")
    refused("eval", tmp_path)("not a model folder", "no config.json")
    refused("sample", "package:tutelage/assets/nothing")("does not exist")
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    refused("eval", tmp_path / "x.gguf")("not a GGUF file")


def test_a_model_that_is_nowhere_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check = refused("eval", "no-such-owner/no-such-model")
    check(
        "cannot load the tokenizer 'no-such-owner/no-such-model': it is not in the cache",
        "the hub cannot be reached. It is no folder here; check the name and the network",
    )


def test_a_damaged_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "ledger-small", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("eval", folder)("cannot load the model", "files are complete")


@pytest.mark.parametrize("ask", [torch.empty, bytes])
def test_memory_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[int], object]
) -> None:
    """Asked of torch, whose error is a RuntimeError, or of Python."""
    monkeypatch.setattr(check, "check", lambda *_: [str(ask(10**16))])
    refused("check", LEDGER)("out of memory: ", "`tutelage check` shows")


def test_another_error_at_run_time_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(check, "check", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        call("check", LEDGER)


@pytest.mark.parametrize("table", ["sampling", "evaluation"])
def test_more_completions_than_memory_holds(table: str) -> None:
    counts = {"sampling": "prompts_per_step=100000", "evaluation": "evaluation.num_problems=100000"}
    refused("check", LEDGER, counts[table], f"{table}.num_samples=1000")(
        f"{table}.num_samples must be at most 16777216, got 100000 times 1000. Lower one of them"
    )


def test_a_chat_template_that_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "ledger-small", folder)
    (folder / "chat_template.jinja").write_text("{% for %}")
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": [{"role": "user", "content": "a"}]})
    check = refused("eval", folder, "--prompts", path)
    check(f"the chat template of '{folder}' fails at prompt 'p/1'", "Expected", "chat = false")


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--num-prompts", 0, "--num-prompts must be at least 1, got 0"),
        ("--num-samples", 0, "--num-samples must be at least 1, got 0"),
        ("--max-new-tokens", 0, "--max-new-tokens must be at least 1, got 0"),
        ("--temperature", "nan", "--temperature must be at least 0, got nan"),
        ("--top-p", 95, "--top-p must be in (0, 1], got 95. Write 0.95 for 95 %"),
        ("--top-p", 0, "--top-p must be in (0, 1], got 0"),
        ("--batch-size", 0, "--batch-size must be at least 1, got 0"),
        ("--device", "abacus", "device 'abacus' is unknown. Use auto, cpu or cuda"),
        ("--device", "cuda:99", "device 'cuda:99' is not here: torch finds"),
        ("--prompts", "no.jsonl", "'no.jsonl' does not exist"),
    ],
)
def test_options_of_eval(option: str, value: object, part: str) -> None:
    refused("eval", STUDENT, option, value)(part)


# --- folders --------------------------------------------------------------------------------------


def test_output_folders_that_cannot_be_written(tmp_path: Path) -> None:
    """Below a regular file nothing can be made, not even by root."""
    file = write_jsonl(tmp_path / "file", "x")
    for out in (file, file / "below"):
        refused("train", LEDGER, *TINY, f"out={out}")(f"{out} cannot be written", "out=FOLDER")
    score = refused("score", LEDGER, "--num-prompts", 1, "--out", file / "x.jsonl")
    score("cannot be written")


@pytest.mark.parametrize(
    "command",
    [
        ("score", LEDGER, "--num-prompts", 1, "--out", LONG),
        ("sample", LONG),
        ("report", LONG),
        ("compare", LONG),
    ],
    ids=lambda command: command[0],
)
def test_names_that_are_too_long(command: tuple[object, ...]) -> None:
    refused(*command)(LONG, "is too long for a name. Give a shorter one.")


def test_another_run_lives_in_the_folder(trained: tuple[Path, Outcome]) -> None:
    folder, _ = trained
    before = (folder / "metrics.jsonl").read_bytes()
    check = refused("train", LEDGER, *TINY, f"out={folder}", "seed=5")
    check("holds another run", "seed", "num_steps", "--allow-change")
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_mended_mistake_does_not_block_the_folder(tmp_path: Path) -> None:
    out = f"out={tmp_path / 'run'}"
    refused("train", LEDGER, *TINY, out, "student.model=./nowhere")("does not exist")
    succeed("train", LEDGER, *TINY, out, "num_steps=1")


def test_reports_and_comparisons_of_no_runs(tmp_path: Path, trained: tuple[Path, Outcome]) -> None:
    run, _ = trained
    refused("report", tmp_path)("no metrics yet")
    refused("report", tmp_path / "no")("is not a folder")
    refused("report", run, "--out", run / "metrics.jsonl" / "r.html")("cannot be written")
    refused("compare", run)("at least two")
    refused("compare", run, tmp_path / "no")("is not a folder")


def test_a_damaged_run_is_named_by_its_line(tmp_path: Path, trained: tuple[Path, Outcome]) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("oops\n" + lines[1], encoding="utf-8")
    refused("report", run)("metrics.jsonl", "line 1")
    (run / "metrics.jsonl").write_text(lines[0], encoding="utf-8")
    succeed("report", run, "--out", tmp_path / "mended.html")


def test_scores_are_never_written_over(tmp_path: Path) -> None:
    precious = tmp_path / "tokens.jsonl"
    precious.write_text("precious")
    refused("score", LEDGER, "--num-prompts", 1, "--out", precious)("exists and stays as it is")
    assert precious.read_text() == "precious"


def test_scores_need_a_folder_before_anything_is_scored(tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "tokens.jsonl"
    refused("score", "no-such.toml", "--out", out)("nowhere is no folder. Make it.")


def test_an_unknown_rule_to_score_is_refused_with_a_suggestion() -> None:
    refused("score", LEDGER, "--rules", "sof_or")("'sof_or'", "'soft_or'?")


def test_a_word_about_memory_is_not_all_that_says_it_is_full() -> None:
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("not enough memory: you tried to allocate 9 bytes"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("inputs need the same kind of memory format"))
    assert not is_out_of_memory(ValueError("out of memory"))
