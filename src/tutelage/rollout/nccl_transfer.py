"""A student's weights to vLLM servers over NCCL, by the weight-transfer engine of vLLM 0.32.

Every replica has a communicator of its own, of the sending process and the replica's workers. A
worker of vLLM that waits in a broadcast takes no other request (`shutdown_weight_transfer_engine`
stands in line behind it, and is refused during an update), and nothing watches NCCL for a lost
peer: in one communicator of all replicas, one that dies in a broadcast would take the others along.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from tutelage.errors import ConfigError, MissingExtraError, ModelError, TutelageError
from tutelage.models.lora import full_shapes, full_weights
from tutelage.rollout.http_client import (
    Client,
    NoReply,
    Schema,
    Strict,
    in_thread_within,
    parse,
    run_all,
)
from tutelage.rollout.weight_transfer import Success

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

_OPENED: list[Any] = []
"""vLLM's engines to the end of the process: none of their stores is destroyed with a replica on it.
"""

_BUFFER_BYTES = 256 * 2**20
"""Least size of a broadcast, which may be larger by one tensor; two are under way at a time."""


class _Message(Strict):
    message: str


class _Status(Strict):
    status: Literal["paused", "resumed"]


class _WorldSize(Strict):
    world_size: int


class _Shape(NamedTuple):
    """What vLLM calls ParamMeta."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """What vLLM calls a WeightSource: the student's weights, one after the other.

    Args:
        model: the student, on the device that sends.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def metadata(self) -> list[_Shape]:
        """What the iteration yields, without computing it."""
        return [_Shape(*known) for known in full_shapes(self.model)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and weights; an adapter is added to each layer as its turn comes."""
        return full_weights(self.model)


def require_nccl(device: torch.device) -> None:
    """Refuse what weights cannot be sent from over NCCL.

    Raises:
        ConfigError: the run is not on CUDA, or the installed vLLM has no such transfer.
        MissingExtraError: vLLM is not installed in the training process.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"engine.transfer 'nccl' sends weights from a CUDA device, got a run on {device.type}. "
            'Use engine.transfer = "folder".'
        )
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm", "engine.transfer = 'nccl'")
    try:
        _vllm_classes()
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        NCCLLibrary()
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            "engine.transfer 'nccl' needs NCCL and the weight transfer of vLLM 0.32, which cannot "
            f'be loaded: {reason}. Install vllm==0.32.0, or use engine.transfer = "folder".'
        ) from None


