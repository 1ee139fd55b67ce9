"""Byte-level BPE beside tokenizers of SentencePiece's kind, against a count by their decoders."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ModelError
from tutelage.models.alignment import AlignedReading, Aligner, shared_pairs
from tutelage.models.token_bytes import adds_space, literal_encoder, token_bytes

CORPUS = (
    "the of and sum token teacher student naïve café Straße 数学 学生 αβγ x=1 12345 don't über-all "
    "two\n\nlines tab\tstop"
)
WORDS = CORPUS.split(" ")
RARE = ["😀", "👩\u200d🔬", "🇩🇪", "e\u0301", "ß", "﷽", " ", "  ", ""]
"""Not in the training texts: bytes for tokenizers with a byte fallback."""
CONTROL = ["<unk>", "<s>", "</s>"]


def texts(count: int, seed: int, rare: list[str] = RARE) -> list[str]:
    rng = random.Random(seed)
    joined = (
        " ".join(rng.choices(WORDS, k=rng.randint(1, 7)) + rng.choices(rare or [""], k=2))
        for _ in range(count)
    )
    return [rng.choice(["", "", " ", "  ", "\n"]) + text + rng.choice(["", " "]) for text in joined]


def finished(core: Tokenizer) -> PreTrainedTokenizerFast:
    core.add_special_tokens(CONTROL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_level(size: int = 330) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts(200, 0, []), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def byte_tokens(first: int) -> dict[str, int]:
    return {f"<0x{byte:02X}>": first + byte for byte in range(256)}


def pieces(size: int, has_space: bool) -> PreTrainedTokenizerFast:
    """BPE as converted from SentencePiece: Llama 2's parts, or without an added space Gemma's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    core.train_from_iterator(texts(200, 0, []), trainer)
    trained = json.loads(core.to_str())["model"]
    vocab = {text: i for i, text in enumerate(CONTROL)} | byte_tokens(3)
    vocab |= {text: 259 + i for text, i in trained["vocab"].items()}
    merges = [tuple(pair) for pair in trained["merges"]]
    made = models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    core = Tokenizer(made)
    space, parts = normalizers.Replace(" ", "▁"), [decoders.Replace("▁", " ")]
    parts += [decoders.ByteFallback(), decoders.Fuse()]
    core.normalizer = space
    if has_space:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        parts.append(decoders.Strip(" ", 1, 0))
    core.decoder = decoders.Sequence(parts)
    core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return finished(core)


def unigram() -> PreTrainedTokenizerFast:
    """Unigram with a byte fallback, its spaces by Metaspace as Mistral's and T5's."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.UnigramTrainer(vocab_size=90, show_progress=False)
    core.train_from_iterator(texts(200, 0, []), trainer)
    learned = [tuple(pair) for pair in json.loads(core.to_str())["model"]["vocab"]]
    vocab = [*((text, 0.0) for text in [*CONTROL, *byte_tokens(0)]), *learned]
    core.model = models.Unigram(vocab, unk_id=0, byte_fallback=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return finished(core)


BYTES, LLAMA, GEMMA, UNIGRAM = byte_level(), pieces(110, True), pieces(80, False), unigram()
ALL = {"bytes": BYTES, "llama": LLAMA, "gemma": GEMMA, "unigram": UNIGRAM}
ADDS_SPACE = {"bytes": False, "llama": True, "gemma": False, "unigram": True}


@cache
def aligner(student: str, teacher: str) -> Aligner:
    ours, theirs = ALL[student], ALL[teacher]
    stops = (frozenset({ours.eos_token_id}), frozenset({theirs.eos_token_id}))
    return Aligner(ours, theirs, stops)


def encoded(name: str, text: str) -> list[int]:
    ids: list[int] = ALL[name](text, add_special_tokens=False).input_ids
    return ids


@cache
def spans(name: str, ids: tuple[int, ...], is_literal: bool) -> list[tuple[int, int] | None]:
    """The characters that each token adds to what the decoder says; None for a part of one.

    Literally, a space that the tokenizer added before the text is of the text.
    """
    before = [ALL[name].convert_tokens_to_ids("t")] * is_literal
    said = [
        ALL[name].decode([*before, *ids[:n]], clean_up_tokenization_spaces=False)
        for n in range(len(ids) + 1)
    ]
    ends = [None if text.endswith("\ufffd") else len(text) for text in said]
    found = pairwise(ends)
    return [None if None in (a, b) or a == b else (a, b) for a, b in found]  # type: ignore[misc]


CHAT = ({"role": "user", "content": "q"},)


def with_template(tokenizer: PreTrainedTokenizerFast, end: str = "") -> PreTrainedTokenizerFast:
    """The same with a chat template whose prompts end in "]" and what is asked for."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = "[{{ messages[0]['content'] }}]" + end
    return found


