"""Whole steps on one CUDA device: ours, TRL's, checkpoints, and the embedded run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import gpu_card
from distillation_settings import trl_settings
from gpu_card import MIB
from gpu_models import save_prompts, save_qwen3, scratch

LEARNING_RATE = 1e-6
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, NUM_STEPS = 64, 128, 256, 3
CHECKPOINT_EVERY = 20
"""Steps between checkpoints: more time than one takes to be written."""


def ceilings() -> dict[str, Any]:
    """What the card reaches: a large copy (bytes read and written), a large bf16 product."""
    found = {
        "copy_tb_s": 2 * 4 * (1 << 30) / _copy_ms(1 << 30) / 1e9,
        "bf16_tflop_s": 2 * 8192**3 / _product_ms(8192) / 1e9,
    }
    print(f"copy {found['copy_tb_s']:.2f} TB/s, bf16 {found['bf16_tflop_s']:.0f} TFLOP/s")
    return found


def _copy_ms(count: int) -> float:
    source = torch.empty(count, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return _milliseconds(lambda: target.copy_(source), 10)


def _product_ms(size: int) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return _milliseconds(lambda: a @ b, 10)


def _milliseconds(run: Callable[[], object], times: int) -> float:
    new_event: Any = torch.cuda.Event
    seconds: list[float] = []
    for number in range(times + 2):
        start, end = (new_event(enable_timing=True) for _ in "se")
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if number >= 2:
            seconds.append(start.elapsed_time(end))
    return statistics.median(seconds)


@contextlib.contextmanager
def _pair(student: str, teacher: str) -> Iterator[Path]:
    """A folder with `student`, `teacher` and `prompts.jsonl`."""
    with scratch() as name:
        folder = Path(name)
        save_qwen3(student, folder / "student", seed=1)
        save_qwen3(teacher, folder / "teacher", seed=2)
        save_prompts(folder / "prompts.jsonl", PROMPTS * (NUM_STEPS + 2), PROMPT_TOKENS)
        yield folder


def configuration(folder: Path, **changes: Any) -> dict[str, Any]:
    table: dict[str, Any] = {
        "out": str(folder / "run"),
        "student": {
            "model": str(folder / "student"),
            "dtype": "bfloat16",
            "activation_checkpointing": True,
        },
        "teacher": {"model": str(folder / "teacher"), "dtype": "bfloat16"},
        "data": {
            "kind": "file",
            "path": str(folder / "prompts.jsonl"),
            "chat": False,
            "num_held_out": 0,
        },
        "sampling": {"max_new_tokens": NEW_TOKENS},
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
        "evaluation": {"num_problems": 0},
        "num_steps": NUM_STEPS + 1,  # ended before the last, which would write a checkpoint
        "prompts_per_step": PROMPTS,
        "micro_batch_size": 64,
        "micro_batch_tokens": 16_384,
        "sampling_batch_size": 64,
        "checkpoint_every": 0,
        "device": gpu_card.DEVICE,
    }
    for key, value in changes.items():
        table[key] = {**table[key], **value} if isinstance(value, dict) and key in table else value
    return table


class _EnoughStepsError(Exception):
    """Ends a run early."""


def _train(table: dict[str, Any], last_step: int = NUM_STEPS) -> list[dict[str, Any]]:
    """The metrics of every step up to `last_step`, with the seconds between them."""
    from tutelage.config.parse import parse_config
    from tutelage.config.schema import Config
    from tutelage.train.loop import train

    config: Config = parse_config(table)
    steps: list[dict[str, Any]] = []
    last = time.perf_counter()

    def on_step(metrics: dict[str, Any]) -> None:
        nonlocal last
        gpu_card.synchronize()
        now = time.perf_counter()
        steps.append({**metrics, "step_s": now - last})
        last = now
        print(f"step {metrics['step']}: {steps[-1]['step_s']:.2f} s, {metrics['seconds']}")

        if len(steps) == last_step:
            raise _EnoughStepsError

    gpu_card.reset_peak()
    with contextlib.suppress(_EnoughStepsError):
        train(config, log=print, on_step=on_step)
    return steps


def _described(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """First step, and the medians of the others."""
    later = steps[1:]
    seconds = statistics.median(step["step_s"] for step in later)
    tokens = statistics.median(step["num_rows"] for step in later)
    names = later[-1]["seconds"]
    return {
        "first_step_s": steps[0]["step_s"],
        "step_s": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "phases_s": {n: statistics.median(s["seconds"].get(n, 0.0) for s in later) for n in names},
        "peak_mib": max(max(gpu_card.phases_of(s).values()) for s in steps) / MIB,
        "phases_peak_mib": {n: b / MIB for n, b in gpu_card.phases_of(later[-1]).items()},
        "loss": [step["loss"] for step in steps],
    }


def _ours(student: str, teacher: str, /, **changes: Any) -> dict[str, Any]:
    with _pair(student, teacher) as folder:
        return _described(_train(configuration(folder, **changes)))


def step_ours() -> dict[str, Any]:
    """1.7B ← 4B, every token."""
    return _ours("1.7B", "4B")


def step_ours_offloaded() -> dict[str, Any]:
    """The same with float32 weights, sums of gradients and moments in main memory."""
    return _ours("1.7B", "4B", optimizer={"offload": True})


def step_ours_teacher_offloaded() -> dict[str, Any]:
    """1.7B ← 4B, every token; the teacher is on the card only while it reads."""
    return _ours("1.7B", "4B", teacher={"mode": "offload"})


def step_ours_soft_or() -> dict[str, Any]:
    """1.7B ← 4B, Soft-OR 50 %."""
    return _ours("1.7B", "4B", selection={"rule": "soft_or", "keep": 0.5})


def step_ours_small() -> dict[str, Any]:
    """0.6B ← 1.7B, every token."""
    return _ours("0.6B", "1.7B")


def _trl(student: str, teacher: str) -> dict[str, Any]:
    """TRL's trainer: float32 student under bf16 autocast, bf16 teacher, checkpointing."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationTrainer

    steps: list[dict[str, float]] = []

    class Recorder(TrainerCallback):  # type: ignore[misc]
        """Times whole steps."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """Before prompts are fetched and completed."""
            gpu_card.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """After the update."""
            gpu_card.synchronize()
            steps.append({"step_s": time.perf_counter() - self.start})
            print(f"TRL step: {steps[-1]['step_s']:.2f} s")

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            """TRL logs the mean length of the step's completions."""
            if "completions/mean_length" in logs:
                steps[-1] |= {
                    "tokens": logs["completions/mean_length"] * PROMPTS,
                    "loss": float(logs["loss"]),
                }

    with _pair(student, teacher) as folder:
        load = AutoModelForCausalLM.from_pretrained
        settings = trl_settings(
            output_dir=str(folder / "trl"),
            max_steps=NUM_STEPS,
            per_device_train_batch_size=PROMPTS,
            gradient_checkpointing=True,
            max_completion_length=NEW_TOKENS,
            learning_rate=LEARNING_RATE,
            bf16=True,
        )
        texts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").open()]
        gpu_card.reset_peak()
        trainer = DistillationTrainer(
            model=load(folder / "student", dtype=torch.float32),
            teacher_model=load(folder / "teacher", dtype=torch.bfloat16),
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=AutoTokenizer.from_pretrained(folder / "student"),
            callbacks=[Recorder()],
        )
        trainer.train()
    later = steps[1:]
    seconds = statistics.median(step["step_s"] for step in later)
    tokens = statistics.median(step["tokens"] for step in later)
    return {
        "first_step_s": steps[0]["step_s"],
        "step_s": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "peak_mib": gpu_card.peak_bytes() / MIB,
        "loss": [step.get("loss") for step in steps],
    }


