"""The process that compares formulas: reads untrusted LaTeX by math-verify's parser, under limits.

Run as a program by `grading.pool`; it imports nothing of this package, so it starts quickly. It
reads one JSON object a line, {"kind", "prediction", "gold"}, and answers {"equal", "reason"}. The
parent kills it at its deadline. Files, processes, sockets and evaluated text are refused by an
audit hook, memory by the kernel.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
import sysconfig
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from antlr4 import Token
from antlr4.error.ErrorListener import ErrorListener
from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,
    NormalizationConfig,
    _Latex2Sympy,
    normalize_latex,
)
from sympy import (
    Basic,
    Eq,
    Expr,
    Float,
    Ge,
    Gt,
    I,
    Integral,
    Le,
    Lt,
    MatrixBase,
    Ne,
    Number,
    Product,
    Rational,
    Rel,
    Sum,
    Symbol,
    SympifyError,
)

MEMORY_BYTES = 1 << 30
"""Address space of the process."""
DIGITS = 50
"""Decimal digits to which two values must agree."""
LARGEST = Float(10) ** (DIGITS - 5)
"""Values above it are not compared: a whole number added would be lost in the digits."""
_POINTS = (
    (37, 29), (11, 17), (-23, 19), (41, 7), (-5, 13), (97, 53), (13, 31), (-61, 9), (131, 11)
)  # fmt: skip
"""Fractions from which the values of variables are made."""
_UNBOUNDED = (Sum, Product, Integral)
"""With variables in them these may take for ever."""
_TRUSTED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib"))
_REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "urllib.", "http.", "ftplib.")
_HARMLESS = ("os.listdir", "os.scandir", "os.putenv")


def main() -> None:
    """Answer requests until the input ends."""
    logging.disable(logging.CRITICAL)
    if not _works():
        sys.exit("math-verify does not read formulas as expected")
    _limit()
    sys.dont_write_bytecode = True  # a module that is loaded late is only read
    blocked: list[str] = []
    sys.addaudithook(lambda event, arguments: _audit(event, arguments, blocked))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # Should the parent die, the kernel still ends a comparison that never would.
        signal.alarm(int(request["alarm_s"]))
        equal, reason = compare(request)
        signal.alarm(0)
        if blocked:
            equal, reason = False, f"blocked:{blocked[0]}"
            blocked.clear()
        print(json.dumps({"equal": equal, "reason": reason}), flush=True)


def _works() -> bool:
    """Whether the libraries do what is built on; it also loads what they load late."""
    value = {"kind": "value", "prediction": r"\frac{x}{2}+\sqrt{8}"}
    relation = {"kind": "relation", "prediction": "x^2=1-y"}
    return [
        compare({**value, "gold": r"2\sqrt{2}+0.5x"}),
        compare({**value, "gold": r"\frac{x}{3}"}),
        compare({**relation, "gold": "y+x^2=1"}),
        compare({**relation, "gold": r"\sin(x)\geq y"}),
    ] == [(True, ""), (False, ""), (True, ""), (False, "")]


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _audit(event: str, arguments: tuple[Any, ...], blocked: list[str]) -> None:
    """Refuse whatever reaches outside, and the evaluation of anything but installed modules."""
    is_refused = event.startswith(_REFUSED) and event not in _HARMLESS
    if event == "exec":
        is_refused = not arguments[0].co_filename.startswith((*_TRUSTED, "<frozen"))
    elif event == "compile":
        is_refused = not str(arguments[1]).startswith(_TRUSTED)
    elif event == "open":
        is_refused = not str(arguments[0]).startswith(_TRUSTED)
    if is_refused:
        blocked.append(event)
        raise PermissionError(event)


def compare(request: dict[str, str]) -> tuple[bool, str]:
    """Whether two formulas are equal, and why not if that could not be decided."""
    try:
        left, right = _parse(request["prediction"]), _parse(request["gold"])
        if left is None or right is None:
            return False, "unparsed"
        if request["kind"] == "relation":
            return _same_relation(left, right), ""
        return _same_value(left, right, 8 if request["kind"] == "rounded" else DIGITS), ""
    except MemoryError:
        return False, "memory"
    except (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError,
            RuntimeError, SympifyError, SyntaxError, TypeError, ValueError) as error:  # fmt: skip
        return False, f"undecided {type(error).__name__}"


class _Reader(_Latex2Sympy):  # type: ignore[misc]
    """math-verify's LaTeX parser; by itself it has Python evaluate the digits of numbers."""

    class MathErrorListener(ErrorListener):  # type: ignore[misc]
        """Syntax errors of a type of their own."""

        def __init__(self, source: str) -> None:
            super().__init__()

        def syntaxError(self, *arguments: Any) -> None:
            raise ValueError("not a formula")

    def __init__(self) -> None:
        super().__init__(config=ConversionConfig())
        self._parsers: list[Any] = []

    def create_parser(self, latex: str) -> Any:
        self._parsers.append(super().create_parser(latex))
        return self._parsers[-1]

    def parse(self, latex: str) -> Any:
        """The formula, of which the grammar by itself may leave the end unread."""
        found = super().parse(latex)
        if self._parsers.pop().getCurrentToken().type != Token.EOF:
            raise ValueError("not all of it is a formula")
        return found

    def parse_number(self, text: str) -> Any:
        number = Fraction(text.replace(",", ""))
        return Rational(number.numerator, number.denominator)


