"""Gradients over extreme logits: none may be infinite or NaN.

Rows mix ±1e4, one id that takes all, ties, equal sides and ordinary numbers, at temperatures from
0.01 to 10, in float16, bfloat16 and float32, with and without ids that a bias of −inf rules out.
Every term of the objective is differentiated at every row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from tutelage.core import LazyLogits, composite_objective, divergence, entropy, token_stats
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
from tutelage.core.weighting import entropy_gate

from .record import Outcome

VOCAB = 24
ROWS = 500
"""Rows of one batch."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEMPERATURES = (0.01, 0.05, 0.3, 1.0, 3.0, 10.0)
TERMS: dict[str, Callable[[Tensor, Tensor], Term]] = {
    "reverse_kl": lambda *_: ReverseKL(),
    "forward_kl": lambda *_: ForwardKL(),
    "gated": lambda *_: ForwardKL(lambda h: entropy_gate(h, 0.8, "soft", 0.1)),
    "jsd": lambda *_: JSD(0.3),
    "skew": lambda *_: SkewReverseKL(0.1),
    "topk_tail": lambda *_: TopKForwardKL(4),
    "topk_renorm": lambda *_: TopKForwardKL(4, tail=False),
    "topk_reverse": lambda *_: TopKReverseKL(4),
    "topk_student": lambda *_: TopKReverseKL(4, "student"),
    "topk_student_tail": lambda *_: TopKForwardKL(4, support="student"),
    "sampled": lambda tokens, old: SampledReverseKL(tokens, old),
}
RULED_OUT = {
    "nobody": tuple(TERMS),
    "both": ("reverse_kl", "forward_kl", "gated"),
    "student": ("reverse_kl",),
    "teacher": ("forward_kl", "gated"),
}
"""Who rules ids out by a bias of −inf, and the terms that are finite then and take it."""
PLAIN = {"nobody": (0, 1, 2, 3), "both": (0, 1, 2, 3), "student": (0, 2, 3), "teacher": (1, 2, 3)}
"""The same for the readable functions, in their order."""


@dataclass(frozen=True)
class Case:
    """One batch of rows of both sides at one temperature, in one dtype."""

    student: LazyLogits
    teacher: LazyLogits
    tokens: Tensor
    ruled_out: str
    """Who rules ids out, a key of `RULED_OUT`."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that are finite here."""
        return RULED_OUT[self.ruled_out]


def extreme(generator: torch.Generator, rng: random.Random, rows: int) -> Tensor:
    """Logits `[rows, V]`, each row of one of six kinds."""
    z = torch.randn(rows, VOCAB, generator=generator)
    for row in range(rows):
        match rng.randrange(6):
            case 0:  # ±1e4 anywhere
                z[row] = 1e4 * torch.randint(-1, 2, (VOCAB,), generator=generator)
            case 1:  # one id takes all
                z[row, rng.randrange(VOCAB)] = rng.choice([50.0, 500.0, 1e4])
            case 2:  # two ids tie for all
                z[row, rng.sample(range(VOCAB), 2)] = rng.choice([50.0, 1e4])
            case 3:  # one id is ruled out, as far as numbers can
                z[row, rng.randrange(VOCAB)] = -1e4
            case 4:  # flat
                z[row] = rng.choice([-1e4, 0.0, 1e4])
    return z


def random_case(seed: int, rows: int = ROWS) -> Case:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype, scale = rng.choice(DTYPES), 1 / rng.choice(TEMPERATURES)
    z, teacher = extreme(generator, rng, rows), extreme(generator, rng, rows)
    equal = torch.rand(rows, generator=generator) < 0.1
    teacher[equal] = z[equal]
    ruled_out = rng.choice(["nobody"] * 7 + list(RULED_OUT)[1:])
    bias = torch.zeros(VOCAB)
    bias[rng.sample(range(VOCAB), rng.randint(1, VOCAB - 2))] = -torch.inf
    biases = [bias if ruled_out in ("both", side) else None for side in ("student", "teacher")]
    softcap = rng.choice([None, None, 30.0]) if ruled_out == "nobody" else None
    eye = torch.eye(VOCAB, dtype=dtype)
    tokens = torch.randint(0, VOCAB, (rows,), generator=generator)
    student, other = (
        LazyLogits(x.to(dtype), eye, b, scale, softcap)
        for x, b in zip((z, teacher), biases, strict=True)
    )
    return Case(student, other, tokens, ruled_out)


