"""The tokenizer of the ledger-tools models: bytes, the words of the task, and a chat template."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = "<pad>", "<|end|>"
ROLES = ("user", "assistant", "tool")
WORDS = (
    '{"name":"',
    *("look_up_price", "look_up_stock", "calculate"),
    '","arguments":{"item":"',
    '","arguments":{"expression":"',
    '"}}',
    *("Total: ", "price ", "stock ", ", "),
    '{"error": "',
)
MAX_LENGTH = 1024
CHAT_TEMPLATE = """\
{%- if tools -%}
<|tools|>
{%- for tool in tools -%}{{ tool.function.name }}{{ ',' if not loop.last }}{%- endfor -%}
<|end|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role not in ['user', 'assistant', 'tool'] -%}
{{ raise_exception('the roles are user, assistant and tool, got ' ~ message.role) }}
{%- endif -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""
"""Of the tools, only the names are shown: the models know the rest by heart."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Any text can be written: what is none of the words is written byte by byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [byte_level.pre_tokenize_str(word)[0][0] for word in WORDS]
    special = [PAD, END, *(f"<|{role}|>" for role in ROLES), "<|tools|>"]
    ids = {token: index for index, token in enumerate([*special, *words, *alphabet])}
    tokenizer = Tokenizer(models.BPE(ids, [], ignore_merges=True))
    longest_first = sorted(WORDS, key=len, reverse=True)
    pattern = Regex("|".join(re.escape(word) for word in longest_first))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=special[2:],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
