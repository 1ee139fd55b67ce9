"""Stored and mixed rollouts: equal to live ones where they should be, whole after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tiny import tiny_config
from tiny_runs import are_equal, metrics_of, run
from tutelage.config.parse import parse_config
from tutelage.config.schema import Config
from tutelage.data.completions import GivenCompletions
from tutelage.data.formats import PromptFormat
from tutelage.data.types import Rollout
from tutelage.errors import ConfigError, DataError, RunError
from tutelage.models.load import load_tokenizer
from tutelage.rollout.request import RolloutRequest
from tutelage.setup.components import build_components
from tutelage.setup.inputs import build_task
from tutelage.train.loop import train
from tutelage.train.step import Step
from tutelage.train.stored import store
from tutelage.train.stored.fill import Fill
from tutelage.train.stored.sources import MixedSource

STORED = {"source": "stored"}
NEW = {"stored_share", "staleness_steps", "log_ratio_mean_nats"}
NEW |= {"log_ratio_min_nats", "log_ratio_max_nats"}
"""Keys that the metrics of live rollouts lack."""
METHODS: dict[str, dict[str, Any]] = {
    "kl": {},
    "sampled": {"objective": {"kind": "sampled"}, "scoring": "forward"},
    "selection": {"selection": {"rule": "soft_or", "keep": 0.5}, "scoring": "forward"},
    "packed": {"micro_batches": "packed"},
}


def step_of(config: Config) -> Step:
    components = build_components(config)
    optimizer = torch.optim.SGD(components.student.parameters(), lr=0.0)
    return Step(config, components, Accelerator(cpu=True), components.student, optimizer)


def shared(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key not in NEW}


@pytest.fixture(scope="module")
def given(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with two completions of every prompt of the tiny run's four steps."""
    path = tmp_path_factory.mktemp("given") / "completions.jsonl"
    config = tiny_config(tiny_models, path)
    task, lines = build_task(config.data), []
    for step in range(4):
        for prompt in task.prompts(step, 4, 0):
            for text in ("1+2=3", "4"):
                lines.append({"prompt": prompt.content, "completion": text})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_equals_live_bit_for_bit(
    tiny_models: Path, tmp_path: Path, method: str
) -> None:
    changes = METHODS[method] | {"num_steps": 1}
    live = run(tiny_models, tmp_path / "live", **changes)
    stored = run(tiny_models, tmp_path / "stored", rollouts=STORED, **changes)
    assert are_equal(live, stored)
    (before,), (after,) = metrics_of(tmp_path / "live"), metrics_of(tmp_path / "stored")
    assert before == shared(after)
    assert after["stored_share"] == 1
    assert after["staleness_steps"] == 0


def test_later_steps_learn_from_the_initial_student(tiny_models: Path, tmp_path: Path) -> None:
    changes = {"objective": {"kind": "sampled"}, "optimizer": {"learning_rate": 2e-2}}
    live = run(tiny_models, tmp_path / "live", **changes)
    stored = run(tiny_models, tmp_path / "stored", rollouts=STORED, **changes)
    assert not are_equal(live, stored)
    metrics = metrics_of(tmp_path / "stored")
    assert [m["staleness_steps"] for m in metrics] == [0, 1, 2, 3]
    assert [m["log_ratio_max_nats"] > 0 for m in metrics] == [False, True, True, True]
    # the ratio is to the initial student's log-probabilities, so that it leaves the clip
    assert max(m["clip_share"] for m in metrics[1:]) > 0
    assert all(m["clip_share"] == 0 for m in metrics_of(tmp_path / "live"))


def test_the_advantage_of_stored_tokens_is_recomputed_where_asked(
    tiny_models: Path, tmp_path: Path
) -> None:
    changes = {"rollouts": STORED, "optimizer": {"learning_rate": 2e-2}}
    for name in ("sampler", "step"):
        objective = {"kind": "sampled", "old_logprobs": name}
        run(tiny_models, tmp_path / name, objective=objective, **changes)
    old, new = metrics_of(tmp_path / "sampler"), metrics_of(tmp_path / "step")
    assert old[0] == new[0]
    assert old[-1]["loss"] != new[-1]["loss"]
    assert [m["staleness_steps"] for m in new] == [0, 1, 2, 3]
    assert all(m["clip_share"] == 0 for m in new)


