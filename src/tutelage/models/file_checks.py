"""What a model's files claim, checked against stated bounds before anything is built from it."""

from __future__ import annotations

import json
import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import nn

from tutelage.errors import ModelError
from tutelage.models.reference import ResolvedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_ID = (1 << 24) - 1
"""The tokenizer library makes a table up to the largest id; 2³¹ takes it a minute and 50 GB."""

_LONG_NUMBER = re.compile(rb":\s*[0-9]{8}")
_NUM_LAYERS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers"}
_SIZES = {"vocab_size", "hidden_size", "intermediate_size", "head_dim"}
_SIZES |= {"num_attention_heads", "num_key_value_heads"}
_COUNTS = {"num_experts", "num_local_experts", "n_routed_experts"}
"""Sizes that may be 0."""
_CONSTANTS = {"masked_bias", "causal_mask", "inv_freq", "original_inv_freq", "position_ids"}
_CONSTANTS |= {"embed_positions", "cos_cached", "sin_cached"}
"""Buffers that older versions of transformers saved among the weights."""
_GGUF_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _ARRAY = 8, 9
_LONGEST_KEY = 1 << 16


def refuse_large_ids(found: ResolvedModel) -> None:
    """A tokenizer with an id beyond `LARGEST_ID`.

    Raises:
        ModelError: it has one.
        OSError, ValueError: a file cannot be read; so says the one who loads it.
    """
    if not found.is_local or found.gguf_file is not None:
        return
    for path in (Path(found.source) / name for name in ("tokenizer.json", "vocab.json")):
        content = path.read_bytes() if path.is_file() else b""
        if not _LONG_NUMBER.search(content):  # as a rule: parsing takes much longer
            continue
        table = json.loads(content)
        vocabulary = table["model"]["vocab"] if path.name == "tokenizer.json" else table
        ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
        largest = max((i for i in ids if isinstance(i, int)), default=0)
        if largest > LARGEST_ID:
            raise ModelError(
                f"the tokenizer {found.ref!r} has the id {largest}, but {LARGEST_ID} is the "
                f"largest that is read. Correct {path.name}."
            )


def refuse_parts_elsewhere(found: ResolvedModel) -> None:
    """An index of weights that leads out of its folder.

    Raises:
        ModelError: it names a file that does not lie beside it.
        OSError, ValueError: it cannot be read; so says the one who loads it.
    """
    if not found.is_local or found.gguf_file is not None:
        return
    # A configuration may name any of them.
    for index in sorted(Path(found.source).rglob("*.safetensors.index.json")):
        table = json.loads(index.read_text(encoding="utf-8"))
        parts = table.get("weight_map") if isinstance(table, dict) else None
        for name in sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else ():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ModelError(
                    f"model {found.ref!r} takes weights from {name!r}, outside its folder. "
                    f"Correct {index.name}."
                )


def refuse_missing_layers(found: ResolvedModel) -> None:
    """More layers claimed than there are tensors, or none: all of them would be built first.

    Raises:
        ModelError: config.json or the settings of a GGUF file claim that.
        OSError, SafetensorError: a file cannot be read.
    """
    if not found.is_local:
        return
    try:
        num_tensors, claims = _gguf_claims(found) if found.gguf_file else _config_claims(found)
    except (ValueError, struct.error):
        return  # the settings cannot be read, which is said before anything is built
    wrong = [claim for claim in claims if not 0 < claim <= num_tensors]
    if wrong:
        raise ModelError(
            f"model {found.ref!r} claims {wrong[0]} layers (num_hidden_layers) but has "
            f"{num_tensors} tensors. Correct its settings or download it again."
        )


def refuse_large_sizes(found: ResolvedModel) -> None:
    """A width, a vocabulary or a number of heads beyond any tensor: all would be built first.

    Raises:
        ModelError: config.json claims that, or nothing at all where there has to be something.
        OSError, SafetensorError: a file cannot be read.
    """
    if not found.is_local or found.gguf_file is not None:
        return
    shapes = [shape for _, shape in _shapes(Path(found.source))]
    largest = max((size for shape in shapes for size in shape), default=0)
    largest = max(largest, len(shapes))
    try:
        config = json.loads((Path(found.source) / "config.json").read_text("utf-8"))
    except ValueError:
        return  # which is said before anything is built
    for table in (config, config.get("text_config")) if shapes and isinstance(config, dict) else ():
        for name, value in table.items() if isinstance(table, dict) else ():
            least = 1 if name in _SIZES else 0
            known = name in _SIZES or name in _COUNTS
            if known and isinstance(value, int) and not least <= value <= largest:
                raise ModelError(
                    f"model {found.ref!r} claims {name} = {value}, but the largest size of its "
                    f"tensors is {largest}. Correct config.json or download it again."
                )


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    for path in filter(Path.is_file, sorted(folder.glob("*.safetensors"))):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 -- not a dictionary
                yield name, weights.get_slice(name).get_shape()


