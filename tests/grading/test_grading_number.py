"""Final answers: what counts, what is equal, and hostile text."""

from __future__ import annotations

import sys
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.grading.answer import MAX_TEXT
from tutelage.grading.number import grade_number, number_answer, numbers_equal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} and 7", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"<think>\boxed{1}</think> It is \boxed{2}.", "2"),
        (r"\boxed{1}</think> It is 5", "5"),
        ("<think> it may be 5", None),
        (r"\boxed{42", None),
        (r"\boxed{}", None),
        ("48/2 = 24\n#### 72", "72"),
        ("#### 1\n#### 2\nbye 3", "2"),
        ("####", None),
        ("the answer is 1,234.50.", "1,234.50"),
        ("10-3", "3"),
        ("it is -3", "-3"),
        ("x=−3", "−3"),
        ("a half, 1/2", "1/2"),
        ("about .5", ".5"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_what_counts_as_the_final_answer(text: str, answer: str | None) -> None:
    assert number_answer(text) == answer


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("0.5", r"\frac{1}{2}"),
        (r"-\dfrac{3}{4}", "-0.75"),
        ("1,234", "1234.0"),
        ("−5", "-5"),
        ("$18", "18"),
        (r"50\%", "50%"),
        (r"\text{18}", "18"),
        ("$ 3 / 4 $", ".75"),
        ("1e5", "100000"),
        ("007", "7"),
        ("18.", "18"),
        ("(1, 2)", "(1,2)"),
        ("Blue", "blue"),
        (r"90^\circ", "90"),
    ],
)
def test_equal_answers(left: str, right: str) -> None:
    assert numbers_equal(left, right)
    assert numbers_equal(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("0.33", "1/3"),
        ("1 1/2", "11/2"),
        ("12,34", "1234"),
        ("1 2", "12"),
        ("5", "-5"),
        ("x", "5"),
        ("", ""),
        ("$", "%"),
        ("1/0", "1/0.0"),
        ("1/2/3", "6"),
        ("٣", "3"),
        ("²", "2"),
        ("(1,2)", "(2,1)"),
        ("5 apples", "5 pears"),
        ("1e99999", "1e99998"),
        ("{1,2,3,4}", "3"),
    ],
)
def test_different_answers(left: str, right: str) -> None:
    assert not numbers_equal(left, right)
    assert not numbers_equal(right, left)


@given(st.decimals(-(10**9), 10**9, places=4), st.decimals(-(10**9), 10**9, places=4))
def test_decimals_compare_as_decimals(left: Decimal, right: Decimal) -> None:
    assert numbers_equal(f"{left:f}", f"{right:f}") == (left == right)
    assert numbers_equal(f"{left:,f}", f"{left:f}")


@given(st.fractions(max_denominator=10**6), st.integers(1, 50))
def test_rewritten_fractions_stay_equal_and_changed_ones_do_not(
    value: Fraction, scale: int
) -> None:
    above, below = value.numerator * scale, value.denominator * scale
    assert numbers_equal(f"{above}/{below}", f"\\frac{{{value.numerator}}}{{{value.denominator}}}")
    assert not numbers_equal(f"{above}/{below}", f"{above + 1}/{below}")


def test_grade_reads_worked_references() -> None:
    assert grade_number("so the answer is 72", "48+24=<<48+24=72>>72\n#### 72")
    assert grade_number(r"\boxed{0.5}", r"thus \boxed{\frac12}")
    assert grade_number(r"\boxed{0.5}", r"thus \boxed{\frac{1}{2}}")
    assert not grade_number("no idea", "72")
    assert not grade_number("no idea", "")


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{18 \text{ dollars}}",
        r"\boxed{18\text{ dollars per day}.}",
        r"\boxed{18 dollars}",
        r"\boxed{\$18 \text{ per day}}",
        r"\boxed{\text{18 dollars}}",
        r"\boxed{\mathbf{18}\text{ eggs}}",
        r"\boxed{18 \, \mathrm{km/h}}",
        r"\boxed{18~\text{apples}}",
        r"\boxed{18 \text{ cm}^3}",
        r"\boxed{x = 18}",
        r"\boxed{\text{Total cost} = \$18}",
        r"\boxed{20 - 2 = 18}",
        r"\boxed{\underline{18}}",
        r"\boxed{1.8 \times 10^1}",
        r"\boxed{\$ 18}",
        r"\boxed{18 USD}",
        r"\boxed {18}. I checked it 3 times.",
        r"\fbox{18} in 3 steps",
        "#### 18 dollars",
    ],
)
def test_a_name_or_unit_beside_the_number_changes_nothing(text: str) -> None:
    assert grade_number(text, "18")
    assert not grade_number(text, "19")


