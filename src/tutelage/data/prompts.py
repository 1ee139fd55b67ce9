"""Prompts from JSONL files and data sets, and the task that trains and evaluates on them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tutelage.data.grading import grade_completion
from tutelage.data.types import Message, Prompt
from tutelage.errors import ConfigError, DataError, MissingExtraError

Grader: TypeAlias = Literal["none", "number", "exact"]
GRADERS: tuple[Grader, ...] = ("none", "number", "exact")

_CONTENT_KEYS = ("prompt", "problem", "question", "messages")


@dataclass(frozen=True)
class PromptFormat:
    """How records become prompts."""

    prompt_column: str | None = None
    """Key of the text or messages; None takes the first of prompt, problem, question, messages."""
    answer_column: str = "answer"
    """Key of the reference answer, which a record may lack."""
    chat: bool = False
    """Wrap plain text as one user message, for the tokenizer's chat template."""
    suffix: str = ""
    """Text added to every prompt (to the last message of a chat), such as an instruction."""


def load_prompts(
    source: str | Path,
    prompt_format: PromptFormat | None = None,
    *,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Read prompts from a JSONL file or from a data set of the hub.

    Each line of a file is an object such as ``{"prompt": "2+2=", "answer": "4", "id": "a"}``. A
    bare file name is also looked for in the folder named by TUTELAGE_DATA and in ./data.

    Args:
        source: Path of a JSONL file, or the id of a data set (package `datasets`).
        prompt_format: Columns, chat wrapping and suffix.
        split: Split of a data set; not used for files.
        subset: Configuration of a data set (`main` for gsm8k); not used for files.
        limit: Read at most this many prompts; None reads all.

    Returns:
        Prompts in the order of the source, at least one. A record without id is named by its
        line or row number.

    Raises:
        DataError: The source is missing, empty or malformed, or repeats an id.
        MissingExtraError: A data set id without the package `datasets`.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}. Leave it out to read all.")
    rows: Iterator[tuple[str, Any]]
    if _is_file_name(source):
        path = find_file(source)
        name, rows = path.stem, _file_rows(path)
    else:
        name, rows = str(source), _dataset_rows(str(source), split, subset)
    prompts: dict[str, Prompt] = {}
    for number, (where, record) in enumerate(rows, start=1):
        prompt = _prompt(record, where, f"{name}/{number}", prompt_format or PromptFormat())
        if prompt.id in prompts:
            raise DataError(
                f"{where}: id {prompt.id!r} was used before. Give every prompt its own."
            )
        prompts[prompt.id] = prompt
        if len(prompts) == limit:
            break
    if not prompts:
        raise DataError(f"{source} holds no prompts, got an empty source. Add at least one.")
    return list(prompts.values())


def load_completions(
    path: str | Path, prompt_format: PromptFormat | None = None
) -> list[tuple[Prompt, str | list[int]]]:
    """Read prompts with given completions from a JSONL file.

    Each line is an object such as ``{"prompt": "2+2=", "completion": "4"}``, or has
    `completion_ids`, a list of token ids. A prompt may repeat.

    Args:
        path: JSONL file, looked for like that of `load_prompts`.
        prompt_format: Columns, chat wrapping and suffix of the prompts.

    Returns:
        Each prompt with its completion as text or as ids, at least one.

    Raises:
        DataError: The file is missing, empty or malformed; the line is named.
    """
    found = find_file(path)
    pairs: list[tuple[Prompt, str | list[int]]] = []
    for number, (where, record) in enumerate(_file_rows(found), start=1):
        prompt = _prompt(record, where, f"{found.stem}/{number}", prompt_format or PromptFormat())
        pairs.append((prompt, _completion(record, where)))
    if not pairs:
        raise DataError(f"{found} holds no completions, got an empty file. Add at least one.")
    return pairs


