"""A run ends with a verdict that its own measurements bear out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_config
from tutelage.evaluation.verdict import verdict_of
from tutelage.train.loop import train

LAST = 10


def rows(
    step: int,
    right: list[float] | None,
    nats: list[float | None],
    is_truncated: bool = False,
    k: int = 4,
) -> list[dict[str, Any]]:
    """k completions of 10 tokens a problem; `right` is the share of correct ones of each."""
    return [
        {
            "step": step,
            "model": "student",
            "prompt_id": f"p{i}",
            "sample": s,
            "is_correct": None if right is None else s < round(right[i] * k),
            "is_truncated": is_truncated,
            "num_tokens": 10,
            "reverse_kl_nats": None if nats[i] is None else 10 * nats[i],
        }
        for i in range(len(nats))
        for s in range(k)
    ]


def verdict(*parts: list[dict[str, Any]]) -> str:
    found = verdict_of([row for part in parts for row in part], LAST)
    assert found is not None
    return str(found)


N = 32
NOISE = [0.01 * (i % 5 - 2) for i in range(N)]
KL = [0.4 + noise for noise in NOISE]


def test_improved_by_accuracy() -> None:
    said = verdict(rows(0, [0.25] * N, KL), rows(LAST, [0.75, 1.0] * (N // 2), KL))
    assert said.startswith("improved: mean@4 25.0 % -> 87.5 % (+62.5, 95 % +")
    assert "over 32 problems" in said


def test_a_divergence_that_grew_decides_nothing_where_nobody_distills() -> None:
    """Accuracy that moved too little to say beside a divergence that doubled."""
    parts = [*rows(0, [0.25, 0.5] * (N // 2), KL), *rows(LAST, [0.5, 0.25] * (N // 2), [0.9] * N)]
    told = [verdict_of(parts, LAST, is_distilled=is_distilled) for is_distilled in (True, False)]
    words = [one.word for one in told if one is not None]
    assert words == ["worse", "too few problems to say"]
    assert all("reverse KL 0.3991 -> 0.9 nats" in str(one) for one in told)


def test_worse_by_accuracy_though_the_divergence_fell() -> None:
    said = verdict(rows(0, [0.75] * N, KL), rows(LAST, [0.25] * N, [0.1] * N))
    assert said.startswith("worse: mean@4 75.0 % -> 25.0 %")
    assert "reverse KL 0.3991 -> 0.1 nats" in said


def test_the_divergence_decides_where_accuracy_does_not() -> None:
    lower, higher = [kl / 2 + n for kl, n in zip(KL, NOISE, strict=True)], [9.0 + n for n in NOISE]
    assert verdict(rows(0, None, KL), rows(LAST, None, lower)).startswith("improved: reverse KL")
    assert verdict(rows(0, None, KL), rows(LAST, None, higher)).startswith("worse: reverse KL")
    same = [0.0] * N
    assert verdict(rows(0, same, KL), rows(LAST, same, higher)).startswith("worse: mean@4 0.0 %")


def test_each_measure_has_its_word_where_they_differ() -> None:
    lower = [kl / 2 + n for kl, n in zip(KL, NOISE, strict=True)]
    said = verdict(rows(0, [0.25, 0.5] * (N // 2), KL), rows(LAST, [0.5, 0.25] * (N // 2), lower))
    assert said.startswith("improved: mean@4 ")
    assert said.count(" over 32 problems): ") == 2
    assert "problems): too few problems to say; reverse KL" in said
    assert said.endswith("problems): improved")
    assert "problems): " not in verdict(rows(0, None, KL), rows(LAST, None, lower))


def test_every_token_weighs_the_same() -> None:
    """As in the divergence that a step and an evaluation log: not the mean of problems' means."""
    parts = [rows(step, None, KL) for step in (0, LAST)]
    for part in parts:
        for row in part[:4]:  # the first problem's completions are ten times as long
            row["num_tokens"], row["reverse_kl_nats"] = 100, 100 * 2.0
    nats, tokens = sum(10 * kl for kl in KL[1:]) + 200.0, 10 * (N - 1) + 100
    assert f"reverse KL {nats / tokens:.4g} -> {nats / tokens:.4g} nats" in verdict(*parts)


def test_unchanged() -> None:
    assert verdict(rows(0, [0.5] * N, KL), rows(LAST, [0.5] * N, KL)).startswith("unchanged: ")
    moved = [kl + 1e-4 for kl in KL]  # sure, but next to nothing
    assert verdict(rows(0, None, KL), rows(LAST, None, moved)).startswith("unchanged: ")


