"""A teacher on a server of log-probabilities: its rows, and which replies are believed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tutelage.config.parse import parse_config
from tutelage.config.teachers import LogprobServerTeacher
from tutelage.core import PartialLogits
from tutelage.data.batch import Batch, collate, pack
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ModelError
from tutelage.models.load import load_model
from tutelage.models.teacher import Teacher
from tutelage.rollout.http_client import BadReply
from tutelage.teachers.logprob import LogprobTeacher
from tutelage.teachers.logprob_api import VLLMApi
from tutelage.train.metrics import teacher_checks
from tutelage.train.micro_batch import MicroBatch
from vllm_stub import QUICK, FakeVLLM, serving

K = 5
ROLLOUTS = [
    Rollout(Prompt("a", ""), 0, (5, 6, 7), (8, 9, 2)),
    Rollout(Prompt("b", ""), 0, (5,), (6, 1, 1, 4)),
    Rollout(Prompt("c", ""), 0, (4, 4), (3,)),
]
SWAP = (2, 7)


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> PreTrainedModel:
    return load_model(str(tiny_models / "teacher"), "float32")


@pytest.fixture
def server(model: PreTrainedModel) -> Iterator[FakeVLLM]:
    with serving(model, frozenset(), model.config.vocab_size) as fake:
        yield fake


def teacher_of(server: FakeVLLM, swap: tuple[int, int] | None = None) -> LogprobTeacher:
    config = LogprobServerTeacher("logprob_server", "student", server.url, num_logprobs=K)
    size = server.model.config.vocab_size
    found = LogprobTeacher(config, size, torch.device("cpu"), swap)
    for client in found._clients:
        client.limits = QUICK
    return found


def rows_of(teacher: LogprobTeacher, batch: Batch) -> PartialLogits:
    with teacher.on_device():
        return teacher.forward(batch)


@pytest.mark.parametrize("way", ["padded", "packed"])
@pytest.mark.parametrize("swap", [None, SWAP])
def test_rows_are_what_the_model_itself_gives(
    server: FakeVLLM, model: PreTrainedModel, way: str, swap: tuple[int, int] | None
) -> None:
    batch = collate(ROLLOUTS, 0) if way == "padded" else pack(ROLLOUTS)
    local = Teacher(copy.deepcopy(model), model.config.vocab_size, swap=swap)
    with local.on_device():
        here = collate(ROLLOUTS, 0)
        log_q = local.forward(here).block(0, here.num_rows).log_softmax(-1)
    found = rows_of(teacher_of(server, swap), batch)
    top = log_q.topk(K)
    torch.testing.assert_close(found.log_q, top.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.ids.sort(1).values, top.indices.sort(1).values)
    picked = log_q.gather(1, batch.tokens[:, None]).squeeze(1)
    torch.testing.assert_close(found.token_log_q, picked, rtol=1e-4, atol=1e-4)


class Second:
    """Of two processes that call alike, the second, which knows what the first one gave."""

    def __init__(self, first: list[float] | None = None) -> None:
        self.first = first
        self.given: list[float] = []

    def sum(self, value: float) -> float:
        self.given.append(value)
        return value if self.first is None else value + self.first[len(self.given) - 1]

    def max(self, values: list[float]) -> list[float]:
        return [self.sum(0.0) + x for x in values]


def test_what_is_not_known_is_measured_over_all_rows(server: FakeVLLM) -> None:
    teacher = teacher_of(server)
    config = parse_config(
        {
            "student": {"model": "s"},
            "teacher": {"kind": "logprob_server", "model": "t", "url": server.url},
            "objective": {"kind": "eopd", "estimator": "sampled", "fkl": "topk_tail",
                          "threshold": 1.0},
        }
    )  # fmt: skip
    whole = rows_of(teacher, collate(ROLLOUTS, 0))
    low, high = whole.entropy_bounds()
    expected = {
        "teacher_tail_mass": float((1 - whole.known_mass).mean()),
        "undecided_gate_share": float(((low < 1) & (high >= 1)).double().mean()),
    }
    parts = [
        MicroBatch(batch := collate(some, 0), 0, teacher_logits=rows_of(teacher, batch))
        for some in (ROLLOUTS[:2], ROLLOUTS[2:])
    ]
    alone: Any = Second()
    assert teacher_checks(config, {}, parts, alone) == pytest.approx(expected)
    first: Any = Second()
    own = teacher_checks(config, {}, parts[:1], first)
    second: Any = Second(first.given)
    assert teacher_checks(config, {}, parts[1:], second) == pytest.approx(expected)
    assert own["teacher_tail_mass"] != pytest.approx(expected["teacher_tail_mass"])
    assert teacher_checks(config, {}, [], alone) == dict.fromkeys(expected)
    assert teacher.checks() == {}


def test_another_model_is_refused_at_the_start(server: FakeVLLM) -> None:
    config = LogprobServerTeacher("logprob_server", "other/model", server.url)
    with pytest.raises(ModelError, match=r"serves 'student', not 'other/model'. Start it with"):
        rows_of(LogprobTeacher(config, 40, torch.device("cpu")), collate(ROLLOUTS, 0))


def test_a_stop_token_within_a_completion_cannot_be_exchanged(server: FakeVLLM) -> None:
    batch = collate([Rollout(Prompt("a", ""), 0, (5,), (8, 2, 9))], 0)
    with pytest.raises(ModelError, match="stop token 2 is within a completion"):
        rows_of(teacher_of(server, SWAP), batch)


def spoiled(reply: dict[str, Any], rng: random.Random) -> tuple[str, bytes]:
    """A reply with one fault of 24 kinds, and which."""
    choice = reply["choices"][0]
    ids, known = choice["prompt_token_ids"], choice["prompt_logprobs"]
    place = rng.randrange(3, len(known))
    row = known[place]
    name = rng.choice(list(row))
    other = next(str(i) for i in range(40) if str(i) not in row)

    kinds: dict[str, Any] = {
        "model": lambda: reply.update(model="student2"),
        "no model": lambda: reply.pop("model"),
        "no choices": lambda: reply.update(choices=[]),
        "two choices": lambda: reply["choices"].append(choice),
        "index": lambda: choice.update(index=1),
        "other ids": lambda: ids.__setitem__(place, ids[place] + 1),
        "short ids": ids.pop,
        "permuted ids": lambda: ids.__setitem__(slice(None), [*ids[1:], ids[0] + 1]),
        "short rows": known.pop,
        "long rows": lambda: known.append(row),
        "shifted rows": lambda: known.__setitem__(slice(None), [*known[1:], None]),
        "no row": lambda: known.__setitem__(place, None),
        "empty row": row.clear,
        "one id less": lambda: row.pop(str(ids[place])),
        "an id more": lambda: row.update(
            {other: {"logprob": -30.0}, str(39): {"logprob": -30.0}, "38": {"logprob": -31.0}}
        ),
        "no token": lambda: row.update({other: row.pop(str(ids[place]))}),
        "id beyond": lambda: row.update({"4000": row.pop(name)}),
        "negative id": lambda: row.update({"-3": row.pop(name)}),
        "name of an id": lambda: row.update({"seven": row.pop(name)}),
        "long name": lambda: row.update({"1" * 5000: row.pop(name)}),
        "twice": lambda: row.update({"0" + name: row[name]}),
        "above 0": lambda: row.update({name: {"logprob": 0.5}}),
        "mass": lambda: row.update({one: {"logprob": -0.1} for one in row}),
        "text": lambda: row.update({name: {"logprob": "-1"}}),
        "null": lambda: row.update({name: {"logprob": None}}),
        "nan": lambda: row.update({name: {"logprob": float("nan")}}),
        "infinite": lambda: row.update({name: {"logprob": float("-inf")}}),
    }
    kind = rng.choice(list(kinds))
    kinds[kind]()
    content = json.dumps(reply).encode()
    if rng.random() < 0.1:
        return "cut", content[: len(content) // 2]
    return kind, content


def tried(server: FakeVLLM, count: int) -> tuple[set[str], int]:
    """Kinds that were tried, and replies that were believed."""
    teacher, rng = teacher_of(server), random.Random(1)
    ids = list(ROLLOUTS[0].prompt_ids + ROLLOUTS[0].completion_ids)
    whole = server.score({"prompt": ids, "prompt_logprobs": K})
    places = (3, 4, 5)
    assert (
        len(teacher._accepted(VLLMApi(), "student", ids, places, json.dumps(whole).encode())) == 3
    )
    seen, accepted = set(), 0
    for _ in range(count):
        kind, content = spoiled(copy.deepcopy(whole), rng)
        seen.add(kind)
        try:
            teacher._accepted(VLLMApi(), "student", ids, places, content)
            accepted += 1
        except BadReply:
            pass
    return seen, accepted


def test_no_malformed_reply_is_believed(server: FakeVLLM) -> None:
    seen, accepted = tried(server, 500)
    assert len(seen) >= 20
    assert accepted == 0


def test_a_row_of_the_head_without_a_token_is_named(server: FakeVLLM) -> None:
    teacher = teacher_of(server)

    def rename(reply: dict[str, Any]) -> None:
        choice = reply["choices"][0]
        pairs = zip(choice["prompt_token_ids"], choice["prompt_logprobs"], strict=True)
        for token, row in list(pairs)[1:]:
            row[str(teacher.vocab_size)] = row.pop(next(one for one in row if one != str(token)))

    server.change = rename
    with pytest.raises(ModelError) as caught:
        rows_of(teacher, collate(ROLLOUTS, 0))
    size = teacher.vocab_size
    assert f"an id of {size} where both models have ids below {size}" in str(caught.value)
    assert "Lower teacher.num_logprobs" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_batch_is_refused_as_a_whole(server: FakeVLLM) -> None:
    def spoil(reply: dict[str, Any]) -> None:
        if reply["choices"][0]["prompt_token_ids"][0] == 4:
            reply["choices"][0]["prompt_logprobs"].pop()

    server.change = spoil
    with pytest.raises(ModelError, match=r"no usable reply in 2 tries: 2 log-prob"):
        rows_of(teacher_of(server), collate(ROLLOUTS, 0))


def test_a_server_that_is_gone_is_one_line(server: FakeVLLM) -> None:
    teacher = teacher_of(server)
    server.num_left = 0
    with pytest.raises(ModelError, match=rf"the server {server.url} gave no usable reply"):
        rows_of(teacher, collate(ROLLOUTS, 0))
