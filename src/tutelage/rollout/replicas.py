"""vLLM servers that hold the same weights, and which of them still give replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from pydantic import Field

from tutelage.errors import ConfigError, ModelError, TutelageError
from tutelage.rollout.http_client import Client, Limits, Strict, checked_url
from tutelage.rollout.weight_transfer import WeightTransfer, ask_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
_AT_START = "Nothing was sampled yet", "start the server, or correct engine.urls"
_AFTER_A_DRAW = "Nothing of this batch was kept", "run the command again to continue"


class _Model(Strict):
    id: str
    max_model_len: int | None = None


class _Models(Strict):
    object: Literal["list"]
    data: list[_Model] = Field(min_length=1, max_length=1)


class Group(Protocol):
    """The processes of a run that use the same replicas."""

    @property
    def index(self) -> int:
        """This process, from 0, which is the one that hands weights over."""

    def gathered(self, value: T) -> list[T]:
        """A value of every process, in their order; each of them waits for all."""


class OneProcess:
    """The group of a process that is alone."""

    index = 0

    def gathered(self, value: T) -> list[T]:
        """The value."""
        return [value]


class LostReplicaError(Exception):
    """A replica gave no usable reply, so that the draw it took part in has failed."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number
        self.reason = reason


def replica_addresses(urls: Sequence[str]) -> tuple[str, ...]:
    """Addresses of replicas, each written in one way.

    Raises:
        ConfigError: one is malformed, has the path of an API, or is there twice.
    """
    what, example = "an address of engine.urls", "http://host:8000"
    found = tuple(checked_url(url, what, example) for url in urls)
    for url in found:
        if url.endswith("/v1"):
            raise ConfigError(
                f"{what} ends in /v1, got {url!r}. Write it as {url.removesuffix('/v1')}."
            )
    if repeated := sorted({url for url in found if found.count(url) > 1}):
        raise ConfigError(
            f"engine.urls must be different addresses, got {repeated} several times. Name each "
            "once."
        )
    return found


class Replicas:
    """Servers of one model, which all read the weights that one process hands over.

    A replica that gives any process no usable reply is left out by all of them until the next
    start: `agree` is called by every process after every draw and after every handover.

    Args:
        urls: their addresses without a path, such as http://127.0.0.1:8000.
        transfer: how weights reach them.
        num_concurrent: completions that this process asks of one replica at the same time.
        limits: how long and how often a replica is asked.
        min_replicas: the fewest that are enough; 0 for all.

    Raises:
        ConfigError: an address is none that may be asked.
        ModelError: fewer than `min_replicas` answer as vLLM does.
    """

    def __init__(
        self,
        urls: Sequence[str],
        transfer: WeightTransfer,
        num_concurrent: int = 64,
        limits: Limits | None = None,
        min_replicas: int = 0,
    ) -> None:
        self.urls, self.transfer = replica_addresses(urls), transfer
        self.min_replicas = min_replicas or len(urls)
        self.clients = [Client(url, limits or Limits(), num_concurrent) for url in self.urls]
        self.live = list(range(len(urls)))
        """Numbers of those that have not been left out."""
        self.group: Group = OneProcess()
        self.undisturbed: Callable[[], AbstractContextManager[None]] = nullcontext
        """Gives a context around what the processes do together; a signal ends it afterwards."""
        self._log: Callable[[str], None] = lambda line: None
        found, self._silent = ask_all(self._live_clients(), ("/v1/models", None, _Models))
        self.names = {number: models.data[0].id for number, models in found.items()}
        """How each calls its model."""
        lengths = [models.data[0].max_model_len for models in found.values()]
        self.max_model_len = min((n for n in lengths if n is not None), default=None)
        """Most tokens of a sequence that all of them read; None where none says so."""
        self.agree(self._silent, is_start=True)

    def join(
        self,
        group: Group,
        log: Callable[[str], None],
        undisturbed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Use the replicas together with other processes; `log` receives warnings.

        Raises:
            ModelError: too few of them answer all processes.
        """
        self.group, self._log, self.undisturbed = group, log, undisturbed
        self.live = list(range(len(self.urls)))
        self.agree(self._silent, is_start=True)

    def agree(
        self,
        lost: Mapping[int, str],
        error: TutelageError | None = None,
        is_start: bool = False,
    ) -> bool:
        """Leave out what gave a process no usable reply; every process calls it.

        Args:
            lost: numbers of replicas that failed this process, with what was wrong.
            error: what else ended this process's work, and ends that of all.
            is_start: whether nothing was asked for yet but the servers' names.

        Returns:
            Whether a replica failed any process.

        Raises:
            ModelError: fewer than `min_replicas` stay, or another process has an error.
        """
        told = self.group.gathered((dict(lost), None if error is None else str(error)))
        if error is not None:
            raise error
        if texts := [text for _, text in told if text is not None]:
            raise ModelError(texts[0])
        failed: dict[int, str] = {}
        for found, _ in told:
            failed = found | failed
        gone = [number for number in self.live if number in failed]
        self.live = [number for number in self.live if number not in failed]
        total, left = len(self.urls), len(self.live)
        for number in gone:
            url, reason = self.urls[number], failed[number]
            if left < self.min_replicas:
                few = f"{left} of {total} replicas are left, and engine.min_replicas is "
                few = f"{few}{self.min_replicas}; " if total > 1 else ""
                kept, then = _AT_START if is_start else _AFTER_A_DRAW
                raise ModelError(f"the server {url} gave {reason}. {kept}; {few}{then}.")
            self._log(
                f"warning: replica {url} gave {reason}; it is left out until the next start, "
                f"{left} of {total} stay"
            )
        return bool(failed)

    def push(self, model: PreTrainedModel) -> None:
        """Hand the model's weights over: one process sends them, and every replica takes them.

        Raises:
            ModelError: too few replicas took them.
            RunError: they cannot be written.
        """
        lost: dict[int, str] = {}
        failure = None
        if self.group.index == 0:
            try:
                lost = self.transfer.send(model, self._live_clients())
            except TutelageError as error:
                failure = error
        self.agree(lost, failure)

    def close(self) -> None:
        """The servers stay; what the handovers took is released."""
        if self.group.index == 0:
            self.transfer.close()

    def _live_clients(self) -> dict[int, Client]:
        return {number: self.clients[number] for number in self.live}
