"""The phases of a step: what was started in one is waited for in it."""

from __future__ import annotations

import pytest
import torch

from tutelage.train.clock import Clock


def test_an_accelerator_is_waited_for_at_both_ends_of_a_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 5)
    monkeypatch.setattr("time.perf_counter", lambda: float(len(calls)))
    clock = Clock(torch.device("cuda"))
    with clock.phase("learn"):
        calls.append("work")
    assert calls == ["wait", "work", "wait"]
    assert clock.seconds == {"learn_s": 2.0}  # it starts after the first wait, ends after the last
    assert clock.memory == {"peak_device_bytes": {"learn": 5}}


def test_a_phase_that_fails_is_counted_too() -> None:
    clock = Clock(torch.device("cpu"))
    with pytest.raises(ValueError, match="x"), clock.phase("learn"):
        raise ValueError("x")
    assert set(clock.seconds) == {"learn_s"}
