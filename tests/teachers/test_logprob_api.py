"""Servers of log-probabilities other than vLLM: OpenAI's completions, and SGLang."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny import tiny_config
from tiny_runs import metrics_of, run
from tutelage.commands.check import check
from tutelage.config.teachers import LogprobServerTeacher
from tutelage.data.batch import collate
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ModelError
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.tokenizers import vocabulary_size
from tutelage.rollout.http_client import BadReply
from tutelage.teachers.logprob import LogprobTeacher
from tutelage.teachers.logprob_api import CompletionsApi, LogprobApi, SGLangApi
from vllm_stub import QUICK, FakeVLLM, serving

K = 5
ROLLOUTS = [
    Rollout(Prompt("a", ""), 0, (5, 6, 7), (8, 9, 2)),
    Rollout(Prompt("b", ""), 0, (5,), (6, 1, 1, 4)),
]
IDS = ROLLOUTS[0].prompt_ids + ROLLOUTS[0].completion_ids
PLACES = (3, 4, 5)
APIS = ("completions", "sglang")
TOPK = {"kind": "topk", "k": K}


@pytest.fixture(scope="module")
def tokenizer(tiny_models: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_models / "teacher"))


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> PreTrainedModel:
    return load_model(str(tiny_models / "teacher"), "float32")


@pytest.fixture
def server(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[FakeVLLM]:
    with serving(model, frozenset(), vocabulary_size(tokenizer)) as fake:
        yield fake


def teacher_of(
    server: FakeVLLM, api: Any, tokenizer: PreTrainedTokenizerBase | None, k: int = K
) -> LogprobTeacher:
    config = LogprobServerTeacher("logprob_server", "student", server.url, api=api, num_logprobs=k)
    found = LogprobTeacher(config, server.num_ids, torch.device("cpu"), tokenizer=tokenizer)
    for client in found._clients:
        client.limits = QUICK
    return found


def rows_of(teacher: LogprobTeacher) -> list[torch.Tensor]:
    with teacher.on_device():
        found = teacher.forward(collate(ROLLOUTS, 0))
    order = found.ids.argsort(1)
    return [found.ids.gather(1, order), found.log_q.gather(1, order), found.token_log_q]


@pytest.mark.parametrize("names", ["ids", "texts", "texts without asking"])
def test_every_api_tells_what_vllm_does(
    server: FakeVLLM, tokenizer: PreTrainedTokenizerBase, names: str
) -> None:
    if names != "ids":
        server.name_of = lambda token: str(tokenizer.decode([token]))
    if names == "texts without asking":
        unknown = "return_tokens_as_token_ids"
        server.refusal = lambda body: f"unknown field {unknown}" if unknown in body else ""
    expected = rows_of(teacher_of(server, "vllm", None))
    for api in APIS if names == "ids" else APIS[:1]:
        for found, wanted in zip(
            rows_of(teacher_of(server, api, tokenizer)), expected, strict=True
        ):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("api", ["vllm", *APIS])
def test_a_server_that_gives_fewer_ids_is_one_line(
    server: FakeVLLM, tokenizer: PreTrainedTokenizerBase, api: str
) -> None:
    server.most_logprobs = 3
    if api == "vllm":  # which says so itself
        server.refusal = lambda body: "at most 3" if body.get("prompt_logprobs", 0) > 3 else ""
    with pytest.raises(ModelError) as caught:
        teacher_of(server, api, tokenizer).connect()
    assert f"teacher.api = '{api}' and teacher.num_logprobs = 5" in str(caught.value)
    assert ("at most 3" if api == "vllm" else "3 log-probabilities instead of 5") in str(
        caught.value
    )
    assert "Lower teacher.num_logprobs" in str(caught.value)
    assert "\n" not in str(caught.value)
    teacher_of(server, api, tokenizer, 3).connect()


@pytest.mark.parametrize("api", ["vllm", *APIS])
def test_a_server_of_another_api_is_found_at_the_start(
    server: FakeVLLM, tokenizer: PreTrainedTokenizerBase, api: str
) -> None:
    def without_numbers(reply: dict[str, Any]) -> None:
        for key in ("choices", "meta_info"):
            reply.pop(key, None)

    server.change = without_numbers
    with pytest.raises(ModelError, match=rf"api = '{api}' and .*a reply whose .* choose its API"):
        teacher_of(server, api, tokenizer).connect()


def test_a_text_of_several_ids_is_refused(
    server: FakeVLLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    server.name_of = lambda token: str(tokenizer.decode([token]))
    teacher = teacher_of(server, "completions", tokenizer)
    api = CompletionsApi(tokenizer)
    texts = api._texts
    reply = server.echo({"prompt": list(IDS), "logprobs": K})
    likeliest = next(iter(reply["choices"][0]["logprobs"]["top_logprobs"][3]))
    api.__dict__["_texts"] = [*texts, likeliest]
    with pytest.raises(ModelError, match=r"which is the text of 2 ids. Use a server that names"):
        teacher._accepted(api, "student", IDS, PLACES, json.dumps(reply).encode())


def completions_faults(reply: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    choice = reply["choices"][0]
    listed = choice["logprobs"]
    tokens, own, tops = (listed[k] for k in ("tokens", "token_logprobs", "top_logprobs"))
    place = rng.randrange(3, 6)
    top = tops[place]
    name, least = rng.choice(list(top)), min(top.values())
    outside = next(f"token_id:{i}" for i in range(20) if f"token_id:{i}" not in top)
    return {
        "model": lambda: reply.update(model="student2"),
        "no model": lambda: reply.pop("model"),
        "no choices": lambda: reply.update(choices=[]),
        "two choices": lambda: reply["choices"].append(choice),
        "index": lambda: choice.update(index=1),
        "no logprobs": lambda: choice.update(logprobs=None),
        "other token": lambda: tokens.__setitem__(place, "token_id:11"),
        "text of another": lambda: tokens.__setitem__(place, "no such text"),
        "permuted": lambda: tokens.__setitem__(slice(0, 2), tokens[1::-1]),
        "short tokens": lambda: tokens.pop(),
        "all short": lambda: [one.__delitem__(slice(5, None)) for one in (tokens, own, tops)],
        "all long": lambda: [one.append(one[-1]) for one in (tokens, own, tops)],
        "no numbers": lambda: own.clear(),
        "shifted": lambda: tops.__setitem__(slice(None), [*tops[1:], None]),
        "shifted numbers": lambda: own.__setitem__(slice(None), [*own[1:], None]),
        "no row": lambda: tops.__setitem__(place, None),
        "empty row": top.clear,
        "no number": lambda: own.__setitem__(place, None),
        "unknown": lambda: own.__setitem__(place, -9999.0),
        "unknown of an id": lambda: top.update({name: -9999.0}),
        "an id less": lambda: top.pop(name),
        "an id more": lambda: top.update({outside: least - 1, "token_id:21": least - 2}),
        "id beyond": lambda: top.update({"token_id:4000": top.pop(name)}),
        "negative id": lambda: top.update({"token_id:-1": top.pop(name)}),
        "twice": lambda: top.update({name.replace(":", ":0"): top.pop(name)}),
        "above 0": lambda: top.update({name: 0.5}),
        "mass": lambda: top.update(dict.fromkeys(top, -0.1)),
        "another number": lambda: [top.pop(name), top.update({f"token_id:{IDS[place]}": least}),
                                   own.__setitem__(place, least - 0.3)],
        "text": lambda: top.update({name: "-1"}),
        "nan": lambda: top.update({name: float("nan")}),
        "infinite": lambda: own.__setitem__(place, float("-inf")),
    }  # fmt: skip


def sglang_faults(reply: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    meta = reply["meta_info"]
    own, tops = meta["input_token_logprobs"], meta["input_top_logprobs"]
    place = rng.randrange(3, 6)
    top = tops[place]
    entry = rng.choice(top)
    least = min(x for x, _, _ in top)
    outside = next(i for i in range(20) if i not in [one for _, one, _ in top])
    return {
        "no meta": lambda: reply.pop("meta_info"),
        "no numbers": lambda: meta.pop("input_token_logprobs"),
        "no tops": lambda: meta.pop("input_top_logprobs"),
        "other id": lambda: own[place].__setitem__(1, 11),
        "permuted": lambda: own.__setitem__(slice(0, 2), own[1::-1]),
        "short": own.pop,
        "long": lambda: own.append(own[-1]),
        "short tops": tops.pop,
        "long tops": lambda: tops.append(top),
        "shifted": lambda: tops.__setitem__(slice(None), [*tops[1:], None]),
        "no row": lambda: tops.__setitem__(place, None),
        "empty row": top.clear,
        "no number": lambda: own[place].__setitem__(0, None),
        "an id less": top.pop,
        "an id more": lambda: top.append([least - 1, outside, None]),
        "id beyond": lambda: entry.__setitem__(1, 4000),
        "negative id": lambda: entry.__setitem__(1, -1),
        "twice": lambda: top.__setitem__(0, top[1]),
        "above 0": lambda: entry.__setitem__(0, 0.5),
        "mass": lambda: [one.__setitem__(0, -0.1) for one in top],
        "another number": lambda: [entry.__setitem__(slice(2), [least, IDS[place]]),
                                   own[place].__setitem__(0, least - 0.3)],
        "twice more": lambda: top.append(entry),
        "text": lambda: entry.__setitem__(0, "-1"),
        "text for an id": lambda: entry.__setitem__(1, "7"),
        "pair": entry.pop,
        "null": lambda: entry.__setitem__(0, None),
        "nan": lambda: entry.__setitem__(0, float("nan")),
        "infinite": lambda: own[place].__setitem__(0, float("-inf")),
    }  # fmt: skip


@pytest.mark.parametrize("api", APIS)
def test_no_malformed_reply_is_believed(
    server: FakeVLLM, tokenizer: PreTrainedTokenizerBase, api: str
) -> None:
    teacher, rng = teacher_of(server, api, tokenizer), random.Random(1)
    way: LogprobApi
    if api == "sglang":
        way, whole = SGLangApi(), server.generate(SGLangApi().body("student", IDS, K))
    else:
        ask = {"prompt": list(IDS), "logprobs": K, "return_tokens_as_token_ids": True}
        way, whole = CompletionsApi(tokenizer), server.echo(ask)
    spoil = sglang_faults if api == "sglang" else completions_faults
    assert len(teacher._accepted(way, "student", IDS, PLACES, json.dumps(whole).encode())) == 3
    seen, accepted = set(), []
    for _ in range(500):
        reply = copy.deepcopy(whole)
        faults = spoil(reply, rng)
        kind = rng.choice(list(faults))
        faults[kind]()
        content = json.dumps(reply).encode()
        if rng.random() < 0.1:
            kind, content = "cut", content[: len(content) // 2]
        seen.add(kind)
        try:
            teacher._accepted(way, "student", IDS, PLACES, content)
            accepted.append(kind)
        except (BadReply, ModelError):
            pass
    assert len(seen) >= 20
    assert accepted == []


@pytest.mark.parametrize("api", APIS)
def test_a_batch_is_refused_as_a_whole(
    server: FakeVLLM, tokenizer: PreTrainedTokenizerBase, api: str
) -> None:
    teacher = teacher_of(server, api, tokenizer)
    teacher.connect()

    def spoil(reply: dict[str, Any]) -> None:
        listed = reply.get("meta_info") or reply["choices"][0]["logprobs"]
        rows = listed.get("input_top_logprobs") or listed["top_logprobs"]
        if len(rows) < len(IDS) + (api == "completions"):  # of the second sequence
            rows.pop()

    server.change = spoil
    with pytest.raises(ModelError, match=r"no usable reply in 2 tries: \d+ log-prob"):
        rows_of(teacher)


def served(server: FakeVLLM, tiny_models: Path, api: str) -> dict[str, Any]:
    return {"kind": "logprob_server", "url": server.url, "served_name": "student", "api": api,
            "num_logprobs": K, "model": str(tiny_models / "teacher")}  # fmt: skip


@pytest.mark.slow
def test_check_asks_the_server(server: FakeVLLM, tiny_models: Path, tmp_path: Path) -> None:
    teacher = served(server, tiny_models, "sglang")
    config = tiny_config(tiny_models, tmp_path, teacher=teacher, objective=TOPK)
    assert any("token ids are sent to" in line for line in check(config, "run"))
    assert [path for path, _ in server.asked] == ["/v1/models", "/generate"]
    server.most_logprobs = 2
    with pytest.raises(ModelError, match="2 log-probabilities instead of 5"):
        list(check(config, "run"))


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
def test_a_run_learns_what_it_does_from_vllm(
    server: FakeVLLM, tiny_models: Path, tmp_path: Path, api: str
) -> None:
    found = []
    for one in (api, "vllm"):
        teacher = served(server, tiny_models, one)
        run(tiny_models, tmp_path / one, teacher=teacher, objective=TOPK, num_steps=2)
        found.append(metrics_of(tmp_path / one))
    for ours, theirs in zip(*found, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["teacher_tail_mass"] == pytest.approx(theirs["teacher_tail_mass"], rel=1e-5)
