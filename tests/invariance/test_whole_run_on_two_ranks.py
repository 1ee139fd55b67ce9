"""`tutelage train` in two processes: one folder, one voice, the losses of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patience import HANG_S
from ranks import Ended, run_script_ranks
from tutelage.cli import main

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "command_rank.py"


def arguments(out: Path, **changes: Any) -> list[str]:
    """A small run of the embedded pair."""
    values = {
        "num_steps": 3, "prompts_per_step": 4, "micro_batch_size": 3, "checkpoint_every": 2,
        "selection.rule": "soft_or", "evaluation.num_problems": 2, "evaluation.num_samples": 1,
        "evaluation.teacher": "false", "device": "cpu", "out": out,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in (values | changes).items()]
    return ["train", str(ROOT / "configs/examples/ledger.toml"), *overrides]


def two(*arguments: str) -> list[Ended]:
    """Both ranks of one command."""
    return run_script_ranks(SCRIPT, arguments, 2, limit_s=HANG_S)


def losses(out: Path) -> list[float]:
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    return [step["loss"] for step in steps]


def test_two_processes_write_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path / "one")) == 0
    alone = capsys.readouterr().out
    first, second = two(*arguments(tmp_path / "both"))
    assert (first.code, second.code) == (0, 0), first.said + second.said
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "both" / "student" / "model.safetensors").exists()
    assert "student exported" in first.said
    assert second.said == ""
    # A launcher may start fewer processes than one thinks it does.
    for out, said, count in (("one", alone, 1), ("both", first.said, 2)):
        assert said.startswith(
            "2 processes, 1 host on cpu\n" if count > 1 else "1 process on cpu\n"
        )
        manifest = json.loads((tmp_path / out / "manifest.json").read_text())
        layout = {"num_processes": count, "num_hosts": 1, "sharding": "none"}
        layout["teacher_sharding"] = "none"
        assert layout.items() <= manifest.items()
        assert manifest["layouts"] == [{"first_step": 1, **layout}]


def test_ranks_that_are_refused_leave_their_group_too(tmp_path: Path) -> None:
    ranks = two(*arguments(tmp_path / "run", prompts_per_step=3))
    assert [rank.code for rank in ranks] == [2, 2], [rank.said for rank in ranks]
    for said in (rank.said for rank in ranks):  # each has a log of its own
        assert said.count("\n") == said.count("prompts_per_step must be a multiple of 2") == 1
    assert not (tmp_path / "run").exists()


def test_two_processes_evaluate_together_and_one_says_what_they_found() -> None:
    student = "package:tutelage/assets/ledger-overconfident"
    lengths = ("--num-problems=3", "--num-samples=2", "--max-new-tokens=8")
    first, second = two("eval", student, *lengths, "--device=cpu", "--json")
    assert (first.code, second.code) == (0, 0), first.said + second.said
    assert json.loads(first.said.splitlines()[-1])["num_problems"] == 3
    assert second.said == ""


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_keep_the_best_and_end_early(tmp_path: Path, sharding: str) -> None:
    """The learning rate is so large that the student is soon worse than after its first step."""
    metric = "held_out_reverse_kl_nats"
    changes: dict[str, Any] = {
        "num_steps": 9, "evaluation.every": 1, "keep_best": metric, "keep_checkpoints": 1,
        "stop_when.metric": metric, "stop_when.patience": 2, "optimizer.learning_rate": 0.05,
        "optimizer.warmup_steps": 0, "student.sharding": sharding,
    }  # fmt: skip
    ranks = two(*arguments(tmp_path / "both", **changes))
    assert [rank.code for rank in ranks] == [0, 0], "".join(rank.said for rank in ranks)
    said = ranks[0].said
    manifest = json.loads((tmp_path / "both" / "manifest.json").read_text())
    best, last = manifest["best"]["step"], manifest["stopped_early"]["step"]
    assert last == best + 2 < 9
    assert f"stopped early: no better {metric} than" in said
    assert f"best: {metric}" in said
    found = sorted(path.name for path in (tmp_path / "both").glob("checkpoint-*"))
    assert found == [f"checkpoint-{step:06d}" for step in (best, last)]
    again = two(*arguments(tmp_path / "both", **changes))
    assert [rank.code for rank in again] == [0, 0], "".join(rank.said for rank in again)
    assert "nothing is left to do: no better" in again[0].said
    assert json.loads((tmp_path / "both" / "manifest.json").read_text()) == manifest


@pytest.mark.slow
def test_weights_in_parts_are_one_run_and_leave_the_group(tmp_path: Path) -> None:
    ranks = two(*arguments(tmp_path / "both", **{"student.sharding": "fsdp2"}))
    assert [rank.code for rank in ranks] == [0, 0], [rank.said for rank in ranks]
    assert main(arguments(tmp_path / "one")) == 0
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["fsdp2", "tp"])
def test_a_teacher_in_parts_supervises_as_a_whole_one(teacher: str, tmp_path: Path) -> None:
    """With evaluations and recorded tokens, which are shared out; the group is left."""
    measured = {"evaluation.num_problems": 3, "recording.every": 2}
    assert main(arguments(tmp_path / "one", **measured)) == 0
    parts = {"teacher.sharding": teacher}
    first, second = two(*arguments(tmp_path / "both", **measured, **parts))
    assert (first.code, second.code) == (0, 0), first.said + second.said
    assert second.said == ""
    one, both = tmp_path / "one", tmp_path / "both"
    assert losses(both) == pytest.approx(losses(one), abs=1e-5)
    for log, key in (("evaluation.jsonl", "held_out_reverse_kl_nats"), ("tokens.jsonl", "step")):
        found, expected = (
            [json.loads(line)[key] for line in (out / log).read_text().splitlines()]
            for out in (both, one)
        )
        assert len(found) > 1
        assert found == pytest.approx(expected, abs=1e-5), log
    assert json.loads((both / "manifest.json").read_text())["teacher_sharding"] == teacher


@pytest.mark.slow
def test_two_processes_share_stored_rollouts(tmp_path: Path) -> None:
    mixed = {"rollouts.source": "mixed", "rollouts.on_policy_share": 0.5}
    assert main(arguments(tmp_path / "one", **mixed)) == 0
    first, second = two(*arguments(tmp_path / "both", **mixed))
    assert (first.code, second.code) == (0, 0), first.said + second.said
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    logs = [(tmp_path / out / "metrics.jsonl").read_text() for out in ("one", "both")]
    shares = [[json.loads(line)["stored_share"] for line in log.splitlines()] for log in logs]
    assert shares[0] == shares[1]
    assert 0 < sum(shares[0]) < 3
