"""One text in the tokens of two byte-level BPEs, against a count by the library's own offsets."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tutelage.models.alignment import Aligner, shared_pairs
from tutelage.models.token_bytes import token_bytes

CORPUS = (
    "the of and sum token teacher student naïve café Straße 数学 学生 αβγ 😀 👩\u200d🔬 x=1 12345 "
    "don't über-all  two\n\nlines\ttab"
)
WORDS = CORPUS.split(" ")


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


def trained(size: int, end: str, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the corpus, with one control token."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end, "<both>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(300, 0), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


STUDENT, TEACHER = trained(330, "<end>"), trained(290, "<stop>")


def aligner(student: Any = STUDENT, teacher: Any = TEACHER) -> Aligner:
    stops = (frozenset({student.eos_token_id}), frozenset({teacher.eos_token_id}))
    return Aligner(student, teacher, stops)


ALIGN = aligner()


def whole_spans(tokenizer: Any, text: str) -> list[tuple[int, int] | None]:
    """The characters of each token by the library's offsets, None where a token has a part of one.

    Tokens with parts of one character all name it.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    touched = Counter(c for span in encoded.offset_mapping for c in range(*span))
    return [
        span if all(touched[c] == 1 for c in range(*span)) else None
        for span in map(tuple, encoded.offset_mapping)
    ]


def test_the_aligned_share_is_that_of_a_count_by_offsets_on_200_texts() -> None:
    shares = []
    for text in texts(200, 1):
        ids = STUDENT(text, add_special_tokens=False).input_ids
        found = ALIGN(ids)
        ours, theirs = (whole_spans(tokenizer, text) for tokenizer in (STUDENT, TEACHER))
        expected = [span is not None and span in theirs for span in ours]
        assert list(found.of_student) == expected
        shares.append(sum(expected) / max(len(expected), 1))
    assert 0.3 < sum(shares) / len(shares) < 0.99


@settings(max_examples=60)
@given(st.text(max_size=40), st.booleans(), st.integers(0, 2**32))
def test_aligned_tokens_cover_the_same_text_behind_the_same_text(
    text: str, is_ended: bool, seed: int
) -> None:
    """Of any text in any tokens, also such as no tokenizer would choose."""
    rng, tables = random.Random(seed), (token_bytes(STUDENT), token_bytes(TEACHER))
    ids: list[int] = []
    for piece in [text[:3], *text[3:]] if rng.random() < 0.5 else [text]:
        ids += STUDENT(piece, add_special_tokens=False).input_ids
    ids = ids[: rng.randint(0, len(ids))] if rng.random() < 0.3 else ids  # may cut a character
    found = ALIGN([*ids, STUDENT.eos_token_id] if is_ended else ids)
    assert sum(found.of_student) == sum(found.of_teacher)
    assert len(found.of_student) == len(ids) + is_ended
    assert len(found.of_teacher) == len(found.teacher_ids)
    places = [[i for i, is_one in enumerate(mask) if is_one] for mask in (
        found.of_student, found.of_teacher,
    )]  # fmt: skip
    for i, j in zip(*places, strict=True):
        ours = [tables[0][v] for v in ids]
        theirs = [tables[1][v] for v in found.teacher_ids]
        assert b"".join(ours[:i]) == b"".join(theirs[:j])
        if i < len(ids):
            assert ours[i] == theirs[j]
        else:
            assert found.teacher_ids[j] == TEACHER.eos_token_id


def test_equal_tokenizers_align_every_token_of_whole_characters() -> None:
    align = aligner(STUDENT, STUDENT)
    for text in texts(50, 2):
        ids = STUDENT(text, add_special_tokens=False).input_ids
        found = align([*ids, STUDENT.eos_token_id])
        whole = [span is not None for span in whole_spans(STUDENT, text)]
        assert list(found.of_student) == list(found.of_teacher) == [*whole, True]
        assert found.teacher_ids == (*ids, STUDENT.eos_token_id)


def test_a_character_that_the_end_cuts_and_the_stop_behind_it_are_left_out() -> None:
    ids = STUDENT("the 😀", add_special_tokens=False).input_ids
    table = token_bytes(STUDENT)
    cut = next(n for n in range(1, len(ids)) if b"\xf0" in b"".join(table[i] for i in ids[:n]))
    found = ALIGN([*ids[:cut], STUDENT.eos_token_id])
    assert found.of_student[-1] is False
    assert found.of_student[cut - 1] is False
    assert TEACHER.eos_token_id not in found.teacher_ids
    assert b"".join(token_bytes(TEACHER)[i] for i in found.teacher_ids) == b"the "


def test_what_a_tokenizer_normalizes_and_all_behind_it_is_left_out() -> None:
    lower = trained(290, "<stop>", normalizers.Lowercase())
    ids = STUDENT("the of Sum of the", add_special_tokens=False).input_ids
    found = aligner(STUDENT, lower)([*ids, STUDENT.eos_token_id])
    table = token_bytes(STUDENT)
    before = len(b"the of ")
    ends = [len(b"".join(table[i] for i in ids[: n + 1])) for n in range(len(ids))]
    assert any(found.of_student)
    taught = [end for end, is_one in zip(ends, found.of_student[:-1], strict=True) if is_one]
    assert max(taught) <= before
    assert not found.of_student[-1]


def test_shared_ids_are_those_of_equal_tokens() -> None:
    pairs = shared_pairs(STUDENT, TEACHER, (len(STUDENT), len(TEACHER)))
    expected = {
        (i, TEACHER.get_vocab()[text])
        for text, i in STUDENT.get_vocab().items()
        if text in TEACHER.get_vocab()
    }
    assert set(pairs) == expected
    assert any(STUDENT.convert_ids_to_tokens(i) == "<both>" for i, _ in pairs)
    limit = 100
    assert all(j < limit for _, j in shared_pairs(STUDENT, TEACHER, (len(STUDENT), limit)))
