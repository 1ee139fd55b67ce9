"""A teacher on a server of hidden states: the same run, and which replies are believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patience import HANG_S
from reliability import hidden_server
from tiny import MEASURED, save_tiny_model, tiny_config
from tutelage.config.parse import load_config
from tutelage.config.schema import Config
from tutelage.data.batch import Batch, collate, pack
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError, ModelError, TutelageError
from tutelage.models.head import head_form, output_embeddings
from tutelage.models.head_model import load_head_model
from tutelage.models.load import load_model
from tutelage.models.teacher import Teacher
from tutelage.rollout.http_client import KEY_VARIABLE, Client, Limits
from tutelage.setup.components import build_components
from tutelage.teachers.hidden import ServedTeacher, cut
from tutelage.teachers.identity import identity_of
from tutelage.teachers.messages import MalformedError, packed_request, read_request
from tutelage.teachers.server import HIDDEN, IDENTITY, ServedModel, TeacherServer, serving
from tutelage.teachers.tutelage_source import TutelageSource
from tutelage.train.loop import train

ROLLOUTS = [
    Rollout(Prompt("a", ""), 0, (5, 6, 7), (8, 9, 2)),
    Rollout(Prompt("b", ""), 0, (5,), (6, 1, 1, 4)),
    Rollout(Prompt("c", ""), 0, (4, 4), (3,)),
]
LEDGER = "package:tutelage/assets/ledger-teacher"
QUICK = Limits(deadline_s=HANG_S, num_tries=2, first_delay_s=0.0)


@pytest.fixture
def served(tiny_models: Path) -> ServedModel:
    return ServedModel(load_model(str(tiny_models / "teacher")), "a teacher")


@pytest.fixture
def url(served: ServedModel) -> Iterator[str]:
    with serving(served) as address:
        yield address


def teacher_table(url: object, **changes: Any) -> dict[str, Any]:
    return {"kind": "hidden_server", "url": url} | changes


def served_config(models: Path, out: Path, url: object, **changes: Any) -> Config:
    teacher = {"model": str(models / "teacher")} | teacher_table(url) | changes.pop("teacher", {})
    return tiny_config(models, out, teacher=teacher, **changes)


def metrics_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def weights_of(out: Path) -> dict[str, Tensor]:
    return load_file(out / "student" / "model.safetensors")


# --- the same run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", pytest.param("packed", marks=pytest.mark.slow)])
def test_a_run_is_the_local_one_bit_for_bit(
    tiny_models: Path, tmp_path: Path, url: str, layout: str
) -> None:
    short = {"num_steps": 2, "micro_batches": layout, "checkpoint_every": 0}
    short |= {"selection": {"rule": "soft_or", "keep": 0.5}, "evaluation": {"num_problems": 2}}
    lines: list[str] = []
    evaluated = short["evaluation"] | {"teacher": False}
    train(tiny_config(tiny_models, tmp_path / "a", **short | {"evaluation": evaluated}))
    train(served_config(tiny_models, tmp_path / "b", url, **short), log=lines.append)
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    ours, theirs = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    kept = [
        json.loads((tmp_path / x / "evaluation.jsonl").read_text().split("\n")[0]) for x in "ab"
    ]
    assert kept[0] == kept[1]
    told = "\n".join(lines)
    assert f"their token ids are sent to {url}" in told
    assert "the teacher is not evaluated" in told


@pytest.mark.slow
def test_the_ledger_teacher_served_is_the_local_one_bit_for_bit(tmp_path: Path) -> None:
    options = ["num_steps=4", "evaluation.num_problems=0", "device=cpu", "num_threads=1"]
    path = Path(__file__).parents[2] / "configs" / "examples" / "ledger.toml"
    train(load_config(path, [*options, f"out={tmp_path / 'a'}"]))
    with serving(ServedModel(load_model(LEDGER), LEDGER)) as url:
        options += ["teacher.kind=hidden_server", f"teacher.url={url}"]
        train(load_config(path, [*options, f"out={tmp_path / 'b'}"]))
        train(load_config(path, [*options, f"out={tmp_path / 'c'}", "teacher.payload=bfloat16"]))
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    first, last = metrics_of(tmp_path / "a"), metrics_of(tmp_path / "c")
    assert 0 < last[0]["teacher_payload_gap"] < 4e-3
    assert last[1]["teacher_payload_gap"] is None  # sampled
    assert last[0]["reverse_kl_nats"] == pytest.approx(first[0]["reverse_kl_nats"], abs=1e-4)


def batches() -> list[Batch]:
    return [collate(ROLLOUTS, 0), pack(ROLLOUTS), collate(ROLLOUTS[:1], 0)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_on_several_servers_are_the_rows_of_the_whole(
    tiny_models: Path, served: ServedModel, url: str, count: int
) -> None:
    local = Teacher(load_model(str(tiny_models / "teacher")), 20)
    head = load_head_model(str(tiny_models / "teacher"), "float32")
    with serving(served) as other:
        source = TutelageSource([url, other], identity_of(head), count, HANG_S)
        source.connect()
        teacher = ServedTeacher(head, source, 20)
        for batch in batches():
            with local.on_device(), teacher.on_device():
                here = local.forward(batches()[0] if batch.packed else batch)
                there = teacher.to_device(teacher.forward(batch))
            assert len(cut(batch, 2 * count)) == min(2 * count, batch.num_sequences)
            torch.testing.assert_close(there.block(0, len(there)), here.block(0, len(here)))


def test_hidden_states_in_bfloat16_are_compared_and_logged(
    tiny_models: Path, tmp_path: Path, url: str
) -> None:
    lossy = {"payload": "bfloat16"}
    short: dict[str, Any] = {"num_steps": 2, "checkpoint_every": 0}
    train(served_config(tiny_models, tmp_path / "a", url, teacher=lossy, **short))
    first, second = metrics_of(tmp_path / "a")
    assert 0 < first["teacher_payload_gap"] < 4e-3
    assert second["teacher_payload_gap"] is None
    exact = lossy | {"dtype": "bfloat16"}  # of which the payload rounds nothing
    served = ServedModel(load_model(str(tiny_models / "teacher"), "bfloat16"), "a teacher")
    with serving(served) as address:
        train(served_config(tiny_models, tmp_path / "b", address, teacher=exact, **short))
    assert metrics_of(tmp_path / "b")[0]["teacher_payload_gap"] == 0


# --- the head alone -------------------------------------------------------------------------------


def test_only_the_head_is_read(tiny_models: Path, tmp_path: Path) -> None:
    whole = load_model(str(tiny_models / "teacher"))
    folder = shutil.copytree(tiny_models / "teacher", tmp_path / "head")
    tensors = load_file(folder / "model.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, folder / "model.safetensors")
    head = load_head_model(str(folder), "float32")
    assert torch.equal(output_embeddings(head).weight, output_embeddings(whole).weight)
    assert head_form(head) == head_form(whole)
    assert identity_of(head) == identity_of(whole)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"has no head in its files"):
        load_head_model(str(folder), "float32")


def test_a_tied_head_is_the_embedding_table(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tied", 3, is_tied=True)
    whole, head = load_model(str(folder)), load_head_model(str(folder), "float32")
    assert torch.equal(output_embeddings(head).weight, output_embeddings(whole).weight)
    assert identity_of(head) == identity_of(whole)
    other = load_model(str(save_tiny_model(tmp_path / "other", 4, is_tied=True)))
    assert identity_of(other) != identity_of(whole)


def test_adapters_and_gguf_files_have_no_head_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a GGUF file, but the head of a served model"):
        load_head_model(str(file), "float32")


# --- at the start ---------------------------------------------------------------------------------


def test_another_model_is_refused_at_the_start(tiny_models: Path, tmp_path: Path) -> None:
    def refusal(model: Path, **teacher: Any) -> str:
        served = ServedModel(load_model(str(model)), "other")
        with serving(served) as url, pytest.raises(ModelError) as found:
            build_components(served_config(tiny_models, tmp_path / "out", url, teacher=teacher))
        assert "\n" not in str(found.value)
        return str(found.value)

    other = save_tiny_model(tmp_path / "other", 99)
    assert "SHA-256 of its head" in refusal(other)
    wide = save_tiny_model(tmp_path / "wide", 2, hidden_size=64)
    assert "columns of its head is 64 there and 32 here" in refusal(wide)
    half = refusal(tiny_models / "teacher", dtype="bfloat16")
    assert "teacher.dtype is float32 there and bfloat16 here" in half


def test_servers_with_different_bodies_are_refused(
    tiny_models: Path, tmp_path: Path, url: str
) -> None:
    folder = shutil.copytree(tiny_models / "teacher", tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with serving(ServedModel(load_model(str(folder)), "other")) as other:
        config = served_config(tiny_models, tmp_path / "out", [url, other])
        with pytest.raises(ModelError, match="have different weights"):
            build_components(config)


def test_a_server_that_is_down_is_one_line(served: ServedModel) -> None:
    with serving(served) as url:
        pass
    source = TutelageSource([url], served.identity, 1, HANG_S)
    source.clients[0].limits = QUICK
    with pytest.raises(ModelError, match=rf"the server {url} gave no usable reply in 2 tries"):
        source.connect()
    with pytest.raises(ModelError, match="no usable reply in 2 tries"):
        source.hidden(collate(ROLLOUTS, 0), "float32")


def test_a_key_is_asked_for_and_stands_nowhere(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(served, key="right-4f1d") as url:
        for key in ("wrong-9a2c", None):
            monkeypatch.delenv(KEY_VARIABLE, raising=False)
            if key is not None:
                monkeypatch.setenv(KEY_VARIABLE, key)
            source = TutelageSource([url], served.identity, 1, HANG_S)
            with pytest.raises(
                ModelError, match=f"server {url} refuses the key.*{KEY_VARIABLE}"
            ) as found:
                source.connect()
            assert str(key) not in str(found.value)
        monkeypatch.setenv(KEY_VARIABLE, "right-4f1d")
        lines = TutelageSource([url], served.identity, 1, HANG_S).connect()
        assert "right-4f1d" not in "".join(lines)


# --- replies and requests -------------------------------------------------------------------------


def test_no_malformed_content_of_a_reply_is_taken(tmp_path: Path) -> None:
    kinds = tuple(hidden_server.CONTENTS)
    record = hidden_server.attack(len(kinds), tmp_path, kinds)
    assert len(kinds) >= 40
    assert set(record.asked) == set(kinds)
    assert not record.accepted.total(), record.accepted
    assert not record.ugly.total(), record.ugly
    assert record.num_good_taken == record.num_good >= len(kinds) // 4  # the control


@pytest.mark.slow
def test_no_malformed_reply_of_500_is_taken_or_hangs(tmp_path: Path) -> None:
    record = hidden_server.attack(500, tmp_path)
    assert record.asked.total() == 500
    assert len(record.asked) == len(hidden_server.KINDS) >= 60
    assert not record.accepted.total(), record.accepted
    assert not record.hanging.total(), record.hanging
    assert not record.ugly.total(), record.ugly
    assert record.num_good_taken == record.num_good


def test_another_answer_to_the_same_ids_ends_the_run(
    tiny_models: Path, served: ServedModel, url: str
) -> None:
    head = load_head_model(str(tiny_models / "teacher"), "float32")
    source = TutelageSource([url], served.identity, 1, HANG_S)
    source.connect()
    teacher = ServedTeacher(head, source, 20)
    teacher.forward(collate(ROLLOUTS, 0))  # which asks twice, and finds them equal
    teacher = ServedTeacher(head, source, 20)
    hidden, count = source.hidden, 0

    def drifting(batch: Batch, payload: Any) -> Tensor:
        nonlocal count
        count += 1
        return hidden(batch, payload) * (1 + 0.1 * count)

    source.hidden = drifting  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="the same token ids with other hidden states"):
        teacher.forward(collate(ROLLOUTS, 0))


BAD_REQUESTS = {
    "empty": lambda good: b"",
    "cut off": lambda good: good[:-1],
    "text": lambda good: b"hello",
    "of another version": lambda good: good.replace(b'"version":"1"', b'"version":"9"'),
    "with another payload": lambda good: good.replace(b'"float32"', b'"float99"'),
    "with another layout": lambda good: good.replace(b'"padded"', b'"woven!"'),
    "for another model": lambda good: good.replace(b'"head":"', b'"head":"0')[:-1],
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_server_refuses_what_is_no_request(name: str, served: ServedModel, url: str) -> None:
    good = packed_request(collate(ROLLOUTS, 0), "n", "float32", served.identity.head)
    client = Client(url, QUICK)
    assert client.ask(HIDDEN, good, bytes)
    with pytest.raises(TutelageError, match="status 400: ") as found:
        client.ask(HIDDEN, BAD_REQUESTS[name](good), bytes)
    assert "\n" not in str(found.value)
    assert client.ask(HIDDEN, good, bytes)  # it goes on


def test_a_server_refuses_ids_and_rows_that_its_model_lacks(served: ServedModel) -> None:
    head = served.identity.head
    beyond = collate([Rollout(Prompt("a", ""), 0, (5, 999), (8,))], 0)
    with pytest.raises(MalformedError, match="ids from 5 to 999"):
        served.reply(packed_request(beyond, "n", "float32", head))
    batch = collate(ROLLOUTS, 0)
    batch.row_index[-1] = 10_000
    with pytest.raises(MalformedError, match="rows outside its tokens"):
        read_request(packed_request(batch, "n", "float32", head))


def test_other_paths_and_no_length_are_refused(url: str) -> None:
    client = Client(url, QUICK)
    with pytest.raises(
        TutelageError, match=rf"server {url}/\S+ refuses .* 404: there is {IDENTITY}"
    ):
        client.ask("/v1/models", None, bytes)
    with pytest.raises(TutelageError, match="status 404"):
        client.ask("/elsewhere", {}, bytes)


def test_an_address_in_use_is_one_line(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:{port}: .*another --host"):
        TeacherServer(host, int(port))
