"""The simulation of several devices: its limits, and what is committed is today's."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import scale

RATES, _ = scale.measured_rates()
MEASURED = json.loads(scale.MEASURED.read_text())["parts"]["step_ours"]


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_one_learner_without_replicas_takes_the_measured_step(sharding: str) -> None:
    step = scale.simulate(RATES, 1, 0, sharding=sharding)
    assert step.step_s == pytest.approx(MEASURED["step_s"], rel=1e-12)
    assert step.sums_s == step.handover_s == 0


def test_what_one_card_took_at_a_batch_size_is_what_it_takes() -> None:
    for count, ms in RATES.decode_ms:
        assert scale.decode_s(RATES, count) == pytest.approx(ms * RATES.new_tokens / 1000)
    assert scale.decode_s(RATES, 1) == scale.decode_s(RATES, 8)
    low, high = RATES.decode_ms[:2]
    between = scale.decode_s(RATES, (low[0] + high[0]) / 2)
    assert between == pytest.approx((low[1] + high[1]) / 2 * RATES.new_tokens / 1000)
    with pytest.raises(ValueError, match="more than the 256"):
        scale.decode_s(RATES, 257)


def test_more_replicas_are_never_slower_and_staleness_never_costs() -> None:
    for sharding in ("none", "fsdp2"):
        for learners in scale.LEARNERS:
            for staleness in (0, 1):
                steps = [
                    scale.simulate(RATES, learners, m, staleness, sharding).step_s
                    for m in (1, 2, 4, 8, 16)
                ]
                assert steps == sorted(steps, reverse=True)
            for replicas in (1, 2, 4):
                fresh, stale = (
                    scale.simulate(RATES, learners, replicas, s, sharding) for s in (0, 1)
                )
                rest = stale.teacher_s + stale.learn_s + stale.sums_s
                hidden = min(stale.draw_s, rest)
                assert fresh.step_s - stale.step_s == pytest.approx(hidden)
                assert stale.step_s <= fresh.step_s


def test_free_links_leave_what_is_computed() -> None:
    """With nothing to send and work without end, N learners are N times as fast."""
    free = replace(RATES, link_gb_s=1e9, rest_s=0.0, copy_gb_s=1e9)
    one, four = (scale.simulate(free, n, 0) for n in (1, 4))
    assert one.learn_s / four.learn_s == pytest.approx(4, rel=1e-6)
    assert one.teacher_s / four.teacher_s == pytest.approx(4)
    slow = replace(free, link_gb_s=1.0)
    assert scale.simulate(slow, 4, 0).sums_s == pytest.approx(2 * 3 / 4 * 4 * RATES.numel / 1e9)
    # half of that for the parts of sums, and three times the weights in bfloat16
    assert scale.simulate(slow, 4, 0, sharding="fsdp2").sums_s == pytest.approx(
        3 / 4 * (4 + 3 * 2) * RATES.numel / 1e9
    )
    with pytest.raises(ValueError, match="staleness needs replicas"):
        scale.simulate(RATES, 2, 0, 1)


def test_results_and_page_are_todays() -> None:
    record = scale.record_of()
    assert json.loads(scale.RESULT.read_text()) == json.loads(json.dumps(record))
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.with_block(page, record) == page
    for line in record["assumptions"]:
        assert line in page
