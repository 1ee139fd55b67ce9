"""The exact distillation objective over hidden states, its gradient computed inside forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tutelage.core import kernels
from tutelage.core._block import (
    Block,
    TeacherLogits,
    can_be_inf,
    check_pair,
    chunks,
)
from tutelage.core._gradients import Gradients
from tutelage.core._sums import added, weighted
from tutelage.core.extras import EXTRAS
from tutelage.core.id_class import IdClass
from tutelage.core.lazy import LazyLogits
from tutelage.core.partial import PartialLogits
from tutelage.core.policy import ClippedPolicy, Sampled, policy_rows
from tutelage.core.terms import (
    ForwardKL,
    ReverseKL,
    Term,
    TopKForwardKL,
    TopKReverseKL,
    num_student_top,
)


@dataclass(frozen=True)
class Objective:
    """A sum over rows to back-propagate, and what every row contributed to it."""

    total: Tensor
    """Scalar, nats: Σ_rows a·reverse_kl + b·forward_kl. Divide it once, by the global count."""
    reverse_kl: Tensor
    """KL(p‖q) `[K]`, nats, without gradient; NaN where no teacher was read."""
    forward_kl: Tensor
    """KL(q‖p) `[K]`, nats, without gradient; NaN where no teacher was read."""
    entropy: Tensor
    """Student entropy `[K]`, nats, without gradient."""
    teacher_entropy: Tensor
    """Teacher entropy `[K]`, nats, without gradient; NaN where no teacher was read."""
    value: Tensor
    """What each row added to `total` `[K]`, nats, without gradient."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Extra statistics that were asked for, `[K]` each."""


def distillation_objective(
    student: LazyLogits,
    teacher: LazyLogits,
    reverse_weight: Tensor | float = 1.0,
    forward_weight: Tensor | float = 0.0,
    chunk_bytes: int | None = None,
) -> Objective:
    """Weighted sum of exact reverse and forward KL over all rows, in nats.

    ``total = Σ_n a_n KL(p_n‖q_n) + b_n KL(q_n‖p_n)``, a = `reverse_weight`, b = `forward_weight`

    Replaces ``(a * reverse_kl(log_p, log_q) + b * forward_kl(log_p, log_q)).sum()`` on `[N, V]`
    log-probabilities. Neither logits nor probabilities of all rows ever exist: each chunk is
    projected, turned into its logit gradient in place and multiplied back onto hidden states and
    head before the next one, with

    ``∂total/∂z = a p⊙(gap − E_p[gap]) + b (p − q)``,  ``gap = z_student − z_teacher``

    Args:
        student: student logits of K rows; gradients flow to its hidden states, weight and bias.
        teacher: teacher logits of the same rows and vocabulary; never receives a gradient.
        reverse_weight: a, `[K]` or one number for all rows.
        forward_weight: b, `[K]` or one number for all rows.
        chunk_bytes: size of the two logit buffers; any value gives the same result, None takes what
            suits the device.

    Returns:
        `Objective`; `total` is differentiable once.

    Raises:
        ValueError: the sides differ in rows or vocabulary, or a weight does not have K rows.

    Source: OPD and TIP (arXiv 2604.14084), equation 1; EOPD (arXiv 2603.07079), exact form.
    """
    check_pair(student, teacher)
    a = _row_weights(reverse_weight, student, "reverse_weight")
    b = _row_weights(forward_weight, student, "forward_weight")
    has_forward = isinstance(forward_weight, Tensor) or forward_weight != 0.0
    return _run(student, teacher, _Mixture(a, b, has_forward=has_forward), chunk_bytes)


