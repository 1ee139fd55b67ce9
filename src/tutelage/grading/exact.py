"""Exact arithmetic on tidy answers: whole numbers, decimals, fractions, powers, square roots.

A small recursive descent over the text: nothing is evaluated by Python or by a library, and every
number is bounded before it is made.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import factorial, isqrt

MAX_BITS = 40_000
"""Largest numerator or denominator, in bits."""
MAX_DEPTH = 40
"""Deepest nesting of brackets."""

_TOKEN = re.compile(
    r"\s*(?:([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?(?![0-9])|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    r"|(\\frac|\\cdot|\\sqrt|\\binom|[-+/^(){}!]))"
)
_STARTS_FACTOR = ("(", "{", r"\frac", r"\sqrt", r"\binom")


class _InexactError(Exception):
    """Not an exact number, or too large a one."""


def exact(text: str) -> Fraction | None:
    """The value of an answer that is arithmetic on rational numbers; None when it is not.

    Args:
        text: A tidy answer, such as ``\\frac{3}{4}``, ``2^{10}``, ``1,000`` or ``14/2``.
    """
    try:
        parser = _Parser(_tokens(text))
        value = parser.sum(0)
    except _InexactError:
        return None
    return value if parser.token == "" else None


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    while place < len(text.rstrip()):
        found = _TOKEN.match(text, place)
        if found is None:
            raise _InexactError
        tokens.append(found[1] or found[2])
        place = found.end()
    if not tokens:
        raise _InexactError
    return [*tokens, ""]


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._place = 0

    @property
    def token(self) -> str:
        return self._tokens[self._place]

    def _take(self, token: str) -> bool:
        if self.token != token:
            return False
        self._place += 1
        return True

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise _InexactError

    def sum(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise _InexactError
        value = self._product(depth)
        while self.token in ("+", "-"):
            sign = -1 if self._take("-") else 1
            if sign == 1:
                self._expect("+")
            value = _bounded(value + sign * self._product(depth))
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._signed(depth)
        while self.token in ("/", r"\cdot", *_STARTS_FACTOR):
            if self._take("/"):
                below = self._signed(depth)
                if not below:
                    raise _InexactError
                value = value / below
            else:
                value *= self._signed(depth) if self._take(r"\cdot") else self._power(depth)
            _bounded(value)
        return value

    def _signed(self, depth: int) -> Fraction:
        if self._take("-"):
            return -self._signed_once(depth)
        self._take("+")
        return self._signed_once(depth)

    def _signed_once(self, depth: int) -> Fraction:
        if self.token in ("+", "-"):
            raise _InexactError
        return self._power(depth)

    def _power(self, depth: int) -> Fraction:
        base = self._atom(depth)
        while self._take("!"):
            if base.denominator != 1 or not 0 <= base <= 200:
                raise _InexactError
            base = Fraction(factorial(int(base)))
        if not self._take("^"):
            return base
        exponent = self._signed(depth + 1)
        if self.token == "^" or exponent.denominator != 1 or (not base and exponent < 0):
            raise _InexactError
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits > MAX_BITS:
            raise _InexactError
        return Fraction(base ** int(exponent))

    def _atom(self, depth: int) -> Fraction:
        if self._take(r"\frac"):
            above, below = self._group(depth), self._group(depth)
            if not below:
                raise _InexactError
            return above / below
        if self._take(r"\sqrt"):
            return _root(self._group(depth))
        if self.token == r"\binom" or not self.token:
            raise _InexactError
        for opening, end in (("(", ")"), ("{", "}")):
            if self._take(opening):
                value = self.sum(depth + 1)
                self._expect(end)
                return value
        return self._number()

    def _group(self, depth: int) -> Fraction:
        self._expect("{")
        value = self.sum(depth + 1)
        self._expect("}")
        return value

    def _number(self) -> Fraction:
        text = self.token.replace(",", "")
        if not text[:1].isdigit() and text[:1] != ".":
            raise _InexactError
        self._place += 1
        whole, _, part = text.partition(".")
        return _bounded(Fraction(int((whole or "0") + part), 10 ** len(part)))


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise _InexactError
    root = Fraction(isqrt(value.numerator), isqrt(value.denominator))
    if root * root != value:
        raise _InexactError
    return root


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _InexactError
    return value
