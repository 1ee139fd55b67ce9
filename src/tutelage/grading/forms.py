"""What kind of answer a text is: a value, a list, an interval, a matrix, an equation, words.

The kinds keep apart what looks alike, such as an interval and a list, or a number and a base.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from tutelage.grading.exact import exact
from tutelage.grading.latex import closing, split
from tutelage.grading.symbols import has_variables
from tutelage.grading.units import NUMBER_WORDS, number_and_unit

Kind = Literal[
    "value", "words", "list", "set", "tuple", "union", "matrix", "relation", "verbatim", "empty"
]

MAX_ITEMS = 100
"""Most elements of a list, set, tuple, union or matrix."""
MAX_SIDES = 5
"""Most sides of a chain of equations or inequalities."""
MAX_NESTING = 8
"""Deepest nesting of lists, sets and tuples."""


@dataclass(frozen=True)
class Form:
    """An answer taken apart."""

    kind: Kind
    text: str = ""
    """A value's LaTeX, the words, a relation, or the brackets of a tuple."""
    items: tuple[Form, ...] = ()
    name: str = ""
    """What the answer says it is, as `x` in ``x = 5``."""
    unit: str = ""
    source: str = ""
    """The whole equation or inequality that this form was read from."""
    others: tuple[Form, ...] = ()
    """The other sides of a chain ``a = b`` that names nothing: all have to be the answer."""


NOTHING = Form("words")