def composite_objective(
    student: LazyLogits,
    teacher: TeacherLogits | None,
    terms: Sequence[tuple[Term, Tensor | float]],
    chunk_bytes: int | None = None,
    extras: Sequence[str] = (),
) -> Objective:
    """Weighted sum of any terms over all rows, in nats, fused like `distillation_objective`.

    ``total = Σ_n Σ_i w_in term_i(p_n, q_n)``

    Args:
        student: student logits of K rows; gradients flow to its hidden states, weight and bias.
        teacher: teacher logits of the same rows and vocabulary; with `PartialLogits` the terms are
            those of top-k buckets and of the sampled token. None where every term is a
            `ClippedPolicy`, which needs the student alone: half of the products.
        terms: terms of `tutelage.core.terms`, each with a weight, `[K]` or one number.
        chunk_bytes: size of the two logit buffers; None for what suits the device.
        extras: statistics to compute on the way, keys of `EXTRAS` that need no sampled token.

    Returns:
        `Objective`; `total` is differentiable once.

    Raises:
        ValueError: there are no terms, the sides differ, a weight does not have K rows, or a
            bias is infinite and a term is neither forward nor reverse KL, or a term needs ids
            that are not known of the teacher, or a teacher where there is none.
    """
    if not terms:
        raise ValueError("composite_objective needs at least one term, got none.")
    sides: list[TeacherLogits] = [student]
    if teacher is not None:
        check_pair(student, teacher)
        sides.append(teacher)
    elif extras or not all(isinstance(term, ClippedPolicy) for term, _ in terms):
        names = [*(type(term).__name__ for term, _ in terms), *extras]
        raise ValueError(f"only ClippedPolicy needs no teacher, got {names} and none.")
    if not _is_mixture(terms) and any(can_be_inf(side) for side in sides):
        raise ValueError(
            "terms other than ForwardKL and ReverseKL need finite logits, got an infinite bias. "
            "Use a large negative number instead."
        )
    if student.shared is not None and not all(_is_over_shared(term) for term, _ in terms):
        raise ValueError(
            "two vocabularies are compared over the student's likeliest ids that they share. Use "
            "TopKReverseKL or TopKForwardKL with the student's support."
        )
    placed = [(_placed(term, student), w) for term, w in terms]
    weighted = [(term, _row_weights(w, student, "a term's weight")) for term, w in placed]
    return _run(student, teacher, _kernel(weighted), chunk_bytes, extras)


def _is_over_shared(term: Term) -> bool:
    return isinstance(term, TopKForwardKL | TopKReverseKL) and term.support == "student"


def _placed(term: Term, student: LazyLogits) -> Term:
    """The term with its sampled ids where they are once ids count as one."""
    one_class = IdClass.of(student)
    if one_class is None or not isinstance(term, Sampled):
        return term
    return term.at(one_class.columns(term.tokens))


def _require_known(teacher: PartialLogits, terms: Sequence[Term]) -> None:
    """Refuses what would count the tail as if it were spread evenly."""
    for term in terms:
        is_known = isinstance(term, Sampled) or (
            isinstance(term, TopKForwardKL | TopKReverseKL)
            and term.k <= teacher.k
            and term.support == "teacher"
        )
        if not is_known:
            raise ValueError(
                f"the teacher gives {teacher.k} ids of each row, got {type(term).__name__}. Use "
                f"TopKForwardKL or TopKReverseKL with the teacher's support and k of at most "
                f"{teacher.k}, or SampledReverseKL or ClippedPolicy."
            )


def _run(
    student: LazyLogits,
    teacher: TeacherLogits | None,
    kernel: _Kernel,
    chunk_bytes: int | None,
    extras: Sequence[str] = (),
) -> Objective:
    if student.swap is not None:
        raise ValueError("only the teacher's ids can be swapped, got a student with a swap.")
    if isinstance(teacher, PartialLogits):
        _require_known(teacher, [term for term, _ in kernel.summands])
    inputs: tuple[Tensor | None, ...] = (student.hidden, student.weight, student.bias)
    if not torch.is_grad_enabled():
        inputs = tuple(None if x is None else x.detach() for x in inputs)
    arguments = (student, teacher, kernel, chunk_bytes, extras)
    outputs = _FusedObjective.apply(*inputs, *arguments)  # type: ignore[no-untyped-call]
    total, reverse, forward, entropy, teacher_entropy, value, *rest = outputs
    found = dict(zip(extras, rest, strict=True))
    return Objective(total, reverse, forward, entropy, teacher_entropy, value, found)


