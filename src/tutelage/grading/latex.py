"""LaTeX answers brought to one spelling, and cut at the places that structure them.

Answers are untrusted text: everything here is string handling, bounded by the length of the text.
"""

from __future__ import annotations

import re

MAX_ANSWER = 1_000
"""Longest answer in characters; a longer one equals nothing but itself."""

_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": r"\cdot ",
    "÷": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ",
    "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ",
    "∅": r"\emptyset ", "′": "'", "’": "'", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "ℝ": r"\mathbb{R}", "∘": r"\circ ", "º": "°", "⟨": r"\langle ", "⟩": r"\rangle ",
    "λ": r"\lambda ", "μ": r"\mu ", "γ": r"\gamma ", "δ": r"\delta ", "φ": r"\phi ",
    "ω": r"\omega ", "σ": r"\sigma ", "ρ": r"\rho ",
    "τ": r"\tau ", "Δ": r"\Delta ", "Ω": r"\Omega ", "¢": " cents",
    "，": ",", "；": ";", "（": "(", "）": ")", "：": ":", "％": "%", "。": ".", "\u00a0": " ",
    "‐": "-", "‑": "-", "‒": "-", "﹣": "-", "－": "-", "⁄": "/",
    "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "",
}  # fmt: skip
_VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5),
    "⅗": (3, 5), "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8),
    "⅞": (7, 8),
}  # fmt: skip
_TABLE = str.maketrans(
    {**_CHARACTERS, **{c: rf"\frac{{{a}}}{{{b}}}" for c, (a, b) in _VULGAR.items()}}
)
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\\(?:\[[^\]]*\])?", r"\\cr "),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|displaystyle|textstyle|limits)"
         r"(?![a-zA-Z])", ""),
        (r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge)(?![a-zA-Z])", ""),
        (r"\{\s*\\(?:rm|bf|it|sf|tt)\s+([^{}]*)\}", r"\\text{\1}"),
        (r"(?:\\cr\s*)+$", ""),
        (r"\\(?:phantom|vspace|hspace|label|tag)\s*\*?\{[^{}]*\}", " "),
        (r"\\(?:textcolor|color)\s*\{[^{}]*\}|\\(?:underline|ensuremath)(?=\s*\{)", ""),
        (r"\\mathbb\s*([A-Z])|\\([RZNQC])(?![a-zA-Z])", r"\\mathbb{\1\2}"),
        (r"\\operatorname\*?\s*\{\s*([a-zA-Z]+)\s*\}", r"\\\1 "),
        (r"(?<=[0-9])\{:\}", ":"),
        (r"\\(?:thin|med|thick)space(?![a-zA-Z])", r"\\,"),
        (r"\{\s*(\\[,;:! ]|~)\s*\}", r"\1"),
        (r"(?:\\math(?:ord|punct)\s*|\\text\s*(?=\{,\}))?\{\s*,\s*\}"
         r"|(?:\\!\s*)+,|,\s*(?:\\!\s*)+", "{,}"),
        (r"(?<=[0-9])\s*(?:\{,\}|(?:(?:\\[,;: ]|~)\s*)+)\s*(?=[0-9]{3}(?![0-9]))", ""),
        (r"\{,\}", ","),
        (r"(?<=[0-9])'(?=[0-9]{3}(?:'[0-9]{3})*(?:\.[0-9]+)?$)", ""),  # 1'234'567
        (r"\\!", ""),
        (r"\\(?:[,;:> ]|quad(?![a-zA-Z])|qquad(?![a-zA-Z]))|~", " "),
        (r"\\(?:[dtcs]|nice)frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\\le(?![a-zA-Z])|\\leqslant(?![a-zA-Z])|<=|=<", r"\\leq "),
        (r"\\ge(?![a-zA-Z])|\\geqslant(?![a-zA-Z])|>=|=>", r"\\geq "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\ne(?![a-zA-Z])|(?<![0-9)])!=", r"\\neq "),
        (r"\+/-", r"\\pm "),
        (r"\\(?:approxeq|simeq|thickapprox)(?![a-zA-Z])", r"\\approx "),
        (r"\\times(?![a-zA-Z])|\\ast(?![a-zA-Z])", r"\\cdot "),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:lbrace|\{)\s*", r"\\{"),
        (r"\\(?:rbrace|\})\s*", r"\\}"),
        (r"\\(?:lvert|rvert|vert)(?![a-zA-Z])", "|"),
        (r"\\colon(?![a-zA-Z])", ":"),
        (r"\\(?:textbf|textit|textrm|textsf|textnormal|mbox|mathrm|mathbf|mathit|boldsymbol|bm|"
         r"rm|bf|hbox|texttt|emph|mathsf|fbox)(?=\s*\{)", r"\\text"),
        (r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])", "°"),
        (r"\^\s*(?:\{\s*)?\\text\s*\{\s*o\s*\}(?:\s*\})?|(?<=[0-9])\s*\\deg(?![a-zA-Z])", "°"),
        (r"\\prime(?![a-zA-Z])", "'"),
        (r"\^\s*\{\s*('+)\s*\}|\^\s*(?=')", r"\1"),
        (r"(?<=[0-9])\^\s*(?:o(?![a-zA-Z])|\{\s*o\s*\})", "°"),
        (r"\^\s*(?:\{\s*)?\\text\s*\{\s*(?:th|st|nd|rd)\s*\}(?:\s*\})?", ""),
        (r"(?<=[0-9])\^\s*(?:th|st|nd|rd)(?![a-zA-Z])|(?<=[0-9])\^\s*\{(?:th|st|nd|rd)\}", ""),
        (r"^\s*([0-9]+)(?:th|st|nd|rd)\s*$", r"\1"),
        (r"\\frac\s*\{\s*\\text\{([^{}]*)\}\s*\}\s*\{\s*\\text\{([^{}]*)\}\s*\}", r"\\text{\1/\2}"),
        (r"^\s*\(?\s*([0-9A-F]+)\s*\)?\s*(?:_\s*\{?)?\s*(?:\\text\{)?[\s(]*base[\s-]*\}?\s*(\w+)[\s)}]*$",
         r"\1_{\2}"),
        (r"^\s*(?:\(([0-9A-F]+)\)|\{([0-9A-F]+)\})\s*_", r"\1\2_"),
        (r"(?<=[0-9A-F])_\s*\\text\s*\{\s*([a-z0-9]+)\s*\}", r"_{\1}"),
        (r"^\s*\\text\{([0-9A-F]+)\}\s*_", r"\1_"),
        (r"^\s*(?:\\text\{\s*)?(?:USD|US\s*\}?\s*\\?\$)\s*\}?\s*(?=[0-9])", "$"),
        (r"(?<![a-zA-Z\\])(?:[iI]nf(?:inity)?|oo)(?![a-zA-Z])", r"\\infty "),
        (r"(?<=[\])])\s*U\s*(?=[\[(])", r"\\cup "),
        (r"(?<=[0-9])\s*x\s*(?=10\s*\^)", r"\\cdot "),
        (r"(\^\s*(?:\{[^{}]*\}|[0-9a-zA-Z]))\s*(_\s*(?:\{[^{}]*\}|[0-9a-zA-Z]))", r"\2\1"),
        (r"\\\$\s*", "$"),
        (r"^\s*-\s+(?=\$[0-9.])", "-"),
        (r"\\%", "%"),
        (r"\bpct\b|\bper ?cent\b|\\text\s*\{\s*(?:per ?cent|pct)\s*\}", "%"),
        (r"\\dots|\\ldots|\\cdots", "..."),
    )
)  # fmt: skip
_TRAILING = re.compile(r"(?:[.,;:\s]|(?<!\\)\\[,;:! ]|(?<!\\)\\$)+$")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_SCALES = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
}  # fmt: skip
_SCALE = re.compile(
    r"(?<=[0-9])\s*(\\text\{\s*)?(hundred|thousand|million|billion|trillion|dozen)\b\s*(\})?"
)
_FUNCTIONS = "sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan|sinh|cosh|tanh|pi|infty"
_BARE_FUNCTION = re.compile(rf"(?<![a-zA-Z\\])({_FUNCTIONS})(?![a-zA-Z])")
_LEADS = re.compile(
    r"(?i)(?:\\text\{\s*)?(?:so |thus |therefore,? |hence )?(?:(?:the )?(?:final )?answer(?: is)?|"
    r"approximately|about|approx\.?|roughly|(?:option|choice)(?=[\s:}]*\(?[A-J]\)?[\s}]*$))"
    r"(?![a-z])\s*[:=]?\s*\}?\s*"
)
_MIXED = re.compile(r"(?<![\w.^}_,)])([0-9]{1,9})\s*\\frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}")
_MIXED_SLASH = re.compile(r"(?<![\w.^}_/,)])([0-9]{1,9}) +([0-9]{1,9})/([0-9]{1,9})(?![\w.])")
_SCIENTIFIC = re.compile(r"(?<![\w.])([0-9]+(?:\.[0-9]*)?)[eE]([-+]?[0-9]{1,4})(?![\w.])")
_SPACED_GROUPS = re.compile(r"-?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?")
_REPEATING = re.compile(
    r"([0-9]*)\.([0-9]{0,30})\\(?:overline|bar|dot)\s*\{?([0-9]{1,30})(?(3)\}?)"
)