PAIRS = [
    ("bytes", "llama"),
    ("llama", "bytes"),
    ("gemma", "bytes"),
    ("bytes", "gemma"),
    ("llama", "gemma"),
    ("llama", "unigram"),
]


@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=str)
def test_the_aligned_share_is_that_of_a_count_by_decoders_on_200_texts(
    student: str, teacher: str
) -> None:
    shares = []
    for text in texts(200, 1):
        if teacher == "unigram":
            text = text.lstrip(" ")  # which Metaspace takes for the space that it would add
        ids = encoded(student, text)
        found = aligner(student, teacher)(ids)
        assert ALL[student].decode(ids, clean_up_tokenization_spaces=False) == text
        is_same = ADDS_SPACE[student] == ADDS_SPACE[teacher]
        ours, theirs = (
            spans(name, tuple(encoded(name, text)), is_same) for name in (student, teacher)
        )
        if ADDS_SPACE[student] > ADDS_SPACE[teacher]:
            ours[:1] = [None]
        if ADDS_SPACE[student] < ADDS_SPACE[teacher]:
            theirs[:1] = [None]
        expected = [span is not None and span in theirs for span in ours]
        assert list(found.of_student) == expected
        assert list(found.of_teacher) == [span is not None and span in ours for span in theirs]
        assert list(found.teacher_ids) == encoded(teacher, text)
        shares.append(sum(expected) / max(len(expected), 1))
    assert 0.3 < sum(shares) / len(shares) < 0.97


@pytest.mark.parametrize("name", ALL)
def test_equal_tokenizers_align_every_token_of_whole_characters(name: str) -> None:
    stop = ALL[name].eos_token_id
    for text in texts(50, 2):
        ids = (*encoded(name, text), stop)
        found = aligner(name, name)(ids)
        assert found.teacher_ids == ids
        assert found.of_student == found.of_teacher
        whole = [span is not None for span in spans(name, ids[:-1], True)]
        assert list(found.of_student) == [*whole, True]


@pytest.mark.parametrize("name", ALL)
def test_equal_tokenizers_share_every_id(name: str) -> None:
    size = len(ALL[name])
    assert shared_pairs(ALL[name], ALL[name], (size, size)) == [(i, i) for i in range(size)]


def test_a_character_is_shared_before_its_byte_token() -> None:
    pairs = dict(shared_pairs(GEMMA, BYTES, (len(GEMMA), len(BYTES))))
    ours, theirs = GEMMA.get_vocab(), BYTES.get_vocab()
    assert pairs[ours["t"]] == theirs["t"]
    assert ours["<0x74>"] not in pairs
    assert pairs[ours["▁and"]] == theirs["Ġand"]
    assert pairs[ours["<0xF0>"]] == theirs["ð"]
    assert pairs.keys().isdisjoint(range(3))  # <s> is no text of the other side
    assert GEMMA.get_vocab()["<0x0A>"] not in pairs  # its encoder has a newline


def test_a_control_token_is_no_text_and_an_added_token_is() -> None:
    """Gemma has runs of spaces as added tokens that are no control tokens."""
    ours, theirs = copy.deepcopy(GEMMA), copy.deepcopy(BYTES)
    ours.add_tokens(["▁▁"])
    theirs.add_tokens(["<s>", "é 1"])
    ids = {text: ours.convert_tokens_to_ids(text) for text in ("<s>", "▁▁")}
    pairs = dict(shared_pairs(ours, theirs, (len(ours), len(theirs))))
    assert ids["<s>"] not in pairs
    assert pairs[ids["▁▁"]] == theirs.get_vocab()["ĠĠ"]
    assert token_bytes(theirs)[theirs.convert_tokens_to_ids("é 1")] == "é 1".encode()


def test_a_byte_token_is_text_for_a_decoder_without_bytes() -> None:
    core = Tokenizer(models.WordLevel({"<0x41>": 0, "▁a": 1}))
    core.decoder = decoders.Metaspace()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=core)) == {0: b"<0x41>", 1: b" a"}


@pytest.mark.parametrize("name", ALL)
def test_a_text_is_encoded_as_it_is(name: str) -> None:
    table = token_bytes(ALL[name])
    for text in ("", "t", *texts(20, 5)):
        ids = aligner(name, name).encode(text, 1)
        assert b"".join(table[i] for i in ids) == text.encode()


