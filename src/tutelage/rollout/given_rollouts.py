"""Rollouts of completions that a file holds, in the ids of the student's tokenizer."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.data.completions import Choice, GivenCompletion
from tutelage.data.types import Rollout
from tutelage.errors import DataError
from tutelage.grading.answer import opened_thought
from tutelage.models.tokenizers import decode, encode_completion, encode_prompt
from tutelage.rollout.request import LONGEST_MARK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class GivenEncoder:
    """Encodes completions as the student would have sampled them, and counts what it changed.

    A text is encoded, and an end-of-sequence token follows unless the record says that it was cut
    off; ids are taken as they are. What is longer than `max_new_tokens` is cut off there.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: AbstractSet[int]
    """Ids that end a completion."""
    vocab_size: int
    """Ids that both models have."""
    max_new_tokens: int
    enable_thinking: bool | None = None
    num_texts: int = 0
    num_changed: int = 0
    """Texts that are another text once they are encoded and decoded."""
    num_cut: int = 0
    """Completions that were longer."""

    def rollouts(self, choice: Choice) -> list[Rollout]:
        """All completions of the first prompt, then those of the second.

        Raises:
            DataError: a prompt cannot be encoded, or a completion has unknown ids.
        """
        found = []
        for prompt, completions in choice:
            ids = tuple(encode_prompt(self.tokenizer, prompt, self.enable_thinking))
            thought = opened_thought(decode(self.tokenizer, ids[-LONGEST_MARK:]))
            for sample, given in enumerate(completions):
                tokens = self._ids(given)
                found.append(
                    Rollout(
                        prompt,
                        sample,
                        ids,
                        tuple(tokens),
                        is_truncated=tokens[-1] not in self.stops,
                        text=decode(self.tokenizer, tokens),
                        thought=thought,
                    )
                )
        return found

    def _ids(self, given: GivenCompletion) -> list[int]:
        ids = given.content
        if isinstance(ids, str):
            ids = self._encoded(ids, given.is_truncated)
        beyond = [i for i in ids if i >= self.vocab_size]
        if beyond or not ids:
            raise DataError(
                f"{given.where}: a completion must have ids from 0 to {self.vocab_size - 1}, got "
                f"{beyond[:1] or 'none'}. Encode it with the student's tokenizer, or give its text."
            )
        self.num_cut += len(ids) > self.max_new_tokens
        return ids[: self.max_new_tokens]

    def _encoded(self, text: str, is_truncated: bool) -> list[int]:
        ids = encode_completion(self.tokenizer, text)
        self.num_texts += 1
        self.num_changed += decode(self.tokenizer, ids) != text
        end = self.tokenizer.eos_token_id
        if isinstance(end, int) and not is_truncated and ids and ids[-1] not in self.stops:
            ids.append(end)
        return ids

    def warnings(self, source: str) -> list[str]:
        """What the run should log of a file's completions."""
        found = []
        if self.num_changed:
            found.append(
                f"{self.num_changed} of {self.num_texts} texts of {source!r} do not round-trip: "
                "encoded with the student's tokenizer and decoded they are other texts"
            )
        if self.num_cut:
            found.append(
                f"{self.num_cut} completions of {source!r} are cut off at "
                f"sampling.max_new_tokens = {self.max_new_tokens}"
            )
        return found