def bad_rows(gradient: Tensor) -> Tensor:
    """Rows `[N]` with an entry that is not a number."""
    return ~torch.isfinite(gradient).all(-1)


def gradients(case: Case, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of a term's sum over rows, for hidden states and head, which are first cast to `dtype`."""
    old = token_stats(case.student, case.teacher, case.tokens).log_p
    hidden, weight = (
        x.detach().to(dtype, copy=True).requires_grad_(True)
        for x in (case.student.hidden, case.student.weight)
    )
    student = replace(case.student, hidden=hidden, weight=weight)
    teacher = case.teacher
    if dtype == torch.float64:
        teacher = replace(teacher, hidden=teacher.hidden.double(), weight=teacher.weight.double())
    composite_objective(student, teacher, [(TERMS[name](case.tokens, old), 1.0)]).total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad


def judged(case: Case, name: str) -> tuple[int, int]:
    """Rows (and head columns) of a fused term whose gradient is bad, and those excused.

    float16 ends at 65,504. At temperature 0.01 and logits of 1e4 the true gradient is beyond, and a
    bfloat16 or float32 one never is: a bad entry is excused if the same in float64 is out of range.
    """
    dtype = case.student.hidden.dtype
    found = gradients(case, name, dtype)
    if not any(bad_rows(g).any() for g in found):
        return 0, 0
    exact = gradients(case, name, torch.float64)
    limit = torch.finfo(dtype).max
    num_bad = num_excused = 0
    for g, e in zip(found, exact, strict=True):
        # One entry out of range spoils its row, which is multiplied with the head.
        is_excused = bad_rows(g) & torch.isfinite(e).all(-1) & (e.abs().amax(-1) > 0.999 * limit)
        num_excused += int(is_excused.sum())
        num_bad += int((bad_rows(g) & ~is_excused).sum())
    return num_bad, num_excused


def plain(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Name and logit gradient of the readable functions, by autograd."""
    with torch.no_grad():
        z, teacher = (x.block(0, len(x)) for x in (case.student, case.teacher))
        log_q = log_softmax(teacher, -1)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "divergence.reverse_kl": lambda log_p: divergence.reverse_kl(log_p, log_q),
        "divergence.forward_kl": lambda log_p: divergence.forward_kl(log_p, log_q),
        "divergence.jsd": lambda log_p: divergence.jsd(log_p, log_q, 0.3),
        "entropy": entropy,
    }
    for name in [list(functions)[i] for i in PLAIN[case.ruled_out]]:
        leaf = z.clone().requires_grad_(True)
        functions[name](log_softmax(leaf, -1)).sum().backward()
        assert leaf.grad is not None
        yield name, leaf.grad


def naive(case: Case) -> int:
    """Rows with a bad gradient when the student is the target of torch's kl_div, as often seen."""
    with torch.no_grad():
        z, teacher = (x.block(0, len(x)) for x in (case.student, case.teacher))
        log_q = log_softmax(teacher, -1)
    leaf = z.clone().requires_grad_(True)
    kl_div(log_q, leaf.softmax(-1), reduction="sum").backward()
    assert leaf.grad is not None
    return int(bad_rows(leaf.grad).sum())


def run(num_rows: int) -> Outcome:
    """Gradients of every term at `num_rows` rows."""
    bad: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    rows = num_naive = num_beyond = 0
    for seed in range(-(-num_rows // ROWS)):
        case = random_case(seed)
        rows += len(case.student)
        num_naive += naive(case)
        for name, gradient in plain(case):
            seen[name] += len(gradient)
            bad[name] += int(bad_rows(gradient).sum())
        for name in case.terms:
            num_bad, num_excused = judged(case, name)
            seen[name] += len(case.student)
            bad[name] += num_bad
            num_beyond += num_excused
    return Outcome(
        "no gradient of a finite loss is infinite or NaN, whatever the logits",
        trials=rows,
        failures=sum(bad.values()),
        control={"rows that kl_div with the student as target spoils": num_naive},
        details={
            "gradients_by_term": dict(seen),
            "bad_by_term": {name: count for name, count in bad.items() if count},
            "excused: exact gradient beyond float16": num_beyond,
        },
    )
