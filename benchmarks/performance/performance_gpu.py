"""The page on performance, its part about one CUDA device, from `results/gpu-*.json` alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Table = list[list[str]]
INTRO = """\
## On one GPU

Hidden states and heads in bfloat16; `benchmarks/performance/gpu.py` takes the measurements, each
part in a process of its own with both sides of a ratio. Times are medians of CUDA events; extra
memory is what one call needs beyond what was allocated, gradients included. `generate` is the
model's own, with its dynamic cache.
"""
WAYS = {
    "products_bf16": "the four products, bfloat16 weight gradient",
    "products_f32": "the four products, float32 weight gradient",
    "ours": "**ours**",
    "ours_small": "**ours, small chunks**",
    "trl": "TRL",
    "materialised": "materialised logits",
    "liger": "Liger",
    "liger_compiled": "Liger, compiled",
}
SHAPES = ("objective_wide", "objective_narrow", "objective_few", "objective_liger")
DRAWS = ("rollout_8_256", "rollout_64", "rollout_ragged", "rollout_0.6b", "rollout_4b")


def table(header: Sequence[str], rows: Table) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def where(record: dict[str, Any]) -> str:
    """Device and versions."""
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    commits = sorted({part["commit"][:10] for part in record["parts"].values()})
    what = f"{record['device']}, driver {record['driver']}, {packages}"
    return f"*{record['date']}, commits {', '.join(commits)}: {what}.*\n"


def shape_tables(parts: dict[str, Any]) -> Iterator[str]:
    """Time and extra memory of each way to compute the objective."""
    for name in SHAPES:
        part = parts.get(name, {})
        if "ours" not in part:
            continue
        mine = part["ours"]["ms"]
        rows = [
            [label, f"{part[way]['ms']:.1f}", f"{mine / part[way]['ms']:.2f}",
             f"{part[way]['mib']:,}"]
            for way, label in WAYS.items()
            if way in part
        ]  # fmt: skip
        n, v, d = part.get("shape") or parts["objective_wide"]["shape"]
        yield f"### The objective, N = {n:,}, V = {v:,}, D = {d:,}\n"
        yield table(["", "ms", "ours / it", "extra MiB"], rows)


def rule_table(parts: dict[str, Any]) -> Iterator[str]:
    """What selection and other terms cost."""
    part = parts.get("objective_rules", {})
    if "all_tokens" not in part:
        return
    rows = [
        [name.replace("_", " "), f"{part[name]['ms']:.1f}", f"{ratio:.2f}"]
        for name, ratio in part["ratios"].items()
    ]
    yield "### Rules and terms, scoring included\n"
    yield table(["", "ms", "/ all tokens"], rows)


def kernel_table(parts: dict[str, Any]) -> Iterator[str]:
    """Where the time of one call goes, by kernel."""
    calls = {
        "all tokens, D = 2,560": parts.get("objective_rules", {}).get("kernels_ms", {}),
        "all tokens, D = 1,024": {
            "all_tokens": parts.get("objective_narrow", {}).get("kernels_ms")
        },
    }
    found = {name: ran["all_tokens"] for name, ran in calls.items() if ran.get("all_tokens")}
    few = calls["all tokens, D = 2,560"].get("entropy_10")
    if few:
        found["entropy 10 %, D = 2,560"] = few
    if not found:
        return
    yield "### Where the objective's time goes, ms of kernels, N = 8,192, V = 151,936\n"
    rows = []
    for name, ran in found.items():
        own = {k: ran.get(f"{k}_kernel", 0.0) for k in ("statistics", "gradient", "scale")}
        products = sum(ms for kernel, ms in ran.items() if kernel.startswith("nvjet"))
        rows.append([name, f"{ran['all']:.1f}", f"{products:.1f}", *(f"{own[k]:.1f}" for k in own)])
    yield table(["", "all", "products", "statistics", "gradient", "scaling"], rows)


def learn_table(parts: dict[str, Any]) -> Iterator[str]:
    """Learning alone, by the kind of layers."""
    part, ceiling = parts.get("learn_layers", {}), parts.get("ceilings", {}).get("bf16_tflop_s")
    arms = {name: arm for name, arm in part.items() if isinstance(arm, dict) and "tflop_s" in arm}
    if not arms or not ceiling:
        return
    yield f"### Learning from {part['tokens']:,} tokens, 1.7B from 0.6B, layers checkpointed\n"
    yield (
        "TFLOP/s count 6 for each weight of the layers and token and the objective's products, "
        "not what checkpointing computes again. `layers` is the student's setting.\n"
    )
    rows = [
        [f"`{name}`", f"{arm['learn_s']:.3f}", f"{arm['tflop_s']:.0f}",
         f"{arm['tflop_s'] / ceiling:.2f}", f"{arm['peak_mib'] / 1024:.1f}"]
        for name, arm in arms.items()
    ]  # fmt: skip
    header = ["layers", "s", "TFLOP/s", "of a large bf16 product's rate", "peak GiB"]
    yield table(header, rows)


def embedded_line(parts: dict[str, Any]) -> Iterator[str]:
    """The embedded run on a card."""
    part = parts.get("embedded", {})
    if "is_same" not in part:
        return
    last = part["evaluations"][-1]
    accuracy, low, high = (last[f"mean_at_k{end}"] for end in ("", "_low", "_high"))
    same = "the same bits as" if part["is_same"] else "other bits than"
    yield (
        f"The embedded run (`configs/examples/ledger.toml`) on the card ends at an accuracy of "
        f"{accuracy:.3f} ({low:.3f} to {high:.3f}); stopped and continued it ends with {same} "
        "without a stop.\n"
    )


def error_table(parts: dict[str, Any]) -> Iterator[str]:
    """Distance from float64."""
    part = parts.get("objective_errors", {})
    rows = [
        [name.replace("_", " "), *(f"{part[name][key]:.1e}" for key in ("value", "hidden", "head"))]
        for name in ("ours", "trl", "liger", "materialised")
        if name in part
    ]
    if rows:
        yield "### Relative distance from float64, bfloat16 inputs\n"
        yield table(["", "value", "gradient of hidden states", "gradient of the head"], rows)


def correctness_lines(parts: dict[str, Any]) -> Iterator[str]:
    """What was compared on the card, beside times."""
    lines = []
    if worst := parts.get("objective_correctness", {}).get("worst"):
        found = parts["objective_correctness"]
        lines.append(
            f"Objective, {found['cases']} cases: largest relative distance of a gradient "
            f"{worst['float32']:.1e} in float32 and {worst['bfloat16']:.1e} in bfloat16, of a "
            f"statistic {worst['statistics']:.1e}; {len(found['bad'])} beyond their limits."
        )
    if (same := parts.get("objective_determinism", {}).get("same_bits")) is not None:
        lines.append(f"The same objective twice: {'the same' if same else 'other'} bits.")
    small = [x for x in parts.get("rollout_correctness_small", {}).values() if isinstance(x, dict)]
    if small:
        whole, first = (min(x[n] for x in small) for n in ("same completions", "same first tokens"))
        lines.append(
            f"Rollouts of a small model in float32 against the model's own forward pass, "
            f"{len(small)} ways to sample: at least {100 * whole:.0f} % of the completions are the "
            f"same, and {100 * first:.0f} % of their first tokens."
        )
    large = parts.get("rollout_correctness_large", {})
    if against := large.get("against the own step"):
        ours, own = (large[f"log-prob gaps to float32, {n} step"] for n in ("captured", "own"))
        error = large["step against the model's own"]["largest of the rows"]
        lines.append(
            "Rollouts of 1.7B random weights in bfloat16: "
            f"{100 * against['same completions']:.0f} % of the completions are those of the "
            f"model's own forward pass, and {100 * against['same first tokens']:.0f} % of the "
            f"first tokens, since either rounds in its own way (one step's hidden states differ by "
            f"{100 * error:.1f} %). Log-probabilities of sampled tokens differ from float32's by "
            f"{ours['mean']:.3f} nats (own: {own['mean']:.3f}), at most {ours['largest']:.2f} "
            f"({own['largest']:.2f})."
        )
    if lines:
        yield "### Correctness on this card\n"
        yield "\n".join(f"- {line}" for line in lines) + "\n"


def draw_table(parts: dict[str, Any]) -> Iterator[str]:
    """Rollouts against `generate` and against reading weights and cache once."""
    rows: Table = []
    for name in DRAWS:
        for what, entry in parts.get(name, {}).items():
            if isinstance(entry, dict) and "ms/step" in entry:
                peer = entry.get("generate ms/step")
                rows.append(
                    [
                        f"{name.removeprefix('rollout_')}, {what}",
                        f"{entry['ms/step']:.2f}",
                        f"{entry['tokens/s']:,.0f}",
                        f"{entry['share of the limit']:.2f}",
                        "" if peer is None else f"{peer:.1f}",
                    ]
                )
    if rows:
        yield "### Rollouts, Qwen3-1.7B's architecture, 128 + 256 tokens\n"
        header = ["", "ms a step", "tokens/s", "of the memory's limit", "`generate`, ms a step"]
        yield table(header, rows)
    part = parts.get("rollout_ragged", {})
    if "times generate" in part:
        yield (
            f"Completions that end by chance: {part['tokens/s']:,.0f} tokens/s, "
            f"{part['times generate']:.1f} times `generate`.\n"
        )


def step_table(parts: dict[str, Any]) -> Iterator[str]:
    """Whole steps."""
    rows: Table = []
    for name, label in (
        ("step_ours", "ours, 1.7B from 4B"),
        ("step_ours_offloaded", "ours, 1.7B from 4B, optimizer.offload"),
        ("step_ours_teacher_offloaded", 'ours, 1.7B from 4B, teacher.mode = "offload"'),
        ("step_ours_soft_or", "ours, Soft-OR 50 %"),
        ("step_trl", "TRL, 1.7B from 4B"),
        ("step_ours_small", "ours, 0.6B from 1.7B"),
        ("step_trl_small", "TRL, 0.6B from 1.7B"),
    ):
        part = parts.get(name, {})
        if "step_s" in part:
            phases = ", ".join(
                f"{phase.removesuffix('_s')} {s:.2f}"
                for phase, s in part.get("phases_s", {}).items()
            )
            rows.append(
                [label, f"{part['first_step_s']:.1f}", f"{part['step_s']:.2f}", phases,
                 f"{part['tokens_per_s']:,.0f}", f"{part['peak_mib'] / 1024:.1f}"]
            )  # fmt: skip
    ours, theirs = (parts.get(f"step_{who}", {}).get("tokens_per_s") for who in ("ours", "trl"))
    if rows:
        yield "### Whole steps, 64 completions of 256 tokens\n"
        header = ["", "first step, s", "a step, s", "phases, s", "tokens/s", "peak GiB"]
        yield table(header, rows)
    if ours and theirs:
        yield (
            f"Ours takes {theirs / ours:.2f} of TRL's seconds a token. TRL trains float32 weights "
            "under bfloat16 autocast with a bfloat16 teacher and checkpointed layers.\n"
        )
    part = parts.get("first_step", {})
    if "first_step_s" in part:
        yield (
            "The first step of a process that has compiled nothing before, 1.7B from 4B, takes "
            f"{part['first_step_s']:.1f} s, with loading {part['with_loading_s']:.1f} s; the "
            f"second {part['second_step_s']:.1f} s.\n"
        )
    yield from checkpoint_line(parts.get("checkpoints", {}))


def checkpoint_line(part: dict[str, Any]) -> Iterator[str]:
    """How long training waits for checkpoints."""
    if "copy_s" in part:
        copies, waits = (_seconds(part[key]) for key in ("copy_s", "wait_s"))
        yield (
            f"Checkpoints of {part['checkpoint_gb']:.1f} GB, one every {part['every']} steps of "
            f"{part['step_s']:.1f} s: training waits {copies} s for the copy, the first time while "
            f"memory is pinned, and {waits} s for the checkpoint before to be written.\n"
        )
    elif "pause_s" in part:
        yield (
            f"Checkpoints of {part['checkpoint_gb']:.1f} GB, one after every step of "
            f"{min(part['step_s']):.0f} s or less: training waits {_seconds(part['pause_s'])} s, "
            "the first time for memory that is pinned, later for the checkpoint before it, which "
            "is still written.\n"
        )


def _seconds(found: Sequence[float]) -> str:
    return ", ".join(f"{s:.1f}" for s in found)


def recipe_table(parts: dict[str, Any]) -> Iterator[str]:
    """Recipes at full size: the plan beside what a card held."""
    rows: Table = []
    for name, part in parts.items():
        if name.startswith("recipe_") and "phases" in part:
            peaks = ", ".join(
                f"{phase} {both['planned_mib'] / 1024:.1f} / {both['measured_mib'] / 1024:.1f}"
                for phase, both in part["phases"].items()
            )
            limit = part["limit_mib"]
            rows.append(
                [f"`{name.removeprefix('recipe_')}`", f"{part['planned_mib'] / 1024:.1f}",
                 f"{part['measured_mib'] / 1024:.1f}", f"{part['ratio']:.2f}", peaks,
                 f"{limit / 1024:.0f}" if limit else ""]
            )  # fmt: skip
    if rows:
        yield "### Recipes at full size, memory planned and measured\n"
        yield (
            "Random weights of the recipe's architectures, sampled by the student itself: a few "
            "tokens at full width, then a teacher forward over a micro-batch of the longest "
            "completions, which are scored and trained on. GiB of tensors at the peak; the "
            "driver's context and what the allocator holds beyond tensors come on top.\n"
        )
        header = ["", "planned", "measured", "planned / measured", "phases", "limit"]
        yield table(header, rows)


def tip_table(parts: dict[str, Any]) -> Iterator[str]:
    """Peak memory against the share of tokens that are trained on."""
    part = parts.get("tip_memory", {})
    if "ours" not in part:
        return
    rows: Table = []
    for share in part["ours"]:
        row = [f"{share} %"]
        for way in ("ours", "materialised"):
            whole, here = part[way]["100"], part[way][share]
            row += [_gib(here), _change(here, whole)]
        rows.append(row)
    yield "### Memory against the share of tokens, Qwen3-1.7B from Qwen3-4B\n"
    yield (
        f"Peak of one pass over {part['rows']:,} completion tokens, forward and backward, with "
        f"both models on the card ({part['weights_mib'] / 1024:.1f} GiB of weights), checkpointed "
        "layers and no optimizer. Materialised: bfloat16 logits of all positions of both models, "
        "a mask that gathers the kept rows, float32 log-softmax of these, `kl_div` in autograd. "
        "TIP (arXiv 2604.14084) reports 72.0 GB with all tokens and 38.1 GB at 50 %, -47 %, for "
        "its own training of Qwen3-4B from Qwen3-8B: the paper's figures, not ours.\n"
    )
    header = ["tokens", "ours, GiB", "to all", "materialised, GiB", "to all"]
    yield table(header, rows)


def _gib(entry: dict[str, Any]) -> str:
    return str(entry["failed"]) if "failed" in entry else f"{entry['allocated_mib'] / 1024:.1f}"


def _change(entry: dict[str, Any], whole: dict[str, Any]) -> str:
    if "failed" in entry or "failed" in whole:
        return ""
    return f"{100 * (entry['allocated_mib'] / whole['allocated_mib'] - 1):+.0f} %"


def failure_lines(parts: dict[str, Any]) -> Iterator[str]:
    """Parts without a result, and why."""
    failed = {name: part for name, part in parts.items() if "failed" in part}
    if failed:
        yield "### Parts without a result\n"
        for name, part in failed.items():
            yield f"- `{name}`: {part['failed']}; last lines: {'; '.join(part['output'][-2:])}"
        yield ""


SECTIONS = (
    *(shape_tables, rule_table, kernel_table, error_table, correctness_lines, draw_table),
    *(step_table, learn_table, tip_table, recipe_table, embedded_line),
)


def gpu(results: Path) -> Iterator[str]:
    """The section; nothing where no device was measured."""
    files = sorted(results.glob("gpu-*.json"))
    for number, file in enumerate(files):
        record = json.loads(file.read_text(encoding="utf-8"))
        parts = record["parts"]
        yield INTRO if number == 0 else ""
        yield where(record)
        for section in SECTIONS:
            yield from section(parts)
        yield from failure_lines(parts)
