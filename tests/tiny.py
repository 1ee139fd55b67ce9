"""A tiny random student and teacher for the ledger task, and configurations that train them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tutelage.config.parse import parse_config
from tutelage.config.schema import Config
from tutelage.models.load import load_tokenizer, save_model
from tutelage.models.tiny import tiny_tokenizer

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


def save_tiny_gguf(path: Path, seed: int) -> Path:
    """A random Qwen2 of 2 layers and width 32 with the tokenizer of `tiny_tokenizer`."""
    import gguf

    tokenizer = tiny_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    width, inner, groups, num_layers = 32, 48, 16, 2
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_block_count(num_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token.startswith("<|") else normal for token in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), width),
        "output.weight": (len(tokens), width),
        "output_norm.weight": (width,),
    }
    rows = {"attn_q": width, "attn_k": groups, "attn_v": groups, "attn_output": width}
    rows |= {"ffn_gate": inner, "ffn_up": inner, "ffn_down": width}
    for layer in range(num_layers):
        for name, count in rows.items():
            columns = inner if name == "ffn_down" else width
            shapes[f"blk.{layer}.{name}.weight"] = (count, columns)
            if name in ("attn_q", "attn_k", "attn_v"):
                shapes[f"blk.{layer}.{name}.bias"] = (count,)
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{layer}.{name}.weight"] = (width,)
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        weight = 0.2 * torch.randn(shape, generator=generator) + ("norm" in name)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
