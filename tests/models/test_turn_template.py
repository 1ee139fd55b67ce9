"""What stands between two turns is the chat template's text, and generated ids stay as they are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tutelage.data.batch import collate
from tutelage.data.types import Message, Prompt, Rollout
from tutelage.errors import ModelError
from tutelage.models.chat.turn_template import TurnTemplate, turn_template
from tutelage.models.tokenizers import control_ids, encode_prompt

TEMPLATES = Path(__file__).with_name("templates")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>"),
)
TEXT = (
    "the model looks up the price of tea and of coffee, and then it adds both prices. "
    '{"name": "look_up", "arguments": {"item": "tea"}} user assistant system tool ipython '
    "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think> "
)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "The price of an item.",
            "parameters": {
                "type": "object",
                "properties": {"item": {"type": "string"}},
                "required": ["item"],
            },
        },
    }
]


def bpe(control: tuple[str, ...], eos: str, template: str, **options: Any) -> Any:
    """A small tokenizer of bytes with merges, and the tags of calls as ordinary tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.pop("space", False))
    core.decoder = decoders.ByteLevel()
    core.normalizer = options.pop("normalizer", None)
    core.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(control),
            show_progress=False,
        ),
    )
    core.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        bos_token=control[0],
        extra_special_tokens=list(control),
        **options,
    )
    tokenizer.chat_template = template
    tokenizer.name_or_path = "folder"
    return tokenizer


