"""Records of JSON lines, parquet files and data sets, and how each becomes a prompt.

Understood as they are: the project's own records, TRL's prompt data sets (`prompt` as text or as
messages) and verl's parquet files (`prompt`, `reward_model.ground_truth`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tutelage.data.columns import (
    CHAT_AS_TEXT,
    LAST_ANSWER,
    refuse_media,
    text_of_parts,
    tools_of,
    unread,
)
from tutelage.data.hub import is_hub_reachable
from tutelage.data.types import Message, Prompt
from tutelage.errors import DataError, MissingExtraError
from tutelage.grading.answer import last_box

_CONTENT_KEYS = ("prompt", "problem", "question", "messages")
_ANSWERERS = ("assistant", "model", "gpt", "ai", "bot", "chatbot")
_FILE_ENDINGS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class PromptFormat:
    """How records become prompts."""

    prompt_column: str | None = None
    """Key of the text or messages; None takes the first of prompt, problem, question, messages."""
    answer_column: str = "answer"
    """Key of the reference answer, which a record may lack; see `to_prompt` for where else."""
    chat: bool = False
    """Wrap plain text as one user message, for the tokenizer's chat template; read JSON text of
    messages as a conversation."""
    suffix: str | None = None
    """Text added to every prompt (to the last message of a chat), such as an instruction; None
    adds what a named set asks for, and nothing to other sources."""
    removed: tuple[str, ...] = ()
    """Texts cut out of every prompt, such as another instruction that came with the data."""
    fields: tuple[str, ...] = ()
    """What else is read of every record; a column, or `answer`, the
    reference answer, and an error where a record lacks it."""
    teacher_column: str | None = None
    """Key of the teacher's name, which a record may lack."""


def find_file(name: str | Path) -> Path:
    """The file as given, else in the folder named by TUTELAGE_DATA, else in ./data.

    Raises:
        DataError: It is in none of them; all are named.
    """
    given = Path(name).expanduser()
    candidates = [given]
    if given.parent == Path("."):
        folder = os.environ.get("TUTELAGE_DATA")
        candidates += [Path(folder) / given] if folder else []
        candidates.append(Path("data") / given)
    for path in candidates:
        if os.path.isfile(path):  # a name too long for the file system is absent, not an error
            return path
    looked = ", ".join(str(path.absolute()) for path in candidates)
    raise DataError(
        f"prompt file {str(name)!r} does not exist, looked for {looked}. "
        "Correct the path or set TUTELAGE_DATA to the folder that holds it."
    )


