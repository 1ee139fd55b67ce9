"""The tiny random models and tokenizers that these tests share."""

from random_models import gpt2, make_qwen3, make_tokenizer, qwen3, tokenizer

__all__ = ["gpt2", "make_qwen3", "make_tokenizer", "qwen3", "tokenizer"]