def _kernel(terms: Sequence[tuple[Term, Tensor]]) -> _Kernel:
    """The kernel of a sum of terms: the fast one where it can be."""
    if not _is_mixture(terms):
        return _Sum(terms)
    weights = [torch.zeros_like(terms[0][1]), torch.zeros_like(terms[0][1])]
    gate = None
    for term, weight in terms:
        weights[isinstance(term, ForwardKL)] += weight
        gate = term.gate if isinstance(term, ForwardKL) else gate
    has_forward = any(isinstance(term, ForwardKL) for term, _ in terms)
    return _Mixture(weights[0], weights[1], gate, has_forward)


def _is_mixture(terms: Sequence[tuple[Term, Any]]) -> bool:
    forward = [term for term, _ in terms if isinstance(term, ForwardKL)]
    has_one_gate = len(forward) == 1 or all(term.gate is None for term in forward)
    return has_one_gate and all(isinstance(term, ReverseKL | ForwardKL) for term, _ in terms)


def _row_weights(weight: Tensor | float, student: LazyLogits, name: str) -> Tensor:
    rows = len(student)
    if not isinstance(weight, Tensor):
        return torch.full((rows,), weight, dtype=student.dtype, device=student.hidden.device)
    if weight.shape != (rows,):
        raise ValueError(f"{name} must be [K] with K = {rows}, got {tuple(weight.shape)}.")
    return weight.detach().to(student.dtype)


