"""A worker with the protocol of `envs/verifiers_worker.py`, without verifiers; run as a program.

Its rollouts have a prompt of four ids and then turns of the student, with three ids after each.
The environment's name says what it does wrong, if anything.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from itertools import groupby
from operator import itemgetter
from typing import Any

BETWEEN = [5, 6, 7]
LOCK = threading.Lock()


def turns_of(rollout: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The ids before each run of generated ids of a rollout, and that run."""
    ids, turns = rollout.prompt_ids, []
    pairs = zip(rollout.completion_ids, rollout.is_generated, strict=True)
    for is_ours, run in groupby(pairs, itemgetter(1)):
        tokens = tuple(token for token, _ in run)
        if is_ours:
            turns.append((ids, tokens))
        ids += tokens
    return turns


def send(value: dict[str, Any]) -> None:
    with LOCK:
        print(json.dumps(value), flush=True)


def prompt_ids(task: int) -> list[int]:
    return [1, 3, 4 + task, 9]


def ask(url: str, session: str, ids: list[int], **settings: Any) -> dict[str, Any] | str:
    """What the endpoint generated, or why it denies a turn."""
    body = {"model": "student", "token_ids": ids, "sampling_params": {"logprobs": 1, **settings}}
    headers = {
        "Authorization": f"Bearer {os.environ['TUTELAGE_ENDPOINT_API_KEY']}",
        "X-Session-ID": session,
        "Content-Type": "application/json",
    }
    request = urllib.request.Request(
        f"{url}/inference/v1/generate", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["choices"][0]  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        with error:
            return f"Error code: {error.code} - {json.load(error)}"


def spoil(fault: str, branch: dict[str, Any]) -> None:
    """Change what was sampled."""
    last = len(branch["token_ids"]) - 1
    if fault == "other_ids":
        branch["token_ids"][last] = (branch["token_ids"][last] + 1) % 30
    if fault == "inserted_is_sampled":
        branch["sampled_mask"][branch["sampled_mask"].index(True) - 1] = True
    if fault == "sampled_is_inserted":
        branch["sampled_mask"][last] = False
    if fault == "other_logprobs":
        branch["logprobs"][last] -= 1e-9
    if fault == "short_mask":
        branch["sampled_mask"].pop()
    if fault == "no_ids":
        branch.update(token_ids=[], sampled_mask=[], logprobs=[])


def play(
    fault: str, arguments: dict[str, Any], order: dict[str, Any], name: str, task: int
) -> None:
    """One rollout."""
    session = f"{name}-{time.time_ns()}"
    if fault != "late":
        send({"began": {"name": name, "session": session}})
    time.sleep(arguments.get("delays", {}).get(name, 0.0))
    branch: dict[str, Any] = {
        "token_ids": prompt_ids(task),
        "sampled_mask": [False] * 4,
        "logprobs": [0.0] * 4,
        "messages": [message("user", f"task {task}", False)],
    }
    settings = {"temperature": 0.25} if fault == "other_temperature" else {}
    error = ""
    for turn in range(arguments.get("num_turns", 3)):
        if turn:
            add(branch, BETWEEN, [0.0] * 3, False)
            branch["messages"].append(message("tool", "error: none" if turn == 1 else "7", False))
        if fault == "late" and turn == 0:
            late = threading.Timer(0.1, send, [{"began": {"name": name, "session": session}}])
            late.start()
        choice = ask(order["url"], session, branch["token_ids"], **settings)
        if isinstance(choice, str):
            del branch["token_ids"][-3:], branch["sampled_mask"][-3:], branch["logprobs"][-3:]
            branch["messages"].pop()
            error = f"ProviderError: {choice}"
            break
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        add(branch, choice["token_ids"], logprobs, True)
        branch["messages"].append(message("assistant", "", True, 1))
    spoil(fault, branch)
    trace = {
        "error": f"TaskError: no such sum: {error}" if fault == "error" else error,
        "is_truncated": False,
        "stop": "agent_completed",
        "reward": arguments.get("reward", 0.5 + task),
        "rewards": {"is_right": 1.0},
        "metrics": {"num_calls": 2.0},
        "branches": [branch] * (2 if fault == "two_branches" else 1),
    }
    traces = [trace] * {"two_traces": 2, "no_trace": 0}.get(fault, 1)
    send({"rollout": {"name": name, "error": "", "traces": traces}})


def add(branch: dict[str, Any], ids: list[int], logprobs: list[float], is_sampled: bool) -> None:
    branch["token_ids"] += ids
    branch["sampled_mask"] += [is_sampled] * len(ids)
    branch["logprobs"] += logprobs


def message(role: str, content: str, is_sampled: bool, num_calls: int = 0) -> dict[str, Any]:
    return {"role": role, "content": content, "is_sampled": is_sampled, "num_calls": num_calls}


def run(fault: str, arguments: dict[str, Any], order: dict[str, Any]) -> None:
    if fault == "dies":
        print("no more memory", file=sys.stderr)
        sys.exit(3)
    if fault == "hangs":
        threading.Event().wait()
    if fault == "no_json":
        print("hello", flush=True)
    if fault == "other_fields":
        send({"rollout": {"name": "0-0", "tokens": []}})
    if fault == "unordered":
        send({"began": {"name": "7-7", "session": "x"}})
    if fault == "says_error":
        send({"error": "ValueError: no\nsuch task"})
    if fault == "forgets":
        order["rollouts"].pop()
    if fault in ("no_json", "other_fields", "unordered", "says_error"):
        threading.Event().wait()
    threads = [
        threading.Thread(target=play, args=(fault, arguments, order), kwargs=rollout)
        for rollout in order["rollouts"]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    send({"num_rollouts": len(threads)})


def main() -> None:
    send({"ready": True})
    fault, arguments = "", {}
    for line in sys.stdin:
        ((kind, values),) = json.loads(line).items()
        if kind == "version":
            send({"version": "0.4.0"})
        elif kind == "open":
            fault, arguments = values["environment"], values["arguments"]
            if fault == "unknown":
                send({"error": "ModuleNotFoundError: taskset 'unknown' not found"})
            send({"num_tasks": arguments.get("num_tasks", 5)})
        elif kind == "tasks":
            span = range(values["start"], min(values["stop"], arguments.get("num_tasks", 5)))
            send({"tasks": [f"{i}+{i}=" for i in span]})
        else:
            run(fault, arguments, values)


if __name__ == "__main__":
    main()
