"""Statistics of every token: parity, chunking, precision where distributions nearly agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from tutelage.core import (
    RULES,
    LazyLogits,
    TokenStats,
    importance,
    select_tokens,
    token_stats,
)

Make = Callable[..., Any]
INF = float("inf")


def expected_stats(pair: Any, tokens: Tensor) -> Tensor:
    """The six statistics of the reference, `[6, N]`."""
    student, teacher = (reference.log_softmax(head.logits()) for head in pair.reference)
    return torch.stack(
        [
            reference.entropy(student),
            reference.entropy(teacher),
            reference.reverse_kl(student, teacher),
            reference.forward_kl(student, teacher),
            student.gather(1, tokens[:, None])[:, 0],
            teacher.gather(1, tokens[:, None])[:, 0],
        ]
    )


def of_logits(student: Tensor, teacher: Tensor, chunk_bytes: int = 1 << 20) -> TokenStats:
    """Statistics of given logits, which an identity head projects."""
    eye = torch.eye(student.shape[1], dtype=student.dtype)
    tokens = torch.zeros(len(student), dtype=torch.long)
    return token_stats(LazyLogits(student, eye), LazyLogits(teacher, eye), tokens, chunk_bytes)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equal_the_reference(
    make_pair: Make,
    has_bias: bool,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    pair = make_pair(dtype=dtype, has_bias=has_bias, scale=scale, softcap=softcap)
    tokens = torch.tensor([0, 10, 3, 3, 7, 1, 5])
    found = token_stats(pair.student, pair.teacher, tokens)
    expected = expected_stats(pair, tokens)
    torch.testing.assert_close(found.stack(), expected, rtol=tolerance, atol=tolerance / 10)
    assert not found.entropy.requires_grad


@pytest.mark.parametrize("rows_a_chunk", range(1, 9))
def test_do_not_depend_on_the_chunk_size(make_pair: Make, rows_a_chunk: int) -> None:
    pair = make_pair()
    tokens = torch.arange(7)
    chunk_bytes = rows_a_chunk * 2 * 11 * 8
    found = token_stats(pair.student, pair.teacher, tokens, chunk_bytes).stack()
    torch.testing.assert_close(found, expected_stats(pair, tokens), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("true_kl", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("vocab_size", [97, 20000])
def test_float32_keeps_one_percent_of_the_true_kl_of_nearly_equal_rows(
    true_kl: float, vocab_size: int
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    student = 3 * torch.randn(8, vocab_size, generator=generator)
    noise = (2 * true_kl) ** 0.5 * torch.randn(8, vocab_size, generator=generator)
    found = _read(student, student + noise)
    log_p = reference.log_softmax(student.double())
    log_q = reference.log_softmax((student + noise).double())
    for value, truth in (
        (found.reverse_kl, reference.reverse_kl(log_p, log_q)),
        (found.forward_kl, reference.forward_kl(log_p, log_q)),
    ):
        is_counted = truth >= 1e-4
        error = ((value.double() - truth) / truth)[is_counted].abs()
        assert error.max() <= 1e-2
        assert (value >= -2e-7).all()


def _read(student: Tensor, teacher: Tensor) -> TokenStats:
    """Statistics of given float32 logits of a wide vocabulary: hidden states of width 8 rows."""
    one_hot = torch.eye(len(student))
    tokens = torch.zeros(len(student), dtype=torch.long)
    return token_stats(
        LazyLogits(one_hot, student.t().contiguous()),
        LazyLogits(one_hot, teacher.t().contiguous()),
        tokens,
    )


def test_bfloat16_arithmetic_would_miss_that_bound() -> None:
    """Negative control: the same rows in bfloat16 are off by more than their whole KL."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(8, 2000, generator=generator)
    teacher = student + 0.014 * torch.randn(8, 2000, generator=generator)
    log_p, log_q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    truth = reference.reverse_kl(log_p, log_q)
    low_p, low_q = student.bfloat16().log_softmax(-1), teacher.bfloat16().log_softmax(-1)
    low = (low_p.exp() * (low_p - low_q)).sum(-1).double()
    assert ((low - truth) / truth).abs().max() > 0.1


@pytest.mark.parametrize("margin", [8.0, 17.0, 25.0, 40.0, 80.0])
def test_float32_keeps_the_digits_of_tiny_entropies(margin: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 50, generator=generator).sub_(2)
    logits[:, 7] = margin
    found = of_logits(logits, logits).entropy
    truth = [reference.entropy_of_logits(row) for row in logits.double().tolist()]
    # float32 rounds a logit of size 80 to 8e-6, and that much of the entropy with it.
    assert found.tolist() == pytest.approx(truth, rel=2e-6 + margin * 2e-7)


@pytest.mark.parametrize("has_soft_tail", [False, True])
def test_equal_rows_have_no_divergence(has_soft_tail: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 40, generator=generator) * (1 if has_soft_tail else 30)
    found = of_logits(logits, logits)
    assert found.reverse_kl.abs().max() == 0
    assert found.forward_kl.abs().max() == 0


