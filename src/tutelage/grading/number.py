"""Numbers found at the end of completions, and compared exactly: GSM8K and the like.

`mathematics` compares formulas; this needs no library.

Completions are untrusted text: nothing here evaluates, every number is bounded in length before it
is converted, and no input makes these functions raise.
"""

from __future__ import annotations

import re
from fractions import Fraction

from tutelage.grading.answer import after_thoughts, finished_lines, has_box, last_box
from tutelage.grading.exact import exact
from tutelage.grading.forms import parse
from tutelage.grading.latex import MAX_ANSWER, tidy
from tutelage.grading.units import same_unit

MAX_EXPONENT = 100
"""Largest power of ten, either way, that is read as a number."""

# A minus after a digit, letter or bracket subtracts: "10-3" ends with 3.
_NUMBER = re.compile(
    r"(?:(?<![\w).])[-+−])?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?"
)
_DECIMAL = re.compile(r"([-+]?)(?:([0-9]+)(?:\.([0-9]*))?|\.([0-9]+))(?:e([-+]?[0-9]{1,4}))?")
_GROUPED = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_LATEX_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}")
_SPACED_SIGN = re.compile(r" ?([^\w ]) ?")
_IGNORED = ("\\left", "\\right", "\\!", "\\,", "\\;", "\\ ", "\\$", "$", "\\%", "%", "^\\circ")


def number_answer(text: str, is_truncated: bool = False) -> str | None:
    """The final answer that a completion commits to.

    Thoughts such as ``<think>...</think>`` are ignored. Then the last ``\\boxed{...}`` counts,
    else what follows the last ``####`` on its line, else the last number.

    Args:
        text: A completion, or a reference solution such as GSM8K's.
        is_truncated: It was cut off, so that its last number is any number: only a finished mark
            counts.

    Returns:
        The answer as written, or None if there is none. An unfinished ``\\boxed{`` or a thought
        that never ends is no answer.
    """
    answer = after_thoughts(text)
    if answer is None:
        return None
    box = last_box(answer)
    if box is not None:
        return box or None
    _, marked, rest = finished_lines(answer, is_truncated).rpartition("####")
    if marked:
        return rest.split("\n", 1)[0].strip() or None
    return None if is_truncated else _last_number(answer)


def numbers_equal(prediction: str, gold: str) -> bool:
    """Whether two answers are the same number, or the same text when neither is a number.

    Numbers are compared as exact fractions: ``0.5``, ``1/2``, ``\\frac{1}{2}`` and ``.50`` are
    equal, as are ``1,234`` and ``1234.0``; ``0.33`` and ``1/3`` are not. A name before a number
    (``x = 18``) and a unit behind it (``18 \\text{ dollars}``) may be left out by either side; two
    units must not contradict each other.
    """
    left, right = _amount(prediction), _amount(gold)
    if left is not None and right is not None:
        return left[0] == right[0] and same_unit(left[1], right[1])
    return left is right and _plain(prediction) == _plain(gold) != ""


def number_key(answer: str) -> Fraction | str | None:
    """Equal for two answers exactly if `numbers_equal`; None where that depends on the other."""
    amount = _amount(answer)
    if amount is None:
        return _plain(answer) or None
    return None if amount[1] else amount[0]


def is_number(answer: str) -> bool:
    """Whether a reference answer, or the one that a worked solution ends with, is a number."""
    return _number(_reference(answer)) is not None


def grade_number(text: str, gold: str, is_truncated: bool = False) -> bool:
    """Whether the final answer of a completion equals the reference answer.

    Args:
        text: The completion.
        gold: The reference: an answer, or a worked solution ending with one.
        is_truncated: The completion was cut off; it counts if it had marked its answer.

    Returns:
        False as well when the completion has no final answer.
    """
    prediction = number_answer(text, is_truncated)
    return prediction is not None and numbers_equal(prediction, _reference(gold))


def _reference(gold: str) -> str:
    return number_answer(gold) or "" if "####" in gold or has_box(gold) else gold


def _last_number(text: str) -> str | None:
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 - only the last one counts
        pass
    return found.group() if found else None


def _plain(answer: str) -> str:
    """The answer without LaTeX wrapping, signs of layout, needless spaces and case."""
    if len(answer) > MAX_ANSWER:
        return ""
    text = _WRAPPER.sub(r"\1", answer.replace("−", "-"))
    for ignored in _IGNORED:
        text = text.replace(ignored, "")
    # A space between two words or digits stays: "1 1/2" is not 11/2.
    return _SPACED_SIGN.sub(r"\1", " ".join(text.split())).rstrip(".").lower()


def _amount(answer: str) -> tuple[Fraction, str] | None:
    """The answer as an exact number with its unit ("" for none); None when it is not one."""
    value = _number(answer)
    if value is not None or len(answer) > MAX_ANSWER:
        return None if value is None else (value, "")
    if _plain(answer)[:1] in ("(", "[", "{"):  # a group of something, not a number
        return None
    form = parse(tidy(answer))
    value = exact(form.text) if form.kind == "value" else None
    if value is None or any(exact(side.text) != value for side in form.others):
        return None
    return value, form.unit


def _number(answer: str) -> Fraction | None:
    """The answer as an exact number; None when it is not one."""
    text = _plain(answer)
    latex = _LATEX_FRACTION.fullmatch(text)
    if latex:
        sign, above, below = latex.groups()
        return _quotient(_decimal(sign + above), _decimal(below))
    above, slash, below = text.partition("/")
    if slash:
        return _quotient(_decimal(above), _decimal(below))
    return _decimal(text)


def _quotient(above: Fraction | None, below: Fraction | None) -> Fraction | None:
    return above / below if above is not None and below else None


def _decimal(text: str) -> Fraction | None:
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    found = _DECIMAL.fullmatch(text)
    if found is None:
        return None
    sign, whole, part, bare_part, exponent = found.groups()
    digits = part or bare_part or ""
    power = int(exponent or 0)
    if abs(power) > MAX_EXPONENT:
        return None
    value = Fraction(int((whole or "0") + digits), 10 ** len(digits)) * Fraction(10) ** power
    return -value if sign == "-" else value
