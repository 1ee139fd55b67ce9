"""What processes send each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tutelage.data.types import Prompt, Rollout
from tutelage.setup.shares import Shares, on_cpu

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
