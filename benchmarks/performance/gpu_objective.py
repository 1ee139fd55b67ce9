"""The objective on one GPU beside its bare products, TRL, Liger and materialised logits.

Every part prints a line as it goes and returns what is worth keeping; both sides of a ratio are in
one part. Times are medians of five by CUDA events after two warm-ups; memory is the highest
that was allocated beyond the inputs.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from gpu_card import kernel_milliseconds
from objective_contestants import (
    Inputs,
    all_tokens,
    eopd,
    exact,
    liger,
    liger_compiled,
    materialised,
    selected,
    trl,
)
from tutelage.core import (
    LazyLogits,
    composite_objective,
    distillation_objective,
    select_tokens,
    token_stats,
)
from tutelage.core.terms import (
    JSD,
    SampledReverseKL,
    SkewReverseKL,
    TopKForwardKL,
    TopKReverseKL,
)

DEVICE = "cuda"
SHAPES = {
    "wide": (8192, 151_936, 2560),
    "narrow": (8192, 151_936, 1024),
    "few": (2048, 128_256, 4096),
}
"""Rows, ids and width: Qwen3-4B, Qwen3-0.6B, Llama-3-8B."""

SMALL_CHUNK = 5 << 28
"""`chunk_bytes` of the setting that needs little memory: half of what is usual."""

CHECK_ROWS = 256


def make(shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """A teacher near the student, logits with a standard deviation of about 3 nats."""
    rows, ids, width = shape
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def new(*size: int, scale: float) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE).mul_(scale)

    student, head = new(rows, width, scale=1.0), new(ids, width, scale=3 * width**-0.5)
    teacher = new(rows, width, scale=0.3).add_(student).to(dtype)
    leaves = (student.to(dtype).requires_grad_(True), head.to(dtype).requires_grad_(True))
    return Inputs(*leaves, teacher, leaves[1].detach().clone())


def _clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def measure(run: Callable[[], Any], repeats: int = 5, warmups: int = 2) -> dict[str, float]:
    """Milliseconds (median, least and most) and extra MiB of one call."""
    for _ in range(warmups):
        run()
    _clean()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    extra = torch.cuda.max_memory_allocated() - before
    return {
        "ms": round(statistics.median(times), 3),
        "least": round(min(times), 3),
        "most": round(max(times), 3),
        "mib": round(extra / 2**20),
    }


def fresh(run: Callable[[Inputs], Any], x: Inputs) -> None:
    """One call whose gradients are new and thrown away."""
    run(x)
    x.student.grad = x.head.grad = None


def _try(name: str, run: Callable[[], Any]) -> dict[str, Any]:
    """A measurement, or why there is none: one contestant must not cost the others theirs."""
    try:
        found = measure(run)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:300]}  # type: ignore[dict-item]
    _clean()
    print(f"  {name}: {found}", flush=True)
    return found


@torch.no_grad()
def bare_products(x: Inputs, head_dtype: torch.dtype, chunk: int = 2048) -> None:
    """The four products, chunk by chunk, of operands that are there; no loss."""
    n, ids = len(x.student), len(x.head)
    gradient = torch.empty_like(x.student)
    head = torch.zeros(x.head.shape, dtype=head_dtype, device=DEVICE)
    z, y = (torch.empty(min(chunk, n), ids, dtype=x.head.dtype, device=DEVICE) for _ in "zy")
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        size = len(x.student[rows])
        torch.mm(x.student[rows], x.head.t(), out=z[:size])
        torch.mm(x.teacher[rows], x.teacher_head.t(), out=y[:size])
        torch.mm(z[:size], x.head, out=gradient[rows])
        if head_dtype == torch.float32:
            torch.addmm(head, z[:size].t(), x.student[rows], out_dtype=torch.float32, out=head)
        else:
            head.addmm_(z[:size].t(), x.student[rows])


def ours(x: Inputs, chunk_bytes: int | None = None) -> Tensor:
    """Every row, with a given size of the chunks."""
    total = distillation_objective(*x.sides, chunk_bytes=chunk_bytes).total
    total.backward()
    return total


def shape_part(name: str) -> dict[str, Any]:
    """Everybody at one shape, but for Liger."""
    x = make(SHAPES[name])
    found: dict[str, Any] = {"shape": SHAPES[name]}
    runs: dict[str, Callable[[], Any]] = {
        "products_bf16": partial(bare_products, x, torch.bfloat16),
        "products_f32": partial(bare_products, x, torch.float32),
        "ours": partial(fresh, all_tokens, x),
        "ours_small": partial(fresh, partial(ours, chunk_bytes=SMALL_CHUNK), x),
        "trl": partial(fresh, trl, x),
        "ours_again": partial(fresh, all_tokens, x),
        "materialised": partial(fresh, materialised, x),
    }
    for key, run in runs.items():
        found[key] = _try(key, run)
    found["ratios"] = _ratios(found)
    print(f"  ratios: {found['ratios']}", flush=True)
    found["kernels_ms"] = kernel_milliseconds(runs["ours"])
    return found


def _ratios(found: dict[str, Any]) -> dict[str, float]:
    pairs = {
        "time_of_trl": ("ours", "trl", "ms"),
        "memory_of_trl": ("ours", "trl", "mib"),
        "small_time_of_trl": ("ours_small", "trl", "ms"),
        "small_memory_of_trl": ("ours_small", "trl", "mib"),
        "time_of_products_f32": ("ours", "products_f32", "ms"),
        "time_of_liger": ("ours", "liger", "ms"),
        "time_of_liger_compiled": ("ours", "liger_compiled", "ms"),
    }
    return {
        key: round(found[a][unit] / found[b][unit], 3)
        for key, (a, b, unit) in pairs.items()
        if unit in found.get(a, {}) and unit in found.get(b, {})
    }


def liger_part() -> dict[str, Any]:
    """Liger eager and compiled, beside ours, at the first shape."""
    x = make(SHAPES["wide"])
    found: dict[str, Any] = {}
    for key, run in (("ours", all_tokens), ("liger", liger), ("liger_compiled", liger_compiled)):
        found[key] = _try(key, partial(fresh, run, x))
    found["ratios"] = _ratios(found)
    print(f"  ratios: {found['ratios']}", flush=True)
    return found


def _distances(x: Inputs, total: Tensor, truth: tuple[float, Tensor, Tensor]) -> dict[str, float]:
    def distance(a: Tensor | None, b: Tensor) -> float:
        return float("nan") if a is None else float((a.double() - b).norm() / b.norm())

    return {
        "value": abs(total.item() - truth[0]) / truth[0],
        "hidden": distance(x.student.grad, truth[1]),
        "head": distance(x.head.grad, truth[2]),
    }


def errors_part() -> dict[str, Any]:
    """Relative error of value and gradients against float64, 256 rows of the second shape.

    `_scaled` divides the sum by the rows, as training does: the gradient is then rounded anew by
    who keeps it rounded.
    """
    _, ids, width = SHAPES["narrow"]
    x = make((CHECK_ROWS, ids, width))
    truth = exact(x)
    found: dict[str, Any] = {}
    runs = {"ours": all_tokens, "trl": trl, "liger": liger, "materialised": materialised}
    for name, run in runs.items():
        x.student.grad = x.head.grad = None
        try:
            found[name] = _distances(x, run(x), truth)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(f"  {name}: {found[name]}", flush=True)
    x.student.grad = x.head.grad = None
    total = distillation_objective(*x.sides).total
    (total / 3).backward()
    scaled = (truth[0], truth[1] / 3, truth[2] / 3)
    found["ours_scaled"] = _distances(x, total, scaled) | {"value": 0.0}
    print(f"  ours_scaled: {found['ours_scaled']}", flush=True)
    return found


def _term(term: Any) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        total = composite_objective(*x.sides, [(term, 1.0)]).total
        total.backward()
        return total

    return run


def rules_part() -> dict[str, Any]:
    """Selection and other objectives beside ours over all tokens, at the first shape."""
    x = make(SHAPES["wide"])
    runs: dict[str, Callable[[Inputs], Any]] = {
        "all_tokens": all_tokens,
        "soft_or_50": partial(selected, rule="soft_or", keep=0.5),
        "entropy_10": partial(selected, rule="entropy", keep=0.1),
        "eopd": eopd,
        "jsd": _term(JSD()),
    }
    found = _beside_all_tokens(x, runs)
    found["kernels_ms"] = {
        name: kernel_milliseconds(partial(fresh, runs[name], x))
        for name in ("all_tokens", "entropy_10")
    }
    return found


def terms_part() -> dict[str, Any]:
    """The remaining terms beside ours over all tokens, at the first shape."""
    x = make(SHAPES["wide"])
    n = len(x.student)
    tokens = torch.zeros(n, dtype=torch.long, device=DEVICE)
    old = torch.full((n,), -5.0, device=DEVICE)
    runs: dict[str, Callable[[Inputs], Any]] = {
        "all_tokens": all_tokens,
        "skew": _term(SkewReverseKL()),
        "top_k_forward": _term(TopKForwardKL()),
        "top_k_reverse": _term(TopKReverseKL()),
        "sampled": _term(SampledReverseKL(tokens, old)),
    }
    return _beside_all_tokens(x, runs)


def _beside_all_tokens(x: Inputs, runs: dict[str, Callable[[Inputs], Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {k: _try(k, partial(fresh, run, x)) for k, run in runs.items()}
    base = found["all_tokens"].get("ms", float("nan"))
    found["ratios"] = {k: round(v["ms"] / base, 3) for k, v in found.items() if "ms" in v}
    print(f"  ratios: {found['ratios']}", flush=True)
    return found


def memory_part() -> dict[str, Any]:
    """Highest memory of the objective alone when a share of the rows is kept, first shape."""
    x = make(SHAPES["wide"])
    n = len(x.student)
    found: dict[str, Any] = {}
    for percent in (100, 50, 20, 10):
        rows = torch.arange(n * percent // 100, device=DEVICE)

        def run(y: Inputs, rows: Tensor = rows) -> None:
            student, teacher = y.sides
            distillation_objective(student[rows], teacher[rows]).total.backward()

        def plain(y: Inputs, rows: Tensor = rows) -> None:
            part = Inputs(y.student[rows], y.head, y.teacher[rows], y.teacher_head)
            materialised(part)

        found[f"ours_{percent}"] = _try(f"ours_{percent}", partial(fresh, run, x))
        found[f"materialised_{percent}"] = _try(f"plain_{percent}", partial(fresh, plain, x))
    return found


@contextmanager
def _setting(**values: int) -> Iterator[None]:
    from tutelage.core.kernels import passes

    before = {name: getattr(passes, name) for name in values}
    for name, value in values.items():
        setattr(passes, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(passes, name, value)


STATISTICS = ((1024, 4), (2048, 4), (1024, 8), (2048, 8), (4096, 8), (4096, 16), (8192, 16))
GRADIENTS = ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16))


def _bandwidth(found: dict[str, Any], size: float) -> dict[str, Any]:
    return found | ({"gb_s": round(size / found["ms"] / 1e6)} if "ms" in found else {})


def _copy(rows: int, ids: int) -> dict[str, Any]:
    """What the card's memory allows: a copy of one buffer of logits."""
    source = torch.randn(rows, ids, device=DEVICE)
    target = torch.empty_like(source)
    return _bandwidth(_try("copy", lambda: target.copy_(source)), 8.0 * rows * ids)


