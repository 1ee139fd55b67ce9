"""pass@k against all subsets, majorities against counting by hand."""

from __future__ import annotations

import threading
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patience import HANG_S
from tutelage.evaluation.metrics import problem_majorities, problem_pass_rates
from tutelage.evaluation.scores import Voting, score, votes_of
from tutelage.grading.mathematics import answer_key
from tutelage.grading.number import numbers_equal

verdict_lists = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5)


@given(verdict_lists, st.integers(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(
    verdicts: list[list[bool]], k: int
) -> None:
    for rate, group in zip(problem_pass_rates(verdicts, k), verdicts, strict=True):
        subsets = list(combinations(group, k))
        assert rate == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["4", "4", "5"], [True, True, False], 1.0),
        (["4", "5", "5"], [True, False, False], 0.0),
        (["4", "5"], [True, False], 0.5),
        (["4", "5", "6"], [True, False, False], 1 / 3),
        (["4", "4", "5", "5", "6"], [True, True, False, False, False], 0.5),
        ([None, None, "4"], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        (["5", "5.0", "4"], [False, False, True], 0.0),
        (["1/2", r"\frac{1}{2}", "0.5", "7", "7"], [True, True, True, False, False], 1.0),
    ],
)
def test_majorities(answers: list[str | None], correct: list[bool], expected: float) -> None:
    for order in list(permutations(range(len(answers))))[:24]:
        shuffled = [answers[i] for i in order]
        verdicts = [correct[i] for i in order]
        votes = votes_of(shuffled, verdicts)
        assert problem_majorities([votes], [verdicts]) == [pytest.approx(expected)]


def pairwise(answers: list[str]) -> list[str]:
    """The votes by definition: an answer votes as the first vote that equals it."""
    voted: list[str] = []
    votes = []
    for answer in answers:
        same = (a for a in voted if a == answer or numbers_equal(answer, a))
        votes.append(next(same, answer))
        voted += [] if votes[-1] in voted else [votes[-1]]
    return votes


@given(
    st.lists(
        st.sampled_from(
            ["1", "1.0", "2", "2/2", r"1\text{ m}", r"1\text{ cm}", "x", "X", "", "1 m"]
        ),
        max_size=8,
    )
)
def test_votes_are_those_of_comparing_all_pairs(answers: list[str]) -> None:
    expected = [f"wrong: {vote}" for vote in pairwise(answers)]
    assert votes_of(answers, [False] * len(answers)) == expected


def test_numbers_are_votes_without_comparing_pairs() -> None:
    """Only what has no canonical form is compared: the formula with each number once."""
    compared: list[tuple[str, str]] = []

    def equal(left: str, right: str) -> bool:
        compared.append((left, right))
        return False

    voting = Voting(equal=equal, key=answer_key)
    answers = [rf"\frac{{{i % 20}}}{{1}}" for i in range(100)] + [r"\sqrt{5}", r"\sqrt{5}", "3.0"]
    votes = votes_of(answers, [False] * len(answers), voting)
    assert len(set(votes)) == 21
    assert votes[-1] == votes[3]
    assert len(compared) == 20


def test_formulas_of_several_problems_are_compared_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=HANG_S)

    def equal(left: str, right: str) -> bool:
        meeting.wait()
        return False

    voting = Voting(equal=equal, key=lambda answer: None)
    scores = score([[False, False]] * 2, [["a", "b"], ["c", "d"]], voting)
    assert scores.maj_at_k is not None


def test_problems_without_reference_answer_do_not_count() -> None:
    answers = [["1", "2"], ["3", "3"], ["4", "4"]]
    scores = score([[True, False], [None, None], [True, True]], answers)
    assert (scores.num_problems, scores.num_samples) == (3, 2)
    assert scores.mean_at_k is not None
    assert scores.mean_at_k.value == 0.75
    assert scores.pass_at_k is not None
    assert scores.pass_at_k.value == 1.0
    assert scores.maj_at_k is not None
    assert scores.maj_at_k.value == 0.75
    assert scores.pass_at[1].value == 0.75
    assert score([[None]], [[None]]).mean_at_k is None


def test_every_interval_is_in_the_summary_and_holds_its_value() -> None:
    verdicts = [[True] * i + [False] * (5 - i) for i in range(6)]
    record = score(verdicts, [[str(v) for v in group] for group in verdicts]).summary()
    assert record["k"] == 5
    for name in ("mean_at_k", "pass_at_k", "maj_at_k", "pass_at_1", "pass_at_2", "pass_at_4"):
        assert 0 <= record[f"{name}_low"] < record[name] < record[f"{name}_high"] <= 1
    assert "pass_at_5" not in record
