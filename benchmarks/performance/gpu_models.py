"""Random models of real sizes, made on the device in seconds, and prompts for them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import gpu_card

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, Qwen3Config

VOCABULARY = 151_936
"""Rows of a Qwen3 head."""
SIZES: dict[str, dict[str, Any]] = {
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
             "num_attention_heads": 16, "tie_word_embeddings": True},
    "1.7B": {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144,
             "num_attention_heads": 16, "tie_word_embeddings": True},
    "4B": {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728,
           "num_attention_heads": 32, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288,
           "num_attention_heads": 32, "tie_word_embeddings": False},
    "14B": {"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 17408,
            "num_attention_heads": 40, "tie_word_embeddings": False},
    "32B": {"hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 25600,
            "num_attention_heads": 64, "tie_word_embeddings": False},
}  # fmt: skip
"""Qwen3's dense models."""


OTHERS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 1536, "num_hidden_layers": 28,
        "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "max_position_embeddings": 32_768,
    },
    "Qwen/Qwen2.5-14B-Instruct": {
        "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 5120, "num_hidden_layers": 48,
        "intermediate_size": 13_824, "num_attention_heads": 40, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "max_position_embeddings": 32_768,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "num_hidden_layers": 32,
        "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "max_position_embeddings": 131_072,
    },
    "meta-llama/Llama-3.3-70B-Instruct": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 8192, "num_hidden_layers": 80,
        "intermediate_size": 28_672, "num_attention_heads": 64, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "max_position_embeddings": 131_072,
    },
}  # fmt: skip
"""Sizes of the other models that recipes name."""


def architecture(name: str) -> PreTrainedConfig:
    """The sizes of a model on the hub that a recipe names."""
    from transformers import CONFIG_MAPPING

    if name in OTHERS:
        table = dict(OTHERS[name])
        config: PreTrainedConfig = CONFIG_MAPPING[table.pop("model_type")](**table)
        return config
    return qwen3_config(name.removeprefix("Qwen/Qwen3-").removesuffix("-Base"))


def qwen3_config(size: str) -> Qwen3Config:
    """The configuration of a dense Qwen3."""
    from transformers import Qwen3Config

    common = {
        "vocab_size": VOCABULARY,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return Qwen3Config(**(common | SIZES[size]))


def random_qwen3(size: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PreTrainedModel:
    """A Qwen3 with random weights on the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(gpu_card.DEVICE):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(qwen3_config(size), dtype=dtype)
    return model.eval()


def fast_folder() -> str | None:
    """Where files are kept in main memory, so that no disk is measured; None: nowhere."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of one word an id; the first three end a text, pad it and stand for others."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = ("<end>", "<pad>", "<unk>")
    words = {name: i for i, name in enumerate(control)}
    words |= {f"w{i}": i for i in range(len(control), VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token=control[2]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=control[0], pad_token=control[1], unk_token=control[2]
    )
    tokenizer.save_pretrained(folder)


def save_qwen3(size: str, folder: Path, seed: int = 0) -> Path:
    """A folder of a random Qwen3 in bfloat16 with its tokenizer."""
    model = random_qwen3(size, seed=seed)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    del model
    gpu_card.empty_cache()
    return folder


def save_prompts(path: Path, count: int, num_tokens: int, seed: int = 0) -> list[str]:
    """Prompts of `num_tokens` random words each, as JSONL."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, num_tokens), generator=generator)
    texts = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return texts


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for models, in main memory where there is one."""
    return tempfile.TemporaryDirectory(dir=fast_folder())
