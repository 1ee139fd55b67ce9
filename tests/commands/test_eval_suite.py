"""`tutelage eval --suite` on files, benchmarks, a run's own held-out part and a server."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import combinations, permutations
from pathlib import Path

import pytest
from calling import STUDENT, TEACHER, Outcome, call, read_jsonl, succeed, write_jsonl

from reliability.server import EvilServer, good
from tutelage.data.tasks import LedgerTask

Trained = tuple[Path, Outcome]
SHORT = ("--max-new-tokens", 64, "--num-samples", 4, "--batch-size", 16)


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ledger problems with their answers, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUTELAGE_API_KEY", raising=False)
    monkeypatch.setenv("TUTELAGE_DATA", str(tmp_path))
    prompts = LedgerTask().held_out(6)
    rows = [{"id": p.id, "prompt": p.content, "answer": p.answer} for p in prompts]
    return write_jsonl(tmp_path / "sums.jsonl", *rows)


def refused(*arguments: object) -> str:
    outcome = call(*arguments)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1, outcome.err
    return outcome.err


def test_a_file_gives_scores_samples_and_tables(problems: Path) -> None:
    command = ("eval", TEACHER, "--suite", problems, *SHORT, "--no-chat", "--out", "e")
    (record,) = succeed(*command, "--json").records
    rows = read_jsonl(Path("e/rows.jsonl"))
    assert len(rows) == 24
    assert record["mean_at_k_low"] < record["mean_at_k"] <= record["mean_at_k_high"]
    assert 0 <= record["maj_at_k_low"] <= record["maj_at_k"] <= record["maj_at_k_high"] <= 1
    saved = json.loads(Path("e/summary.json").read_text())
    assert {key: saved[key] for key in record} == record
    text = succeed(*command).out
    assert Path("e/summary.md").read_text().strip() in text
    assert "| sums |" in text


def test_scores_equal_brute_force_over_the_saved_rows(problems: Path) -> None:
    """Every subset of the samples for pass@k; every order of counting them for maj@k's ties."""
    command = ("eval", STUDENT, "--suite", problems, *SHORT, "--no-chat", "--num-samples", 5)
    (record,) = succeed(*command, "--out", "e", "--json").records
    groups: dict[str, list[tuple[bool, Fraction | None]]] = {}
    for row in read_jsonl(Path("e/rows.jsonl")):
        answer = None if row["answer"] is None else Fraction(row["answer"])
        assert row["is_correct"] == (answer == Fraction(row["gold"]))
        groups.setdefault(row["prompt_id"], []).append((row["is_correct"], answer))
    assert [len(group) for group in groups.values()] == [5] * 6
    for k, key in ((1, "pass_at_1"), (2, "pass_at_2"), (4, "pass_at_4"), (5, "pass_at_k")):
        subsets = [[*combinations(group, k)] for group in groups.values()]
        rates = [mean(any(right for right, _ in some) for some in each) for each in subsets]
        assert record[key] == pytest.approx(mean(rates), abs=1e-12)
    majorities = [mean(map(winner_is_right, permutations(group))) for group in groups.values()]
    assert record["maj_at_k"] == pytest.approx(mean(majorities), abs=1e-12)
    assert record["mean_at_k"] == pytest.approx(record["pass_at_1"], abs=1e-12)
    distinct = [record[key] for key in ("pass_at_1", "pass_at_2", "pass_at_4", "pass_at_k")]
    assert distinct == sorted({*distinct})  # none, all or equal shares would prove little


def test_the_grader_of_a_file_fits_its_reference_answers(problems: Path) -> None:
    rows = read_jsonl(problems)
    write_jsonl(Path("roots.jsonl"), *rows[1:], rows[0] | {"answer": r"\sqrt{2}"})
    command = ("eval", TEACHER, *SHORT, "--no-chat", "--num-problems", 2, "--suite")
    for path, options, grader in (
        (problems, (), "number"),
        ("roots.jsonl", ("--num-problems", 6), "math"),
        (problems, ("--grader", "exact"), "exact"),
    ):
        (record,) = succeed(*command, path, *options, "--json").records
        settings = json.loads((Path(record["folder"]) / "settings.json").read_text())
        assert [b["grader"] for b in settings["benchmarks"].values()] == [grader]


