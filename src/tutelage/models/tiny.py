"""Tiny random stand-ins: a model of any architecture, shrunk, with a byte tokenizer.

They show within seconds that a recipe runs: same classes, same attention, same tied or untied and
padded heads, other sizes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tutelage.errors import ModelError
from tutelage.models.load import load_model_config, save_model
from tutelage.models.reference import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "initializer_range": 0.2,  # spreads the logits, so that tokens differ
}
_KNOWN: tuple[tuple[str, str, bool, int], ...] = (
    (r"Qwen3-(0\.6B|1\.7B|4B)", "qwen3", True, 151936),
    (r"Qwen3-(8B|14B|32B)", "qwen3", False, 151936),
    (r"Qwen2\.5-(Math-)?(0\.5B|1\.5B|3B)", "qwen2", True, 151936),
    (r"Qwen2\.5-(Math-)?(7B|14B|32B|72B)", "qwen2", False, 152064),
    (r"Llama-3\.2-[13]B", "llama", True, 128256),
    (r"(Meta-)?Llama-3(\.[13])?-(8B|70B)", "llama", False, 128256),
    (r"gemma-2-(2b|9b|27b)", "gemma2", True, 256000),
    (r"gemma-3-(270m|1b)", "gemma3_text", True, 262144),
    (r"SmolLM2-(135M|360M|1\.7B)", "llama", True, 49152),
)
"""Name on the hub, model type of transformers, whether the head is tied, rows of the head."""
_VARIANT = r"(-Base|-base|-Instruct|-instruct|-it|-pt)?(-\d{4})?"


@dataclass(frozen=True)
class Architecture:
    """What a tiny model has to have in common with the real one."""

    config: PreTrainedConfig
    """The model's own configuration, or the default one of its type."""
    origin: str
    """Where that was found."""
    is_base: bool
    """Whether it ends a text as a base model does, and not as a chat model."""


def architecture(ref: str) -> Architecture:
    """The architecture of a model reference: its own files, else a table, else the hub.

    The table comes before the hub, because a hub that cannot be reached keeps one waiting.

    Raises:
        ModelError: the reference leads nowhere.
    """
    found = resolve_model(ref)
    is_base = found.source.lower().endswith("-base")
    if found.is_local:
        return Architecture(load_model_config(found).get_text_config(), "its own config", is_base)
    name = found.source.rpartition("/")[2]
    for pattern, kind, is_tied, rows in _KNOWN:
        if re.fullmatch(pattern + _VARIANT, name):
            from transformers import AutoConfig

            config = AutoConfig.for_model(kind, vocab_size=rows, tie_word_embeddings=is_tied)
            if kind in ("llama", "qwen2"):  # whose defaults are from before grouped queries
                config.num_key_value_heads = config.num_attention_heads // 4
            return Architecture(config, f"the built-in table, {kind}", is_base)
    return Architecture(load_model_config(found).get_text_config(), "the hub's config", is_base)


def save_tiny_model(found: Architecture, num_rows: int, seed: int, folder: Path) -> str:
    """Write a tiny random model and its tokenizer; returns the name of the model's class.

    Args:
        found: what it stands for.
        num_rows: rows of its head, at least the ids of the tokenizer.
        seed: seed of its weights.
        folder: where to.

    Raises:
        ModelError: the architecture cannot be shrunk.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer(found.is_base)
    config = type(found.config).from_dict(_shrunk(found.config, num_rows, tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"no tiny model of type {found.config.model_type!r} can be made: {reason}. "
                "Try the real models with tutelage check."
            ) from error
    save_model(model.eval(), tokenizer, folder)
    return type(model).__name__


def tiny_tokenizer(is_base: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte and three control tokens, with a chat template that can switch thinking.

    Args:
        is_base: end a text with `<|endoftext|>`, as base models do, and not with `<|im_end|>`.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_CONTROL]
    core = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=_CONTROL[0 if is_base else 2],
        pad_token=_CONTROL[0],
        extra_special_tokens=list(_CONTROL),
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _shrunk(
    config: PreTrainedConfig, num_rows: int, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """The configuration with tiny sizes, wherever it has such a size."""
    own: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    tiny: dict[str, Any] = {
        name: size for name, size in _SIZES.items() if own.get(name) is not None
    }
    heads, groups = own.get("num_attention_heads"), own.get("num_key_value_heads")
    if groups is not None:
        tiny["num_key_value_heads"] = 4 if groups == heads else 2
    layers = own.get("layer_types")
    if layers is not None:
        # Gemma mixes: the last two are of both kinds; a model may have one layer only.
        tiny["layer_types"] = [layers[0], *layers][-2:]
    tiny |= {
        "vocab_size": num_rows,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return own | tiny