_ALIGNED = re.compile(r"\\begin\{(align(?:ed)?\*?|equation\*?|gather(?:ed)?\*?)\}(.*)\\end\{\1\}")


def tidy(text: str) -> str:
    """One spelling of an answer: delimiters, spacing, fonts, synonyms and short forms resolved."""
    text = _TRAILING.sub("", " ".join(text.translate(_TABLE).split()))
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    text = _undelimited(text)
    aligned = _ALIGNED.fullmatch(text)
    if aligned:
        text = aligned[2].replace("&", "")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"√\s*\(?(?=\d)", r"\\sqrt ", text) if "√(" not in text else text
    text = text.replace("√", "sqrt").replace("**", "^").replace("*", r"\cdot ")
    text = _SCALE.sub(_scaled, text)
    text = _TEXT.sub(_unwrapped, re.sub(r"\\text\s*(?=\{[^{}]*\\[a-zA-Z]+\s*\{)", "", text))
    text = re.sub(r"\^\s*\{\s*\}", "", text)
    text = _BARE_FUNCTION.sub(r"\\\1", text)
    text = _spelled_out(" ".join(text.split()))
    text = _REPEATING.sub(_repeating, text)
    text = _SCIENTIFIC.sub(r"\1\\cdot 10^{\2}", text)
    text = _MIXED.sub(_mixed, text)
    text = _MIXED_SLASH.sub(_mixed, text)
    text = _LEADS.sub("", text, count=1) if _LEADS.match(text) else text
    text = _undelimited(_TRAILING.sub("", text.strip()).strip())
    return text.replace(" ", "") if _SPACED_GROUPS.fullmatch(text) else text


