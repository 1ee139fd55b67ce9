"""Equality of answers that have been taken apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from tutelage.grading.exact import exact
from tutelage.grading.forms import Form, parse
from tutelage.grading.pool import formulas_equal, note_undecided
from tutelage.grading.symbols import common_symbols, has_variables, is_unreadable
from tutelage.grading.units import same_unit

REL_TOL = 1e-8
"""Relative difference allowed between a decimal of at least MIN_DIGITS digits and its number."""
MIN_DIGITS = 8

_CHOICE = re.compile(r"(?:\\text\{)?\s*(?:\(([A-J])\)|([A-J])[.):])\s*\}?\s*([^\s(].*)")
_SECOND_CHOICE = re.compile(
    r"[,;+/&|]|\\(?:text\{\s*)?(?:l?or|vee|l?and|wedge|cup)\b|(?:or|and|not)\b|.*\([A-J]\)"
)
_LETTER = re.compile(r"(?:\\text\{)?\s*(\(?)([A-Ja-j])[).]?\s*\}?")
_DECIMAL = re.compile(r"-?[0-9]*\.[0-9]+")
# Two decimals: 3,14 is seldom meant as a list, 3,4 mostly is.
_COMMA_DECIMAL = re.compile(r"-?[0-9]+,[0-9]{2}")
_NUMERAL = re.compile(r"-?[0-9]*\.?[0-9]+")
_FUNCTION = re.compile(r"[a-zA-Z]\(.*\)")


def texts_equal(prediction: str, gold: str) -> bool:
    """Whether two tidy answers are the same: a choice by its letter, else by what they are."""
    tails = [text.rpartition(r"\approx")[2] for text in (prediction, gold) if r"\approx" in text]
    if len(tails) == 2 and not texts_equal(*tails):
        return False
    letter, choice = _LETTER.fullmatch(gold), _choice(prediction)
    if letter:
        named = _LETTER.fullmatch(prediction)
        if choice:
            return (choice[1] or choice[2]) == letter[2].upper()
        if named:
            same_case = named[2] == letter[2] or (letter[1] and named[2].upper() == letter[2])
            return bool(same_case)
    gold_choice = _choice(gold)
    if gold_choice:
        return _choices_equal(prediction, gold_choice)
    if choice and texts_equal(choice[3], gold):
        return True
    if _COMMA_DECIMAL.fullmatch(prediction) and _DECIMAL.fullmatch(gold):
        prediction = prediction.replace(",", ".")
    return forms_equal(parse(prediction), parse(gold))


def _choice(text: str) -> re.Match[str] | None:
    """``(C) 5``, a letter with what it stands for; None for anything else, two letters included."""
    found = _CHOICE.fullmatch(text)
    return None if found and _SECOND_CHOICE.match(found[3]) else found


def _choices_equal(prediction: str, gold: re.Match[str]) -> bool:
    wanted, content = gold[1] or gold[2], gold[3]
    letter, choice = _LETTER.fullmatch(prediction), _choice(prediction)
    if letter:
        return letter[2].upper() == wanted
    if choice:
        return (choice[1] or choice[2]) == wanted and texts_equal(choice[3], content)
    return texts_equal(prediction, content)


def forms_equal(prediction: Form, gold: Form) -> bool:
    """Whether two forms are the same answer; a name or unit that one leaves out does not count."""
    if prediction.name.startswith("?"):
        # m + n = 113 answers 113, but it is not an answer to x + y = 113 by its number alone.
        prediction = replace(prediction, name="", kind="relation" if gold.source else "value")
    if gold.name.startswith("?"):
        gold = replace(gold, kind="relation")
    if _names_differ(prediction.name, gold.name):
        return _same_source(prediction, gold)
    sides = ((prediction, gold), *((side, gold) for side in prediction.others),
             *((prediction, side) for side in gold.others))  # fmt: skip
    return all(_same_content(*pair) for pair in sides) or _same_source(prediction, gold)


def _names_differ(left: str, right: str) -> bool:
    if not left or not right or left == right:
        return False
    return not (left == "y" and _FUNCTION.fullmatch(right)) and not (
        right == "y" and _FUNCTION.fullmatch(left)
    )


def _same_source(left: Form, right: Form) -> bool:
    """Whether both were written as an equation or inequality, and as the same one."""
    if not left.source or not right.source:
        return False
    if _squeezed(left.source) == _squeezed(right.source):
        return True
    is_settled = left.kind == right.kind == "value" and all(
        exact(form.text) is not None for form in (left, right)
    )
    return not is_settled and _ask("relation", left.source, right.source)


def _same_content(left: Form, right: Form) -> bool:
    left, right = _without_letter(left, right), _without_letter(right, left)
    if not same_unit(left.unit, right.unit):
        return False
    kinds = (left.kind, right.kind)
    if kinds == ("value", "value"):
        return _same_value(left, right)
    if set(kinds) <= {"words", "value"}:
        return _words(left.text) == _words(right.text) != ""
    if set(kinds) <= {"list", "set", "value"}:
        return _same_collection(left, right)
    if kinds in (("list", "tuple"), ("tuple", "list")):
        is_point = "()" in (left.text, right.text)
        return is_point and _in_order(_by_name(left.items), _by_name(right.items))
    if kinds[0] != kinds[1]:
        return False
    match left.kind:
        case "empty":
            return True
        case "verbatim":
            return _same_verbatim(left.text, right.text)
        case "tuple" | "matrix":
            return left.text == right.text and _in_order(left.items, right.items)
        case "union":
            return _in_any_order(left.items, right.items)
    return False


def _without_letter(form: Form, other: Form) -> Form:
    """0.64N next to a number in newtons: its last letter is the unit, not a variable."""
    unit = other.unit
    if len(unit) == 1 and unit.isalpha() and not form.unit and form.text.endswith(unit):
        return replace(form, text=form.text[:-1].strip(), unit=unit)
    return form


def _same_verbatim(left: str, right: str) -> bool:
    half = re.compile("[ap]m$")
    if bool(half.search(left)) != bool(half.search(right)):
        left, right = half.sub("", left), half.sub("", right)
    return left == right


def _same_collection(left: Form, right: Form) -> bool:
    items = [form.items if form.kind != "value" else (form,) for form in (left, right)]
    names = [{item.name for item in side if item.name} for side in items]
    if (len(names[0]) > 1) != (len(names[1]) > 1):
        return _in_order(*items)
    return _in_any_order(*items)


def _by_name(items: Sequence[Form]) -> Sequence[Form]:
    """``y = 6, x = 5`` as the point (5, 6); what has no names stays in its order."""
    return sorted(items, key=lambda item: item.name) if all(item.name for item in items) else items


def _in_order(left: Sequence[Form], right: Sequence[Form]) -> bool:
    return len(left) == len(right) and all(map(forms_equal, left, right))


def _in_any_order(left: Sequence[Form], right: Sequence[Form]) -> bool:
    """Whether two collections are the same set; a repetition does not count."""
    if max(len(left), len(right)) > 3 * min(len(left), len(right)):
        return False
    missing = [b for b in right if not any(forms_equal(a, b) for a in left)]
    return not missing and all(any(forms_equal(a, b) for b in right) for a in left)


def _words(text: str) -> str:
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"[.,'\"!?]", " ", text).casefold()
    return " ".join(word for word in text.split() if word not in ("the", "a", "an"))


# --- values ---------------------------------------------------------------------------------------


def _same_value(left: Form, right: Form) -> bool:
    a, b = exact(left.text), exact(right.text)
    if a is not None and b is not None:
        return _same_number(left, right, a, b)
    if "%" in (left.unit, right.unit) and left.unit != right.unit:
        return False
    if _squeezed(left.text) == _squeezed(right.text):
        return True
    texts = (left.text, right.text)
    if r"\infty" in left.text or r"\infty" in right.text:
        return False
    # A number is no formula with letters in it.
    if (a is not None and has_variables(right.text)) or (
        b is not None and has_variables(left.text)
    ):
        return False
    is_rounded = any(is_long_decimal(text) for text in texts) and (a is None) != (b is None)
    return _ask("rounded" if is_rounded else "value", *texts)


def _same_number(left: Form, right: Form, a: Fraction, b: Fraction) -> bool:
    if (left.unit == "%") != (right.unit == "%"):
        percent, plain = (a, b) if left.unit == "%" else (b, a)
        return percent / 100 == plain or (percent == plain and abs(percent) >= 1)
    if a == b:
        return True
    is_rounded = is_long_decimal(left.text) != is_long_decimal(right.text)
    if not is_rounded or 1 in (a.denominator, b.denominator):
        return False
    if _NUMERAL.fullmatch(left.text) and _NUMERAL.fullmatch(right.text):
        return False
    return abs(a - b) <= Fraction(REL_TOL) * max(abs(a), abs(b))


def is_long_decimal(text: str) -> bool:
    """Whether a decimal has so many digits that it may round another number."""
    digits = text.lstrip("-0.").replace(".", "")
    return bool(_DECIMAL.fullmatch(text)) and len(digits) >= MIN_DIGITS


def _squeezed(text: str) -> str:
    """Without the spaces and braces that mean nothing."""
    text = re.sub(r"(?<=\\)([a-zA-Z]+)\s+(?=[a-zA-Z])", r"\1~", text)
    text = re.sub(r"(?<=[0-9.])\s+(?=[0-9.])", "~", text)
    text = re.sub(r"\s+", "", text)
    return re.sub(r"([_^])\{([0-9a-zA-Z])\}", r"\1\2", text).removeprefix("+")


def _ask(kind: str, left: str, right: str) -> bool:
    renamed = common_symbols(left, right)
    # Symbols have taken their primes along. The parser would leave out what is left of them.
    is_stray = renamed is not None and re.search("['$]", " ".join(renamed)) is not None
    if renamed is None or is_stray or is_unreadable(left) or is_unreadable(right):
        note_undecided("unreadable")
        return False
    return formulas_equal(kind, *renamed)