def _completion(record: dict[str, Any], where: str) -> str | list[int]:
    text, ids = record.get("completion"), record.get("completion_ids")
    if isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids):
        return ids
    if isinstance(text, str) and text and ids is None:
        return text
    raise DataError(
        f"{where}: needs a completion with at least one token, got "
        f"{_excerpt(text if ids is None else ids)}. Write completion (text) or completion_ids."
    )


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
        if path.is_file():
            return path
    looked = ", ".join(str(path.absolute()) for path in candidates)
    raise DataError(
        f"prompt file {str(name)!r} does not exist, looked for {looked}. "
        "Correct the path or set TUTELAGE_DATA to the folder that holds it."
    )


@dataclass(frozen=True)
class FileTask:
    """A task over a list of prompts: shuffled epochs for training, a fixed held-out part.

    Without held-out prompts of its own the task sets apart the last `num_held_out` of a seeded
    permutation. Training never gives a prompt whose content is also held out.
    """

    name: str
    """Name in configurations, logs and reports."""
    pool: tuple[Prompt, ...] = field(repr=False)
    """Training prompts, and held-out prompts unless `held_out_prompts` gives them."""
    grader: Grader = "none"
    """none: no grading; number: the final answer as a number; exact: the text itself."""
    num_held_out: int = 0
    """Prompts set apart for evaluation; 0 evaluates on `held_out_prompts` or not at all."""
    held_out_prompts: tuple[Prompt, ...] = field(default=(), repr=False)
    """Evaluation prompts from a file of their own."""
    split_seed: int = 0
    """Decides which prompts are set apart; training seeds do not."""

    def __post_init__(self) -> None:
        if self.grader not in GRADERS:
            raise ConfigError(
                f"task.grader must be one of {', '.join(GRADERS)}, got {self.grader!r}. Choose one."
            )
        if self.num_held_out < 0:
            raise ConfigError(
                f"task.num_held_out must be at least 0, got {self.num_held_out}. Use 0 for none."
            )
        if self.num_held_out and self.held_out_prompts:
            raise ConfigError(
                f"task.num_held_out must be 0 with a held-out file, got {self.num_held_out}. "
                "Use one of the two."
            )
        if not self._training:
            raise DataError(
                f"task {self.name!r} has no training prompts left of {len(self.pool)}. "
                "Lower num_held_out or add prompts."
            )

    def prompts(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        """Training prompts of one step: a pure function of its arguments.

        Steps of equal size walk through shuffled epochs: every prompt once, then again in another
        order. What step 1 gives therefore depends on `num_prompts`, unlike in a generated task.
        """
        start = step * num_prompts
        return [self._at(index, seed) for index in range(start, start + num_prompts)]

    def held_out(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """The first `num_prompts` held-out prompts (fewer if there are fewer), in an order by seed.

        Seed 0 keeps the order of the held-out part.
        """
        if seed == 0:
            return list(self._held_out[:num_prompts])
        order = _permutation(len(self._held_out), "held-out", seed)
        return [self._held_out[i] for i in order[:num_prompts]]

    def grade(self, prompt: Prompt, text: str) -> bool | None:
        """Whether a completion is right; None without a grader or without a reference answer."""
        if prompt.answer is None or self.grader == "none":
            return None
        if self.grader == "exact":
            return text.strip() == prompt.answer.strip()
        return grade_completion(text, prompt.answer)

    @cached_property
    def _split(self) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
        order = _permutation(len(self.pool), "split", self.split_seed)
        cut = max(0, len(order) - self.num_held_out)
        held_out = self.held_out_prompts or tuple(self.pool[i] for i in order[cut:])
        seen = {_content_key(prompt) for prompt in held_out}
        chosen = (self.pool[i] for i in sorted(order[:cut]))
        return tuple(p for p in chosen if _content_key(p) not in seen), held_out

    @property
    def _training(self) -> tuple[Prompt, ...]:
        return self._split[0]

    @property
    def _held_out(self) -> tuple[Prompt, ...]:
        return self._split[1]

    def _at(self, index: int, seed: int) -> Prompt:
        epoch, place = divmod(index, len(self._training))
        return self._training[self._epoch_order(seed, epoch)[place]]

    def _epoch_order(self, seed: int, epoch: int) -> list[int]:
        if (seed, epoch) not in self._orders:
            self._orders.clear()
            self._orders[seed, epoch] = _permutation(len(self._training), "epoch", seed, epoch)
        return self._orders[seed, epoch]

    @cached_property
    def _orders(self) -> dict[tuple[int, int], list[int]]:
        """The order of the epoch in use, so that a step need not shuffle once per prompt."""
        return {}


def _is_file_name(source: str | Path) -> bool:
    path = Path(source)
    return (
        path.suffix in (".jsonl", ".json")
        or path.is_file()
        or path.is_absolute()
        or path.parts[:1] in (("..",), ("~",))
    )


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each record stands, and the record."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: not JSON ({error}), got {_excerpt(line)}. "
                    "Write one JSON object on each line."
                ) from error
            yield where, record


def _dataset_rows(name: str, split: str, subset: str | None) -> Iterator[tuple[str, Any]]:
    if find_spec("datasets") is None:
        raise MissingExtraError("datasets", "data", f"Reading the data set {name!r}")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"cannot read split {split!r} of the data set {name!r}: {reason} "
            "Check its name, subset and split, or give a .jsonl file."
        ) from error
    for number, record in enumerate(rows, start=1):
        yield f"{name}[{split}], row {number}", record


