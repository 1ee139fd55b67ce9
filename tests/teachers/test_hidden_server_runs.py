"""Runs with a teacher on a server: stopped, in processes, checked, from the command line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_stub
from patience import HANG_S
from ranks import run_ranks
from tiny import MEASURED, tiny_config, tiny_table
from tutelage.commands.check import check
from tutelage.commands.plan_card import plan_card
from tutelage.config.parse import fingerprint, parse_config
from tutelage.config.schema import Config
from tutelage.errors import ModelError, RunError, TutelageError
from tutelage.models.head_model import head_shape_model, load_head_model
from tutelage.models.load import load_model, load_model_config
from tutelage.models.reference import resolve_model
from tutelage.rollout.http_client import Client, Limits
from tutelage.setup.process_counts import ONE_PROCESS
from tutelage.teachers.server import IDENTITY, ServedModel, serving
from tutelage.train.loop import train

MAIN = [sys.executable, "-m", "tutelage"]


def served_config(models: Path, out: Path, url: str, **changes: Any) -> Config:
    teacher = {"kind": "hidden_server", "model": str(models / "teacher"), "url": url}
    return tiny_config(models, out, teacher=teacher, **changes)


def metrics_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


class Failing(ServedModel):
    """A server that answers so often, and then with the reply to an earlier request."""

    num_left = 1 << 30
    last = b""

    def reply(self, content: bytes) -> bytes:
        self.num_left -= 1
        if self.num_left >= 0:
            self.last = super().reply(content)
        return self.last


@pytest.mark.slow
def test_a_run_whose_server_fails_goes_on_with_another(tiny_models: Path, tmp_path: Path) -> None:
    short: dict[str, Any] = {"num_steps": 3, "checkpoint_every": 1}
    train(tiny_config(tiny_models, tmp_path / "local", **short), log=lambda _: None)
    teacher = str(tiny_models / "teacher")
    failing = Failing(load_model(teacher), "a teacher")
    failing.num_left = 5  # three micro-batches a step, the first asked for twice
    with serving(failing) as url:
        config = served_config(tiny_models, tmp_path / "served", url, **short)
        with pytest.raises(ModelError, match="gave a reply to another request"):
            train(config, log=lambda _: None)
    assert len(metrics_of(tmp_path / "served")) == 1
    with serving(ServedModel(load_model(teacher), "a teacher")) as other:
        again = served_config(tiny_models, tmp_path / "served", other, **short)
        assert fingerprint(again) == fingerprint(config)
        train(again, log=lambda _: None)
    assert metrics_of(tmp_path / "served") == metrics_of(tmp_path / "local")


def test_a_run_does_not_go_on_with_other_weights_behind_the_same_head(
    tiny_models: Path, tmp_path: Path
) -> None:
    model = load_model(str(tiny_models / "teacher"))
    with serving(ServedModel(model, "a teacher")) as url:
        train(served_config(tiny_models, tmp_path, url, num_steps=1), log=lambda _: None)
    with torch.no_grad():
        next(w for name, w in model.named_parameters() if "o_proj" in name).mul_(1.5)
    with serving(ServedModel(model, "a teacher")) as url:
        config = served_config(tiny_models, tmp_path, url, num_steps=1)
        with pytest.raises(RunError, match="weights of the teacher on its server changed since"):
            train(config, log=lambda _: None)
        train(config, log=lambda _: None, allow_change=("teacher.model",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "h:1"}, r"teacher\.url is malformed, got 'h:1'. Write it as http://host:8000\.$"),
        ({"logprob_url": "h:1"}, r"teacher\.logprob_url is malformed"),
        ({"logprob_url": "http://127.0.0.1:9"}, "the server http://127.0.0.1:9 gave no usable"),
    ],
)
def test_addresses_are_tried_before_anything_is_sampled(
    tiny_models: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tiny_models / "teacher"
    with vllm_stub.serving(load_model(str(folder)), frozenset(), 40) as server:
        teacher = {"kind": "hidden_server", "model": str(folder), "url": server.url,
                   "served_name": "student", "server": "vllm", "timeout_s": 1.0}  # fmt: skip
        config = tiny_config(tiny_models, tmp_path, teacher=teacher | change)
        with pytest.raises(TutelageError, match=message):
            list(check(config, "tiny"))


PROGRAM = """
import json, sys
from tutelage.config.parse import parse_config
from tutelage.train.loop import train
train(parse_config(json.loads(sys.argv[1])), log=print)
"""


@pytest.mark.slow
def test_every_process_asks_for_its_own_rows(tiny_models: Path, tmp_path: Path) -> None:
    served = ServedModel(load_model(str(tiny_models / "teacher")), "a teacher")
    with serving(served) as url:
        for name, teacher in (("a", {}), ("b", {"kind": "hidden_server", "url": url})):
            both = {"model": str(tiny_models / "teacher")} | teacher
            table = tiny_table(tiny_models, tmp_path / name, teacher=both, num_steps=2)
            ended = run_ranks([sys.executable, "-c", PROGRAM, json.dumps(table)], 2)
            assert [one.code for one in ended] == [0, 0], ended
    assert "token ids are sent to" in ended[0].said + ended[1].said
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_a_signal(tiny_models: Path, number: signal.Signals) -> None:
    command = [*MAIN, "serve-teacher", str(tiny_models / "teacher"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("loading ")
        said = process.stdout.readline()
        found = re.search(
            r"on (http://127.0.0.1:\d+): float32, head of .* weights [0-9a-f]{16}", said
        )
        assert found, said
        assert Client(found[1], Limits(HANG_S)).ask(IDENTITY, None, bytes)
        process.send_signal(number)
        assert process.stdout.read() == "ended\n"
        assert process.wait(HANG_S) == 0


def test_check_compares_models_and_tells_what_leaves(tiny_models: Path, tmp_path: Path) -> None:
    served = ServedModel(load_model(str(tiny_models / "teacher")), "a teacher")
    with serving(served) as url:
        config = served_config(tiny_models, tmp_path / "out", url)
        lines = "\n".join(check(config, "tiny"))
    assert "the teacher's head: Qwen3ForCausalLM" in lines
    assert f"teacher: a teacher on {url}, weights {served.weights[:16]}" in lines
    assert f"their token ids are sent to {url}" in lines
    assert "warning" not in lines


def test_a_plan_of_cards_has_the_head_alone(tiny_models: Path, tmp_path: Path) -> None:
    config = load_model_config(resolve_model(str(tiny_models / "teacher")))
    head = load_head_model(str(tiny_models / "teacher"), "bfloat16")
    planned = head_shape_model(config, torch.bfloat16)
    sizes = [
        {name: (w.shape, w.dtype) for name, w in m.named_parameters()} for m in (head, planned)
    ]
    assert sizes[0] == sizes[1]
    served = served_config(tiny_models, tmp_path / "out", "http://127.0.0.1:9")
    lines = list(plan_card(served, 80.0, ONE_PROCESS))
    assert any("teacher" in line for line in lines)


def test_ids_that_end_a_text_are_those_of_the_model(tiny_models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models / "teacher", tmp_path / "teacher")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    head, whole = load_head_model(str(folder), "float32"), load_model(str(folder))
    assert head.generation_config.eos_token_id == whole.generation_config.eos_token_id == [2, 7]


def test_the_address_names_no_run() -> None:
    def named(url: str) -> str:
        table = {"kind": "hidden_server", "model": "t", "url": url}
        return fingerprint(parse_config({"student": {"model": "s"}, "teacher": table}))

    assert named("http://a") == named("http://b")