def is_file_name(source: str | Path) -> bool:
    """Whether a source is meant as a file and not as the id of a data set."""
    path = Path(source)
    return (
        not str(source)
        or path.suffix in _FILE_ENDINGS
        or os.path.isfile(path)
        or path.is_absolute()
        or path.parts[:1] in (("..",), ("~",))
    )


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each record of a JSONL or parquet file stands, and the record.

    Raises:
        DataError: the file cannot be read; the line or row is named.
    """
    return _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: not JSON ({error}), got {excerpt(line)}. "
                "Write one JSON object on each line."
            ) from error
        yield where, record


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Check its permissions."
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if find_spec("pyarrow") is None:
        raise MissingExtraError("pyarrow", "data", f"Reading {path}")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}, row {number + 1} or after: not readable as parquet ({reason}). "
            "Download or write the file again."
        ) from error


def dataset_rows(name: str, split: str, subset: str | None) -> Iterator[tuple[str, Any]]:
    """Where each record of a hub data set stands, and the record.

    Raises:
        DataError: the data set cannot be read.
        MissingExtraError: the package `datasets` is not installed.
    """
    if find_spec("datasets") is None:
        raise MissingExtraError("datasets", "data", f"Reading the data set {name!r}")
    from datasets import load_dataset

    try:
        with _offline_unless_reachable():
            rows = load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and not is_hub_reachable():
            raise DataError(
                f"the data set {name!r} is not in the cache on this machine, and the hub cannot be "
                "reached. Check the network and the name, or give a .jsonl or .parquet file."
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"cannot read split {split!r} of the data set {name!r}: {reason} "
            "Check its name, subset and split, or give a .jsonl or .parquet file."
        ) from error
    for number, record in enumerate(rows, start=1):
        yield f"{name}[{split}], row {number}", record


@contextmanager
def _offline_unless_reachable() -> Iterator[None]:
    """Without the hub only its cache is read, at once; with it nothing changes."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not is_hub_reachable():
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def to_prompt(record: Any, where: str, default_id: str, prompt_format: PromptFormat) -> Prompt:
    """The prompt that a record holds.

    The reference answer is looked for under the answer column, then as `final_answer`
    (OlympiadBench), as `reward_model.ground_truth` (verl) and in the last box of `solution`
    (MATH). Of a worked answer such as GSM8K's, what follows the last `####` counts.

    Raises:
        DataError: the record is malformed; `where` begins the line.
    """
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: must be a JSON object, got {excerpt(record)}. "
            'Write {"prompt": ...} on each line.'
        )
    column, teacher = _content_column(record, where, prompt_format), prompt_format.teacher_column
    refuse_media(record, where)
    prompt_id = record.get("id")
    turns = _conversation(record[column])
    given = record[column] if turns is None or not prompt_format.chat else turns
    given, notes = _without_last_answer(given, f"{where}: {column!r}")
    if isinstance(given, str) and turns is not None:
        notes = (CHAT_AS_TEXT,)
    content = _content(given, f"{where}: {column!r}", prompt_format)
    tools = tools_of(record, where)
    if tools and isinstance(content, str):
        raise DataError(
            f"{where}: 'tools' need a chat, got a prompt as plain text. Set chat = true, or remove "
            "them."
        )
    name = default_id if prompt_id is None else _scalar(prompt_id, "id", where)
    answer = _answer(record, prompt_format, where)
    return Prompt(
        id=name,
        content=content,
        answer=answer,
        tools=tools,
        notes=(*notes, *unread(record, (column, *prompt_format.fields))),
        fields=_fields(record, where, name, answer, prompt_format.fields),
        teacher=_scalar(record.get(teacher or "") or "", teacher or "", where),
    )


def _fields(
    record: dict[str, Any], where: str, prompt_id: str, answer: str | None, names: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Names and texts of the columns that a teacher reads, and of the reference answer.

    Raises:
        DataError: the record lacks one.
    """
    found = {name: _scalar(record[name], name, where) for name in names if _has_text(record, name)}
    if answer is not None:
        found.setdefault("answer", answer)
    for name in names:
        if name not in found:
            there = dict.fromkeys(key for key in record if _has_text(record, key))
            raise DataError(
                f"{where}: prompt {prompt_id!r} lacks the field {name!r} that teacher.context "
                f"names; it has {_keys(there | dict.fromkeys(found))}. Add it, remove the record, "
                "or name another."
            )
    return tuple((name, found[name]) for name in names)


def _has_text(record: dict[str, Any], key: str) -> bool:
    """Whether a record has something under a key."""
    return record.get(key) not in (None, "")


def _conversation(value: Any) -> list[dict[str, Any]] | None:
    """A conversation that tables without lists hold as JSON text; None for everything else."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    is_chat = isinstance(found, list) and all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in found
    )
    return found if is_chat and found else None


def _without_last_answer(value: Any, where: str) -> tuple[Any, tuple[str, ...]]:
    """A conversation without the answer that it ends with, and what to say of it."""
    if not isinstance(value, list):
        return value, ()
    end = len(value)
    while end and isinstance(value[end - 1], dict) and _answers(value[end - 1]):
        end -= 1
    if value and not end:
        raise DataError(f"{where} has no turn but the assistant's. Add what it answers.")
    return (value, ()) if end == len(value) else (value[:end], (LAST_ANSWER,))


