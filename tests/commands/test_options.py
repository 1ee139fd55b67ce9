"""Every option of every command in every way to use it: it changes something, or is refused."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calling import LEDGER, TEACHER, call, write_jsonl

from tutelage.commands import check, compare, report, score, train
from tutelage.commands.options import make_parser
from tutelage.config.parse import load_config
from tutelage.data.types import Prompt, Rollout
from tutelage.evaluation import evaluate as evaluation
from tutelage.evaluation import server
from tutelage.models.load import load_tokenizer
from tutelage.report import figures
from tutelage.rollout.request import RolloutRequest

URL = "http://127.0.0.1:9/v1"
VALUES = {
    "--prompts": "other.jsonl", "--grader": "exact", "--chat": None, "--no-chat": None,
    "--thinking": None, "--no-thinking": None, "--suffix": " Think.", "--num-problems": "2",
    "--num-prompts": "2", "--num-samples": "3", "--max-new-tokens": "5", "--temperature": "0.5",
    "--top-p": "0.9", "--batch-size": "7", "--seed": "5", "--device": "cpu", "--json": None,
    "--dtype": "bfloat16", "--suite": "problems.jsonl", "--model-name": "m", "--out": "new",
    "--decontaminate": "gsm8k", "--dry-run": None, "--allow-change": "seed", "--rules": "q3",
    "--keep": "0.3", "--completions": "problems.jsonl", "--html": "page.html", "--figures": "dir",
    "--follow": None,
    "--processes": "2", "--hosts": "2", "--card-gib": "80",
    "config": "other.toml", "overrides": "seed=3", "model": "other", "run_folder": "other",
    "run_folders": "other",
}  # fmt: skip
MODES: dict[str, list[str]] = {
    "check": ["check", str(LEDGER)],
    "check dry": ["check", str(LEDGER), "--dry-run"],
    "check card": ["check", str(LEDGER), "--card-gib", "24"],
    "train": ["train", str(LEDGER)],
    "eval ledger": ["eval", TEACHER],
    "eval prompts": ["eval", TEACHER, "--prompts", "problems.jsonl"],
    "eval chat": ["eval", "chat", "--prompts", "problems.jsonl"],
    "eval file": ["eval", TEACHER, "--suite", "problems.jsonl"],
    "eval file chat": ["eval", "chat", "--suite", "problems.jsonl"],
    "eval benchmark": ["eval", TEACHER, "--suite", "gsm8k"],
    "eval held-out": ["eval", "run", "--suite", "held-out"],
    "eval server": ["eval", URL, "--suite", "problems.jsonl"],
    "eval server benchmark": ["eval", URL, "--suite", "gsm8k"],
    "eval server alone": ["eval", URL],
    "sample ledger": ["sample", TEACHER],
    "sample prompts": ["sample", TEACHER, "--prompts", "problems.jsonl"],
    "sample chat": ["sample", "chat", "--prompts", "problems.jsonl"],
    "score": ["score", str(LEDGER)],
    "score rules": ["score", str(LEDGER), "--rules", "soft_or"],
    "score completions": ["score", str(LEDGER), "--completions", "other.jsonl"],
    "score page": ["score", str(LEDGER), "--html", "p.html"],
    "score file": ["score", str(LEDGER), "--out", "rows.jsonl"],
    "report": ["report", "run"],
    "report figures": ["report", "run", "--figures", "d"],
    "compare runs": ["compare", "run", "run2"],
    "compare page": ["compare", "run", "run2", "--html", "p.html"],
    "compare evaluations": ["compare", "e1", "e2"],
}
PLAIN = ("eval prompts", "eval file", "eval benchmark", "sample prompts")
CHATS = ("eval chat", "eval file chat", "eval server", "eval server benchmark", "sample chat")
IS_DEFAULT = {(mode, "--no-chat") for mode in PLAIN} | {(mode, "--chat") for mode in CHATS}
"""Options that say what would have been done without them."""


def options_of(command: str) -> Iterator[str]:
    (choices,) = (
        action.choices
        for action in make_parser("")._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for action in choices[command]._actions:
        if not isinstance(action, argparse._HelpAction):
            yield from action.option_strings or [action.dest]


class Spy:
    """Stands in for everything that costs time, and remembers what it was called with."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.calls: list[Any] = []

    def replace(self, place: Any, name: str, answer: Any) -> None:
        def stand_in(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, repr(arguments), repr(named)))
            return answer(*arguments, **named) if callable(answer) else answer

        self.patch.setattr(place, name, stand_in)


