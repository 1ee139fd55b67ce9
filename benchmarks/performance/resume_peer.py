"""TRL's `DistillationTrainer` under the kills and damage that `reliability` does to tutelage.

The embedded student and teacher, a checkpoint every second step, TRL's own settings otherwise, with
full determinism. A trial kills the run once or twice, at a random moment or between two files of a
checkpoint, continues it with `resume_from_checkpoint=True` as TRL's documentation says (from the
beginning while there is no checkpoint), and compares the end with the unbroken run: weights,
moments, logged numbers, sampled completions. Then every file of a finished checkpoint is cut in
half, or has one bit flipped, and the run is continued from it.

    pip install -e '.[bench]'
    OMP_NUM_THREADS=1 python benchmarks/performance/resume_peer.py            # about ten minutes
    OMP_NUM_THREADS=1 python benchmarks/performance/resume_peer.py --kills 2  # does it run?

Our own figures are those of `python -m reliability kill corruption`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.trainer_utils import get_last_checkpoint
from trl import DistillationConfig, DistillationTrainer

from objective import HERE, environment
from tutelage.data.tasks import LedgerTask
from tutelage.models.reference import resolve_model

NUM_STEPS, SAVE_EVERY, NUM_PROMPTS = 8, 2, 8
SAVING = ("save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state")
"""Calls of transformers' trainer that write a checkpoint, in order; a kill may follow each."""
Table = dict[str, Any]


# --- one run, in a child --------------------------------------------------------------------------


def trainer_of(out: Path, seed: int) -> DistillationTrainer:
    """TRL's trainer for the embedded pair."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(
            resolve_model(f"package:tutelage/assets/{name}").source, dtype=torch.float32
        )
        for name in ("ledger-overconfident", "ledger-teacher")
    )
    task = LedgerTask(3)
    prompts = [p.content for step in range(NUM_STEPS) for p in task.prompts(step, NUM_PROMPTS, 0)]
    settings = DistillationConfig(
        output_dir=str(out),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=NUM_PROMPTS,
        max_completion_length=32,
        learning_rate=1e-3,
        beta=1.0,
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVE_EVERY,
        log_completions=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=seed,
        full_determinism=True,
    )
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(student.name_or_path),
    )


def work(out: Path, seed: int) -> None:
    """Start or continue the run in this process, and write down how it ended."""
    trainer = trainer_of(out, seed)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) is not None)
    moments = trainer.optimizer.state_dict()["state"]
    logged = [line for line in trainer.state.log_history if "loss" in line]
    times = ("step_time", "train_runtime", "_per_second")
    ended = {
        "weights": digest(trainer.model.state_dict()),
        "moments": digest({f"{i}.{k}": v for i, s in moments.items() for k, v in s.items()}),
        "steps": [line["step"] for line in logged],
        "numbers": [{k: v for k, v in line.items() if not k.endswith(times)} for line in logged],
        "completions": completions(out),
    }
    out.with_suffix(".ended").write_text(json.dumps(ended))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors by name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def completions(out: Path) -> list[str]:
    """Number and SHA-256 of the sampled texts of each step, which TRL writes as parquet."""
    from pyarrow.parquet import read_table

    found = []
    for path in sorted((out / "completions").glob("*.parquet")):
        texts = read_table(path).column("completion").to_pylist()
        sum_ = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        found.append(f"{path.stem}: {len(texts)} texts, {sum_}")
    return found


def kill_after(call: str, number: int) -> None:
    """Let this process die after the `number`-th call of a saving method."""
    plain, count = getattr(Trainer, call), [0]

    def dying(*arguments: Any, **options: Any) -> Any:
        result = plain(*arguments, **options)
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(Trainer, call, dying)


def start(out: Path, prepare: Callable[[], None] | None = None, seed: int = 0) -> int:
    """Start or continue a run in a child; its process number."""
    pid = os.fork()  # this process has imported everything and computed nothing
    if pid:
        return pid
    code = 1
    try:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        if prepare is not None:
            prepare()
        work(out, seed)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pid: int) -> int:
    """Exit code of a child, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- trials ---------------------------------------------------------------------------------------


def outcome(out: Path, code: int, expected: Table) -> Table:
    """How a continued run ended, against the unbroken one."""
    if code:
        lines = out.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        return {"ended": False, "error": " ".join(lines[-1:])[:200]}
    found = json.loads(out.with_suffix(".ended").read_text())
    differing = [part for part in expected if found[part] != expected[part]]
    logs = sorted(set(found["completions"]) ^ set(expected["completions"]))
    return {"ended": True, "differing": differing} | ({"completions": logs} if logs else {})


