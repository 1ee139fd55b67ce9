"""A client that takes nothing but what it asked for, from a server that gives everything else."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from patience import HANG_S
from reliability import server as server_harness
from reliability.server import (
    JSON_MUTATIONS,
    MODEL,
    MUTATIONS,
    TEXT,
    EvilServer,
    Exchange,
    Mutation,
    attack,
    good,
)
from tutelage.config.sampling import SamplingConfig
from tutelage.data.prompts import FileTask
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, ModelError
from tutelage.evaluation.server import Server
from tutelage.rollout.http_client import Client, Limits

CHAT = Prompt("chat", ({"role": "user", "content": "2+2"},))
PLAIN = Prompt("plain", "2+2=")
QUICK = Limits(num_tries=3, first_delay_s=0.01)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUTELAGE_API_KEY", raising=False)


def scripted(*steps: Mutation) -> Callable[[Any], Mutation]:
    """Replies in this order, the last one for ever."""
    left = list(steps)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def test_no_malformed_reply_is_accepted_and_none_hangs() -> None:
    assert len(MUTATIONS) >= 30
    record = attack(300)
    assert sum(record.asked.values()) == 300
    assert len(record.asked) == len(MUTATIONS)
    assert +record.accepted == {}
    assert +record.hanging == {}
    assert +record.ugly == {}
    assert record.num_followed == 0
    assert record.num_good > 30
    assert record.num_good_refused == 0


def test_a_client_without_a_deadline_is_seen_to_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the counter, with silences of a second."""
    monkeypatch.setattr(server_harness, "SILENCE_S", 1.0)
    monkeypatch.setattr(server_harness, "GRACE_S", 0.1)
    record = server_harness.attack_without_deadline()
    assert sum(record.hanging.values()) == len(server_harness.SILENCES) == 3
    assert +record.accepted == {}


def test_a_careless_client_takes_malformed_replies() -> None:
    """The negative control: many mutations are such that reading two keys does not see them."""
    taken = []
    server = EvilServer(lambda body: MUTATIONS[body["messages"][0]["content"]])
    with server.running() as url:
        for name in JSON_MUTATIONS:
            body = {"model": MODEL, "messages": [{"content": name}]}
            request = urllib.request.Request(url, json.dumps(body).encode())
            try:
                with urllib.request.urlopen(request, timeout=HANG_S) as reply:
                    json.load(reply)["choices"][0]["message"]["content"].strip()
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
            except IndexError:
                continue
            taken.append(name)
    assert len(taken) >= 15


def test_a_completion_in_chat_and_in_plain_text() -> None:
    server = EvilServer(lambda body: good)
    sampling = SamplingConfig(0.7, 0.8, num_samples=2)
    with server.running() as url:
        client = Server(url, sampling, MODEL, seed=3, enable_thinking=False)
        drawn = client.complete([CHAT, PLAIN], 64)
        again = Server(url, sampling, MODEL, seed=3, num_concurrent=1).complete([CHAT, PLAIN], 64)
    assert [(c.prompt.id, c.sample, c.text, c.is_truncated, c.num_tokens) for c in drawn] == [
        (name, sample, TEXT, False, 9) for name in ("chat", "plain") for sample in (0, 1)
    ]
    assert drawn == again
    asked = {(path, body["seed"]): body for path, body, _ in server.seen[:4]}
    assert (
        sorted(path for path, _ in asked) == ["/v1/chat/completions"] * 2 + ["/v1/completions"] * 2
    )
    for (path, _), body in asked.items():
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.8, 64)
        assert (body.get("prompt"), "messages" in body) == (
            (None, True) if "chat" in path else ("2+2=", False)
        )
        wanted = {"enable_thinking": False} if "chat" in path else None
        assert body.get("chat_template_kwargs") == wanted
    assert len({seed for _, seed in asked}) == 4
    assert {body["seed"] for _, body, _ in server.seen[4:]} == {seed for _, seed in asked}


def test_a_thought_that_was_cut_off_is_kept_as_a_thought() -> None:
    def cut(exchange: Exchange) -> None:
        reply = exchange.good()
        reply["choices"][0] |= {"finish_reason": "length"}
        reply["choices"][0]["message"] |= {"content": None, "reasoning_content": "Let me"}
        exchange.send_json(reply)

    with EvilServer(lambda body: cut).running() as url:
        (completion,) = Server(url, SamplingConfig(), MODEL).complete([CHAT], 64)
    assert (completion.text, completion.is_truncated) == ("<think>Let me", True)


