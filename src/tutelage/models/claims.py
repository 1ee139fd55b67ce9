"""What a model's files claim, checked against stated bounds before anything is built from it."""

from __future__ import annotations

import json
import mmap
import re
import struct
from pathlib import Path, PurePosixPath

from tutelage.errors import ModelError
from tutelage.models.reference import ResolvedModel

LARGEST_ID = (1 << 24) - 1
"""The tokenizer library makes a table up to the largest id; 2³¹ takes it a minute and 50 GB."""

_LONG_NUMBER = re.compile(rb":\s*[0-9]{8}")
_BLOCKS = re.compile(rb"\.block_count(?:[\4\5]\0\0\0(.{4})|[\12\13]\0\0\0(.{8}))", re.DOTALL)


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
    """A GGUF file that claims more layers than it has tensors: all of them would be built.

    Raises:
        ModelError: it does.
        OSError, ValueError: it cannot be read; so says the one who loads it.
    """
    if found.gguf_file is None:
        return
    path = Path(found.source) / found.gguf_file
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        (num_tensors,) = struct.unpack("<Q", content[8:16].ljust(8, b"\0"))
        claim = _BLOCKS.search(content)
        if claim is None:
            return
        num_layers = int.from_bytes(claim[1] or claim[2], "little")
    if num_layers > num_tensors:
        raise ModelError(
            f"model {found.ref!r} claims {num_layers} layers but has {num_tensors} tensors. "
            "Download it again."
        )


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
