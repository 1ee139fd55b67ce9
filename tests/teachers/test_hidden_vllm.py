"""Hidden states from vLLM's pooling endpoint, by a server that speaks as it does."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tutelage.config.teachers import HiddenServerTeacher
from tutelage.data.batch import Batch, collate, pack
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError, ModelError
from tutelage.models.head_model import load_head_model
from tutelage.models.load import load_model
from tutelage.models.teacher import HiddenStore, Teacher
from tutelage.setup.served_teacher import served_teacher
from tutelage.teachers.hidden import ServedTeacher
from tutelage.teachers.vllm_source import VLLMSource
from vllm_stub import QUICK, FakeVLLM, serving

ROLLOUTS = [
    Rollout(Prompt("a", ""), 0, (5, 6, 7), (8, 9, 2)),
    Rollout(Prompt("b", ""), 0, (5,), (6, 1, 1, 4)),
    Rollout(Prompt("c", ""), 0, (4, 4), (3,)),
]


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> PreTrainedModel:
    return load_model(str(tiny_models / "teacher"), "float32")


@pytest.fixture
def server(model: PreTrainedModel) -> Iterator[FakeVLLM]:
    with serving(model, frozenset(), 1 << 20) as fake:
        yield fake


def teacher_of(server: FakeVLLM, models: Path, **changes: Any) -> ServedTeacher:
    ref = str(models / "teacher")
    changes = {"served_name": "student"} | changes
    settings = HiddenServerTeacher("hidden_server", ref, server.url, server="vllm", **changes)
    head = load_head_model(ref, "float32")
    teacher = served_teacher(settings, head, 20, None, HiddenStore())
    assert isinstance(teacher.source, VLLMSource)
    for client in teacher.source.clients:
        client.limits = QUICK
    return teacher


@pytest.mark.parametrize("layout", [lambda: collate(ROLLOUTS, 0), lambda: pack(ROLLOUTS)])
def test_rows_are_those_of_the_model(
    server: FakeVLLM, model: PreTrainedModel, tiny_models: Path, layout: Callable[[], Batch]
) -> None:
    local, teacher = Teacher(model, 20), teacher_of(server, tiny_models)
    assert "student" in teacher.source.connect()[0]
    with local.on_device(), teacher.on_device():
        expected, found = local.forward(collate(ROLLOUTS, 0)), teacher.forward(layout())
    torch.testing.assert_close(found.hidden, expected.hidden)


def set_data(change: Callable[[bytes], bytes]) -> Callable[[dict[str, Any]], None]:
    def changed(reply: dict[str, Any]) -> None:
        item = reply["data"][0]
        item["data"] = base64.b64encode(change(base64.b64decode(item["data"]))).decode()

    return changed


NAN = torch.full((4,), torch.nan).view(torch.uint8).numpy().tobytes()
WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another request": lambda r: r.update(id="pooling-1"),
    "no id": lambda r: r.pop("id"),
    "another model": lambda r: r.update(model="other"),
    "no model": lambda r: r.pop("model"),
    "fewer tokens": lambda r: r["usage"].update(prompt_tokens=1),
    "tokens as text": lambda r: r["usage"].update(prompt_tokens="3"),
    "no usage": lambda r: r.pop("usage"),
    "no data": lambda r: r.update(data=[]),
    "two items": lambda r: r.update(data=r["data"] * 2),
    "index 1": lambda r: r["data"][0].update(index=1),
    "floats": lambda r: r["data"][0].update(data=[[0.0] * 32]),
    "no base64": lambda r: r["data"][0].update(data="!!!!"),
    "nothing": set_data(lambda content: b""),
    "a row too few": set_data(lambda content: content[:-128]),
    "a row too many": set_data(lambda content: content + content[:128]),
    "a byte too few": set_data(lambda content: content[:-1]),
    "half the dtype": set_data(lambda content: content[: len(content) // 2]),
    "NaN": set_data(lambda content: NAN + content[len(NAN) :]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reply_is_refused(name: str, server: FakeVLLM, tiny_models: Path) -> None:
    teacher = teacher_of(server, tiny_models)
    server.change = WRONG[name]
    with pytest.raises(ModelError, match="Nothing of this batch was kept") as found:
        teacher.forward(collate(ROLLOUTS, 0))
    assert "\n" not in str(found.value)
    assert str(found.value).count("a reply") <= 1
    assert len([path for path, _ in server.asked if path == "/pooling"]) <= len(ROLLOUTS)


def test_a_server_of_other_models_is_refused(server: FakeVLLM, tiny_models: Path) -> None:
    with pytest.raises(ModelError, match=r"serves 'student', not 'other'.*teacher.served_name"):
        teacher_of(server, tiny_models, served_name="other").source.connect()


def rows(count: int) -> Batch:
    ids = [tuple((7 * i + 3 * j) % 19 for j in range(8)) for i in range(count // 8)]
    return collate([Rollout(Prompt(str(i), ""), 0, (1, 2), x) for i, x in enumerate(ids)], 0)


def test_log_probabilities_of_the_model_prove_hidden_states(
    server: FakeVLLM, tiny_models: Path
) -> None:
    teacher = teacher_of(server, tiny_models, logprob_url=server.url)
    teacher.forward(rows(24))
    teacher = teacher_of(server, tiny_models, logprob_url=server.url)
    server.change = lambda reply: (
        set_data(lambda content: content[128:] + content[:128])(reply) if "usage" in reply else None
    )
    with pytest.raises(ModelError, match="give other log-probabilities than the logprob_server"):
        teacher.forward(rows(24))


def test_hidden_states_that_do_not_predict_are_refused(
    server: FakeVLLM, tiny_models: Path, model: PreTrainedModel
) -> None:
    """Completions that the model itself finds likely; those of a server that turns signs do not."""
    ids = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:, :20].argmax(-1)], 1)
    likely = [Rollout(Prompt("a", ""), 0, tuple(x[:2]), tuple(x[2:])) for x in ids.tolist()]
    teacher_of(server, tiny_models).forward(collate(likely, 0))
    server.change = set_data(
        lambda content: (
            (-torch.frombuffer(bytearray(content), dtype=torch.float32))
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
    )
    with pytest.raises(ModelError, match=r"are not final ones of .*--runner pooling"):
        teacher_of(server, tiny_models).forward(collate(likely, 0))


@pytest.mark.parametrize("key", ["served_name", "logprob_url"])
def test_keys_of_vllm_are_refused_with_our_server(key: str) -> None:
    with pytest.raises(ConfigError, match=f"teacher.{key} must be left out with teacher.server"):
        HiddenServerTeacher("hidden_server", "m", "http://a", **{key: "http://b"})  # type: ignore[arg-type]
