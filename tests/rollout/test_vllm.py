"""vLLM really runs here; `make test-vllm` makes the environment for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("vllm", reason="needs vllm: make test-vllm")

from patience import wait_until
from tiny import tiny_config
from tutelage.config.sampling import SamplingConfig
from tutelage.config.teachers import LogprobServerTeacher
from tutelage.data.batch import collate
from tutelage.data.tasks import LedgerTask
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import RunError
from tutelage.models.head import head, hidden_rows
from tutelage.models.load import load_model, load_tokenizer, save_model
from tutelage.models.lora import add_lora
from tutelage.models.teacher import Teacher
from tutelage.models.tokenizers import pad_id, vocabulary_size
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.rollout.replicas import Replicas
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.vllm_engine import VLLMSampler
from tutelage.rollout.vllm_server import VLLMServerSampler
from tutelage.rollout.weight_transfer import FolderTransfer
from tutelage.teachers.logprob import LogprobTeacher
from tutelage.teachers.logprob_api import CompletionsApi
from tutelage.train.loop import train

# vLLM and what it imports warn about a CPU; what is tested is what it computes.
pytestmark = pytest.mark.filterwarnings("ignore")
STUDENT = "package:tutelage/assets/ledger-overconfident"
PROMPTS = LedgerTask(5).prompts(0, 4, 0)
CONFIG = SamplingConfig(max_new_tokens=48, num_samples=4)


@pytest.fixture  # one at a time: vLLM has global state
def sampler() -> Iterator[VLLMSampler]:
    model, tokenizer = load_model(STUDENT, "float32"), load_tokenizer(STUDENT)
    sampler = VLLMSampler(model, tokenizer)
    yield sampler
    sampler.close()


def disturb(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data.add_(0.01 * torch.randn(weight.shape, generator=generator))


def largest_gap(sampler: VLLMSampler | ReplicaSampler, seed: int) -> float:
    """Largest difference in nats between vLLM's log-probabilities and those of transformers."""
    tokenizer = load_tokenizer(STUDENT)
    rollouts = sampler.sample(RolloutRequest(PROMPTS, CONFIG, (seed,)))
    batch = collate(rollouts, pad_id(tokenizer))
    with torch.no_grad():
        rows = head(sampler.model, hidden_rows(sampler.model, batch), vocabulary_size(tokenizer))
        log_p = torch.log_softmax(rows.block(0, batch.num_rows).double(), dim=-1)
    ours = log_p.gather(1, batch.tokens[:, None]).squeeze(1)
    said = torch.tensor([x for rollout in rollouts for x in rollout.logprobs])
    return float((ours - said).abs().max())


def test_after_a_sync_vllm_computes_what_transformers_does(sampler: VLLMSampler) -> None:
    assert largest_gap(sampler, 1) < 1e-4
    disturb(sampler.model, 1)
    assert largest_gap(sampler, 2) < 1e-4


def test_without_the_sync_the_difference_is_seen(
    sampler: VLLMSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler.sample(RolloutRequest(PROMPTS, CONFIG, (3,)))
    disturb(sampler.model, 2)
    monkeypatch.setattr(sampler, "_update_weights", lambda: None)
    assert largest_gap(sampler, 4) > 1e-2
    monkeypatch.undo()
    assert largest_gap(sampler, 4) < 1e-4


def test_completions_end_as_they_should_and_follow_the_seed(sampler: VLLMSampler) -> None:
    config = SamplingConfig(max_new_tokens=12, num_samples=2)
    first = sampler.sample(RolloutRequest(PROMPTS, config, (5,)))
    again = sampler.sample(RolloutRequest(PROMPTS, config, (5,)))
    other = sampler.sample(RolloutRequest(PROMPTS, config, (6,)))
    assert [r.completion_ids for r in first] == [r.completion_ids for r in again]
    assert [r.completion_ids for r in first] != [r.completion_ids for r in other]
    assert [(r.prompt.id, r.sample) for r in first] == [(p.id, s) for p in PROMPTS for s in (0, 1)]
    stop = sampler.tokenizer.eos_token_id
    for rollout in sampler.sample(RolloutRequest(PROMPTS, CONFIG, (7,))):
        assert rollout.is_truncated == (rollout.completion_ids[-1] != stop)
        assert stop not in rollout.completion_ids[:-1]
        assert len(rollout.logprobs) == len(rollout.completion_ids) <= 48


def test_an_adapter_is_merged_on_the_way(sampler: VLLMSampler) -> None:
    pytest.importorskip("peft")
    model = load_model(STUDENT, "float32")
    add_lora(model, rank=4, alpha=8.0)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.02)
    plain, sampler.model = sampler.model, model
    try:
        assert largest_gap(sampler, 8) < 1e-4
    finally:
        sampler.model = plain