def test_bad_replies_are_asked_for_again_and_then_an_error() -> None:
    bad = [MUTATIONS[name] for name in ("status 503", "cut JSON")]
    server = EvilServer(scripted(*bad, good))
    with server.running() as url:
        client = Server(url, SamplingConfig(), MODEL, limits=QUICK)
        assert client.complete([CHAT], 64)[0].text == TEXT
    assert len(server.seen) == 3
    server = EvilServer(scripted(*bad, bad[0], good))
    with server.running() as url:
        client = Server(url, SamplingConfig(), MODEL, limits=QUICK)
        with pytest.raises(ModelError, match=r"no usable reply in 3 tries: status 503"):
            client.complete([CHAT], 64)
    assert len(server.seen) == 3


@pytest.mark.parametrize("name", ["status 400", "status 401", "status 404", "redirect to itself"])
def test_what_will_not_change_is_not_asked_again(name: str) -> None:
    server = EvilServer(lambda body: MUTATIONS[name])
    with server.running() as url, pytest.raises(ModelError):
        Server(url, SamplingConfig(), MODEL, limits=QUICK).complete([CHAT], 64)
    assert len(server.seen) == 1


def test_a_signal_ends_requests_that_wait() -> None:
    """Its handler raises in the main thread, while the server says nothing."""
    number = signal.SIGUSR1

    def silent(exchange: Exchange) -> None:
        os.kill(os.getpid(), number)
        MUTATIONS["silence"](exchange)

    def handler(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, handler)
    try:
        with EvilServer(lambda body: silent).running() as url, pytest.raises(KeyboardInterrupt):
            Server(url, SamplingConfig(num_samples=1), MODEL).complete([CHAT], 64)
    finally:
        signal.signal(number, before)


def test_one_bad_reply_rejects_the_batch_and_wakes_the_rest() -> None:
    """The slow reply would come after the error; the bad one comes when the slow one is asked for.

    Were the rest not woken, the error would have to wait for a reply that waits for it.
    """
    asked, ended, in_order = threading.Event(), threading.Event(), []

    def slow(exchange: Exchange) -> None:
        asked.set()
        in_order.append(ended.wait(HANG_S))

    def bad(exchange: Exchange) -> None:
        in_order.append(asked.wait(HANG_S))
        MUTATIONS["status 404"](exchange)

    kinds = {"bad": bad, "slow": slow, "good": good}
    server = EvilServer(lambda body: kinds[body["messages"][0]["content"]])
    prompts = [
        Prompt(kind, ({"role": "user", "content": kind},)) for kind in ("good", "bad", "slow")
    ]
    with server.running() as url:
        client = Server(url, SamplingConfig(), MODEL)
        with pytest.raises(ModelError, match="404"):
            client.complete(prompts, 64)
        assert in_order == [True]  # and the slow reply still waits
        ended.set()


def test_the_model_is_asked_for_when_there_is_one_only() -> None:
    def models(*names: str) -> Mutation:
        reply = {"object": "list", "data": [{"id": name} for name in names]}
        return lambda exchange: exchange.send_json(reply)

    with EvilServer(scripted(models("only"), good)).running() as url:
        client = Server(url, SamplingConfig())
        assert client.model_name == "only"
        assert client.complete([CHAT], 64)[0].text == TEXT
    with (
        EvilServer(lambda body: models("a", "b")).running() as url,
        pytest.raises(ConfigError, match=r"has 2 models, got a, b\. Choose one with --model-name"),
    ):
        Server(url, SamplingConfig())


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1",
        "file:///etc/passwd",
        "//host/v1",
        "http://",
        "http://host:99999/v1",
        "http://[::1/v1",
        "http://host:secret/v1",
        "http://user:secret/word@host/v1",
        "http://user:secret@host/v1",
        "http://secret@host/v1",
        "http://host/v1?key=secret",
        "http://host/v1#secret",
        "http://host/\nv1",
        "http://a..b/v1",
        f"http://{'a' * 64}/v1",
    ],
)
def test_urls_that_are_refused_without_showing_them(url: str) -> None:
    with pytest.raises(ConfigError, match=r"the server's URL .* Write it as http") as error:
        Client(url, QUICK)
    assert "secret" not in str(error.value)


def test_a_malformed_url_without_a_secret_is_shown() -> None:
    for url in ("host:8000", "http://", "http://host:99999/v1", "http://a..b/v1", "ftp://host"):
        with pytest.raises(ConfigError, match=re.escape(f"malformed, got {url!r}. Write it as")):
            Client(url, QUICK)


def test_a_server_that_is_not_there_is_one_line_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with pytest.raises(ModelError, match=f"{url} gave no usable reply in 3 tries: ") as error:
        Server(url, SamplingConfig(), MODEL, limits=QUICK).complete([CHAT], 64)
    assert "\n" not in str(error.value)
    assert str(error.value).count(url) == 1
    with pytest.raises(ModelError, match=f"{url} gave no usable .* Start it, or correct its URL"):
        Server(url, SamplingConfig(), limits=QUICK)


