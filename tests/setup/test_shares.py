"""What processes send each other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from tutelage.data.types import Prompt, Rollout
from tutelage.setup import shares as module
from tutelage.setup.shares import Shares, on_cpu
from tutelage.train.agreement import in_main

ROLLOUT = Rollout(Prompt("p", ""), 0, (1,), (2, 3))
PLACES = [
    lambda t: t,
    lambda t: [(1, {"a": t})],
    lambda t: {0: [t]},
    lambda t: [replace(ROLLOUT, hidden=t)],
]


@pytest.mark.parametrize("place", PLACES)
def test_tensors_of_a_device_are_not_pickled_for_others(place: Any) -> None:
    value = place(torch.ones(2))
    assert on_cpu(value) is value
    with pytest.raises(ValueError, match=r"is on meta\. Use \.cpu\(\)\."):
        on_cpu(place(torch.ones(2, device="meta")))


def test_processes_that_were_started_again_have_keys_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    shares = Shares(2)
    before = shares._key("interrupted")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert shares._key("interrupted") != before


def test_what_processes_agree_on_is_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of each and what each found travel together."""
    gathered: list[Any] = []

    def gather(values: list[Any], value: Any) -> None:
        gathered.append(value)
        values[:] = [value] * len(values)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    processes: Any = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    assert in_main(processes, lambda: "found") == "found"
    assert len(gathered) == 1


def test_the_last_count_that_is_shown_is_that_of_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The main process is ready first, and the other one while it waits."""
    store, shares = HashStore(), Shares(2)
    monkeypatch.setattr(module, "_store", lambda: store)
    monkeypatch.setattr(Shares, "_key", lambda _, name: name)
    shown: list[tuple[int, int]] = []
    progress = shares.progress(lambda _, done=0, total=0: shown.append((done, total)), "text", 4)

    def gathered(_: Shares, value: Any) -> list[Any]:
        store.add("phase 1", 2)
        return [value] * 2

    monkeypatch.setattr(Shares, "gathered", gathered)
    shares.apart(lambda: progress(2))
    assert shown == [(0, 4), (2, 4), (4, 4)]
    shares.check()  # of another phase
    assert shown == [(0, 4), (2, 4), (4, 4)]