def _undelimited(text: str) -> str:
    """Without mathematics delimiters and Markdown around the answer, or around its formula."""
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text).strip()
    for mark in ("$$", "**", "__", "`"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            text = text[len(mark) : -len(mark)].strip()
    plain = re.findall(r"(?<!\\)\$", text)
    if len(plain) % 2 == 0 and plain:
        text = re.sub(r"(?<!\\)\$", " ", text).strip()
    return text


def _scaled(found: re.Match[str]) -> str:
    opening, word, closing = found.groups()
    value = r"\cdot 12" if word == "dozen" else rf"\cdot 10^{{{_SCALES[word]}}}"
    return value + (r"\text{" if opening and not closing else "")


def _unwrapped(found: re.Match[str]) -> str:
    """Text that is mathematics (a letter, a number, punctuation) without its wrapper."""
    inner = found[1].strip()
    before = found.string[: found.start()].rstrip()
    is_unit_letter = len(inner) == 1 and before[-1:] in tuple("0123456789})")
    if not inner:
        return " "
    if found[0] == found.string.strip() or inner in ("th", "st", "nd", "rd"):
        return f" {inner} " if inner not in ("th", "st", "nd", "rd") else ""
    if not re.search("[A-Za-z]", inner) or (len(inner) == 1 and not is_unit_letter):
        return f" {inner} " if inner not in (":", "/") else inner
    if inner in ("and", "or", ", and", ", or", ",and"):
        return f" {inner.strip(', ')} "
    return f"\\text{{{inner}}}"


def _repeating(found: re.Match[str]) -> str:
    whole, fixed, cycle = found.groups()
    below = (10 ** len(cycle) - 1) * 10 ** len(fixed)
    above = int((whole or "0") + fixed + cycle) - int((whole or "0") + fixed)
    return rf"\frac{{{above}}}{{{below}}}"


def _mixed(found: re.Match[str]) -> str:
    whole, above, below = found.groups()
    if int(above) >= int(below):
        return found[0]
    return rf"\frac{{{int(whole) * int(below) + int(above)}}}{{{below}}}"


def _spelled_out(text: str) -> str:
    """Braces where LaTeX lets them out: \\frac12, \\sqrt3, sqrt(5), {3 \\over 4}, ^\\frac12."""
    text = re.sub(r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}", text)
    out, place = [], 0
    for found in re.finditer(r"\\(frac|binom|sqrt)(?![a-zA-Z])", text):
        if found.start() < place:
            continue
        out.append(text[place : found.start()])
        argument, place = _command(found[1], text, found.end())
        out.append(argument)
    return "".join((*out, text[place:]))


def _command(name: str, text: str, place: int) -> tuple[str, int]:
    root = ""
    if name == "sqrt" and text[place:].lstrip().startswith("["):
        end = text.find("]", place)
        if end > 0:
            root, place = text[text.index("[", place) : end + 1], end + 1
    made = f"\\{name}{root}"
    for _ in range(1 if name == "sqrt" else 2):
        argument, place = _argument(text, place, name == "sqrt")
        if argument is None:
            return made, place
        made += "{" + _spelled_out(argument) + "}"
    return made, place


def _argument(text: str, place: int, allow_round: bool) -> tuple[str | None, int]:
    while place < len(text) and text[place] == " ":
        place += 1
    if place >= len(text):
        return None, place
    if text[place] == "{" or (allow_round and text[place] == "("):
        end = closing(text, place)
        return (text[place + 1 : end], end + 1) if end >= 0 else (None, place)
    command = re.compile(r"\\[a-zA-Z]+").match(text, place)
    number = re.compile("[0-9]+").match(text, place) if allow_round else None
    end = command.end() if command else number.end() if number else place + 1
    return text[place:end], end


# --- structure ------------------------------------------------------------------------------------

_BRACKET = re.compile(r"\\\{|\\\}|\\langle|\\rangle|[(){}\[\]]")
_OPENING = ("(", "[", "{", r"\{", r"\langle")


def closing(text: str, place: int) -> int:
    """Where the bracket that opens at `place` closes; -1 if it does not. [0,1) is a pair, too."""
    depth = 0
    for found in _BRACKET.finditer(text, place):
        depth += 1 if found[0] in _OPENING else -1
        if depth == 0:
            return found.start()
    return -1


def split(text: str, separator: re.Pattern[str]) -> list[tuple[str, str]]:
    """Pieces between separators outside brackets, each with the separator before it."""
    pieces, depth, start, mark, place = [], 0, 0, "", 0
    while place < len(text):
        bracket = _BRACKET.match(text, place)
        found = separator.match(text, place) if depth == 0 and not bracket else None
        if bracket:
            depth += 1 if bracket[0] in _OPENING else -1
            place = bracket.end()
        elif found and found[0]:
            pieces.append((mark, text[start:place].strip()))
            mark, place = found[0].strip(), found.end()
            start = place
        else:
            command = re.compile(r"\\(?:[a-zA-Z]+|.)").match(text, place)
            place = command.end() if command else place + 1
    return [*pieces, (mark, text[start:].strip())]
