"""The mathematics grader: what is equal, what is not, and what hostile answers can do to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from grading_cases import DIFFERENT, EQUAL

from patience import HANG_S
from tutelage.errors import MissingExtraError
from tutelage.grading import pool as grading_pool
from tutelage.grading.answer import MAX_TEXT
from tutelage.grading.exact import exact
from tutelage.grading.mathematics import (
    answers_equal,
    extract_answer,
    grade_completion,
)

pytest.importorskip("math_verify")
DATA = Path(os.environ.get("TUTELAGE_DATA", "/nowhere"))
needs_data = pytest.mark.skipif(
    not (DATA / "grader_pairs.jsonl").is_file(), reason="needs grader_pairs.jsonl in TUTELAGE_DATA"
)


@pytest.fixture(scope="module", autouse=True)
def _no_workers_are_left() -> Iterator[None]:
    yield
    grading_pool.close_workers()


def rows(name: str) -> list[dict[str, str]]:
    text = (DATA / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.strip().split("\n")]


def pairs(*marks: str) -> list[list[str]]:
    """Pairs of prediction and gold from `grading_pairs.tsv`, by what they are to be."""
    text = Path(__file__).with_name("grading_pairs.tsv").read_text(encoding="utf-8")
    found = [line.split("\t") for line in text.rstrip("\n").split("\n")]
    return [pair for mark, *pair in found if mark in marks]


def test_equal_answers_either_way() -> None:
    cases = [list(pair) for pair in EQUAL] + pairs("=")
    assert len(cases) > 500
    assert [case for case in cases if not answers_equal(*case)] == []
    assert [case for case in pairs("=") if not answers_equal(*reversed(case))] == []


def test_a_decimal_comma_has_two_decimals_and_stands_in_the_prediction() -> None:
    assert answers_equal("1000,99", "1000.99")
    assert answers_equal("-3,14", "-3.14")
    for case in (("3,4", "3.4"), ("3, 14", "3.14"), ("3.14", "3,14"), ("1,2,34", "1.234")):
        assert not answers_equal(*case), case


def test_different_answers_either_way() -> None:
    cases = [list(pair) for pair in DIFFERENT] + pairs("!")
    assert len(cases) > 450
    assert [case for case in cases if answers_equal(*case)] == []
    assert [case for case in cases if answers_equal(*reversed(case))] == []


def test_whole_completions() -> None:
    right, wrong = pairs("grade="), pairs("grade!")
    assert len(right) > 50
    assert len(wrong) > 130
    assert [case for case in right if not grade_completion(*case)] == []
    assert [case for case in wrong if grade_completion(*case)] == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} and 7", r"\frac{1}{\sqrt{2}}"),
        (r"\fbox{7}", "7"),
        (r"\boxed 7", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"<think>\boxed{1}</think> It is \boxed{2}.", "2"),
        (r"\boxed{1}</think> It is 5", None),
        ("<think> The answer is 5", None),
        (r"\boxed{42", None),
        (r"\boxed{}", None),
        ("48/2 = 24\n#### 72", "72"),
        ("The answer is 3.5. Then I checked.", "3.5"),
        ("**Final Answer:** $x = 5$\n", "$x = 5$"),
        ("so it is 42", None),
        ("", None),
    ],
)
def test_what_counts_as_the_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


ATTACKS = (
    r"\boxed{71} or \boxed{72} or \boxed{73}",
    r"\boxed{72, 71}",
    r"\boxed{71=72}",
    r"\boxed{1=2=72}",
    r"<think>\boxed{72}",
    r"\boxed{72}</think>",
    r"\boxed{\text{72 or so}}",
    r"\boxed{\text{the correct answer}}",
    r"\boxed{x}",
    "72",
    "7272",
    r"\boxed{７２}",
    r"\boxed{72+0x}",
    r"\boxed{[0,72]}",
    r"\boxed{\{1,...,72\}}",
    r"\boxed{72_8}",
    r"\boxed{72\text{ more than the answer}}",
)


def test_attacks_earn_nothing() -> None:
    assert [attack for attack in ATTACKS if grade_completion(attack, "72")] == []


def test_references_may_be_worked_solutions() -> None:
    assert grade_completion(r"\boxed{0.5}", r"thus \boxed{\frac12}")
    assert grade_completion(r"\boxed{72}", "48+24=72\n#### 72")


@pytest.mark.parametrize(
    "text", ["9^9^9^9", "200!!", "1/0", "0^{-1}", "2^{99999}", "(" * 99, "5 7"]
)
def test_exact_arithmetic_refuses_what_it_cannot_bound(text: str) -> None:
    assert exact(text) is None


# --- real data ------------------------------------------------------------------------------------


@needs_data
def test_labelled_pairs() -> None:
    pairs = rows("grader_pairs")
    verdicts = [answers_equal(row["prediction"], row["gold"]) for row in pairs]
    wrong = [row["id"] for row, v in zip(pairs, verdicts, strict=True) if v != row["equal"]]
    assert wrong == []


@needs_data
@pytest.mark.parametrize("name", ["math500", "aime2024", "amc23", "math_train12k"])
def test_every_reference_grades_itself_and_refuses_a_changed_digit(name: str) -> None:
    golds = sorted({row["answer"] for row in rows(name)})
    assert [g for g in golds if not grade_completion(rf"so \boxed{{{g}}}.", g)] == []
    # A part: a changed digit in a formula costs a comparison by the library.
    sample = golds[:: {"math_train12k": 80, "math500": 5}.get(name, 1)]
    changed = [
        (f"{g[:place]}{(int(g[place]) + 1 + place % 8) % 10}{g[place + 1 :]}", g)
        for g in sample
        for place in [found.start() for found in re.finditer("[0-9]", g)][:4]
    ]
    assert len(changed) > 20
    assert [pair for pair in changed if answers_equal(*pair)] == []


# --- limits ---------------------------------------------------------------------------------------

BOMB = (r"\binom{100000000}{50000000}", r"\binom{100000001}{50000000}")


def test_a_comparison_that_never_ends_is_killed_off_the_main_thread_and_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert answers_equal(r"2\sqrt{3}", r"\sqrt{12}")
    before = grading_pool.undecided().get("killed", 0)
    monkeypatch.setattr(grading_pool, "COMPARE_LIMIT_S", 1.0)
    verdicts: list[bool] = []
    threads = [
        threading.Thread(target=lambda: verdicts.append(answers_equal(*BOMB))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    monkeypatch.undo()
    assert verdicts == [False, False]
    assert grading_pool.undecided()["killed"] - before == 2
    assert answers_equal(r"2\sqrt{3}", r"\sqrt{12}")
    grading_pool.close_workers()
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    programs = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children.read_text().split()]
    assert not [program for program in programs if "_worker" in program]


def test_a_plain_script_needs_no_main_guard_and_ends_cleanly(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import threading\n"
        "from tutelage.grading.mathematics import answers_equal\n"
        r"job = lambda: print(answers_equal(r'2\sqrt{3}', r'\sqrt{12}'))"
        "\nthread = threading.Thread(target=job)\nthread.start()\nthread.join()\n"
        "import sys\nprint('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=HANG_S
    )
    assert (done.stdout.split()[0], done.stderr, done.returncode) == ("True", "", 0)


def test_without_math_verify_numbers_are_graded_and_formulas_name_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grading_pool, "find_spec", lambda name: None)
    assert answers_equal(r"\frac{1}{2}", "0.5")
    with pytest.raises(MissingExtraError, match="extra 'math'"):
        answers_equal(r"\sqrt{8}", r"2\sqrt{2}")


@pytest.mark.parametrize("fault", ["no such class", "another behaviour"])
def test_an_unfit_version_of_the_parser_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A parser that is not the one that is built on is an error in one line, not wrong verdicts."""
    fake = tmp_path / "latex2sympy2_extended"
    fake.mkdir()
    (fake / "__init__.py").write_text("")
    lines = "ConversionConfig = NormalizationConfig = dict\ndef normalize_latex(text, config):\n"
    reader = "class _Latex2Sympy:\n    def __init__(self, config): raise TypeError\n"
    code = f"{lines}    return text\n" + (reader if fault == "another behaviour" else "")
    (fake / "latex2sympy2.py").write_text(code)
    grading_pool.close_workers()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(grading_pool.GraderError, match=r"got math-verify \S+, latex2sympy2_ext"):
        answers_equal(r"\sqrt{8}", r"2\sqrt{2}")