@torch.no_grad()
def kernels_part() -> dict[str, Any]:
    """The two kernels alone over 2,048 rows, and their blocks and warps.

    Statistics of both sides and of the student alone; what is fastest for both is what
    `passes.STATISTICS_BLOCK` and `passes.STATISTICS_WARPS` should be.
    """
    from tutelage.core.kernels import passes, products

    rows, ids = SHAPES["few"][0], SHAPES["wide"][1]
    x = make((rows, ids, 1024))
    work = passes.Passes(*x.sides, None, wants_gradient=True)
    tokens = torch.zeros(rows, dtype=torch.long, device=DEVICE)
    chunk = next(iter(work.chunks(tokens)))
    student = passes.Passes(x.sides[0], None, None, wants_gradient=False)
    next(iter(student.chunks(tokens)))
    found: dict[str, Any] = {"copy": _copy(rows, ids)}
    for block, warps in STATISTICS:
        with _setting(STATISTICS_BLOCK=block, STATISTICS_WARPS=warps):
            for name, one, size in (("statistics", work, 8.0), ("student", student, 4.0)):
                name = f"{name}_{block}_{warps}"
                ran = _try(name, partial(one._statistics, chunk, tokens))
                found[name] = _bandwidth(ran, size * rows * ids)
    slopes = passes.Slopes(torch.ones(rows, device=DEVICE))
    for block, warps in GRADIENTS:
        with _setting(GRADIENT_BLOCK=block, GRADIENT_WARPS=warps):
            name = f"gradient_{block}_{warps}"
            ran = _try(name, lambda: work.gradient(chunk, slopes))
            found[name] = _bandwidth(ran, 10.0 * rows * ids)
    z, head = work._student[:rows], work.student.weight.t()
    found["product_f32"] = _try("product", lambda: products.multiply(work.student.hidden, head, z))
    return found


