"""The card of an exported student: recipe, data, seed and what was measured, and it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_config
from tutelage.config.parse import fingerprint, parse_config
from tutelage.models.load import load_model, load_tokenizer
from tutelage.setup.run_folder import environment
from tutelage.train.loop import train
from tutelage.train.model_card import model_card


@pytest.fixture(scope="module")
def run(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("card") / "run"
    config = tiny_config(
        tiny_models, folder, num_steps=2, seed=7, evaluation={"num_problems": 2, "num_samples": 2}
    )
    train(config, log=lambda _: None)
    return config, folder


def test_the_card_says_what_was_done_and_measured(run: tuple[Any, Path]) -> None:
    config, folder = run
    card = (folder / "student" / "README.md").read_text()
    for text in (
        config.teacher.model,
        "2 steps of 4 prompts x 2 completions",
        "Seed 7",
        fingerprint(config),
        "rule all",
        "reverse_weight 1.0",
        "learning_rate 0.002",
    ):
        assert text in card
    rows = [line for line in card.splitlines() if line.startswith(("| student", "| teacher"))]
    log = [json.loads(x) for x in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert len(rows) == len(log) == 3
    for row, record in zip(rows, log, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:2] == [record["model"], str(record["step"])]
        assert cells[2].startswith(f"{100 * record['mean_at_k']:.1f} [")
        kl = record["held_out_reverse_kl_nats"]
        assert cells[4] == ("-" if kl is None else f"{kl:.4f}")


def test_the_configuration_of_the_card_is_the_runs(run: tuple[Any, Path]) -> None:
    config, folder = run
    block = (folder / "student" / "README.md").read_text().split("```json\n")[1].split("```")[0]
    assert parse_config(_without_none(json.loads(block))) == config


@pytest.mark.parametrize("has_several", [False, True])
def test_a_card_names_no_server(has_several: bool) -> None:
    place = "http://host.inside:80"
    teacher = {"kind": "hidden_server", "url": f"{place}00", "model": "a/b"}
    urls = [f"{place}01", f"{place}02"]
    table: dict[str, Any] = {
        "student": {"model": "a/b"},
        "teacher": teacher,
        "engine": {"kind": "vllm_server", "urls": urls, "folder": "/shared"},
    }
    if has_several:
        del table["teacher"]["url"], table["teacher"]["kind"]
        table["teachers"] = {"one": {"kind": "hidden_server", "url": f"{place}00", "model": "c/d"}}
        table["data"] = {"kind": "file", "path": "p.jsonl", "teacher_column": "t"}
    card = model_card(parse_config(table), [], environment())
    assert '"vllm_server"' in card
    assert '"hidden_server"' in card
    assert "inside" not in card


def _without_none(table: Any) -> Any:
    """TOML has no null, so an absent key stands for it."""
    if isinstance(table, dict):
        return {k: _without_none(v) for k, v in table.items() if v is not None}
    return table


def test_the_exported_folder_loads_with_transformers_alone(run: tuple[Any, Path]) -> None:
    student = str(run[1] / "student")
    model, tokenizer = load_model(student), load_tokenizer(student)
    ids = tokenizer("a1+1;>", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_nothing_measured_is_said_and_a_hub_base_is_named() -> None:
    table = {"student": {"model": "Qwen/Qwen3-0.6B"}, "teacher": {"model": "Qwen/Qwen3-8B"}}
    card = model_card(parse_config(table), [], environment())
    assert "Nothing was measured" in card
    assert 'base_model: "Qwen/Qwen3-0.6B"' in card
    assert card.startswith("---\n")
