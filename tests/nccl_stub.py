"""vLLM's weight transfer without NCCL: its trainer's side, its server's side, and what is between.

The classes have the names and signatures of vLLM 0.32 as far as they are used;
`tests/rollout/test_vllm_transfer.py` compares them where vLLM is installed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from patience import HANG_S

SHORT_S = 0.01


class Wire:
    """A communicator of two: what one puts the other gets, and either may wait for ever."""

    def __init__(self) -> None:
        self.has_joined = threading.Event()
        self.is_aborted = threading.Event()
        self.parts: queue.Queue[torch.Tensor] = queue.Queue(maxsize=1)

    def put(self, tensor: torch.Tensor) -> None:
        while not self.is_aborted.is_set():
            with suppress(queue.Full):
                self.parts.put(tensor.clone(), timeout=SHORT_S)
                break

    def get(self) -> torch.Tensor:
        return self.parts.get(timeout=HANG_S)


WIRES: dict[int, Wire] = {}
"""By the port of the one that sends."""


@dataclass
class NCCLTrainerInitInfo:
    """As vLLM's."""

    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    packed_buffer_size_bytes: int = 2**30
    packed_num_buffers: int = 2
    rank: int = 0


class NCCLTrainerWeightTransferEngine:
    """As vLLM's: the order of requests, and what waits for what."""

    def __init__(self, *, client: Any, source: Any, wire: Wire) -> None:
        self.client, self.source, self.wire = client, source, wire

    @classmethod
    def trainer_init(
        cls, init_info: NCCLTrainerInitInfo, *, client: Any, source: Any = None
    ) -> NCCLTrainerWeightTransferEngine:
        # A link before may have had the same free port, and its wire is aborted.
        wire = WIRES[init_info.master_port] = Wire()
        for_worker = {
            "master_address": init_info.master_address,
            "master_port": init_info.master_port,
            "rank_offset": 1,
            "world_size": init_info.world_size,
            "packed": init_info.packed,
            "packed_buffer_size_bytes": init_info.packed_buffer_size_bytes,
            "packed_num_buffers": init_info.packed_num_buffers,
        }
        with ThreadPoolExecutor(max_workers=1) as pool:
            joined = pool.submit(client.init_weight_transfer_engine, for_worker)
            wire.has_joined.wait(HANG_S)  # as NCCL does, also where nobody will join
            joined.result()
        return cls(client=client, source=source, wire=wire)

    def send_weights(self) -> None:
        known = self.source.metadata()
        info = {
            "names": [one.name for one in known],
            "dtype_names": [str(one.dtype).split(".")[-1] for one in known],
            "shapes": [list(one.shape) for one in known],
        }
        self.client.start_weight_update()
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            update = pool.submit(self.client.update_weights, info)
            for (name, tensor), one in zip(self.source, known, strict=True):
                assert (name, tensor.dtype, tuple(tensor.shape)) == tuple(one)
                self.wire.put(tensor)
            update.result()
        finally:
            pool.shutdown(wait=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.wire.is_aborted.set()


class Worker:
    """What a server does with requests about weights; each is refused out of its order."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.wire: Wire | None = None
        self.is_updated = False
        self.received: dict[str, torch.Tensor] = {}
        self.world_size = 1

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """None for a request that is about something else."""
        match path:
            case "/get_world_size":
                return {"world_size": self.world_size}
            case "/pause":
                return {"status": "paused"}
            case "/resume":
                assert not self.is_updated
                return {"status": "resumed"}
            case "/shutdown_weight_transfer_engine":
                assert not self.is_updated
                self.wire = None
            case "/init_weight_transfer_engine":
                assert self.wire is None
                self.wire = WIRES[body["init_info"]["master_port"]]
                self.wire.has_joined.set()
            case "/start_weight_update":
                assert self.wire is not None
                assert not self.is_updated
                self.is_updated = True
            case "/update_weights":
                assert self.is_updated
                self.received = dict(self.parts(body["update_info"]))
            case "/finish_weight_update":
                self.model.load_state_dict(self.received, strict=False)
                self.is_updated = False
            case _:
                return None
        return {"message": "done"}

    def parts(self, info: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        assert self.wire is not None
        for name, dtype, shape in zip(*info.values(), strict=True):
            tensor = self.wire.get()
            assert tensor.dtype == getattr(torch, dtype)
            assert list(tensor.shape) == shape
            yield name, tensor