@pytest.mark.parametrize(("share", "other"), [(1.0, {"source": "live"}), (0.0, STORED)])
def test_the_ends_of_mixing_are_live_and_stored(
    tiny_models: Path, tmp_path: Path, given: Path, share: float, other: dict[str, Any]
) -> None:
    path = {"path": str(given)}
    other = other if other["source"] == "live" else other | path
    expected = run(tiny_models, tmp_path / "other", rollouts=other)
    mixed = path | {"source": "mixed", "on_policy_share": share}
    found = run(tiny_models, tmp_path / "mixed", rollouts=mixed)
    assert are_equal(expected, found)
    pairs = zip(metrics_of(tmp_path / "other"), metrics_of(tmp_path / "mixed"), strict=True)
    assert all(shared(before) == shared(after) for before, after in pairs)


def test_a_share_of_the_prompts_is_live(tiny_models: Path, tmp_path: Path) -> None:
    mixed = {"source": "mixed", "on_policy_share": 0.5}
    run(tiny_models, tmp_path, rollouts=mixed, num_steps=8, seed=3)
    shares = [m["stored_share"] for m in metrics_of(tmp_path)]
    assert set(shares) <= {0, 0.25, 0.5, 0.75, 1}
    assert len(set(shares)) > 1
    assert 0.2 < sum(shares) / len(shares) < 0.8


SCORED = {"selection": {"rule": "soft_or", "keep": 0.5}, "scoring": "recorded"}
"""Live rollouts are then sampled with their hidden states."""


class Kept:
    """A store whose completions are told from live ones by their text."""

    has_logprobs = True

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.rollouts = [replace(r, text="stored", hidden=None) for r in rollouts]

    def take(self, step: int) -> list[Rollout]:
        return self.rollouts