def tune_part() -> dict[str, Any]:
    """The whole objective with chunks of several sizes and other blocks, first shape."""
    x = make(SHAPES["wide"])
    found: dict[str, Any] = {}
    for rows in (512, 1024, 1152, 1664, 2048, 2816, 4096):
        size = int(rows * SHAPES["wide"][1] * 8.25) + (1 << 20)
        run = partial(ours, chunk_bytes=size)
        found[f"rows_{rows}"] = _try(f"rows_{rows}", partial(fresh, run, x))
    for block, warps in ((1024, 4), (2048, 8), (4096, 8)):
        with _setting(STATISTICS_BLOCK=block, STATISTICS_WARPS=warps):
            name = f"statistics_{block}_{warps}"
            found[name] = _try(name, partial(fresh, all_tokens, x))
    for block, warps in ((2048, 4), (2048, 8), (4096, 8)):
        with _setting(GRADIENT_BLOCK=block, GRADIENT_WARPS=warps):
            name = f"gradient_{block}_{warps}"
            found[name] = _try(name, partial(fresh, all_tokens, x))
    return found


def scoring_part() -> dict[str, Any]:
    """Statistics without gradients at the first shape, of both sides and of the student."""
    x = make(SHAPES["wide"])
    student, teacher = x.sides
    tokens = torch.zeros(len(x.student), dtype=torch.long, device=DEVICE)
    return {
        "both": _try("both", lambda: token_stats(student, teacher, tokens)),
        "student": _try("student", lambda: token_stats(student, None, tokens)),
    }


