"""The endpoint of verifiers' worker: which requests it takes, and what it makes of the others."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tutelage.rollout.verifiers_endpoint import Asked, Endpoint, Refused, Turn

STOPS = frozenset({2, 7})


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint("secret", STOPS)
    yield made
    made.close()


def post(
    endpoint: Endpoint,
    body: Any,
    path: str = "/inference/v1/generate",
    key: str = "secret",
    session: str = "s",
) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", int(endpoint.url.rpartition(":")[2]))
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}"} | ({"X-Session-ID": session} if session else {})
    connection.request("POST", path, content, headers)
    reply = connection.getresponse()
    found = reply.status, json.loads(reply.read())
    connection.close()
    return found


def body(**sampling: Any) -> dict[str, Any]:
    return {"model": "student", "token_ids": [1, 4], "sampling_params": sampling}


def test_a_turn_is_answered_in_vllms_form(endpoint: Endpoint) -> None:
    def answer() -> None:
        asked = endpoint.events.get()
        assert isinstance(asked, Asked)
        seen.append((asked.session, asked.ids, asked.max_tokens))
        asked.answer(Turn((5, 7), (-0.1, -1 / 3), False))

    seen: list[Any] = []
    thread = threading.Thread(target=answer)
    thread.start()
    stated = {"temperature": 1, "top_p": 1.0, "max_tokens": 9, "stop_token_ids": [7, 2]}
    status, found = post(endpoint, body(**stated, logprobs=1, skip_special_tokens=False))
    thread.join()
    assert status == 200
    assert seen == [("s", (1, 4), 9)]
    (choice,) = found["choices"]
    assert choice["token_ids"] == [5, 7]
    assert choice["finish_reason"] == "stop"
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [
        "token_id:5",
        "token_id:7",
    ]
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == [-0.1, -1 / 3]


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (b"{", "cannot be used"),
        (b"\xff\xfe", "cannot be used"),
        (b"[" * 100_000, "cannot be used"),
        ([], "cannot be used"),
        ({**body(), "token_ids": []}, "token_ids"),
        ({**body(), "token_ids": [1, -1]}, "token_ids.1"),
        ({**body(), "token_ids": [1, True]}, "token_ids.1"),
        ({**body(), "token_ids": ["1"]}, "token_ids.0"),
        ({**body(), "token_ids": [1.0]}, "token_ids.0"),
        ({**body(), "features": {}}, "features"),
        ({"model": "x", "token_ids": [1]}, "sampling_params"),
        (body(temperature=0.7), "temperature = 0.7, where the run has 1.0"),
        (body(temperature="1\n2"), "temperature"),
        (body(top_k=5), "top_k = 5, where the run has 0"),
        (body(top_p=None), "top_p = None"),
        (body(min_p=0.1), "'min_p', which the run does not have"),
        (body(stop=["x"]), "'stop', which the run does not have"),
        (body(stop_token_ids=[2, 9]), "stops at [2, 9], where the student stops at [2, 7]"),
        (body(stop_token_ids=2), "stops at 2"),
        (body(stop_token_ids=[[2]]), "stops at [[2]]"),
        (body(max_tokens="9"), "max_tokens = '9'"),
        (body(max_tokens=True), "max_tokens = 'True'"),
        (body(max_tokens=-1), "max_tokens = '-1'"),
    ],
)
def test_an_unusable_request_is_refused_with_its_reason(
    endpoint: Endpoint, wrong: Any, part: str
) -> None:
    status, found = post(endpoint, wrong)
    refused = endpoint.events.get(timeout=60)
    assert status == 400
    assert isinstance(refused, Refused)
    assert part in refused.reason
    assert found["error"]["message"] == refused.reason
    assert "\n" not in refused.reason


def test_requests_of_others_are_no_business_of_the_step(endpoint: Endpoint) -> None:
    assert post(endpoint, body(), key="other")[0] == 401
    assert post(endpoint, body(), key="")[0] == 401
    assert post(endpoint, body(), path="/v1/chat/completions")[0] == 404
    assert endpoint.events.empty()
    assert post(endpoint, body(), session="")[0] == 400
    assert "X-Session-ID" in endpoint.events.get(timeout=60).reason


def test_a_request_without_a_length_or_with_too_great_a_one_is_not_read(
    endpoint: Endpoint,
) -> None:
    for length in ("", "Content-Length: 99999999999\r\n", "Content-Length: -5\r\n"):
        with socket.create_connection(("127.0.0.1", int(endpoint.url.rpartition(":")[2]))) as peer:
            peer.sendall(f"POST /inference/v1/generate HTTP/1.1\r\n{length}\r\n".encode())
            assert b" 413 " in peer.recv(200)
    assert endpoint.events.empty()


def test_who_waits_is_answered_when_the_endpoint_closes() -> None:
    endpoint = Endpoint("secret", STOPS)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(post(endpoint, body())))
    thread.start()
    assert isinstance(endpoint.events.get(timeout=60), Asked)
    endpoint.close()
    thread.join()
    assert found == [(400, {"error": found[0][1]["error"]})]
    assert found[0][1]["error"]["message"] == "the endpoint is closed"


def test_a_peer_that_goes_away_is_not_told_on_the_terminal(
    endpoint: Endpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    content = json.dumps(body()).encode()
    head = (
        "POST /inference/v1/generate HTTP/1.1\r\nAuthorization: Bearer secret\r\n"
        f"X-Session-ID: s\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(endpoint.url.rpartition(":")[2]))) as peer:
        peer.sendall(head.encode() + content)
        asked = endpoint.events.get(timeout=60)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    asked.answer(Turn((5,), (-0.1,), True))
    endpoint.close()
    assert capfd.readouterr() == ("", "")
