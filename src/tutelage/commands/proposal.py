"""What a configuration for two models and some prompts starts from, and why."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from tutelage.data.suites import BOXED, SETS
from tutelage.data.types import Prompt
from tutelage.memory.cpu import available_bytes
from tutelage.memory.meta_model import shapes
from tutelage.models.device import find_device
from tutelage.models.limits import context_limit
from tutelage.models.load import load_model_config, load_tokenizer
from tutelage.models.reference import resolve_model
from tutelage.models.tokenizers import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEDGER = "ledger"
"""The prompts of the embedded task, which need no file."""
_TINY = 10_000_000
"""Parameters below which a step takes moments anywhere."""
_RATES = ((_TINY, 1e-3), (500_000_000, 5e-5), (3_000_000_000, 1e-5))
"""Parameters below which a learning rate is usual; 1e-6 above."""
_TRAINED_BYTES = 16
"""Of a trained weight in float32: itself, its gradient and two moments."""
_ROOM = 0.7
"""Share of the free memory that weights may take; the rest is for activations and caches."""
_GIB = 1 << 30
_FEWEST = 8
"""Held-out prompts from which on a run has a verdict."""
_MANY = 1 << 20
"""Prompts of a generated task."""


@dataclass
class Proposal:
    """Values that were given or are proposed, and reasons for the latter."""

    table: dict[str, Any]
    """The nested table of the configuration."""
    title: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    """By dotted names; a key without one is documented by its field."""
    warnings: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, why: str = "") -> Any:
        """Propose a value, unless one was given; returns the one that holds."""
        *parents, last = key.split(".")
        table = self.table
        for parent in parents:
            table = table.setdefault(parent, {})
        if last not in table:
            table[last] = value
            if why:
                self.reasons[key] = why
        return table[last]


def propose(given: dict[str, Any], prompts: list[Prompt]) -> Proposal:
    """A configuration that fits models, prompts and this machine.

    Args:
        given: values that stay as they are, as a nested table; models and data are among them.
        prompts: those of the data; none of a task that generates them.

    Raises:
        TutelageError: a model or tokenizer cannot be read, or a prompt cannot be encoded.
    """
    device = find_device(str(given.get("device", "auto")))
    student = given["student"]["model"]
    refs = (student, given["teacher"].get("model", student))
    models = [_shapes(ref) for ref in refs]
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in models]
    is_slow = device.type == "cpu" and max(sizes) > _TINY
    source = given["data"].get("path", given["data"]["kind"])
    num_training = len(prompts) - _num_held_out(prompts, given["data"])
    tables = ("student", "teacher", "data", "sampling", "selection", "optimizer", "evaluation")
    found = Proposal({key: value for key, value in given.items() if not isinstance(value, dict)})
    _steps(found, sizes, is_slow, num_training if prompts else _MANY)
    found.table |= {name: dict(given.get(name, {})) for name in tables}
    found.table |= {key: value for key, value in given.items() if key not in found.table}
    _models(found, refs, models)
    _precision(found, sizes, device)
    tokenizer = load_tokenizer(student)
    _data(found, source, prompts, tokenizer)
    _sampling(found, models[0], prompts, tokenizer, is_slow, sizes)
    _training(found, sizes[0])
    _measurements(found, prompts, is_slow)
    found.title = f"Distills {refs[1]} into {student} on prompts of {source}."
    return found


def _shapes(ref: str) -> PreTrainedModel:
    return shapes(load_model_config(resolve_model(ref)))


def _num_held_out(prompts: list[Prompt], data: dict[str, Any]) -> int:
    share = min(64, max(1, len(prompts) // 4)) if len(prompts) > 1 else 0
    return int(data.get("num_held_out", share))


def _steps(found: Proposal, sizes: list[int], is_slow: bool, num_training: int) -> None:
    few = "Few, so that a first run on a CPU takes minutes; raise it for a better student"
    steps = found.set("num_steps", 20 if is_slow else 60, few if is_slow else "")
    updates = int(found.table.get("updates_per_step", 1))
    found.set("prompts_per_step", max(1, min(8 if is_slow else 32, num_training)) * updates)
    found.set("checkpoint_every", max(1, int(steps) // 2))
    if max(sizes) <= _TINY:
        found.set("num_threads", 1, "The models are tiny: a second CPU thread costs time")


def _models(found: Proposal, refs: tuple[str, str], models: list[PreTrainedModel]) -> None:
    depth = models[0].config.get_text_config(decoder=True).num_hidden_layers
    if refs[0] == refs[1] and found.table["teacher"].get("kind", "local") == "local" and depth > 1:
        found.set(
            "student.num_layers",
            max(1, int(0.9 * depth)),
            f"Student and teacher are the same model: the student keeps so many of its {depth} "
            "layers",
        )


def _precision(found: Proposal, sizes: list[int], device: torch.device) -> None:
    """bfloat16 on a device made for it, or where float32 does not fit."""
    student, teacher = sizes
    there_is = _ROOM * available_bytes(device)
    name, why = "float32", "Exact; bfloat16 would halve the weights"
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        name, why = "bfloat16", "Half the memory of float32; updates are summed in float32"
    elif _TRAINED_BYTES * student + 4 * teacher > there_is:
        name, why = "bfloat16", "float32 would not fit into the memory that is free here"
    found.set("student.dtype", name, why)
    if found.table["teacher"].get("kind", "local") == "local":
        found.set("teacher.dtype", name)
    needed = _TRAINED_BYTES * student + (2 if name == "bfloat16" else 4) * teacher
    if needed > there_is / _ROOM:
        found.warnings.append(
            f"weights, gradients and moments take about {needed / _GIB:.1f} GiB, and "
            f"{there_is / _ROOM / _GIB:.1f} GiB are free here. `tutelage check` plans the memory "
            "and says what to change"
        )


def _data(
    found: Proposal, source: str, prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase
) -> None:
    if not prompts:
        return
    data = found.table["data"]
    has_template = bool(tokenizer.chat_template)
    found.set(
        "data.chat",
        has_template,
        "The student's tokenizer has a chat template: text prompts are rendered with it"
        if has_template
        else "The student's tokenizer has no chat template: text prompts stay as they are",
    )
    graders = {
        "none": "No reference answers: nothing is graded",
        "number": "Every reference answer is a number",
        "math": "Reference answers are compared as mathematics",
        "exact": "Reference answers are compared as text",
    }
    grader = data.get("grader", "none")
    found.reasons["data.grader"] = graders[grader]
    if grader == "math" and source not in SETS:
        found.set("data.suffix", BOXED, "Asks for the form in which the grader finds an answer")
    num_held_out = found.set("data.num_held_out", _num_held_out(prompts, data))
    if num_held_out < _FEWEST:
        found.warnings.append(
            f"{num_held_out} of {len(prompts)} prompts are held out: intervals of an evaluation "
            f"are useful from {_FEWEST} on"
        )


def _sampling(
    found: Proposal,
    student: PreTrainedModel,
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    is_slow: bool,
    sizes: list[int],
) -> None:
    """Completions as long as the task asks for and the context allows."""
    wanted, why = (
        (128, "Short, so that a first run on a CPU takes minutes") if is_slow else (512, "")
    )
    if max(sizes) <= _TINY:
        wanted, why = 64, ""
    limit = context_limit(student)
    if limit is not None and prompts:
        longest = max(len(encode_prompt(tokenizer, _rendered(p, found))) for p in prompts)
        room = limit - longest
        if 0 < room < wanted:
            wanted, why = room, f"What the longest prompt, {longest} tokens, leaves of the context"
    found.set("sampling.max_new_tokens", wanted, why)


def _training(found: Proposal, size: int) -> None:
    found.set("selection.rule", "all")
    rate = next((rate for most, rate in _RATES if size < most), 1e-6)
    found.set("optimizer.learning_rate", rate, f"Usual for a student of {size:,} parameters")
    found.set("optimizer.schedule", "linear")
    found.set("optimizer.warmup_steps", int(found.table["num_steps"]) // 10)


def _rendered(prompt: Prompt, found: Proposal) -> Prompt:
    """The prompt as the proposed table would read it."""
    if not isinstance(prompt.content, str):
        return prompt
    text = prompt.content + (found.table["data"].get("suffix") or "")
    is_chat = found.table["data"]["chat"]
    return replace(prompt, content=({"role": "user", "content": text},) if is_chat else text)


def _measurements(found: Proposal, prompts: list[Prompt], is_slow: bool) -> None:
    data = found.table["data"]
    num_held_out = data.get("num_held_out", 64) if prompts else 64
    is_graded = not prompts or data.get("grader", "none") != "none"
    few = "Few, so that measuring takes less time than training"
    found.set(
        "evaluation.num_problems", min(16 if is_slow else 64, num_held_out), few if is_slow else ""
    )
    found.set("evaluation.num_samples", 4 if is_graded and not is_slow else 1)
    if is_slow:
        found.set(
            "evaluation.teacher", False, "The teacher's own accuracy costs time; true gives it"
        )
    found.table.setdefault("recording", {})
    found.set(
        "recording.every",
        found.table["num_steps"],
        "Tokens for the report's token viewer, before the first step and after the last",
    )