def killed(out: Path, number: int, seconds: float, expected: Table) -> Table:
    """Kill a run once or twice, continue it to its end and compare."""
    rng = random.Random(number)
    kills = []
    for _ in range(rng.choice((1, 2))):
        call, which = rng.choice(SAVING), rng.randint(1, NUM_STEPS // SAVE_EVERY)
        inside = number % 3 == 0
        pid = start(out, partial(kill_after, call, which) if inside else None)
        if not inside:
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        if end(pid) == -signal.SIGKILL:
            kills.append(f"after {call} {which}" if inside else "random moment")
            continue
        break  # it ended, or could not be continued: that is seen below
    result = outcome(out, end(start(out)), expected)
    newest = get_last_checkpoint(str(out))
    if not result["ended"] and newest is not None:
        shutil.rmtree(newest)  # what a user would do by hand
        result["without_the_newest_checkpoint"] = outcome(out, end(start(out)), expected)
    return {"kills": kills} | result


def damaged(half: Path, out: Path, file: str, kind: str, expected: Table) -> Table:
    """Continue from a finished checkpoint of which one file is damaged."""
    shutil.copytree(half, out)
    path = out / f"checkpoint-{NUM_STEPS // 2}" / file
    content = bytearray(path.read_bytes())
    if kind == "cut":
        del content[len(content) // 2 :]
    elif kind == "flip":
        content[len(content) // 2] ^= 16
    path.unlink() if kind == "lost" else path.write_bytes(content)
    code = end(start(out))
    return {"file": file, "kind": kind} | outcome(out, code, expected)


def half_way(unbroken: Path, out: Path) -> Path:
    """A run as it stands after half its steps."""
    kept = (f"checkpoint-{n}" for n in range(SAVE_EVERY, NUM_STEPS // 2 + 1, SAVE_EVERY))
    for name in kept:
        shutil.copytree(unbroken / name, out / name)
    (out / "completions").mkdir()
    for path in sorted((unbroken / "completions").iterdir())[: NUM_STEPS // 2]:
        shutil.copy(path, out / "completions")
    return out


def measure(folder: Path, num_kills: int) -> Table:
    """All trials."""
    begun = time.perf_counter()
    runs = [folder / f"unbroken-{i}" for i in range(3)]
    codes = [end(start(out, seed=seed)) for out, seed in zip(runs, (0, 0, 1), strict=True)]
    seconds = (time.perf_counter() - begun) / 3
    if any(codes):
        sys.exit((folder / "unbroken-0.log").read_text())
    expected, again, other = (json.loads(out.with_suffix(".ended").read_text()) for out in runs)
    half = half_way(runs[0], folder / "half")
    plain = damaged(half, folder / "plain", "config.json", "none", expected)
    control = damaged(half, folder / "control", "rng_state.pth", "lost", expected)
    finished = outcome(runs[1], end(start(runs[1])), expected)
    trials = []
    for number in range(num_kills):
        trials.append(killed(folder / f"run-{number}", number, seconds, expected))
        print(number, trials[-1], flush=True)
    sweep = []
    for path in sorted((half / f"checkpoint-{NUM_STEPS // 2}").iterdir()):
        for kind in ("cut", "flip"):
            out = folder / f"damaged-{kind}-{path.name}"
            sweep.append(damaged(half, out, path.name, kind, expected))
            print(sweep[-1], flush=True)
    return {
        "unbroken_twice_equal": again == expected,
        "other_seed_differs": other["weights"] != expected["weights"],
        "continued_from_a_whole_checkpoint": plain,
        "continued_after_its_end": finished,
        "control_continued_without_random_state": control,
        "killed": trials,
        "damaged": sweep,
    }


def summary(found: Table) -> Table:
    """Counts of the trials."""
    groups: dict[str, Counter[str]] = {}
    for trial in found["killed"]:
        if trial["kills"]:
            inside = trial["kills"][0] != "random moment"
            group = groups.setdefault("inside_saving" if inside else "random_moment", Counter())
            group["runs"] += 1
            group["ended"] += trial["ended"]
            group["equal"] += trial["ended"] and not trial["differing"]
            by_hand = trial.get("without_the_newest_checkpoint", {"ended": False})
            group["equal_by_hand"] += by_hand["ended"] and not by_hand["differing"]
    damage: Counter[str] = Counter()
    for trial in found["damaged"]:
        damage["trials"] += 1
        damage["noticed" if not trial["ended"] else "went_on"] += 1
        damage["went_on_to_other_results"] += bool(trial["ended"] and trial["differing"])
    return {"killed": {k: dict(v) for k, v in groups.items()}, "damaged": dict(damage)}


def main() -> None:
    """Run all trials and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=45, help="runs that are killed")
    parser.add_argument("--out", type=Path, help="default: results/faults-peer-resume.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    disable_progress_bars()
    record = environment(arguments)
    with tempfile.TemporaryDirectory(prefix="resume-peer-") as folder:
        found = measure(Path(folder), arguments.kills)
    record |= {"summary": summary(found)} | found
    out = arguments.out or HERE / "results" / "faults-peer-resume.json"
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()
