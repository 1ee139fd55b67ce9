"""Engines that hold weights of their own: they draw the student's completions, or the run stops."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tiny import tiny_config
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Rollout
from tutelage.errors import ConfigError, MissingExtraError, RunError
from tutelage.evaluation.measure import held_out_reverse_kl, measure
from tutelage.models.load import load_model
from tutelage.models.lora import add_lora, full_weights, merge
from tutelage.models.reference import ResolvedModel
from tutelage.rollout.cuda import generate as cuda
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup import components as setup
from tutelage.setup import validate
from tutelage.setup.teacher import _versions
from tutelage.train.loop import train
from tutelage.train.score_request import rollouts_of
from tutelage.train.step import Step
from tutelage.train.token_scores import ScoreRequest, score


class OwnWeights:
    """An engine with a copy of the student, which it refreshes `num_syncs` times."""

    has_own_weights = True

    def __init__(self, sampler: TransformersSampler, num_syncs: int) -> None:
        self.student = sampler.model
        self.copy = replace(sampler, model=copy.deepcopy(sampler.model))
        self.num_syncs = num_syncs
        self.is_closed = False
        self.asked: list[tuple[list[str], SamplingConfig]] = []

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        self.asked.append(([prompt.id for prompt in request.prompts], request.sampling))
        if self.num_syncs:
            self.num_syncs -= 1
            self.copy.model.load_state_dict(self.student.state_dict())
        return self.copy.sample(replace(request, record_hidden=False, progress=None))

    def close(self) -> None:
        self.is_closed = True


def run(
    models: Path, out: Path, monkeypatch: pytest.MonkeyPatch, num_syncs: int | None, **changes: Any
) -> list[dict[str, Any]]:
    """Metrics of a tiny run; with `num_syncs` its engine has weights of its own."""

    def make_sampler(config: Any, student: Any, tokenizer: Any, service: Any) -> Any:
        sampler = TransformersSampler(student, tokenizer, 8)
        return sampler if num_syncs is None else OwnWeights(sampler, num_syncs)

    monkeypatch.setattr(setup, "make_sampler", make_sampler)
    steps: list[dict[str, Any]] = []
    train(tiny_config(models, out, **changes), log=lambda _: None, on_step=steps.append)
    return steps


def test_an_engine_that_keeps_up_trains_the_same_student(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(tiny_models, tmp_path / "plain", monkeypatch, None)
    engine = run(tiny_models, tmp_path / "engine", monkeypatch, 99)
    assert [step["loss"] for step in engine] == [step["loss"] for step in plain]
    assert all(step["engine_logprob_gap_nats"] < 1e-6 for step in engine)
    assert not any("engine_logprob_gap_nats" in step for step in plain)


def test_evaluations_snapshots_and_scores_are_drawn_by_the_engine(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[OwnWeights] = []

    def make_sampler(config: Any, student: Any, tokenizer: Any, service: Any) -> Any:
        engines.append(OwnWeights(TransformersSampler(student, tokenizer, 8), 99))
        return engines[-1]

    monkeypatch.setattr(setup, "make_sampler", make_sampler)
    evaluation = {"num_problems": 3, "num_samples": 2, "temperature": 0.5, "teacher": False}
    recording = {"every": 1, "num_prompts": 1}
    config = tiny_config(
        tiny_models, tmp_path / "run", evaluation=evaluation, recording=recording, num_steps=1
    )
    train(config, log=lambda _: None)
    own = SamplingConfig(0.5, 1.0, 0, config.sampling.max_new_tokens, 2)
    panel = replace(config.sampling, num_samples=1)
    kinds = [(len(ids), sampling) for ids, sampling in engines[0].asked]
    step = (config.prompts_per_step, config.sampling)
    assert kinds == [(3, own), (1, panel), step, (1, panel), (3, own)]
    score(config, ScoreRequest(num_prompts=2))
    assert [len(ids) for ids, _ in engines[1].asked] == [2]
    assert engines[1].is_closed


def test_weights_that_are_not_replaced_stop_the_run(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = {"learning_rate": 1e-2, "schedule": "constant"}
    with pytest.raises(RunError, match="step 2 are not the student's") as caught:
        run(tiny_models, tmp_path / "run", monkeypatch, 1, optimizer=optimizer)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "student").exists()


def test_the_tolerance_can_be_set(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "_require_packages", lambda _: None)
    engine = {"kind": "vllm", "max_logprob_gap": 10.0}
    steps = run(tiny_models, tmp_path / "run", monkeypatch, 1, engine=engine)
    assert steps[-1]["engine_logprob_gap_nats"] > 1e-4


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_vllm_that_is_missing_is_one_line(tiny_models: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match="pip install 'vllm'"):
        train(tiny_config(tiny_models, tmp_path, engine={"kind": "vllm"}), log=lambda _: None)


@pytest.mark.parametrize(
    ("engine", "sampling", "message"),
    [
        ({"kind": "vlm"}, {}, "engine"),
        ({"kind": "vllm"}, {"temperature": 0.7}, "sampling.temperature must be 1"),
        ({"kind": "vllm", "gpu_memory_utilization": 1.5}, {}, "engine.gpu_memory_utilization"),
        ({"kind": "vllm", "max_model_len": -1}, {}, "engine.max_model_len"),
        ({"kind": "vllm", "max_logprob_gap": 0.0}, {}, "engine.max_logprob_gap"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    engine: dict[str, Any],
    sampling: dict[str, Any],
    message: str,
    tiny_models: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_models, tmp_path, engine=engine, sampling=sampling)


def test_the_teacher_gives_back_what_its_evaluation_drew_with(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        tiny_models,
        tmp_path / "run",
        evaluation={"num_problems": 1, "num_samples": 1, "teacher": True},
    )
    components = setup.build_components(config)
    forgotten: list[Any] = []
    monkeypatch.setattr("tutelage.rollout.sampler.forget", forgotten.append)
    measure(config, components, 0)
    assert [model is components.teacher.model for model in forgotten] == [True]


def test_an_adapter_that_changed_under_a_run_is_not_read_again(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
        (folder / "weights").write_text("before")
    found = ResolvedModel("adapter", str(base), adapter=str(adapter))
    before = _versions(found)
    assert len(before) == 2
    (adapter / "weights").write_text("after it")
    assert _versions(found) != before
    on_hub = ResolvedModel("adapter", "hub/base", is_local=False, adapter=str(adapter))
    assert list(_versions(on_hub)) == [adapter / "weights"]


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_full_weights_of_an_adapter_are_those_of_the_merged_model(tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "student"), "float32")
    names = [name for name, _ in full_weights(model)]
    assert names == [name for name, _ in model.named_parameters()]
    add_lora(model, rank=2, alpha=4.0)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(len(name)))
    found = {name: weight.clone() for name, weight in full_weights(model)}
    expected = dict(merge(model).named_parameters())
    assert set(found) == set(expected) == set(names)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.detach(), rtol=1e-6, atol=1e-6)


def test_a_draw_keeps_its_slots_and_no_phase_behind_it_finds_them(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"num_problems": 1, "num_samples": 1, "teacher": False}
    config = tiny_config(tiny_models, tmp_path / "run", evaluation=evaluation)
    components = setup.build_components(config)
    sample, slots = TransformersSampler.sample, cuda._SLOTS

    def opening(sampler: TransformersSampler, request: RolloutRequest) -> list[Rollout]:
        slots[sampler.model] = object()  # type: ignore[assignment]
        return sample(sampler, request)

    monkeypatch.setattr(TransformersSampler, "sample", opening)
    optimizer = torch.optim.SGD(components.student.parameters(), lr=0.0)
    step = Step(config, components, Accelerator(cpu=True), components.student, optimizer)
    with components.whole():
        components.sampler.sample(step.request(1))
        assert components.student.model in slots  # for the turns of a draw
    assert not slots
    step.generate(1)
    assert not slots

    found: list[bool] = []
    nats = held_out_reverse_kl

    def reading(*arguments: Any) -> Any:
        found.append(bool(slots))
        return nats(*arguments)

    monkeypatch.setattr("tutelage.evaluation.measure.held_out_reverse_kl", reading)
    measure(config, components, 1)
    assert found == [False]
    rollouts_of(config, components, ScoreRequest(num_prompts=1))
    assert not slots
