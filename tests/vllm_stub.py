"""A server that answers as vLLM does, from a model in this process."""

from __future__ import annotations

import base64
import copy
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from nccl_stub import Worker
from patience import HANG_S
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.tokenizers import stop_ids, vocabulary_size
from tutelage.rollout.http_client import Limits
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.rollout.replicas import Replicas
from tutelage.rollout.vllm_server import VLLMServerSampler
from tutelage.rollout.weight_transfer import FolderTransfer, WeightTransfer

QUICK = Limits(num_tries=2, first_delay_s=0.01)
Change = Callable[[dict[str, Any]], None]


class FakeVLLM(ThreadingHTTPServer):
    """Answers as vLLM does, from weights that it reads when it is told to."""

    daemon_threads = True

    def __init__(self, model: PreTrainedModel, stops: frozenset[int], num_ids: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = copy.deepcopy(model)
        self.stops = stops
        self.num_ids = num_ids
        self.reads_weights = True
        self.change: Change | None = None
        """Spoils completions."""
        self.refusal: Callable[[dict[str, Any]], str] = lambda body: ""
        """Why a request is wrong, which is answered with status 400."""
        self.name_of: Callable[[int], str] | None = None
        """Text of an id in lists of log-probabilities; None names ids where that is asked for."""
        self.most_logprobs = 1 << 20
        """Ids that it gives of each token at most."""
        self.max_model_len: int | None = None
        self.num_left: int | None = None
        """Completions after which it answers nothing any more."""
        self.num_open: int | None = None
        """Completions that are answered; others wait for ever."""
        self.gone_at = self.stuck_at = ""
        """Path of a request from which on it answers nothing, or that waits for ever."""
        self.worker = Worker(self.model)
        self.is_closed = threading.Event()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def is_gone(self, path: str) -> bool:
        """Whether a request gets no answer, as from a process that died."""
        with self.lock:
            if path == self.gone_at:
                self.num_left = 0
            if self.num_left and path == "/v1/completions":
                self.num_left -= 1
                return False
            return self.num_left == 0

    def is_stuck(self, path: str) -> bool:
        """Whether a request has to wait for ever."""
        if path == self.stuck_at:
            return True
        with self.lock:
            if self.num_open is None or path != "/v1/completions":
                return False
            self.num_open -= 1
            return self.num_open < 0

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.asked.append((path, body))
            about_weights = self.worker.answer(path, body)
            if about_weights is not None:
                return about_weights
            match path:
                case "/v1/models":
                    about = {"id": "student", "max_model_len": self.max_model_len}
                    return {"object": "list", "data": [about]}
                case "/collective_rpc":
                    if self.reads_weights:
                        file = Path(body["kwargs"]["weights_path"]) / "model.safetensors"
                        self.model.load_state_dict(load_file(file), strict=False)
                    return {"results": [None]}
                case "/reset_prefix_cache":
                    return {"success": True}
                case "/pooling":
                    reply = self.pool(body)
                    if self.change is not None:
                        self.change(reply)
                    return reply
            if path == "/generate":
                reply = self.generate(body)
            elif body.get("echo"):
                reply = self.echo(body)
            else:
                reply = self.score(body) if "prompt_logprobs" in body else self.complete(body)
        if self.change is not None:
            self.change(reply)
        return reply

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body["seed"])
        ids, logprobs, written = list(body["prompt"]), [], 0
        while written < body["max_tokens"]:
            log_p = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            # The head's padding rows are nearly never drawn by a trained model.
            log_p = log_p[: self.num_ids].log_softmax(-1)
            token = int(torch.multinomial(log_p.exp(), 1, generator=generator))
            logprobs.append(float(log_p[token]))
            ids.append(token)
            written += 1
            if token in self.stops:
                break
        choice = {
            "index": 0,
            "text": "",
            "token_ids": ids[-written:],
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": logprobs},
            "finish_reason": "stop" if ids[-1] in self.stops else "length",
        }
        return {"object": "text_completion", "model": "student", "choices": [choice]}

    @torch.no_grad()
    def pool(self, body: dict[str, Any]) -> dict[str, Any]:
        """Final hidden states of all ids."""
        ids = body["input"]
        hidden = self.model.model(torch.tensor([ids])).last_hidden_state[0]
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[body["embed_dtype"]]
        content = hidden.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        return {
            "id": f"pooling-{body['request_id']}",
            "model": "student",
            "data": [{"index": 0, "object": "pooling", "data": base64.b64encode(content).decode()}],
            "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids)},
        }

    @torch.no_grad()
    def score(self, body: dict[str, Any]) -> dict[str, Any]:
        """The likeliest ids at each place of the prompt, and the id that stands there."""
        ids, known = body["prompt"], [None]
        # A trained model gives its head's padding rows nearly nothing.
        log_p = self.model(torch.tensor([ids])).logits[0, :, : self.num_ids].log_softmax(-1)
        for row, token in zip(log_p, ids[1:], strict=False):
            top = row.topk(body["prompt_logprobs"])
            likeliest = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            numbers = {token: float(row[token])} | likeliest
            known.append({str(i): {"logprob": x, "rank": 1} for i, x in numbers.items()})
        choice = {"index": 0, "prompt_token_ids": ids, "prompt_logprobs": known}
        return {"object": "text_completion", "model": "student", "choices": [choice]}

    @torch.no_grad()
    def _tops(self, ids: list[int], k: int) -> Iterator[tuple[float, dict[int, float]]]:
        """Of each token but the first, its log-probability and those of the k likeliest ids."""
        log_p = self.model(torch.tensor([ids])).logits[0, :, : self.num_ids].log_softmax(-1)
        for row, token in zip(log_p, ids[1:], strict=False):
            top = row.topk(min(k, self.most_logprobs))
            yield (
                float(row[token]),
                dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
            )

    def echo(self, body: dict[str, Any]) -> dict[str, Any]:
        """The prompt and one token more, as OpenAI's completions list them."""
        ids = [*body["prompt"], 0]
        name = self.name_of
        if name is None:
            name = "token_id:{}".format if "return_tokens_as_token_ids" in body else str
        rows = list(self._tops(ids, body["logprobs"]))
        listed = {
            "tokens": [name(token) for token in ids],
            "token_logprobs": [None, *(log_q for log_q, _ in rows)],
            "top_logprobs": [None, *({name(i): x for i, x in top.items()} for _, top in rows)],
            "text_offset": [0] * len(ids),
        }
        choice = {"index": 0, "text": "", "logprobs": listed, "finish_reason": "length"}
        return {"object": "text_completion", "model": "student", "choices": [choice]}

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """The prompt as SGLang lists it, from the beginning if that is asked for."""
        ids = body["input_ids"] if body["logprob_start_len"] == 0 else body["input_ids"][-1:]
        rows = list(self._tops(ids, body["top_logprobs_num"]))
        pairs = zip(ids[1:], rows, strict=True)
        meta = {
            "id": "a-request",
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(ids),
            "input_token_logprobs": [
                [None, ids[0], None],
                *([log_q, token, None] for token, (log_q, _) in pairs),
            ],
            "input_top_logprobs": [
                None,
                *([[x, i, None] for i, x in top.items()] for _, top in rows),
            ],
        }
        return {"text": "", "meta_info": meta}