@pytest.mark.parametrize(
    "answer",
    [
        r"18 \text{ or } 19", r"18 \text{ more}", "18, 19", "18x", r"18 \text{ thousand}", "18=19",
        "18_8", r"18 \text{ to } 20", "18:00", r"18 \text{ halves}", r"\text{18 or so}",
        r"18 \pm 1", "x>18", "18!", r"18\text{ dozen}", r"18 \text{ dollars}, 19 \text{ dollars}",
        "20 - 1 = 18",
    ],
)  # fmt: skip
def test_what_is_more_than_a_number_with_a_unit_is_not_the_number(answer: str) -> None:
    assert not grade_number(rf"\boxed{{{answer}}}", "18")


def test_units_of_both_sides_must_agree() -> None:
    assert numbers_equal(r"18\text{ m}", "18 meters")
    assert not numbers_equal(r"18\text{ m}", r"18\text{ cm}")
    assert numbers_equal(r"1{,}800 \text{ m}", "1800")


@pytest.mark.parametrize(
    "attack",
    [
        r"\boxed{72, 71, 70}",
        r"\boxed{71} or \boxed{72} or \boxed{73}",
        r"\boxed{72 or 71}",
        r"<think>\boxed{72}",
        r"\boxed{72",
        r"\boxed{x}",
        r"\boxed{\text{the gold answer}}",
        r"\boxed{__import__('os').getpid()}",
        r"\boxed{{72}}",
        "72 71",
        "#### 72 #### 71",
        "####\n72",
        "７２",
    ],
)
def test_attacks_earn_nothing(attack: str) -> None:
    assert not grade_number(attack, "72")


HOSTILE = [
    "9" * 10**6,
    "1," * 10**5,
    "1,111" * 10**5,
    "-" * 10**6,
    "." * 10**6,
    "1/" * 10**5,
    r"\boxed{" * 10**5,
    r"\boxed{" + "{" * 10**5,
    r"\boxed{" + "{}" * 10**5 + "}",
    "####" * 10**5,
    "</think>" * 10**5,
    r"\boxed{9**9**9}",
    r"\boxed{1e999999999}",
    r"\boxed{1e-100/1e100}",
    r"\boxed{" + "9" * 999 + "}",
    r"\boxed{" + " " * 900 + "}",
    r"\boxed{\frac{" + "1" * 400 + "}{" + "0" * 400 + "}}",
    "\ud800\x00\u202e",
    r"\text{" * 10**5 + "5" + "}" * 10**5,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_graded_without_raising(text: str) -> None:
    assert grade_number(text, "72") is False
    assert numbers_equal(text, text) in (True, False)


@settings(max_examples=500)
@given(st.text(st.sampled_from(list("0123456789.,-+/\\{}$%^ eE#<>abox\n−")) | st.characters()))
def test_no_text_raises_and_equality_is_symmetric(text: str) -> None:
    assert grade_number(text, text[::-1]) in (True, False)
    assert numbers_equal(text, "5") == numbers_equal("5", text)


def test_nothing_is_executed_or_imported() -> None:
    events: list[str] = []
    watched = {"exec", "compile", "import", "open", "os.system", "subprocess.Popen"}
    active = True

    def hook(event: str, arguments: object) -> None:
        if active and event in watched:
            events.append(event)

    sys.addaudithook(hook)
    for payload in ("__import__('os').system('true')", "open('x','w')", "().__class__.__bases__"):
        grade_number(rf"\boxed{{{payload}}}", payload)
    seen = list(events)
    compile("1", "control", "eval")  # the hook does see what it should
    active = False
    assert seen == []
    assert events == ["compile"]


def test_only_the_end_of_a_long_text_counts_and_huge_powers_are_no_numbers() -> None:
    assert number_answer("#### 5" + "x" * MAX_TEXT) is None
    assert number_answer("x" * MAX_TEXT + "#### 5") == "5"
    assert numbers_equal("1e99", "10e98")
    assert not numbers_equal("1e99999", "10e99998")  # compared as texts, never computed
