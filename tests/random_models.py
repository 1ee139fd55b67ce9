"""Tiny random models and tokenizers made on the spot; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz <|>_/\n"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<t></t>{% endif %}{% endif %}"
)


def _make_tokenizer(
    letters: str = LETTERS,
    auto_bos: bool = True,
    chat_template: str | None = CHAT_TEMPLATE,
    extra: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """One token per character; the six in angle brackets are control tokens."""
    control = ["<pad>", "<bos>", "<eos>", "<unk>", "<|start|>", "<|end|>", *extra]
    vocabulary = {token: i for i, token in enumerate([*control, *letters])}
    core = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if auto_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<|start|>", "<|end|>", *extra],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _make_qwen3(vocab_size: int, num_layers: int = 2, seed: int = 0, **options: Any) -> Any:
    """A random Qwen3 of width 32, with logits spread enough that tokens differ in probability."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
        **options,
    )
    return Qwen3ForCausalLM(config).eval()


def _make_gpt2(vocab_size: int) -> PreTrainedModel:
    """A random GPT-2: positions are absolute, and dropout is on while training."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return _make_tokenizer


@pytest.fixture(scope="session")
def make_qwen3() -> Callable[..., Any]:
    return _make_qwen3


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _make_tokenizer()


@pytest.fixture
def qwen3(tokenizer: PreTrainedTokenizerFast) -> Any:
    return _make_qwen3(len(tokenizer))


@pytest.fixture
def gpt2(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return _make_gpt2(len(tokenizer))
