"""Short runs of tiny models, and what is compared of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny import MEASURED, tiny_config
from tutelage.data.batch import Batch, collate
from tutelage.train.loop import train

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.2}


def weights_of(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def run(models: Path, out: Path, **changes: Any) -> dict[str, Tensor]:
    """The student's weights after a tiny run."""
    for who in ("student", "teacher"):
        changes[who] = {"model": str(models / who)} | changes.get(who, {})
    train(tiny_config(models, out, **changes), log=lambda _: None)
    return weights_of(out / "student")


def metrics_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def are_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def some_batch(components: Any) -> Batch:
    from invariance.stepping import ragged_rollouts

    return collate(ragged_rollouts(components), 0)