def _prompt(record: Any, where: str, default_id: str, prompt_format: PromptFormat) -> Prompt:
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: must be a JSON object, got {_excerpt(record)}. "
            'Write {"prompt": ...} on each line.'
        )
    column = _content_column(record, where, prompt_format)
    prompt_id = record.get("id")
    return Prompt(
        id=default_id if prompt_id is None else _scalar(prompt_id, "id", where),
        content=_content(record[column], f"{where}: {column!r}", prompt_format),
        answer=_answer(record.get(prompt_format.answer_column), prompt_format, where),
    )


def _content_column(record: dict[str, Any], where: str, prompt_format: PromptFormat) -> str:
    wanted = (prompt_format.prompt_column,) if prompt_format.prompt_column else _CONTENT_KEYS
    for column in wanted:
        if record.get(column) is not None:
            return column
    raise DataError(
        f"{where}: needs one of the keys {', '.join(map(repr, wanted))}, "
        f"got {', '.join(map(repr, record)) or 'no keys'}. Add it or name the prompt column."
    )


def _content(value: Any, where: str, prompt_format: PromptFormat) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        text = _text(value, where) + prompt_format.suffix
        return ({"role": "user", "content": text},) if prompt_format.chat else text
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be text or a list of messages, got {_excerpt(value)}.")
    messages = [_message(message, where) for message in value]
    messages[-1]["content"] += prompt_format.suffix
    return tuple(messages)


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise DataError(
            f'{where}: a message must be {{"role": ..., "content": ...}}, got {_excerpt(value)}.'
        )
    for key, text in value.items():
        if not isinstance(text, str):
            raise DataError(f"{where}: {key!r} of a message must be text, got {_excerpt(text)}.")
    _text(value["content"], where)
    return dict(value)


def _text(value: str, where: str) -> str:
    if not value.strip():
        raise DataError(f"{where} is empty, got {value!r}. Remove the record.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} is not valid text, got half a surrogate pair at {error.start}. Remove it."
        ) from error
    return value


def _answer(value: Any, prompt_format: PromptFormat, where: str) -> str | None:
    return None if value is None else _scalar(value, prompt_format.answer_column, where)


def _scalar(value: Any, key: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: {key!r} must be text or a number, got {_excerpt(value)}.")
    return str(value)


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _content_key(prompt: Prompt) -> str:
    return json.dumps(prompt.content)


def _permutation(length: int, *key: object) -> list[int]:
    order = list(range(length))
    random.Random(repr(key)).shuffle(order)
    return order
