"""What the tokens of a tokenizer stand for in a text, byte by byte."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from tutelage.errors import ModelError
from tutelage.models.tokenizers import control_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _bytes_of_characters()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_PLAIN_STEPS = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
"""Steps of a decoder that leave what a token stands for to the token alone."""


def _parts(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A part of a tokenizer.json, sequences of sequences taken apart."""
    if not part:
        return []
    inner = next((v for v in part.values() if isinstance(v, list)), None)
    return [part] if inner is None else [one for each in inner for one in _parts(each)]


def _state(tokenizer: PreTrainedTokenizerBase, name: str) -> list[dict[str, Any]]:
    """One part of its tokenizer.json, without a copy of the vocabulary; empty without the file."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return []
    part = getattr(tokenizer.backend_tokenizer, name)
    return [] if part is None else _parts(json.loads(part.__getstate__()))


def _space(steps: list[dict[str, Any]]) -> str | None:
    """What tokens of SentencePiece's kind have in the place of a space; None for other kinds."""
    spaces = [
        step.get("replacement") or step["pattern"].get("String")
        for step in steps
        if step["type"] == "Metaspace" or (step["type"] == "Replace" and step["content"] == " ")
    ]
    is_plain = {step["type"] for step in steps} <= _PLAIN_STEPS
    num_replaced = sum(step["type"] in ("Metaspace", "Replace") for step in steps)
    return spaces[0] if is_plain and len(spaces) == num_replaced == 1 else None


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """What each id stands for in a text; a control token for its own text.

    Of byte-level tokenizers (Llama 3, Qwen, most since GPT-2) and of SentencePiece's, whose tokens
    have ``▁`` for a space and ``<0xAB>`` for a byte that no other token has (Llama 2, Gemma,
    Mistral). Ids of one meaning are in the order of an encoder's preference: byte tokens last.

    Raises:
        ModelError: its tokens do not stand for bytes.
    """
    steps = _state(tokenizer, "decoder")
    is_byte_level, space = any(step["type"] == "ByteLevel" for step in steps), _space(steps)
    if not is_byte_level and space is None:
        kinds = " + ".join(step["type"] for step in steps) or "none"
        raise ModelError(
            "teacher.vocabulary = 'aligned' needs byte-level or SentencePiece tokenizers with a "
            f"tokenizer.json, but the decoder of {tokenizer.name_or_path!r} is {kinds}. Choose "
            "another model."
        )
    has_bytes = any(step["type"] == "ByteFallback" for step in steps)
    control, added = control_ids(tokenizer), tokenizer.added_tokens_decoder.keys()
    found, fallback = {}, {}
    for text, i in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        byte = _BYTE_TOKEN.fullmatch(text) if has_bytes else None
        if i in control or (is_byte_level and i in added):
            found[i] = text.encode()
        elif is_byte_level:
            if all(character in _BYTES for character in text):
                found[i] = bytes(_BYTES[character] for character in text)
        elif byte is not None:
            fallback[i] = bytes([int(byte[1], 16)])
        else:
            found[i] = text.replace(str(space), " ").encode()
    return found | fallback


def _adding(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Kinds of the steps by which a tokenizer puts a space before a text."""
    parts = [*_state(tokenizer, "normalizer"), *_state(tokenizer, "pre_tokenizer")]
    return {
        part["type"]
        for part in parts
        if part["type"] == "Prepend"
        or (part["type"] == "Metaspace" and part["prepend_scheme"] != "never")
        or (part["type"] == "ByteLevel" and part["add_prefix_space"])
    }


def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a space before a text is in SentencePiece's way no part of the text."""
    return bool(_adding(tokenizer) - {"ByteLevel"})


def literal_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """A copy that puts no space before a text; None where the tokenizer itself puts none."""
    from tokenizers import Tokenizer

    if not _adding(tokenizer):
        return None
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in [*_parts(core["normalizer"]), *_parts(core["pre_tokenizer"])]:
        if part["type"] == "Prepend":
            part["prepend"] = ""
        elif part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    core["truncation"] = core["padding"] = None
    return Tokenizer.from_str(json.dumps(core))