def selection_part() -> dict[str, Any]:
    """What selecting a tenth by entropy is made of, at the first shape."""
    x = make(SHAPES["wide"])
    student, teacher = x.sides
    n = len(x.student)
    tokens = torch.zeros(n, dtype=torch.long, device=DEVICE)
    completion = torch.arange(n, device=DEVICE) // 128
    stats = token_stats(student, None, tokens)
    rows = select_tokens(stats, completion, "entropy", 0.1).rows
    few = Inputs(
        x.student[rows].detach().requires_grad_(True), x.head, x.teacher[rows], x.teacher_head
    )
    head = torch.randn(x.head.shape, device=DEVICE)
    factor = torch.tensor(0.5, device=DEVICE)
    found: dict[str, Any] = {
        "score": _try("score", lambda: token_stats(student, None, tokens)),
        "select": _try("select", lambda: select_tokens(stats, completion, "entropy", 0.1)),
        "learn": _try("learn", partial(fresh, all_tokens, few)),
        "scale": _try("scale", lambda: passes_scaled(head, factor)),
        "scale_by_torch": _try(
            "scale_by_torch",
            lambda: torch.mul(head, factor, out=torch.empty_like(head, dtype=torch.bfloat16)),
        ),
        "products": _try("products", lambda: bare_products(few, torch.float32)),
    }
    extras = ("teacher_top_mass",)
    found["score_both"] = _try("score_both", lambda: token_stats(student, teacher, tokens))
    found["score_extras"] = _try(
        "score_extras", lambda: token_stats(student, teacher, tokens, extras=extras)
    )
    found["score_head_share"] = _try(
        "score_head_share", lambda: token_stats(student, teacher, tokens, extras=("head_share",))
    )
    return found


def passes_scaled(head: Tensor, factor: Tensor) -> Tensor:
    """The last step of a head's gradient."""
    from tutelage.core.kernels.products import scaled

    return scaled(head, factor, torch.bfloat16)


