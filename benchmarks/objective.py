"""Time and memory of the distillation objective against other ways to compute the same numbers.

All contestants get the same hidden states and heads and compute the sum over rows of the full
reverse KL with its gradients for the student's hidden states and head. Times are taken in one
process, in turns; extra peak memory in one process for each.

    pip install -e '.[bench]'
    python benchmarks/objective.py --threads 2

Times mean nothing on a busy machine: look at the load average in the result.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tutelage
from tutelage.core import LazyLogits, distillation_objective, select_tokens, token_stats
from tutelage.core._block import CHUNK_BYTES, rows_per_chunk

HERE = Path(__file__).parent
MIB = 1 << 20
CHECK_ROWS = 128
COMPLETION_LENGTH = 128
"""Rows of one completion, for the contestant that selects."""


@dataclass(frozen=True)
class Inputs:
    """Hidden states `[N, D]` and heads `[V, D]` of both sides."""

    student: Tensor
    head: Tensor
    teacher: Tensor
    teacher_head: Tensor

    @property
    def sides(self) -> tuple[LazyLogits, LazyLogits]:
        """Both sides as lazy logits."""
        return LazyLogits(self.student, self.head), LazyLogits(self.teacher, self.teacher_head)

    def first(self, rows: int) -> Inputs:
        """The same heads over the first rows, with gradients of their own."""
        return self.at(torch.arange(rows))

    def at(self, rows: Tensor) -> Inputs:
        """The same heads over the given rows, with gradients of their own."""
        student, head = (x.detach().clone() for x in (self.student[rows], self.head))
        return Inputs(
            student.requires_grad_(True),
            head.requires_grad_(True),
            self.teacher[rows],
            self.teacher_head,
        )


def make_inputs(rows: int, vocab_size: int, width: int) -> Inputs:
    """A teacher near the student, logits with a standard deviation of about 3 nats."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int, size: float) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(size)

    student, head = new(rows, width, size=1.0), new(vocab_size, width, size=3 * width**-0.5)
    teacher = new(rows, width, size=0.3).add_(student)
    teacher_head = head.clone()
    return Inputs(student.requires_grad_(True), head.requires_grad_(True), teacher, teacher_head)


def all_tokens(x: Inputs) -> Tensor:
    """Ours: every row."""
    total = distillation_objective(*x.sides).total
    total.backward()
    return total


def soft_or_rows(x: Inputs) -> Tensor:
    """Ours: score all rows, keep half of each completion by Soft-OR."""
    tokens = torch.zeros(len(x.student), dtype=torch.long)
    completion = torch.arange(len(x.student)) // COMPLETION_LENGTH
    return select_tokens(token_stats(*x.sides, tokens), completion, "soft_or", 0.5).rows


def soft_or_50(x: Inputs) -> Tensor:
    """Ours: the rows that Soft-OR keeps."""
    rows = soft_or_rows(x)
    student, teacher = x.sides
    total = distillation_objective(student[rows], teacher[rows]).total
    total.backward()
    return total


def materialised(x: Inputs) -> Tensor:
    """Plain torch: both logits, both log-softmaxes, autograd."""
    log_p = (x.student @ x.head.t()).log_softmax(-1)
    with torch.no_grad():
        log_q = (x.teacher @ x.teacher_head.t()).log_softmax(-1)
    total = (log_p.exp() * (log_p - log_q)).sum()
    total.backward()
    return total


def trl(x: Inputs) -> Tensor:
    """TRL's chunked divergence; beta = 1 is its reverse KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    apply = ChunkedDivergenceFunction.apply
    rows: Tensor = apply(x.student, x.head, None, x.teacher, x.teacher_head, None, 1.0)[0]
    total = rows.sum()
    total.backward()
    return total


def _liger(x: Inputs, compiled: bool) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled
    )
    labels = torch.zeros(len(x.student), dtype=torch.long)
    mean: Tensor = loss(x.student, x.head, x.teacher, x.teacher_head, labels)
    total = mean * len(x.student)  # it divides by the rows itself
    total.backward()
    return total


def liger(x: Inputs) -> Tensor:
    """Liger's fused linear JSD without torch.compile; beta = 1 is its reverse KL."""
    return _liger(x, compiled=False)


def liger_compiled(x: Inputs) -> Tensor:
    """The same with torch.compile; its memory includes the compiler's."""
    return _liger(x, compiled=True)


@torch.no_grad()
def bare_products(x: Inputs) -> None:
    """The four matrix products nobody can do without, chunked as ours are; computes no loss."""
    chunk = rows_per_chunk(len(x.student), len(x.head), x.head.dtype, CHUNK_BYTES)
    buffers = torch.empty(2, chunk, len(x.head))
    gradient, head_gradient = torch.empty_like(x.student), torch.zeros_like(x.head)
    for start in range(0, len(x.student), chunk):
        rows = slice(start, start + chunk)
        hidden = x.student[rows]
        z = torch.mm(hidden, x.head.t(), out=buffers[0, : len(hidden)])
        torch.mm(x.teacher[rows], x.teacher_head.t(), out=buffers[1, : len(hidden)])
        torch.mm(z, x.head, out=gradient[rows])
        head_gradient.addmm_(z.t(), hidden)


CONTESTANTS: dict[str, Callable[[Inputs], Tensor | None]] = {
    "bare_products": bare_products,
    "all_tokens": all_tokens,
    "soft_or_50": soft_or_50,
    "materialised": materialised,
    "trl": trl,
    "liger": liger,
    "liger_compiled": liger_compiled,
}
NEEDS = {"trl": "trl", "liger": "liger_kernel", "liger_compiled": "liger_kernel"}