_COMMA = re.compile(
    r"[,;]\s*(?:\\text\{\s*(?:and|or)\s*\}|and\b|or\b)?|\\text\{\s*,?\s*(?:and|or)\s*\}"
    r"|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\lor(?![a-zA-Z])|\\vee(?![a-zA-Z])|\\land(?![a-zA-Z])"
    r"|(?<=\))or(?=\()"
)
_GROUPED = re.compile(r"[-+]?\$?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?(?![0-9,]).*")
_CUP = re.compile(r"\\cup(?![a-zA-Z])")
_RELATION = re.compile(r"[=<>]|\\(?:leq|geq|neq|in|approx|equiv)(?![a-zA-Z])")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-zA-Z])")
_MATRIX = re.compile(
    r"\\begin\{([pbBvV]?)(?:small)?(matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{.*\}"
)
_BUILDER = re.compile(
    r"\\\{\s*([^|:{}]{1,20}?)\s*(?:\\mid|\\in\s*\\mathbb\{R\}\s*[:|]|[|:])(.*)\\\}"
)
_FRENCH = re.compile(r"([\[\]])([^\[\]()]*)([\[\]])")
_VERBATIM = re.compile(
    r"-?\s*[0-9A-F]*[0-9][0-9A-F.]*_\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|[0-9]+)"
    r"|[0-9]{1,3}(?:\s*:\s*[0-9]+)+\s*(?:\\text\{)?[a-zA-Z. ]*\}?"
    r"|.*(?:\\pmod|\\bmod|\\mod|\bmod\b).*"
)
_EMPTY = re.compile(
    r"(?i)\\emptyset|(?:\\text\{)?\s*(?:no (?:real )?solutions?|(?:the )?empty set)\s*\}?"
)
_REALS = re.compile(
    r"(?i)\\mathbb\{R\}|(?:\\text\{)?\s*(?:the set of )?(?:all )?real numbers\s*\}?"
)
_ALL_BUT = re.compile(r"\\mathbb\{R\}\s*(?:\\setminus|\\backslash|-)\s*\\\{(.*)\\\}")
_WORDS = re.compile(r"(?:\\text\{[^{}]*\}|[A-Za-z0-9 .,'\"!?/:()-])+")
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|\\text\{")
_SHORT_WORD = re.compile(r"(?i)no|ok|up|on|in|at|by|of|to|go|is|it|he|we|me|us|ne|nw|se|sw")
"""Words that would otherwise be products of letters; a longer one is always a word."""

_ATOM = (
    r"(?:\\(?!frac|sqrt|sin|cos|tan|log|ln|text|pm|mp|cdot|infty|pi(?![a-z])|begin|emptyset|in\b)"
    r"[a-zA-Z]+\s*|[A-Za-z])(?:_\s*(?:\{[^{}]*\}|\w))?'*(?:\^\s*(?:\{-1\}|\*|\{\*\}))?"
)
_SEGMENT = r"(?:\\(?:angle|triangle|overline|overrightarrow|vec|widehat)\s*)?\{?[A-Z]{2,6}\}?"
_TEXT_NAME = r"\\text\{[^{}]*\}(?:_\{?\w+\}?)?"
_ONE = rf"(?:{_SEGMENT}|{_TEXT_NAME}|{_ATOM}|\|[A-Z]{{2}}\|)"
_NAME = re.compile(
    rf"{_ONE}(?:\s*\([^()]*\))?|\\frac\{{{_ONE}\}}\{{{_ONE}\}}|{_ONE}(?:_\{{\w+\}})?\s*:\s*{_ONE}"
    rf"|\(\s*{_ONE}(?:\s*,\s*{_ONE})+\s*\)|{_ONE}(?:\s*,\s*{_ONE})+"
)
_LOOSE_NAME = re.compile(rf"{_ATOM}(?:\s*(?:[-+/]|\\cdot )?\s*{_ATOM}){{0,6}}")
_LESS = ("<", r"\leq")
_GREATER = (">", r"\geq")


def parse(text: str, depth: int = 0) -> Form:
    """The form of a tidy answer."""
    if depth > MAX_NESTING or not text:
        return NOTHING
    text = text.strip()
    name, _, value = text.rpartition("=")
    if not (_GROUPED.fullmatch(value.strip()) and (not name or is_name(name))):
        whole = _whole_list(text, depth)
        if whole is not None:
            return whole
    pieces = split(text, _CUP)
    if 1 < len(pieces) <= MAX_ITEMS and not _RELATION.search(pieces[0][1]):
        return Form("union", items=tuple(parse(piece, depth + 1) for _, piece in pieces))
    return _element(text, depth)


def _whole_list(text: str, depth: int) -> Form | None:
    pieces = [piece for _, piece in split(text, _COMMA)]
    marks = {mark for mark, _ in split(text, _COMMA)}
    if len(pieces) == 1 or text.isalpha() or (_VERBATIM.fullmatch(text) and "mod" in text):
        return None
    if len(pieces) > MAX_ITEMS or not all(pieces) or _named_tuple(text):
        return NOTHING if not _named_tuple(text) else None
    has_digits = re.search("[0-9]", text)
    if _is_words(text) and not has_digits and any(re.search("[A-Za-z]{2}", p) for p in pieces):
        return Form("words", text)
    items = tuple(item for piece in pieces for item in _flat(parse(piece, depth + 1)))
    is_union = not any("," in m or ";" in m for m in marks) and all(
        item.kind == "tuple" and item.source for item in items
    )
    return Form("union" if is_union else "list", items=items)


def _flat(form: Form) -> tuple[Form, ...]:
    if form.kind == "list":
        return tuple(replace(item, name=item.name or form.name) for item in form.items)
    return (form,)


def _named_tuple(text: str) -> bool:
    """Whether a list is ``a, b = 1, 2``: one equation between lists."""
    left, equals, right = text.partition("=")
    return bool(equals and "," in left and "=" not in right and _NAME.fullmatch(left.strip()))


def _element(text: str, depth: int) -> Form:
    if _EMPTY.fullmatch(text):
        return Form("empty")
    if _REALS.fullmatch(text):
        return Form("tuple", "()", (Form("value", r"-\infty"), Form("value", r"\infty")))
    all_but = _ALL_BUT.fullmatch(text)
    if all_but:
        return _reals_without([piece for _, piece in split(all_but[1], _COMMA)]) or NOTHING
    if _VERBATIM.fullmatch(text) and not re.search("=|equiv", text):
        return Form("verbatim", _plain_verbatim(text))
    relation = split(text, _RELATION)
    if len(relation) > 1:
        return _relation(relation, text, depth)
    for reader in (_bracketed, _matrix, _both_signs):
        form = reader(text, depth)
        if form is not None:
            return form
    value, unit = number_and_unit(text)
    count = NUMBER_WORDS.get(re.sub(r"^\\text\{|\}$", "", text).strip().casefold())
    if count is not None:
        return Form("value", str(count))
    if value != text:
        form = parse(value, depth + 1)
        return replace(form, unit=form.unit or unit)
    if _is_words(text):
        return Form("words", text)
    return Form("value", text)


def _reals_without(points: list[str]) -> Form | None:
    """The real numbers but some, as a union of intervals; None when a point is no exact number."""
    places = {
        value: Form("value", point) for point in points if (value := exact(point)) is not None
    }
    if len(places) != len(points):
        return None
    bounds = [
        Form("value", r"-\infty"),
        *(places[p] for p in sorted(places)),
        Form("value", r"\infty"),
    ]
    intervals = tuple(Form("tuple", "()", pair) for pair in pairwise(bounds))
    return Form("union", items=intervals)


def _is_words(text: str) -> bool:
    is_short = _SHORT_WORD.fullmatch(text.strip(".!\"' "))
    return bool(_WORDS.fullmatch(text) and (is_short or _LONG_WORD.search(text)))


def _plain_verbatim(text: str) -> str:
    """A number with its base, a time, a ratio or a residue, in one spelling."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\p?mod|\\bmod", "mod", text)
    text = re.sub(r"[\s{}()]", "", text).casefold()
    text = re.sub(r"([ap])\.?m\.?$", r"\1m", text)
    for digit, word in enumerate(("two", "three", "four", "five", "six", "seven", "eight"), 2):
        text = re.sub(rf"_(?:base)?{word}$", f"_{digit}", text)
    return re.sub(r"^0+(?=[0-9a-f])", "", text.replace("_base", "_"))


# --- brackets and environments --------------------------------------------------------------------


def _bracketed(text: str, depth: int) -> Form | None:
    french = _FRENCH.fullmatch(text)
    if french and (french[1] == "]" or french[3] == "["):
        text = ("[" if french[1] == "[" else "(") + french[2] + ("]" if french[3] == "]" else ")")
    builder = _BUILDER.fullmatch(text)
    if builder:
        return parse(builder[2], depth + 1)
    opening = next((o for o in ("(", "[", "{", r"\{", r"\langle") if text.startswith(o)), "")
    end = closing(text, 0) if opening else -1
    if end < 0 or text[end:] not in (")", "]", "}", r"\}", r"\rangle"):
        return None
    inner = text[len(opening) : end].strip()
    if opening == r"\{":
        form = parse(inner, depth + 1) if not _GROUPED.fullmatch(inner) else NOTHING
        return Form("set", items=form.items if form.kind == "list" else (form,))
    if opening == "{":
        return parse(inner, depth + 1)
    pieces = [piece for _, piece in split(inner, re.compile("[,;]"))]
    if len(pieces) == 1:
        is_wrapper = opening + text[end:] == "()" or inner.startswith(r"\begin")
        return parse(inner, depth + 1) if is_wrapper else None
    if len(pieces) > MAX_ITEMS:
        return NOTHING
    brackets = "()" if opening == r"\langle" else opening + text[end:]
    return Form("tuple", brackets, tuple(parse(piece, depth + 1) for piece in pieces))


def _matrix(text: str, depth: int) -> Form | None:
    found = _MATRIX.fullmatch(text)
    if found is None or r"\begin" in found[3]:
        return None
    kind = "||" if found[1] in ("v", "V") else "()"
    rows = [row.split("&") for row in re.split(r"\\cr(?![a-zA-Z])", found[3]) if row.strip()]
    if sum(map(len, rows)) > MAX_ITEMS:
        return NOTHING
    items = tuple(
        Form("tuple", "()", tuple(parse(cell.strip(), depth + 1) for cell in row)) for row in rows
    )
    return Form("matrix", kind, items)


def _both_signs(text: str, depth: int) -> Form | None:
    if not _PLUS_MINUS.search(text):
        return None
    upper = _PLUS_MINUS.sub(lambda m: "+" if m[1] == "pm" else "-", text)
    lower = _PLUS_MINUS.sub(lambda m: "-" if m[1] == "pm" else "+", text)
    items = (parse(upper.lstrip("+ "), depth + 1), parse(lower.lstrip("+ "), depth + 1))
    return Form("list", items=items)


# --- equations and inequalities -------------------------------------------------------------------


def is_name(text: str) -> bool:
    """Whether a text names a quantity: ``x``, ``a_n``, ``f(x)``, ``AB``, ``\\angle ABC``."""
    return bool(_NAME.fullmatch(text.strip()))


def is_loose_name(text: str) -> bool:
    """Whether a text is a sum, product or quotient of letters, as in ``m+n = 113``."""
    return bool(_LOOSE_NAME.fullmatch(text.strip()))


def _relation(pieces: list[tuple[str, str]], text: str, depth: int) -> Form:
    if not pieces[0][1] and pieces[0][0] == "" and pieces[1][0] in (r"\approx", "="):
        return parse(" ".join(m + " " + p for m, p in pieces[1:])[len(pieces[1][0]) :], depth + 1)
    for place, (mark, _) in enumerate(pieces[1:], 1):
        if mark == r"\approx" and (place > 1 or not is_name(pieces[0][1])):
            return _chain(pieces[:place], text[: text.index(r"\approx")].strip(), depth)
    return _chain([(m.replace(r"\approx", "="), p) for m, p in pieces], text, depth)


def _chain(pieces: list[tuple[str, str]], text: str, depth: int) -> Form:
    if len(pieces) == 1:
        return parse(pieces[0][1], depth + 1)
    marks = {mark for mark, _ in pieces[1:]}
    sides = [side for _, side in pieces]
    if not all(sides) or len(sides) > MAX_SIDES:
        return NOTHING
    if marks == {"="}:
        return _equation(sides, text, depth)
    if marks in ({r"\in"}, {r"\equiv"}) and len(sides) == 2 and is_name(sides[0]):
        return replace(parse(sides[1], depth + 1), name=_plain(sides[0]), source=text)
    all_but = _reals_without(sides[1:]) if marks == {r"\neq"} and len(sides) == 2 else None
    if all_but and is_name(sides[0]):
        return replace(all_but, name=_plain(sides[0]), source=text)
    if marks <= set(_LESS) or marks <= set(_GREATER):
        return _inequality(pieces, text, depth)
    return Form("relation", text, source=text)


def _equation(sides: list[str], text: str, depth: int) -> Form:
    name, value = sides[0], sides[-1]
    if len(sides) == 2 and is_name(value) and not is_name(name):
        name, value = value, name
    if is_name(name) or (len(sides) == 2 and is_loose_name(name)):
        form = parse(value, depth + 1)
        if is_name(name) or form.kind == "value":
            is_loose = "" if is_name(name) else "?"
            return replace(form, name=is_loose + _plain(name), source=text)
    if not any(has_variables(side) for side in sides):
        others = tuple(parse(side, depth + 1) for side in sides[:-1])
        return replace(parse(value, depth + 1), others=others)
    return Form("relation", text, source=text) if len(sides) == 2 else NOTHING


def _inequality(pieces: list[tuple[str, str]], text: str, depth: int) -> Form:
    """One variable between bounds as an interval; anything else stays a relation."""
    if pieces[1][0] in _GREATER:
        flip = dict(zip(_GREATER, _LESS, strict=True))
        marks = [flip[mark] for mark, _ in reversed(pieces[1:])]
        sides = [side for _, side in reversed(pieces)]
    else:
        marks, sides = [mark for mark, _ in pieces[1:]], [side for _, side in pieces]
    if len(sides) == 2:
        if is_name(sides[0]) == is_name(sides[1]):
            return Form("relation", text, source=text)
        if is_name(sides[0]):
            marks, sides = ["<", *marks], [r"-\infty", *sides]
        else:
            marks, sides = [*marks, "<"], [*sides, r"\infty"]
    if len(sides) != 3 or not is_name(sides[1]) or is_name(sides[0]) or is_name(sides[2]):
        return Form("relation", text, source=text)
    brackets = ("(" if marks[0] == "<" else "[") + (")" if marks[1] == "<" else "]")
    bounds = (parse(sides[0], depth + 1), parse(sides[2], depth + 1))
    return Form("tuple", brackets, bounds, name=_plain(sides[1]), source=text)


def _plain(name: str) -> str:
    return re.sub(r"[\s{}]|\\text", "", name)
