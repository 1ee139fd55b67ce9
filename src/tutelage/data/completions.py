"""Completions of a file, found by the prompts they belong to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tutelage.data.formats import PromptFormat, file_rows, find_file, to_prompt
from tutelage.data.prompts import completion_of, content_key
from tutelage.data.types import Prompt
from tutelage.errors import DataError


@dataclass(frozen=True)
class GivenCompletion:
    """One completion of a file."""

    content: str | list[int]
    """Text, or token ids."""
    where: str
    """Its line or row."""
    is_truncated: bool = False
    """Whether the text was cut off, so that no end-of-sequence token follows."""


Choice: TypeAlias = list[tuple[Prompt, list[GivenCompletion]]]
"""Prompts of a step, each with its completions."""


@dataclass
class GivenCompletions:
    """The completions of a file, which are given out in their order, again and again.

    A record names its prompt by `prompt_id`, or has the prompt itself as the data has it; its
    completion is `completion` or `text`, or `completion_ids`. What `tutelage sample --json` prints
    are such records.
    """

    source: str
    by_prompt: dict[str, list[GivenCompletion]]
    _given: Counter[str] = field(default_factory=Counter)
    """Completions of each prompt that were given out."""

    @classmethod
    def read(cls, path: str | Path, prompt_format: PromptFormat) -> GivenCompletions:
        """The completions of a JSONL or parquet file.

        Raises:
            DataError: the file is missing, empty or malformed; the line is named.
        """
        found = find_file(path)
        by_prompt: dict[str, list[GivenCompletion]] = defaultdict(list)
        for number, (where, record) in enumerate(file_rows(found), start=1):
            if isinstance(record, dict) and isinstance(name := record.get("prompt_id"), str):
                key = _id_key(name)
            else:
                prompt = to_prompt(record, where, f"{found.stem}/{number}", prompt_format)
                key = content_key(prompt)
            by_prompt[key].append(_given(record, where))
        if not by_prompt:
            raise DataError(f"{found} holds no completions, got an empty file. Add at least one.")
        return cls(str(found), dict(by_prompt))

    def _of(self, prompt: Prompt) -> tuple[str, list[GivenCompletion]]:
        for key in (_id_key(prompt.id), content_key(prompt)):
            if key in self.by_prompt:
                return key, self.by_prompt[key]
        return "", []

    def require(self, prompts: Iterable[Prompt], num_samples: int) -> None:
        """Refuse a file that lacks completions of some prompts.

        Raises:
            DataError: a prompt has fewer than `num_samples`.
        """
        needed = {prompt.id: prompt for prompt in prompts}.values()
        counts = {prompt.id: len(self._of(prompt)[1]) for prompt in needed}
        few = [name for name, count in counts.items() if count < num_samples]
        if few:
            raise DataError(
                f"rollouts.path {self.source!r} has fewer completions than sampling.num_samples = "
                f"{num_samples} of {len(few)} of the run's {len(needed)} prompts, first "
                f"{counts[few[0]]} of {few[0]!r}. Add them, lower sampling.num_samples, or leave "
                "those prompts out of data.path."
            )

    def take(self, prompts: Sequence[Prompt], num_samples: int) -> Choice:
        """The next completions of each prompt; after its last one the first follows again."""
        found: Choice = []
        for prompt in prompts:
            key, every = self._of(prompt)
            start = self._given[key]
            self._given[key] += num_samples
            places = range(start, start + num_samples)
            found.append((prompt, [every[place % len(every)] for place in places]))
        return found


def _id_key(name: str) -> str:
    return f"id {name}"  # the key of a content is JSON text


def _given(record: dict[str, Any], where: str) -> GivenCompletion:
    if "completion" not in record and "completion_ids" not in record and "text" in record:
        record = {**record, "completion": record["text"]}
    return GivenCompletion(completion_of(record, where), where, record.get("is_truncated") is True)
