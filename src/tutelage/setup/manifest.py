"""What a run was begun with, as its manifest holds it, and whether a continuation has the same.

Besides the configuration these are the files it names: prompts, tokenizer, chat template, weights.
An edit between stop and continuation would change the run halfway, so it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from tutelage.config.parse import (
    changed_keys,
    fingerprint,
    flat_keys,
    parse_saved_config,
    to_table,
)
from tutelage.config.read import current_name
from tutelage.config.rollouts import given_path
from tutelage.config.schema import Config, FileData
from tutelage.data.formats import find_file
from tutelage.data.prompts import FileTask
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, RunError
from tutelage.models.chat.template import printed_date
from tutelage.models.load import load_model_config, load_tokenizer
from tutelage.models.reference import resolve_model
from tutelage.models.teacher_protocol import AnyTeacher
from tutelage.setup.inputs import Inputs
from tutelage.setup.run_folder import RunFolder, environment, started_at
from tutelage.teachers.group import TeacherGroup
from tutelage.teachers.hidden import ServedTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTINGS = ("config.json", "generation_config.json", "adapter_config.json")
_WEIGHTS = (".safetensors", ".safetensors.index.json")
"""Names, and endings of names, of the files that make a model, apart from its tokenizer."""
_WHOLE_BYTES, _NUM_PIECES, _PIECE_BYTES = 256 << 20, 64, 4 << 20
"""Files up to this size are digested whole, larger ones in so many pieces of so many bytes."""
_KEYS = {
    "training prompts": "data.path",
    "held-out prompts": "data.path",
    "chat template": "student.model",
    "tokenizer": "student.model",
    "student": "student.model",
    "teacher": "teacher.model",
    "rollouts": "rollouts.path",
}
"""The key that names the file of each digest."""
_FURTHER = "teacher "
"""Before the name of one of `[teachers.NAME]`, in the name of its digest."""


def refuse_another_run(
    config: Config, folder: Path, earlier: dict[str, Any] | None, allow_change: Sequence[str]
) -> None:
    """Refuses a folder with a run of another configuration.

    Args:
        config: the run.
        folder: its folder, for the message.
        earlier: manifest of the run in it that is to be continued; None for a new one.
        allow_change: keys that may differ.

    Raises:
        RunError: keys differ that may not.
        ConfigError: a key of `allow_change` does not exist.
    """
    table = to_table(config)
    allowed = set(map(current_name, allow_change))
    unknown = allowed - set(flat_keys(table))
    if unknown:
        raise ConfigError(f"--allow-change {min(unknown)!r} is no key of the configuration.")
    if earlier is None:
        return
    try:
        before = to_table(parse_saved_config(earlier["config"]))
    except ConfigError as error:
        raise RunError(
            f"run folder {folder} holds a configuration that this version cannot read: {error} "
            "Choose another out=FOLDER."
        ) from None
    changed = [key for key in changed_keys(before, table) if key not in allowed]
    if changed:
        raise RunError(
            f"run folder {folder} holds another run: {', '.join(changed)} "
            "differ. Choose another out=FOLDER, or pass --allow-change KEY."
        )


def refuse_other_inputs(
    config: Config, inputs: Inputs, earlier: dict[str, Any] | None, allow_change: Sequence[str]
) -> None:
    """Refuses prompts, a tokenizer or weights that were edited since the run began.

    Args:
        config: the run.
        inputs: what it reads before its models.
        earlier: manifest of the run that is to be continued; None for a new one.
        allow_change: keys whose files may differ.

    Raises:
        RunError: something differs; it is named with its file.
    """
    before = None if earlier is None else earlier.get("inputs")
    if not isinstance(before, dict):  # a new run, or one from before there were digests
        return
    free = {key.partition(".")[0] for key in allow_change}
    changed = [
        name
        for name, digest in input_digests(config, inputs).items()
        if before.get(name, digest) != digest and _key_of(name).partition(".")[0] not in free
    ]
    if changed:
        key = _key_of(changed[0])
        raise RunError(
            f"the {' and the '.join(changed)} of {key} = {_named(config, key)!r} changed since "
            "the run began. Restore them, choose another out=FOLDER, or pass "
            f"--allow-change {key}."
        )


def with_served(
    config: Config,
    digests: dict[str, str],
    teacher: AnyTeacher,
    earlier: dict[str, Any] | None,
    allow_change: Sequence[str],
) -> dict[str, str]:
    """The digests of a run with those of weights on servers, which are known once they answered.

    Args:
        config: the run.
        digests: its `input_digests`.
        teacher: is connected.
        earlier: manifest of the run that is to be continued; None for a new one.
        allow_change: keys whose files may differ.

    Raises:
        RunError: a server has other weights than before.
    """
    several = teacher.teachers if isinstance(teacher, TeacherGroup) else {"": teacher}
    found = {
        f"teacher {name} on its server".replace("  ", " "): one.weights
        for name, one in several.items()
        if isinstance(one, ServedTeacher) and one.weights
    }
    before = (earlier or {}).get("inputs")
    known = before if isinstance(before, dict) else {}
    free = {key.partition(".")[0] for key in allow_change}
    other = [name for name, digest in found.items() if known.get(name, digest) != digest]
    if other and free.isdisjoint(("teacher", "teachers")):
        raise RunError(
            f"the weights of the {other[0]} changed since the run began: {found[other[0]][:16]}, "
            f"before {known[other[0]][:16]}. Serve those, choose another out=FOLDER, or pass "
            "--allow-change teacher.model."
        )
    return digests | found


def manifest_of(config: Config, digests: dict[str, str], started: datetime) -> dict[str, Any]:
    """The manifest of a run.

    Args:
        config: its configuration.
        digests: its `input_digests`.
        started: when it began, the date that its chat templates print.
    """
    return {
        "config": to_table(config),
        "fingerprint": fingerprint(config),
        "started": started.isoformat(timespec="seconds"),
        "inputs": digests,
        **environment(),
    }


def _key_of(name: str) -> str:
    """The key that names the file of a digest."""
    teacher = name.removeprefix(_FURTHER)
    return _KEYS[name] if teacher == name else f"teachers.{teacher}.model"


def _named(config: Config, key: str) -> str:
    if key.startswith("teachers."):
        return config.teachers[key.removeprefix("teachers.").removesuffix(".model")].model
    if key == "data.path":
        return config.data.path if isinstance(config.data, FileData) else config.data.kind
    if key == "rollouts.path":
        return given_path(config.rollouts) or config.rollouts.source
    return config.student.model if key == "student.model" else config.teacher.model


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def at_the_date_of_the_run(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function of a request for a `model`; where that is a run, templates print its date."""

    @wraps(function)
    def dated(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        request: Any = arguments[0] if arguments else options["request"]
        folder = Path(request.model).expanduser()
        is_run = (folder / "manifest.json").is_file() and (folder / "student").is_dir()
        manifest = RunFolder(folder, is_writer=False).read_manifest() if is_run else None
        with printed_date(started_at(manifest)):
            return function(*arguments, **options)

    return dated


def input_digests(config: Config, inputs: Inputs) -> dict[str, str]:
    """SHA-256 of everything besides the configuration that decides the numbers of a run.

    A student without an adapter is left out: its checkpoints hold all of it; so is a teacher of
    which all that is needed is stored.
    """
    found: dict[str, str] = {}
    if isinstance(task := inputs.task, FileTask):
        every = len(task.pool) + len(task.held_out_prompts)
        found["training prompts"] = _prompts_digest(task.training)
        found["held-out prompts"] = _prompts_digest(task.held_out(every))
    found["chat template"] = _digest([_json(inputs.tokenizer.chat_template)])
    found["tokenizer"] = _digest(_tokenizer_parts(inputs.tokenizer))
    if config.student.lora is not None:
        found["student"] = model_digest(config.student.model)
    if inputs.has_teacher:
        found["teacher"] = _teacher_digest(config.teacher.model, inputs.teacher_tokenizer)
    for name, teacher in config.teachers.items():
        tokenizer = load_tokenizer(teacher.model)
        found[f"{_FURTHER}{name}"] = _teacher_digest(teacher.model, tokenizer)
    if (path := given_path(config.rollouts)) is not None:
        found["rollouts"] = _digest(_file_parts(find_file(path)))
    return found


def _teacher_digest(model: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return _digest([model_digest(model).encode(), _digest(_tokenizer_parts(tokenizer)).encode()])


def _prompts_digest(prompts: Iterable[Prompt]) -> str:
    return _digest(
        _json((p.id, p.content, p.answer, *(part for part in (p.tools, p.teacher) if part),
               *p.fields))
        for p in prompts
    )  # fmt: skip


def _tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> Iterable[bytes]:
    backend: Any = tokenizer.backend_tokenizer if hasattr(tokenizer, "backend_tokenizer") else None
    if backend is not None:
        yield str(backend.to_str()).encode()
    else:
        yield _json(sorted(tokenizer.get_vocab().items()))
    yield _json({name: str(token) for name, token in tokenizer.special_tokens_map.items()})


def model_digest(ref: str) -> str:
    """Of a model's files; of one on the hub, whose versions have names, the commit."""
    found = resolve_model(ref)
    if found.adapter is not None:
        base = model_digest(found.source)
        return _digest([base.encode(), *_folder_parts(Path(found.adapter))])
    if not found.is_local:
        return f"commit {load_model_config(found)._commit_hash}"
    folder = Path(found.source)
    if found.gguf_file:
        return _digest(_file_parts(folder / found.gguf_file))
    return _digest(_folder_parts(folder))


def _folder_parts(folder: Path) -> Iterable[bytes]:
    files = sorted(folder.iterdir())
    kept = [path for path in files if path.name in _SETTINGS or path.name.endswith(_WEIGHTS)]
    return (part for path in kept for part in _file_parts(path))


def _file_parts(path: Path) -> Iterable[bytes]:
    size = path.stat().st_size
    yield _json((path.name, size))
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            while part := file.read(_PIECE_BYTES):
                yield part
            return
        for piece in range(_NUM_PIECES):
            file.seek(piece * (size - _PIECE_BYTES) // (_NUM_PIECES - 1))
            yield file.read(_PIECE_BYTES)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()
