"""vLLM's own weight transfer: what the code calls is there, and its trainer's side really runs.

There is no NCCL here: the communicator and the packed broadcast are stand-ins.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vllm: make test-vllm")

import nccl_stub
from tutelage.config.sampling import SamplingConfig
from tutelage.data.tasks import LedgerTask
from tutelage.models.load import load_model, load_tokenizer
from tutelage.rollout import nccl_transfer
from tutelage.rollout.nccl_transfer import NCCLTransfer, Weights
from tutelage.rollout.request import RolloutRequest
from vllm_stub import FakeVLLM, replicas_of, sampler_of

# vLLM and what it imports warn about a CPU, so that tests import it.
pytestmark = pytest.mark.filterwarnings("ignore")
REQUEST = RolloutRequest(LedgerTask(1).prompts(0, 2, 0), SamplingConfig(max_new_tokens=2), (0,))


@pytest.fixture
def servers(tiny_models: Path) -> Iterator[list[FakeVLLM]]:
    with replicas_of(tiny_models, 2) as found:
        yield found


class Communicator:
    """Of the trainer, in place of PyNcclCommunicator."""

    def __init__(self, wire: nccl_stub.Wire) -> None:
        self.wire = wire

    def destroy(self) -> None:
        self.wire.is_aborted.set()


def join(init_info: Any) -> Communicator:
    # A link before may have had the same free port, and its wire is aborted.
    wire = nccl_stub.WIRES[init_info.master_port] = nccl_stub.Wire()
    assert wire.has_joined.wait(60)
    return Communicator(wire)


def broadcast(*, iterator: Any, group: Communicator, post_iter_func: Any, **others: Any) -> None:
    assert others["buffer_size_bytes"] == nccl_transfer._BUFFER_BYTES
    for item in iterator:
        group.wire.put(post_iter_func(item))


def test_vllms_own_engine_sends_the_weights(
    servers: list[FakeVLLM], tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.weight_transfer import nccl_engine
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", join)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    model = load_model(str(tiny_models / "student"), "float32")
    for weight in model.parameters():
        weight.data.mul_(1.01)
    urls = [server.url for server in servers]
    drawing = sampler_of(
        model, load_tokenizer(str(tiny_models / "student")), urls, NCCLTransfer(), 1
    )
    drawing.sample(REQUEST)
    for server in servers:
        held = dict(server.model.named_parameters())
        assert all(torch.equal(held[name], weight) for name, weight in model.named_parameters())
        for path, body in server.asked:
            if path == "/init_weight_transfer_engine":
                NCCLWeightTransferInitInfo(**body["init_info"])
            if path == "/update_weights":
                nccl_engine.NCCLWeightTransferUpdateInfo(**body["update_info"])
    servers[1].gone_at = "/update_weights"
    drawn = drawing.sample(REQUEST)
    assert {rollout.replica for rollout in drawn} == {0}


def test_what_is_called_is_there() -> None:
    from vllm.distributed.weight_transfer import (
        ParamMeta,
        VLLMWeightSyncClient,
        WeightSource,
    )

    info, engine = nccl_transfer._vllm_classes()
    wanted = {"master_address", "master_port", "world_size", "packed_buffer_size_bytes", "rank"}
    assert wanted <= {field.name for field in fields(info)}
    assert wanted <= {field.name for field in fields(nccl_stub.NCCLTrainerInitInfo)}
    ours = nccl_stub.NCCLTrainerWeightTransferEngine
    for name in ("trainer_init", "send_weights", "shutdown"):
        theirs, stands_in = (inspect.signature(getattr(one, name)) for one in (engine, ours))
        assert list(theirs.parameters) == list(stands_in.parameters)
    client: Any = nccl_transfer._Link
    for name, method in inspect.getmembers(VLLMWeightSyncClient, inspect.isfunction):
        if not name.startswith("_"):
            wanted_of = inspect.signature(method).parameters
            assert list(inspect.signature(getattr(client, name)).parameters) == list(wanted_of)
    assert set(WeightSource.__abstractmethods__) <= set(dir(Weights))
    meta = [field.name for field in fields(ParamMeta)]
    assert meta == list(nccl_transfer._Shape._fields)


def test_the_endpoints_are_there() -> None:
    from vllm.entrypoints.rl.online.api_router import router as weight_routes
    from vllm.entrypoints.serve.dev.cache.api_router import router as cache_routes

    known = {
        (route.path, method)  # type: ignore[attr-defined]
        for route in (*weight_routes.routes, *cache_routes.routes)
        for method in route.methods  # type: ignore[attr-defined]
    }
    for path in (
        *("/pause", "/shutdown_weight_transfer_engine", "/init_weight_transfer_engine"),
        *("/start_weight_update", "/update_weights", "/finish_weight_update"),
        *("/reset_prefix_cache", "/resume"),
    ):
        assert (path, "POST") in known
    assert ("/get_world_size", "GET") in known