def test_a_live_prompt_among_stored_ones_gets_what_a_live_run_gives_it(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the second of two equal prompts, whose samples follow those of the first one."""
    made = step_of(tiny_config(tiny_models, tmp_path, **SCORED))
    first, second = made.prompts(2)[:2]
    monkeypatch.setattr(Step, "prompts", lambda *_: [first, first, second, first])
    live = made.sample(made.request(2), 2)
    assert all(r.hidden is not None for r in live)
    assert len({r.completion_ids for r in live if r.prompt == first}) == 6
    kept: Any = Kept(live)
    source, places = MixedSource(made, kept, 0.5), (1, 2)
    monkeypatch.setattr(source, "is_live", lambda _: [place in places for place in range(4)])
    found = source.take(2)
    assert source.num_stored == 4
    for place, (ours, alone) in enumerate(zip(found, live, strict=True)):
        if place // 2 in places:
            assert replace(ours, logprobs=(), hidden=None) == replace(
                alone, logprobs=(), hidden=None
            )
            assert ours.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        else:
            assert ours is kept.rollouts[place]
    # of all of a step there are hidden states, or of none
    assert all(r.hidden is None for r in found)


def test_what_is_stored_is_sampled_without_hidden_states(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, asked = Step.sample, []

    def sampled(self: Step, request: RolloutRequest, step: int) -> list[Rollout]:
        asked.append(request.record_hidden)
        return sample(self, request, step)

    made = step_of(tiny_config(tiny_models, tmp_path, **SCORED))
    monkeypatch.setattr(Step, "sample", sampled)
    made.generate(1)
    kept = store.Store(tmp_path / "rollouts", {})
    kept.open()
    Fill(made, kept, lambda: False, str, str)._sample([1])
    assert asked == [True, False]


@pytest.mark.parametrize("objective", [{}, {"kind": "sampled", "old_logprobs": "step"}])
def test_a_file_is_learned_from_as_it_is(
    tiny_models: Path, tmp_path: Path, given: Path, objective: dict[str, Any]
) -> None:
    changes = {"objective": objective} if objective else {}
    run(tiny_models, tmp_path / "run", rollouts=STORED | {"path": str(given)}, **changes)
    lines = (tmp_path / "run/rollouts/step-000001/rollouts.jsonl").read_text().splitlines()
    tokenizer = load_tokenizer(str(tiny_models / "student"))
    end = [tokenizer.eos_token_id]
    ids = [json.loads(line)["completion_ids"] for line in lines]
    expected = [
        tokenizer(text, add_special_tokens=False).input_ids + end for text in ("1+2=3", "4")
    ]
    assert ids == expected * 4
    assert all(m["staleness_steps"] is None for m in metrics_of(tmp_path / "run"))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "rollouts",
    [
        STORED,
        pytest.param({"source": "mixed", "on_policy_share": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_died_while_it_stored_goes_on(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rollouts: dict[str, Any]
) -> None:
    expected = run(tiny_models, tmp_path / "whole", rollouts=rollouts)
    write, sampled = store.Store.write, []

    def dies(self: store.Store, step: int, filled: Callable[[Path], None]) -> None:
        def half(folder: Path) -> None:
            filled(folder)
            if step == 3 and 3 not in sampled:
                sampled.append(3)
                raise Interrupted

        sampled.append(-step)
        write(self, step, half)

    monkeypatch.setattr(store.Store, "write", dies)
    with pytest.raises(Interrupted):
        run(tiny_models, tmp_path / "cut", rollouts=rollouts)
    found = run(tiny_models, tmp_path / "cut", rollouts=rollouts)
    assert sampled == [-1, -2, -3, 3, -3, -4]
    assert are_equal(expected, found)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tiny_models: Path, tmp_path: Path) -> None:
    rollouts = {"source": "mixed", "on_policy_share": 0.5}
    expected = run(tiny_models, tmp_path / "whole", rollouts=rollouts)
    run(tiny_models, tmp_path / "cut", rollouts=rollouts)
    shutil.rmtree(tmp_path / "cut/checkpoint-000004")
    shutil.rmtree(tmp_path / "cut/student")
    assert are_equal(expected, run(tiny_models, tmp_path / "cut", rollouts=rollouts))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")


def refused(models: Path, out: Path, **changes: Any) -> str:
    allow = changes.pop("allow_change", ())
    with pytest.raises((RunError, ConfigError, DataError)) as caught:
        train(tiny_config(models, out, **changes), log=lambda _: None, allow_change=allow)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_store_cannot_give_is_one_line(tiny_models: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(tiny_models, out, rollouts=STORED, num_steps=2)
    again = {"rollouts": STORED, "allow_change": ("num_steps",)}
    found = refused(tiny_models, out, **again)
    assert "the rollouts of step 3 are not in" in found
    assert "trained to step 2" in found
    shutil.rmtree(out / "checkpoint-000002")
    (out / "rollouts/step-000002/rollouts.jsonl").write_text("{}\n")
    shutil.rmtree(out / "student")
    found = refused(tiny_models, out, **again)
    assert "step-000002 cannot be used: rollouts.jsonl was changed or cut short" in found


def test_a_store_of_another_run_is_refused(tiny_models: Path, tmp_path: Path) -> None:
    run(tiny_models, tmp_path, rollouts=STORED, num_steps=1)
    shutil.rmtree(tmp_path / "checkpoint-000001")
    shutil.rmtree(tmp_path / "student")
    found = refused(
        tiny_models, tmp_path, rollouts=STORED, num_steps=1, seed=1, allow_change=("seed",)
    )
    assert "made with another seed than the run's" in found


def test_a_store_that_does_not_fit_is_refused_before_anything_is_sampled(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = refused(tiny_models, tmp_path / "a", rollouts=STORED | {"max_bytes": 1000})
    assert "storing the rollouts needs about" in found  # a token's text has no bound
    assert "more than rollouts.max_bytes = 1,000" in found
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "disk_usage", lambda _: usage)
        patch.setattr("tutelage.train.loop.required_disk", lambda *_: "")
        found = refused(tiny_models, tmp_path / "b", rollouts=STORED)
    assert "the disk of" in found
    assert "1,048,576 left" in found
    assert not list(tmp_path.rglob("step-*"))


def test_a_file_that_lacks_completions_is_refused(
    tiny_models: Path, tmp_path: Path, given: Path
) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(given.read_text().splitlines(keepends=True)[:-1]))
    found = refused(tiny_models, tmp_path / "run", rollouts=STORED | {"path": str(short)})
    assert "fewer completions than sampling.num_samples = 2 of 1 of the run's 16 prompts" in found
    found = refused(tiny_models, tmp_path / "run", rollouts=STORED | {"path": "absent.jsonl"})
    assert "absent.jsonl" in found
    assert "does not exist" in found
    ids = [json.loads(line) for line in given.read_text().splitlines()]
    for line in ids:
        line["completion_ids"] = [10_000]
        del line["completion"]
    short.write_text("".join(f"{json.dumps(line)}\n" for line in ids))
    found = refused(tiny_models, tmp_path / "run", rollouts=STORED | {"path": str(short)})
    assert "a completion must have ids from 0 to" in found
    assert "line 1" in found


def test_texts_that_change_are_counted(tiny_models: Path, tmp_path: Path, given: Path) -> None:
    lines = [json.loads(line) for line in given.read_text().splitlines()]
    lines[0]["completion"] = "4é"
    lines[1]["completion"] = "1" * 30
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    logged: list[str] = []
    rollouts = STORED | {"path": str(path)}
    train(
        tiny_config(tiny_models, tmp_path / "run", rollouts=rollouts, num_steps=1),
        log=logged.append,
    )
    assert any("1 of 8 texts" in line and "do not round-trip" in line for line in logged)
    assert any("1 completions" in line and "max_new_tokens = 10" in line for line in logged)


def test_completions_are_found_by_id_and_given_out_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    records = [
        {"prompt_id": "a", "text": "1", "is_truncated": True},
        {"prompt": "two", "completion_ids": [1, 2]},
        {"prompt_id": "a", "text": "3"},
        {"prompt_id": "a", "completion": "5"},
    ]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    from tutelage.data.types import Prompt

    given = GivenCompletions.read(path, PromptFormat())
    prompts = [Prompt("a", "one"), Prompt("b", "two")]
    with pytest.raises(DataError, match="first 1 of 'b'"):
        given.require(prompts, 2)
    taken = [[g.content for g in found] for _ in range(2) for _, found in given.take(prompts, 2)]
    assert taken == [["1", "3"], [[1, 2], [1, 2]], ["5", "1"], [[1, 2], [1, 2]]]
    assert [g.is_truncated for g in given.by_prompt["id a"]] == [True, False, False]


def test_keys_that_do_not_fit_are_refused() -> None:
    base = {"student": {"model": "a"}, "teacher": {"model": "b"}}

    def message(**changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            parse_config(base | changes)
        return str(caught.value)

    mixed = {"source": "mixed", "on_policy_share": 0.5}
    assert "on_policy_share must be in [0, 1], got 2" in message(
        rollouts=mixed | {"on_policy_share": 2}
    )
    assert "live with data.kind = ledger_tools" in message(
        data={"kind": "ledger_tools"}, rollouts=STORED
    )
    sampled = {"kind": "sampled"}
    assert "rollouts.path must be left out" in message(
        objective=sampled, rollouts=STORED | {"path": "x.jsonl"}
    )
    warm = {"sampling": {"temperature": 0.5}, "rollouts": STORED}
    assert "sampling.temperature must be 1 with rollouts.source = stored" in message(
        objective=sampled, **warm
    )
    recomputed = {"objective": sampled | {"old_logprobs": "step"}}
    parse_config(base | recomputed | {"rollouts": STORED | {"path": "x.jsonl"}})
    parse_config(base | recomputed | warm)
    assert "live or stored with engine.kind = vllm" in message(
        engine={"kind": "vllm"}, rollouts=mixed
    )
    assert "rollouts.source is missing" in message(rollouts={"path": "x"})
