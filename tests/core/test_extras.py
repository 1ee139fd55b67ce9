"""Extra statistics of a row against their definitions, computed row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import reference
from tutelage.core import EXTRAS, LazyLogits, composite_objective, token_stats
from tutelage.core.terms import ReverseKL

Make = Callable[..., Any]
DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
SIZES = [3, 11, 60]  # fewer ids than the top 5, than the top 16, and more than both


def expected_extras(pair: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    z, teacher = (head.logits() for head in pair.reference)
    given = zip(z, reference.log_softmax(teacher), tokens.tolist(), strict=True)
    rows = [reference.extras(*row) for row in given]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in EXTRAS}


def total_difference(pair: Any) -> torch.Tensor:
    """Σ|q − p| of every row."""
    p, q = (reference.log_softmax(head.logits()).exp() for head in pair.reference)
    return (p - q).abs().sum(-1)


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("spread", [0.4, 1.0, 1.6])
def test_extras_equal_their_definitions(
    make_pair: Make, vocab_size: int, spread: float, dtype: torch.dtype, limit: float
) -> None:
    pair = make_pair(rows=9, vocab_size=vocab_size, spread=spread, dtype=dtype, has_bias=True)
    tokens = torch.arange(9) % vocab_size
    expected = expected_extras(pair, tokens)
    chunk_bytes = 4 * 2 * vocab_size * dtype.itemsize
    stats = token_stats(pair.student, pair.teacher, tokens, chunk_bytes, tuple(EXTRAS))
    tokenless = [name for name in EXTRAS if name != "entropy_direction"]
    learned = composite_objective(
        pair.student, pair.teacher, [(ReverseKL(), 1.0)], extras=tokenless
    )
    assert set(stats.extras) == set(EXTRAS)
    assert list(learned.extras) == tokenless
    for name, values in expected.items():
        # A share of Σ|q − p| is as uncertain as the difference of two nearly equal numbers.
        weight = total_difference(pair) if name == "head_share" else torch.ones(9)
        scale = values.abs().max().clamp(min=1e-300)
        for found in (stats.extras[name], learned.extras.get(name, stats.extras[name])):
            assert float((weight * (found - values)).abs().max() / scale) <= limit, name


def test_the_top_of_a_certain_teacher_is_found_among_underflowed_probabilities() -> None:
    """All but one id have probability 0 in float32, yet some are likelier than others."""
    ids = torch.arange(30)
    teacher = -200.0 * ids.float()[None].expand(30, 30)  # the five likeliest are 0 to 4
    student = 9.0 * torch.eye(30)  # each row prefers another id
    pair = LazyLogits(student, torch.eye(30)), LazyLogits(teacher.clone(), torch.eye(30))
    found = token_stats(*pair, ids, extras=["is_in_teacher_top5"]).extras["is_in_teacher_top5"]
    assert found.tolist() == [1.0] * 5 + [0.0] * 25


def test_the_order_of_names_is_kept_and_others_are_refused(make_pair: Make) -> None:
    pair = make_pair()
    names = ("head_share", "gradient_norm")
    stats = token_stats(pair.student, pair.teacher, torch.zeros(7).long(), extras=names)
    assert tuple(stats.extras) == tuple(stats[torch.tensor([1, 2])].extras) == names
    with pytest.raises(ValueError, match=r"extras must be among .*got 'gradient'"):
        token_stats(pair.student, pair.teacher, torch.zeros(7).long(), extras=["gradient"])


def test_extras_of_equal_distributions() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).double()
    lazy = LazyLogits(logits, torch.eye(30, dtype=torch.float64))
    found = token_stats(lazy, lazy, torch.zeros(4).long(), extras=tuple(EXTRAS)).extras
    for name in ("gradient_norm", "local_oracle", "local_gain", "signal_share", "top_divergence"):
        assert found[name].tolist() == [0] * 4
    assert found["head_share"].tolist() == [0.5] * 4
    assert found["is_in_teacher_top5"].tolist() == [1] * 4
    assert found["compatibility"].tolist() == found["teacher_top_mass"].tolist()


def test_the_head_ends_with_the_id_that_reaches_half_of_the_mass() -> None:
    """0.4, 0.3, 0.2, 0.1: the head is the first two; student mass sits on the last."""
    q = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    p = torch.tensor([[0.2, 0.2, 0.2, 0.4]], dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    pair = LazyLogits(p.log(), eye), LazyLogits(q.log(), eye)
    found = token_stats(*pair, torch.tensor([0]), extras=["head_share"]).extras["head_share"]
    assert found.item() == pytest.approx((0.2 + 0.1) / (0.2 + 0.1 + 0.3))


# --- signal in the gradient of one sampled token --------------------------------------------------


def signal_of(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`signal_share` of rows of student and teacher logits."""
    eye = torch.eye(z.shape[1], dtype=z.dtype)
    tokens = torch.zeros(len(z), dtype=torch.long)
    stats = token_stats(LazyLogits(z, eye), LazyLogits(y, eye), tokens, extras=["signal_share"])
    return stats.extras["signal_share"]


