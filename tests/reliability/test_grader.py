"""The short form of the grader's fuzz harness, and that the harness can see."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest

from reliability import grader_sweep
from reliability.grader import BOMBS, CANARY, PAYLOADS, Watch, fuzz, num_blocked, pairs, report
from tutelage.grading import pool as grading_pool

pytest.importorskip("math_verify")


def test_five_thousand_hostile_inputs_neither_raise_nor_execute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grading_pool, "COMPARE_LIMIT_S", 0.5)
    before = grading_pool.undecided()
    watch = fuzz(5_000, minutes=10, formulas=0.004, bombs=0.0005)
    after = grading_pool.undecided()
    grading_pool.close_workers()
    assert watch.num_inputs == 5_000
    assert watch.num_accepted > 100
    assert not watch.exceptions
    assert not watch.audit_events
    assert num_blocked(after) == num_blocked(before)
    assert not CANARY.exists()


def evaluated(prediction: str, gold: str) -> bool:
    return bool(eval(prediction))  # noqa: S307 - what the harness has to see


def test_the_harness_sees_exceptions_and_executions() -> None:
    watch = Watch()
    watch.listen()
    watch.run(evaluated, ("1 == 1", ""))
    watch.run(evaluated, ("1 == ", ""))
    assert watch.num_accepted == 1
    assert watch.exceptions == {"SyntaxError": 1}
    assert watch.audit_events["compile"] == 2
    assert ("compile", repr(("1 == 1", ""))) in watch.offences
    assert ("SyntaxError", repr(("1 == ", ""))) in watch.offences
    told, heard = report(watch, "evaluated", 5.0), len(watch.offences)
    assert json.loads(json.dumps(told))["exceptions"] == {"SyntaxError": 1}
    compile("2", "later", "eval")
    assert len(watch.offences) > heard  # an audit hook stays, but what was reported does not change
    assert len(told["offences"]) == heard


def test_the_harness_names_the_input_and_the_event_of_a_blocked_action(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grading_pool._pool, "undecided", Counter(killed=1))
    watch = Watch()
    for reason, pair in (("killed", ("a", "b")), ("blocked:open", ("c", "d"))):
        watch.run(lambda *_, reason=reason: bool(grading_pool.note_undecided(reason)), pair)
    assert watch.offences == [("blocked:open", repr(("c", "d")))]
    assert num_blocked(grading_pool.undecided()) == 1


def test_the_harness_sends_bombs_and_payloads() -> None:
    sent = {prediction for prediction, _ in islice(pairs(0), 20_000)}
    assert set(BOMBS) <= sent
    assert set(PAYLOADS) <= sent


def test_rewritten_answers_keep_their_verdict_and_changed_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TUTELAGE_DATA", raising=False)
    outcome = grader_sweep.run(80)
    grading_pool.close_workers()
    assert outcome.failures == 0, outcome.details
    assert outcome.trials > 500
    assert set(outcome.details["same"]) == set(grader_sweep.SAME)
    assert set(outcome.details["other"]) == set(grader_sweep.OTHER)
    assert min(outcome.control.values()) > 100