def _parse(latex: str) -> Any:
    """The formula as a sympy object; None when math-verify does not read all of it."""
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none"
    )
    found = _Reader().parse(normalize_latex(latex, spelling))
    if not isinstance(found, Basic | MatrixBase):
        return None
    return found.xreplace({Symbol("i"): I})


def _same_value(left: Any, right: Any, digits: int) -> bool:
    if isinstance(left, MatrixBase) and isinstance(right, MatrixBase):
        cells = zip(left, right, strict=True)
        return left.shape == right.shape and all(_same_value(a, b, digits) for a, b in cells)
    if isinstance(left, Expr) and isinstance(right, Expr):
        return _agree(left, right, digits)
    # Sets and whatever else the parser makes of odd text: to simplify it would run code that sympy
    # writes for the purpose.
    return bool(left == right)


def _agree(left: Any, right: Any, digits: int) -> bool:
    """Equality of two expressions: exact when rational, else to so many digits at rational points.

    Points at which a side leaves the real numbers without containing the imaginary unit are
    outside the domain and do not count.
    """
    if left == right:
        return True
    if left.is_Rational and right.is_Rational and digits == DIGITS:
        return False
    has_variables = bool(left.free_symbols or right.free_symbols)
    if has_variables and (left.has(*_UNBOUNDED) or right.has(*_UNBOUNDED)):
        return False
    is_real = not (left.has(I) or right.has(I))
    num_points = 0
    for point in _points(left.free_symbols | right.free_symbols):
        a, b = _number(left.xreplace(point)), _number(right.xreplace(point))
        if a is None or b is None or (is_real and not (a.is_real and b.is_real)):
            continue
        if max(abs(a), abs(b)) > LARGEST:
            continue
        if not _close(a, b, digits):
            return False
        num_points += 1
    return num_points >= (3 if has_variables else 1)


def _points(symbols: set[Any]) -> Iterator[dict[Any, Any]]:
    ordered = sorted(symbols, key=str)
    for shift, (above, below) in enumerate(_POINTS if ordered else _POINTS[:1]):
        yield {
            symbol: Rational(above + 3 * place * (1 if above > 0 else -1), below + shift * place)
            for place, symbol in enumerate(ordered)
        }


def _number(value: Any) -> Any:
    """The value as a complex number of DIGITS digits, None when it is not one."""
    if value.free_symbols:
        return None
    number = value.evalf(DIGITS + 10, maxn=400)
    parts = number.as_real_imag()
    if not all(isinstance(part, Number) and part.is_finite for part in parts):
        return None
    return number


def _close(left: Any, right: Any, digits: int = DIGITS) -> bool:
    scale = max(abs(left), abs(right), Float(10) ** -digits)
    return bool(abs(left - right) <= scale * Float(10) ** -digits)


def _same_relation(left: Any, right: Any) -> bool:
    """Equations and inequalities that differ by a constant factor (positive, or sides swapped)."""
    if not (isinstance(left, Rel) and isinstance(right, Rel)):
        return False
    flipped = {Lt: Gt, Le: Ge}
    kinds, sides = [], []
    for relation in (left, right):
        kind, side = type(relation), relation.lhs - relation.rhs
        if kind in flipped:
            kind, side = flipped[kind], -side
        kinds.append(kind)
        sides.append(side)
    if kinds[0] is not kinds[1] or kinds[0] not in (Eq, Ne, Ge, Gt):
        return False
    return _proportional(sides[0], sides[1], kinds[0] in (Ge, Gt))


def _proportional(left: Any, right: Any, must_be_positive: bool) -> bool:
    ratios = []
    for point in _points(left.free_symbols | right.free_symbols):
        a, b = _number(left.xreplace(point)), _number(right.xreplace(point))
        if a is None or b is None or not (a.is_real and b.is_real) or not a or not b:
            continue
        ratios.append(a / b)
    if len(ratios) < 3 or (must_be_positive and ratios[0] < 0):
        return False
    return all(_close(ratios[0], ratio) for ratio in ratios)


if __name__ == "__main__":
    main()
