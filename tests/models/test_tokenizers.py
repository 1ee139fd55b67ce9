"""Prompts to ids (never a forged control token), stop ids and the vocabulary handshake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from tutelage.data.types import Prompt
from tutelage.errors import DataError, ModelError
from tutelage.grading.number import grade_number
from tutelage.models.tiny import tiny_tokenizer
from tutelage.models.tokenizers import (
    control_ids,
    decode,
    encode_prompt,
    eos_remap,
    pad_id,
    shared_vocabulary,
    stop_ids,
)

PAD, BOS, EOS, UNK, START, END = range(6)


def chat(*turns: str, role: str = "user") -> Prompt:
    return Prompt("p", tuple({"role": role, "content": text} for text in turns))


@pytest.mark.parametrize("auto_bos", [True, False])
@pytest.mark.parametrize("template_bos", [True, False])
@pytest.mark.parametrize("is_chat", [True, False])
def test_exactly_one_bos_where_one_is_wanted(
    make_tokenizer: Any, auto_bos: bool, template_bos: bool, is_chat: bool
) -> None:
    tokenizer = make_tokenizer(auto_bos=auto_bos)
    if not template_bos:
        tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    ids = encode_prompt(tokenizer, chat("hello") if is_chat else Prompt("p", "hello"))
    wanted = template_bos if is_chat else auto_bos
    assert ids.count(BOS) == int(wanted)
    assert (ids[0] == BOS) == wanted


@pytest.mark.parametrize(
    "single", ["$A <eos>", "<bos> $A <eos>", "<bos> $A <eos> <eos>", "$A <|end|>"]
)
def test_no_prompt_ends_in_what_the_tokenizer_appends(make_tokenizer: Any, single: str) -> None:
    tokenizer = make_tokenizer()
    added = [("<bos>", BOS), ("<eos>", EOS), ("<|end|>", END)]
    processor = processors.TemplateProcessing(single=single, special_tokens=added)
    tokenizer.backend_tokenizer.post_processor = processor
    text = tokenizer.convert_tokens_to_ids([*"hello"])
    before = [BOS] if single.startswith("<bos>") else []
    assert tokenizer("hello").input_ids[-1] in (EOS, END)  # it does append
    assert encode_prompt(tokenizer, Prompt("p", "hello")) == [*before, *text]
    assert encode_prompt(tokenizer, chat("hello"))[-1] == tokenizer.convert_tokens_to_ids("\n")


def test_chat_is_the_template_with_a_generation_prompt(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, chat("hi"))
    expected = ["<bos>", "<|start|>", *"user\nhi", "<|end|>", "<|start|>", *"assistant\n"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected


def test_thinking_switch_reaches_the_template(tokenizer: Any) -> None:
    plain = encode_prompt(tokenizer, chat("hi"))
    assert encode_prompt(tokenizer, chat("hi"), enable_thinking=True) == plain
    off = encode_prompt(tokenizer, chat("hi"), enable_thinking=False)
    assert decode(tokenizer, off[len(plain) :]) == "<t></t>"


salted = st.lists(
    st.sampled_from(
        ["<|start|>", "<|end|>", "<eos>", "<pad>", "<bos>", "<unk>", "<|", "|>", "start", "end"]
    )
    | st.sampled_from(["<", ">", "|", "user", "\n", " ", "a", "é", "<|en", "d|>", "<|<|end|>"]),
    max_size=6,
).map("".join)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=salted, is_chat=st.booleans(), role=st.sampled_from(["user", "system"]))
def test_no_text_forges_a_control_token(
    tokenizer: Any, text: str, is_chat: bool, role: str
) -> None:
    def control(prompt: Prompt) -> list[int]:
        return [i for i in encode_prompt(tokenizer, prompt) if i in control_ids(tokenizer) - {UNK}]

    harmless = chat("a", "b", role=role) if is_chat else Prompt("p", "a")
    prompt = chat(text, "b", role=role) if is_chat else Prompt("p", text)
    contains = any(t in text for t in ("<|start|>", "<|end|>", "<eos>", "<pad>", "<bos>", "<unk>"))
    if contains:
        with pytest.raises(DataError, match="'p' contains the control token"):
            encode_prompt(tokenizer, prompt)
    else:
        assert control(prompt) == control(harmless)


def test_a_role_cannot_forge_a_turn_either(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"control token '<\|end\|>'"):
        encode_prompt(tokenizer, chat("hi", role="user<|end|>"))


def test_unknown_characters_are_plain_text_but_the_unknown_token_is_not(tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, Prompt("p", "é")) == [BOS, UNK]
    with pytest.raises(DataError, match="control token '<unk>'"):
        encode_prompt(tokenizer, Prompt("p", "a<unk>"))


def test_empty_prompts_and_missing_or_failing_templates_are_explained(make_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="'p' has no tokens"):
        encode_prompt(make_tokenizer(auto_bos=False), Prompt("p", ""))
    with pytest.raises(ModelError, match="no chat template"):
        encode_prompt(make_tokenizer(chat_template=None), chat("hi"))
    strict = make_tokenizer(chat_template="{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(DataError, match="chat template: roles must alternate\\."):
        encode_prompt(strict, chat("hi"))


def test_decode_drops_control_tokens_and_keeps_spaces(tokenizer: Any) -> None:
    ids = tokenizer("a  b / c < d", add_special_tokens=False).input_ids
    assert decode(tokenizer, [START, *ids, END, EOS]) == "a  b / c < d"


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|inner_prefix|>", "<|inner_suffix|>"),
        ("<|channel|>", "<|channel|>"),  # analysis, then final
        ("<|channel>", "<channel|>"),
    ],
)
def test_marks_of_thoughts_that_are_control_tokens_stay(opening: str, closing: str) -> None:
    tokenizer = tiny_tokenizer()
    marks = {"additional_special_tokens": list(dict.fromkeys((opening, closing)))}
    tokenizer.add_special_tokens(marks, replace_extra_special_tokens=False)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    first = ids("final" if opening == closing else "")
    end = ids("<|im_end|>")
    guess = [*ids(opening), *ids(r"a \boxed{5} b"), *end]
    done = [*guess, *ids(closing), *first, *ids(r"\boxed{6}"), *end]
    assert not grade_number(decode(tokenizer, guess), "5", is_truncated=True)
    assert grade_number(decode(tokenizer, done), "6")
    assert decode(tokenizer, [*ids("a  b"), *ids(closing), *end]) == f"a  b{closing}"


@pytest.mark.parametrize(
    ("declared", "expected"), [(None, {EOS}), (END, {END, EOS}), ([END, PAD], {END, PAD, EOS})]
)
def test_stop_ids_are_the_union(
    qwen3: Any, tokenizer: Any, declared: Any, expected: set[int]
) -> None:
    qwen3.generation_config.eos_token_id = declared
    assert stop_ids(qwen3, tokenizer) == expected


def test_pad_id_falls_back_to_the_end_of_sequence(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    assert pad_id(tokenizer) == pad_id(tokenizer, PAD + 1) == PAD
    assert pad_id(tokenizer, PAD) == (EOS if EOS < PAD else 0)
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == EOS
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0


def test_padded_heads_are_cut_to_the_tokenizer(make_tokenizer: Any) -> None:
    student, teacher = make_tokenizer(), make_tokenizer()
    assert shared_vocabulary(student, teacher, 64, 128) == len(student)
    assert shared_vocabulary(student, teacher, len(student), len(student)) == len(student)


@pytest.mark.parametrize("short", ["student", "teacher"])
def test_a_head_without_a_row_for_some_token_is_refused(make_tokenizer: Any, short: str) -> None:
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    rows = {"student": size, "teacher": size, short: size - 1}
    with pytest.raises(ModelError, match=f"the {short}'s output head has {size - 1} rows"):
        shared_vocabulary(tokenizer, tokenizer, rows["student"], rows["teacher"])


@pytest.mark.parametrize(("i", "j"), [(0, 1), (3, 20), (24, 25)])
def test_two_exchanged_tokens_are_refused_and_named(make_tokenizer: Any, i: int, j: int) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    swapped = list(letters)
    swapped[i], swapped[j] = swapped[j], swapped[i]
    student, teacher = make_tokenizer(letters), make_tokenizer("".join(swapped))
    expected = rf"2 tokens differ, first '{letters[i]}', which is id {6 + i} .* and {6 + j} for"
    with pytest.raises(ModelError, match=expected):
        shared_vocabulary(student, teacher, 64, 64)


def test_a_longer_vocabulary_is_refused(make_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"first 'd', which is id None .* and 9 for the"):
        shared_vocabulary(make_tokenizer("abc"), make_tokenizer("abcd"), 64, 64)


def test_a_token_that_steers_only_one_of_them_is_refused(make_tokenizer: Any) -> None:
    student, teacher = make_tokenizer("abc"), make_tokenizer("bc", extra=("a",))
    assert student.get_vocab() == teacher.get_vocab()
    with pytest.raises(ModelError, match=r"'a' \(id 6\) is a control token for the teacher only"):
        shared_vocabulary(student, teacher, 64, 64)


def test_different_stop_tokens_trade_places_or_are_refused(make_tokenizer: Any) -> None:
    student, teacher = make_tokenizer(), make_tokenizer()
    assert eos_remap(student, teacher, "refuse") is None
    teacher.eos_token = "<|end|>"
    swap = eos_remap(student, teacher)
    assert swap == (student.eos_token_id, teacher.eos_token_id)
    assert swap[0] != swap[1]
    with pytest.raises(ModelError, match=r"'<eos>' .* '<\|end\|>' .*stop_token = 'map'"):
        eos_remap(student, teacher, "refuse")


@pytest.mark.parametrize("policy", ["map", "refuse"])
@pytest.mark.parametrize("without", ["student", "teacher"])
def test_a_side_without_a_stop_token_is_told_which_one_to_set(
    make_tokenizer: Any, without: str, policy: str
) -> None:
    sides = {"student": make_tokenizer(), "teacher": make_tokenizer()}
    sides[without].eos_token = None
    with pytest.raises(ModelError) as told:
        eos_remap(sides["student"], sides["teacher"], policy)
    text = str(told.value)
    assert text.startswith(f"the {without}'s tokenizer names no end-of-sequence token")
    assert f'Set eos_token in the {without}\'s tokenizer_config.json, to "<eos>"' in text
    assert "stop_token" not in text  # which is the default, and mends nothing here


def test_tools_are_rendered_by_the_template_or_refused(make_tokenizer: Any) -> None:
    text = "{% for t in tools or [] %}<|start|>{{ t['name'] }}<|end|>{% endfor %}"
    chat = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
    prompt = Prompt("p", ({"role": "user", "content": "hi"},), tools=({"name": "add"},))
    ids = encode_prompt(make_tokenizer(chat_template=text + chat), prompt)
    plain = encode_prompt(make_tokenizer(chat_template=text + chat), replace(prompt, tools=()))
    assert len(ids) == len(plain) + 5
    with pytest.raises(ModelError, match=r"'p' has tools, which the chat template .* leaves out"):
        encode_prompt(make_tokenizer(chat_template=chat), prompt)
    named = make_tokenizer(chat_template={"default": chat, "tool_use": text + chat})
    assert encode_prompt(named, prompt) == ids  # as transformers chooses among templates
    assert encode_prompt(named, replace(prompt, tools=())) == plain
    forged = replace(prompt, tools=({"name": "add<|end|>"},))
    with pytest.raises(DataError, match="control token"):
        encode_prompt(make_tokenizer(chat_template=text + chat), forged)


@pytest.mark.parametrize("lost", ["human", "system"])
def test_a_turn_that_the_template_leaves_out_is_refused(make_tokenizer: Any, lost: str) -> None:
    known = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] | trim }}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=known)
    turns = ({"role": lost, "content": "be nice"}, {"role": "user", "content": " hi  there\n"})
    with pytest.raises(DataError, match=f"role '{lost}', which the chat template .* leaves out"):
        encode_prompt(tokenizer, Prompt("p", turns))
    assert encode_prompt(tokenizer, Prompt("p", turns[1:]))


@pytest.mark.parametrize(
    ("template", "role", "content"),
    [
        ("{{ '' if '/no_think' in m['content'] else 'think' }}", "system", "/no_think"),
        ("{{ m['content'] | replace('/no_think', '') }}", "user", "2+2? /no_think now"),
        ("{{ m['content'] | tojson }}", "user", 'say "hi"'),
        ("{{ m['content'] | upper }}", "user", "word"),
        ("{{ raise_exception('?') if m['content'] != 'on' }}", "system", "on"),
    ],
)
def test_a_turn_that_the_template_writes_in_another_way_is_read(
    make_tokenizer: Any, template: str, role: str, content: str
) -> None:
    tokenizer = make_tokenizer(
        chat_template="{% for m in messages %}{% if loop.first %}" + template + "{% else %}"
        "{{ m['content'] }}{% endif %}{% endfor %}"
    )
    turns = ({"role": role, "content": content}, {"role": "user", "content": "hi"})
    assert encode_prompt(tokenizer, Prompt("p", turns))


def test_a_lost_turn_whose_words_stand_elsewhere_is_refused(make_tokenizer: Any) -> None:
    known = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    turns = ({"role": "system", "content": "hi"}, {"role": "user", "content": "hi there"})
    with pytest.raises(DataError, match="role 'system', which the chat template"):
        encode_prompt(make_tokenizer(chat_template=known), Prompt("p", turns))


def test_settings_of_a_tokenizer_s_files_cut_pad_and_split_nothing(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    prompts = [Prompt("p", "some words"), chat("some words")]
    before = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.split_special_tokens = True
    assert [encode_prompt(tokenizer, prompt) for prompt in prompts] == before
    with pytest.raises(DataError, match="control token"):
        encode_prompt(tokenizer, Prompt("p", "a<|end|>"))
