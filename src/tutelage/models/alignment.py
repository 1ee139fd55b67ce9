"""One text in the tokens of two tokenizers: which tokens and which ids are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from tutelage.data.types import Rollout
from tutelage.models.token_bytes import adds_space, literal_encoder, token_bytes
from tutelage.models.tokenizers import control_ids, encode_completion, encode_prompt, no_panic

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


def shared_pairs(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, sizes: tuple[int, int]
) -> list[tuple[int, int]]:
    """Ids of student and teacher whose tokens are equal, by the student's id.

    A control token is equal to a control token of the same text only. Where a side has several ids
    for the same bytes (a character and its byte token, say), the one that its encoder prefers is
    paired first.

    Args:
        student: a byte-level or SentencePiece tokenizer.
        teacher: another.
        sizes: ids that the models have; ids beyond are left out.
    """
    tables: list[dict[tuple[bool, bytes], list[int]]] = []
    for tokenizer, size in zip((student, teacher), sizes, strict=True):
        control = control_ids(tokenizer)
        table: dict[tuple[bool, bytes], list[int]] = {}
        for i, text in token_bytes(tokenizer).items():
            if i < size:
                table.setdefault((i in control, text), []).append(i)
        tables.append(table)
    equal = ((ids, tables[1].get(key, ())) for key, ids in tables[0].items())
    return sorted(pair for both in equal for pair in zip(*both, strict=False))


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

    @cached_property
    def _encoders(self) -> tuple[Tokenizer | None, Tokenizer | None]:
        return literal_encoder(self.student), literal_encoder(self.teacher)

    @cached_property
    def _adds_space(self) -> tuple[bool, bool]:
        return adds_space(self.student), adds_space(self.teacher)

    def encode(self, text: str, side: int) -> list[int]:
        """A text in the tokens of one side, 0 for the student, without a space added before it."""
        tokenizer, encoder = (self.student, self.teacher)[side], self._encoders[side]
        if encoder is None:
            return encode_completion(tokenizer, text)
        with no_panic(tokenizer.name_or_path):
            return list(encoder.encode(text, add_special_tokens=False).ids)

    def begins_with_space(self, side: int, prompt_ids: Sequence[int]) -> bool:
        """Whether a side writes a turn behind a prompt with a space that is not of the turn's text.

        So do tokenizers that add one before a text, behind what ends in no white space itself.
        """
        end = b"".join(self._bytes[side].get(i, b"") for i in prompt_ids[-1:])
        return self._adds_space[side] and not end[-1:].isspace()

    def __call__(self, ids: Sequence[int], spaces: tuple[bool, bool] | None = None) -> Aligned:
        """Tokens of one completion that the teacher can be asked about.

        The teacher has the completion's text in its own tokens. Token i of the student and j of the
        teacher are the same where they cover the same characters and all bytes before are equal, so
        that both are predicted behind the same text. Not the same: tokens that cover a part of a
        character; all from a byte on that is no UTF-8 (of a character that the completion's end
        cuts, say) or that the teacher's tokenizer normalizes. A stop at the end is the teacher's
        stop where all of the text before it is equal. Where one side alone begins with a space that
        is not of the text, its first token is not the same as any: it predicts that space, too.

        Args:
            ids: of the completion, the stop included.
            spaces: whether student and teacher begin with a space that is not of the text, which is
                of no account where both do; None where their tokenizers add one before a text.
        """
        added = spaces or self._adds_space
        is_odd = (added[0] and not added[1], added[1] and not added[0])
        is_ended = bool(ids) and ids[-1] in self.stops[0]
        body = list(ids[:-1] if is_ended else ids)
        ours = _without_space([self._bytes[0].get(i, b"") for i in body], is_odd[0])
        whole = b"".join(ours)
        text = _valid_start(whole)
        found = self.encode(" " + text if is_odd[1] and text else text, 1)
        theirs = _without_space([self._bytes[1].get(i, b"") for i in found], is_odd[1])
        limit = _common(whole, b"".join(theirs))
        spans = [
            _spans(parts, whole, limit, int(is_first))
            for parts, is_first in zip((ours, theirs), is_odd, strict=True)
        ]
        same = spans[0].keys() & spans[1].keys()
        masks = [[False] * len(parts) for parts in (ours, theirs)]
        for places, mask in zip(spans, masks, strict=True):
            for span in same:
                mask[places[span]] = True
        if is_ended:
            is_equal = limit == len(whole) == len(b"".join(theirs))
            is_equal = is_equal and bool((ours and found) or not any(is_odd))
            masks[0].append(is_equal)
            if is_equal:
                found = [*found, min(self.stops[1])]
                masks[1].append(True)
        return Aligned(tuple(found), tuple(masks[0]), tuple(masks[1]))


def _without_space(parts: list[bytes], has_space: bool) -> list[bytes]:
    """What the tokens cover of a text before which a space stands, or may stand."""
    return [parts[0].removeprefix(b" "), *parts[1:]] if has_space and parts else parts


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


def _spans(
    parts: Sequence[bytes], whole: bytes, limit: int, first: int
) -> dict[tuple[int, int], int]:
    """Places from `first` of the tokens of whole characters by their bytes, up to a limit."""
    found, start = {}, 0
    for place, part in enumerate(parts):
        stop = start + len(part)
        cuts = (whole[end : end + 1] for end in (start, stop))
        is_whole = not any(cut and cut[0] & 0xC0 == 0x80 for cut in cuts)
        if part and stop <= limit and is_whole and place >= first:
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
        return [_only(r, one.of_student) for r, (_, one) in self._aligned(rollouts)]

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The same completions as the teacher reads them, whose rows are those of `rows`."""
        found = []
        for rollout, (prompt_ids, one) in self._aligned(rollouts):
            theirs = Rollout(rollout.prompt, rollout.sample, prompt_ids, one.teacher_ids)
            found.append(replace(theirs, is_generated=one.of_teacher))
        return found

    def _aligned(
        self, rollouts: Sequence[Rollout]
    ) -> Iterator[tuple[Rollout, tuple[tuple[int, ...], Aligned]]]:
        """Each with the teacher's prompt and its completion on both sides.

        A completion of plain text goes on where the prompt ends, so that a space at its beginning
        is of the text.
        """
        known: dict[str, tuple[int, ...]] = {}
        for rollout in rollouts:
            prompt, align = rollout.prompt, self.aligner
            if prompt.id not in known:
                known[prompt.id] = tuple(encode_prompt(align.teacher, prompt, self.enable_thinking))
            both, is_turn = (
                (rollout.prompt_ids, known[prompt.id]),
                not isinstance(prompt.content, str),
            )
            spaces = (
                is_turn and align.begins_with_space(0, both[0]),
                is_turn and align.begins_with_space(1, both[1]),
            )
            yield rollout, (both[1], align(rollout.completion_ids, spaces))


def _only(rollout: Rollout, mask: Sequence[bool]) -> Rollout:
    """The rollout with some of its tokens as rows, and what was recorded of these."""
    places = [place for place, is_row in enumerate(mask) if is_row]
    hidden = None if rollout.hidden is None else rollout.hidden[places]
    logprobs = tuple(rollout.logprobs[place] for place in places) if rollout.logprobs else ()
    return replace(rollout, is_generated=tuple(mask), logprobs=logprobs, hidden=hidden)
