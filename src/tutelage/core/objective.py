"""The exact distillation objective over hidden states, its gradient computed inside forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tutelage.core import kernels
from tutelage.core._block import Block, Chunk, can_be_inf, check_pair, chunks
from tutelage.core.extras import EXTRAS
from tutelage.core.lazy import LazyLogits
from tutelage.core.products import add_product_, product
from tutelage.core.terms import ForwardKL, ReverseKL, Term


@dataclass(frozen=True)
class Objective:
    """A sum over rows to back-propagate, and what every row contributed to it."""

    total: Tensor
    """Scalar, nats: Σ_rows a·reverse_kl + b·forward_kl. Divide it once, by the global count."""
    reverse_kl: Tensor
    """KL(p‖q) `[K]`, nats, without gradient."""
    forward_kl: Tensor
    """KL(q‖p) `[K]`, nats, without gradient."""
    entropy: Tensor
    """Student entropy `[K]`, nats, without gradient."""
    teacher_entropy: Tensor
    """Teacher entropy `[K]`, nats, without gradient."""
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
    teacher: LazyLogits,
    terms: Sequence[tuple[Term, Tensor | float]],
    chunk_bytes: int | None = None,
    extras: Sequence[str] = (),
) -> Objective:
    """Weighted sum of any terms over all rows, in nats, fused like `distillation_objective`.

    ``total = Σ_n Σ_i w_in term_i(p_n, q_n)``

    Args:
        student: student logits of K rows; gradients flow to its hidden states, weight and bias.
        teacher: teacher logits of the same rows and vocabulary.
        terms: terms of `tutelage.core.terms`, each with a weight, `[K]` or one number.
        chunk_bytes: size of the two logit buffers; None for what suits the device.
        extras: statistics to compute on the way, keys of `EXTRAS`.

    Returns:
        `Objective`; `total` is differentiable once.

    Raises:
        ValueError: there are no terms, the sides differ, a weight does not have K rows, or a
            bias is infinite and a term is neither forward nor reverse KL.
    """
    check_pair(student, teacher)
    if not terms:
        raise ValueError("composite_objective needs at least one term, got none.")
    if not _is_mixture(terms) and (can_be_inf(student) or can_be_inf(teacher)):
        raise ValueError(
            "terms other than ForwardKL and ReverseKL need finite logits, got an infinite bias. "
            "Use a large negative number instead."
        )
    weighted = [(term, _row_weights(w, student, "a term's weight")) for term, w in terms]
    return _run(student, teacher, _kernel(weighted), chunk_bytes, extras)


def _run(
    student: LazyLogits,
    teacher: LazyLogits,
    kernel: _Kernel,
    chunk_bytes: int | None,
    extras: Sequence[str] = (),
) -> Objective:
    if student.swap is not None:
        raise ValueError("only the teacher's ids can be swapped, got a student with a swap.")
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
        teacher: LazyLogits,
        kernel: _Kernel,
        chunk_bytes: int | None,
        extras: Sequence[str],
    ) -> tuple[Tensor, ...]:
        is_fused = isinstance(kernel, _Mixture) and not extras and kernels.suits(student, teacher)
        needs = ctx.needs_input_grad
        gradients = _Gradients.like(hidden, weight, bias, needs, student.dtype, is_fused)
        if is_fused:
            assert isinstance(kernel, _Mixture)
            rows = _by_kernels(student, teacher, kernel, chunk_bytes, gradients)
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
    teacher: LazyLogits,
    kernel: _Kernel,
    chunk_bytes: int | None,
    extras: Sequence[str],
    gradients: _Gradients,
) -> Tensor:
    """The fields of `Objective` a row, then extras, `[5 + E, K]`: plain torch, on any device."""
    shape = (5 + len(extras), len(student))
    rows = torch.empty(shape, dtype=torch.float64, device=student.hidden.device)
    for chunk in chunks(student, teacher, chunk_bytes):
        for here, block in chunk.blocks():
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
    teacher: LazyLogits,
    kernel: _Mixture,
    chunk_bytes: int | None,
    gradients: _Gradients,
) -> Tensor:
    """The same by fused kernels, which read and write logits once a pass."""
    from tutelage.core.kernels import passes  # needs Triton

    work = passes.Passes(student, teacher, chunk_bytes, gradients.needed)
    table = work.table
    a, b = kernel.a, kernel.b.clone()
    slopes = passes.Slopes(a, b if kernel.has_forward else None)
    for chunk in work.chunks():
        if kernel.gate is not None:
            gate = kernel.gate(table[passes.TEACHER_ENTROPY, chunk.rows])
            b[chunk.rows] *= gate.to(b.dtype)
        if gradients.needed:
            gradients.add_products(work.student, chunk.rows, work.gradient(chunk, slopes))
    reverse, forward = table[passes.REVERSE_KL], table[passes.FORWARD_KL]
    value = _weighted(a, reverse) + _weighted(b, forward)
    entropies = table[passes.ENTROPY], table[passes.TEACHER_ENTROPY]
    return torch.stack((reverse, forward, *entropies, value))


class _Kernel(Protocol):
    """What is summed over rows."""

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

    def __call__(self, block: Block, rows: slice, wants_gradient: bool) -> Tensor:
        a, b = self.a[rows], self.b[rows]
        if self.gate is not None:
            b = b * self.gate(block.teacher_entropy).to(b.dtype)
        value = _weighted(a, block.reverse_kl) + _weighted(b, block.forward_kl)
        if wants_gradient:
            _logit_gradient_(block, a, b)
        return value


@dataclass(frozen=True)
class _Sum:
    """Any terms, each with a weight a row."""

    terms: Sequence[tuple[Term, Tensor]]

    def __call__(self, block: Block, rows: slice, wants_gradient: bool) -> Tensor:
        total, gradient = torch.zeros_like(block.reverse_kl), torch.zeros_like(block.gap)
        for term, weights in self.terms:
            weight = weights[rows]
            value, slope = term(block, rows)
            total += _weighted(weight, value)
            gradient += slope.mul(weight[:, None]).masked_fill_((weight == 0)[:, None], 0.0)
        if wants_gradient:
            block.gap.copy_(gradient)
        return total


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight·value; a row of weight 0 adds exactly 0, even when its divergence is infinite."""
    return weight * value.masked_fill(weight == 0, 0.0)


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


