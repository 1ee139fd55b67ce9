"""The three large numbers of a run's page, against the same numbers computed another way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tutelage.report.headline import headlines, held_out_kl, paired_change
from tutelage.report.records import read_run
from tutelage.report.run_page import write_report

MakeRun = Callable[..., Path]
T_39 = 2.0226909  # 97.5 % point of Student's t with 39 degrees of freedom, from a table
COUNTS = ("num_tokens", "num_rows")


def measured(run: Path, seed: int, counted_as: str) -> dict[int, np.ndarray[Any, Any]]:
    """Replace the run's verdicts: [problems, samples, (correct, KL sum, tokens)] by step.

    The problems differ in length and in KL a token, so that a mean of ratios is not the ratio.
    """
    rng = np.random.default_rng(seed)
    found, lines, evaluations = {}, [], []
    for step, accuracy, nats in ((0, 0.3, 0.7), (24, 0.8, 0.05)):
        tokens = rng.integers(1, 60, (40, 8))
        sums = tokens * nats * rng.gamma(2, size=(40, 1)) * rng.gamma(4, size=(40, 8))
        correct = rng.random((40, 8)) < accuracy * rng.random((40, 1)) ** 0.3
        found[step] = np.stack([correct, sums, tokens], axis=-1)
        for i, j in np.ndindex(40, 8):
            counts = {"num_tokens": int(tokens[i, j]), "num_rows": int(tokens[i, j])}
            if counted_as == "num_rows":  # a conversation: tokens of the environment have no KL
                counts["num_tokens"] += 100
            else:
                del counts["num_rows"]
            lines.append({
                "step": step, "model": "student", "prompt_id": str(i), "sample": int(j), **counts,
                "is_correct": bool(correct[i, j]), "reverse_kl_nats": float(sums[i, j]),
            })  # fmt: skip
        mean = float(correct.mean())
        evaluations.append({
            "step": step, "model": "student", "num_problems": 40, "num_samples": 8, "k": 8,
            "mean_at_k": mean, "mean_at_k_low": mean - 0.0711, "mean_at_k_high": mean + 0.0333,
            "held_out_reverse_kl_nats": float(sums.sum() / tokens.sum()),
        })  # fmt: skip
    lines += [line | {"model": "teacher", "is_correct": True, "reverse_kl_nats": 99.0}
              for line in lines]  # fmt: skip
    for name, content in (("evaluation_rows.jsonl", lines), ("evaluation.jsonl", evaluations)):
        (run / name).write_text("".join(f"{json.dumps(line)}\n" for line in content))
    return found


@pytest.mark.parametrize("counted_as", COUNTS)
def test_the_three_large_numbers_are_those_of_the_files(make_run: MakeRun, counted_as: str) -> None:
    run = make_run()
    seen = measured(run, 3, counted_as)
    record = read_run(run)
    accuracy, change, kl = headlines(record)

    mean = 100 * seen[24][..., 0].mean()
    assert accuracy.label == "mean@8 after step 24"
    assert accuracy.value == f"{mean:.1f} %"
    assert accuracy.interval == f"{mean - 7.11:.1f} to {mean + 3.33:.1f} %"
    assert accuracy.note == f"before {100 * seen[0][..., 0].mean():.1f} %"

    # Agresti and Min: the differences with +m, -m (half a problem each) and 0 added, by weights
    shift = seen[24][..., 0].mean(axis=1) - seen[0][..., 0].mean(axis=1)
    most = np.abs(shift).max()
    values, weights = np.append(shift, [most, -most, 0]), np.append(np.ones(40), [0.5, 0.5, 1])
    center = np.average(values, weights=weights)
    spread = np.average((values - center) ** 2, weights=weights)
    half = T_39 * math.sqrt(spread / weights.sum())
    assert change.value == f"{100 * shift.mean():+.1f} points"
    assert change.interval == f"{100 * (center - half):+.1f} to {100 * (center + half):+.1f}"
    found = paired_change(record)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((center - half, center + half), rel=1e-6)

    # the ratio's variance by the covariances of sums and tokens (Cochran, Sampling Techniques)
    sums, tokens = seen[24][..., 1].sum(axis=1), seen[24][..., 2].sum(axis=1)
    ratio = sums.sum() / tokens.sum()
    cov = np.cov(sums, tokens)
    variance = cov[0, 0] - 2 * ratio * cov[0, 1] + ratio**2 * cov[1, 1]
    half = T_39 * math.sqrt(variance / 40) / tokens.mean()
    shown = held_out_kl(record, 24)
    assert shown is not None
    assert shown.value == pytest.approx(ratio, rel=1e-9)
    assert (shown.low, shown.high) == pytest.approx((ratio - half, ratio + half), rel=1e-6)
    assert float(kl.value) == pytest.approx(ratio, rel=5e-3)
    ends = [float(end) for end in kl.interval.split(" to ")]
    assert ends == pytest.approx([ratio - half, ratio + half], rel=5e-3)
    assert abs(ratio - (sums / tokens).mean()) > half / 10  # the test tells them apart

    page = write_report(run).read_text("utf-8")
    for headline in (accuracy, change, kl):
        assert f"<b>{headline.value}</b>" in page
        assert f"95 %: {headline.interval}</span>" in page
