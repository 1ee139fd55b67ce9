"""The ids that a chat template writes between two turns of the model.

A conversation is token in, token out: the ids that the model generated stand in it as they were
sampled, and nothing is tokenized again, because sampled ids are seldom those that the tokenizer
would give for their text. What stands between two turns (the end of the turn, the answers of the
environment, the header of the next turn) is the chat template's own text: what it writes after the
model's answer when it renders a short conversation that ends with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tutelage.data.types import Message
from tutelage.errors import DataError, ModelError
from tutelage.grading.answer import opened_thought
from tutelage.models.chat.template import render_chat, template_of
from tutelage.models.tokenizers import control_ids, encode_completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "vq0kz7jx"
"""Stands for what the model generated."""
_QUESTION: Message = {"role": "user", "content": "x"}
_PROBE = "of a first look at the template"
"""The name of conversations that are rendered before there are prompts."""
_WORDS = ("qf1zw", "qf2zw")
"""Contents of messages, to see what a template writes around them."""
_TOKEN = "0"
"""A content of which every tokenizer has the characters."""
_STRANGE = "\u2603\U0001f9ff"
"""Characters that a tokenizer may not have."""
_KINDS = (("user",), ("tool",), ("tool", "tool", "tool"))
"""Roles of what an environment answers."""
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


def turn_template(
    tokenizer: PreTrainedTokenizerBase,
    stops: AbstractSet[int],
    enable_thinking: bool | None = None,
) -> TurnTemplate:
    """The `TurnTemplate` of these; a template is tried once in a process."""
    return _tried(tokenizer, repr(tokenizer.chat_template), frozenset(stops), enable_thinking)


@lru_cache(maxsize=8)
def _tried(
    tokenizer: PreTrainedTokenizerBase,
    _: str,
    stops: frozenset[int],
    enable_thinking: bool | None,
) -> TurnTemplate:
    return TurnTemplate(tokenizer, stops, enable_thinking)


class TurnTemplate:
    """What the chat template writes between two turns of the model.

    Args:
        tokenizer: the model's, with its chat template.
        stops: every id that ends a turn.
        enable_thinking: passed to the chat template when not None, as for the prompt.

    Raises:
        ModelError: there is no chat template; or it leaves out answers of tools; or what it writes
            between two turns depends on former turns, or is changed by later ones; or the
            tokenizer writes something else for it; or it ends turns with an id that is no stop.
    """

    thought: str
    """The mark of a thought that the header of a turn ends with; "" without one."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: AbstractSet[int],
        enable_thinking: bool | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which says how "
                "turns follow one another. Use a chat model for tasks of several turns."
            )
        self._tokenizer = tokenizer
        self._stops = frozenset(stops)
        self._variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        control = control_ids(tokenizer)
        texts = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(control))]
        longest_first = sorted(filter(None, texts), key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        unknown = tokenizer.unk_token_id  # stands for a character that the tokenizer does not have
        self._control = control - ({unknown} - self._stops)
        self._template_control: dict[tuple[bool, tuple[str, ...]], list[int]] = {}
        self._stand_ins: dict[str, Sequence[Mapping[str, Any]]] = {"[]": ()}
        for tools in ((), (_TOOL,)):
            self._refuse_lost_messages(tools)
            self._refuse_dependence(tools)
            self._refuse_later_changes(tools)
        self._refuse_other_text()
        self._refuse_another_end()
        self.thought = opened_thought(self._probe([_QUESTION], ()))

    def between(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], name: str
    ) -> tuple[int, ...]:
        """Ids that are inserted after a finished turn: the answers, and the next turn's header.

        The id that ended the turn was generated; the template's own is left out for it, whichever
        of the stop ids was sampled. Text of a message that would become a control token, such as a
        forged end of turn, is broken: a space follows its first character.

        Args:
            messages: what the environment answers.
            tools: JSON schemas of the tools, as for the prompt.
            name: of the prompt, for errors.

        Returns:
            Token ids.

        Raises:
            DataError: the template refuses the messages.
        """
        tools = self._stand_in(tools)
        unforged = [_changed(message, self._broken) for message in messages]
        ids = self._encoded(unforged, tools, name)
        found = self._control_of(ids)
        if found != self._control_around(messages, tools, name):
            # The template and a message together make a control token, or a normalizer does; or
            # what the template writes depends on the message.
            spread = [_changed(message, " ".join) for message in unforged]
            others = self._encoded(spread, tools, name)
            ids = ids if found == self._control_of(others) else others
        return tuple(ids[1:] if ids and ids[0] in self._stops else ids)

    def _refuse_another_end(self) -> None:
        """Refuses a template that ends turns with an id at which the model does not stop.

        Both ends would then stand behind every turn. An id that begins the next turn ends none.
        """
        first = self._encoded([_QUESTION], (), "")[:1]
        before = self._rendered([_message("user", _ANSWER)], (), "").partition(_ANSWER)[0]
        opening = self._control_of(encode_completion(self._tokenizer, before))[-1:]
        if first == opening or not self._control_of(first) or first[0] in self._stops:
            return
        token, *others = (
            str(self._tokenizer.convert_ids_to_tokens(i)) for i in (first[0], *sorted(self._stops))
        )
        raise ModelError(
            f"the chat template of {self._tokenizer.name_or_path!r} ends turns with {token!r}, but "
            f"the model stops at {', '.join(map(repr, others)) or 'no token'}. Name {token!r} in "
            "eos_token_id of its generation_config.json, or use a model trained on this template."
        )

    def _stand_in(self, tools: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """One short tool for many, where it makes no difference to what is inserted."""
        key = json.dumps(tools)
        if key not in self._stand_ins:
            probes = [[_message(kind, _WORDS[0]) for kind in kinds] for kinds in _KINDS]
            short = all(self._probe(m, tools) == self._probe(m, (_TOOL,)) for m in probes)
            self._stand_ins[key] = (_TOOL,) if short else tools
        return self._stand_ins[key]

    def _encoded(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], name: str
    ) -> list[int]:
        return encode_completion(self._tokenizer, self._inserted(messages, tools, name))

    def _inserted(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        name: str,
    ) -> str:
        """What the template writes after an answer of the model."""
        turns = [_QUESTION, _answer(_ANSWER), *messages]
        return self._rendered(turns, tools, name).partition(_ANSWER)[2]

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        name: str,
    ) -> str:
        template = template_of(self._tokenizer, tools, name)
        variables = self._variables | ({"tools": list(tools)} if tools else {})
        return render_chat(self._tokenizer, template, messages, variables, name)

    # --- control tokens ---------------------------------------------------------------------------

    def _broken(self, text: str) -> str:
        """The text without that of any control token, and without halves of surrogate pairs."""
        return self._control_text.sub(_break, text.encode(errors="backslashreplace").decode())

    def _control_of(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._control]

    def _control_around(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], name: str
    ) -> list[int]:
        """The control ids that the template writes around messages of these roles."""
        key = bool(tools), tuple(message["role"] for message in messages)
        if key not in self._template_control:
            plain = [_changed(message, lambda _: _TOKEN) for message in messages]
            self._template_control[key] = self._control_of(self._encoded(plain, tools, name))
        return self._template_control[key]

    # --- what is refused --------------------------------------------------------------------------

    def _refuse_lost_messages(self, tools: Sequence[Mapping[str, Any]]) -> None:
        for kinds in _KINDS:
            messages = [_message(kind, _WORDS[0]) for kind in kinds]
            text = self._probe(messages, tools)
            for at, kind in enumerate(kinds):
                others = [*messages[:at], _message(kind, _WORDS[1]), *messages[at + 1 :]]
                if self._probe(others, tools) == text:
                    raise self._unusable(f"leaves out messages of the role {kind!r}")

    def _refuse_dependence(self, tools: Sequence[Mapping[str, Any]]) -> None:
        for kinds in _KINDS:
            messages = [_message(kind, _WORDS[0]) for kind in kinds]
            wanted = self._probe(messages, tools)
            if _ANSWER in wanted:
                raise self._unusable("writes the model's answer again behind it")
            for history, answer in self._histories(tools):
                text = self._rendered([*history, _answer(answer), *messages], tools, _PROBE)
                is_last = answer.endswith(_ANSWER)
                if not text.endswith(_ANSWER + wanted if is_last else wanted):
                    found = text.rpartition(_ANSWER)[2]
                    raise self._unusable(
                        "writes between two turns what depends on the turns before, "
                        f"{_difference(wanted, found)}"
                    )

    def _refuse_later_changes(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """What was inserted has to stand there when the conversation has gone on."""
        for kinds in _KINDS:
            messages = [_message(kind, _WORDS[0]) for kind in kinds]
            wanted = self._probe(messages, tools)
            end = wanted.rfind(_WORDS[0]) + len(_WORDS[0])  # then the header of the next turn
            for following in _KINDS[:2]:
                later = [_answer("y"), *(_message(kind, _WORDS[1]) for kind in following)]
                found = self._probe([*messages, *later, _answer("z"), _QUESTION], tools)
                if not found.startswith(wanted[:end]):
                    raise self._unusable(
                        f"writes messages of the role {kinds[0]!r} in another way when turns "
                        f"follow, {_difference(wanted, found)}"
                    )

    def _refuse_other_text(self) -> None:
        """A tokenizer that writes a space before a text, say, or ends a turn within a message."""
        strange = encode_completion(self._tokenizer, _STRANGE)
        if self._control_of(strange):
            token = self._tokenizer.convert_ids_to_tokens(self._control_of(strange)[0])
            raise ModelError(
                f"the tokenizer {self._tokenizer.name_or_path!r} writes the control token "
                f"{token!r} for a character that it does not have, which would end a turn. Use "
                "another model for tasks of several turns."
            )
        before = encode_completion(self._tokenizer, "x")
        for kind in ("user", "tool"):
            message = _message(kind, _TOKEN)
            text = self._probe([message], ())
            ids = encode_completion(self._tokenizer, text)
            turns = [_QUESTION, _answer("x"), message]
            whole = encode_completion(self._tokenizer, self._rendered(turns, (), _PROBE))
            written = self._decoded([*before, *ids])
            is_written = written == self._decoded(before) + text
            if not is_written and whole[len(whole) - len(ids) :] != ids:
                raise ModelError(
                    f"the tokenizer {self._tokenizer.name_or_path!r} cannot write what stands "
                    f"between two turns, {_difference(text, written.removeprefix('x'))}. Use "
                    "another model for tasks of several turns."
                )

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _probe(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
    ) -> str:
        try:
            return self._inserted(messages, tools, _PROBE)
        except DataError as error:
            raise self._unusable(
                f"refuses messages of the role {messages[0]['role']!r} after an answer, "
                f"{' '.join(str(error.__cause__).split())[:100]!r}"
            ) from error

    def _histories(self, tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[Message], str]]:
        """Conversations of other lengths and contents, and answers that end them."""
        takes_system = True
        try:
            self._rendered([_message("system", "s"), _QUESTION], tools, _PROBE)
        except DataError:
            takes_system = False
        for shift, roles in enumerate(_HISTORIES):
            for system in ("", "s") if takes_system else ("",):
                turns = enumerate(system + roles, shift)
                history = [_message_at(role, at) for at, role in turns]
                for before, after in (_AROUND[0], _AROUND[shift % len(_AROUND)]):
                    yield history, before + _ANSWER + after

    def _unusable(self, reason: str) -> ModelError:
        return ModelError(
            f"the chat template of {self._tokenizer.name_or_path!r} cannot be used for tasks of "
            f"several turns: it {reason}. Use another model, or a chat template that writes every "
            "message, of tools too, in one way."
        )


