"""Letters, Greek letters, subscripts and primes renamed to plain letters, for the parser's sake.

math-verify folds upper and lower case, reads primes as powers and refuses some subscripts. After
renaming, the letters of both answers are distinct single letters, and the same on both sides.
"""

from __future__ import annotations

import re

_POOL = "abchjkmnpqrstuvwxyz"
_GREEK = frozenset(
    (
        *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta"),
        *("vartheta", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon"),
        *("phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi"),
        *("Sigma", "Phi", "Psi", "Omega", "hbar", "ell"),
    )
)
_COMMANDS = frozenset(
    (
        *("frac", "sqrt", "cdot", "pi", "binom", "log", "ln", "exp", "lfloor", "rfloor", "lceil"),
        *("rceil", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh"),
        *("cosh", "tanh", "leq", "geq", "neq"),
    )
)
"""All that the parser is shown besides symbols: it has ways to evaluate text for other commands."""
_SCRIPT = r"(?:\s*_\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|[0-9a-zA-Z]))?'*"
_SYMBOL = re.compile(rf"(?:\\([a-zA-Z]+)|[a-zA-Z]){_SCRIPT}")
_ANGLE = re.compile(r"([0-9]+(?:\.[0-9]+)?)°")
_UNREADABLE = re.compile(
    r"[0-9]{60}|\^\s*\{?\s*[-(]?\s*[0-9]{5}"  # long numbers and exponents
    r"|\^\s*[{(][^{}()]*\^\s*[{(][^{}()]*\^|\^\s*[0-9.]+\s*\^\s*[0-9.]+"  # towers of powers
    r"|[0-9]{4}\s*[)}]*\s*!|!\s*[)}]*\s*[!^]"  # factorials
    r"|[^\x20-\x7e°]|__|[0-9)]\s*_|\\[^a-zA-Z{}|]|[;&#@\"`]"  # nothing that a formula has
)
MAX_FORMULA = 400
"""Longest formula in characters that is compared."""
MAX_BRACKETS = 60
"""Most opening brackets in a formula that is compared."""


def is_unreadable(text: str) -> bool:
    """Whether a formula is too long, too deep, unbalanced, or writes too large a number."""
    num_opened = len(re.findall(r"[({\[]", text))
    is_unbalanced = any(text.count(a) != text.count(b) for a, b in ("{}", "()"))
    is_large = len(text) > MAX_FORMULA or num_opened > MAX_BRACKETS
    commands = set(re.findall(r"\\([a-zA-Z]+)", re.sub(r"_\s*\{[^{}]*\}", "", text)))
    if commands - _COMMANDS - _GREEK:
        return True
    return is_large or is_unbalanced or bool(_UNREADABLE.search(text))


def has_variables(text: str) -> bool:
    """Whether a formula has letters other than e, i, π and the names of functions."""
    without = re.sub(r"\\([a-zA-Z]+)", lambda m: "x" if m[1] in _GREEK else " ", text)
    return bool(re.search(r"[a-zA-Z]", re.sub(r"[ei](?!_)", "", without)))


def common_symbols(left: str, right: str) -> tuple[str, str] | None:
    """Both formulas with their symbols renamed alike; None when there are more than letters."""
    names: dict[str, str] = {}
    renamed = tuple(_renamed(text, names) for text in (left, right))
    if len(names) > len(_POOL):
        return None
    return renamed[0], renamed[1]


def _renamed(text: str, names: dict[str, str]) -> str:
    def rename(found: re.Match[str]) -> str:
        symbol = re.sub(r"[\s{}]", "", found[0])
        if found[1] and found[1] not in _GREEK:
            return found[0]
        if symbol in ("e", "i"):
            return symbol
        place = names.setdefault(symbol, _POOL[len(names) % len(_POOL)])
        return f" {place} "

    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = _ANGLE.sub(r"(\\frac{\1\\pi}{180})", text)
    return re.sub(r"\s+", " ", _SYMBOL.sub(rename, text)).strip()
