"""Rollouts drawn while the step before learns: by which weights, and what a stop leaves."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from patience import HANG_S
from tiny import tiny_config
from tiny_runs import are_equal, metrics_of, weights_of
from tutelage.data.types import Conversation, Outcome, Prompt, Rollout
from tutelage.errors import ModelError
from tutelage.rollout import replicas
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.saved_rollouts import from_line, to_line
from tutelage.train import loop
from tutelage.train.step import Step
from vllm_stub import QUICK, FakeVLLM, engine_of, replicas_of

SAMPLING = {"num_samples": 1, "max_new_tokens": 6}
SAMPLED = {"kind": "sampled"}
MEASURED: dict[str, Any] = {
    "evaluation": {"num_problems": 2, "num_samples": 1, "every": 1, "teacher": False},
    "recording": {"every": 1, "num_prompts": 1, "num_rollouts": 1, "max_new_tokens": 4},
}
"""Evaluations and snapshots between the steps, for which replicas read other weights."""


@pytest.fixture
def servers(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeVLLM]]:
    monkeypatch.setattr(replicas, "Limits", lambda: QUICK)
    with replicas_of(tiny_models, 2) as found:
        yield found


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(servers: list[FakeVLLM], tiny_models: Path) -> Run:
    def run(out: Path, on_step: Any = None, **changes: Any) -> list[dict[str, Any]]:
        """Start a run of four steps, or continue it; the metrics of all."""
        engine = engine_of(servers, out, max_staleness=1, **changes.pop("engine", {}))
        optimizer = {"learning_rate": 1e-2, "schedule": "constant"}
        given = {"log": changes.pop("log", lambda _: None)}
        given |= {"allow_change": changes.pop("allow_change", ())}
        table = {"engine": engine, "optimizer": optimizer, "sampling": SAMPLING} | changes
        loop.train(tiny_config(tiny_models, out, **table), on_step=on_step, **given)
        return metrics_of(out)

    return run


def are_one_run(one: Path, two: Path) -> bool:
    logs = [metrics_of(out) for out in (one, two)]
    same = logs[0] == logs[1] and [m["step"] for m in logs[0]] == [1, 2, 3, 4]
    return same and are_equal(weights_of(one / "student"), weights_of(two / "student"))


class Sequential(Step):
    """Takes the weights of two steps before, samples, and takes the present ones again."""

    def generate(self, step: int) -> list[Rollout]:
        if step == 1:
            self.history: list[dict[str, torch.Tensor]] = []
        model, version = self.components.student.model, max(0, step - 2)
        self.history.append({name: x.clone() for name, x in model.state_dict().items()})
        model.load_state_dict(self.history[version])
        rollouts = self.components.sampler.sample(self.request(step))
        model.load_state_dict(self.history[step - 1])
        return [replace(rollout, weights_version=version) for rollout in rollouts]


def draw_late(patch: pytest.MonkeyPatch) -> None:
    """A draw beside learning samples nothing before somebody waits for it."""
    is_waited_for = threading.Event()
    draw, settle = ReplicaSampler._draw, ReplicaSampler.settle

    def late(self: ReplicaSampler, request: RolloutRequest) -> Any:
        if threading.current_thread() is not threading.main_thread():
            assert is_waited_for.wait(HANG_S)
        return draw(self, request)

    def waited(self: ReplicaSampler) -> list[Rollout]:
        is_waited_for.set()
        try:
            return settle(self)
        finally:
            is_waited_for.clear()

    patch.setattr(ReplicaSampler, "_draw", late)
    patch.setattr(ReplicaSampler, "settle", waited)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"checkpoint_every": 1}, marks=pytest.mark.slow),
        {"objective": SAMPLED, "selection": {"rule": "soft_or"}} | MEASURED,
    ],
    ids=["all", "sampled, measured"],
)
def test_a_run_is_that_of_the_sequential_reference(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        draw_late(patch)
        steps = run(tmp_path / "beside", **changes)
    monkeypatch.setattr(loop, "Step", Sequential)
    run(tmp_path / "in line", **changes)
    assert are_one_run(tmp_path / "beside", tmp_path / "in line")
    assert [step["staleness_steps"] for step in steps] == [0, 1, 1, 1]
    assert "engine_logprob_gap_nats" in steps[0]
    spread = [[step[f"log_ratio_{x}_nats"] for x in ("min", "mean", "max")] for step in steps]
    assert spread[0] == [0, 0, 0]
    assert all(low < mean < high for low, mean, high in spread[1:])


def test_the_clip_compares_with_the_weights_that_sampled(run: Run, tmp_path: Path) -> None:
    """Without it a first update never clips, as its ratios are all 1."""
    objective = SAMPLED | {"clip": 1e-4}
    assert all(step["clip_share"] > 0 for step in run(tmp_path, objective=objective)[1:])


def test_the_next_step_is_sampled_while_one_learns(
    run: Run, servers: list[FakeVLLM], tmp_path: Path
) -> None:
    events: list[str] = []
    gate = threading.Event()

    def sampled(reply: dict[str, Any]) -> None:
        events.append("sampled")
        if len(events) > 4 and not gate.wait(HANG_S):
            events.append("late")

    def learned(metrics: dict[str, Any]) -> None:
        events.append(f"learned {metrics['step']}")
        gate.set()

    for server in servers:
        server.change = sampled
    run(tmp_path, learned, num_steps=2)
    assert events.index("learned 1") > events.index("sampled")
    assert "late" not in events


class Died(Exception):
    """The process ended here."""


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=pytest.mark.slow) for step in (1, 2)] + [3]
)
def test_a_run_that_died_continues_as_the_unbroken_one(run: Run, tmp_path: Path, step: int) -> None:
    def die(metrics: dict[str, Any]) -> None:
        if metrics["step"] == step:
            raise Died

    changes = {"checkpoint_every": 2, "objective": SAMPLED} | MEASURED
    run(tmp_path / "whole", **changes)
    with pytest.raises(Died):
        run(tmp_path / "torn", die, **changes)
    run(tmp_path / "torn", **changes)
    assert are_one_run(tmp_path / "whole", tmp_path / "torn")
    assert "draw_0" not in [thread.name for thread in threading.enumerate()]


def test_a_signal_while_one_learns_gives_the_next_draw_up_and_keeps_its_own(
    run: Run, servers: list[FakeVLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", checkpoint_every=0)
    select = Step.select

    def interrupted(self: Step, micro_batches: Any, rollouts: Any, step: int) -> Any:
        if step == 3:  # step 4 is being sampled, and never will be
            signal.raise_signal(signal.SIGINT)
        return select(self, micro_batches, rollouts, step)

    def block(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 2:
            for server in servers:
                server.num_open = 2

    monkeypatch.setattr(Step, "select", interrupted)
    steps = run(tmp_path / "torn", block, checkpoint_every=0)
    assert [step["step"] for step in steps] == [1, 2]
    assert (tmp_path / "torn" / "checkpoint-000002" / "rollouts.jsonl").exists()
    assert "draw_0" not in [thread.name for thread in threading.enumerate()]
    monkeypatch.undo()
    for server in servers:
        server.num_open = None
    run(tmp_path / "torn", checkpoint_every=0)
    assert are_one_run(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.slow
def test_a_signal_between_steps_waits_for_the_draw_and_keeps_it(run: Run, tmp_path: Path) -> None:
    def ask(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    run(tmp_path / "whole", checkpoint_every=0)
    assert len(run(tmp_path / "torn", ask, checkpoint_every=0)) == 2
    run(tmp_path / "torn", checkpoint_every=0)
    assert are_one_run(tmp_path / "whole", tmp_path / "torn")


def test_a_replica_that_dies_beside_a_step_is_left_out_and_nothing_of_its_draw_is_kept(
    run: Run, servers: list[FakeVLLM], tmp_path: Path
) -> None:
    run(tmp_path / "whole", engine={"min_replicas": 1})
    servers[1].num_left = 5  # of 2 a step: it dies in the draw of the third
    run(tmp_path / "torn", engine={"min_replicas": 1})
    gap = "engine_logprob_gap_nats"
    whole, torn = (metrics_of(tmp_path / name) for name in ("whole", "torn"))
    assert [m.pop(gap, 0) for m in whole[1:] + torn[1:]] == [0] * 6
    assert are_one_run(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.slow
def test_too_few_replicas_beside_a_step_end_the_run_in_one_line(
    run: Run, servers: list[FakeVLLM], tmp_path: Path
) -> None:
    run(tmp_path / "whole", checkpoint_every=1)
    servers[1].num_left = 5
    with pytest.raises(ModelError, match=r"1 of 2 replicas are left, .* run the command") as caught:
        run(tmp_path / "torn", checkpoint_every=1)
    assert "\n" not in str(caught.value)
    assert "draw_0" not in [thread.name for thread in threading.enumerate()]
    servers[1].num_left = None
    run(tmp_path / "torn", checkpoint_every=1)
    assert are_one_run(tmp_path / "whole", tmp_path / "torn")


def test_rollouts_of_a_checkpoint_are_those_that_were_drawn() -> None:
    outcome = Outcome(0.5, False, {"items": 3, "share": 0.25, "stop": "done"})
    talk = Conversation(({"role": "user", "content": "é\u2028"},), 1, 2, 0, outcome)
    mask = (True, False)
    prompt = Prompt("p", "text")
    rollout = Rollout(prompt, 1, (1, 2), (3, 4), True, (-0.1,), "t", "<think>", None, mask, talk)
    rollout = replace(rollout, replica=1, weights_version=7)
    again = from_line(to_line(rollout), prompt)
    assert again == rollout
    assert again is not None
    assert (again.replica, type(json.loads(to_line(rollout))["logprobs"][0])) == (1, float)
    assert from_line(to_line(rollout), Prompt("q", "text")) is None


def test_rollouts_of_other_settings_are_sampled_anew(run: Run, tmp_path: Path) -> None:
    def die(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 3:
            raise Died

    with pytest.raises(Died):
        run(tmp_path, die)
    assert len((tmp_path / "checkpoint-000002" / "rollouts.jsonl").read_text().splitlines()) == 4
    lines: list[str] = []
    more = SAMPLING | {"num_samples": 2}
    steps = run(tmp_path, sampling=more, allow_change=("sampling.num_samples",), log=lines.append)
    assert [step["staleness_steps"] for step in steps] == [0, 1, 0, 1]
    assert sum(line.endswith("they are sampled anew") for line in lines) == 1
    assert not (tmp_path / "checkpoint-000004" / "rollouts.jsonl").exists()  # there is no step 5