class Sampled:
    """A server, scores, a comparison: whatever somebody wants of it."""

    model_name = "m"
    sent: dict[str, Any] = {}  # noqa: RUF012
    tokens = ("a",)

    def __init__(self, num_samples: int = 1) -> None:
        self.num_samples = num_samples

    def complete(self, prompts: list[Prompt], length: int, progress: Any) -> list[Rollout]:
        return rollouts_of(prompts, self.num_samples)

    def rows(self) -> list[dict[str, Any]]:
        return [{"token": "a"}]

    def table(self) -> str:
        return "table"

    def as_dict(self) -> dict[str, Any]:
        return {}

    as_text = table


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Any, Any]:
    """One without and one with a chat template."""
    tokenizer = load_tokenizer(TEACHER)
    tokenizer.chat_template = (
        "{{ enable_thinking }}{% for m in messages %}{{ m.content }}>{% endfor %}"
    )
    return load_tokenizer(TEACHER), tokenizer


@pytest.fixture
def spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizers: tuple[Any, Any]) -> Spy:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUTELAGE_DATA", str(tmp_path))
    rows = [{"id": f"{i}", "prompt": f"a{i}+1;>", "answer": "1"} for i in range(4)]
    for name in ("problems.jsonl", "gsm8k_test.jsonl"):
        write_jsonl(tmp_path / name, *rows)
    write_jsonl(tmp_path / "other.jsonl", *rows[:2])
    (tmp_path / "other.toml").write_text(LEDGER.read_text() + "\n[recording]\nevery = 3\n")
    for name in ("e1", "e2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text("{}")
        (tmp_path / name / "rows.jsonl").write_text("")
    spy = Spy(monkeypatch)
    config = load_config(LEDGER)
    model = SimpleNamespace(config=SimpleNamespace(to_dict=dict), device=torch.device("cpu"))
    plain, chat = tokenizers
    spy.replace(evaluation, "load_model", model)
    spy.replace(evaluation, "load_tokenizer", lambda ref: chat if ref == "chat" else plain)
    spy.replace(evaluation, "student_of", lambda ref: ref)
    sampler = SimpleNamespace(sample=None, close=lambda: None)
    spy.replace(sampler, "sample", sampled)
    spy.replace(evaluation, "TransformersSampler", sampler)
    spy.replace(evaluation, "_content_digest", "digest")
    spy.replace(evaluation, "run_config", config)
    spy.replace(server, "Server", lambda url, sampling, *_, **__: Sampled(sampling.num_samples))
    spy.replace(score, "score", Sampled())
    spy.replace(score, "score_for_page", (Sampled(), []))
    spy.replace(score, "write_score_page", lambda *_: "page")
    for place in (train, report):
        spy.replace(place, "write_report", "page")
    spy.replace(report, "follow", "page")
    spy.replace(figures, "write_figures", ["figure"])
    spy.replace(compare, "read_run", SimpleNamespace(with_config=lambda _: "run"))
    spy.replace(compare, "compare_records", Sampled())
    spy.replace(compare, "write_comparison", None)
    spy.replace(compare, "follow", "page")
    spy.replace(compare, "write_evaluations", None)
    spy.replace(compare, "compare_evaluations", Sampled())
    spy.replace(check, "check", ["checked"])
    spy.replace(check, "dry_run", ["tried"])
    spy.replace(check, "plan_card", ["planned"])
    spy.replace(check, "decontaminate", ["clean"])
    spy.replace(train, "train", SimpleNamespace(folder=tmp_path, is_finished=True, is_writer=True))
    return spy


def sampled(request: RolloutRequest) -> list[Rollout]:
    return rollouts_of(request.prompts, request.sampling.num_samples)


def rollouts_of(prompts: Any, num_samples: int) -> list[Rollout]:
    return [Rollout(p, s, (1,), (1,), text="1") for p in prompts for s in range(num_samples)]


def footprint(spy: Spy, command: list[str]) -> tuple[Any, ...]:
    """Exit code, errors, and what a command printed, called and wrote, which is removed."""
    spy.calls.clear()
    before = set(Path().rglob("*"))
    outcome = call(*command)
    calls = [tuple(str(part).split(" at 0x")[0] for part in c) for c in spy.calls]
    new = sorted(set(Path().rglob("*")) - before)
    settings = [path.read_text() for path in new if path.name == "settings.json"]
    for path in reversed(new):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    return outcome.code, outcome.err, outcome.out, calls, settings, new


@pytest.mark.parametrize("mode", MODES)
def test_no_option_is_dropped_in_silence(spy: Spy, mode: str) -> None:
    base, dropped = MODES[mode], []
    without = footprint(spy, base)
    for option in options_of(base[0]):
        value = VALUES[option]
        given = [str(value)] if option in ("overrides", "run_folders") else [option, str(value)]
        given = given if value is not None else [option]
        if option in base or option in ("config", "model", "run_folder", "--device"):
            continue  # what a command cannot do without, and what is tried below
        code, errors, *rest = footprint(spy, [*base, *given])
        if code != 0:
            assert code == 2
            assert errors.count("\n") == 1
            assert errors.startswith("tutelage")
        elif rest == [*without[2:]]:
            dropped.append((mode, option))
    assert set(dropped) <= IS_DEFAULT


@pytest.mark.parametrize("mode", [m for m in MODES if m.startswith(("eval", "sample"))])
def test_a_device_is_used_or_refused(spy: Spy, mode: str) -> None:
    outcome = call(*MODES[mode], "--device", "cuda:99")
    assert outcome.code == 2
    assert "--suite" in outcome.err if mode == "eval server alone" else "device" in outcome.err


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (["eval", TEACHER, "--out", "x"], ("--out", "Add --suite")),
        (["eval", TEACHER, "--suite", "problems.jsonl", "--prompts", "p"], ("Give one of them",)),
        (["eval", TEACHER, "--no-chat"], ("--no-chat", "--prompts FILE")),
        (["eval", TEACHER, "--suite", "gsm8k", "--grader", "math"], ("--grader", "of a file")),
        (["eval", URL, "--suite", "gsm8k", "--dtype", "float16"], ("--dtype", "not on a server")),
        (
            ["eval", TEACHER, "--prompts", "problems.jsonl", "--thinking"],
            ("no prompt is rendered",),
        ),
        (["eval", TEACHER, "--num-prompts", "2", "--num-problems", "3"], ("not allowed with",)),
        (["score", str(LEDGER), "--keep", "0.3"], ("Add --rules",)),
        (["score", str(LEDGER), "--keep", "50"], ("--keep must be in (0, 1]", "0.5 for 50 %")),
        (["report", "run", "--out", "x", "--figures", "y"], ("not allowed with",)),
        (["report", "run", "--follow", "--figures", "y"], ("Leave --follow out",)),
        (["compare", "run", "run2", "--follow"], ("Name it with --html FILE",)),
        (["compare", "run", "--html", "x", "--follow"], ("two runs, got 1 run",)),
        (["compare", "e1", "e2", "--html", "x", "--follow"], ("got evaluations", "Leave")),
        (["train", str(LEDGER), "--num-steps", "4"], ("without dashes: num_steps=4",)),
        (["train", str(LEDGER), "--learning-rate=1"], ("optimizer.learning_rate=1",)),
        (["train", str(LEDGER), "--selection.keep", "1"], ("selection.keep=1",)),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_refusal_says_what_to_do(spy: Spy, command: list[str], parts: tuple[str, ...]) -> None:
    outcome = call(*command)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    for part in parts:
        assert part in outcome.err


def test_a_model_with_other_characters_is_not_measured_on_the_ledger_task(
    spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(TEACHER)
    tokenizer.add_tokens(["€"])
    monkeypatch.setattr(evaluation, "load_tokenizer", lambda ref: tokenizer)
    for command in ("eval", "sample"):
        outcome = call(command, "some-model")
        assert outcome.code == 2
        assert "Pass --prompts FILE, or --suite" in outcome.err


@pytest.mark.parametrize(("option", "rendered"), [((), 4), (("--no-chat",), 0)])
def test_the_chat_template_is_used_where_there_is_one(
    spy: Spy, option: tuple[str, ...], rendered: int
) -> None:
    for command in ("eval", "sample"):
        spy.calls.clear()
        outcome = call(command, "chat", "--prompts", "problems.jsonl", *option)
        assert outcome.code == 0, outcome.err
        assert ("chat template" in outcome.out) == bool(rendered)
        (prompts,) = (args for name, args, _ in spy.calls if name == "sample")
        assert prompts.count("'role': 'user'") == rendered
