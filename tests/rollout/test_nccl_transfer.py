"""Weights to vLLM servers by vLLM's transfer engine: requests, order, and replicas that are lost.

NCCL and the servers are stand-ins; `test_vllm_transfer.py` has vLLM's own engine.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import nccl_stub
from tiny import tiny_config
from tiny_runs import are_equal, weights_of
from tutelage.config.sampling import SamplingConfig
from tutelage.data.tasks import LedgerTask
from tutelage.errors import ConfigError, MissingExtraError, ModelError
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.lora import add_lora, full_shapes, full_weights
from tutelage.rollout import nccl_transfer, replicas
from tutelage.rollout.http_client import Limits
from tutelage.rollout.nccl_transfer import NCCLTransfer, require_nccl
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.rollout.request import RolloutRequest
from tutelage.setup import components
from tutelage.train.loop import train
from vllm_stub import QUICK, FakeVLLM, engine_of, replicas_of, sampler_of

REQUEST = RolloutRequest(LedgerTask(1).prompts(0, 3, 0), SamplingConfig(max_new_tokens=2), (0,))
FIRST = ["/pause", "/get_world_size", "/shutdown_weight_transfer_engine"]
UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
LAST = ["/reset_prefix_cache", "/resume"]
WHOLE = [*FIRST, "/init_weight_transfer_engine", *UPDATE, *LAST]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = nccl_stub.NCCLTrainerInitInfo, nccl_stub.NCCLTrainerWeightTransferEngine
    monkeypatch.setattr(nccl_transfer, "_vllm_classes", lambda: classes)


@pytest.fixture(scope="module")
def student(tiny_models: Path) -> PreTrainedModel:
    return load_model(str(tiny_models / "student"), "float32")


@pytest.fixture
def servers(tiny_models: Path) -> Iterator[list[FakeVLLM]]:
    with replicas_of(tiny_models, 3) as found:
        yield found


def sampler(
    servers: list[FakeVLLM], student: PreTrainedModel, min_replicas: int = 0
) -> ReplicaSampler:
    tokenizer, urls = load_tokenizer(student.name_or_path), [server.url for server in servers]
    return sampler_of(student, tokenizer, urls, NCCLTransfer(), min_replicas)


def about_weights(server: FakeVLLM) -> list[str]:
    return [p for p, _ in server.asked if p not in ("/v1/models", "/v1/completions")]


def holds(server: FakeVLLM, model: PreTrainedModel) -> bool:
    held = dict(server.model.named_parameters())
    return all(torch.equal(held[name], weight) for name, weight in full_weights(model))


def disturb(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data.add_(0.01 * torch.randn(weight.shape, generator=generator))


# --- what is sent ---------------------------------------------------------------------------------


def test_every_replica_is_connected_once_and_receives_the_weights_of_each_draw(
    servers: list[FakeVLLM], student: PreTrainedModel
) -> None:
    servers[2].worker.world_size = 4
    drawing = sampler(servers, student)
    first = drawing.sample(REQUEST)
    assert {rollout.replica for rollout in first} == {0, 1, 2}
    for server, workers in zip(servers, (1, 1, 4), strict=True):
        assert about_weights(server) == WHOLE
        (about,) = (body for path, body in server.asked if path == "/init_weight_transfer_engine")
        info = about["init_info"]
        assert (info["rank_offset"], info["world_size"]) == (1, 1 + workers)
        assert (info["master_address"], info["packed"]) == ("127.0.0.1", True)
        (update,) = (body for path, body in server.asked if path == "/update_weights")
        names = [name for name, _ in student.named_parameters()]
        assert update["update_info"]["names"] == names
        assert set(update["update_info"]["dtype_names"]) == {"float32"}
        server.asked.clear()
    disturb(student, 1)
    drawing.sample(REQUEST)
    for server in servers:
        assert about_weights(server) == ["/pause", *UPDATE, *LAST]
        assert holds(server, student)
        server.asked.clear()
    drawing.close()
    assert [about_weights(server) for server in servers] == [
        ["/shutdown_weight_transfer_engine"]
    ] * 3
    drawing = sampler(servers, student)  # the next run
    drawing.sample(REQUEST)
    assert about_weights(servers[0])[1:] == WHOLE


def test_an_adapter_is_added_to_what_is_sent(servers: list[FakeVLLM], tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "student"), "float32")
    add_lora(model, 2, 4.0)
    disturb(model, 2)  # of the adapter, too
    sent = [(name, weight.dtype, tuple(weight.shape)) for name, weight in full_weights(model)]
    assert list(full_shapes(model)) == sent
    sampler(servers[:1], model).sample(REQUEST)
    assert holds(servers[0], model)


def test_a_run_over_nccl_is_the_run_over_a_folder(
    servers: list[FakeVLLM], tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "Limits", lambda: QUICK)
    monkeypatch.setattr(components, "require_nccl", lambda device: None)
    monkeypatch.setattr("tutelage.setup.validate.require_nccl", lambda device: None)
    nccl = {"folder": "", "transfer": "nccl", "min_replicas": 1}
    for name, table in (
        ("folder", engine_of(servers[:1], tmp_path)),
        ("nccl", engine_of(servers[1:], tmp_path) | nccl),
    ):
        servers[2].gone_at = "/finish_weight_update"
        optimizer = {"learning_rate": 1e-2, "schedule": "constant"}
        config = tiny_config(tiny_models, tmp_path / name, engine=table, optimizer=optimizer)
        lines: list[str] = []
        train(config, log=lines.append)
    assert sum("is left out until the next start, 1 of 2 stay" in line for line in lines) == 1
    found = [weights_of(tmp_path / name / "student") for name in ("folder", "nccl")]
    assert are_equal(*found)


# --- replicas that are lost -----------------------------------------------------------------------


@pytest.mark.parametrize("phase", WHOLE[::2] + UPDATE[::2])
def test_a_replica_that_dies_in_a_phase_is_left_out_and_the_others_have_the_weights(
    servers: list[FakeVLLM], student: PreTrainedModel, phase: str
) -> None:
    servers[1].gone_at = phase
    drawing, lines = sampler(servers, student, 2), []
    drawing.replicas.join(drawing.replicas.group, lines.append)
    disturb(student, 3)
    drawn = drawing.sample(REQUEST)
    assert {rollout.replica for rollout in drawn} == {0, 2}
    assert holds(servers[0], student)
    assert holds(servers[2], student)
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: replica {servers[1].url} gave no usable reply in 1 tries")
    drawing.sample(REQUEST)
    assert [about_weights(server).count("/update_weights") for server in servers][::2] == [2, 2]


@pytest.mark.parametrize("phase", ["/init_weight_transfer_engine", "/update_weights"])
def test_a_replica_that_is_silent_in_a_phase_ends_in_one_line(
    servers: list[FakeVLLM], student: PreTrainedModel, phase: str
) -> None:
    servers[0].stuck_at = phase
    drawing = sampler(servers[:1], student)
    for client in drawing.replicas.clients:
        client.limits = Limits(deadline_s=1.0)
    with pytest.raises(ModelError, match=rf"{servers[0].url} gave no .* within 1 s") as bad:
        drawing.sample(REQUEST)
    assert "\n" not in str(bad.value)


def test_a_link_is_given_up_when_its_replica_was_lost_in_a_draw(
    servers: list[FakeVLLM], student: PreTrainedModel
) -> None:
    servers[1].num_left = 1
    drawing = sampler(servers, student, 2)
    drawing.sample(REQUEST)
    (wire,) = {id(w): w for w in [servers[1].worker.wire] if w is not None}.values()
    assert not wire.is_aborted.is_set()
    drawing.sample(REQUEST)
    assert wire.is_aborted.is_set()
    assert about_weights(servers[0]) == [*WHOLE, "/pause", *UPDATE, *LAST]


def test_what_nccl_reports_is_the_reason(
    servers: list[FakeVLLM], student: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("NCCL error:\nunhandled system error")

    monkeypatch.setattr(nccl_stub.NCCLTrainerWeightTransferEngine, "send_weights", fail)
    with pytest.raises(ModelError, match=r"that failed: NCCL error: unhandled system error\. N"):
        sampler(servers[:1], student).sample(REQUEST)


# --- where it cannot work -------------------------------------------------------------------------


def test_a_run_without_cuda_is_refused_before_a_server_is_asked(
    tiny_models: Path, tmp_path: Path
) -> None:
    engine = {"kind": "vllm_server", "urls": ["http://127.0.0.1:9"], "transfer": "nccl"}
    with pytest.raises(ConfigError, match=r"^engine\.transfer 'nccl' sends weights from a CUDA"):
        train(tiny_config(tiny_models, tmp_path, engine=engine), log=lambda line: None)


def test_what_nccl_cannot_work_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"from a CUDA device, got a run on cpu\. Use engine\.t"):
        require_nccl(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"engine\.transfer = 'nccl'"):
        require_nccl(torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"transfer of vLLM 0\.32, which cannot be loaded"):
        require_nccl(torch.device("cuda"))
