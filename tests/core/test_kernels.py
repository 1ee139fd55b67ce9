"""The CUDA kernels under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from tutelage.core import (
    LazyLogits,
    composite_objective,
    distillation_objective,
    kernels,
    token_stats,
)
from tutelage.core.terms import (
    JSD,
    ForwardKL,
    ReverseKL,
    SampledReverseKL,
    SkewReverseKL,
    Term,
    TopKForwardKL,
    TopKReverseKL,
)

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, at −inf − −inf
]

from tutelage.core.kernels import passes, products, tops  # noqa: E402
from tutelage.core.kernels.buffers import Buffers  # noqa: E402
from tutelage.core.kernels.tops import FOUND  # noqa: E402

Make = Callable[..., Any]

LEAVES = ("hidden", "weight", "bias")


def _relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _gradients(student: LazyLogits) -> dict[str, Tensor]:
    leaves = {name: getattr(student, name) for name in LEAVES}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}


CASES: dict[str, dict[str, Any]] = {
    "plain": {"vocab_size": 37},
    "several_blocks": {"vocab_size": 4100, "rows": 3},
    "whole_blocks": {"vocab_size": 64, "rows": 3},
    "one_id_more": {"vocab_size": 65, "rows": 3},
    "bias": {"has_bias": True},
    "scale_and_cap": {"scale": 0.7, "softcap": 2.5, "has_bias": True},
    "peaked": {"spread": 5.0, "vocab_size": 37},
    "one_row": {"rows": 1},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_bytes", [None, 1 << 11])
def test_statistics_and_gradients_are_those_of_the_reference(
    name: str, chunk_bytes: int | None, make_pair: Make
) -> None:
    pair = make_pair(**{"rows": 4, "dtype": torch.float32, **CASES[name]})
    n = len(pair.student)
    a, b = torch.rand(n), torch.rand(n)
    expected = reference.objective(pair.reference, a.tolist(), b.tolist(), range(n))
    found = distillation_objective(pair.student, pair.teacher, a, b, chunk_bytes=chunk_bytes)
    (found.total / 3).backward()
    for field in ("reverse_kl", "forward_kl", "entropy", "teacher_entropy"):
        torch.testing.assert_close(
            getattr(found, field).double(), getattr(expected, field), rtol=2e-6, atol=2e-7
        )
    assert abs(found.total.item() - expected.total) < 2e-6 * abs(expected.total)
    for leaf, gradient in _gradients(pair.student).items():
        assert _relative(3 * gradient, getattr(expected, leaf)) < 5e-6, leaf


def test_chunks_and_padded_rows_change_nothing(make_pair: Make, launches: list[str]) -> None:
    pair = make_pair(rows=6, vocab_size=37, dtype=torch.float32)
    whole = distillation_objective(pair.student, pair.teacher, 1.0, 0.5)
    whole.total.backward()
    expected = _gradients(pair.student)
    fresh = make_pair(rows=6, vocab_size=37, dtype=torch.float32)
    launches.clear()
    parts = distillation_objective(
        fresh.student, fresh.teacher, 1.0, 0.5, chunk_bytes=2 * 64 * 4 * 2
    )
    parts.total.backward()
    assert Counter(launches) == {"statistics_kernel": 3, "gradient_kernel": 3}
    torch.testing.assert_close(parts.reverse_kl, whole.reverse_kl, rtol=1e-6, atol=0.0)
    for leaf, gradient in _gradients(fresh.student).items():
        torch.testing.assert_close(gradient, expected[leaf])


@pytest.mark.parametrize(("chunk_bytes", "num_chunks"), [(None, 1), (13 << 10, 2)])
def test_bfloat16_operands_lose_only_the_rounding_of_gradients(
    chunk_bytes: int | None, num_chunks: int, make_pair: Make, launches: list[str]
) -> None:
    pair = make_pair(rows=20, vocab_size=70, width=16, dtype=torch.bfloat16)
    expected = reference.objective(pair.reference, [1.0] * 20, [0.0] * 20, range(20))
    found = distillation_objective(pair.student, pair.teacher, chunk_bytes=chunk_bytes)
    (found.total * 0.37).backward()
    # every chunk's gradient takes the place of its logits in three launches
    expected_launches = {"statistics_kernel": num_chunks, "gradient_kernel": 3 * num_chunks}
    assert Counter(launches) == expected_launches
    assert abs(found.total.item() - expected.total) < 1e-6 * expected.total
    torch.testing.assert_close(found.entropy.double(), expected.entropy, rtol=1e-6, atol=1e-6)
    for leaf, gradient in _gradients(pair.student).items():
        assert gradient.dtype == torch.bfloat16
        assert _relative(gradient, 0.37 * getattr(expected, leaf)) < 4e-3, leaf


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 33, 2048])
@pytest.mark.parametrize("rows", [1, 8, 33, 2048])
def test_a_gradient_never_overwrites_logits_that_are_still_to_be_read(size: int, rows: int) -> None:
    work = passes.Passes.__new__(passes.Passes)
    work._spare = Buffers.of(rows, 64, True, True, chunk_bytes=1 << 40).spare
    size = min(size, rows)
    spans = list(work._spans(size))
    assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])]
    assert spans[-1][1] == size
    for first, last in spans:
        # in units of two bytes: the end of what is written, the start of what is kept
        assert 2 * last <= 2 * work._spare + 4 * first


def test_scoring_gives_what_plain_torch_gives(make_pair: Make, launches: list[str]) -> None:
    pair = make_pair(rows=4, vocab_size=37, dtype=torch.float32, has_bias=True, softcap=3.0)
    student, teacher = pair.student, replace(pair.teacher, swap=(1, 7))
    tokens = torch.tensor([0, 7, 36, 1])
    found = token_stats(student, teacher, tokens), token_stats(student, None, tokens)
    assert launches == ["statistics_kernel"] * 2
    double = [_as_float64(side) for side in (student, teacher)]
    expected = token_stats(*double, tokens), token_stats(double[0], None, tokens)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.entropy.dtype == torch.float32
        torch.testing.assert_close(
            ours.stack(), theirs.stack(), rtol=2e-6, atol=2e-6, equal_nan=True
        )


def _as_float64(side: LazyLogits) -> LazyLogits:
    bias = None if side.bias is None else side.bias.detach().double()
    return replace(
        side,
        hidden=side.hidden.detach().double(),
        weight=side.weight.detach().double(),
        bias=bias,
    )


def _from_logits(student: Tensor, teacher: Tensor) -> tuple[LazyLogits, LazyLogits]:
    """Sides whose logits are the given ones: hidden states pick rows of the head."""
    eye = torch.eye(len(student))
    return (
        LazyLogits(eye.clone().requires_grad_(True), student.t().contiguous()),
        LazyLogits(eye, teacher.t().contiguous()),
    )


ROWS = {
    "ties": ([3.0, 3.0, 1.0, 3.0, 0.0], [2.0, 2.0, 2.0, -1.0, 2.0]),
    "equal_up_to_a_constant": ([3.0, 1.0, -2.0, 0.5, 0.0], [53.0, 51.0, 48.0, 50.5, 50.0]),
    "certain": ([40.0, 0.0, 1.0, 2.0, 3.0], [41.0, 0.0, 2.0, 1.0, 3.0]),
    "far_apart": ([90.0, 0.0, -90.0, 0.0, 0.0], [-90.0, 0.0, 90.0, 0.0, 0.0]),
    "falling": ([50.0, 40.0, 30.0, 20.0, 10.0], [10.0, 20.0, 30.0, 40.0, 50.0]),
    "all_equal": ([0.0] * 5, [0.0] * 5),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("block", [1, 2, 16])
def test_extreme_rows_keep_their_relative_precision(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "launch_block", lambda vocab_size, most: block)
    z, y = (torch.tensor([row]) for row in ROWS[name])
    found = token_stats(*_from_logits(z, y), torch.tensor([2]))
    log_p, log_q = (reference.log_softmax(x.double()) for x in (z, y))
    expected = [
        reference.reverse_kl(log_p, log_q),
        reference.forward_kl(log_p, log_q),
        log_p[:, 2],
        log_q[:, 2],
    ]
    for ours, theirs in zip(found.stack()[2:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    for ours, row in ((found.entropy, z), (found.teacher_entropy, y)):
        exact = reference.entropy_of_logits(row[0].double().tolist())
        assert ours.item() == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize("name", ROWS)
def test_ids_of_one_row_in_lanes_and_blocks_far_apart(name: str) -> None:
    few = tuple(torch.tensor([row]) for row in ROWS[name])
    wide = tuple(torch.full((1, 4200), -torch.inf) for _ in few)
    ids = torch.tensor([3, 1031, 1033, 2051, 4199])  # the first two blocks, and what is left
    for row, values in zip(wide, few, strict=True):
        row[0, ids] = values
    found = token_stats(*_from_logits(*wide), ids[2:3]).stack()
    assert torch.isfinite(found).all()
    expected = token_stats(*_from_logits(*few), torch.tensor([2])).stack()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_nearly_equal_rows_are_as_exact_as_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    z = 3 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    y = z + 1e-3 * torch.randn(2, 50, generator=torch.Generator().manual_seed(1)) + 40.0
    sides, tokens = _from_logits(z, y), torch.zeros(2, dtype=torch.long)
    exact = reference.reverse_kl(*(reference.log_softmax(x.double()) for x in (z, y)))
    ours = (token_stats(*sides, tokens).reverse_kl - exact).abs().max()
    monkeypatch.setattr(kernels, "is_supported", lambda device: False)
    theirs = (token_stats(*sides, tokens).reverse_kl - exact).abs().max()
    assert ours < max(2 * theirs.item(), 1e-7)


@pytest.mark.parametrize("block", [2, 16])
def test_ids_that_are_ruled_out(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "launch_block", lambda vocab_size, most: block)
    generator = torch.Generator().manual_seed(3)
    hidden, weight, other = (torch.randn(n, 4, generator=generator) for n in (3, 9, 9))
    out = torch.zeros(9)
    out[[0, 1, 4]] = -torch.inf  # a whole block among them
    more = out.clone()
    more[5] = -torch.inf  # ruled out by the teacher alone: reverse KL is infinite there
    for teacher_bias, a in ((out, [1.0, 0.5, 0.0]), (more, [0.0, 0.0, 0.0])):
        student = LazyLogits(hidden.clone().requires_grad_(), weight.clone().requires_grad_(), out)
        teacher = LazyLogits(hidden, other, teacher_bias)
        heads = [
            reference.Head(s.hidden.detach(), s.weight.detach(), s.bias) for s in (student, teacher)
        ]
        expected = reference.objective((heads[0], heads[1]), a, [1.0] * 3, range(3))
        found = distillation_objective(student, teacher, torch.tensor(a), 1.0)
        found.total.backward()
        torch.testing.assert_close(
            found.reverse_kl.double(), expected.reverse_kl, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            found.forward_kl.double(), expected.forward_kl, rtol=1e-5, atol=1e-6
        )
        assert found.total.item() == pytest.approx(expected.total, rel=1e-6)
        assert torch.isfinite(student.hidden.grad).all()
        assert (student.weight.grad[[0, 1, 4]] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_distribution_says_so(bad: float) -> None:
    z = torch.zeros(2, 5)
    weight = z.t().contiguous()
    student = LazyLogits(torch.eye(2), weight, torch.tensor([0.0, bad, 0.0, 0.0, 0.0]))
    stats = token_stats(student, LazyLogits(torch.eye(2), weight), torch.zeros(2, dtype=torch.long))
    assert not stats.is_finite().any()
    assert not torch.isfinite(stats.entropy).any()


def test_a_cut_vocabulary_and_a_frozen_head(make_pair: Make) -> None:
    pair = make_pair(rows=3, vocab_size=40, dtype=torch.float32)
    pair.student.weight.requires_grad_(False)
    student, teacher = pair.student.cut(33), pair.teacher.cut(33)
    heads = [replace(h, weight=h.weight[:33]) for h in pair.reference]
    expected = reference.objective((heads[0], heads[1]), [1.0] * 3, [0.0] * 3, range(3))
    distillation_objective(student, teacher).total.backward()
    assert _relative(pair.student.hidden.grad, expected.hidden) < 5e-6
    assert pair.student.weight.grad is None


def test_only_the_head_is_trained(make_pair: Make) -> None:
    pair = make_pair(rows=3, dtype=torch.float32)
    pair.student.hidden.requires_grad_(False)
    expected = reference.objective(pair.reference, [1.0] * 3, [0.0] * 3, range(3))
    distillation_objective(pair.student, pair.teacher).total.backward()
    assert _relative(pair.student.weight.grad, expected.weight) < 5e-6


def test_float32_masters_under_bfloat16_arithmetic(make_pair: Make) -> None:
    pair = make_pair(rows=3, width=16, dtype=torch.float32)
    hidden = pair.student.hidden.detach().bfloat16().requires_grad_(True)
    student = replace(pair.student, hidden=hidden)
    teacher = replace(pair.teacher, hidden=pair.teacher.hidden.bfloat16())
    distillation_objective(student, teacher).total.backward()
    rounded = [
        reference.Head(s.hidden.detach().float(), s.weight.detach().bfloat16().float())
        for s in (student, teacher)
    ]
    expected = reference.objective((rounded[0], rounded[1]), [1.0] * 3, [0.0] * 3, range(3))
    assert pair.student.weight.grad.dtype == torch.float32
    assert _relative(pair.student.weight.grad, expected.weight) < 4e-3
    assert _relative(hidden.grad, expected.hidden) < 5e-3


def test_no_rows(make_pair: Make) -> None:
    pair = make_pair(rows=0, dtype=torch.float32, has_bias=True)
    objective = distillation_objective(pair.student, pair.teacher)
    objective.total.backward()
    assert objective.total.item() == 0.0
    assert (pair.student.weight.grad == 0).all()
    assert len(token_stats(pair.student, None, torch.zeros(0, dtype=torch.long))) == 0


def test_a_gate_opens_by_the_teachers_entropy(make_pair: Make) -> None:
    pair = make_pair(rows=4, vocab_size=20, dtype=torch.float32)
    entropy = reference.entropy(reference.log_softmax(pair.reference[1].logits()))
    cut = entropy.sort().values[1:3].mean()
    is_open = (entropy > cut).double()
    assert 0 < is_open.sum() < 4
    expected = reference.objective(pair.reference, [1.0] * 4, is_open.tolist(), range(4))
    terms = [(ReverseKL(), 1.0), (ForwardKL(lambda h: (h > cut).double()), 1.0)]
    # two rows a chunk
    found = composite_objective(pair.student, pair.teacher, terms, chunk_bytes=2 * 64 * 4 * 2)
    found.total.backward()
    assert found.total.item() == pytest.approx(expected.total, rel=1e-6)
    assert _relative(pair.student.weight.grad, expected.weight) < 5e-6


@pytest.mark.parametrize(
    ("term", "function"),
    [
        (JSD(0.5), lambda p, q: reference.jsd(p, q, 0.5)),
        (JSD(0.2), lambda p, q: reference.jsd(p, q, 0.2)),
        (SkewReverseKL(0.1), lambda p, q: reference.skew_reverse_kl(p, q, 0.1)),
        (SkewReverseKL(0.0), reference.reverse_kl),
    ],
    ids=["jsd", "jsd_uneven", "skew", "skew_0"],
)
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_mixtures(term: Term, function: Any, spread: float, make_pair: Make) -> None:
    pair = make_pair(rows=3, vocab_size=37, dtype=torch.float32, spread=spread, softcap=30.0)
    weights, more = torch.tensor([0.3, 0.0, 1.2]), torch.tensor([0.0, 0.5, 0.5])
    pairs = [(function, weights.tolist()), (reference.forward_kl, more.tolist())]
    value, expected = reference.composite(pair.reference, pairs)
    found = composite_objective(pair.student, pair.teacher, [(term, weights), (ForwardKL(), more)])
    found.total.backward()
    torch.testing.assert_close(found.value.double(), value, rtol=5e-6, atol=1e-6)
    gradients = _gradients(pair.student).values()
    for gradient, exact in zip(gradients, expected, strict=True):
        assert _relative(gradient, exact) < 1e-5


OLD = torch.tensor([-1.0, -0.5, -9.0])
TOKENS = torch.tensor([2, 0, 36])
CLIP = 50.0  # so wide that some rows have a slope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("term", "function"),
    [
        (TopKForwardKL(5), lambda p, q: reference.topk_kl(p, q, 5, True)),
        (TopKForwardKL(5, tail=False), lambda p, q: reference.topk_renormalized(p, q, 5)),
        (TopKForwardKL(99), lambda p, q: reference.topk_kl(p, q, 37, True)),
        (TopKReverseKL(5), lambda p, q: reference.topk_kl(p, q, 5, False)),
        (
            TopKForwardKL(5, support="student"),
            lambda p, q: reference.topk_kl(p, q, 5, True, "student"),
        ),
        (TopKReverseKL(5, "student"), lambda p, q: reference.topk_kl(p, q, 5, False, "student")),
        (
            SampledReverseKL(TOKENS, OLD, CLIP),
            lambda p, q: reference.sampled(p, q, TOKENS.tolist(), OLD.tolist(), CLIP),
        ),
    ],
    ids=["tail", "renorm", "all_ids", "reverse", "tail_student", "reverse_student", "sampled"],
)
def test_terms_of_a_few_ids_beside_dense_ones(
    term: Term, function: Any, dtype: torch.dtype, make_pair: Make
) -> None:
    pair = make_pair(rows=3, vocab_size=37, width=6, dtype=dtype, softcap=30.0, scale=1.3)
    weights, more = torch.tensor([0.3, 0.0, 1.2]), torch.tensor([0.0, 0.5, 0.5])
    terms = [(term, weights), (ForwardKL(), more), (ReverseKL(), weights)]
    functions = (function, reference.forward_kl, reference.reverse_kl)
    pairs = list(zip(functions, (x.tolist() for _, x in terms), strict=True))
    value, expected = reference.composite(pair.reference, pairs)
    found = composite_objective(pair.student, pair.teacher, terms)
    found.total.backward()
    torch.testing.assert_close(found.value.double(), value, rtol=5e-6, atol=1e-6)
    # the interpreter cuts bfloat16 off where a GPU rounds
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for gradient, exact in zip(_gradients(pair.student).values(), expected, strict=True):
        assert _relative(gradient, exact) < limit


def test_a_students_tail_that_has_vanished(make_pair: Make) -> None:
    z = torch.tensor([[120.0, 119.0, 0.0, 1.0, 2.0]])
    y = torch.tensor([[3.0, 2.0, 1.0, 0.0, 1.5]])
    student, teacher = _from_logits(z, y)
    student.weight.requires_grad_(True)
    heads = [reference.Head(s.hidden.detach(), s.weight.detach()) for s in (student, teacher)]
    function = lambda p, q: reference.topk_kl(p, q, 2, True)  # noqa: E731
    _, expected = reference.composite((heads[0], heads[1]), [(function, [1.0])])
    composite_objective(student, teacher, [(TopKForwardKL(2), 1.0)]).total.backward()
    assert _relative(student.weight.grad, expected[1]) < 1e-5


def test_a_sampled_token_beside_the_teachers_top_ids(make_pair: Make) -> None:
    pair = make_pair(rows=3, vocab_size=37, dtype=torch.float32)
    sampled = SampledReverseKL(TOKENS, OLD, CLIP)
    pairs = [
        (lambda p, q: reference.sampled(p, q, TOKENS.tolist(), OLD.tolist(), CLIP), [1.0] * 3),
        (lambda p, q: reference.topk_kl(p, q, 4, True), [0.5] * 3),
    ]
    value, expected = reference.composite(pair.reference, pairs)
    found = composite_objective(
        pair.student, pair.teacher, [(TopKForwardKL(4), 0.5), (sampled, 1.0)]
    )
    found.total.backward()
    torch.testing.assert_close(found.value.double(), value, rtol=5e-6, atol=1e-6)
    for gradient, exact in zip(_gradients(pair.student).values(), expected, strict=True):
        assert _relative(gradient, exact) < 1e-5


@pytest.mark.parametrize("has_bias", [False, True])
def test_extra_statistics(has_bias: bool, make_pair: Make, launches: list[str]) -> None:
    settings = {"has_bias": True, "softcap": 4.0, "scale": 1.5} if has_bias else {}
    pair = make_pair(rows=3, vocab_size=130, dtype=torch.float32, **settings)
    names = tuple(FOUND)
    stats = token_stats(pair.student, pair.teacher, torch.zeros(3, dtype=torch.long), extras=names)
    assert launches
    log_q = reference.log_softmax(pair.reference[1].logits())
    expected = [
        reference.extras(z, q) for z, q in zip(pair.reference[0].logits(), log_q, strict=True)
    ]
    for name in names:
        exact = torch.tensor([row[name] for row in expected])
        torch.testing.assert_close(stats.extras[name], exact, rtol=2e-5, atol=1e-6)
    objective = composite_objective(
        pair.student, pair.teacher, [(ReverseKL(), 1.0)], extras=names[-2:]
    )
    for name in names[-2:]:
        assert torch.equal(objective.extras[name], stats.extras[name])


@pytest.mark.parametrize("lead", [0.0, 12.0, 25.0])
def test_the_signal_of_nearly_certain_rows(lead: float) -> None:
    z, y = 2 * torch.randn(2, 4, 70, generator=torch.Generator().manual_seed(2))
    z[:, 3] += lead
    tokens, names, eye = torch.zeros(4, dtype=torch.long), ["signal_share"], torch.eye(70).double()
    found = token_stats(*_from_logits(z, y), tokens, extras=names)
    exact = token_stats(*(LazyLogits(x.double(), eye) for x in (z, y)), tokens, extras=names)
    torch.testing.assert_close(
        found.extras["signal_share"].double(), exact.extras["signal_share"], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("block", [2, 64])
def test_the_head_ends_where_half_the_teachers_mass_is_reached(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tops, "launch_block", lambda vocab_size, most: block)
    q = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.9, 0.1, 0.0, 0.0]])
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3)
    # A constant added to all logits changes nothing.
    sides = _from_logits(p.log(), q.clamp(min=1e-30).log() + 7.0)
    names = ("head_share",)
    found = token_stats(*sides, torch.zeros(3, dtype=torch.long), extras=names).extras[names[0]]
    expected = torch.tensor([0.4 / 0.8, 0.4 / 0.8, 0.8 / 1.6])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_equal_ids_at_the_heads_end_count_at_their_mean() -> None:
    q = torch.full((1, 4), 0.25)
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    sides = _from_logits(p.log(), q.log())
    stats = token_stats(*sides, torch.zeros(1, dtype=torch.long), extras=("head_share",))
    assert stats.extras["head_share"].item() == pytest.approx(0.5)


def test_a_scaled_gradient() -> None:
    x = torch.randn(70, 80, generator=torch.Generator().manual_seed(0))
    factor, expected = torch.tensor(0.3), x * 0.3
    rounded = products.scaled(x, factor, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), expected, rtol=2**-7, atol=0.0)
    assert products.scaled(x, factor, torch.float32) is x
    torch.testing.assert_close(x, expected)


def test_a_head_that_changed_before_backward_is_refused(make_pair: Make) -> None:
    pair = make_pair(rows=2, dtype=torch.float32)
    objective = distillation_objective(pair.student, pair.teacher)
    with torch.no_grad():
        pair.student.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        objective.total.backward()