@cache
def _cases() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)

    def draw(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    return [
        {
            "rows": draw(1, 3, 17, 64, 300),
            "ids": draw(5, 63, 64, 1000, 4097, 32_000, 50_257),
            "width": draw(8, 64, 136),
            "dtype": draw(torch.bfloat16, torch.float32),
            "bias": draw(False, False, True),
            "ruled_out": draw(False, True),
            "scale": draw(1.0, 1.0, 0.37),
            "softcap": draw(None, None, 5.0),
            "swap": draw(None, (1, 3)),
            "spread": draw(0.5, 3.0, 10.0),
            "chunk_bytes": draw(None, 1 << 18),
            "weights": draw("reverse", "forward", "both"),
            "seed": case,
        }
        for case in range(30)
    ]


def _case_sides(case: dict[str, Any]) -> tuple[LazyLogits, LazyLogits]:
    generator = torch.Generator(device=DEVICE).manual_seed(case["seed"])

    def new(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE).mul_(scale)

    rows, ids, width = case["rows"], case["ids"], case["width"]
    biases = [new(ids).to(case["dtype"]) if case["bias"] else None for _ in "st"]
    if case["ruled_out"]:
        for bias in biases:
            if bias is not None:
                bias[[0, ids // 2, ids - 1]] = -torch.inf
    hidden, head = new(rows, width), new(ids, width, scale=case["spread"] * width**-0.5)
    other = hidden + 0.3 * new(rows, width)
    dtype, how = case["dtype"], {"scale": case["scale"], "softcap": case["softcap"]}
    student = LazyLogits(hidden.to(dtype), head.to(dtype), biases[0], **how)
    swap = None if case["ruled_out"] else case["swap"]
    return student, LazyLogits(other.to(dtype), head.to(dtype), biases[1], **how, swap=swap)


def _as(side: LazyLogits, dtype: torch.dtype, needs_grad: bool) -> LazyLogits:
    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(dtype).requires_grad_(needs_grad)

    bias = None if side.bias is None else leaf(side.bias)
    return replace(side, hidden=leaf(side.hidden), weight=leaf(side.weight), bias=bias)


def _case_errors(case: dict[str, Any]) -> dict[str, float]:
    student, teacher = _case_sides(case)
    n = case["rows"]
    a = torch.rand(n, device=DEVICE) if case["weights"] != "forward" else 0.0
    b = torch.rand(n, device=DEVICE) if case["weights"] != "reverse" else 0.0
    tokens = torch.arange(n, device=DEVICE) % case["ids"]
    results = []
    for dtype in (case["dtype"], torch.float64):
        s, t = _as(student, dtype, True), _as(teacher, dtype, False)
        found = distillation_objective(s, t, a, b, chunk_bytes=case["chunk_bytes"])
        (found.total / 3).backward()
        leaves = [x.grad for x in (s.hidden, s.weight, s.bias) if x is not None]
        stats = token_stats(s, t, tokens).stack()
        alone = token_stats(s, None, tokens).stack()[[0, 4]]
        results.append((leaves, torch.cat([stats, alone])))
    (ours_, stats), (exact_, truth) = results
    finite = torch.isfinite(truth)
    if not torch.equal(finite, torch.isfinite(stats)):
        return {"gradient": float("nan"), "statistics": float("nan")}
    difference = torch.where(finite, (stats - truth).abs() / (1 + truth.abs()), 0.0)
    gradients = [
        float((x.double() - y).norm() / y.norm().clamp(min=1e-30))
        for x, y in zip(ours_, exact_, strict=True)
        if x is not None and y is not None
    ]
    return {"gradient": max(gradients), "statistics": float(difference.max())}


def correctness_part() -> dict[str, Any]:
    """Kernels against the package's plain torch code in float64, 30 random small cases."""
    bad, worst = [], {"bfloat16": 0.0, "float32": 0.0, "statistics": 0.0}
    for case in _cases():
        try:
            errors = _case_errors(case)
        except Exception as error:
            errors = {"gradient": float("nan"), "statistics": float("nan")}
            print(f"  {case}: {type(error).__name__}: {error}"[:600], flush=True)
        name = str(case["dtype"]).removeprefix("torch.")
        limit = 8e-3 if name == "bfloat16" else 5e-5
        worst[name] = max(worst[name], errors["gradient"])
        worst["statistics"] = max(worst["statistics"], errors["statistics"])
        if not (errors["gradient"] < limit and errors["statistics"] < 2e-5):
            bad.append({"case": {k: str(v) for k, v in case.items()}, **errors})
    print(f"  worst {worst}, {len(bad)} bad of {len(_cases())}: {bad[:4]}", flush=True)
    return {"worst": worst, "bad": bad, "cases": len(_cases())}


def determinism_part() -> dict[str, Any]:
    """Whether two calls give the same bits, and whether a call waits for the device."""
    x = make((4096, 151_936, 1024))
    found = []
    for _ in range(2):
        total = all_tokens(x)
        found.append((total.detach().clone(), x.student.grad, x.head.grad))
        x.student.grad = x.head.grad = None
    same = all(a is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_tokens(x)
        eopd(x)
        waits = ""
    except RuntimeError as error:
        waits = str(error)[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    print(f"  same bits: {same}, waits: {waits or 'no'}", flush=True)
    return {"same_bits": same, "waits": waits}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "objective_correctness": correctness_part,
    "objective_determinism": determinism_part,
    "objective_wide": partial(shape_part, "wide"),
    "objective_narrow": partial(shape_part, "narrow"),
    "objective_few": partial(shape_part, "few"),
    "objective_errors": errors_part,
    "objective_rules": rules_part,
    "objective_terms": terms_part,
    "objective_liger": liger_part,
    "objective_memory": memory_part,
    "objective_selection": selection_part,
    "objective_kernels": kernels_part,
    "objective_tune": tune_part,
    "objective_scoring": scoring_part,
}
"""Parts of `benchmarks/performance/gpu.py`, each within a minute on one card."""
