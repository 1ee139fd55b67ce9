"""Several teachers in one run: each supervises the prompts that name it, and no others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from invariance.stepping import distance, ragged_rollouts, take_step
from tiny import save_tiny_model, tiny_config
from tiny_runs import metrics_of, run
from tutelage.commands import plan_card as planned
from tutelage.commands.check import check
from tutelage.config.parse import changed_keys, fingerprint, parse_config, to_table
from tutelage.errors import ConfigError, DataError, MissingExtraError, RunError
from tutelage.memory.cuda import plan_cuda
from tutelage.memory.facts import Facts
from tutelage.memory.further_teachers import with_further
from tutelage.memory.meta_model import shadow, stored_bytes
from tutelage.models.load import load_model
from tutelage.setup.components import build_components
from tutelage.setup.inputs import load_inputs
from tutelage.setup.process_counts import ONE_PROCESS
from tutelage.setup.validate import validate
from tutelage.train import update

NAMES = ("", "code", "law", "code")
CARD = Facts(140 << 30, 100 << 30, (9, 0), True, 200 << 30)


@pytest.fixture(scope="module")
def models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual two, and two more teachers."""
    folder = tmp_path_factory.mktemp("several")
    for who in ("student", "teacher"):
        (folder / who).symlink_to(tiny_models / who)
    for seed, name in enumerate(("code", "law"), start=50):
        save_tiny_model(folder / name, seed)
    lines = [
        {"id": str(i), "prompt": f"{i + 1}+{i + 2}=", "teacher": NAMES[i % 4] or None}
        for i in range(12)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def tables(models: Path, **changes: Any) -> dict[str, Any]:
    data = {"kind": "file", "path": str(models / "prompts.jsonl"), "chat": False,
            "num_held_out": 0, "teacher_column": "teacher"}  # fmt: skip
    teachers = {name: {"model": str(models / name)} for name in ("code", "law")}
    return {"data": data, "teachers": teachers, "evaluation": {"num_problems": 0}} | changes


@pytest.mark.parametrize(
    ("micro_batches", "size", "most"),
    [("padded", 1, 1e-12), ("padded", 3, 1e-6), ("packed", 3, 1e-6)],
)
def test_the_gradient_is_the_sum_of_those_of_single_teachers(
    models: Path, monkeypatch: pytest.MonkeyPatch, micro_batches: str, size: int, most: float
) -> None:
    # Norms compute in float32 whatever the model's dtype: only sequences that are read alone, and
    # divided by the same number, are rounded alike.
    ways = {"micro_batches": micro_batches, "micro_batch_size": size}
    components = build_components(tiny_config(models, Path("unused"), **tables(models)))
    rollouts = ragged_rollouts(components)
    together = take_step(models, rollouts, torch.float64, **tables(models), **ways)
    num_rows = sum(len(r.completion_ids) for r in rollouts)
    monkeypatch.setattr(update, "divisors", lambda *_: [num_rows])
    total: list[torch.Tensor] = []
    counts: dict[str, int] = {}
    for name in ("", "code", "law"):
        own = [r for r in rollouts if r.prompt.teacher == name]
        own = [replace(r, prompt=replace(r.prompt, teacher="")) for r in own]
        counts[name or "teacher"] = sum(len(r.completion_ids) for r in own)
        one = {"teacher": {"model": str(models / (name or "teacher"))}}
        sizes = {"prompts_per_step": len(own) // 2}
        alone = take_step(models, own, torch.float64, **one, **sizes, **ways)
        total = (
            [a + b for a, b in zip(total, alone.gradients, strict=True)]
            if total
            else (alone.gradients)
        )
    assert distance(together.gradients, total) < most
    logged = together.metrics["teachers"]
    assert {name: entry["num_rows"] for name, entry in logged.items()} == counts
    weighed = sum(entry["num_rows"] * entry["reverse_kl_nats"] for entry in logged.values())
    assert weighed / num_rows == pytest.approx(together.metrics["reverse_kl_nats"], rel=1e-12)


@pytest.mark.parametrize("mode", ["resident", "offload", "reload"])
def test_where_teachers_rest_changes_no_number(models: Path, tmp_path: Path, mode: str) -> None:
    found = tables(models, num_steps=2, updates_per_step=2)
    for table in found["teachers"].values():
        table["mode"] = mode
    run(models, tmp_path / "run", **found)
    steps = metrics_of(tmp_path / "run")
    assert set(steps[0]["teachers"]) == {"teacher", "code", "law"}
    run(models, tmp_path / "other", **tables(models, num_steps=2, updates_per_step=2))
    assert steps == metrics_of(tmp_path / "other")


def test_a_teacher_that_no_table_has_is_refused(models: Path, tmp_path: Path) -> None:
    found = tables(models)
    del found["teachers"]["law"]
    with pytest.raises(DataError, match=r"prompt '2' names the teacher 'law', but there are \[tea"):
        load_inputs(tiny_config(models, tmp_path, **found))


def test_a_teacher_without_prompts_is_refused(models: Path, tmp_path: Path) -> None:
    found = tables(models)
    found["teachers"]["art"] = {"model": str(models / "law")}
    with pytest.raises(ConfigError, match="no prompt to train on names the teacher 'art'"):
        load_inputs(tiny_config(models, tmp_path, **found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"kind": "ledger"}}, "data.teacher_column must be a column with teachers"),
        ({"teachers": {}}, "data.teacher_column must be left out with one teacher"),
        ({"evaluation": {"teacher": True}}, "evaluation.teacher must be false with teachers"),
        ({"teacher": {"kind": "self"}}, "teacher.kind must be local or on a server"),
        ({"student": {"sharding": "fsdp2"}}, "student.sharding must be none with teachers"),
    ],
)
def test_what_does_not_go_together(
    models: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    found = tables(models)
    for key, value in change.items():
        if key == "student":
            value = {"model": str(models / "student"), **value}
        found[key] = value if key != "evaluation" else found[key] | value
    with pytest.raises(ConfigError, match=message):
        tiny_config(models, tmp_path, **found)


def test_what_a_further_teacher_s_low_bits_lack_names_it(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutelage.setup.validate.find_spec", lambda name: None)
    one = {"model": str(models / "code"), "quantization": "4bit"}
    further = tables(models)["teachers"] | {"code": one}
    for key, changes in (
        ("teacher", tables(models, teacher=one)),
        ("teachers.code", tables(models, teachers=further)),
    ):
        config = tiny_config(models, tmp_path, **changes)
        with pytest.raises(MissingExtraError, match=rf"{key}\.quantization = '4bit' needs the pa"):
            validate(config, tmp_path)


def test_an_unknown_key_of_a_teacher_names_the_right_one(models: Path, tmp_path: Path) -> None:
    found = tables(models)
    found["teachers"]["code"]["modle"] = "x"
    with pytest.raises(ConfigError, match=r"teachers\.code\.modle"):
        tiny_config(models, tmp_path, **found)
    found = tables(models)
    found["teachers"]["code"]["kind"] = "locale"
    with pytest.raises(ConfigError, match=r"teachers.code.*locale"):
        tiny_config(models, tmp_path, **found)


def test_a_run_does_not_go_on_with_another_teacher_or_other_names(
    models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "code", tmp_path / "code")
    prompts = tmp_path / "prompts.jsonl"
    shutil.copy(models / "prompts.jsonl", prompts)
    found = tables(models, num_steps=1)
    found["teachers"]["code"]["model"] = str(tmp_path / "code")
    found["data"]["path"] = str(prompts)
    run(models, tmp_path / "run", **found)
    shutil.rmtree(tmp_path / "code")
    save_tiny_model(tmp_path / "code", 99)
    with pytest.raises(
        RunError, match=r"the teacher code of teachers\.code\.model = .*/code' chang"
    ):
        run(models, tmp_path / "run", **found)
    shutil.rmtree(tmp_path / "code")
    shutil.copytree(models / "code", tmp_path / "code")
    run(models, tmp_path / "run", **found)
    prompts.write_text(prompts.read_text().replace('"teacher": "law"', '"teacher": "code"', 1))
    with pytest.raises(RunError, match=r"the training prompts of data\.path"):
        run(models, tmp_path / "run", **found)


@pytest.mark.parametrize("mode", ["resident", "reload"])
def test_every_teacher_is_checked(models: Path, tmp_path: Path, mode: str) -> None:
    first = {"model": str(models / "teacher"), "mode": mode}
    config = tiny_config(models, tmp_path, **tables(models, teacher=first))
    lines = list(check(config, "tiny"))
    for who in ("teacher", "teacher code", "teacher law"):
        assert sum(line.startswith(f"{who}: Qwen3ForCausalLM") for line in lines) == 1


def test_a_further_teacher_with_too_few_positions_is_named(models: Path, tmp_path: Path) -> None:
    short = shutil.copytree(models / "law", tmp_path / "law")
    settings = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 12}))
    found = tables(models)
    found["teachers"]["law"]["model"] = str(short)
    lines = list(check(tiny_config(models, tmp_path / "run", **found), "tiny"))
    assert sum("more than the 12 positions of the teacher law" in line for line in lines) == 1