@settings(max_examples=20)
@given(st.text(max_size=30), st.sampled_from(PAIRS), st.booleans(), st.integers(0, 2**32))
def test_aligned_tokens_cover_the_same_text_behind_the_same_text(
    text: str, pair: tuple[str, str], is_ended: bool, seed: int
) -> None:
    """Of any tokens, also such as no tokenizer would choose."""
    rng, tables = random.Random(seed), [token_bytes(ALL[name]) for name in pair]
    ids = encoded(pair[0], text)
    if rng.random() < 0.5:
        ids = rng.choices(range(4, len(ALL[pair[0]])), k=9)
    spaces = (rng.random() < 0.5, rng.random() < 0.5)
    stops = [ALL[name].eos_token_id for name in pair]
    ids = [i for i in ids if i not in stops]
    found = aligner(*pair)([*ids, stops[0]] if is_ended else ids, spaces)
    assert sum(found.of_student) == sum(found.of_teacher)
    assert len(found.of_student) == len(ids) + is_ended
    assert len(found.of_teacher) == len(found.teacher_ids)
    places = [
        [i for i, is_one in enumerate(mask) if is_one]
        for mask in (found.of_student, found.of_teacher)
    ]
    for i, j in zip(*places, strict=True):
        ours, theirs = (
            [table.get(v, b"") for v in side]
            for table, side in zip(tables, (ids, found.teacher_ids), strict=True)
        )
        before = [b"".join(ours[:i]), b"".join(theirs[:j])]
        for side in range(2):
            if spaces[side] and not spaces[1 - side]:
                before[side] = before[side].removeprefix(b" ")
                assert (i, j)[side] > 0
        assert before[0] == before[1]
        assert ours[i] == theirs[j] if i < len(ids) else found.teacher_ids[j] == stops[1]


@pytest.mark.parametrize(
    ("content", "end", "begins"),
    [
        ("a text", "", False),  # a completion goes on where the text ends
        (CHAT, "", True),
        (CHAT, "{{ '\n' }}", False),
    ],
    ids=["text", "turn", "turn behind a newline"],
)
def test_a_turn_begins_as_the_tokenizer_writes_one(content: Any, end: str, begins: bool) -> None:
    """A turn "t sum" is `▁t ▁sum` for Llama 2, and `t Ġsum` for others."""
    teacher = with_template(LLAMA, end)
    found = replace(aligner("bytes", "llama"), teacher=teacher)
    prompt = Prompt("0", content)
    ids = (*encoded("bytes", "t sum"), BYTES.eos_token_id)
    rollout = Rollout(prompt, 0, tuple(encoded("bytes", "q")), ids)
    reading = AlignedReading(found, 0)
    first = teacher.convert_ids_to_tokens(reading([rollout])[0].completion_ids)[0]
    assert first == ("▁t" if begins else "t")
    assert reading.rows([rollout])[0].is_generated[0] is not begins
    assert all(reading.rows([rollout])[0].is_generated[1:])


@pytest.mark.parametrize(
    ("content", "text"), [("q", " t sum"), (CHAT, "t sum")], ids=["text", "turn"]
)
def test_what_a_student_writes_first_is_a_space_of_a_text_alone(content: Any, text: str) -> None:
    reading = AlignedReading(aligner("llama", "bytes"), 0)
    rollout = Rollout(Prompt("0", content), 0, (5,), tuple(encoded("llama", "t sum")))
    teacher = with_template(BYTES)
    reading = replace(reading, aligner=replace(reading.aligner, teacher=teacher))
    assert teacher.decode(reading([rollout])[0].completion_ids) == text


def test_a_stop_behind_nothing_is_left_out_where_one_side_would_write_a_space() -> None:
    stop = BYTES.eos_token_id
    assert aligner("bytes", "llama")([stop]).of_student == (False,)
    assert aligner("bytes", "llama")([stop], (False, False)).of_student == (True,)
    assert aligner("bytes", "gemma")([stop]).of_student == (True,)


def test_an_added_space_is_taken_out_of_every_form() -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.model = models.BPE({text: i for i, text in enumerate(alphabet)}, [])
    core.enable_truncation(2)
    core.enable_padding(length=9)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert not adds_space(tokenizer)
    encoder = literal_encoder(tokenizer)
    assert encoder is not None
    assert encoder.encode("a 1b").tokens == ["a", "Ġ", "1", "b"]
    assert {name: adds_space(each) for name, each in ALL.items()} == ADDS_SPACE


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Replace("x", "y")]),
        decoders.Sequence([decoders.Metaspace(), decoders.CTC()]),
    ],
    ids=["none", "WordPiece", "BPE", "two", "CTC"],
)
def test_tokens_that_are_no_bytes_are_refused(decoder: Any) -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    if decoder is not None:
        core.decoder = decoder
    with pytest.raises(ModelError, match=r"byte-level or SentencePiece .* decoder of .* is"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=core))


def test_a_tokenizer_without_a_tokenizer_json_is_refused() -> None:
    class Slow:
        name_or_path = "slow"

    with pytest.raises(ModelError, match="'slow' is none"):
        token_bytes(Slow())  # type: ignore[arg-type]