LAUNCH = """
import vllm._custom_ops
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server.entry import main

bind = launcher.create_server_socket
launcher.create_server_socket = lambda address, **_: bind(address, reuse_port=True)
vllm._custom_ops._supports_onednn = False  # also in the worker, which imports this file again
if __name__ == "__main__":
    main()
"""
"""A CPU server whose weights can be replaced; on CUDA `vllm serve` is enough."""


@contextmanager
def held_port() -> Iterator[int]:
    """A port that nobody else can take: it stays bound, and vLLM's server shares what it binds."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def answers(url: str) -> bool:
    """Whether a server answers a request for this page."""
    with suppress(OSError), urllib.request.urlopen(url):
        return True
    return False


@contextmanager
def running(model: str, folder: Path, *options: str) -> Iterator[str]:
    """A vLLM server of a model, in a process of its own."""
    save_model(load_model(model, "float32"), load_tokenizer(model), folder / "served")
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **os.environ,
    }
    launcher = folder / "serve.py"
    launcher.write_text(LAUNCH)
    with held_port() as port:
        url, place = f"http://127.0.0.1:{port}", f"--host 127.0.0.1 --port {port}".split()
        command = [sys.executable, str(launcher), *place, "--model", str(folder / "served")]
        command += ["--dtype", "float32", "--enforce-eager", *options]
        with subprocess.Popen(command, env=environment, start_new_session=True) as process:
            try:
                wait_until(lambda: answers(f"{url}/health"), process)
                yield url
            finally:
                os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A vLLM server of the student."""
    folder = tmp_path_factory.mktemp("server")
    with running(STUDENT, folder, "--logprobs-mode", "raw_logprobs") as url:
        yield url


def sampler_of(server: str, folder: Path, model: PreTrainedModel) -> ReplicaSampler:
    """One that hands the model's weights to the server before it samples."""
    replicas = Replicas([server], FolderTransfer(folder / "weights"))
    inner = VLLMServerSampler(model, load_tokenizer(STUDENT), replicas)
    return ReplicaSampler(inner, replicas, model)


def test_a_server_reads_the_weights_it_is_given(server: str, tmp_path: Path) -> None:
    model = load_model(STUDENT, "float32")
    sampler = sampler_of(server, tmp_path, model)
    assert largest_gap(sampler, 1) < 1e-4
    disturb(model, 3)
    assert largest_gap(sampler, 2) < 1e-4
    sampler._push = lambda: None  # type: ignore[method-assign]
    disturb(model, 4)
    assert largest_gap(sampler, 3) > 1e-2