def test_a_plan_of_a_card_counts_every_teacher(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tables(models)
    found["teachers"]["law"]["mode"] = "offload"
    found["data"]["max_prompt_tokens"] = 16
    config = tiny_config(models, tmp_path, **found)
    shapes = {name: shadow(load_model(str(models / name))) for name in ("code", "law")}
    sides = [shadow(load_model(str(models / name))) for name in ("student", "teacher")]
    size = stored_bytes(shapes["code"])
    head = shapes["law"].get_output_embeddings().weight.nbytes
    first = plan_cuda(config, *sides, CARD, 10)  # type: ignore[arg-type]
    plan = with_further(config, first, shapes)
    assert with_further(config, first, {}) == first
    more = {a.name: b.total_bytes - a.total_bytes
            for a, b in zip(first.phases, plan.phases, strict=True)}  # fmt: skip
    # the largest that is not there all the time is read while the others rest
    assert more == {"rollout": size + head, "teacher": 2 * size, "learn": size + head}
    assert plan.host is not None
    assert plan.host.peak.parts["further teachers"] == size
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        planned, "with_further", lambda _, plan, models: seen.update(models) or plan
    )
    assert list(planned.plan_card(config, 80.0, ONE_PROCESS))
    assert {name: stored_bytes(model) for name, model in seen.items()} == {
        "code": size,
        "law": size,
    }


def test_where_a_further_teacher_answers_names_no_run() -> None:
    def table(url: str) -> dict[str, Any]:
        teachers = {"code": {"kind": "hidden_server", "model": "t", "url": url}}
        data = {"kind": "file", "path": "p.jsonl", "teacher_column": "x"}
        return {"student": {"model": "s"}, "teacher": {"model": "t"}, "teachers": teachers,
                "data": data}  # fmt: skip

    configs = [parse_config(table(url)) for url in ("http://a", "http://b")]
    assert len(set(map(fingerprint, configs))) == 1
    assert changed_keys(*map(to_table, configs)) == []