def test_too_few_problems_to_say() -> None:
    few = verdict(rows(0, [0.0] * 7, KL[:7]), rows(LAST, [1.0] * 7, [0.1] * 7))
    assert few.startswith("too few problems to say: ")
    wild = [0.4 + (0.35 if i % 2 else -0.3) for i in range(10)]
    assert verdict(rows(0, None, KL[:10]), rows(LAST, None, wild)).startswith("too few problems")


def test_one_problem_has_no_interval() -> None:
    said = verdict(rows(0, [0.25], [0.4]), rows(LAST, [0.5], [0.3]))
    assert said == (
        "too few problems to say: mean@4 25.0 % -> 50.0 % (+25.0, 95 % -100.0 to +100.0 points "
        "over 1 problem); reverse KL 0.4 -> 0.3 nats (-0.1000, no interval over 1 problem)"
    )


def test_cut_off() -> None:
    after = rows(LAST, [1.0] * N, [0.1] * N, is_truncated=True)
    said = verdict(rows(0, [0.0] * N, KL), after)
    assert said.startswith("cut off: 100% of the last completions were cut off")
    for row in after[: len(after) * 6 // 10]:
        row["is_truncated"] = False
    assert verdict(rows(0, [0.0] * N, KL), after).startswith("improved")


def test_conversations_are_cut_off_at_other_limits_too() -> None:
    parts = rows(0, None, KL), rows(LAST, None, KL, is_truncated=True)
    said = verdict_of([*parts[0], *parts[1]], LAST, has_turns=True)
    assert "cut off at a limit (sampling.max_new_tokens, data.max_turns, data.max_turn" in str(said)
    assert "cut off at sampling.max_new_tokens;" in verdict(*parts)


def test_no_verdict_without_both_measurements() -> None:
    assert verdict_of(rows(0, None, KL), LAST) is None
    assert verdict_of([], LAST) is None
    old = [{"step": s, "model": "student", "prompt_id": "a", "sample": 0, "is_correct": True}
           for s in (0, LAST)]  # fmt: skip
    assert verdict_of(old, LAST) is None


def test_what_is_not_finite_is_no_measurement() -> None:
    said = verdict(rows(0, None, [None] * N), rows(LAST, None, KL))
    assert said == "too few problems to say: nothing could be measured"


def test_a_run_says_it_last_and_keeps_it(tiny_models: Path, tmp_path: Path) -> None:
    evaluation = {"num_problems": 8, "num_samples": 2, "teacher": True}
    config = tiny_config(tiny_models, tmp_path / "run", num_steps=1, evaluation=evaluation)
    said: list[str] = []
    train(config, log=said.append)
    assert said[-1].startswith("verdict: ")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    kept = f"verdict: {manifest['verdict']['word']}: {manifest['verdict']['reason']}"
    assert said[-1] == kept
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert f"Verdict: **{manifest['verdict']['word']}**" in card
    again: list[str] = []
    train(config, log=again.append)
    assert not [line for line in again if line.startswith("verdict")]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["verdict"]


def test_a_run_of_conversations_names_their_limits(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        tmp_path / "run",
        num_steps=1,
        student={"model": "package:tutelage/assets/ledger-tools-overconfident"},
        teacher={"model": "package:tutelage/assets/ledger-tools-teacher"},
        data={"kind": "ledger_tools", "max_turns": 1},
        evaluation={"num_problems": 2, "num_samples": 1, "teacher": True},
    )
    said: list[str] = []
    train(config, log=said.append)
    assert said[-1].startswith("verdict: cut off: 100% of the last completions were cut off at a ")
    assert "data.max_turns" in said[-1]


@pytest.mark.parametrize("step", [0, 1])
def test_completions_are_measured_one_by_one(tiny_models: Path, tmp_path: Path, step: int) -> None:
    evaluation = {"num_problems": 3, "num_samples": 2, "teacher": True}
    config = tiny_config(
        tiny_models, tmp_path / "run", num_steps=1, evaluation=evaluation, micro_batch_size=2
    )
    train(config, log=lambda _: None)
    lines = (tmp_path / "run" / "evaluation_rows.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    mine = [r for r in found if (r["model"], r["step"]) == ("student", step)]
    total = sum(r["reverse_kl_nats"] for r in mine) / sum(r["num_tokens"] for r in mine)
    summaries = map(json.loads, (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines())
    (summary,) = (s for s in summaries if (s["model"], s["step"]) == ("student", step))
    assert total == pytest.approx(summary["held_out_reverse_kl_nats"], rel=1e-9)
    assert all(r["reverse_kl_nats"] is None for r in found if r["model"] == "teacher")
