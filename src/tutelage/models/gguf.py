"""GGUF files, parsed once a process.

transformers parses a file anew for its configuration, its tokenizer and its weights, and lists the
names of all tensors for each module of the model; both take seconds. Inside of `parsed_once` its
calls into the package `gguf` share one result, texts are decoded as a whole and not byte by byte,
and weights are unpacked in pieces that fit a cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from struct import Struct
from typing import Any

_PIECE_BYTES = 1 << 16
"""Packed bytes that are unpacked at once."""


@contextmanager
def parsed_once() -> Iterator[None]:
    """While it lasts, `gguf` gives the parsed file and the names of tensors that it gave before."""
    if find_spec("gguf") is None:  # whoever needs it says so
        yield
        return
    import gguf
    from gguf import quants
    from transformers import modeling_gguf_pytorch_utils as reading

    quick: dict[tuple[Any, str], Any] = {
        (gguf, "GGUFReader"): lambda own: _read,
        (gguf, "get_tensor_name_map"): _names,
        (quants, "_apply_over_grouped_rows"): lambda own: _piecewise,
        (reading, "_gguf_parse_value"): _with_quick_texts,
    }
    before = {place: getattr(*place) for place in quick if hasattr(*place)}
    for (module, name), own in before.items():
        setattr(module, name, quick[module, name](own))
    try:
        yield
    finally:
        for (module, name), own in before.items():
            setattr(module, name, own)


@cache
def _names(listed: Any) -> Any:
    return lru_cache(maxsize=4)(listed)


def _with_quick_texts(parse: Any) -> Any:
    """`parse` of a value of a file, for all but the texts of a list."""

    def value(part: Any, types: Any) -> Any:
        return str(part, "utf-8") if isinstance(part, memoryview) else parse(part, types)

    return value


def _piecewise(func: Any, arr: Any, otype: Any, oshape: tuple[int, ...]) -> Any:
    """Rows of blocks unpacked piece by piece into one array; every block stands for itself."""
    import numpy

    rows = arr.reshape(-1, arr.shape[-1])
    out = numpy.empty(oshape, otype).reshape(len(rows), -1)
    size = max(1, _PIECE_BYTES // max(1, rows.shape[1]))
    for start in range(0, len(rows), size):
        out[start : start + size] = func(rows[start : start + size])
    return out.reshape(oshape)


def _read(path: str | Path) -> Any:
    file = Path(path).resolve()
    stat = file.stat()
    return _parsed(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2)
def _parsed(file: Path, size: int, changed_ns: int) -> Any:
    """The parsed file in that state; the two of a pair are kept."""
    return _plain_reader()(file)


@cache
def _plain_reader() -> Any:
    from gguf.constants import GGUFValueType
    from gguf.gguf_reader import GGUFReader
    from numpy import asarray

    class PlainReader(GGUFReader):  # type: ignore[misc]
        """Slices the mapped file as a plain array: a third of the time and half of the memory."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = asarray(mapped)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, Any, Any, Any]:
            """Lists, which are vocabularies, are cut in one pass; their texts are `memoryview`s."""
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
            head = [self._get(orig_offs, "u4"), self._get(orig_offs + 4, "u8")]
            kind, count, start = GGUFValueType(head[0][0]), int(head[1][0]), orig_offs + 12
            if kind == GGUFValueType.STRING:
                parts, end = _texts(self._plain, start, count, self.byte_order)
                places = range(3, 2 + len(parts), 2)
            elif kind in self.gguf_scalar_to_np:
                values = self._get(start, self.gguf_scalar_to_np[kind], count)
                parts = [values[i : i + 1] for i in range(len(values))]
                end, places = start + values.nbytes, range(2, 2 + len(parts))
            else:
                return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
            types = [GGUFValueType.ARRAY, *[kind] * bool(parts)]
            return end - orig_offs, [*head, *parts], list(places), types

    return PlainReader


def _texts(content: Any, at: int, count: int, byte_order: str) -> tuple[list[memoryview], int]:
    """Lengths and texts of `count` texts from `at` on, in turn, and where they end."""
    is_little = (sys.byteorder == "little") == (byte_order == "I")
    number, view = Struct("<Q" if is_little else ">Q"), memoryview(content)
    parts = []
    for _ in range(count):
        start = at + number.size
        end = start + number.unpack_from(view, at)[0]
        parts += [view[at:start], view[start:end]]
        at = end
    return parts, at
