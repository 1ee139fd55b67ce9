"""`tutelage push`: upload the exported student of a run to the Hugging Face hub, with its card."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from tutelage.errors import RunError
from tutelage.setup.run_folder import RunFolder

_CARD = "README.md"


def run(arguments: argparse.Namespace, make_api: Callable[[], Any] = HfApi) -> int:
    """Upload `student/` of a run folder, and print its address.

    Args:
        arguments: of the command.
        make_api: what talks to the hub.

    Raises:
        RunError: nothing was exported, the card lacks what the hub asks for, or the hub refuses.
    """
    student = Path(arguments.run_folder) / "student"
    if not (student / _CARD).is_file():
        raise RunError(
            f"{student} has no exported student with a {_CARD}. Name the folder of a run that has "
            "ended, or whose student was exported."
        )
    card = ModelCard.load(student / _CARD)
    named = {"license": arguments.license, "base_model": arguments.base_model}
    for key, value in named.items():
        if value is not None:
            setattr(card.data, key, value)
    missing = [f"--{key.replace('_', '-')}" for key in named if not getattr(card.data, key)]
    if missing:
        raise RunError(
            f"the card of {student} lacks what the hub shows of a model, which no run records: "
            f"add {' and '.join(missing)}."
        )
    manifest = RunFolder(student.parent).read_manifest() or {"config": {}}
    card.data.datasets = arguments.dataset or _datasets(manifest["config"].get("data", {}))
    try:
        api = make_api()
        address = api.create_repo(arguments.repository, private=arguments.private, exist_ok=True)
        place = {"repo_id": arguments.repository}
        api.upload_folder(folder_path=str(student), ignore_patterns=[_CARD], **place)
        api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo=_CARD, **place)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"{arguments.repository} was not uploaded: {reason.rstrip('.')}. The key comes from "
            "HF_TOKEN or `hf auth login`, and needs the right to write."
        ) from None
    print(address)
    return 0


def _datasets(data: dict[str, Any]) -> list[str] | None:
    """The hub id of a run's prompts, where they are a data set of the hub."""
    path = str(data.get("path", ""))
    is_id = path.count("/") == 1 and not Path(path).suffix and not Path(path).exists()
    return [path] if is_id else None
