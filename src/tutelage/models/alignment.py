"""One text in the tokens of two tokenizers: which tokens and which ids are the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from tutelage.data.types import Rollout
from tutelage.errors import ModelError
from tutelage.models.tokenizers import control_ids, encode_completion, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _bytes_of_characters()


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's tokens stand for bytes in GPT-2's way (Llama 3, Qwen, most since)."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    return any(one.get("type") == "ByteLevel" for one in (decoder, *decoder.get("decoders", ())))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """What each id of a byte-level tokenizer stands for in a text; added tokens for their text.

    Raises:
        ModelError: its tokens do not stand for bytes.
    """
    if not is_byte_level(tokenizer):
        raise ModelError(
            f"teacher.vocabulary = 'aligned' needs byte-level tokenizers, but the tokens of "
            f"{tokenizer.name_or_path!r} do not stand for bytes. Choose another model."
        )
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    found = {i: text.encode() for i, text in added.items()}
    for text, i in tokenizer.get_vocab().items():
        if i not in added and all(character in _BYTES for character in text):
            found[i] = bytes(_BYTES[character] for character in text)
    return found


def shared_pairs(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, sizes: tuple[int, int]
) -> list[tuple[int, int]]:
    """Ids of student and teacher whose tokens are equal, by the student's id.

    A control token is equal to a control token of the same text only.

    Args:
        student: a byte-level tokenizer.
        teacher: another.
        sizes: ids that the models have; ids beyond are left out.
    """
    tables: list[dict[tuple[bool, bytes], int]] = []
    for tokenizer, size in zip((student, teacher), sizes, strict=True):
        control = control_ids(tokenizer)
        table: dict[tuple[bool, bytes], int] = {}
        for i, text in sorted(token_bytes(tokenizer).items()):
            if i < size:
                table.setdefault((i in control, text), i)
        tables.append(table)
    return sorted((i, tables[1][key]) for key, i in tables[0].items() if key in tables[1])


@dataclass(frozen=True)
class Aligned:
    """A completion in the teacher's tokens, and which tokens of both sides are the same."""

    teacher_ids: tuple[int, ...]
    of_student: tuple[bool, ...]
    """For each of the student's tokens, whether it covers exactly what one of the teacher's does
    behind the same text."""
    of_teacher: tuple[bool, ...]
    """The same of the teacher's: as many, in the same order."""


@dataclass(frozen=True)
class Aligner:
    """Writes the student's completions in the teacher's tokens."""

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    stops: tuple[frozenset[int], frozenset[int]]
    """Ids that end a text, of student and teacher."""

    @cached_property
    def _bytes(self) -> tuple[dict[int, bytes], dict[int, bytes]]:
        return token_bytes(self.student), token_bytes(self.teacher)

    def __call__(self, ids: Sequence[int]) -> Aligned:
        """Tokens of one completion that the teacher can be asked about.

        The teacher has the completion's text in its own tokens. Token i of the student and j of the
        teacher are the same where they cover the same characters and all bytes before are equal, so
        that both are predicted behind the same text. Not the same: tokens that cover a part of a
        character; all from a byte on that is no UTF-8 (of a character that the completion's end
        cuts, say) or that the teacher's tokenizer normalizes. A stop at the end is the teacher's
        stop where all of the text before it is equal.

        Args:
            ids: of the completion, the stop included.
        """
        is_ended = bool(ids) and ids[-1] in self.stops[0]
        body = list(ids[:-1] if is_ended else ids)
        ours = [self._bytes[0].get(i, b"") for i in body]
        whole = b"".join(ours)
        found = encode_completion(self.teacher, _valid_start(whole))
        theirs = [self._bytes[1].get(i, b"") for i in found]
        limit = _common(whole, b"".join(theirs))
        spans = [_spans(parts, whole, limit) for parts in (ours, theirs)]
        same = spans[0].keys() & spans[1].keys()
        masks = [[False] * len(parts) for parts in (ours, theirs)]
        for places, mask in zip(spans, masks, strict=True):
            for span in same:
                mask[places[span]] = True
        if is_ended:
            is_equal = limit == len(whole) == len(b"".join(theirs))
            masks[0].append(is_equal)
            if is_equal:
                found = [*found, min(self.stops[1])]
                masks[1].append(True)
        return Aligned(tuple(found), tuple(masks[0]), tuple(masks[1]))


def _valid_start(whole: bytes) -> str:
    """The text before the first byte that is no UTF-8."""
    try:
        return whole.decode()
    except UnicodeDecodeError as error:
        return whole[: error.start].decode()


def _common(a: bytes, b: bytes) -> int:
    """Bytes that both begin with."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    return next(i for i in range(size) if a[i] != b[i])


def _spans(parts: Sequence[bytes], whole: bytes, limit: int) -> dict[tuple[int, int], int]:
    """Places of the tokens of whole characters by the bytes they cover, up to a limit."""
    found, start = {}, 0
    for place, part in enumerate(parts):
        stop = start + len(part)
        cuts = (whole[end : end + 1] for end in (start, stop))
        is_whole = not any(cut and cut[0] & 0xC0 == 0x80 for cut in cuts)
        if part and stop <= limit and is_whole:
            found[start, stop] = place
        start = stop
    return found


@dataclass(frozen=True)
class AlignedReading:
    """What a teacher with another tokenizer reads: prompts by its own template, and its tokens."""

    aligner: Aligner
    pad_id: int
    """Fills padded rows of the teacher's batches."""
    enable_thinking: bool | None = None
    """Passed to the teacher's chat template when not None."""

    def rows(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with their aligned tokens alone as rows, in the same order."""
        return [_only(r, self.aligner(r.completion_ids).of_student) for r in rollouts]

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The same completions as the teacher reads them, whose rows are those of `rows`."""
        known: dict[str, tuple[int, ...]] = {}
        for rollout in rollouts:
            if rollout.prompt.id not in known:
                ids = encode_prompt(self.aligner.teacher, rollout.prompt, self.enable_thinking)
                known[rollout.prompt.id] = tuple(ids)
        found = []
        for rollout in rollouts:
            one = self.aligner(rollout.completion_ids)
            prompt_ids = known[rollout.prompt.id]
            theirs = Rollout(rollout.prompt, rollout.sample, prompt_ids, one.teacher_ids)
            found.append(replace(theirs, is_generated=one.of_teacher))
        return found


def _only(rollout: Rollout, mask: Sequence[bool]) -> Rollout:
    """The rollout with some of its tokens as rows, and what was recorded of these."""
    places = [place for place, is_row in enumerate(mask) if is_row]
    hidden = None if rollout.hidden is None else rollout.hidden[places]
    logprobs = tuple(rollout.logprobs[place] for place in places) if rollout.logprobs else ()
    return replace(rollout, is_generated=tuple(mask), logprobs=logprobs, hidden=hidden)
