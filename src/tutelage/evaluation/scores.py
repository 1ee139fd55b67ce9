"""From verdicts and answers of single samples to mean@k, pass@k and maj@k of a set of problems."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tutelage.evaluation.metrics import (
    Interval,
    clustered_interval,
    problem_majorities,
    problem_means,
    problem_pass_rates,
)
from tutelage.grading.mathematics import answer_key, answers_equal, extract_answer
from tutelage.grading.number import number_answer, number_key, numbers_equal
from tutelage.grading.pool import in_parallel

_RIGHT = "the right answer"


@dataclass(frozen=True)
class Voting:
    """What of a completion votes for maj@k."""

    answer_of: Callable[[str, bool], str | None] = number_answer
    """The answer that a completion votes for, given whether it was cut off; None abstains."""
    equal: Callable[[str, str], bool] = numbers_equal
    """Whether two answers are one vote."""
    key: Callable[[str], Hashable | None] = number_key
    """An answer's canonical form, by which `equal` decides between two that have one."""


BY_NUMBER = Voting()
BY_FORMULA = Voting(extract_answer, answers_equal, answer_key)


def voting_of(grader: str) -> Voting:
    """The vote that fits a grader: `math` votes by formulas, every other by numbers."""
    return BY_FORMULA if grader == "math" else BY_NUMBER


@dataclass(frozen=True)
class Scores:
    """Accuracies with 95 % intervals that treat problems as clusters; None without a grader."""

    num_problems: int
    num_samples: int
    mean_at_k: Interval | None = None
    pass_at_k: Interval | None = None
    maj_at_k: Interval | None = None
    pass_at: dict[int, Interval] = field(default_factory=dict)
    """Unbiased pass@j for j = 1, 2, 4, … below k."""

    def summary(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        record: dict[str, Any] = {
            "k": self.num_samples,
            "num_problems": self.num_problems,
            "num_samples": self.num_samples,
        }
        named = {"mean_at_k": self.mean_at_k, "pass_at_k": self.pass_at_k}
        named |= {"maj_at_k": self.maj_at_k}
        named |= {f"pass_at_{j}": interval for j, interval in self.pass_at.items()}
        for name, interval in named.items():
            record[name] = None if interval is None else interval.value
            record[f"{name}_low"] = None if interval is None else interval.low
            record[f"{name}_high"] = None if interval is None else interval.high
        return record


def score(
    verdicts: Sequence[Sequence[bool | None]],
    answers: Sequence[Sequence[str | None]],
    voting: Voting | None = BY_NUMBER,
) -> Scores:
    """Scores of problems with k samples each; problems that cannot be graded do not count.

    Args:
        verdicts: one list of k verdicts a problem, None where a sample cannot be graded.
        answers: the final answer of each sample, None where it has none.
        voting: which answers are one vote; None where there is no vote (conversations).

    Returns:
        The scores over the problems that can be graded.
    """
    k = len(verdicts[0])
    kept = [i for i, group in enumerate(verdicts) if None not in group]
    if not kept:
        return Scores(len(verdicts), k)
    correct = [[bool(verdict) for verdict in verdicts[i]] for i in kept]
    majorities = None
    if voting is not None:
        votes = in_parallel(partial(votes_of, voting=voting), [answers[i] for i in kept], correct)
        majorities = clustered_interval(problem_majorities(votes, correct))
    smaller = [2**i for i in range(k.bit_length()) if 2**i < k]
    return Scores(
        len(verdicts),
        k,
        clustered_interval(problem_means(correct)),
        clustered_interval(problem_pass_rates(correct, k)),
        majorities,
        {j: clustered_interval(problem_pass_rates(correct, j)) for j in smaller},
    )


def votes_of(
    answers: Sequence[str | None], correct: Sequence[bool], voting: Voting = BY_NUMBER
) -> list[str | None]:
    """What each sample of one problem votes for: equal texts for equal answers, None abstains.

    All right answers are one vote: the grader found each equal to the reference.
    """
    wrong = _WrongVotes(voting)
    return [
        _RIGHT if is_right else None if answer is None else f"wrong: {wrong.vote(answer)}"
        for answer, is_right in zip(answers, correct, strict=True)
    ]


class _WrongVotes:
    """The wrong answers to one problem; only what has no canonical form is compared in pairs."""

    def __init__(self, voting: Voting) -> None:
        self._voting = voting
        self._votes: dict[str, str] = {}
        """The vote of each answer."""
        self._by_key: dict[Hashable, str] = {}
        self._without_key: list[str] = []
        """Votes that were new when an answer without canonical form came up."""

    def vote(self, answer: str) -> str:
        """The first answer that this one equals, or itself."""
        if answer not in self._votes:
            self._votes[answer] = self._found(answer)
        return self._votes[answer]

    def _found(self, answer: str) -> str:
        key = self._voting.key(answer)
        if key in self._by_key:
            return self._by_key[key]
        voted = dict.fromkeys(self._votes.values())
        rivals = self._without_key if key is not None else voted
        found = next((vote for vote in rivals if self._voting.equal(answer, vote)), answer)
        if key is not None:
            self._by_key[key] = found
        elif found == answer:
            self._without_key.append(answer)
        return found
