"""Memory on one CUDA device: recipes at full size beside their plan, and TIP's table.

Weights are random and made on the device, so no file of a model is read or written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import gpu_card
import gpu_models
from gpu_card import MIB, Peak, measured
from gpu_models import random_qwen3, save_prompts, save_tokenizer, scratch
from tutelage.data.batch import collate
from tutelage.data.types import Prompt, Rollout

if TYPE_CHECKING:
    from tutelage.config.schema import Config
    from tutelage.setup.components import Components

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GIB = 1 << 30
FEW_TOKENS = 16
"""Tokens of each completion that is drawn."""
SHARES = (100, 50, 20, 10)
"""Percent of the tokens that are trained on."""
SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 8, 128, 2048
"""Of TIP's table: 16,384 tokens to learn from."""


@dataclass(frozen=True)
class Recipe:
    """A recipe whose models are dense Qwen3."""

    student: str
    teacher: str
    limit_bytes: int = 0
    """What torch may take of the device; 0 for all."""
    has_long_slots: bool = False
    """Whether slots hold completions of full length, though few tokens of them are drawn; else
    they are as long as what is drawn, for the recipe leaves rollouts to vLLM."""


RECIPES = {
    "tip_qwen3_8b_4b_1gpu_80gb": Recipe("4B", "8B"),
    "eopd_qwen3_4b_1gpu_80gb": Recipe("4B", "8B"),
    "eopd_qwen3_0_6b_1gpu_24gb": Recipe("0.6B", "8B", 24 * GIB, has_long_slots=True),
}


# --- recipes --------------------------------------------------------------------------------------


def recipe_table(name: str, folder: Path) -> dict[str, Any]:
    """A recipe as in its file, with models and prompts of `folder`, drawn by the student itself."""
    from tutelage.config.read import read_table

    table = read_table(next(CONFIGS.rglob(f"{name}.toml")))
    for who in ("student", "teacher"):
        table[who]["model"] = str(folder / who)
    table.pop("engine", None)
    table["data"] = {
        "kind": "file",
        "path": str(folder / "prompts.jsonl"),
        "chat": False,
        "num_held_out": 0,
        "max_prompt_tokens": table["data"]["max_prompt_tokens"],
    }
    return table | {
        "out": str(folder / "run"),
        "evaluation": {"num_problems": 0},
        "scoring": "forward",  # the long completions were not drawn, so nothing was recorded
        "num_steps": 1,
        "device": gpu_card.DEVICE,
    }


def measure_recipe(name: str) -> dict[str, Any]:
    """A few tokens at full width, then a micro-batch of the longest completions; beside the plan.

    The optimizer's step is one of rate 0 without moments: they lie in main memory.
    """
    from tutelage.config.parse import parse_config
    from tutelage.memory.cuda import plan_cuda
    from tutelage.memory.meta_model import shadows
    from tutelage.setup.components import build_components

    recipe, started = RECIPES[name], time.perf_counter()
    with scratch() as place:
        folder = Path(place)
        table = recipe_table(name, folder)
        long = parse_config(table)
        if not long.optimizer.offload:
            raise ValueError(f"{name} keeps its moments on the device, which are not made here.")
        _save_sides(folder, recipe, long)
        drawn = long
        if not recipe.has_long_slots:
            drawn = replace(long, sampling=replace(long.sampling, max_new_tokens=FEW_TOKENS))
        size = _micro_batch(long)
        step = {"prompts_per_step": size, "updates_per_step": 1}
        learned = parse_config(table | step | {"sampling": {**table["sampling"], "num_samples": 1}})
        with _random_models({"student": recipe.student, "teacher": recipe.teacher}):
            components = build_components(drawn)
            prompt = long.data.max_prompt_tokens  # type: ignore[union-attr]
            with _limited(recipe.limit_bytes):
                sides, facts = shadows(components), _facts()
                built = time.perf_counter()
                draw = _draw(drawn, components, recipe)
                rollouts = _long_rollouts(learned, components, prompt)
                phases, reserved = _learn(learned, components, rollouts, folder)
        planned = {
            "rollout": plan_cuda(drawn, *sides, facts, prompt).phases[0],
            **{p.name: p for p in plan_cuda(learned, *sides, facts, prompt).phases[1:]},
        }
    peaks = {"rollout": draw.allocated} | {n: b for n, b in phases.items() if n != "rollout"}
    return {
        **_compared({n: p.allocated_bytes for n, p in planned.items()}, peaks),
        "reserved_mib": max(draw.reserved, reserved) / MIB,
        "planned_total_mib": max(phase.total_bytes for phase in planned.values()) / MIB,
        "limit_mib": recipe.limit_bytes / MIB,
        "tokens": size * (prompt + long.sampling.max_new_tokens),
        "build_s": round(built - started, 1),
        "measured_s": round(time.perf_counter() - built, 1),
    }


