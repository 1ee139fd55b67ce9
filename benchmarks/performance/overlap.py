"""Steps with vLLM servers in turns with learning and beside it, on servers that only wait.

    python benchmarks/performance/overlap.py  # about three minutes, little CPU

Two servers answer as vLLM does, each completion after `draw` seconds and with tokens at random;
learning waits for `learn` seconds and then does its work. Of each pair of waits, runs with
`engine.max_staleness` 0 and 1 take the same number of steps; the first two are not counted. `draw`
in the results is measured from the first request of a draw to its last reply, `learn` from then on
to the end of the step, so that `ratio` = step / max(draw, learn) holds all that the overlap costs:
the handover of weights, waits, and what the two threads take from each other.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

from objective import HERE, environment

PAIRS = ((3.0, 3.0), (3.0, 1.0), (1.0, 3.0))
"""Seconds of a draw, and of learning."""
PROMPTS, LENGTH = 32, 16


class Server(ThreadingHTTPServer):
    """Answers as vLLM does, after a while."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, seconds: float, num_ids: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seconds, self.num_ids = seconds, num_ids

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request."""
        match path:
            case "/v1/models":
                return {"object": "list", "data": [{"id": "student"}]}
            case "/collective_rpc":
                return {"results": [None]}
            case "/reset_prefix_cache":
                return {"success": True}
        time.sleep(self.seconds)
        chance, stops = random.Random(body["seed"]), body["stop_token_ids"]
        ids = [i for i in range(self.num_ids) if i not in stops]
        count = body["max_tokens"]
        choice = {
            "index": 0,
            "token_ids": chance.choices(ids, k=count),
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": [-1.0] * count},
            "finish_reason": "length",
        }
        return {"object": "text_completion", "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        """Reply to a request without a body."""
        self._reply({})

    def do_POST(self) -> None:
        """Reply to a request with one."""
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, body: dict[str, Any]) -> None:
        content = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(seconds: float, num_ids: int) -> Iterator[str]:
    """The address of a server while it runs."""
    server = Server(seconds, num_ids)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Watch:
    """Seconds of the draws, of learning and of whole steps."""

    def __init__(self, learn_s: float) -> None:
        self.draws: list[float] = []
        self.learning: list[float] = []
        self.steps: list[float] = []
        self._learn_s, self._drawn, self._last = learn_s, 0.0, 0.0

    def draw(self, draw: Any, *given: Any) -> Any:
        """A draw, in whatever thread."""
        start = time.perf_counter()
        try:
            return draw(*given)
        finally:
            self.draws.append(time.perf_counter() - start)

    def pack(self, pack: Any, *given: Any) -> Any:
        """What comes first after the rollouts are there."""
        self._drawn = time.perf_counter()
        return pack(*given)

    def update(self, update: Any, *given: Any) -> Any:
        """The updates of a step, after a wait."""
        time.sleep(self._learn_s)
        return update(*given)

    def take(self, take: Any, *given: Any) -> Any:
        """A step, which lasts from the end of the one before it to its own end."""
        metrics = take(*given)
        now = time.perf_counter()
        self.learning.append(now - self._drawn)
        self.steps.append(now - self._last)
        self._last = now
        return metrics


def run(draw_s: float, learn_s: float, staleness: int, num_steps: int) -> dict[str, Any]:
    """Medians over the steps of a run."""
    from tutelage.config.parse import load_config
    from tutelage.models.load import load_tokenizer
    from tutelage.rollout.replica_sampler import ReplicaSampler
    from tutelage.train.loop import train
    from tutelage.train.step import Step

    student = "package:tutelage/assets/ledger-overconfident"
    num_ids = len(load_tokenizer(student))
    watch, patch = Watch(learn_s), mock.patch.object
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        urls = [stack.enter_context(serving(draw_s, num_ids)) for _ in range(2)]
        values = {
            "out": f"{folder}/run",
            "engine.kind": "vllm_server",
            "engine.urls": json.dumps(urls),
            "engine.folder": f"{folder}/weights",
            "engine.max_staleness": staleness,
            "engine.max_logprob_gap": 1000.0,  # the servers have no model
            "student.model": student,
            "prompts_per_step": PROMPTS,
            "sampling.max_new_tokens": LENGTH,
            "num_steps": num_steps + 2,
            "checkpoint_every": 0,
            "evaluation.num_problems": 0,
            "recording.every": 0,
        }
        path = HERE.parent / "configs" / "examples" / "ledger.toml"
        config = load_config(str(path), [f"{key}={value}" for key, value in values.items()])
        for target, name in (
            (ReplicaSampler, "_draw"),
            (Step, "pack"),
            (Step, "update"),
            (Step, "take"),
        ):
            inner, watched = getattr(target, name), getattr(watch, name.strip("_"))
            stack.enter_context(
                patch(target, name, lambda *given, w=watched, i=inner: w(i, *given))
            )
        train(config, log=lambda _: None)
    steps, learning = watch.steps[2:], watch.learning[2:]
    median = {
        "step_s": statistics.median(steps),
        "draw_s": statistics.median(watch.draws[2:]),
        "learn_s": statistics.median(learning),
    }
    ratio = median["step_s"] / max(median["draw_s"], median["learn_s"])
    return median | {"ratio": ratio, "step_s_of_all": steps}


def main() -> None:
    """Run the benchmark, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each run")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    record, found = environment(arguments), []
    print(f"{'draw':>6}{'learn':>7}{'staleness':>11}{'step s':>9}{'ratio':>7}")
    for draw_s, learn_s in PAIRS:
        for staleness in (0, 1):
            arm = run(draw_s, learn_s, staleness, arguments.steps)
            head = {"waits_s": [draw_s, learn_s], "max_staleness": staleness}
            found.append(head | arm)
            cells = f"{draw_s:6.1f}{learn_s:7.1f}{staleness:11}"
            print(f"{cells}{arm['step_s']:9.3f}{arm['ratio']:7.3f}", flush=True)
    out = arguments.out / f"overlap-{record['date'][:10]}.json"
    out.write_text(json.dumps(record | {"arms": found}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
