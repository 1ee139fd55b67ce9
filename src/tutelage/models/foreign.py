"""Code of architectures, which may raise anything: one line about it, nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tutelage.errors import ModelError, TutelageError


@contextmanager
def foreign(what: str, model: object) -> Iterator[None]:
    """Turn what a model's own code raises into one line; memory that runs out stays what it is.

    Args:
        what: what failed, such as "cannot be run".
        model: whose code runs inside.

    Raises:
        ModelError: it raised something.
    """
    try:
        yield
    except (TutelageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "not enough memory" in str(error):  # what torch's allocator of main memory raises
            raise
        reason = " ".join(str(error).split())[:200].rstrip(".") or "no reason given"
        raise ModelError(
            f"{type(model).__name__} {what}: {reason} ({type(error).__name__}). "
            "Check the model's config.json and the length of its sequences."
        ) from error


def run(module: Any, **inputs: Any) -> Any:
    """The output of a module that belongs to transformers.

    Raises:
        ModelError: it cannot be computed.
    """
    with foreign("cannot be run", module):
        return module(**inputs)