def _vllm_classes() -> tuple[Any, Any]:
    """vLLM's description of a communicator, and what sends through one."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerInitInfo,
        NCCLTrainerWeightTransferEngine,
    )

    return NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine


class NCCLTransfer:
    """Broadcasts the weights to the workers of one replica after the other.

    Nothing is repeated: a replica that fails a request, or is not done within the client's
    deadline, is aborted and counts as lost.
    """

    def __init__(self) -> None:
        self._links: dict[int, _Link] = {}

    def send(self, model: PreTrainedModel, clients: Mapping[int, Client]) -> dict[int, str]:
        """As `WeightTransfer.send`; links with replicas that are not asked for are given up."""
        for number in self._links.keys() - clients.keys():
            self._links.pop(number).abort()
        lost = {}
        for number, client in clients.items():
            link = self._links.pop(number, None) or _Link(client, model)
            try:
                with ExitStack() as failing:
                    failing.callback(link.abort)
                    link.send(model)
                    failing.pop_all()
            except NoReply as error:
                lost[number] = error.reason
            else:
                self._links[number] = link
        return lost

    def close(self) -> None:
        """Release the communicators here and in the replicas."""
        while self._links:
            self._links.popitem()[1].close()


class _Link:
    """The communicator with one replica's workers, and the requests vLLM's engine sends to it."""

    def __init__(self, client: Client, model: PreTrainedModel) -> None:
        self._client, self._weights = client.once(), Weights(model)
        self._engine: Any = None
        self._waits: Sequence[Future[Any]] = ()
        """Of this thread, for what the engine does in another."""
        self._requests: Sequence[Future[Any]] = ()
        self._failure: BaseException | None = None
        """That of a request, which the engine may not see because it waits for the replica."""

    def send(self, model: PreTrainedModel) -> None:
        """Give the replica the present weights.

        Raises:
            ModelError: it cannot be; `NoReply` where the replica or NCCL is the reason.
        """
        self._weights.model = model
        self._ask("/pause", {}, _Status)
        if model.device.type == "cuda":  # they are read on other streams than they were written on
            torch.cuda.synchronize(model.device)
        if self._engine is None:
            self._engine = self._within(self._open)
            _OPENED.append(self._engine)
        self._within(self._engine.send_weights)
        self._ask("/reset_prefix_cache", {}, Success)
        self._ask("/resume", {}, _Status)

    def abort(self) -> None:
        """End what is under way with a replica that may be gone; nothing is sent afterwards."""
        for request in self._requests:
            request.cancel()
        if self._engine is not None:
            self._engine.shutdown()
        del self._weights.model

    def close(self) -> None:
        """Release the communicator on both sides; a replica that is gone needs nothing."""
        with suppress(ModelError):  # otherwise released there when the next run connects
            self._ask("/shutdown_weight_transfer_engine", {}, _Message)
        self.abort()

    def _open(self) -> Any:
        info, engine = _vllm_classes()
        size = self._ask("/get_world_size", None, _WorldSize).world_size
        self._ask("/shutdown_weight_transfer_engine", {}, _Message)  # of a run before
        address, port = _own_address(self._client.url)
        about = info(
            master_address=address,
            master_port=port,
            world_size=1 + size,
            packed_buffer_size_bytes=_BUFFER_BYTES,
            rank=0,
        )
        return engine.trainer_init(about, client=self, source=self._weights)

    def _within(self, work: Callable[[], T]) -> T:
        """What a function returns that NCCL may keep waiting for ever, called in another thread.

        Raises:
            NoReply: a request of its failed, or it took too long, or NCCL failed.
        """
        url, seconds = self._client.url, self._client.limits.deadline_s
        task = partial(in_thread_within, seconds, self._on_device, work)
        try:
            result: T = run_all([(self._client, task)], on_start=self._wait_begun)[0]
        except CancelledError:
            raise self._failure or NoReply(url, "no transfer of weights: it was canceled") from None
        except TimeoutError:
            raise NoReply(url, f"no end of a transfer of weights within {seconds:.0f} s") from None
        except (TutelageError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:  # of NCCL, and of torch's store
            reason = " ".join(str(error).split())[:200]
            raise NoReply(url, f"a transfer of weights that failed: {reason}") from None
        return result

    def _on_device(self, work: Callable[[], T]) -> T:
        """A thread begins with device 0, and with gradients."""
        device = self._weights.model.device
        with torch.cuda.device(device.index if device.type == "cuda" else -1), torch.no_grad():
            return work()

    def _ask(self, path: str, body: dict[str, Any] | None, schema: type[Schema]) -> Schema:
        task = partial(self._client.send, path, body, partial(parse, schema=schema))
        reply: Schema = run_all([(self._client, task)], on_start=self._request_begun)[0]
        return reply

    def _wait_begun(self, waits: Sequence[Future[Any]]) -> None:
        self._waits = waits
        if self._failure is not None:
            waits[0].cancel()

    def _request_begun(self, requests: Sequence[Future[Any]]) -> None:
        self._requests = requests
        requests[0].add_done_callback(self._request_ended)

    def _request_ended(self, request: Future[Any]) -> None:
        if not request.cancelled() and (failure := request.exception()) is not None:
            self._failure = failure
            for waiting in self._waits:
                waiting.cancel()

    # --- what vLLM calls a VLLMWeightSyncClient ---------------------------------------------------

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the workers join the communicator."""
        self._ask("/init_weight_transfer_engine", {"init_info": init_info}, _Message)

    def start_weight_update(self) -> None:
        """Let the workers prepare for new weights."""
        self._ask("/start_weight_update", {}, _Message)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let the workers receive what is broadcast now; answered when they have it."""
        self._ask("/update_weights", {"update_info": update_info}, _Message)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let the workers use what they received."""
        version = {} if weight_version is None else {"weight_version": weight_version}
        self._ask("/finish_weight_update", version, _Message)


def _own_address(url: str) -> tuple[str, int]:
    """The address by which a server reaches this host, and a free port."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        server = socket.getaddrinfo(parts.hostname, port, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect(server)  # sends nothing
            address = str(route.getsockname()[0])
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as free:
            free.bind((address, 0))
            return address, int(free.getsockname()[1])
    except OSError as error:
        raise NoReply(url, f"no IPv4 address for NCCL: {error.strerror or error}") from None
