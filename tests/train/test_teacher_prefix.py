"""Completions that the teacher begins: what it samples, what counts, and live steps behind them."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from memory.test_cuda import CARD
from ranks import run_ranks
from tiny import tiny_config, tiny_table
from tiny_runs import are_equal, metrics_of, run, weights_of
from tutelage.commands.check import check
from tutelage.commands.dry_run import dry_run
from tutelage.config.parse import parse_config
from tutelage.config.rollouts import LiveRollouts
from tutelage.config.schema import Config
from tutelage.core import TokenStats
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError
from tutelage.memory.cuda import plan_cuda
from tutelage.memory.meta_model import shadows
from tutelage.models.tokenizers import decode, stop_ids
from tutelage.rollout.generate import generate
from tutelage.setup.components import build_components
from tutelage.train.loop import train
from tutelage.train.step import Step
from tutelage.train.teacher_prefix import before_end

PREFIX = {"source": "live", "teacher_prefix_tokens": 6, "teacher_prefix_steps": 3}
KEYS = ("teacher_prefix_tokens", "teacher_prefix_share")
"""Metrics that plain live steps lack."""
PROGRAM = """
import json
import sys
from tutelage.config.parse import parse_config
from tutelage.train.loop import train
train(parse_config(json.loads(sys.argv[1])))
"""


def step_of(config: Config) -> Step:
    components = build_components(config)
    optimizer = torch.optim.SGD(components.student.parameters(), lr=0.0)
    return Step(config, components, Accelerator(cpu=True), components.student, optimizer)


def test_the_length_falls_to_zero() -> None:
    rollouts = LiveRollouts(teacher_prefix_tokens=10, teacher_prefix_steps=4)
    assert [rollouts.prefix_tokens(step) for step in range(1, 7)] == [10, 8, 5, 3, 0, 0]
    assert LiveRollouts().prefix_tokens(1) == 0


def test_the_teacher_samples_first_and_the_student_goes_on(
    tiny_models: Path, tmp_path: Path
) -> None:
    """Against draws of both models alone, whose batches are others."""
    step = step_of(tiny_config(tiny_models, tmp_path, rollouts=PREFIX, sampling_batch_size=3))
    found = step.generate(2)
    request, components = step.request(2), step.components
    teacher, tokenizer = components.teacher.model, components.tokenizer
    ends = stop_ids(teacher, tokenizer) | stop_ids(components.student.plain, tokenizer)
    asked = replace(request, sampling=replace(request.sampling, max_new_tokens=4))
    firsts = generate(teacher, tokenizer, replace(asked, seed=(*request.seed, 6)))
    assert len(found) == len(firsts) == 8
    for number, (rollout, first) in enumerate(zip(found, firsts, strict=True)):
        count = rollout.is_generated.index(True)
        prefix, rest = rollout.completion_ids[:count], rollout.completion_ids[count:]
        assert first.completion_ids[:count] == prefix
        assert count == 4 or first.completion_ids[count] in ends
        assert (rollout.prompt, rollout.sample) == (first.prompt, number % 2)
        assert rollout.prompt_ids == first.prompt_ids
        alone = replace(
            request,
            prompts=[rollout.prompt],
            sampling=replace(request.sampling, num_samples=1, max_new_tokens=6),
            first_sample=[rollout.sample],
            prompt_ids=[first.prompt_ids + prefix],
        )
        (continued,) = generate(components.student.model, tokenizer, alone)
        assert continued.completion_ids == rest == rollout.generated_ids
        assert len(rollout.logprobs) == len(rest) <= 6
        assert rollout.text == decode(tokenizer, prefix + rest)
    lengths = {rollout.is_generated.index(True) for rollout in found}
    assert 4 in lengths
    share = 1 - sum(len(r.generated_ids) for r in found) / sum(len(r.completion_ids) for r in found)
    assert [step.checks[key] for key in KEYS] == [4, pytest.approx(share)]


def test_a_prefix_ends_before_whatever_ends_a_text() -> None:
    ids = (5, 6, 9, 7)
    rollout = Rollout(Prompt("p", "text"), 0, (1,), ids, logprobs=(-1.0,) * 4)
    assert before_end(rollout, {9}, 20).completion_ids == (5, 6)
    assert before_end(rollout, {2}, 20).completion_ids == ids
    assert before_end(rollout, {2}, 6).completion_ids == (5,)
    assert before_end(rollout, {5}, 20).completion_ids == ()


def test_rows_are_the_student_s_tokens(tiny_models: Path, tmp_path: Path) -> None:
    """Each with the log-probability that it was sampled with, behind the teacher's tokens."""
    changes = {"rollouts": PREFIX, "objective": {"kind": "sampled"}}
    step = step_of(tiny_config(tiny_models, tmp_path, **changes))
    rollouts = step.generate(1)
    micro_batches = step.pack(rollouts)
    rows = sum(len(rollout.generated_ids) for rollout in rollouts)
    assert sum(m.batch.num_rows for m in micro_batches) == rows
    stats = TokenStats.cat([step.student(m.batch, None) for m in micro_batches])
    named = step.named(rollouts)
    sampled = [x for m in micro_batches for n in m.batch.names for x in named[n].logprobs]
    assert stats.log_p.tolist() == pytest.approx(sampled, abs=1e-5)


