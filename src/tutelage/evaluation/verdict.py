"""What a run achieved by its own held-out measurements: one word, and the numbers behind it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tutelage.evaluation.metrics import Interval, mean_difference, paired_difference, ratio_terms

Word: TypeAlias = Literal["improved", "unchanged", "worse", "cut off", "too few problems to say"]
Row: TypeAlias = dict[str, Any]

_FEWEST_PROBLEMS = 8
"""An interval over fewer says nothing."""
_ACCURACY_MARGIN = 0.05
_KL_MARGIN = 0.1
"""An interval around 0 that is no wider than this on either side speaks of no change: points of
accuracy, and a share of the divergence before."""
_SMALL = 0.1
"""A change below this share of the margin is none, however sure."""
_CUT_OFF = 0.5
"""From this share of completions on that reached their limit, scores are those of beginnings."""

_LIMITS = (
    "a limit (sampling.max_new_tokens, data.max_turns, data.max_turn_tokens or "
    "data.max_inserted_tokens)"
)
"""What cuts a conversation off."""


@dataclass(frozen=True)
class Verdict:
    """A word and the numbers that it rests on."""

    word: Word
    reason: str

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}"


@dataclass(frozen=True)
class _Change:
    """One measure before and after, over the same problems."""

    word: Word
    text: str


def verdict_of(
    rows: Sequence[Row], last_step: int, has_turns: bool = False, is_distilled: bool = True
) -> Verdict | None:
    """The verdict on a run; None where it did not measure the student before and after.

    Accuracy decides where problems are graded and its interval excludes 0; otherwise the reverse KL
    does. Both are differences of the same problems, after minus before, with 95 % intervals over
    problems.

    Args:
        rows: records of `evaluation_rows.jsonl`.
        last_step: the step after which the run ended.
        has_turns: the completions are conversations, which have further limits.
        is_distilled: whether the run learned from the teacher; else the divergence from it is told
            and decides nothing.
    """
    before, after = (
        [row for row in rows if (row["model"], row["step"]) == ("student", step)]
        for step in (0, last_step)
    )
    if not before or not after or not last_step or "num_tokens" not in before[0]:
        return None
    share = sum(row["is_truncated"] for row in after) / len(after)
    accuracy, divergence = _accuracy(before, after), _divergence(before, after)
    changes = [change for change in (accuracy, divergence) if change]
    is_split = is_distilled and len({change.word for change in changes}) > 1
    texts = [f"{change.text}: {change.word}" if is_split else change.text for change in changes]
    texts = texts or ["nothing could be measured"]
    if share >= _CUT_OFF:
        limit = _LIMITS if has_turns else "sampling.max_new_tokens"
        cut = f"{share:.0%} of the last completions were cut off at {limit}"
        return Verdict("cut off", "; ".join([cut, *texts]))
    deciding = changes if is_distilled else [accuracy] if accuracy else []
    return Verdict(_word([change.word for change in deciding]), "; ".join(texts))


def _word(words: Sequence[Word]) -> Word:
    for word in words:
        if word in ("improved", "worse"):
            return word
    return "unchanged" if "unchanged" in words else "too few problems to say"


def _accuracy(before: Sequence[Row], after: Sequence[Row]) -> _Change | None:
    first, last = (_means([r for r in rows if r["is_correct"] is not None], "is_correct")
                   for rows in (before, after))  # fmt: skip
    problems = sorted(first.keys() & last.keys())
    if not problems:
        return None
    a, b = ([scores[name] for name in problems] for scores in (first, last))
    change = paired_difference(b, a)
    k = len(before) // len({row["prompt_id"] for row in before})
    text = (
        f"mean@{k} {100 * _mean(a):.1f} % -> {100 * _mean(b):.1f} % ({_signed(change, 100, 1)} "
        f"points over {_count(problems)})"
    )
    return _Change(_judged(change, _ACCURACY_MARGIN, len(problems)), text)


def _divergence(before: Sequence[Row], after: Sequence[Row]) -> _Change | None:
    first, last = (_divergences(rows) for rows in (before, after))
    problems = sorted(first.keys() & last.keys())
    if not problems:
        return None
    a, b = (ratio_terms(*zip(*(found[name] for name in problems), strict=True))
            for found in (first, last))  # fmt: skip
    change = mean_difference(b, a)
    is_better = Interval(-change.value, -change.high, -change.low)
    text = (
        f"reverse KL {_mean(a):.4g} -> {_mean(b):.4g} nats ({_signed(change, 1, 4)} over "
        f"{_count(problems)})"
    )
    return _Change(_judged(is_better, _KL_MARGIN * _mean(a), len(problems)), text)


def _divergences(rows: Sequence[Row]) -> dict[str, tuple[float, int]]:
    """Nats and tokens of each problem: all tokens weigh the same, as in every KL of a run."""
    nats: defaultdict[str, float] = defaultdict(float)
    tokens: defaultdict[str, int] = defaultdict(int)
    for row in rows:
        value = row["reverse_kl_nats"]
        nats[row["prompt_id"]] += math.nan if value is None else value
        count = row.get("num_rows")  # those that have a teacher
        tokens[row["prompt_id"]] += row["num_tokens"] if count is None else count
    return {n: (nats[n], tokens[n]) for n in nats if tokens[n] and math.isfinite(nats[n])}


def _means(rows: Sequence[Row], key: str) -> dict[str, float]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        values[row["prompt_id"]].append(float(row[key]))
    return {name: _mean(found) for name, found in values.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _judged(better: Interval, margin: float, num_problems: int) -> Word:
    """What an interval of an improvement says."""
    if num_problems < _FEWEST_PROBLEMS:
        return "too few problems to say"
    if abs(better.value) >= _SMALL * margin:
        if better.low > 0:
            return "improved"
        if better.high < 0:
            return "worse"
    is_narrow = max(abs(better.low), abs(better.high)) <= margin
    return "unchanged" if is_narrow else "too few problems to say"


def _signed(change: Interval, scale: float, digits: int) -> str:
    value, low, high = (scale * x for x in (change.value, change.low, change.high))
    if not math.isfinite(high - low):  # of one problem
        return f"{value:+.{digits}f}, no interval"
    return f"{value:+.{digits}f}, 95 % {low:+.{digits}f} to {high:+.{digits}f}"


def _count(problems: Sequence[str]) -> str:
    return f"{len(problems)} problem{'s' * (len(problems) != 1)}"