def exact(x: Inputs) -> tuple[float, Tensor, Tensor]:
    """Sum of the reverse KL and its two gradients in float64, by autograd, 64 rows at a time."""
    hidden, head = (y.detach().double().requires_grad_(True) for y in (x.student, x.head))
    teacher_head, total = x.teacher_head.double(), 0.0
    for h, teacher in zip(torch.split(hidden, 64), torch.split(x.teacher, 64), strict=True):
        log_p = (h @ head.t()).log_softmax(-1)
        log_q = (teacher.double() @ teacher_head.t()).log_softmax(-1)
        part = (log_p.exp() * (log_p - log_q)).sum()
        part.backward()
        total += part.item()
    assert hidden.grad is not None
    assert head.grad is not None
    return total, hidden.grad, head.grad


def gradient_errors(inputs: Inputs, names: list[str]) -> dict[str, float]:
    """Largest relative distance of each contestant's gradients and value from float64."""
    errors = {}
    sample = inputs.first(min(CHECK_ROWS, len(inputs.student)))
    truth = exact(sample)
    for name in names:
        x = sample.first(len(sample.student))
        total = CONTESTANTS[name](x)
        if total is None:
            continue
        expected = truth
        found = [x.student.grad, x.head.grad]
        if name == "soft_or_50":
            rows = soft_or_rows(sample)
            expected = exact(sample.at(rows))
            found[0] = None if found[0] is None else found[0][rows]
        value = abs(total.item() - expected[0]) / expected[0]
        errors[name] = max(value, *map(_distance, found, expected[1:]))
    return errors


def _distance(found: Tensor | None, expected: Tensor) -> float:
    if found is None:
        raise RuntimeError("a contestant computed no gradient.")
    return float((found.double() - expected).norm() / expected.norm())


def times(inputs: Inputs, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, taken in turns; a first round of warm-up is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name in names:
            inputs.student.grad = inputs.head.grad = None
            gc.collect()
            start = time.perf_counter()
            CONTESTANTS[name](inputs)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def extra_memory(name: str, inputs: Inputs) -> int:
    """Bytes by which one call raises the peak, once a small call has loaded its code."""
    if name != "liger_compiled":
        CONTESTANTS[name](make_inputs(8, 64, inputs.student.shape[1]))
    before = peak_rss()
    CONTESTANTS[name](inputs)
    return peak_rss() - before


def extra_memory_elsewhere(name: str, arguments: argparse.Namespace) -> int:
    """`extra_memory` in a process of its own."""
    sizes = [arguments.rows, arguments.vocab_size, arguments.width]
    command = [sys.executable, str(Path(__file__)), "--memory-of", name]
    for flag, value in zip(("--rows", "--vocab-size", "--width"), sizes, strict=True):
        command += [flag, str(value)]
    command += ["--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def table(results: dict[str, dict[str, Any]]) -> str:
    """Results as text: seconds, extra memory, and both as multiples of the all-token objective."""
    ours = results["all_tokens"]
    lines = [
        f"{'':16}{'seconds':>9}{'x ours':>8}{'extra MiB':>11}{'x ours':>8}{'error':>10}",
    ]
    for name, r in results.items():
        error = "" if r["error"] is None else f"{r['error']:.1e}"
        seconds, size = r["seconds"], r["extra_bytes"]
        lines.append(
            f"{name:16}{seconds:9.3f}{seconds / ours['seconds']:8.2f}"
            f"{size / MIB:11.0f}{size / ours['extra_bytes']:8.2f}{error:>10}"
        )
    return "\n".join(lines)


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours as multiples of every other contestant."""
    found: dict[str, dict[str, float]] = {}
    for mine in ("all_tokens", "soft_or_50"):
        for other, r in results.items():
            if mine in results and other not in ("all_tokens", "soft_or_50"):
                found[f"{mine}/{other}"] = {
                    "time": round(results[mine]["seconds"] / r["seconds"], 4),
                    "extra_memory": round(results[mine]["extra_bytes"] / r["extra_bytes"], 4),
                }
    return found


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and commit that the figures belong to."""
    packages = ("torch", "trl", "liger-kernel", "transformers")
    versions = {name: _version(name) for name in packages}
    versions |= {"python": platform.python_version(), "tutelage": tutelage.__version__}
    model = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("memory_of", "out")},
        "dtype": "float32",
        "versions": versions,
        "machine": {
            "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_at_start": os.getloadavg(),
            "platform": platform.platform(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="N")
    parser.add_argument("--vocab-size", type=int, default=49152, help="V")
    parser.add_argument("--width", type=int, default=576, help="D")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, at least 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS)
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: results/objective-DATE.json)")
    parser.add_argument("--memory-of", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, print the table and write the JSON."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    inputs = make_inputs(arguments.rows, arguments.vocab_size, arguments.width)
    if arguments.memory_of:
        print(extra_memory(arguments.memory_of, inputs))
        return
    names = [n for n in arguments.contestants if importlib.util.find_spec(NEEDS.get(n, "torch"))]
    names = list(dict.fromkeys(["all_tokens", *names]))
    for name in set(arguments.contestants) - set(names):
        print(f"{name} is left out: {NEEDS[name]} is not installed", file=sys.stderr)
    record = environment(arguments)
    memory = {name: extra_memory_elsewhere(name, arguments) for name in names}
    errors = gradient_errors(inputs, names)
    seconds = times(inputs, names, max(3, arguments.rounds))
    results = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "seconds_of_rounds": seconds[name],
            "extra_bytes": memory[name],
            "error": errors.get(name),
        }
        for name in names
    }
    print(table(results))
    default = HERE / "results" / f"objective-{record['date'][:10]}.json"
    out: Path = arguments.out or default
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record | {"results": results, "ratios": ratios(results)}, indent=2))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