def step_trl() -> dict[str, Any]:
    """TRL, 1.7B ← 4B."""
    return _trl("1.7B", "4B")


def step_trl_small() -> dict[str, Any]:
    """TRL, 0.6B ← 1.7B."""
    return _trl("0.6B", "1.7B")


def first_step() -> dict[str, Any]:
    """1.7B ← 4B, as `step_ours`: the first step of a process that has compiled nothing before."""
    with scratch() as cache, _pair("1.7B", "4B") as folder:
        os.environ["TRITON_CACHE_DIR"] = cache
        steps = _train(configuration(folder), last_step=2)
    first = steps[0]["seconds"]
    return {
        "first_step_s": sum(first.values()),
        "phases_s": first,
        "with_loading_s": steps[0]["step_s"],
        "second_step_s": steps[1]["step_s"],
    }


def checkpoints() -> dict[str, Any]:
    """What checkpoints of a 1.7B student with its moments cost, every 20 steps: wait and copy."""
    from tutelage.train.checkpoint_thread import CheckpointThread

    thread: Any = CheckpointThread
    save, wait = thread.save, thread.wait
    pauses: list[dict[str, float]] = []
    waited = [0.0]

    def timed_wait(self: Any) -> None:
        start = time.perf_counter()
        wait(self)
        waited[0] = time.perf_counter() - start

    def timed_save(self: Any, step: int, *rest: Any) -> None:
        gpu_card.synchronize()
        start = time.perf_counter()
        save(self, step, *rest)  # waits for the one before, then copies
        pause = time.perf_counter() - start
        pauses.append({"step": step, "wait_s": waited[0], "copy_s": pause - waited[0]})
        print(f"checkpoint: {pauses[-1]}")

    with (
        mock.patch.object(thread, "wait", timed_wait),
        mock.patch.object(thread, "save", timed_save),
        _pair("1.7B", "0.6B") as folder,
    ):
        table = configuration(
            folder,
            sampling={"max_new_tokens": 16},
            checkpoint_every=CHECKPOINT_EVERY,
            checkpoint_writer="thread",
            keep_checkpoints=1,
            num_steps=3 * CHECKPOINT_EVERY + 2,  # ended one earlier, before a last checkpoint
        )
        started = time.perf_counter()
        steps = _train(table, last_step=3 * CHECKPOINT_EVERY + 1)
        ended = time.perf_counter()
        saved = sum(p.stat().st_size for p in (folder / "run").glob("checkpoint-*/**/*.*"))
    return {
        "every": CHECKPOINT_EVERY,
        "wait_s": [pause["wait_s"] for pause in pauses],
        "copy_s": [pause["copy_s"] for pause in pauses],
        "checkpoint_gb": saved / 1e9,
        "whole_run_s": ended - started,
        "step_s": statistics.median(step["step_s"] for step in steps[1:]),
    }