def _compared(planned: dict[str, int], measured_bytes: dict[str, int]) -> dict[str, Any]:
    both = {
        name: {"planned_mib": planned[name] / MIB, "measured_mib": size / MIB}
        for name, size in measured_bytes.items()
    }
    most, highest = max(planned.values()), max(measured_bytes.values())
    print({name: {k: round(v) for k, v in pair.items()} for name, pair in both.items()})
    return {
        "phases": both,
        "planned_mib": most / MIB,
        "measured_mib": highest / MIB,
        "ratio": most / highest if highest else 0.0,
    }


def _save_sides(folder: Path, recipe: Recipe, config: Config) -> None:
    """Configurations, tokenizers and prompts; no weights."""
    for who, size in (("student", recipe.student), ("teacher", recipe.teacher)):
        (folder / who).mkdir()
        gpu_models.qwen3_config(size).save_pretrained(folder / who)
        save_tokenizer(folder / who)
    length = config.data.max_prompt_tokens  # type: ignore[union-attr]
    save_prompts(folder / "prompts.jsonl", config.prompts_per_step, length)


@contextmanager
def _random_models(sizes: dict[str, str]) -> Any:
    """What would be read from a folder is made on the device instead."""

    def load(ref: str, dtype: str, device: str = "cpu", **_: Any) -> Any:
        model = random_qwen3(sizes[Path(ref).name], getattr(torch, dtype), seed=len(ref))
        return model.to(torch.device(device))

    with (
        mock.patch("tutelage.setup.components.load_model", load),
        mock.patch("tutelage.setup.teacher.load_model", load),
    ):
        yield


@contextmanager
def _limited(num_bytes: int) -> Any:
    """As on a smaller card: its context is there already, so torch has the rest."""
    from tutelage.memory.facts import CONTEXT_BYTES

    if not (num_bytes and gpu_card.is_cuda()):
        yield
        return
    gpu_card.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (num_bytes - CONTEXT_BYTES) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _facts() -> Any:
    from tutelage.memory.facts import Facts

    if gpu_card.is_cuda():
        return Facts.of(torch.device("cuda"))
    return Facts(80 * GIB, 80 * GIB, (9, 0), False, 128 * GIB)


