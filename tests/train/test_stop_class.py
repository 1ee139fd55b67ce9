"""`teacher.stop_token = "class"`: which ids, and that a run trains on their sum."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import reference
from tiny import tiny_config
from tiny_runs import are_equal, metrics_of, run, some_batch
from tutelage.config.parse import parse_config
from tutelage.errors import ConfigError, ModelError
from tutelage.models.head import HeadForm
from tutelage.models.stop_class import stop_class
from tutelage.setup import warnings
from tutelage.setup.components import build_components
from tutelage.train.step import Step

SHORT: dict[str, Any] = {"num_steps": 2, "checkpoint_every": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """The teacher ends its texts with three ids, one of which is the student's."""
    folder = tmp_path_factory.mktemp("stops")
    for who in ("student", "teacher"):
        shutil.copytree(tiny_models / who, folder / who)
    path = folder / "teacher" / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], 5, 9, 10_000]}))
    return folder


def ended_by(declared: Any, token: int | None = None) -> Any:
    """A model and a tokenizer that end a text so."""
    config = SimpleNamespace(eos_token_id=declared)
    return SimpleNamespace(generation_config=config), SimpleNamespace(eos_token_id=token)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((7,), (7,), ()),
        ((7,), ([7, 3],), (3, 7)),
        ((7, 4), ([9, 7],), (4, 7, 9)),
        (([2, 7],), (None, 3), (2, 3, 7)),
        ((7,), ([7, 99],), ()),  # beyond the vocabulary
    ],
)
def test_the_class_is_every_id_that_ends_a_text_for_either_side(
    student: Sequence[Any], teacher: Sequence[Any], expected: tuple[int, ...]
) -> None:
    assert stop_class(ended_by(*student), ended_by(*teacher), 20) == expected


@pytest.mark.parametrize("declared", [None, 20, [25, 30]])
def test_a_side_that_never_ends_a_text_is_refused(declared: Any) -> None:
    with pytest.raises(ModelError, match=r"but the teacher has none below 20\. Add eos_token_id"):
        stop_class(ended_by(7), ended_by(declared), 20)
    with pytest.raises(ModelError, match="but the student has none below 20"):
        stop_class(ended_by(declared), ended_by(7), 20)


@pytest.mark.parametrize("method", ["kl", "sampled"])
def test_equal_sets_of_one_id_train_as_today_bit_for_bit(
    tiny_models: Path, tmp_path: Path, method: str
) -> None:
    more = {"objective": {"kind": method}, **SHORT}
    today = run(tiny_models, tmp_path / "map", **more)
    found = run(tiny_models, tmp_path / "class", teacher={"stop_token": "class"}, **more)
    assert are_equal(found, today)
    assert metrics_of(tmp_path / "class") == metrics_of(tmp_path / "map")


def test_rows_are_compared_over_the_class_and_every_other_id(models: Path) -> None:
    table = {"model": str(models / "teacher"), "stop_token": "class"}
    components = build_components(tiny_config(models, Path("unused"), teacher=table))
    batch, student = some_batch(components), components.student
    ids = student.stops
    assert set(ids) == {5, 9, components.tokenizer.eos_token_id}
    batch.tokens[:3] = torch.tensor([5, 9, 8])
    view = components.teacher.to_device(components.teacher.forward(batch))
    found = student(batch, view)
    log_p, log_q = (
        reference.log_softmax(x.block(0, len(x)).double()) for x in (student.logits(batch), view)
    )
    merged = [reference.one_class(x, ids) for x in (log_p, log_q)]
    torch.testing.assert_close(
        found.reverse_kl.double(), reference.reverse_kl(*merged), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(found.log_p[:2].double(), merged[0][:2, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.log_p[2].double(), log_p[2, 8], rtol=1e-5, atol=1e-6)
    own = student(batch, None, has_stops=False).log_p  # as an engine reports them
    rows = torch.arange(batch.num_rows)
    torch.testing.assert_close(own.double(), log_p[rows, batch.tokens], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(own[:2], found.log_p[:2])


METHODS: list[dict[str, Any]] = [
    {"objective": {"kind": "sampled"}, "updates_per_step": 2},
    {"objective": {"kind": "tropd", "k": 5}, "weighting": {"kind": "ida"}},
    {"objective": {"kind": "akl"}, "selection": {"rule": "soft_or"}},
    {"objective": {"kind": "topk", "support": "student"}, "selection": {"rule": "entropy"}},
    {"selection": {"rule": "entropy"}, "diagnostics": "kept"},
    {"objective": {"kind": "eopd", "estimator": "sampled", "fkl": "topk_tail"}},
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_kind_of_method_takes_a_step(models: Path, method: dict[str, Any]) -> None:
    losses = []
    for policy in ("map", "class"):
        table = {"model": str(models / "teacher"), "stop_token": policy}
        config = tiny_config(models, Path("unused"), teacher=table, **method)
        components = build_components(config)
        optimizer = torch.optim.SGD(components.student.parameters(), lr=0.1)
        step = Step(config, components, Accelerator(cpu=True), components.student, optimizer)
        metrics = step.take(1)
        assert metrics["num_nonfinite"] == 0
        assert metrics["grad_norm"] > 0
        losses.append(metrics["loss"])
    assert losses[0] != losses[1]


def test_older_completions_are_refused_where_the_numbers_of_their_single_ids_count() -> None:
    ahead = {"kind": "vllm_server", "urls": ["http://h:1"], "folder": "f", "max_staleness": 1}
    for older in ({"engine": ahead}, {"rollouts": {"source": "stored"}}):
        table: dict[str, Any] = {
            "student": {"model": "s"},
            "teacher": {"model": "t", "stop_token": "class"},
            **older,
        }
        parse_config(table)
        sampled = ({"kind": "sampled"}, {"kind": "tropd"}, {"kind": "eopd", "estimator": "sampled"})
        for objective in sampled:
            with pytest.raises(
                ConfigError, match=r"teacher\.stop_token must be map or refuse with"
            ):
                parse_config(table | {"objective": objective})
        # what is recomputed with the student of the step is of the class on both sides
        parse_config(table | {"objective": {"kind": "sampled", "old_logprobs": "step"}})


@pytest.mark.parametrize(
    ("policy", "device", "cap", "is_told"),
    [
        ("class", "cuda", 30.0, True),
        ("class", "cuda", None, False),
        ("class", "cpu", 30.0, False),
        ("map", "cuda", 30.0, False),
    ],
)
def test_a_soft_cap_on_cuda_is_told_to_miss_the_kernels(
    monkeypatch: pytest.MonkeyPatch, policy: str, device: str, cap: float | None, is_told: bool
) -> None:
    models = {"student": {"model": "s"}, "teacher": {"model": "t", "stop_token": policy}}
    config, model = parse_config(models), SimpleNamespace()
    monkeypatch.setattr(warnings, "head_form", lambda _: HeadForm(1.0, cap))
    told = list(warnings._stop_class_warnings(config, torch.device(device), model))
    assert ["without the fused kernels" in text for text in told] == [True] * is_told