def test_two_outcomes_have_no_noise_and_uniform_ones_little_signal() -> None:
    """With two ids both samples give the same gradient, with the baseline that is best."""
    z, y = torch.tensor([[0.3, -1.0], [30.0, 0.0]]).double(), torch.tensor([[2.0, 1.0]]).double()
    assert signal_of(z, y.expand(2, 2)).tolist() == pytest.approx([1.0, 1.0], rel=1e-9)
    one_id = torch.zeros(1, 50).double()
    one_id[0, 0] = 1e-3  # r differs at one id of 50: Σp²d² / Σp d² L is about 1/50
    assert float(signal_of(torch.zeros(1, 50).double(), one_id)) == pytest.approx(1 / 50, rel=0.1)


def test_no_other_baseline_has_less_noise() -> None:
    z, y = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1)).double()
    log_p, log_q = reference.log_softmax(z), reference.log_softmax(y)
    p, r = log_p.exp(), log_p - log_q
    moves = torch.eye(12, dtype=p.dtype) - p[:, None]
    mean = torch.einsum("ny,ny,nyv->nv", p, r, moves).square().sum(1)
    for b in torch.linspace(-3, 3, 50).double():
        size = torch.einsum("ny,ny,nyv->n", p, (r - b).square(), moves.square())
        assert (mean / size <= signal_of(z, y) * (1 + 1e-12)).all()


@pytest.mark.parametrize("lead", [0.0, 5.0, 12.0, 25.0, 40.0])
def test_it_is_as_exact_in_float32_where_the_student_is_nearly_certain(lead: float) -> None:
    z, y = 2 * torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(2))
    z[:, 3] += lead
    exact = signal_of(z.double(), y.double())
    torch.testing.assert_close(signal_of(z, y).double(), exact, rtol=2e-6, atol=0)
    certain = torch.full((1, 40), -200.0).index_fill(1, torch.tensor(2), 0.0)
    assert signal_of(certain, y[:1]).tolist() == [0.0]


# --- how a token moves the entropy ----------------------------------------------------------------


def direction_of(z: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`entropy_direction` of rows of student logits; the teacher's are others."""
    eye = torch.eye(z.shape[1], dtype=z.dtype)
    teacher = LazyLogits(z.flip(1).contiguous(), eye)
    extras = ["entropy_direction"]
    return token_stats(LazyLogits(z, eye), teacher, tokens, extras=extras).extras[extras[0]]


@pytest.mark.parametrize("lead", [0.3, 2.0, 8.0, 15.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_two_ids_the_direction_has_a_closed_form(lead: float, dtype: torch.dtype) -> None:
    """H' = −a p (1 − p) along the logit difference a: −2 a p (1 − p)² and 2 a p² (1 − p)."""
    found = direction_of(torch.tensor([[lead, 0.0]] * 2, dtype=dtype), torch.tensor([0, 1]))
    rest = 1 / (1 + math.exp(lead))
    exact = [-2 * lead * (1 - rest) * rest**2, 2 * lead * (1 - rest) ** 2 * rest]
    rel = 1e-10 if dtype == torch.float64 else 1e-5
    assert found.tolist() == pytest.approx(exact, rel=rel, abs=0)


LEADS = [0.0, 5.0, 12.0, 25.0]


def leading(size: int) -> torch.Tensor:
    """Rows of float32 logits, `size` for each lead of id 3, whose other logits are random."""
    z = 2 * torch.randn(size * len(LEADS), 40, generator=torch.Generator().manual_seed(3))
    z[:, 3] += torch.tensor(LEADS).repeat(size)
    return z


@pytest.mark.parametrize("token", [1, 3])
def test_its_sign_holds_in_float32_where_the_student_is_nearly_certain(token: int) -> None:
    z, tokens = leading(8), torch.full((32,), token)
    found = direction_of(z, tokens)
    torch.testing.assert_close(found.double(), direction_of(z.double(), tokens), rtol=1e-4, atol=0)
    assert ((found > 0) == (token != 3))[z[:, 3] > 10].all()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, at −inf − −inf
def test_its_sign_holds_in_kernels(launches: list[str]) -> None:
    pytest.importorskip("triton")
    z, tokens = leading(1), torch.tensor([1, 3, 3, 3])
    found = direction_of(z, tokens)
    assert launches
    torch.testing.assert_close(found.double(), direction_of(z.double(), tokens), rtol=1e-4, atol=0)


def test_a_direction_without_a_token_is_refused(make_pair: Make) -> None:
    pair = make_pair()
    with pytest.raises(ValueError, match="entropy_direction needs the sampled tokens"):
        composite_objective(
            pair.student, pair.teacher, [(ReverseKL(), 1.0)], extras=["entropy_direction"]
        )


def test_ids_of_no_probability_have_no_part_in_it(make_pair: Make) -> None:
    pair = make_pair(rows=4, vocab_size=9, has_bias=True)
    tokens = torch.tensor([0, 1, 2, 3])
    few = [replace(x.cut(7)) for x in (pair.student, pair.teacher)]
    with torch.no_grad():
        pair.student.bias[7:] = pair.teacher.bias[7:] = -torch.inf
    extras = ["entropy_direction"]
    found = token_stats(pair.student, pair.teacher, tokens, extras=extras).extras
    expected = token_stats(*few, tokens, extras=extras).extras
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
