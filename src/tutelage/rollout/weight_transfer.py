"""How a student's weights reach vLLM servers, and the way over a file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from safetensors.torch import save_file

from tutelage.errors import RunError, remedy
from tutelage.files.atomic import new_file
from tutelage.models.lora import full_weights
from tutelage.rollout.http_client import Client, NoReply, Schema, Strict, parse, run_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "model.safetensors"


class WeightTransfer(Protocol):
    """Hands a student's weights over to replicas; one process of a run uses it."""

    def send(self, model: PreTrainedModel, clients: Mapping[int, Client]) -> dict[int, str]:
        """Give every replica the present weights, an adapter added to them.

        Args:
            model: the student.
            clients: those of the replicas, by their numbers.

        Returns:
            Numbers of replicas that do not have the weights, with what was wrong.

        Raises:
            ModelError: a replica refuses what it is asked.
            RunError: the weights cannot be written.
        """

    def close(self) -> None:
        """Release what was taken; the replicas stay."""


class Success(Strict):
    """The reply to a request that reports no more than that it was done."""

    success: Literal[True]


class _Results(Strict):
    results: list[None]


def ask_all(
    clients: Mapping[int, Client], *requests: tuple[str, dict[str, Any] | None, type[Schema]]
) -> tuple[dict[int, Schema], dict[int, str]]:
    """Send requests one after the other to every replica, to all at the same time.

    Returns:
        The reply to the last request by the replica's number, and what was wrong with others.
    """

    async def ask(client: Client) -> Schema | NoReply:
        try:
            for path, body, schema in requests:
                reply = await client.send(path, body, partial(parse, schema=schema))
        except NoReply as error:
            return error
        return reply

    replies = run_all([(client, partial(ask, client)) for client in clients.values()])
    found = dict(zip(clients, replies, strict=True))
    lost = {n: reply.reason for n, reply in found.items() if isinstance(reply, NoReply)}
    return {n: r for n, r in found.items() if not isinstance(r, NoReply)}, lost


class FolderTransfer:
    """Writes the weights into a file, which every replica reads.

    Args:
        folder: where; every replica must see it under the same name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def send(self, model: PreTrainedModel, clients: Mapping[int, Client]) -> dict[int, str]:
        """As `WeightTransfer.send`; the file is written once for all."""
        self._write(model)
        order = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        return ask_all(
            clients, ("/collective_rpc", order, _Results), ("/reset_prefix_cache", {}, Success)
        )[1]

    def close(self) -> None:
        """Remove the file that was written last."""
        (self.folder / _NAME).unlink(missing_ok=True)

    def _write(self, model: PreTrainedModel) -> None:
        weights = {name: weight.cpu().contiguous() for name, weight in full_weights(model)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self.folder / _NAME, is_durable=False) as new:
                save_file(weights, new, {"format": "pt"})
        except OSError as error:
            raise RunError(
                f"weights cannot be written to engine.folder {self.folder}: {error.strerror}. "
                + remedy(error, "Name a folder that the server reads, too.")
            ) from None