def _micro_batch(config: Config) -> int:
    """Completions of full length in the largest micro-batch."""
    length = config.data.max_prompt_tokens + config.sampling.max_new_tokens  # type: ignore[union-attr]
    return max(1, min(config.micro_batch_size, config.micro_batch_tokens // length))


def _draw(config: Config, components: Components, recipe: Recipe) -> Peak:
    """The peak of a few tokens of each completion of a step."""
    from tutelage.rollout.cuda.generate import graph_generator
    from tutelage.rollout.request import RolloutRequest, completion_requests

    prompts = components.task.prompts(0, config.prompts_per_step, 0)
    with measured() as peak, torch.no_grad():
        if recipe.has_long_slots:
            arguments = (components.tokenizer, config.sampling, config.sampling_batch_size, False)
            request = RolloutRequest(prompts, config.sampling, (0,))
            writer = graph_generator(components.student.model, *arguments)
            requests = completion_requests(components.tokenizer, request)
            if writer is not None and not writer.open_slots(requests):
                raise RuntimeError("the captured step is not the model's own.")
        few = replace(config.sampling, max_new_tokens=FEW_TOKENS)
        components.sampler.sample(RolloutRequest(prompts, few, (0, 1)))
    components.forget_draws()
    return peak


def _long_rollouts(config: Config, components: Components, prompt_tokens: int) -> list[Rollout]:
    """Random completions of full length."""
    generator = torch.Generator().manual_seed(0)
    prompts = components.task.prompts(0, config.prompts_per_step, 0)
    count = config.sampling.max_new_tokens
    return [_rollout(prompt, prompt_tokens, count, generator) for prompt in prompts]


def _rollout(prompt: Prompt, num_read: int, num_new: int, generator: torch.Generator) -> Rollout:
    """Random ids; every token as likely as in a uniform distribution."""
    most = gpu_models.VOCABULARY
    ids = torch.randint(3, most, (num_read + num_new,), generator=generator).tolist()
    logprobs = (-12.0,) * num_new
    return Rollout(prompt, 0, tuple(ids[:num_read]), tuple(ids[num_read:]), True, logprobs)


def _learn(
    config: Config, components: Components, rollouts: Sequence[Rollout], folder: Path
) -> tuple[dict[str, int], int]:
    """Peaks of the phases of a step whose rollouts are given, and what torch reserved."""
    from tutelage.setup.numerics import open_accelerator
    from tutelage.train.step import Step

    accelerator = open_accelerator(config, folder, components.device)
    optimizer = torch.optim.SGD(components.masters.masters, lr=0.0)
    components.masters.register_hook(optimizer)
    step = Step(config, components, accelerator, components.student, optimizer)
    given = mock.patch.object(step, "generate", return_value=list(rollouts))
    with given, measured() if gpu_card.is_cuda() else nullcontext(Peak()) as peak:
        metrics = step.take(1)
    if metrics["num_memory_splits"]:
        raise RuntimeError("the micro-batch did not fit and was cut in two.")
    accelerator.end_training()
    return gpu_card.phases_of(metrics), peak.reserved


# --- TIP's table ----------------------------------------------------------------------------------


def tip_memory() -> dict[str, Any]:
    """Peak of learning from a share of 16k tokens, 1.7B ← 4B: ours, and materialised logits.

    Both hold the two models, read the same batch with both and back-propagate the same reverse KL
    to all of the student's weights, layers checkpointed; no optimizer. Materialised: bfloat16
    logits of all positions of both models, of which a mask gathers the kept rows; float32
    log-softmax of these, `kl_div` in autograd.
    """
    from tutelage.models.lora import checkpoint_activations
    from tutelage.models.student import Student
    from tutelage.models.teacher import Teacher

    student_model, teacher_model = random_qwen3("1.7B", seed=1), random_qwen3("4B", seed=2)
    checkpoint_activations(student_model)
    generator = torch.Generator().manual_seed(0)
    rollouts = [
        _rollout(Prompt(str(i), ""), PROMPT_TOKENS, NEW_TOKENS, generator) for i in range(SEQUENCES)
    ]
    batch = collate(rollouts, pad_id=1).to(gpu_card.DEVICE)
    student = Student(student_model, gpu_models.VOCABULARY)
    teacher = Teacher(teacher_model, gpu_models.VOCABULARY, gpu_card.DEVICE)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda rows: student(batch, teacher.to_device(teacher.forward(batch)), rows).total,
        "materialised": lambda rows: _materialised(student_model, teacher_model, batch, rows),
    }
    order = torch.randperm(batch.num_rows, generator=generator).to(gpu_card.DEVICE)
    weights = sum(p.nbytes for m in (student_model, teacher_model) for p in m.parameters())
    found: dict[str, Any] = {"weights_mib": weights / MIB, "rows": batch.num_rows}
    for way, objective in ways.items():
        found[way] = {}
        for share in SHARES:
            rows = order[: batch.num_rows * share // 100].sort().values
            found[way][str(share)] = _learning_peak(student_model, objective, rows)
            print(way, share, found[way][str(share)], flush=True)
    return found


def _learning_peak(model: Any, objective: Callable[[Tensor], Tensor], rows: Tensor) -> Any:
    """Of one forward and backward pass, with the loss a row."""
    from tutelage.models.lora import learning

    total = torch.zeros(())
    model.zero_grad(set_to_none=True)
    try:
        with measured() as peak, learning(model, (0,)):
            total = objective(rows) / len(rows)
            total.backward()  # type: ignore[no-untyped-call]
            loss = float(total.detach())
            del total
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    finally:
        model.zero_grad(set_to_none=True)
    return peak.described() | {"loss": loss}


def _materialised(student: Any, teacher: Any, batch: Any, rows: Tensor) -> Tensor:
    """Sum of the reverse KL of some rows, from logits of all positions."""
    width = batch.input_ids.shape[1]
    is_kept = torch.zeros(len(batch.input_ids) * width, dtype=torch.bool, device=rows.device)
    is_kept[batch.row_index[rows]] = True
    mask = is_kept.view(-1, width)
    with torch.no_grad():
        logits = teacher(input_ids=batch.input_ids, use_cache=False).logits
        log_q = logits[mask].float().log_softmax(-1)
    own = student(input_ids=batch.input_ids, use_cache=False).logits
    log_p = own[mask].float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "tip_memory": tip_memory,
    **{f"recipe_{name}": partial(measure_recipe, name) for name in RECIPES},
}