@pytest.mark.parametrize("temperature", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_give_numbers(temperature: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = (1e2 * torch.randn(2, 6, 4, generator=generator)).to(dtype)
    weight = (1e2 * torch.randn(2, 12, 4, generator=generator)).to(dtype)
    student, teacher = (
        LazyLogits(h, w, scale=1 / temperature) for h, w in zip(hidden, weight, strict=True)
    )
    found = token_stats(student, teacher, torch.zeros(6, dtype=torch.long)).stack()
    assert found.isfinite().all()
    assert (found[:4] >= 0).all()
    assert found[2].max() > 100  # the case is extreme indeed


def test_ids_that_both_sides_exclude_do_not_count(make_pair: Make) -> None:
    pair = make_pair(has_bias=True)
    tokens = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    narrow = token_stats(pair.student.cut(8), pair.teacher.cut(8), tokens)
    with torch.no_grad():
        pair.student.bias[8:] = -INF
        pair.teacher.bias[8:] = -INF
    wide = token_stats(pair.student, pair.teacher, tokens)
    torch.testing.assert_close(wide.stack(), narrow.stack(), rtol=1e-13, atol=1e-15)


def test_ids_that_one_side_excludes_make_one_divergence_infinite(make_pair: Make) -> None:
    tokens = torch.zeros(7, dtype=torch.long)
    pair = make_pair(has_bias=True)
    with torch.no_grad():
        pair.teacher.bias[3] = -INF
    found = token_stats(pair.student, pair.teacher, tokens)
    assert (found.reverse_kl == INF).all()
    assert found.forward_kl.isfinite().all()
    other = token_stats(pair.teacher, pair.student, tokens)
    assert (other.forward_kl == INF).all()
    torch.testing.assert_close(other.reverse_kl, found.forward_kl, rtol=1e-13, atol=0)


@pytest.mark.parametrize("vocab_size", [1023, 1024, 1025, 1500, 2048])
def test_wide_rows_keep_tiny_entropies_wherever_their_largest_logit_is(vocab_size: int) -> None:
    places = torch.tensor([0, 1, 511, 512, 513, 1000, vocab_size - 2, vocab_size - 1])
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(len(places), vocab_size, generator=generator)
    logits.scatter_(1, places[:, None], 30.0)
    logits[0, -1] = 30.0  # a tie
    found = _read(logits, logits)
    truth = [reference.entropy_of_logits(row) for row in logits.double().tolist()]
    assert found.entropy.tolist() == pytest.approx(truth, rel=2e-5)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows_a_chunk", [1, 3, 100])
def test_the_student_alone_gives_the_same_numbers(
    make_pair: Make, has_bias: bool, rows_a_chunk: int
) -> None:
    pair = make_pair(has_bias=has_bias, softcap=3.0, scale=0.5)
    if has_bias:
        with torch.no_grad():
            pair.student.bias[2] = -INF
    tokens = torch.tensor([0, 10, 3, 3, 7, 1, 5])
    expected = expected_stats(pair, tokens)
    found = token_stats(pair.student, None, tokens, chunk_bytes=rows_a_chunk * 11 * 8)
    torch.testing.assert_close(found.entropy, expected[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.log_p, expected[4], rtol=1e-12, atol=1e-13)
    for unknown in (found.teacher_entropy, found.reverse_kl, found.forward_kl, found.log_q):
        assert unknown.isnan().all()
    assert not found[:3].has_teacher
    assert not TokenStats.cat([found, found[:2]]).has_teacher


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_the_student_choose_the_same_without_a_teacher(make_pair: Make, rule: str) -> None:
    pair = make_pair(rows=24)
    tokens, position = torch.arange(24) % 11, torch.arange(24)
    options: dict[str, Any] = {
        "uniform": torch.rand(24, generator=torch.Generator().manual_seed(0)).double(),
        "position": position,
    }
    alone = token_stats(pair.student, None, tokens)
    if RULES[rule].needs_teacher:
        with pytest.raises(ValueError, match=r"needs token_stats|compares with the teacher"):
            importance(alone, rule, **options)
        return
    both = token_stats(pair.student, pair.teacher, tokens)
    expected, found = (
        select_tokens(stats, position // 8, rule, 0.4, **options) for stats in (both, alone)
    )
    assert found.rows.tolist() == expected.rows.tolist()
    assert len(found.rows) > 0
    assert found.num_nonfinite == 0


def test_a_student_that_gives_no_numbers_is_counted_without_a_teacher(make_pair: Make) -> None:
    pair = make_pair()
    with torch.no_grad():
        pair.student.hidden[2] = torch.nan
    stats = token_stats(pair.student, None, torch.zeros(7, dtype=torch.long))
    found = select_tokens(stats, torch.zeros(7, dtype=torch.long), "entropy", 1.0)
    assert found.num_nonfinite == 1
    assert found.rows.tolist() == [0, 1, 3, 4, 5, 6]


def test_no_rows_give_no_statistics(make_pair: Make) -> None:
    pair = make_pair(rows=0)
    found = token_stats(pair.student, pair.teacher, torch.zeros(0, dtype=torch.long))
    assert found.stack().shape == (6, 0)


def test_refuses_tokens_of_other_rows_and_other_vocabularies(make_pair: Make) -> None:
    pair = make_pair()
    with pytest.raises(ValueError, match=r"tokens must be \[N\] with N = 7, got \(6,\)"):
        token_stats(pair.student, pair.teacher, torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match="extras need a teacher"):
        token_stats(pair.student, None, torch.zeros(7).long(), extras=["gradient_norm"])
    with pytest.raises(ValueError, match="share a vocabulary, got 11 and 9 ids"):
        token_stats(pair.student, pair.teacher.cut(9), torch.zeros(7, dtype=torch.long))
    with pytest.raises(ValueError, match="same rows, got 7 and 2"):
        token_stats(pair.student, pair.teacher[torch.tensor([0, 1])], torch.zeros(7).long())


def test_stacking_slicing_and_joining_keep_every_number() -> None:
    stats = TokenStats(*torch.arange(18.0).reshape(6, 3))
    again = TokenStats.cat([stats[:1], stats[torch.tensor([1, 2])]])
    assert again.stack().tolist() == stats.stack().tolist()
    assert TokenStats.unstack(stats.stack()).log_q.tolist() == [15.0, 16.0, 17.0]
