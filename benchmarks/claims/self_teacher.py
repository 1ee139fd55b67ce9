"""Self-distillation with the answer in the teacher's context, on the embedded task: what is gained?

    python benchmarks/claims/self_teacher.py --out runs/self_teacher

Two starts; the teacher has the start's weights, frozen, and the answer before the prompt:

- `as_shipped`: the embedded student, whose training had no answer before any prompt.
- `trained_on_answers`: the same after supervised steps on two kinds of text: prompts alone with its
  own completions, and prompts behind their answers with right ones. Its completions are as before
  without an answer and better behind one, as a large language model's are.

Accuracy is that of the run's own evaluations, of prompts without answers. The interval is a
t-interval over seeds of the gain from the first to the last step. Runs are kept by the version of
the code; the same command continues them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from claims_design import source
from claims_statistics import mean_interval
from tutelage.config.parse import parse_config
from tutelage.config.sampling import SamplingConfig
from tutelage.core import LazyLogits
from tutelage.data.batch import collate
from tutelage.data.tasks.ledger import LedgerTask, solve
from tutelage.data.types import Rollout
from tutelage.files.atomic import write_atomically
from tutelage.models.head import head, hidden_rows
from tutelage.models.load import load_model, load_tokenizer, save_model
from tutelage.models.privileged import PrivilegedReading
from tutelage.models.tokenizers import encode_completion
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.run_folder import environment
from tutelage.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "self-teacher.json"
STUDENT = "package:tutelage/assets/ledger-overconfident"
CONTEXT = "#{answer};"
NUM_PROMPTS, SIZE, RATE = 1024, 32, 2e-3
"""Prompts, sequences of a step and peak learning rate of the supervised steps."""
_PREPARATION = 77
"""Seed of their prompts and completions, which no run shares."""


def prepare(folder: Path, num_steps: int) -> Path:
    """The student with supervised steps on answers; kept in `folder`."""
    if (folder / "config.json").exists():
        return folder
    model, tokenizer = load_model(STUDENT), load_tokenizer(STUDENT)
    prompts = LedgerTask().prompts(0, NUM_PROMPTS, _PREPARATION)
    sampler = TransformersSampler(model, tokenizer, 512)
    sampling = SamplingConfig(max_new_tokens=64)
    plain = sampler.sample(RolloutRequest(prompts, sampling, (_PREPARATION,)))
    told = PrivilegedReading(tokenizer, CONTEXT, ("answer",))
    rng, ended = random.Random(_PREPARATION), [int(tokenizer.eos_token_id)]
    right = [
        Rollout(p, 0, told.prompt_ids(p), (*encode_completion(tokenizer, solve(p, rng)), *ended))
        for p in prompts
    ]
    both = [*plain, *right]
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95))
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / num_steps)
        batch = collate(rng.sample(both, SIZE), int(tokenizer.pad_token_id))
        view: LazyLogits = head(model, hidden_rows(model, batch), len(tokenizer))
        logits = view.block(0, len(view))
        loss = torch.nn.functional.cross_entropy(logits, batch.tokens)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"supervised step {step}: {float(loss.detach()):.4f} nats", flush=True)
    save_model(model.requires_grad_(False), tokenizer, folder)
    return folder


def run(out: Path, model: str, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Accuracy before and after a run, and what the teacher says of the rollouts."""
    table: dict[str, Any] = {
        "student": {"model": model},
        "teacher": {"kind": "self", "context": CONTEXT, "weights": "frozen"},
        "data": {"kind": "ledger"},
        "sampling": {"max_new_tokens": 64},
        "optimizer": {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 5},
        "evaluation": {"num_problems": 64, "num_samples": 4},
        "num_steps": 40,
        "prompts_per_step": 16,
        "micro_batch_size": 32,
        "sampling_batch_size": 512,
        "checkpoint_every": 0,
        "num_threads": 1,
        "device": "cpu",
        "seed": seed,
        "out": str(out),
    }
    train(parse_config(table | changes), log=lambda line: None)
    lines = (out / "evaluation.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    first, last = found[0], found[-1]
    return {
        "seed": seed,
        "before": first["mean_at_k"],
        "after": last["mean_at_k"],
        "reverse_kl_nats": [first["held_out_reverse_kl_nats"], last["held_out_reverse_kl_nats"]],
    }


def main() -> None:
    """Run all that is missing, and write the result once all of it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/self_teacher"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--supervised-steps", type=int, default=400)
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = arguments.out / source()
    prepared = prepare(out / "trained_on_answers-start", arguments.supervised_steps)
    starts = {"trained_on_answers": str(prepared), "as_shipped": STUDENT}
    result: dict[str, Any] = {
        "context": CONTEXT,
        "steps": 40,
        "supervised_steps": arguments.supervised_steps,
        "environment": environment(),
        "starts": {},
    }
    for name, model in starts.items():
        seeds = [run(out / f"{name}-{seed}", model, seed, {}) for seed in range(arguments.seeds)]
        gains = torch.tensor([[one["after"] - one["before"]] for one in seeds])
        gain = mean_interval(gains)
        result["starts"][name] = {
            "gain": gain.value,
            "low": gain.low,
            "high": gain.high,
            "seeds": seeds,
        }
        print(f"{name}: {json.dumps(result['starts'][name])}", flush=True)
    write_atomically(arguments.result, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
