"""Whether a completion's final answer equals the reference answer, as mathematics.

Completions are untrusted text. It is taken apart as strings; rational arithmetic is done here,
exactly; what is left is read by math-verify's parser in a process with limits (`grading.pool`).
Nothing is evaluated by Python, no input raises, and what cannot be decided is wrong.
"""

from __future__ import annotations

import re
from fractions import Fraction

from tutelage.grading.answer import after_thoughts, finished_lines, has_box, last_box, unboxed
from tutelage.grading.compare import is_long_decimal, texts_equal
from tutelage.grading.exact import exact
from tutelage.grading.forms import parse
from tutelage.grading.latex import MAX_ANSWER, tidy

_STATED = re.compile(
    r"(?i)(?:final answer|answer)\s*(?:is|:|=)\s*:?\s*\**\s*(?P<rest>[^\n]{1,2000})"
)
_SENTENCE_END = re.compile(r"\.(?=\s|$)")


def extract_answer(completion: str, is_truncated: bool = False) -> str | None:
    """The answer that a completion commits to, as written.

    Thoughts such as ``<think>...</think>`` are ignored. Then the last ``\\boxed{...}`` counts,
    else the line after the last ``####``, else what follows the last "the answer is" on its line. A
    bare last number is no answer.

    Args:
        completion: The text that a model wrote.
        is_truncated: It was cut off, so that a mark without a box has to stand on a finished line.

    Returns:
        None if there is none: an unfinished box, or a thought that never ends, is no answer.
    """
    answer = after_thoughts(completion)
    if answer is None:
        return None
    box = last_box(answer)
    if box is not None:
        return box or None
    answer = finished_lines(answer, is_truncated)
    _, marked, rest = answer.rpartition("####")
    if marked:
        return rest.split("\n", 1)[0].strip() or None
    stated = list(_STATED.finditer(answer))
    if not stated:
        return None
    return _SENTENCE_END.split(stated[-1]["rest"], maxsplit=1)[0].strip(" *") or None


def answers_equal(prediction: str, gold: str) -> bool:
    """Whether two answers are the same mathematics.

    Whole numbers, decimals and fractions are compared exactly; a decimal of at least eight
    significant digits also equals a number that it rounds (relative tolerance 1e-8). Order counts
    in tuples, not in lists and sets. Units, percent and degree signs may be left out by either
    side, but not contradict each other. Formulas are equal when math-verify's parser reads them and
    they agree to 50 digits wherever both are defined among several points.

    Args:
        prediction: An answer without the text around it, usually LaTeX.
        gold: The reference answer.

    Returns:
        False as well when the answers cannot be compared within the limits of `grading.pool`.

    Raises:
        MissingExtraError: Formulas have to be compared and math-verify is not installed.
    """
    if not prediction.strip() or not gold.strip():
        return False
    if prediction.strip() == gold.strip():
        return True
    if max(len(prediction), len(gold)) > MAX_ANSWER:
        return False
    return texts_equal(tidy(unboxed(prediction)), tidy(unboxed(gold)))


def answer_key(answer: str) -> Fraction | None:
    """The value of an answer that is a bare number: two are equal exactly if their values are.

    None for all else, and for decimals long enough to stand for a number that they round.
    """
    if len(answer) > MAX_ANSWER:
        return None
    form = parse(tidy(unboxed(answer)))
    is_bare = form.kind == "value" and not (form.name or form.unit or form.source or form.others)
    return exact(form.text) if is_bare and not is_long_decimal(form.text) else None


def grade_completion(completion: str, gold: str, is_truncated: bool = False) -> bool:
    """Whether the final answer of a completion equals the reference answer.

    Args:
        completion: The text that a model wrote.
        gold: The reference: an answer, or a worked solution that marks one with a box or ``####``.
        is_truncated: The completion was cut off; it counts if it had marked its answer.

    Returns:
        False as well when the completion has no final answer.
    """
    prediction = extract_answer(completion, is_truncated)
    if prediction is None:
        return False
    if "####" in gold or has_box(gold):
        gold = extract_answer(gold) or ""
    return answers_equal(prediction, gold)