@pytest.mark.parametrize("way", ["vllm", "completions", "texts"])
def test_a_server_tells_the_log_probabilities_of_its_model(
    server: str, tmp_path: Path, way: str
) -> None:
    """By its own API, and by OpenAI's with ids or with texts as the names of tokens."""
    model, tokenizer = load_model(STUDENT, "float32"), load_tokenizer(STUDENT)
    # Other tests leave the server with weights of theirs.
    assert largest_gap(sampler_of(server, tmp_path, model), 1) < 1e-4
    with urllib.request.urlopen(f"{server}/v1/models") as reply:
        name = json.load(reply)["data"][0]["id"]
    api: Any = "vllm" if way == "vllm" else "completions"
    config = LogprobServerTeacher("logprob_server", name, server, api=api, num_logprobs=8)
    ids = tokenizer("12+34=46;5+5=10")["input_ids"]
    rollouts = [Rollout(Prompt(str(n), ""), 0, tuple(ids[:n]), tuple(ids[n:])) for n in (2, 5)]
    batch = collate(rollouts, 0)
    size = model.config.vocab_size
    local = Teacher(model, size)
    served = LogprobTeacher(config, size, torch.device("cpu"), tokenizer=tokenizer)
    if way == "texts":
        served._ways = (CompletionsApi(tokenizer, asks_for_ids=False),)
    with local.on_device(), served.on_device():
        found, wanted = served.forward(batch), local.forward(batch)
    log_q = wanted.block(0, batch.num_rows).log_softmax(-1)
    torch.testing.assert_close(found.log_q, log_q.topk(8).values, rtol=0, atol=1e-4)
    torch.testing.assert_close(log_q.gather(1, found.ids), found.log_q, rtol=0, atol=1e-4)
    tokens = log_q.gather(1, batch.tokens[:, None]).squeeze(1)
    torch.testing.assert_close(found.token_log_q, tokens, rtol=0, atol=1e-4)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_of_three_steps_trains_on_what_a_server_samples(
    server: str, tmp_path: Path, staleness: int
) -> None:
    folder = str(tmp_path / "weights")
    engine = {"kind": "vllm_server", "urls": [server], "folder": folder, "max_staleness": staleness}
    optimizer = {"learning_rate": 1e-3, "schedule": "constant"}
    steps = run(tmp_path, num_steps=3, engine=engine, optimizer=optimizer, checkpoint_every=1)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert [step["staleness_steps"] for step in steps] == [0, staleness, staleness]
    fresh = [step for step in steps if not step["staleness_steps"]]
    assert all(0 < step["engine_logprob_gap_nats"] < 1e-4 for step in fresh)
    stale = [step for step in steps if step["staleness_steps"]]
    assert all(0 < step["log_ratio_max_nats"] < 2 for step in stale)


def run(tmp_path: Path, **changes: Any) -> list[dict[str, Any]]:
    changes = {"engine": {"kind": "vllm"}} | changes
    teacher = "package:tutelage/assets/ledger-teacher"
    tables = {"student": {"model": STUDENT}, "teacher": {"model": teacher}}
    steps: list[dict[str, Any]] = []
    config = tiny_config(tmp_path, tmp_path / "run", **tables, **changes)
    train(config, log=lambda _: None, on_step=steps.append)
    return steps


def test_a_run_trains_on_what_vllm_writes(tmp_path: Path) -> None:
    steps = run(tmp_path, num_steps=2)
    assert [step["step"] for step in steps] == [1, 2]
    assert all(0 < step["engine_logprob_gap_nats"] < 1e-5 for step in steps)
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_a_run_stops_when_vllm_keeps_its_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLLMSampler, "_update_weights", lambda self: None)
    with pytest.raises(RunError, match="step 1 are not the student's"):
        run(tmp_path)


def test_an_exported_student_is_read_by_vllm_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a finished run, given to vLLM by name, continues as transformers does."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    table = {
        "student": {"model": STUDENT},
        "teacher": {"model": "package:tutelage/assets/ledger-teacher"},
    }
    train(tiny_config(tmp_path, tmp_path / "run", num_steps=1, **table), log=lambda _: None)
    folder = str(tmp_path / "run" / "student")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = list(tokenizer(PROMPTS[0].content).input_ids)
    llm = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=128, gpu_memory_utilization=0.1
    )
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=0)
    (result,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    theirs = result.outputs[0]
    start = torch.tensor([ids])
    ours = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=12, do_sample=False
    )
    assert theirs.token_ids == ours[0, len(ids) :].tolist()
    with torch.no_grad():
        log_p = model(ours).logits[0].log_softmax(-1)
    for place, (token, known) in enumerate(zip(theirs.token_ids, theirs.logprobs, strict=True)):
        assert abs(known[token].logprob - float(log_p[len(ids) - 1 + place, token])) < 1e-4
