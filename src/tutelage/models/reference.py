"""Where a model reference leads: a folder, a GGUF file, an installed package or the hub."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tutelage.errors import ModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model reference leads: a folder, one GGUF file in a folder, or a hub id."""

    ref: str
    """The reference as the user wrote it."""
    source: str
    """Folder or hub id."""
    gguf_file: str | None = None
    """Name of the GGUF file inside `source`; None for a transformers folder."""
    is_local: bool = True
    """False for a hub id."""


def resolve_model(ref: str) -> ResolvedModel:
    """Find what a model reference points to, without loading it.

    Args:
        ref: A folder, a `.gguf` file, `package:NAME/sub/folder` (a folder or the only GGUF file of
            an installed package, which is not imported), or a hub id.

    Returns:
        The place to load from.

    Raises:
        ModelError: Nothing usable is there.
    """
    if ref.startswith("package:"):
        return _resolve_path(ref, _package_path(ref))
    path = Path(ref).expanduser()
    # os.path.exists: a name too long for the file system is absent, not an error
    if ref and (os.path.exists(path) or ref.endswith(".gguf")):
        return _resolve_path(ref, path)
    if _HUB_ID.fullmatch(ref) and "/" in ref:
        return ResolvedModel(ref, ref, is_local=False)
    raise ModelError(
        f"model {ref!r} does not exist. Give a folder, a .gguf file, package:NAME/folder or a "
        "hub id such as Qwen/Qwen3-0.6B."
    )


def _resolve_path(ref: str, path: Path) -> ResolvedModel:
    if path.is_file() and path.suffix == ".gguf":
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ModelError(
                f"model {ref!r} is not a GGUF file, it starts with {magic!r}. Download it again."
            )
        return ResolvedModel(ref, str(path.parent), gguf_file=path.name)
    if not path.is_dir():
        raise ModelError(f"model {ref!r} does not exist: no folder or .gguf file {path}.")
    if (path / "config.json").is_file():
        return ResolvedModel(ref, str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"model {ref!r} is not a model folder: {path} holds no config.json and "
            f"{len(files)} .gguf files. Name the folder or file that holds the model."
        )
    return _resolve_path(ref, files[0])


def _package_path(ref: str) -> Path:
    name, _, inside = ref.removeprefix("package:").partition("/")
    if not name.isidentifier() or ".." in Path(inside).parts:
        raise ModelError(f"model {ref!r} is malformed. Write package:NAME/folder/in/it.")
    # A top-level name: the package is located, none of its code runs.
    spec = importlib.util.find_spec(name)
    locations = [] if spec is None else list(spec.submodule_search_locations or [])
    if not locations:
        raise ModelError(f"model {ref!r} needs the package {name!r}. Install it with pip.")
    candidates = [Path(location) / inside for location in locations]
    return next((path for path in candidates if path.exists()), candidates[0])
