"""What processes send each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tutelage.setup.shares import Shares, on_cpu


@pytest.mark.parametrize("place", [lambda t: t, lambda t: [(1, {"a": t})], lambda t: {0: [t]}])
def test_tensors_of_a_device_are_not_pickled_for_others(place: Any) -> None:
    value = place(torch.ones(2))
    assert on_cpu(value) is value
    with pytest.raises(ValueError, match=r"is on meta\. Use \.cpu\(\)\."):
        on_cpu(place(torch.ones(2, device="meta")))


def test_processes_that_were_started_again_have_keys_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = Shares(2)
    before = shares._key("interrupted")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert shares._key("interrupted") != before