@dataclass
class _Gradients:
    """Accumulated gradients of hidden states, head weight and bias; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dtypes: tuple[torch.dtype, torch.dtype]
    is_spent: bool = False

    @staticmethod
    def like(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, ...],
        dtype: torch.dtype,
        is_fused: bool,
    ) -> _Gradients:
        # Kernels leave float32 sums, so that scaling rounds once, and fill empty memory.
        new = torch.empty_like if is_fused and len(hidden) else torch.zeros_like
        return _Gradients(
            torch.empty_like(hidden, dtype=dtype if is_fused else None) if needs[0] else None,
            new(weight, dtype=dtype) if needs[1] else None,
            torch.zeros_like(bias, dtype=dtype) if needs[2] and bias is not None else None,
            (hidden.dtype, weight.dtype),
        )

    @property
    def needed(self) -> bool:
        return any(g is not None for g in (self.hidden, self.weight, self.bias))

    def add(self, student: LazyLogits, chunk: Chunk) -> None:
        """Carries one chunk's logit gradient (in `chunk.student`) to hidden states and head."""
        z, rows = chunk.student, slice(chunk.start, chunk.stop)
        if student.softcap is not None:
            capped = student.block(chunk.start, chunk.stop, out=chunk.teacher)
            z.mul_(capped.div_(student.softcap).square_().neg_().add_(1.0))
        if student.scale != 1.0:
            z.mul_(student.scale)
        hidden, weight = student.hidden[rows], student.weight
        if self.hidden is not None:
            self.hidden[rows] = product(z.to(weight.dtype), weight.t())
        if self.weight is not None:
            add_product_(self.weight, z.t(), hidden.to(z.dtype).t())
        if self.bias is not None:
            self.bias.add_(z.sum(0))

    def add_products(self, student: LazyLogits, rows: slice, gradient: Tensor) -> None:
        """Carries the gradient `[n, V]` of raw logits of `rows` to hidden states and head."""
        from tutelage.core.kernels.passes import multiply, multiply_add  # needs Triton

        if self.hidden is not None:
            multiply(gradient, student.weight, self.hidden[rows])
        if self.weight is not None:
            add = multiply if rows.start == 0 else multiply_add  # the first fills empty memory
            add(gradient.t(), student.hidden[rows], self.weight)
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype))

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients times `factor`, in the dtypes of their inputs; gives them away."""
        if self.is_spent:
            raise RuntimeError(
                "the objective was back-propagated twice; its gradients live for one backward. "
                "Compute the objective again instead of using retain_graph."
            )
        self.is_spent = True
        found = (self.hidden, self.weight, self.bias)
        self.hidden = self.weight = self.bias = None
        dtypes = (self.dtypes[0], self.dtypes[1], self.dtypes[1])
        if factor.device.type != "cpu":  # asking what the factor is would wait for the device
            h, w, b = (_times(g, factor, d) for g, d in zip(found, dtypes, strict=True))
            return h, w, b
        if factor.item() != 1.0:
            found = tuple(None if g is None else g.mul_(factor) for g in found)  # type: ignore[assignment]
        h, w, b = (None if g is None else g.to(d) for g, d in zip(found, dtypes, strict=True))
        return h, w, b


def _times(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The product in `dtype`, rounded once; in place where that is what `gradient` has."""
    if gradient is None or gradient.dtype == dtype:
        return None if gradient is None else gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