_HISTORIES = ("u", "uau", "uat", "uatt", "uatau", "uauatat", "uatatatu", "uauauatauatatau")
"""User, assistant and tool messages before the last answer."""
_AROUND = (
    ("", ""),
    ("words ", " words"),
    ("<think>\nwhy\n</think>\n\n", ""),
    ("<think>", ""),
    ('{"name": "look_up"}\n', ""),
    ('<tool_call>\n{"name": "look_up", "arguments": {"item": "', '"}}\n</tool_call>'),
)
"""What an answer has before and after the mark that stands for it."""
_CONTENTS = {
    "u": ("user", ("x", "Is <think> a word?", "Go on.")),
    "s": ("system", ("Be brief.",)),
    "t": ("tool", ("1", '{"error": "no"}', "a\nb")),
    "a": (
        "assistant",
        (
            "y",
            "<think>\nwhy\n</think>\n\nso",
            '<tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call>',
        ),
    ),
}


def _message_at(role: str, at: int) -> Message:
    name, contents = _CONTENTS[role]
    return _message(name, contents[at % len(contents)])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content} | ({"name": "look_up"} if role == "tool" else {})


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _changed(message: Message, change: Callable[[str], str]) -> Message:
    return {key: text if key == "role" else change(text) for key, text in message.items()}


def _break(token: re.Match[str]) -> str:
    text = token[0]
    return f"{text[0]} {text[1:]}" if len(text) > 1 else f"U+{ord(text):04X}"


def _difference(wanted: str, found: str) -> str:
    """Where two texts begin to differ."""
    at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), None)
    at = max(0, (min(len(wanted), len(found)) if at is None else at) - 10)
    return f"{wanted[at : at + 40]!r} and {found[at : at + 40]!r}"
