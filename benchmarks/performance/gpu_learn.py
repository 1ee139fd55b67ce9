"""Reading and learning on one CUDA device: padded or packed rows, by two kinds of layers.

Both sides of a ratio learn from the same completions in one part, on one device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import gpu_card
import gpu_models
from gpu_models import save_prompts, save_qwen3, scratch
from gpu_step import configuration
from tutelage.data.types import Prompt, Rollout

SEQUENCES, PROMPT_TOKENS, NEW_TOKENS, NUM_STEPS = 64, 128, 128, 4
"""Completions of a step; 16,384 tokens where all are of full length."""
LONGEST = 8
"""The longest of ragged completions is so many times their mean length."""
PHASES = ("teacher_s", "learn_s")


def learn_rows() -> dict[str, Any]:
    """1.7B ← 0.6B from completions of geometric lengths, in padded rectangles and packed rows."""
    rollouts = _rollouts(_ragged_lengths())
    with scratch() as name:
        folder = _models(Path(name))
        arms = {way: _arm(folder, rollouts, micro_batches=way) for way in ("padded", "packed")}
    return {"tokens": sum(map(_length, rollouts)), **arms}


def learn_layers() -> dict[str, Any]:
    """1.7B ← 0.6B from 16,384 tokens in equal lengths, by the layers of both, and packed."""
    rollouts = _rollouts([NEW_TOKENS] * SEQUENCES)
    with scratch() as name:
        folder = _models(Path(name))
        arms = {
            way: _arm(folder, rollouts, student={"layers": way})
            for way in ("transformers", "liger")
        }
        arms["liger, packed"] = _arm(
            folder, rollouts, student={"layers": "liger"}, micro_batches="packed"
        )
    tokens = sum(map(_length, rollouts))
    for arm in arms.values():
        # Weights of the layers, and the objective's products with both heads; what checkpointing
        # computes again is no work.
        num_flop = 6 * 1.41e9 * tokens
        num_flop += 2 * arm["rows"] * gpu_models.VOCABULARY * (3 * 2048 + 1024)
        arm["tflop_s"] = num_flop / arm["learn_s"] / 1e12
    return {"tokens": tokens, **arms}


def _models(folder: Path) -> Path:
    save_qwen3("1.7B", folder / "student", seed=1)
    save_qwen3("0.6B", folder / "teacher", seed=2)
    save_prompts(folder / "prompts.jsonl", SEQUENCES, PROMPT_TOKENS)
    return folder


def _ragged_lengths() -> list[int]:
    """Lengths of a mean of an eighth of the longest, of which there is one."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(SEQUENCES, generator=generator, dtype=torch.float64)
    lengths = (-NEW_TOKENS * uniform.log()).long() + 1
    found: list[int] = lengths.clamp(max=LONGEST * NEW_TOKENS).tolist()
    return [LONGEST * NEW_TOKENS, *found[1:]]


def _rollouts(lengths: Sequence[int]) -> list[Rollout]:
    """Completions of random ids, of these lengths."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i, length in enumerate(lengths):
        size = (PROMPT_TOKENS + length,)
        ids = torch.randint(3, gpu_models.VOCABULARY, size, generator=generator).tolist()
        prompt, written = tuple(ids[:PROMPT_TOKENS]), tuple(ids[PROMPT_TOKENS:])
        found.append(Rollout(Prompt(str(i), ""), 0, prompt, written, True, (-12.0,) * length))
    return found


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def _arm(folder: Path, rollouts: Sequence[Rollout], **changes: Any) -> dict[str, Any]:
    """Seconds of the phases (medians from the second step on), loss, and tokens that were read."""
    from tutelage.config.parse import parse_config
    from tutelage.models.optimizer import make_optimizer
    from tutelage.setup.components import build_components
    from tutelage.setup.numerics import open_accelerator
    from tutelage.train.step import Step

    config = parse_config(configuration(folder, prompts_per_step=SEQUENCES, **changes))
    gpu_card.reset_peak()
    components = build_components(config)
    accelerator = open_accelerator(config, folder, components.device)
    optimizer = make_optimizer("adamw", components.masters.masters, 1e-6, (0.9, 0.95), 0.0)
    components.masters.register_hook(optimizer)
    step = Step(config, components, accelerator, components.student, optimizer)
    drawn = list(rollouts)
    with mock.patch.object(step, "generate", return_value=drawn):
        metrics = [step.take(number) for number in range(1, NUM_STEPS + 1)]
        kernels = gpu_card.kernel_milliseconds(partial(step.take, NUM_STEPS + 1))
        batches = [micro_batch.batch for micro_batch in step.pack(drawn)]
    accelerator.end_training()
    found = {
        **{p: statistics.median(m["seconds"].get(p, 0.0) for m in metrics[1:]) for p in PHASES},
        "loss": [m["loss"] for m in metrics],
        "rows": metrics[0]["num_rows"],
        "micro_batches": len(batches),
        "tokens_with_padding": sum(batch.input_ids.numel() for batch in batches),
        "peak_mib": gpu_card.peak_bytes() / gpu_card.MIB,
        "kernels_ms": kernels,
    }
    print(changes, found, flush=True)
    del step, optimizer, components, batches
    gpu_card.empty_cache()
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "learn_rows": learn_rows,
    "learn_layers": learn_layers,
}
