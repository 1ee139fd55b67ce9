"""Tiny random stand-ins: a model of any architecture, shrunk, with a byte tokenizer.

They show within seconds that a recipe runs: same classes, same attention, same tied or untied and
padded heads, other sizes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tutelage.errors import ModelError
from tutelage.models.forward import foreign
from tutelage.models.load import load_model_config, save_model
from tutelage.models.reference import causal_class, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
_SIZES: tuple[tuple[str, int], ...] = (
    (r"hidden_size_per_layer_input|.*(_|^)rank|.*lora_rank", 16),
    (
        r"(.*_)?hidden_size|d_model|n_embd|emb(edding)?_dim|.*embedding_size|.*_embed(_proj)?_dim",
        64,
    ),
    (r"lru_width|mamba_d_ssm", 64),
    (r"moe_intermediate_size|.*expert_(intermediate|ffn_hidden)_size", 64),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|_mlp)|n_inner|dim_ff|dff|d_inner", 128),
    (r"feed_forward_size", 128),
    (r".*rope_head_dim|rotary_dim", 8),
    (r".*(head_dim|_headdim|dim_head|d_head|head_size)|kv_channels|query_pre_attn_scalar", 16),
    (r"(.*_)?(num_)?(key_value|kv|key|value)_heads|num_query_groups", 2),
    (r"(.*_)?heads?", 4),
    (r"first_k_dense_replace|n_group|topk_group|n_groups|.*_n_groups|o_groups", 1),
    (r"(num_|n_|moe_num_)?(routed_|local_)?experts|zero_expert_num|router_hidden_size", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts", 2),
    (r"keep_window_size", 2048),  # an end, see `limits`
    (r".*window(_size)?|attention_chunk_size|local_attention|rel_extent", 8),
    (r"(mamba_)?d_state|(ssm_)?state_size|(mamba_)?chunk_size", 8),
    (r"index_block_size|index_topk_blocks", 2),
    (r".*vocab_size(_base|_per_layer_input)?|.*_group_vocab|num_centroids|split_ngram_parts", 64),
    (r"(.*_)?(num_|n_)?(hidden_|encoder_|decoder_)?layers?|num_layers_per_stack|num_blocks", 2),
    (r"num_kv_shared_layers", 0),
)
"""Sizes of tiny models: the first pattern that a setting's whole name matches, where it is larger.

Windows and chunks are shorter than the sequences of a trial, so that they act.
"""
_NO_SETTINGS = {"_name_or_path", "output_attentions", "architectures"}
"""What a configuration says of itself beside the model."""
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks")
_OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "num_hidden_layers": 4,
        "attn_layer_indices": [1],
    },
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "xlnet": {"d_head": 16},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 32,
        "hybrid_layer_ids": [0],
        "num_mem_blocks": 1,
    },
}
"""Sizes that have to fit one another, by model type."""
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


def save_tiny_model(
    found: Architecture,
    num_rows: int,
    seed: int,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> str:
    """Write a tiny random model and its tokenizer; returns the name of the model's class.

    Args:
        found: what it stands for.
        num_rows: rows of its head, at least the ids of the tokenizer.
        seed: seed of its weights.
        folder: where to.
        tokenizer: its tokenizer; None for `tiny_tokenizer`.

    Raises:
        ModelError: the architecture cannot be shrunk.
    """
    tokenizer = tokenizer or tiny_tokenizer(found.is_base)
    auto = causal_class(found.config, "of this type").auto
    config = tiny_config(found.config, num_rows, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = auto.from_config(config, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"no tiny model of type {found.config.model_type!r} can be made: {reason}. "
                "Try the real models with tutelage check."
            ) from error
    save_model(model.eval(), tokenizer, folder)
    return type(model).__name__


def tiny_config(
    config: PreTrainedConfig, num_rows: int, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedConfig:
    """A configuration of the same type with tiny sizes and so many rows of its head.

    Raises:
        ModelError: the tiny sizes do not fit one another.
    """
    with foreign("cannot be made tiny", config):
        text = config.get_text_config()
        small = _shrunk(text, num_rows, tokenizer)
        if text is not config:  # a model of images and text
            own = config.to_dict()
            inner = next(name for name in _TEXT_CONFIGS if name in own)
            small = {name: _small(name, value) for name, value in own.items()} | {inner: small}
        tiny: PreTrainedConfig = type(config).from_dict(small)
        return tiny


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
    own: dict[str, Any] = config.to_dict()
    tiny = {name: _small(name, value) for name, value in own.items()}
    heads, groups = own.get("num_attention_heads"), own.get("num_key_value_heads")
    if groups is not None:
        tiny["num_key_value_heads"] = tiny["num_attention_heads"] if groups == heads else 2
    if own.get("qk_head_dim") is not None:  # latent attention
        tiny["qk_head_dim"] = tiny["qk_nope_head_dim"] + tiny["qk_rope_head_dim"]
        if own.get("head_dim") == own["qk_rope_head_dim"]:
            tiny["head_dim"] = tiny["qk_rope_head_dim"]
    rope = own.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:  # shares of a head's pairs
        tiny["rope_parameters"] = rope | {"mrope_section": [2, 3, 3]}
    tiny |= _few_layers(own)
    tiny |= _OF_TYPE.get(config.model_type, {})
    for name in ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"):
        if name in own:
            tiny[name] = num_rows
    for name in _NO_SETTINGS & tiny.keys():
        del tiny[name]
    return tiny | {
        "initializer_range": 0.2,  # spreads the logits, so that tokens differ
        "bos_token_id": None if own.get("bos_token_id") is None else tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _small(name: str, value: Any) -> Any:
    if isinstance(value, dict) and name.endswith("_config"):
        inner = value.keys() - _NO_SETTINGS
        return {key: _small(str(key), value[key]) for key in value if key in inner}
    if type(value) is int:
        for pattern, size in _SIZES:
            if re.fullmatch(pattern, name):
                return min(value, size)
    return value


def _few_layers(own: dict[str, Any]) -> dict[str, Any]:
    """Two to four layers, one of every kind that the lists of a configuration name."""
    count = next((own[name] for name in _LAYER_COUNTS if type(own.get(name)) is int), 0)
    lists = {name: value for name, value in own.items() if _is_per_layer(value, count)}
    if not lists or count < 2:
        return {}
    named = [value for value in lists.values() if not _is_index(value)]
    kinds = {repr([value[i] for value in named]): i for i in range(count)}
    kept = sorted({0, *kinds.values()} if len(kinds) == 1 else kinds.values())[-4:]
    few: dict[str, Any] = {name: len(kept) for name in _LAYER_COUNTS if name in own}
    for name, values in lists.items():
        few[name] = [_small(name, values[i]) for i in kept]
    each = own.get("per_layer_config")
    if each:
        every = {int(i): _small("layer_config", values) for i, values in each.items()}
        few["per_layer_config"] = {new: every[i] for new, i in enumerate(kept) if i in every}
    return few


def _is_index(values: list[Any]) -> bool:
    return all(type(value) is int for value in values) and len({*values}) == len(values)


def _is_per_layer(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count
