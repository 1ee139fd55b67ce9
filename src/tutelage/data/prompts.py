"""Prompts from files, data sets and named sets, and the task that trains and evaluates on them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tutelage.data.formats import (
    PromptFormat,
    dataset_rows,
    excerpt,
    file_rows,
    find_file,
    is_file_name,
    refuse_half_pairs,
    to_prompt,
)
from tutelage.data.suites import SETS, NamedSet
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, DataError
from tutelage.grading.answer import after_thoughts
from tutelage.grading.mathematics import grade_completion
from tutelage.grading.number import grade_number, is_number

__all__ = ["GRADERS", "FileTask", "Grader", "PromptFormat", "find_file", "load_prompts"]

Grader: TypeAlias = Literal["none", "number", "math", "exact"]
GRADERS: tuple[Grader, ...] = ("none", "number", "math", "exact")


def load_prompts(
    source: str | Path,
    prompt_format: PromptFormat | None = None,
    *,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Read prompts from a JSONL or parquet file, a named set or a data set of the hub.

    Each line of a file is an object such as ``{"prompt": "2+2=", "answer": "4", "id": "a"}``. A
    bare file name is also looked for in the folder named by TUTELAGE_DATA and in ./data.

    Args:
        source: Path of a JSONL or parquet file, a name of `suites.SETS` such as gsm8k or
            dapo-math-17k, or the id of a data set (package `datasets`).
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
    columns = prompt_format or PromptFormat()
    if str(source) in SETS and not is_file_name(source):
        named = SETS[str(source)]
        suffix = named.suffix if columns.suffix is None else columns.suffix
        columns = replace(columns, suffix=suffix, removed=named.removed)
        prompts = _named_prompts(str(source), named, columns)
    elif is_file_name(source):
        path = find_file(source)
        prompts = _read(file_rows(path), path.stem, columns)
    else:
        prompts = _read(dataset_rows(str(source), split, subset), str(source), columns)
    taken: dict[str, Prompt] = {}
    for where, prompt in prompts:
        if prompt.id in taken:
            raise DataError(
                f"{where}: id {prompt.id!r} was used before. Give every prompt its own."
            )
        taken[prompt.id] = prompt
        if len(taken) == limit:
            break
    if not taken:
        raise DataError(f"{source} holds no prompts, got an empty source. Add at least one.")
    return list(taken.values())


_Located: TypeAlias = Iterator[tuple[str, Prompt]]
"""Where each prompt stands, and the prompt."""


def _read(rows: Iterable[tuple[str, Any]], name: str, columns: PromptFormat) -> _Located:
    for number, (where, record) in enumerate(rows, start=1):
        yield where, to_prompt(record, where, f"{name}/{number}", columns)


def _named_prompts(name: str, named: NamedSet, columns: PromptFormat) -> _Located:
    path = named.local_file()
    rows = file_rows(path) if path else _hub_rows(name, named)
    located = _read(rows, path.stem if path else name, columns)
    return _distinct(located) if named.has_repeats else located


def _hub_rows(name: str, named: NamedSet) -> Iterator[tuple[str, Any]]:
    try:
        yield from dataset_rows(named.dataset, named.split, named.subset)
    except (DataError, ImportError) as error:
        raise DataError(
            f"{name} is not here: no {' or '.join(named.files)} in $TUTELAGE_DATA or ./data, and "
            f"{named.dataset!r} could not be read ({' '.join(str(error).split())[:120]}). Put its "
            'problems there as JSON lines {"problem": ..., "answer": ...}, or allow the download.'
        ) from error


def _distinct(located: _Located) -> _Located:
    seen: set[str] = set()
    for where, prompt in located:
        if (key := content_key(prompt)) not in seen:
            seen.add(key)
            yield where, prompt


def fitting_grader(prompts: Iterable[Prompt]) -> Grader:
    """`number` when every reference answer is a number, else `math`."""
    answers = (prompt.answer for prompt in prompts if prompt.answer is not None)
    return "number" if all(map(is_number, answers)) else "math"


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
    for number, (where, record) in enumerate(file_rows(found), start=1):
        prompt = to_prompt(record, where, f"{found.stem}/{number}", prompt_format or PromptFormat())
        pairs.append((prompt, completion_of(record, where)))
    if not pairs:
        raise DataError(f"{found} holds no completions, got an empty file. Add at least one.")
    return pairs


def completion_of(record: dict[str, Any], where: str) -> str | list[int]:
    """The completion of a record of a file, as text or as ids.

    Raises:
        DataError: it has none with at least one token.
    """
    text, ids = record.get("completion"), record.get("completion_ids")
    if isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids):
        return ids
    if isinstance(text, str) and text and ids is None:
        refuse_half_pairs(text, f"{where}: 'completion'")
        return text
    raise DataError(
        f"{where}: needs a completion with at least one token, got "
        f"{excerpt(text if ids is None else ids)}. Write completion (text) or completion_ids."
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
    """none: no grading; number: the final answer as a number; math: as mathematics; exact: the
    text itself."""
    num_held_out: int = 0
    """Prompts set apart for evaluation; 0 evaluates on `held_out_prompts` or not at all."""
    held_out_prompts: tuple[Prompt, ...] = field(default=(), repr=False)
    """Evaluation prompts from a file of their own."""
    split_seed: int = 0
    """Decides which prompts are set apart; training seeds do not."""
    num_dropped: int = 0
    """Prompts left out of the pool because they were too long."""

    def __post_init__(self) -> None:
        if self.grader not in GRADERS:
            raise ConfigError(
                f"data.grader must be one of {', '.join(GRADERS)}, got {self.grader!r}. Choose one."
            )
        if self.num_held_out < 0:
            raise ConfigError(
                f"data.num_held_out must be at least 0, got {self.num_held_out}. Use 0 for none."
            )
        if self.num_held_out and self.held_out_prompts:
            raise ConfigError(
                f"data.num_held_out must be 0 with a held-out file, got {self.num_held_out}. "
                "Use one of the two."
            )
        if not self.training:
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

    def grade(self, prompt: Prompt, text: str, is_truncated: bool = False) -> bool | None:
        """Whether a completion is right; None without a grader or without a reference answer.

        One that was cut off is right only if it had marked its answer.
        """
        if prompt.answer is None or self.grader == "none":
            return None
        if self.grader == "exact":
            answer = None if is_truncated else after_thoughts(text)
            return answer is not None and answer.strip() == prompt.answer.strip()
        grade = grade_completion if self.grader == "math" else grade_number
        return grade(text, prompt.answer, is_truncated)

    def without(self, is_too_long: Callable[[Prompt], bool]) -> FileTask:
        """The task without the prompts that are too long, which are counted."""
        pool, held_out = (
            tuple(prompt for prompt in prompts if not is_too_long(prompt))
            for prompts in (self.pool, self.held_out_prompts)
        )
        dropped = len(self.pool) + len(self.held_out_prompts) - len(pool) - len(held_out)
        return replace(self, pool=pool, held_out_prompts=held_out, num_dropped=dropped)

    @cached_property
    def _split(self) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
        order = _permutation(len(self.pool), "split", self.split_seed)
        cut = max(0, len(order) - self.num_held_out)
        held_out = self.held_out_prompts or tuple(self.pool[i] for i in order[cut:])
        seen = {content_key(prompt) for prompt in held_out}
        chosen = (self.pool[i] for i in sorted(order[:cut]))
        return tuple(p for p in chosen if content_key(p) not in seen), held_out

    @property
    def training(self) -> tuple[Prompt, ...]:
        """Prompts of the pool that are not held out."""
        return self._split[0]

    @property
    def _held_out(self) -> tuple[Prompt, ...]:
        return self._split[1]

    def _at(self, index: int, seed: int) -> Prompt:
        epoch, place = divmod(index, len(self.training))
        return self.training[self._epoch_order(seed, epoch)[place]]

    def _epoch_order(self, seed: int, epoch: int) -> list[int]:
        if (seed, epoch) not in self._orders:
            self._orders.clear()
            self._orders[seed, epoch] = _permutation(len(self.training), "epoch", seed, epoch)
        return self._orders[seed, epoch]

    @cached_property
    def _orders(self) -> dict[tuple[int, int], list[int]]:
        """The order of the epoch in use, so that a step need not shuffle once per prompt."""
        return {}


def content_key(prompt: Prompt) -> str:
    """JSON text of what a prompt says, the same for equal prompts under other ids."""
    return json.dumps([prompt.content, prompt.tools] if prompt.tools else prompt.content)


def _permutation(length: int, *key: object) -> list[int]:
    order = list(range(length))
    random.Random(repr(key)).shuffle(order)
    return order