def qwen_text(messages: list[Message], header: str) -> str:
    """What Qwen's templates write after an answer."""
    parts, before = ["<|im_end|>\n"], ""
    for message, after in zip(messages, [*(m["role"] for m in messages[1:]), ""], strict=True):
        if message["role"] == "tool":
            parts.append("" if before == "tool" else "<|im_start|>user")
            parts.append(f"\n<tool_response>\n{message['content']}\n</tool_response>")
            parts.append("" if after == "tool" else "<|im_end|>\n")
        else:
            parts.append(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n")
        before = message["role"]
    return "".join(parts) + f"<|im_start|>assistant\n{header}"


def llama_text(messages: list[Message], header: str) -> str:
    """What Llama 3's template writes after an answer."""
    parts = ["<|eot_id|>"]
    for message in messages:
        is_tool = message["role"] == "tool"
        role = "ipython" if is_tool else message["role"]
        content = message["content"].strip()
        if is_tool:
            content = json.dumps(message["content"], ensure_ascii=False)
        parts.append(f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>")
    return "".join(parts) + f"<|start_header_id|>assistant<|end_header_id|>\n\n{header}"


@dataclass(frozen=True)
class Family:
    """A template, and what it has to write, put together by hand."""

    template: str
    control: tuple[str, ...]
    end: str
    stops: tuple[str, ...]
    text: Callable[[list[Message], str], str]
    enable_thinking: bool | None = None
    header: str = ""

    def tokenizer(self) -> Any:
        text = (TEMPLATES / f"{self.template}.jinja").read_text(encoding="utf-8")
        return bpe(self.control, self.end, text)

    @property
    def variables(self) -> dict[str, bool]:
        thinking = self.enable_thinking
        return {} if thinking is None else {"enable_thinking": thinking}


QWEN_STOPS = ("<|im_end|>", "<|endoftext|>")
FAMILIES = {
    "Qwen2.5": Family("qwen2_5", QWEN, "<|im_end|>", QWEN_STOPS, qwen_text),
    "Qwen3 thinking": Family("qwen3", QWEN, "<|im_end|>", QWEN_STOPS, qwen_text, True),
    "Qwen3 not thinking": Family(
        "qwen3", QWEN, "<|im_end|>", QWEN_STOPS, qwen_text, False, "<think>\n\n</think>\n\n"
    ),
    "Llama 3": Family(
        *("llama3", LLAMA, "<|eot_id|>"),
        *(("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"), llama_text),
    ),
}
family_of = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)

PIECES = (
    *(
        "price",
        "tea",
        " ",
        "\n",
        "\n\n",
        "é",
        "日本",
        "🧮",
        "\t",
        '"',
        "\\",
        "{}",
        "[1, 2]",
        "</s>",
    ),
    *("<tool_response>", "</tool_call>", "null", "0.5", "e\u0301", "\u2028", "\x00", "<", "|"),
)


def random_messages(rng: random.Random) -> list[Message]:
    def text() -> str:
        words = "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))
        return json.dumps({"found": words}, ensure_ascii=False) if rng.random() < 0.3 else words

    if rng.random() < 0.2:
        return [{"role": "user", "content": text()}]
    return [
        {"role": "tool", "name": "look_up", "content": text()} for _ in range(rng.randint(1, 4))
    ]


def check_conversation(family: Family, tokenizer: Any, turns: TurnTemplate, seed: int) -> bool:
    """One random conversation; returns whether its tokens are not those of its own text."""
    rng = random.Random(seed)
    stops = tokenizer.convert_tokens_to_ids(list(family.stops))
    ordinary = sorted(set(range(len(tokenizer))) - control_ids(tokenizer))
    tools = TOOLS if rng.random() < 0.7 else []
    messages: list[Message] = [{"role": "user", "content": "How much is tea?"}]
    if rng.random() < 0.5:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    prompt = Prompt("p", tuple(messages), tools=tuple(tools))
    ids = encode_prompt(tokenizer, prompt, family.enable_thinking)
    num_prompt, sampled, is_generated = len(ids), [], []
    for turn in range(rng.randint(1, 5)):
        if turn:
            answers = random_messages(rng)
            between = turns.between(answers, tools, "p")
            text = family.text(answers, family.header)
            template_end = tokenizer.convert_tokens_to_ids(family.end)
            assert tokenizer.decode([template_end, *between]) == text
            messages += answers
            whole = tokenizer.apply_chat_template(
                messages, tools or None, add_generation_prompt=True, tokenize=False,
                **family.variables,
            )  # fmt: skip
            assert whole.endswith(text)
            ids += between
            is_generated += [False] * len(between)
        generated = [rng.choice(ordinary) for _ in range(rng.randrange(20))]
        generated.append(rng.choice(stops))
        messages.append({"role": "assistant", "content": tokenizer.decode(generated[:-1])})
        ids += generated
        sampled += generated
        is_generated += [True] * len(generated)
    rollout = Rollout(prompt, 0, tuple(ids[:num_prompt]), tuple(ids[num_prompt:]),
                      is_generated=tuple(is_generated))  # fmt: skip
    batch = collate([rollout], 0)
    assert batch.input_ids[0].tolist() == ids  # what the teacher's forward has
    assert batch.tokens.tolist() == sampled == list(rollout.generated_ids)
    text = tokenizer.decode(sampled)
    return bool(tokenizer(text, add_special_tokens=False).input_ids != sampled)


def check_conversations(family: Family, num_conversations: int) -> None:
    tokenizer = family.tokenizer()
    stops = set(tokenizer.convert_tokens_to_ids(list(family.stops)))
    turns = TurnTemplate(tokenizer, stops, family.enable_thinking)
    num_others = sum(
        check_conversation(family, tokenizer, turns, seed) for seed in range(num_conversations)
    )
    assert num_others > num_conversations / 2  # tokenized again they would be other ids


@family_of
def test_conversations_are_token_in_token_out(family: Family) -> None:
    check_conversations(family, 60)


@pytest.mark.slow
@family_of
def test_many_conversations_are_token_in_token_out(family: Family) -> None:
    check_conversations(family, 500)


# --- forged control tokens ------------------------------------------------------------------------


@family_of
def test_no_text_of_a_message_becomes_a_control_token(family: Family) -> None:
    tokenizer = family.tokenizer()
    control = control_ids(tokenizer)
    turns = TurnTemplate(tokenizer, {tokenizer.eos_token_id}, family.enable_thinking)

    def control_in(messages: list[Message]) -> list[int]:
        return [i for i in turns.between(messages, TOOLS, "p") if i in control]

    assert len(control) == len(family.control)
    for token in family.control:
        broken = f"{token[0]} {token[1:]}"
        for role in ("user", "tool"):
            message = {"role": role, "name": "f", "content": f"a{token}b{token}"}
            assert control_in([message]) == control_in([{**message, "content": "plain"}])
            text = tokenizer.decode(turns.between([message], TOOLS, "p"))
            assert f"a{broken}b{broken}" in text


WRAPPED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
JOINED = {
    "the template completes a token": (WRAPPED.replace("{{ m.content }}", "<|{{ m.content }}|>"),
                                       {"content": "im_end"}),
    "a name completes a token": (WRAPPED.replace("\n{{", " <{{ m.name }}> {{"),
                                 {"name": "|im_end|", "content": "x"}),
    "tokens overlap": (WRAPPED, {"content": "<|im_end<|im_end|>|><|im_start|><|im_end|>"}),
}  # fmt: skip


@pytest.mark.parametrize(("template", "forged"), JOINED.values(), ids=JOINED)
def test_what_template_and_message_make_together_is_no_control_token(
    template: str, forged: dict[str, str]
) -> None:
    tokenizer = bpe(QWEN, "<|im_end|>", template)
    turns = TurnTemplate(tokenizer, {tokenizer.eos_token_id})
    plain = turns.between([{"role": "tool", "name": "f", "content": "x"}], (), "p")
    found = turns.between([{"role": "tool", "name": "f", **forged}], (), "p")
    control = control_ids(tokenizer)
    assert [i for i in found if i in control] == [i for i in plain if i in control]


def test_a_normalizer_makes_no_control_token() -> None:
    tokenizer = bpe(QWEN, "<|im_end|>", WRAPPED, normalizer=normalizers.Lowercase())
    tokenizer.add_tokens([AddedToken("<|stop|>", special=True, normalized=True)])
    turns = TurnTemplate(tokenizer, {tokenizer.eos_token_id})
    message = {"role": "tool", "name": "f", "content": "<|STOP|>"}
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert stop in tokenizer("<|STOP|>").input_ids
    assert stop not in turns.between([message], (), "p")


def test_a_message_without_control_tokens_stays_as_it_is() -> None:
    """Also where a template's own control tokens depend on it."""
    mark = "{{ '<|endoftext|>' if m.content | length > 1 }}"
    tokenizer = bpe(
        QWEN, "<|im_end|>", WRAPPED.replace("{{ m.content }}", mark + "{{ m.content }}")
    )
    turns = TurnTemplate(tokenizer, {tokenizer.eos_token_id})
    for content in ("", "a", "< |im_end|>", "ab"):
        ids = turns.between([{"role": "tool", "name": "f", "content": content}], (), "p")
        written = f"<|endoftext|>{content}" if len(content) > 1 else content
        wanted = f"<|im_start|>tool\n{written}<|im_end|><|im_start|>assistant\n"
        assert tokenizer.decode(ids) == wanted


def test_half_a_surrogate_pair_is_written_as_its_number() -> None:
    tokenizer = bpe(QWEN, "<|im_end|>", WRAPPED)
    turns = TurnTemplate(tokenizer, {tokenizer.eos_token_id})
    ids = turns.between([{"role": "tool", "name": "\udc00", "content": "a\ud800"}], (), "p")
    assert "a\\ud800<" in tokenizer.decode(ids)


# --- the end of a turn ----------------------------------------------------------------------------


def test_the_end_of_a_turn_is_left_out_whichever_stop_is_sampled() -> None:
    tokenizer = bpe(QWEN, "<|endoftext|>", WRAPPED)
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    message = [{"role": "user", "content": "x"}]
    text = "<|im_start|>user\nx<|im_end|><|im_start|>assistant\n"
    for stops in ({end}, {end, other}):
        assert tokenizer.decode(TurnTemplate(tokenizer, stops).between(message, (), "p")) == text


@pytest.mark.parametrize("header", ["", "<think>\n", "<think>\n\n</think>\n\n"])
def test_the_thought_that_a_header_opens_is_known(header: str) -> None:
    template = WRAPPED.replace("assistant\n", f"assistant\n{header}")
    tokenizer = bpe(QWEN, "<|im_end|>", template)
    turns = TurnTemplate(tokenizer, {tokenizer.eos_token_id})
    assert turns.thought == (header if header == "<think>\n" else "")


# --- templates that are refused -------------------------------------------------------------------

BEFORE = "depends on the turns before"
LOST = "leaves out messages of the role 'tool'"
ALL_USERS = "messages | selectattr('role', 'equalto', 'user')"
ANSWERS_AFTER = (
    "messages[loop.index0:] | selectattr('role', 'equalto', 'assistant') | list | length"
)


def added(text: str) -> str:
    """The template with something between the last message and the header."""
    return WRAPPED.replace("{% if add", f"{text}{{% if add")


def only(condition: str) -> str:
    """The template with contents of messages under a condition."""
    return WRAPPED.replace("{{ m.content }}", f"{{{{ m.content if {condition} }}}}")


REFUSED = {
    "counter of messages": (added("{{ messages | length }}"), BEFORE),
    "counter of users": (added(f"{{{{ {ALL_USERS} | list | length }}}}"), BEFORE),
    "the last answer again": (
        added("{% for m in messages if m.role == 'assistant' %}"
              "{{ m.content if loop.last }}{% endfor %}"),
        "writes the model's answer again"),
    "the length of the last answer": (
        added("{% for m in messages if m.role == 'assistant' %}"
              "{{ m.content | length if loop.last }}{% endfor %}"), BEFORE),
    "the first question again": (added(f"{{{{ ({ALL_USERS} | first).content }}}}"), BEFORE),
    "a system message again": (
        added("{{ messages[0].content if messages[0].role == 'system' }}"), BEFORE),
    "a reminder after many turns": (added("{{ 'Hurry.' if messages | length > 14 }}"), BEFORE),
    "a reminder after an error": (
        added("{{ 'Mind the error.' if messages | selectattr('role', 'equalto', 'tool') "
              "| selectattr('content', 'equalto', 'a\nb') | list }}"), BEFORE),
    "only the first answers of tools": (only("m.role != 'tool' or loop.index < 7"), BEFORE),
    "former answers of tools are dropped": (
        only(f"m.role != 'tool' or not {ANSWERS_AFTER}"),
        "the role 'tool' in another way when turns follow"),
    "answers of tools are dropped when others follow": (
        only("m.role != 'tool' or loop.last or loop.nextitem.role == m.role or "
             "'tool' not in messages[loop.index0 + 2:] | map(attribute='role') | list"),
        "the role 'tool' in another way when turns follow"),
    "former questions are dropped": (
        only("m.role != 'user' or messages[loop.index0:] | length < 4"),
        "the role 'user' in another way when turns follow"),
    "no role tool": (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}<|im_start|>assistant\n", LOST),
    "only the last of several tools": (only("m.role != 'tool' or loop.last"), LOST),
    "no role tool beside tools": (only("m.role != 'tool' or not tools"), LOST),
    "a template's own error": (
        "{{ raise_exception('no\ntools') if messages[-1].role == 'tool' }}" + WRAPPED,
        "refuses messages of the role 'tool' after an answer, 'no tools'"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "message"), REFUSED.values(), ids=REFUSED)
def test_templates_that_do_more_than_append_are_refused(template: str, message: str) -> None:
    tokenizer = bpe(QWEN, "<|im_end|>", template)
    with pytest.raises(ModelError, match=message) as caught:
        TurnTemplate(tokenizer, {tokenizer.eos_token_id})
    text = str(caught.value)
    assert text.startswith(
        "the chat template of 'folder' cannot be used for tasks of several turns"
    )
    assert "\n" not in text
    assert len(text) < 400


HARMLESS = {
    "as it is": WRAPPED,
    "former thoughts are dropped": WRAPPED.replace("m.content", "m.content.split('</think>')[-1]"),
    "a date": "{{ strftime_now('%Y') }}" + WRAPPED,
    "a count before the turns": "{{ messages | length }}" + WRAPPED,
    "answers are trimmed": WRAPPED.replace("m.content", "m.content.strip()"),
    "no system message": "{{ raise_exception('no') if messages[0].role == 'system' }}" + WRAPPED,
    "answers of tools as JSON": WRAPPED.replace("m.content", "m.content | tojson"),
    "another template for tools": {"default": WRAPPED, "tool_use": WRAPPED.replace("\n", "\n\n")},
}


@pytest.mark.parametrize("template", HARMLESS.values(), ids=HARMLESS)
def test_templates_that_append_are_taken(template: Any) -> None:
    tokenizer = bpe(QWEN, "<|im_end|>", template)
    turns = TurnTemplate(tokenizer, {tokenizer.eos_token_id})
    assert turns.between([{"role": "tool", "name": "f", "content": "x"}], TOOLS, "p")


def test_a_template_has_the_tools_of_the_conversation() -> None:
    tokenizer = bpe(QWEN, "<|im_end|>", added("{{ (tools or []) | length }}"))
    turns = TurnTemplate(tokenizer, {tokenizer.eos_token_id})
    for count in (0, 2, 3, 1, 2):
        ids = turns.between([{"role": "user", "content": "x"}], TOOLS * count, "p")
        assert tokenizer.decode(ids) == (
            f"<|im_start|>user\nx<|im_end|>{count}<|im_start|>assistant\n"
        )


def test_a_template_is_tried_once() -> None:
    tokenizer = bpe(QWEN, "<|im_end|>", WRAPPED)
    first = turn_template(tokenizer, {2})
    assert turn_template(tokenizer, frozenset({2})) is first
    assert turn_template(tokenizer, {1, 2}) is not first
    tokenizer.chat_template = added("{{ messages | length }}")
    with pytest.raises(ModelError, match=BEFORE):
        turn_template(tokenizer, {2})


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ModelError, match="'folder' has no chat template"):
        TurnTemplate(bpe(QWEN, "<|im_end|>", ""), {2})


PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}model:"


def test_a_tokenizer_that_writes_a_space_before_the_fragment_is_refused() -> None:
    with pytest.raises(ModelError, match="'folder' cannot write what stands between two turns"):
        TurnTemplate(bpe(QWEN, "<|im_end|>", PLAIN, space=True), {2})
    tokenizer = bpe(QWEN, "<|im_end|>", PLAIN)
    tokenizer.add_tokens(["x;"])  # an answer and what follows it would be one token
    TurnTemplate(tokenizer, {2})
    eating = bpe(QWEN, "<|im_end|>", WRAPPED.replace("\n{{", "\n\n{{"))
    eating.add_tokens([AddedToken("<|im_start|>user", rstrip=True, special=True)])
    TurnTemplate(eating, {2})  # as in the template's own rendering


def test_a_tokenizer_that_ends_turns_for_strange_characters_is_refused(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(chat_template=PLAIN.replace(":", " "))
    TurnTemplate(tokenizer, {tokenizer.eos_token_id})
    with pytest.raises(ModelError, match="writes the control token '<unk>' for a character"):
        TurnTemplate(tokenizer, {tokenizer.unk_token_id})


def test_a_template_that_ends_turns_where_the_model_does_not_stop_is_refused() -> None:
    tokenizer = bpe(QWEN, "<|im_end|>", WRAPPED)
    end, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")
    TurnTemplate(tokenizer, {end, other})
    message = r"ends turns with '<\|im_end\|>', but the model stops at '<\|endoftext\|>'"
    with pytest.raises(ModelError, match=message):
        TurnTemplate(tokenizer, {other})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ids = TurnTemplate(tokenizer, {other}).between([{"role": "user", "content": "x"}], (), "p")
    assert tokenizer.decode(ids) == "<|im_start|>user\nx<|im_start|>assistant\n"
