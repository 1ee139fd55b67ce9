"""Reference answers rewritten: what keeps the value must be accepted, what changes it refused.

Answers come from the files that TUTELAGE_DATA names where they are, else from the labelled pairs
of the tests. Every rule applies to every answer that it fits.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from tutelage.grading.exact import exact
from tutelage.grading.latex import tidy
from tutelage.grading.mathematics import answers_equal, grade_completion

from .record import Outcome

FILES = ("math_train12k", "math500", "aime2024", "amc23")
PAIRS = Path(__file__).resolve().parents[1] / "tests" / "grading" / "grading_pairs.tsv"
MAX_LISTED = 50
Rule = Callable[[str], Iterator[str]]
Grade = Callable[[str, str], bool]

_SIGN = re.compile(r"(?:^|(?<=[(\[,&])|(?<=\\\\))\s*(-?)\s*(?=\\frac|\\sqrt|\\pi|[0-9])")
_THOUSANDS = re.compile(r"[0-9],\\?!?\s?[0-9]{3}|\{,\}|\\,")
_LETTERED = re.compile(r"\\text|\\begin|\\mbox|\\mathrm|[a-zA-Z]{4,}")


# --- the same value -------------------------------------------------------------------------------


def wrapped(gold: str) -> Iterator[str]:
    """Delimiters, boxes and a full stop around an answer."""
    yield from (f"${gold}$", rf"\({gold}\)", rf"\[{gold}\]", rf"\boxed{{{gold}}}", f" {gold}. ")
    yield rf"\displaystyle {gold}"
    yield f"**{gold}**"


def respelled(gold: str) -> Iterator[str]:
    """Commands that only look different."""
    plain = re.sub(r"\\[dt]frac", r"\\frac", gold)
    for name in ("frac", "dfrac", "tfrac"):
        yield plain.replace(r"\frac", rf"\{name}")
    if r"\left" in gold:
        yield re.sub(r"\\(?:left|right)(?![a-z])", "", gold)
    elif not re.search(r"[\[\]]|\\begin", gold):
        yield gold.replace("(", r"\left(").replace(")", r"\right)")
    yield gold.replace(r"\pi", "π").replace(r"\infty", "∞").replace(r"\cup", "∪")
    yield re.sub(r"\\text(?=\{)", r"\\mathrm", gold)


def spaced(gold: str) -> Iterator[str]:
    """Spaces around operators and after commas."""
    if not _THOUSANDS.search(gold) and not _LETTERED.search(gold):
        yield re.sub(r"([-+=,/])", r" \1 ", gold)
        yield re.sub(r"(?<=[-+=,(){}]) ", "", gold)


def renumbered(gold: str) -> Iterator[str]:
    """A number in other digits."""
    if re.fullmatch("[0-9]+", gold):
        yield from (f"{gold}.0", f"+{gold}", f"0{gold}", f"{int(gold):,}", rf"\text{{{gold}}}")
        yield from (f"{2 * int(gold)}/2", rf"\frac{{{3 * int(gold)}}}{{3}}", rf"x = {gold}")
    fraction = re.fullmatch(r"\\frac\{([0-9]+)\}\{([0-9]+)\}", gold)
    if fraction:
        above, below = fraction.groups()
        yield f"{above}/{below}"
        yield rf"\frac{{{7 * int(above)}}}{{{7 * int(below)}}}"


SAME: dict[str, Rule] = {
    "wrapped": wrapped, "respelled": respelled, "spaced": spaced, "renumbered": renumbered,
}  # fmt: skip


# --- another value --------------------------------------------------------------------------------


def other_digit(gold: str) -> Iterator[str]:
    """Each digit in turn replaced by another one."""
    for found in re.finditer("[0-9]", gold):
        place = found.start()
        yield f"{gold[:place]}{(int(found[0]) + 1 + place % 8) % 10}{gold[place + 1 :]}"


def other_sign(gold: str) -> Iterator[str]:
    """The sign of each number at the start of an entry turned round."""
    if re.search(r"\\pm|\\cos|\||\^\{?\\circ|[:%_]|\\text", gold):
        return
    for found in _SIGN.finditer(gold):
        number = re.match("[0-9.]+", gold[found.end() :])
        if number and not number[0].strip("0."):
            continue
        yield gold[: found.start()] + ("" if found[1] else "-") + gold[found.end() :]


def swapped_entries(gold: str) -> Iterator[str]:
    """Two neighbours in a tuple exchanged."""
    found = re.fullmatch(r"(\\left)?\(([^()]*,[^()]*?)(\\right)?\)", gold)
    if found and "infty" not in gold:
        entries = [entry.strip() for entry in found[2].split(",")]
        for i, (a, b) in enumerate(pairwise(entries)):
            if not answers_equal(a, b):
                yield f"({', '.join([*entries[:i], b, a, *entries[i + 2 :]])})"


def other_bracket(gold: str) -> Iterator[str]:
    """One bracket of an interval or tuple opened or closed."""
    found = re.fullmatch(r"(?:\\left)?([(\[])([^()\[\]]*,[^()\[\]]*?)(?:\\right)?([)\]])", gold)
    if found:
        turned = {"(": "[", "[": "(", ")": "]", "]": ")"}
        yield turned[found[1]] + found[2] + found[3]
        yield found[1] + found[2] + turned[found[3]]


def extended(gold: str) -> Iterator[str]:
    """One more answer, or a part of the answer missing."""
    if re.search(r"\\text|\\infty|[a-zA-Z]{4}", gold):
        return
    yield f"{gold}, 987654"
    yield rf"{gold} \text{{ or }} 987654"
    yield f"{gold}+987654"
    yield f"987654={gold}"


OTHER: dict[str, Rule] = {
    "digit": other_digit, "sign": other_sign, "swap": swapped_entries, "bracket": other_bracket,
    "extended": extended,
}  # fmt: skip


def golds() -> list[str]:
    """Distinct reference answers, in a fixed order."""
    folder = Path(os.environ.get("TUTELAGE_DATA", ""))
    files = [folder / f"{name}.jsonl" for name in FILES]
    if os.environ.get("TUTELAGE_DATA") and all(file.is_file() for file in files):
        lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
        return sorted({json.loads(line)["answer"] for line in lines})
    rows = [line.split("\t") for line in PAIRS.read_text("utf-8").splitlines()]
    return sorted({gold for mark, _, gold in rows if mark == "=" and r"\boxed" not in gold})


def literal(prediction: str, gold: str) -> bool:
    """A grader that knows no mathematics, for control: the same characters."""
    return prediction == gold


def careless(prediction: str, gold: str) -> bool:
    """A grader that only looks at the letters, for control."""
    return not set(re.findall("[a-z]+", gold)) - set(re.findall("[a-z]+", prediction))


def sweep(
    rules: dict[str, Rule], answers: list[str], grade: Grade, accept: bool
) -> tuple[Counter[str], list[tuple[str, str, str]]]:
    """Rewritings tried by rule, and those whose verdict is not `accept`."""
    tried: Counter[str] = Counter()
    wrong = []
    for gold in answers:
        for name, rule in rules.items():
            for text in dict.fromkeys(rule(gold)):
                if text != gold:
                    tried[name] += 1
                    if grade(text, gold) != accept:
                        wrong.append((name, text, gold))
    return tried, wrong


def as_completion(prediction: str, gold: str) -> bool:
    """The verdict on a completion that boxes the prediction."""
    return grade_completion(rf"Thus \boxed{{{prediction}}}.", gold)


def run(size: int) -> Outcome:
    """Rules on about `size` answers, spread over all; 0 is every answer."""
    answers = golds()
    answers = answers[:: max(1, len(answers) // size)] if size else answers
    tried_same, refused = sweep(SAME, answers, as_completion, True)
    tried_other, accepted = sweep(OTHER, answers, as_completion, False)
    some = answers[:: max(1, len(answers) // 200)]
    seen_same, seen_other = sweep(SAME, some, literal, True), sweep(OTHER, some, careless, False)
    return Outcome(
        "an answer rewritten keeps its verdict, an answer changed is refused",
        trials=sum(tried_same.values()) + sum(tried_other.values()),
        failures=len(refused) + len(accepted),
        control={
            f"refused by a literal grader of {sum(seen_same[0].values())}": len(seen_same[1]),
            f"accepted by a careless grader of {sum(seen_other[0].values())}": len(seen_other[1]),
        },
        details={
            "answers": len(answers),
            "exact": sum(exact(tidy(answer)) is not None for answer in answers),
            "same": dict(tried_same),
            "other": dict(tried_other),
            "wrongly_refused": refused[:MAX_LISTED],
            "wrongly_accepted": accepted[:MAX_LISTED],
            "num_wrongly_refused": dict(Counter(name for name, *_ in refused)),
            "num_wrongly_accepted": dict(Counter(name for name, *_ in accepted)),
        },
        is_sample=False,
    )
