"""A tiny random student and teacher for the ledger task, and configurations that train them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tutelage.models.load import load_tokenizer, save_model
from tutelage.run.config import Config
from tutelage.run.parse import parse_config

TOKENIZER = "package:tutelage/assets/ledger-teacher"
MEASURED = {"seconds", "peak_rss_bytes", "peak_device_bytes"}
"""What differs from one run to the same again: everything else in a step's metrics repeats."""


def save_tiny_model(folder: Path, seed: int, is_tied: bool = False, **sizes: int) -> Path:
    """A random Qwen3 of 2 layers and width 32; its logits are spread, so that tokens differ."""
    tokenizer = load_tokenizer(TOKENIZER)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 3,  # padded, as heads often are
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
        | sizes,
        max_position_embeddings=128,
        tie_word_embeddings=is_tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.25,
    )
    torch.manual_seed(seed)
    save_model(Qwen3ForCausalLM(config).eval(), tokenizer, folder)
    return folder


def tiny_table(models: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A nested table for four small steps; `changes` replace or extend whole tables."""
    table: dict[str, Any] = {
        "student": {"model": str(models / "student")},
        "teacher": {"model": str(models / "teacher")},
        "data": {"kind": "ledger", "num_items": 1},
        "sampling": {"num_samples": 2, "max_new_tokens": 10},
        "optimizer": {"learning_rate": 2e-3},
        "evaluation": {"num_problems": 0},
        "num_steps": 4,
        "prompts_per_step": 4,
        "micro_batch_size": 3,
        "checkpoint_every": 2,
        "keep_checkpoints": 4,
        "device": "cpu",
        "out": str(out),
    }
    return table | changes


def tiny_config(models: Path, out: Path, **changes: Any) -> Config:
    """The same as a configuration."""
    return parse_config(tiny_table(models, out, **changes))