def test_workers_survive_an_interrupt_and_a_dead_one_is_replaced() -> None:
    """Ctrl-C reaches the process group of the terminal; a worker is in a group of its own."""
    assert answers_equal(r"2\sqrt{3}", r"\sqrt{12}")
    idle = list(grading_pool._pool._idle)
    assert idle
    for worker in idle:
        assert os.getpgid(worker.pid) != os.getpgid(0)
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    assert answers_equal(r"2\sqrt{3}", r"\sqrt{12}")


def test_an_interrupted_comparison_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[grading_pool.Worker] = []

    def interrupted(worker: grading_pool.Worker, deadline: float) -> None:
        asked.append(worker)
        raise KeyboardInterrupt

    monkeypatch.setattr(grading_pool.Worker, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers_equal(r"2\sqrt{3}", r"\sqrt{12}")
    assert not asked[0].is_alive


WORKER = Path(grading_pool.__file__).with_name("_worker.py")


def test_the_worker_refuses_to_reach_outside_and_to_evaluate_text(tmp_path: Path) -> None:
    """The detector sees what it should: the worker's own hook, on real attempts."""
    canary = tmp_path / "canary"
    program = (
        f"import sys; sys.path.append({str(WORKER.parent)!r})\n"
        "import os, subprocess, _worker as worker\n"
        "blocked = []\n"
        "sys.addaudithook(lambda event, arguments: worker._audit(event, arguments, blocked))\n"
        "attempts = [lambda: eval('1+1'), lambda: exec('x=1'), "
        f"lambda: open({str(canary)!r}, 'w'), lambda: os.system('true'), "
        "lambda: subprocess.Popen(['true']), lambda: __import__('socket').socket()]\n"
        "for attempt in attempts:\n"
        "    try:\n        attempt()\n    except PermissionError:\n        pass\n"
        "sys.stdout.write(' '.join(blocked))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert set(done.stdout.split()) >= {"compile", "open", "os.system", "subprocess.Popen"}, done
    assert not canary.exists()


SETS = [rf"'{{{inner}}}" for inner in (r"i\pi", "2", "x", "x+y", r"\frac{x}{y}", "x^2-y^3")]
"""The parser makes sets of these; math-verify would simplify their elements."""


def test_no_answer_makes_sympy_write_code() -> None:
    """Simplifying compiles functions that sympy writes for the number of symbols, so nothing is.

    Answers with a prime that belongs to no symbol do not even reach the worker; formulas do.
    """
    before = grading_pool.undecided()
    for left in SETS:
        for right in (SETS[1], r"2\sqrt{3}", r"\frac{x}{y+1}"):
            assert answers_equal(left, right) == (left == right), (left, right)
            assert grading_pool.formulas_equal("value", left, right) in (True, False)
    seen = grading_pool.undecided()
    assert {reason for reason in seen if reason.startswith("blocked")} <= set(before)


def test_simplifying_in_the_worker_would_be_blocked() -> None:
    """Control of the test above: the hook sees the code that sympy writes."""
    program = (
        f"import sys; sys.path.append({str(WORKER.parent)!r})\n"
        "import sympy, _worker as worker\n"
        "blocked, (a, b, c) = [], sympy.symbols('a b c')\n"
        "sys.addaudithook(lambda event, arguments: worker._audit(event, arguments, blocked))\n"
        "try:\n    sympy.cancel((a * b + a * c) / (b**2 - c**2))\n"
        "except PermissionError:\n    sys.stdout.write(' '.join(blocked))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "compile", done


def test_a_huge_answer_is_refused_before_anything_is_parsed() -> None:
    def hangs(*_: object) -> None:
        raise AssertionError("quadratic work on 20 megabytes takes hours")

    before = signal.signal(signal.SIGVTALRM, hangs)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)
    try:
        for part in ("(", "{", "[", "9", "^", r"\frac{", r"\boxed{", "1,", "-", "</think>"):
            assert not grade_completion(rf"\boxed{{{part * (1_000_000 // len(part))}}}", "72")
            assert not answers_equal(part * 1_000_000, "72")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_the_last_statement_near_the_end_of_the_text_counts() -> None:
    assert extract_answer("The answer is 4.\nNo: the answer is 5.") == "5"
    assert extract_answer(r"\boxed{4}" + " " * MAX_TEXT) is None
    assert extract_answer(" " * MAX_TEXT + r"\boxed{4}") == "4"
