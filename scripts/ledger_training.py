"""Supervised training of the embedded ledger models on the reference solver's completions."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tutelage.data.tasks.ledger import Facts, LedgerTask, solve, true_facts

MAX_LENGTH = 256
NOT_A_TARGET = -100


@dataclass(frozen=True)
class Shape:
    """Size of a model; head width is `width / num_heads`."""

    width: int = 128
    num_layers: int = 3
    num_heads: int = 4
    mlp_width: int = 256


@dataclass(frozen=True)
class Lessons:
    """Which completions a model is shown."""

    order: Literal["random", "listed"] = "random"
    swap: float = 0.5
    facts: Facts = true_facts


@dataclass(frozen=True)
class Schedule:
    """How a model is trained: Muon on the matrices, AdamW on the embedding and the norms."""

    num_steps: int
    batch_size: int
    matrix_learning_rate: float
    learning_rate: float
    seed: int
    num_warmup_steps: int = 30
    num_easy_steps: int = 0
    """Steps at the start whose prompts have two to five items instead of five."""

    def scale(self, step: int) -> float:
        """Factor on the learning rates at a step, counted from 0: warm-up, then linear to zero."""
        return min(1.0, (step + 1) / self.num_warmup_steps) * (1 - step / self.num_steps)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines one model."""

    name: str
    summary: str
    schedule: Schedule
    lessons: Lessons = field(default_factory=Lessons)
    shape: Shape = field(default_factory=Shape)
    parent: str | None = None
    """Model from which the training starts; None for a fresh one of `shape`."""


def fresh_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3-style decoder with random weights, for sequences of the tokenizer's length."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.width // shape.num_heads,
        intermediate_size=shape.mlp_width,
        max_position_embeddings=tokenizer.model_max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
    """Train in place by the recipe."""
    fit(model, recipe.name, recipe.schedule, lambda step: _batch(tokenizer, recipe, step))


def fit(
    model: Qwen3ForCausalLM,
    name: str,
    schedule: Schedule,
    batch: Callable[[int], tuple[Tensor, Tensor]],
) -> None:
    """Train in place on the ids and targets of each step, with the causal shift made here."""
    optimizers = _optimizers(model, schedule)
    start = time.monotonic()
    for step in range(schedule.num_steps):
        ids, targets = batch(step)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, base_rate in optimizers:
            optimizer.param_groups[0]["lr"] = base_rate * schedule.scale(step)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == schedule.num_steps:
            seconds = time.monotonic() - start
            print(f"{name}: step {step + 1}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)


def _optimizers(
    model: Qwen3ForCausalLM, schedule: Schedule
) -> list[tuple[torch.optim.Optimizer, float]]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=schedule.matrix_learning_rate, weight_decay=0.0)
    adamw = torch.optim.AdamW(
        others, lr=schedule.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)
    )
    return [(muon, schedule.matrix_learning_rate), (adamw, schedule.learning_rate)]


def _batch(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and targets [B, T] in which only the completion and its end count."""
    schedule, lessons = recipe.schedule, recipe.lessons
    task = LedgerTask(_num_items(schedule, step))
    prompts = task.prompts(step, schedule.batch_size, seed=schedule.seed)
    rng = random.Random(f"{schedule.seed}/{step}")
    texts = [str(prompt.content) for prompt in prompts]
    completions = [
        solve(prompt, rng, order=lessons.order, swap=lessons.swap, facts=lessons.facts)
        for prompt in prompts
    ]
    # All prompts of one number of items have the same length, and so have all completions.
    pairs = [
        f"{text}{written}{tokenizer.eos_token}"
        for text, written in zip(texts, completions, strict=True)
    ]
    ids = torch.tensor(tokenizer(pairs)["input_ids"])
    targets = ids.clone()
    targets[:, : 1 + len(texts[0])] = NOT_A_TARGET
    return ids, targets


def _num_items(schedule: Schedule, step: int) -> int:
    """Items in the prompts of a step: learning to look up a letter is easier among few items."""
    if step >= schedule.num_easy_steps:
        return LedgerTask().num_items
    return random.Random(f"k{schedule.seed}{step}").choice((2, 3, 4, 5))


def load_model(folder: Path) -> Qwen3ForCausalLM:
    """A stored model, for float32 arithmetic."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def save_model(model: Qwen3ForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Store bfloat16 weights, half the size, under a config that asks for float32 arithmetic."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text()) | {"dtype": "float32"}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "model.safetensors").chmod(0o644)