def test_no_variable_of_the_environment_leads_requests_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    server = EvilServer(lambda body: good)
    with server.running() as url:
        assert Server(url, SamplingConfig(), MODEL).complete([CHAT], 64)[0].text == TEXT
    assert "authorization" not in server.seen[0][2]


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_is_none_is_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("TUTELAGE_API_KEY", key)
    with pytest.raises(ConfigError, match="TUTELAGE_API_KEY holds spaces") as error:
        Server("http://127.0.0.1:9/v1", SamplingConfig(), MODEL)
    assert key not in str(error.value)


def test_an_error_that_repeats_the_key_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_API_KEY", "key-77aa")
    server = EvilServer(lambda body: lambda x: x.send("wrong key-77aa\n", status="400 Bad"))
    with server.running() as url:
        client = Server(url, SamplingConfig(), MODEL)
        assert "key-77aa" not in repr(client)
        with pytest.raises(ModelError, match=r"status 400: wrong \*\*\*"):
            client.complete([CHAT], 64)


# --- nothing is left to the server's own defaults -------------------------------------------------

STATED = {
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "stop": None,
    "n": 1,
}


def test_a_request_states_every_sampling_setting() -> None:
    server = EvilServer(lambda body: good)
    with server.running() as url:
        client = Server(url, SamplingConfig(0.7, 0.8), MODEL)
        client.complete([CHAT, PLAIN], 64)
    for _, body, _ in server.seen:
        assert {**body, **STATED} == body
        assert body["seed"] >= 0
    assert client.sent == {key: value for key, value in STATED.items() if key != "n"}


UNKNOWN_FIELD = {
    "openai": ("400 Bad", '{"error": {"message": "Unrecognized request arguments: %s"}}'),
    "pydantic": ("422 No", '{"detail": [{"type": "extra_forbidden", "loc": ["body", "%s"]}]}'),
    "plain": ("400 Bad", "unknown field `%s`, expected one of `model`, `messages`, `top_p`"),
}


@pytest.mark.parametrize(("status", "text"), UNKNOWN_FIELD.values(), ids=UNKNOWN_FIELD)
def test_a_field_that_the_server_does_not_know_is_left_out_and_told_once(
    status: str, text: str
) -> None:
    def reply(exchange: Exchange) -> None:
        found = [name for name in ("top_k", "min_p") if name in exchange.body]
        if found:
            exchange.send(text % found[0], status=status)
        else:
            good(exchange)

    said: list[str] = []
    server = EvilServer(lambda body: reply)
    with server.running() as url:
        client = Server(url, SamplingConfig(num_samples=6), MODEL, log=said.append)
        assert len(client.complete([CHAT], 64)) == 6
        before = len(server.seen)
        client.complete([CHAT], 64)
    assert len(server.seen) == before + 6
    assert said == [
        f"the server does not take {name}: requests are sent without" for name in ("top_k", "min_p")
    ]
    assert not client.sent.keys() & {"top_k", "min_p"}
    assert client.sent["repetition_penalty"] == 1.0


@pytest.mark.parametrize(
    "text",
    ["min_p must be in [0, 1], got 0.0", "Unknown parameter: 'seed'", "Unsupported: temperature"],
)
def test_other_refusals_stay_refusals(text: str) -> None:
    """A value that is wrong is no unknown field, and what decides the result is never dropped."""
    server = EvilServer(lambda body: lambda exchange: exchange.send(text, status="400 Bad"))
    with server.running() as url:
        said = f"the server {url}/chat/completions refuses the request: status 400"
        with pytest.raises(ModelError, match=said):
            Server(url, SamplingConfig(), MODEL).complete([CHAT], 64)
    assert len(server.seen) == 1


@pytest.mark.parametrize("reason", ["length", "stop"])
@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_thought_without_an_answer_is_a_wrong_answer_under_either_name(
    name: str, reason: str
) -> None:
    def thinking(exchange: Exchange) -> None:
        reply = exchange.good()
        reply["choices"][0] |= {"finish_reason": reason}
        reply["choices"][0]["message"] |= {"content": None, name: r"First \boxed{5}."}
        exchange.send_json(reply)

    with EvilServer(lambda body: thinking).running() as url:
        (completion,) = Server(url, SamplingConfig(), MODEL).complete([CHAT], 64)
    assert completion.text == r"<think>First \boxed{5}."
    assert completion.is_truncated == (reason == "length")
    prompt = Prompt("chat", CHAT.content, "5")
    for grader in ("number", "math"):
        task = FileTask("x", (prompt,), grader)  # type: ignore[arg-type]
        assert task.grade(prompt, completion.text, completion.is_truncated) is False


