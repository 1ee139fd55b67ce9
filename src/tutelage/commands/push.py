"""`tutelage push`: upload the exported student of a run to the Hugging Face hub, with its card."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from tutelage.data.formats import is_file_name
from tutelage.data.suites import SETS
from tutelage.errors import RunError
from tutelage.setup.run_folder import RunFolder

_CARD = "README.md"


def run(arguments: argparse.Namespace, make_api: Callable[[], Any] = HfApi) -> int:
    """Upload `student/` of a run folder, and print its address.

    Args:
        arguments: of the command.
        make_api: what talks to the hub.

    Raises:
        RunError: nothing was exported, the card lacks what the hub asks for, the hub refuses, or
            the repository is public and was to be private.
    """
    student = Path(arguments.run_folder) / "student"
    if not (student / _CARD).is_file():
        raise RunError(
            f"{student} has no exported student with a {_CARD}. Name the folder of a run that has "
            "ended, or whose student was exported."
        )
    card = _card(student / _CARD)
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
    card.data.datasets = arguments.dataset or _datasets(manifest["config"].get("data"))
    print(_uploaded(make_api, arguments.repository, arguments.private, student, card))
    return 0


def _uploaded(
    make_api: Callable[[], Any], repository: str, is_private: bool, student: Path, card: Any
) -> str:
    """Upload the folder and the card; returns the address of the repository."""
    try:
        api = make_api()
        address = api.create_repo(repository, private=is_private, exist_ok=True)
        # one that was there stays as it is, whatever was asked for
        if is_private and not api.model_info(repository).private:
            raise RunError(
                f"{repository} is there and public, and --private was asked for: nothing was "
                "uploaded. Make it private on the hub, name another, or leave --private out."
            )
        api.upload_folder(repo_id=repository, folder_path=str(student), ignore_patterns=[_CARD])
        content = str(card).encode()
        api.upload_file(repo_id=repository, path_or_fileobj=content, path_in_repo=_CARD)
    except RunError:
        raise
    except Exception as error:  # the library's own, those of its transport and of the disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise RunError(
            f"{repository!r} was not uploaded: {reason}. The key comes from HF_TOKEN or "
            "`hf auth login`, and needs the right to write; the same command tries again."
        ) from None
    return str(address)


def _card(path: Path) -> Any:
    try:
        return ModelCard.load(path)
    except Exception as error:  # of the library, its reader of YAML, and the disk
        what = " ".join(str(error).split())
        raise RunError(
            f"{path} is no model card: {what.rstrip('.')}. Mend its header between the lines of "
            "---, or start `tutelage train` again with student/ removed, which exports it."
        ) from None


def _datasets(data: Any) -> list[str] | None:
    """The hub id of a run's prompts, where they are a data set of the hub."""
    path = str(data.get("path", "")) if isinstance(data, dict) else ""
    if path in SETS:
        return [SETS[path].dataset]
    is_id = path.count("/") == 1 and not is_file_name(path) and not Path(path).exists()
    return [path] if is_id else None