def embedded() -> dict[str, Any]:
    """The ledger run on CUDA: accuracy, and whether a stopped run ends bit for bit the same."""
    from tutelage.config.parse import load_config

    root = Path(__file__).resolve().parents[2]
    with scratch() as name:
        folder = Path(name)
        config = load_config(root / "configs" / "examples" / "ledger.toml", [])
        hashes = {}
        for arm, steps in (("whole", None), ("stopped", 20)):
            out = str(folder / arm)
            whole = dataclasses.replace(config, device=gpu_card.DEVICE, out=out)
            _embedded_run(whole, steps)
            weights = folder / arm / "student" / "model.safetensors"
            hashes[arm] = _digest(weights)
        lines = (folder / "whole" / "evaluation.jsonl").read_text().splitlines()
        summaries = [json.loads(line) for line in lines]
    return {"is_same": hashes["whole"] == hashes["stopped"], "evaluations": summaries}


def _embedded_run(config: Any, stop_after: int | None) -> None:
    from tutelage.train.loop import train

    if stop_after is not None:

        def on_step(metrics: dict[str, Any]) -> None:
            if metrics["step"] == stop_after:
                raise _EnoughStepsError

        early = dataclasses.replace(config, checkpoint_every=10)
        with contextlib.suppress(_EnoughStepsError):
            train(early, log=lambda _: None, on_step=on_step)
        train(early, log=lambda _: None)
        return
    train(dataclasses.replace(config, checkpoint_every=10), log=lambda _: None)


def _digest(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "ceilings": ceilings,
    "step_ours": step_ours,
    "step_ours_offloaded": step_ours_offloaded,
    "step_ours_teacher_offloaded": step_ours_teacher_offloaded,
    "step_trl": step_trl,
    "first_step": first_step,
    "step_ours_soft_or": step_ours_soft_or,
    "step_ours_small": step_ours_small,
    "step_trl_small": step_trl_small,
    "checkpoints": checkpoints,
    "embedded": embedded,
}
LIMITS = {"step_trl": 150.0}
"""Seconds of parts that need them, whatever limit is given: TRL's first step alone takes 34 s."""
