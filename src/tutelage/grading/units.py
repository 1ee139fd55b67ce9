"""Numbers with a unit: which trailing words are a unit, and which units are the same."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\text\{([^{}]*)\}|\\[a-zA-Z]+|[A-Za-z]+|\S|\s")
_FUNCTIONS = frozenset(("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "mod", "pi"))
_NO_UNIT = re.compile(
    r"\b(?:and|or|to|than|not|no|more|less|fewer|remainder|base|mod|if|for|when|where|is|times|"
    r"least|most|plus|minus|over|with|without|except|but|only|otherwise|any|all|solutions?|below|"
    r"above|under|beyond|squared|cubed|factorial|k|hal(?:f|ves)|quarters?|\w*(?:hundred|thousand|ten|"
    r"third|four|fif|six|seven|eigh|nin|elf)ths?|thirds?|"
    r"tens|gross|scores?)\b"
)
_SHORT = frozenset(
    ("cm", "mm", "km", "nm", "dm", "kg", "mg", "ml", "mL", "dl", "cl", "ft", "in", "yd", "mi",
     "lb", "oz", "hr", "ms", "Hz", "kJ", "kN", "kW", "Pa", "eV", "sq", "cu", "am", "pm", "mph")
)  # fmt: skip
_LETTERS = frozenset("mgsLlNJWVAKCFh")
_SAME = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "metre": "m",
    "meter": "m", "kilometer": "km", "kilometre": "km", "kilogram": "kg", "gram": "g",
    "milligram": "mg", "liter": "l", "litre": "l", "milliliter": "ml", "millilitre": "ml",
    "inche": "in", "inch": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi",
    "pound": "lb", "ounce": "oz", "hour": "h", "hr": "h", "minute": "min", "second": "s",
    "sec": "s", "newton": "n", "joule": "j", "watt": "w", "volt": "v", "dollar": "$", "buck": "$",
    "usd": "$", "degree": "°", "deg": "°", "mph": "mi/h", "cent": "cent", "unit": "unit",
    "euro": "€", "eur": "€", "gbp": "£",
}  # fmt: skip
_CURRENCY = "$€£¥₹"
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = (
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
)
NUMBER_WORDS = {
    **{word: value for value, word in enumerate(("zero", *_ONES, *_TEENS))},
    **{word: 10 * tens for tens, word in enumerate(_TENS, 2)},
    **{f"{a}-{b}": 10 * i + j for i, a in enumerate(_TENS, 2) for j, b in enumerate(_ONES, 1)},
}
"""Numbers below a hundred as they are spelled."""
_SCALES = re.compile(
    "hundred|(?:thous|mill|bill|trill|doz|hal[fv]|third|quarter|fourth|fifth|six|sev|eigh|nin|ten)"
)


def number_and_unit(text: str) -> tuple[str, str]:
    """A tidy answer without its unit, and the unit in one spelling ("" for none)."""
    if text[:1] in _CURRENCY and len(text) > 1:
        value, unit = number_and_unit(text[1:].strip())
        return value, text[0] if unit in ("", "$") else unit
    if text[:2] in ("-$", "-€", "-£") and len(text) > 2:
        return "-" + text[2:].strip(), text[1]
    for mark in ("%", "°", *_CURRENCY):
        if text.endswith(mark) and len(text) > 1:
            value = text[: -len(mark)].strip()
            is_angle = mark == "°" and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", value)
            return (text, "") if is_angle else (value, mark)
    if re.fullmatch(r"-?[0-9][0-9.,]*'", text):  # feet or minutes
        return text[:-1], "'"
    start = _unit_start(text)
    if start is None:
        return text, ""
    value, unit = text[:start].strip(), text[start:]
    if value.endswith("°"):
        value, unit = value[:-1].strip(), "°" + unit
    return value, _spelling(unit)


def _unit_start(text: str) -> int | None:
    """Where a unit begins that lasts to the end of the text; None without one."""
    before = ""
    depth = 0
    for found in _TOKEN.finditer(text):
        token = found[0]
        depth += (token == "{") - (token == "}")
        if depth == 0 and before and _begins_unit(found, before):
            return found.start() if _is_unit(text[found.start() :]) else None
        before += token
    return None


def _begins_unit(found: re.Match[str], before: str) -> bool:
    token = found[0]
    last = before.rstrip()[-1:]
    if found[1] is not None:
        return bool(re.search("[A-Za-z]", found[1]))
    if last.isascii() and last.isalpha():
        word = re.findall(r"\\?[A-Za-z-]+", before)[-1]
        is_count = word in NUMBER_WORDS and not (token in NUMBER_WORDS or _SCALES.match(token))
        if not before.endswith(" ") or not (len(word) == 1 or word[0] == "\\" or is_count):
            return False
    elif not (last.isdigit() or last in (")", "}", "]", ".", "°")):
        return False
    if not token.isalpha() or token in _FUNCTIONS:
        return False
    if token in _LETTERS and last == "°":
        return True
    if token in _SHORT:
        return last.isdigit() or last in (")", "}", ".") or before.endswith(" ")
    if not before.endswith(" "):
        return False
    if len(token) == 1:
        return token in _LETTERS and bool(re.fullmatch(r"-?[0-9][0-9.,]*", before.strip()))
    return len(token) >= 3 and (
        token.islower() or token in ("Newtons", "Joules", "USD", "EUR", "GBP")
    )


def _is_unit(text: str) -> bool:
    words = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    if _NO_UNIT.search(words.casefold()) or len(words) > 80:
        return False
    bare = re.sub(r"\^\s*\{?\s*-?[0-9]\s*\}?|\\cdot|\\frac", " ", words)
    return bool(re.fullmatch(r"[A-Za-z\s/.,'()°-]+", bare))


def _spelling(unit: str) -> str:
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", unit)
    text = re.sub(r"\^\s*\{?\s*(-?[0-9])\s*\}?", r"^\1", text)
    text = re.sub(r"[.,{}()]|\\cdot", " ", text)
    words = re.findall(r"[A-Za-z]+|\^-?[0-9]|/|°|'", text.replace(" per ", " / "))
    words = [_word(word) for word in words]
    for prefix, power in (("square", "^2"), ("cubic", "^3")):
        if prefix in words[:-1]:
            place = words.index(prefix)
            words[place : place + 2] = [words[place + 1], power]
    return "".join(words)


def _word(word: str) -> str:
    if len(word) <= 2:
        return "square" if word == "sq" else "cubic" if word == "cu" else word
    low = word.casefold()
    if low in _SAME:
        return _SAME[low]
    low = low[:-1] if low.endswith("s") and not low.endswith("ss") else low
    return _SAME.get(low, low)


def same_unit(left: str, right: str) -> bool:
    """Whether two units do not contradict each other; one that is left out never does."""
    return not left or not right or left.casefold() == right.casefold()
