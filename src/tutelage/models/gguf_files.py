"""GGUF files, parsed once a process.

transformers parses a file anew for its configuration, its tokenizer and its weights, and lists the
names of all tensors for each module of the model; both take seconds. Inside of `parsed_once` its
calls into the package `gguf` share one result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@contextmanager
def parsed_once() -> Iterator[None]:
    """While it lasts, `gguf` gives the parsed file and the names of tensors that it gave before."""
    if find_spec("gguf") is None:  # whoever needs it says so
        yield
        return
    import gguf

    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    gguf.GGUFReader, gguf.get_tensor_name_map = _read, _names(own["get_tensor_name_map"])
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(gguf, name, value)


@cache
def _names(listed: Any) -> Any:
    return lru_cache(maxsize=4)(listed)


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

    return PlainReader