def _answers(turn: dict[str, Any]) -> bool:
    """Whether a turn is the model's, under any of the names that data sets give it."""
    return str(turn.get("role")).casefold() in _ANSWERERS


def _content_column(record: dict[str, Any], where: str, prompt_format: PromptFormat) -> str:
    wanted = (prompt_format.prompt_column,) if prompt_format.prompt_column else _CONTENT_KEYS
    for column in wanted:
        if record.get(column) is not None:
            return column
    raise DataError(
        f"{where}: needs one of the keys {', '.join(map(repr, wanted))}, "
        f"got {_keys(record)}. Add it or name the prompt column."
    )


def _keys(record: dict[str, Any]) -> str:
    shown = ", ".join(excerpt(key) for key in list(record)[:9]) or "no keys"
    return shown if len(record) <= 9 else f"{shown} and {len(record) - 9} more"


def _content(value: Any, where: str, prompt_format: PromptFormat) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        text = _bare(_text(value, where), where, prompt_format) + (prompt_format.suffix or "")
        return ({"role": "user", "content": text},) if prompt_format.chat else text
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be text or a list of messages, got {excerpt(value)}.")
    messages = [_message(message, where) for message in value]
    last = messages[-1]
    last["content"] = _bare(last["content"], where, prompt_format) + (prompt_format.suffix or "")
    return tuple(messages)


def _bare(text: str, where: str, prompt_format: PromptFormat) -> str:
    for removed in prompt_format.removed:
        text = text.replace(removed, "")
    return _text(text.strip(), where) if prompt_format.removed else text


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise DataError(
            f'{where}: a message must be {{"role": ..., "content": ...}}, got {excerpt(value)}.'
        )
    # Parquet gives every message all the keys that any message has.
    message = {key: text for key, text in value.items() if text is not None}
    if isinstance(message.get("content"), list):
        message["content"] = text_of_parts(message["content"], where)
    for key in ("role", "content", *message):
        if not isinstance(message.get(key), str):
            got = excerpt(message.get(key))
            raise DataError(f"{where}: {key!r} of a message must be text, got {got}.")
        refuse_half_pairs(message[key], where)
    _text(message["content"], where)
    return message


def _text(value: str, where: str) -> str:
    if not value.strip():
        raise DataError(f"{where} is empty, got {value!r}. Remove the record.")
    refuse_half_pairs(value, where)
    return value


def refuse_half_pairs(value: str, where: str) -> None:
    """Raise DataError for text that is no Unicode text, which JSON can write as escapes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} is not valid text, got half a surrogate pair at {error.start}. Remove it."
        ) from error


def _answer(record: dict[str, Any], prompt_format: PromptFormat, where: str) -> str | None:
    key, value = _answer_field(record, prompt_format.answer_column)
    if key != prompt_format.answer_column and isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    text = _scalar(value, key, where)
    if key == "solution":
        return last_box(text) or None
    return text.rpartition("####")[2].strip() if "####" in text else text


def _answer_field(record: dict[str, Any], column: str) -> tuple[str, Any]:
    """Key and value of the reference answer; (column, None) if the record has none."""
    for key in (column, "final_answer"):
        if record.get(key) is not None:
            return key, record[key]
    reward, solution = record.get("reward_model"), record.get("solution")
    if isinstance(reward, dict) and reward.get("ground_truth") is not None:
        return "reward_model.ground_truth", reward["ground_truth"]
    return ("solution", solution) if isinstance(solution, str) else (column, None)


def _scalar(value: Any, key: str, where: str) -> str:
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not is_finite:
        raise DataError(f"{where}: {key!r} must be text or a number, got {excerpt(value)}.")
    text = str(value)
    refuse_half_pairs(text, f"{where}: {key!r}")
    return text


def excerpt(value: Any) -> str:
    """A value as Python writes it, shortened to fit into one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