def _config_claims(found: ResolvedModel) -> tuple[int, list[int]]:
    folder = Path(found.source)
    num_tensors = sum(1 for _ in _shapes(folder))
    if not num_tensors:
        return 0, []  # no file of weights, which is said before anything is built
    return num_tensors, list(_layers_of(json.loads((folder / "config.json").read_text("utf-8"))))


def _gguf_claims(found: ResolvedModel) -> tuple[int, list[int]]:
    path = Path(found.source) / str(found.gguf_file)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        settings = _GGUFSettings(content)
        return settings.num_tensors, list(settings.block_counts())


def _layers_of(config: object) -> Iterator[int]:
    """Numbers of layers in a configuration and those that it is made of."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key in _NUM_LAYERS and isinstance(value, int):
            yield value
        elif key.endswith("_config"):
            yield from _layers_of(value)


class _GGUFSettings:
    """Walks the settings at the head of a GGUF file; struct.error where it ends too early."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._order = "<" if any(content[4:6]) else ">"  # of the version, a small number
        self._at = 8
        self.num_tensors = self._number("Q")
        self._num_settings = self._number("Q")

    def block_counts(self) -> Iterator[int]:
        """Every number of layers; a text that looks like one is none."""
        for _ in range(self._num_settings):
            key, kind = self._text(), self._number("I")
            value = self._value(kind)
            if key.endswith(b".block_count") and value is not None:
                yield value

    def _number(self, kind: str) -> int:
        (value,) = struct.unpack_from(self._order + kind, self._content, self._at)
        self._at += struct.calcsize("=" + kind)
        return int(value)

    def _text(self) -> bytes:
        length = self._number("Q")
        start, self._at = self._at, self._at + length
        return self._content[start : self._at] if length < _LONGEST_KEY else b""

    def _value(self, kind: int) -> int | None:
        """A whole number; anything else is passed over."""
        if kind == _TEXT:
            self._text()
        elif kind == _ARRAY:
            inner, length = self._number("I"), self._number("Q")
            if inner in _GGUF_NUMBERS:
                self._at += length * struct.calcsize("=" + _GGUF_NUMBERS[inner])
            else:
                for _ in range(length):
                    self._value(inner)
        elif kind in _GGUF_NUMBERS:
            code = _GGUF_NUMBERS[kind]
            if code not in "fd":
                return self._number(code)
            self._at += struct.calcsize("=" + code)
        else:
            raise ValueError(f"settings of an unknown kind {kind}")
        return None


class no_panic:
    """Turn a panic of the Rust tokenizer library into one line.

    A pattern that matches a text in too many ways is one: the tokenizer's file is to blame. The
    library has said its own on standard error by then.

    Raises:
        ModelError: the library panicked.
    """

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = tokenizer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        # no subclass of Exception, and no class that could be imported
        if kind is not None and kind.__name__ == "PanicException":
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise ModelError(
                f"the tokenizer {self._tokenizer!r} cannot encode a text: {reason}. Its patterns "
                "are invalid or take too long; use another tokenizer.json."
            ) from None


def refuse_unread_weights(
    found: ResolvedModel, model: PreTrainedModel, names: Iterable[str]
) -> None:
    """Weights of layers that the model has, or would have, and which it leaves out.

    A config.json of another model, scales of quantised weights without their settings, a bias that
    the architecture lacks, or an adapter saved among the weights: transformers reads what it knows
    and goes on, with other numbers. What belongs to no layer (heads for a reward or for several
    tokens, towers for pictures) changes nothing of what the model says, nor do masks and tables of
    positions that older versions saved (GPT-2, GPT-J, GPT-Neo, CodeGen).

    Args:
        found: the model, for the message.
        model: as it was loaded.
        names: weights in its files that were not used.

    Raises:
        ModelError: there are some.
    """
    modules = dict(model.named_modules())
    unread = sorted(name for name in names if _is_of_a_layer(name, modules, model))
    shapes = dict(_shapes(Path(found.source))) if unread and found.is_local else {}
    unread = [name for name in unread if not _is_constant(name, shapes.get(name))]
    if unread:
        raise ModelError(
            f"model {found.ref!r} has {len(unread)} weights that {type(model).__name__} does not "
            f"use, first {unread[0]!r}. Its config.json belongs to other weights, or lacks their "
            "quantization."
        )


def _is_of_a_layer(name: str, modules: Mapping[str, nn.Module], model: PreTrainedModel) -> bool:
    parts = name.split(".")
    places = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    place = next((place for place in places if place in modules), "")
    if isinstance(modules[place], nn.ModuleList):  # a layer more; some predict several tokens
        return not vars(model.config.get_text_config()).get("num_nextn_predict_layers")
    is_part = any(part.isdigit() for part in place.split("."))
    return is_part or (bool(place) and not any(modules[place].children()))


def _is_constant(name: str, shape: list[int] | None) -> bool:
    """Whether numbers follow from a model's settings; the shape is not known of a hub id."""
    parts = name.split(".")
    if parts[-1] in _CONSTANTS:
        return True
    is_mask = shape is None or (len(shape) == 4 and shape[:2] == [1, 1] and shape[2] == shape[3])
    return is_mask and parts[-2:] in (["attn", "bias"], ["attention", "bias"])
