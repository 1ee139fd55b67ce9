"""Recorded tokens: equal to a plain computation, capped, rewound with a run, and without effect."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny import tiny_config
from tutelage.config.parse import changed_keys, fingerprint, to_table
from tutelage.core import LazyLogits, PartialLogits
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError
from tutelage.models.load import load_model, load_tokenizer
from tutelage.setup.components import build_components
from tutelage.setup.run_folder import RunFolder
from tutelage.train import snapshot, token_scores
from tutelage.train.loop import train

RECORDING = {"every": 2, "num_prompts": 2, "num_rollouts": 2}
Lines = list[dict[str, Any]]


def lines_of(folder: Path) -> Lines:
    return [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def recorded(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "run"
    config = tiny_config(tiny_models, out, recording=RECORDING)
    train(config, log=lambda _: None)
    return out


def test_recording_leaves_every_weight_as_it_is(
    recorded: Path, tiny_models: Path, tmp_path: Path
) -> None:
    train(tiny_config(tiny_models, tmp_path / "plain"), log=lambda _: None)
    assert not (tmp_path / "plain" / "tokens.jsonl").exists()
    with_it, without = (
        load_file(folder / "student" / "model.safetensors")
        for folder in (recorded, tmp_path / "plain")
    )
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_a_snapshot_has_the_panel_and_rollouts_of_the_step(recorded: Path) -> None:
    found = [(line["step"], line["kind"]) for line in lines_of(recorded)]
    later = [(step, kind) for step in (2, 4) for kind in ("held-out",) * 2 + ("training",) * 2]
    assert found == [(0, "held-out")] * 2 + later
    panel = [line["prompt_id"] for line in lines_of(recorded) if line["kind"] == "held-out"]
    assert panel == panel[:2] * 3


def test_numbers_equal_a_plain_computation(recorded: Path, tiny_models: Path) -> None:
    """The last snapshot is of the weights that were exported."""
    tokenizer = load_tokenizer(str(recorded / "student"))
    config = tiny_config(tiny_models, recorded)
    num_ids = build_components(config).student.vocab_size
    sides = [load_model(str(f), "float64") for f in (recorded / "student", tiny_models / "teacher")]
    for line in [line for line in lines_of(recorded) if line["step"] == 4]:
        prompt = tokenizer.encode(line["prompt"])
        ids = torch.tensor([[*prompt, *line["token"]]])
        with torch.no_grad():
            logits = [model(ids).logits[0, len(prompt) - 1 : -1, :num_ids] for model in sides]
        log_p, log_q = (z.log_softmax(-1) for z in logits)
        p, q = log_p.exp(), log_q.exp()
        expected = {
            "entropy": -(p * log_p).sum(-1),
            "teacher_entropy": -(q * log_q).sum(-1),
            "reverse_kl": (p * (log_p - log_q)).sum(-1),
            "forward_kl": (q * (log_q - log_p)).sum(-1),
            "log_p": log_p.gather(1, ids[0, len(prompt) :, None])[:, 0],
            "log_q": log_q.gather(1, ids[0, len(prompt) :, None])[:, 0],
            "gate": (-(q * log_q).sum(-1) >= 0.8).double(),
        }
        for name, values in expected.items():
            assert line[name] == pytest.approx(values.tolist(), rel=2e-3, abs=1e-5), name
        for side, shares in (("student", p), ("teacher", q)):
            top = shares.topk(5)
            assert line[f"{side}_top"] == top.indices.tolist()
            for row, values in zip(line[f"{side}_share"], top.values, strict=True):
                assert row == pytest.approx(values.tolist(), rel=2e-3, abs=1e-6)


def test_ranks_order_the_statistics_and_the_best_are_kept(recorded: Path) -> None:
    for line in lines_of(recorded):
        size = line["num_tokens"]
        budget = max(1, math.floor(0.2 * size))
        for rule, ranks in line["rank"].items():
            assert sorted(ranks) == list(range(1, size + 1)), rule
            assert [i for i, rank in enumerate(ranks) if rank <= budget] == line["kept"][rule]
        for rule, column in (("entropy", "entropy"), ("divergence", "reverse_kl")):
            by_rank = [
                line[column][i] for i in sorted(range(size), key=line["rank"][rule].__getitem__)
            ]
            assert by_rank == sorted(by_rank, reverse=True)


def test_every_named_id_has_its_text(recorded: Path) -> None:
    tokenizer = load_tokenizer(str(recorded / "student"))
    for line in lines_of(recorded):
        named = {*line["token"], *(i for row in line["student_top"] for i in row)}
        named |= {i for row in line["teacher_top"] for i in row}
        assert line["texts"] == {str(i): tokenizer.decode([i]) for i in named}


def test_ids_that_a_teacher_does_not_tell_are_not_shown() -> None:
    """Two tokens of a teacher that tells three ids, one of a teacher that tells all."""
    log_q = torch.arange(40.0).view(2, 20).log_softmax(-1)
    known, tokens = log_q.topk(3), torch.tensor([19, 4])
    some = PartialLogits(known.indices, known.values, tokens, log_q[[0, 1], tokens], 20)
    whole = LazyLogits(torch.eye(1, 4), torch.arange(80.0).view(20, 4))
    tops = zip(token_scores._top(some, 5), token_scores._top(whole, 5), strict=True)
    ids, shares = (torch.cat(both) for both in tops)
    scores: Any = SimpleNamespace(top=token_scores.Top(ids[-1:].expand(3, 5), shares, ids, shares))
    components: Any = SimpleNamespace(tokenizer=SimpleNamespace(decode=str))
    rollout = Rollout(Prompt("a", ""), 0, (1,), (19, 4, 19))
    found = snapshot._candidates(components, scores, rollout, slice(0, 3), {})
    assert found["teacher_top"] == [[19, 18, 17], [19, 18, 17], [19, 18, 17, 16, 15]]
    assert [len(row) for row in found["teacher_share"]] == [3, 3, 5]
    expected = known.values.exp().flatten().tolist()
    shown = found["teacher_share"][0] + found["teacher_share"][1]
    assert shown == pytest.approx(expected, rel=1e-3)
    assert set(found["texts"]) == {"4", "15", "16", "17", "18", "19"}


def test_long_completions_are_cut_but_ranked_whole(tiny_models: Path, tmp_path: Path) -> None:
    changes = {"recording": RECORDING | {"max_new_tokens": 3}, "num_steps": 2}
    train(tiny_config(tiny_models, tmp_path / "run", **changes), log=lambda _: None)
    for line in lines_of(tmp_path / "run"):
        shown = min(3, line["num_tokens"])
        columns = [line[n] for n in ("token", "entropy", "student_top", "teacher_share", "gate")]
        assert {len(column) for column in columns} == {shown}
        assert all(i < shown for kept in line["kept"].values() for i in kept)
    long = [line for line in lines_of(tmp_path / "run") if line["num_tokens"] > 3]
    assert any(max(ranks) > 3 for line in long for ranks in line["rank"].values())


def test_the_size_limit_holds_and_is_said(tiny_models: Path, tmp_path: Path) -> None:
    said: list[str] = []
    limit = 9_000
    changes = {"recording": RECORDING | {"max_bytes": limit}}
    train(tiny_config(tiny_models, tmp_path / "run", **changes), log=said.append)
    assert (tmp_path / "run" / "tokens.jsonl").stat().st_size <= limit
    assert any("recording.max_bytes is 9,000" in line for line in said)


def test_a_continued_run_records_each_step_once(recorded: Path, tiny_models: Path) -> None:
    before = (recorded / "tokens.jsonl").read_text()
    folder = RunFolder(recorded)
    folder.rewind(2)
    assert {line["step"] for line in lines_of(recorded)} == {0, 2}
    (recorded / "tokens.jsonl").write_text(before)


def test_recording_names_no_run_and_may_change(tiny_models: Path, tmp_path: Path) -> None:
    plain = tiny_config(tiny_models, tmp_path / "a")
    other = tiny_config(tiny_models, tmp_path / "a", recording=RECORDING)
    assert fingerprint(plain) == fingerprint(other)
    assert changed_keys(to_table(plain), to_table(other)) == []


@pytest.mark.parametrize("key", ["every", "num_prompts", "max_new_tokens", "max_bytes"])
def test_impossible_recordings_are_refused(tiny_models: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"recording.{key} must be at least"):
        tiny_config(tiny_models, tmp_path, recording={key: -1})