class _Handler(BaseHTTPRequestHandler):
    server: FakeVLLM

    def _reply(self, body: dict[str, Any]) -> None:
        if self.server.is_gone(self.path):
            self.close_connection = True
            return
        if self.server.is_stuck(self.path):
            self.server.is_closed.wait(HANG_S)
            self.close_connection = True
            return
        refusal = self.server.refusal(body)
        answer = {"error": refusal} if refusal else self.server.answer(self.path, body)
        content = json.dumps(answer).encode()
        self.send_response(400 if refusal else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(BrokenPipeError):  # the client gave up because of another reply
            self.wfile.write(content)

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(model: PreTrainedModel, stops: frozenset[int], num_ids: int) -> Iterator[FakeVLLM]:
    """A server while it runs."""
    fake = FakeVLLM(model, stops, num_ids)
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        fake.is_closed.set()
        fake.shutdown()
        fake.server_close()
        thread.join()


def sampler_of(
    model: Any,
    tokenizer: Any,
    urls: Sequence[str],
    by: Path | WeightTransfer,
    min_replicas: int = 0,
) -> ReplicaSampler:
    """A sampler that gives a server up soon; weights are handed over in a folder, or otherwise."""
    transfer = FolderTransfer(by) if isinstance(by, Path) else by
    replicas = Replicas(urls, transfer, 4, QUICK, min_replicas)
    inner = VLLMServerSampler(model, tokenizer, replicas)
    return ReplicaSampler(inner, replicas, model)


@contextmanager
def replicas_of(models: Path, count: int) -> Iterator[list[FakeVLLM]]:
    """Servers of the student in a folder of models."""
    folder = str(models / "student")
    student, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    known = stop_ids(student, tokenizer), vocabulary_size(tokenizer)
    with ExitStack() as stack:
        yield [stack.enter_context(serving(student, *known)) for _ in range(count)]


def engine_of(servers: Sequence[FakeVLLM], out: Path, **changes: Any) -> dict[str, Any]:
    """The table `engine` of a run."""
    urls = [server.url for server in servers]
    return {"kind": "vllm_server", "urls": urls, "folder": str(out / "weights")} | changes