class _FusedObjective(torch.autograd.Function):
    """Forward computes the gradients too; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        student: LazyLogits,
        teacher: TeacherLogits | None,
        kernel: _Kernel,
        chunk_bytes: int | None,
        extras: Sequence[str],
    ) -> tuple[Tensor, ...]:
        is_fused = _is_fused(student, teacher, kernel, extras)
        needs = ctx.needs_input_grad
        gradients = Gradients.like(hidden, weight, bias, needs, student.dtype, is_fused)
        if is_fused and not isinstance(teacher, PartialLogits):
            rows = _by_kernels(student, teacher, kernel, chunk_bytes, extras, gradients)
        elif teacher is None:
            rows = policy_rows(student, kernel.summands, chunk_bytes, gradients)
        else:
            rows = _by_blocks(student, teacher, kernel, chunk_bytes, extras, gradients)
        ctx.gradients = gradients
        outputs = [rows[4].sum().to(student.dtype), *rows.to(student.dtype).unbind(0)]
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; the gradients would pass for constants
            raise RuntimeError(
                "the objective is differentiable once, got create_graph=True. "
                "Use the functions of tutelage.core.divergence for second derivatives."
            )
        return (*ctx.gradients.scaled(grad_total), None, None, None, None, None)


def _by_blocks(
    student: LazyLogits,
    teacher: TeacherLogits,
    kernel: _Kernel,
    chunk_bytes: int | None,
    extras: Sequence[str],
    gradients: Gradients,
) -> Tensor:
    """The fields of `Objective` a row, then extras, `[5 + E, K]`: plain torch, on any device."""
    shape = (5 + len(extras), len(student))
    rows = torch.empty(shape, dtype=torch.float64, device=student.hidden.device)
    for chunk in chunks(student, teacher, chunk_bytes):
        for here, block in chunk.blocks(num_top=num_student_top(kernel.summands)):
            rows[:4, here] = torch.stack(
                (block.reverse_kl, block.forward_kl, block.entropy, block.teacher_entropy)
            )
            for i, name in enumerate(extras):
                rows[5 + i, here] = EXTRAS[name](block).double()
            rows[4, here] = kernel(block, here, gradients.needed)
        if gradients.needed:
            gradients.add(student, chunk)
    return rows


def _by_kernels(
    student: LazyLogits,
    teacher: LazyLogits | None,
    kernel: _Kernel,
    chunk_bytes: int | None,
    extras: Sequence[str],
    gradients: Gradients,
) -> Tensor:
    """The same by fused kernels, which read and write logits once a pass."""
    from tutelage.core.kernels import late, passes, tops, total  # needs Triton

    more = torch.empty(len(extras), len(student), dtype=torch.float64, device=student.hidden.device)
    work = passes.Passes(student, teacher, chunk_bytes, gradients.needed)
    summed = total.Total(work, kernel.summands)
    for chunk in work.chunks(total.tokens_of(kernel.summands)):
        found = tops.More(work, chunk)
        for i, name in enumerate(extras):
            more[i, chunk.rows] = found.get(name)
        slopes = summed.add(chunk)
        if gradients.needed and len(chunk) == len(student):
            sources = (student.hidden, student.weight)
            gradients.late = late.Late.of(work, chunk, slopes, gradients.wants, sources)
        elif gradients.needed:
            gradients.add_products(work.student, chunk.rows, work.gradient(chunk, slopes))
    order = (passes.REVERSE_KL, passes.FORWARD_KL, passes.ENTROPY, passes.TEACHER_ENTROPY)
    return torch.stack((*(work.table[i] for i in order), summed.value, *more))


def _is_fused(
    student: LazyLogits, teacher: TeacherLogits | None, kernel: _Kernel, extras: Sequence[str]
) -> bool:
    if isinstance(teacher, PartialLogits):
        return False
    if not kernels.suits(*([student] if teacher is None else [student, teacher])):
        return False
    from tutelage.core.kernels import tops, total  # needs Triton

    return tops.FOUND.keys() >= set(extras) and total.is_known(kernel.summands)


class _Kernel(Protocol):
    """What is summed over rows."""

    @property
    def summands(self) -> Sequence[tuple[Term, Tensor]]:
        """The terms with a weight a row."""

    def __call__(self, block: Block, rows: slice, wants_gradient: bool) -> Tensor:
        """Weighted value `[r]` of a block; its logit gradient replaces `block.gap` if wanted."""


@dataclass(frozen=True)
class _Mixture:
    """a·reverse_kl + b·forward_kl without a temporary `[r, V]`: the path that has to be fast."""

    a: Tensor
    b: Tensor
    gate: Callable[[Tensor], Tensor] | None = None
    has_forward: bool = True
    """False if b is known to be 0 everywhere."""

    @property
    def summands(self) -> Sequence[tuple[Term, Tensor]]:
        """Reverse and, where there is any, forward KL."""
        reverse = (ReverseKL(), self.a)
        return [reverse, (ForwardKL(self.gate), self.b)] if self.has_forward else [reverse]

    def __call__(self, block: Block, rows: slice, wants_gradient: bool) -> Tensor:
        a, b = self.a[rows], self.b[rows]
        if self.gate is not None:
            b = b * self.gate(block.teacher_entropy).to(b.dtype)
        value = weighted(a, block.reverse_kl) + weighted(b, block.forward_kl)
        if wants_gradient:
            _logit_gradient_(block, a, b)
        return value


@dataclass(frozen=True)
class _Sum:
    """Any terms, each with a weight a row."""

    terms: Sequence[tuple[Term, Tensor]]

    @property
    def summands(self) -> Sequence[tuple[Term, Tensor]]:
        """As given."""
        return self.terms

    def __call__(self, block: Block, rows: slice, wants_gradient: bool) -> Tensor:
        total, gradient = added(((term(block, rows), w[rows]) for term, w in self.terms), block.p)
        if wants_gradient:
            block.gap.copy_(gradient)
        return total


def _logit_gradient_(block: Block, a: Tensor, b: Tensor) -> None:
    """Turns `block.gap` in place into a p⊙(gap − E_p[gap]) + b (p − q)."""
    gradient = block.gap.sub_(block.mean_gap).mul_(a[:, None])
    if bool((a == 0).any()):  # there an infinite gap would have become 0·inf
        gradient.masked_fill_((a == 0)[:, None], 0.0)
    if bool((b != 0).any()):
        gradient.add_(b[:, None]).mul_(block.p)
        gradient.sub_(block.q.mul_(b[:, None]))
    else:
        gradient.mul_(block.p)