def winner_is_right(samples: Sequence[tuple[bool, Fraction | None]]) -> bool:
    """Whether the answer given most often, of several the first to come, is right."""
    votes = Counter(answer for _, answer in samples if answer is not None)
    return bool(votes) and {a: right for right, a in samples}[votes.most_common(1)[0][0]]


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def test_a_cut_evaluation_continues_to_the_same_bytes(problems: Path) -> None:
    command = ("eval", TEACHER, "--suite", problems, *SHORT, "--no-chat", "--out")
    options = ("--batch-size", 2)
    succeed(*command, "whole", *options)
    whole = Path("whole/rows.jsonl").read_bytes()
    shutil.copytree("whole", "cut")
    Path("cut/rows.jsonl").write_bytes(whole[: len(whole) // 2])
    (record,) = succeed(*command, "cut", *options, "--json").records
    assert Path("cut/rows.jsonl").read_bytes() == whole
    assert "seed differ" in refused(*command, "cut", *options, "--seed", 1)
    assert record["num_problems"] == 6


def test_the_held_out_part_of_a_run_scores_as_in_the_run(trained: Trained, problems: Path) -> None:
    folder, _ = trained
    (record,) = succeed("eval", folder, "--suite", "held-out", "--json").records
    (line,) = (
        row
        for row in read_jsonl(folder / "evaluation.jsonl")
        if (row["model"], row["step"]) == ("student", 3)
    )
    for key in ("mean_at_k", "pass_at_k", "maj_at_k", "num_problems", "num_samples"):
        assert record[key] == line[key]
    assert "needs a run folder" in refused("eval", TEACHER, "--suite", "held-out")


def test_several_benchmarks_and_a_missing_one(
    problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in ("gsm8k_test", "math500"):
        shutil.copy(problems, f"{name}.jsonl")
    command = ("eval", TEACHER, *SHORT, "--no-chat", "--suffix", "", "--num-problems", 2)
    (record,) = succeed(*command, "--suite", "gsm8k,math500", "--json").records
    assert list(record["benchmarks"]) == ["gsm8k", "math500"]
    assert record["benchmarks"]["gsm8k"]["num_problems"] == 2
    assert record["benchmarks"]["gsm8k"]["maj_at_k_low"] is not None
    assert Path(record["folder"]).parent.name == "evaluations"
    assert "aime24 is not here" in refused(*command, "--suite", "tip")
    assert "'gsm9k' is unknown" in refused(*command, "--suite", "gsm9k")
    assert "--num-problems must be" in refused(*command, "--suite", "gsm8k", "--num-problems", 0)


def test_a_server_is_a_model(problems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_API_KEY", "key-in-the-environment")
    server = EvilServer(lambda body: good)
    with server.running() as url:
        command = ("eval", url, "--suite", problems, "--model-name", "m", "--num-samples", 2)
        (record,) = succeed(*command, "--out", "e", "--json").records
        assert "--suite" in refused("eval", url)
    assert record["num_problems"] == 6
    asked = [(body["messages"][0]["content"], body["seed"]) for _, body, _ in server.seen]
    assert len(set(asked)) == len(asked) == 12
    prompts = {row["prompt"] for row in read_jsonl(problems)}
    assert {text for text, _ in asked} == prompts
    headers = [headers["authorization"] for _, _, headers in server.seen]
    assert headers == ["Bearer key-in-the-environment"] * 12
    assert record["sampling"]["repetition_penalty"] == 1.0
    assert "top_k -1" in Path("e/summary.md").read_text().splitlines()[0]
    for path in Path("e").iterdir():
        assert "key-in-the-environment" not in path.read_text()


def test_check_names_prompts_that_repeat_a_benchmark(own: Path, problems: Path) -> None:
    lines = own.with_name("own.jsonl").read_text().splitlines()
    shutil.copy(own.with_name("own.jsonl"), "gsm8k_test.jsonl")
    found = succeed("check", own, "--decontaminate", "gsm8k").out
    assert f"decontamination: {len(lines)} of {len(lines)} prompts repeat" in found
    assert "  five holds 100% of five" in found
    write_jsonl(Path("gsm8k_test.jsonl"), {"problem": "Other words altogether.", "answer": "1"})
    assert "decontamination: 0 of" in succeed("check", own, "--decontaminate", "gsm8k").out
    assert "decontamination" not in succeed("check", own).out
    assert "'gsm9k' is unknown" in refused("check", own, "--decontaminate", "gsm9k")


def test_check_counts_prompts_that_are_too_long(own: Path) -> None:
    limit = ("data.max_prompt_tokens=26", "data.num_held_out=1")
    out = succeed("check", own, *limit).out
    assert "warning: 2 prompts over data.max_prompt_tokens left out" in out
    assert "left out" not in succeed("check", own).out
