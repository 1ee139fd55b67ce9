"""Synthetic run folders: what a finished run leaves, made from a seed and nothing else."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opened import BENIGN, Opened
from token_lines import token_lines

from patience import HANG_S
from tutelage.report.run_page import write_report

Json = dict[str, Any]
MakeRun = Callable[..., Path]

NUM_PROBLEMS, NUM_SAMPLES = 40, 8


def metrics_lines(num_steps: int, rng: random.Random, keep: float = 0.1) -> list[Json]:
    return [_metrics_line(step, math.exp(-step / 8), rng, keep) for step in range(num_steps)]


def _metrics_line(step: int, decay: float, rng: random.Random, keep: float) -> Json:
    num_rows = rng.randint(1100, 1250)
    reverse_kl = 0.04 + 0.6 * decay + rng.gauss(0, 0.01)
    return {
        "step": step,
        "loss": reverse_kl / keep * 0.6,
        "num_rows": num_rows,
        "num_kept": int(num_rows * keep),
        "reverse_kl_nats": reverse_kl,
        "forward_kl_nats": 1.3 * reverse_kl,
        "entropy_nats": 0.55 + 0.3 * (1 - decay) + rng.gauss(0, 0.01),
        "teacher_entropy_nats": 0.9 + rng.gauss(0, 0.01),
        "grad_norm": 2 * decay + 0.3,
        "learning_rate": 1e-3 * (1 + math.cos(math.pi * step / 24)) / 2,
        "completion_length_mean": 37 + rng.gauss(0, 0.2),
        "truncated_share": 0.02 * decay,
        "quadrants": {
            "q1": {"share": 0.014 + 0.02 * decay, "kl_mass": 0.21, "kept_share": 0.31},
            "q2": {"share": 0.152, "kl_mass": 0.08, "kept_share": 0.12},
            "q3": {"share": 0.017 + 0.02 * decay, "kl_mass": 0.59 * decay, "kept_share": 0.94},
            "q4": {"share": 0.81 - 0.04 * decay, "kl_mass": 0.12, "kept_share": 0.02},
        },
        "seconds": {
            "rollout_s": 0.61 + rng.random() / 20,
            "teacher_s": 0.12 + rng.random() / 50,
            "score_s": 0.05 + rng.random() / 50,
            "learn_s": 0.33 + rng.random() / 30,
        },
        "peak_rss_bytes": {"rollout": (900 + step) << 20, "learn": (1000 + step) << 20},
        "high_entropy": {
            "teacher_share": 0.2,
            "student_share": 0.1 + 0.05 * decay,
            "reverse_kl_nats": 0.3 * decay,
            "forward_kl_nats": 0.4 * decay,
        },
    }


def evaluation_lines(num_steps: int) -> list[Json]:
    def line(step: int, model: str, mean: float, rate: float, kl: float | None) -> Json:
        return {
            "step": step,
            "model": model,
            "mean_at_k": mean,
            "mean_at_k_low": max(0.0, mean - 0.06),
            "mean_at_k_high": min(1.0, mean + 0.05),
            "pass_at_k": rate,
            "pass_at_k_low": max(0.0, rate - 0.08),
            "pass_at_k_high": min(1.0, rate + 0.07),
            "k": NUM_SAMPLES,
            "num_problems": NUM_PROBLEMS,
            "num_samples": NUM_SAMPLES,
            "held_out_reverse_kl_nats": kl,
        }

    middle = num_steps // 2
    return [
        line(0, "student", 0.262, 0.54, 0.71),
        line(middle, "student", 0.655, 0.89, 0.22),
        line(num_steps, "student", 0.851, 0.97, 0.062),
        line(0, "teacher", 0.963, 1.0, None),
    ]


def sample_lines(num_steps: int, rng: random.Random) -> list[Json]:
    def line(step: int, index: int, is_correct: bool | None) -> Json:
        digits = [rng.randint(0, 9) for _ in range(10)]
        prompt = (
            "".join(
                f"{name}{a}+{b};" for name, a, b in zip("ejnmb", digits, digits[5:], strict=False)
            )
            + ">"
        )
        completion = "".join(
            f"{name}:{(a * 7 + step) % 10};" for name, a in zip("ejnmb", digits, strict=False)
        )
        return {
            "step": step,
            "prompt_id": f"ledger-{index}",
            "prompt": prompt,
            "completion": f"{completion}#{digits[3]}$",
            "is_correct": is_correct,
        }

    return [line(0, i, i == 2) for i in range(5)] + [
        line(num_steps, i, None if i == 4 else i != 3) for i in range(5)
    ]


def verdict_lines(num_steps: int, rng: random.Random) -> list[Json]:
    return [
        {
            "step": step,
            "model": "student",
            "prompt_id": f"ledger-{problem}",
            "sample": sample,
            "is_correct": rng.random() < accuracy,
        }
        for step, accuracy in ((0, 0.26), (num_steps, 0.85))
        for problem in range(NUM_PROBLEMS)
        for sample in range(NUM_SAMPLES)
    ]


def manifest_of(keep: float = 0.1, seed: int = 0) -> Json:
    return {
        "version": "0.1.0",
        "commit": "0123abcd",
        "fingerprint": "9f86d081884c7d65",
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "hardware": {"cpu": "2 cores", "accelerator": None},
        "config": {
            "student": "overconfident",
            "teacher": {"kind": "ledger", "path": "assets/teacher"},
            "selection": {"rule": "soft_or", "keep": keep},
            "objective": {"estimator": "exact", "alpha": 0.0},
            "quadrant_thresholds": "median",
            "num_steps": 24,
            "seed": seed,
            "stop": ["$", "\n"],
            "max_grad_norm": None,
        },
    }


def write_jsonl(path: Path, lines: list[Json]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make a run folder; `drop` names files to leave out."""

    def make(
        name: str = "run",
        *,
        num_steps: int = 24,
        seed: int = 0,
        keep: float = 0.1,
        drop: tuple[str, ...] = (),
    ) -> Path:
        rng, folder = random.Random(seed), tmp_path / name
        folder.mkdir(parents=True)
        content = {
            "metrics.jsonl": metrics_lines(num_steps, rng, keep),
            "evaluation.jsonl": evaluation_lines(num_steps),
            "samples.jsonl": sample_lines(num_steps, rng),
            "evaluation_rows.jsonl": verdict_lines(num_steps, rng),
        }
        for file_name, lines in content.items():
            if file_name not in drop:
                write_jsonl(folder / file_name, lines)
        if "manifest.json" not in drop:
            (folder / "manifest.json").write_text(json.dumps(manifest_of(keep, seed)))
        return folder

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; tests that use it are skipped where it or its driver is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium to open pages in")
    with api.sync_playwright() as playwright:
        # tests may run as root in a container, where chromium's own sandbox cannot start
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def show(browser: Any, make_run: MakeRun) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def opened(texts: list[str] = BENIGN, **options: Any) -> Opened:
        run = make_run(f"run{len(contexts)}", num_steps=3)
        lines = token_lines(texts)
        (run / "tokens.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["config"] |= {"quadrant_thresholds": [0.5, 0.5], "objective": {"kind": "eopd"}}
        (run / "manifest.json").write_text(json.dumps(manifest))
        context = browser.new_context(**options)
        context.set_default_timeout(1000 * HANG_S)
        contexts.append(context)
        page = Opened(context.new_page(), lines)
        page.page.goto(write_report(run).as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
