"""Training prompts that repeat a benchmark problem, word by word or nearly so."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tutelage.data.types import Prompt

NGRAM = 8
"""Words in a row that are looked up."""
SHARE = 0.5
"""Share of a problem's n-grams from which on a prompt repeats it."""

Gram: TypeAlias = tuple[str, ...]
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Overlap:
    """A training prompt and the benchmark problem that it repeats most."""

    prompt_id: str
    benchmark_id: str
    share: float
    """Share of the problem's n-grams that are in the prompt, in (0, 1]."""


def find_overlaps(
    training: Sequence[Prompt],
    benchmark: Sequence[Prompt],
    size: int = NGRAM,
    share: float = SHARE,
) -> list[Overlap]:
    """Training prompts that hold at least a given share of the n-grams of a benchmark problem.

    Words are runs of letters and digits in lower case: spacing, punctuation and LaTeX signs hide
    nothing. A single shared n-gram says little, since contest problems end alike ("where m and n
    are relatively prime positive integers"). A problem of fewer than n words counts when the
    prompt has exactly its words. What was told in other words is not found.

    Args:
        training: prompts to look through.
        benchmark: problems that must not be among them, without an instruction around them.
        size: words in a row, n.
        share: least share that is reported, in (0, 1].

    Returns:
        One overlap for each training prompt concerned, in their order.
    """
    grams = [_grams(problem, size) for problem in benchmark]
    holders: dict[Gram, list[int]] = defaultdict(list)
    for index, own in enumerate(grams):
        for gram in own:
            holders[gram].append(index)
    found = []
    for prompt in training:
        hits = Counter(i for gram in _grams(prompt, size) for i in holders.get(gram, ()))
        shares = [(count / len(grams[i]), -i) for i, count in hits.items()]
        most, index = max(shares, default=(0.0, 0))
        if most >= share:
            found.append(Overlap(prompt.id, benchmark[-index].id, most))
    return found


def _grams(prompt: Prompt, size: int) -> set[Gram]:
    """Distinct runs of `size` words; a shorter text is one run."""
    words = _WORD.findall(_text(prompt).lower())
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))} - {()}


def _text(prompt: Prompt) -> str:
    """The text; of a chat what the user wrote."""
    if isinstance(prompt.content, str):
        return prompt.content
    return " ".join(turn["content"] for turn in prompt.content if turn["role"] == "user")