@pytest.mark.parametrize(
    "objective",
    ["kl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sampled", "grpo"))],
)
def test_a_run_has_a_prefix_at_first_and_none_at_last(
    tiny_models: Path, tmp_path: Path, objective: str
) -> None:
    """With states that were recorded while sampling, and with an odd micro-batch as well."""
    soft_or = {"rule": "soft_or", "keep": 0.5} if objective == "kl" else {"rule": "all"}
    changes = {"rollouts": PREFIX, "objective": {"kind": objective}, "selection": soft_or}
    run(tiny_models, tmp_path / "run", **changes)
    metrics = metrics_of(tmp_path / "run")
    assert [m["teacher_prefix_tokens"] for m in metrics] == [6, 4, 2, 0]
    shares = [m["teacher_prefix_share"] for m in metrics]
    assert shares == sorted(shares, reverse=True)
    assert 0 == shares[3] < shares[2]
    assert all(m["completion_length_mean"] * 8 == m["num_rows"] for m in metrics)
    run(tiny_models, tmp_path / "again", **changes, micro_batch_size=1, num_steps=1)
    for key, value in metrics_of(tmp_path / "again")[0].items():
        if isinstance(value, float):
            assert metrics[0][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_a_run_goes_on_bit_for_bit(tiny_models: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rollouts": PREFIX, "num_steps": 2, "checkpoint_every": 1}
    expected = run(tiny_models, tmp_path, **changes)
    metrics = metrics_of(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-000002")
    shutil.rmtree(tmp_path / "student")
    assert are_equal(expected, run(tiny_models, tmp_path, **changes))
    assert metrics == metrics_of(tmp_path)


def test_steps_without_a_prefix_are_live_ones_bit_for_bit(
    tiny_models: Path, tmp_path: Path
) -> None:
    """The last step of a run, taken again with a prefix that has fallen to 0 by then."""
    changes: dict[str, Any] = {"num_steps": 2, "checkpoint_every": 1}
    expected = run(tiny_models, tmp_path, **changes)
    metrics = metrics_of(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-000002")
    shutil.rmtree(tmp_path / "student")
    changes["rollouts"] = PREFIX | {"teacher_prefix_steps": 1}
    config = tiny_config(tiny_models, tmp_path, **changes)
    allowed = tuple(f"rollouts.{key}" for key in PREFIX if key != "source")
    train(config, log=lambda _: None, allow_change=allowed)
    assert are_equal(expected, weights_of(tmp_path / "student"))
    again = metrics_of(tmp_path)
    assert [again[1].pop(key) for key in KEYS] == [0, 0.0]
    assert again == metrics


def test_recorded_tokens_are_the_student_s_behind_the_prefix(
    tiny_models: Path, tmp_path: Path
) -> None:
    recording = {"every": 1, "num_prompts": 0}
    run(tiny_models, tmp_path, rollouts=PREFIX, recording=recording, num_steps=1)
    step = step_of(tiny_config(tiny_models, tmp_path, rollouts=PREFIX))
    rollouts = {(r.prompt.id, r.sample): r for r in step.generate(1)}
    lines = (tmp_path / "tokens.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "training"]
    assert len(records) == 4
    for record in records:
        rollout = rollouts[record["prompt_id"], record["sample"]]
        count = rollout.is_generated.index(True)
        before = rollout.prompt_ids + rollout.completion_ids[:count]
        assert record["prompt"] == decode(step.components.tokenizer, before)
        assert record["token"] == list(rollout.generated_ids)


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tiny_models: Path, tmp_path: Path) -> None:
    run(tiny_models, tmp_path / "one", rollouts=PREFIX, num_steps=2)
    table = tiny_table(tiny_models, tmp_path / "two", rollouts=PREFIX, num_steps=2)
    ended = run_ranks([sys.executable, "-c", PROGRAM, json.dumps(table)], 2)
    assert [rank.code for rank in ended] == [0, 0]
    names = ("num_rows", "completion_length_mean", *KEYS)
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert [one[name] for name in names] == [two[name] for name in names]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


LOCAL = {"student": {"model": "a"}, "teacher": {"model": "b"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"kind": "self"}}, "0 with teacher.kind = self, got 6"),
        (
            {"teacher": {"kind": "hidden_server", "model": "b", "url": "http://h"}},
            "0 with teacher.kind = hidden_server, got 6",
        ),
        ({"teacher": {"model": "b", "sharding": "tp"}}, "0 with teacher.sharding = tp, got 6"),
        (
            {"teacher": {"model": "b", "vocabulary": "aligned"}},
            "0 with teacher.vocabulary = aligned, got 6",
        ),
        (
            {"teachers": {"c": {"model": "c"}},
             "data": {"kind": "file", "path": "p.jsonl", "teacher_column": "t"}},
            "0 with teachers, got 6",
        ),
        ({"engine": {"kind": "vllm"}}, "0 with engine.kind = vllm, got 6"),
        ({"data": {"kind": "ledger_tools"}}, "0 with data.kind = ledger_tools, got 6"),
        ({"sampling": {"max_new_tokens": 6}}, "below sampling.max_new_tokens = 6, got 6"),
        (
            {"rollouts": PREFIX | {"teacher_prefix_steps": 0}},
            "rollouts.teacher_prefix_steps must be at least 1",
        ),
        (
            {"rollouts": PREFIX | {"teacher_prefix_tokens": 0}},
            "rollouts.teacher_prefix_tokens must be at least 1",
        ),
        ({"rollouts": PREFIX | {"teacher_prefix_tokens": -1}}, "must be at least 0, got -1"),
        ({"rollouts": PREFIX | {"source": "stored"}}, "It belongs to rollouts.source live"),
    ],
)  # fmt: skip
def test_what_has_no_prefix_is_one_line(changes: dict[str, Any], message: str) -> None:
    table = LOCAL | {"rollouts": PREFIX, "evaluation": {"teacher": False}} | changes
    with pytest.raises(ConfigError) as caught:
        parse_config(table)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_says_what_is_sampled_and_plans_its_memory(tiny_models: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", rollouts=PREFIX)
    lines = list(check(config, "run"))
    assert any("the first 6 tokens of each completion in step 1, none after" in x for x in lines)
    assert [line.split()[1] for line in lines if line.startswith("memory: prefix")] == ["prefix"]
    plain = replace(config, rollouts=LiveRollouts())
    sides = shadows(build_components(config))
    with_prefix, without = (
        {phase.name: phase.parts for phase in plan_cuda(one, *sides, CARD, 10).phases}
        for one in (config, plain)
    )
    assert with_prefix.keys() - without.keys() == {"prefix"}
    assert with_prefix["prefix"]["KV cache"] > 0
    assert with_prefix["prefix"]["optimizer"] == with_prefix["learn"]["optimizer"] > 0
    # every completion has a prompt of its own, which is longer
    assert with_prefix["rollout"]["prefill"] > without["rollout"]["prefill"]


@pytest.mark.slow
def test_a_dry_run_has_a_shorter_prefix() -> None:
    hub = {"student": {"model": "Qwen/Qwen3-0.6B"}, "teacher": {"model": "Qwen/Qwen3-8B"}}
    long = PREFIX | {"teacher_prefix_tokens": 100}
    lines = list(
        dry_run(parse_config(hub | {"rollouts": long, "sampling": {"max_new_tokens": 512}}))
    )
    assert any("rollouts.teacher_prefix_tokens 100 -> 8" in line for line in lines)
    assert any("step 2 gives the same numbers" in line for line in lines)