def reply_with(reason: str = "stop", **changes: Any) -> Mutation:
    def reply(exchange: Exchange) -> None:
        value = exchange.good()
        value["choices"][0]["finish_reason"] = reason
        value["choices"][0]["message"] |= changes
        exchange.send_json(value)

    return reply


def parts(*texts: str, kind: str = "text") -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for text in texts]


REFUSAL = [{"type": "refusal", "refusal": "No."}]
CALL = {"name": "add", "arguments": "{}"}
NO_ANSWER: dict[str, tuple[Mutation, str]] = {
    "refusal": (reply_with(content=None, refusal="No."), "a refusal"),
    "refusal beside a text": (reply_with(refusal="No."), "a refusal"),
    "refusal as a part": (reply_with(content=REFUSAL), "a refusal"),
    "tool call": (reply_with("tool_calls", content=None, tool_calls=[CALL]), "a tool call"),
    "tool call and no text": (reply_with(content="", tool_calls=[CALL]), "a tool call"),
    "old tool call": (reply_with("function_call", content=None, function_call=CALL), "a tool call"),
    "filter": (reply_with("content_filter"), "what a filter left"),
    "null": (reply_with(content=None), "no content"),
}


@pytest.mark.parametrize("name", NO_ANSWER)
def test_a_reply_without_an_answer_counts_as_an_empty_completion(name: str) -> None:
    mutation, holds = NO_ANSWER[name]
    said: list[str] = []
    with EvilServer(lambda body: mutation).running() as url:
        client = Server(url, SamplingConfig(num_samples=2), MODEL, log=said.append)
        drawn = client.complete([CHAT], 64)
    assert [(c.text, c.is_truncated) for c in drawn] == [("", False)] * 2
    assert said == [f"a reply holds {holds}: such replies count as empty completions"]
    prompt = replace(CHAT, answer="4")
    assert FileTask("x", (prompt,), "math").grade(prompt, drawn[0].text, False) is False


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (parts("The answer is ", "4."), "The answer is 4."),
        ([], ""),
        (parts("Hm.", kind="thinking") + parts("4"), "4"),
        (parts("Hm.", kind="reasoning"), "<think>"),
    ],
)
def test_content_in_parts_is_their_text(content: Any, text: str) -> None:
    with EvilServer(lambda body: reply_with(content=content)).running() as url:
        (completion,) = Server(url, SamplingConfig(), MODEL).complete([CHAT], 64)
    assert completion.text == text


def test_a_part_that_is_no_text_is_named() -> None:
    with EvilServer(lambda body: reply_with(content=parts("", kind="image_url"))).running() as url:
        client = Server(url, SamplingConfig(), MODEL, limits=QUICK)
        with pytest.raises(ModelError, match="a part of type 'image_url', which is no text"):
            client.complete([CHAT], 64)


def test_a_message_cut_off_before_its_first_word_is_an_empty_thought() -> None:
    def silent(exchange: Exchange) -> None:
        reply = exchange.good()
        reply["choices"][0] |= {"finish_reason": "length"}
        del reply["choices"][0]["message"]["content"]
        exchange.send_json(reply)

    with EvilServer(lambda body: silent).running() as url:
        (completion,) = Server(url, SamplingConfig(), MODEL).complete([CHAT], 64)
    assert (completion.text, completion.is_truncated) == ("<think>", True)


def test_a_thought_that_the_servers_template_opened_shows_where_one_is_closed() -> None:
    """The guess of the completion that was cut off, drawn beside a finished one, is no answer."""

    def said(text: str) -> Mutation:
        def cut(exchange: Exchange) -> None:
            reply = exchange.good()
            reply["choices"][0] |= {"finish_reason": "length"}
            reply["choices"][0]["message"] |= {"content": text}
            exchange.send_json(reply)

        return cut

    guess, done = r"First guess: \boxed{5}. No wait,", r"hm</think>\boxed{5}"
    opening = Prompt("open", "2+3\n<think>\n", "5")
    chat = replace(CHAT, answer="5")
    grade = FileTask("t", (chat,), "math").grade
    for texts, verdicts in (((guess, done), [False, True]), ((guess, guess), [True, True])):
        server = EvilServer(scripted(*map(said, texts)))
        with server.running() as url:
            client = Server(url, SamplingConfig(num_samples=2), MODEL, num_concurrent=1)
            drawn = client.complete([chat], 64)
        assert [grade(c.prompt, c.thought + c.text, True) for c in drawn] == verdicts
    with EvilServer(lambda body: good).running() as url:
        drawn = Server(url, SamplingConfig(), MODEL).complete([opening], 64)
    assert [c.thought for c in drawn] == ["<think>\n"]
