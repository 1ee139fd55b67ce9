"""The ids that a chat template writes between two turns of the model.

A conversation is token in, token out: the ids that the model generated stand in it as they were
sampled, and nothing is tokenized again, because sampled ids are seldom those that the tokenizer
would give for their text. What stands between two turns (the end of the turn, the answers of the
environment, the header of the next turn) is the chat template's own text: what it writes after the
model's answer when it renders a short conversation that ends with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from tutelage.data.types import Message
from tutelage.errors import DataError, ModelError
from tutelage.grading.answer import opened_thought
from tutelage.models.chat_template import render_chat, template_of
from tutelage.models.tokenizers import control_ids, encode_completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "vq0kz7jx"
"""Stands for what the model generated."""
_QUESTION: Message = {"role": "user", "content": "x"}
_WORDS = ("0", "1", "a", "b", "x", "word")
"""Contents of messages, to see what a template writes around them."""
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


class TurnTemplate:
    """What the chat template writes between two turns of the model.

    Args:
        tokenizer: the model's, with its chat template.
        stops: every id that ends a turn.
        enable_thinking: passed to the chat template when not None, as for the prompt.

    Raises:
        ModelError: there is no chat template; or it leaves out answers of tools; or what it writes
            between two turns depends on former turns, or is changed by later ones; or the
            tokenizer writes something else for it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: AbstractSet[int],
        enable_thinking: bool | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = frozenset(stops)
        self._variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        control = control_ids(tokenizer)
        texts = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(control))]
        longest_first = sorted(filter(None, texts), key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        unknown = tokenizer.unk_token_id  # a character that the tokenizer does not have
        self._control = control - ({unknown} - self._stops)
        self._num_control: dict[tuple[bool, tuple[str, ...]], list[int]] = {}
        for tools in ((), (_TOOL,)):
            self._refuse_lost_messages(tools)
            self._refuse_dependence(tools)
            self._refuse_later_changes(tools)
        self._refuse_other_text()

    @property
    def thought(self) -> str:
        """The mark of a thought that the header of the next turn ends with; "" without one."""
        return opened_thought(self._inserted([{"role": "user", "content": "x"}], (), ""))

    def between(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], name: str
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
        unforged = [_changed(message, self._broken) for message in messages]
        ids = self._encoded(unforged, tools, name)
        found = self._control_of(ids)
        if found != self._expected(messages, tools, name):
            # The template and a message together make a control token, or a normalizer does; or
            # what the template writes depends on the message.
            spread = [_changed(message, " ".join) for message in unforged]
            others = self._encoded(spread, tools, name)
            ids = ids if found == self._control_of(others) else others
        return tuple(ids[1:] if ids and ids[0] in self._stops else ids)

    def _encoded(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], name: str
    ) -> list[int]:
        return encode_completion(self._tokenizer, self._inserted(messages, tools, name))

    def _inserted(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        name: str,
        history: Sequence[Message] = (_QUESTION,),
        answer: str = _ANSWER,
        generation_prompt: bool = True,
    ) -> str:
        """The text after an answer, which is the last message of the history."""
        rendered = self._rendered(
            [*history, {"role": "assistant", "content": answer}, *messages],
            tools,
            name,
            generation_prompt,
        )
        return rendered.partition(_ANSWER)[2]

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        name: str,
        generation_prompt: bool = True,
    ) -> str:
        template = template_of(self._tokenizer, tools, name)
        variables = self._variables | ({"tools": list(tools)} if tools else {})
        return render_chat(self._tokenizer, template, messages, variables, name, generation_prompt)

    # --- control tokens ---------------------------------------------------------------------------

    def _broken(self, text: str) -> str:
        """The text without that of any control token, and without halves of surrogate pairs."""
        text = text.encode(errors="backslashreplace").decode()
        for _ in range(4):  # tokens may overlap
            text = self._control_text.sub(_break, text)
        return text

    def _control_of(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._control]

    def _expected(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], name: str
    ) -> list[int]:
        """The control ids that the template writes around messages of these roles."""
        key = bool(tools), tuple(message["role"] for message in messages)
        if key not in self._num_control:
            plain = [_changed(message, lambda _: _WORDS[0]) for message in messages]
            self._num_control[key] = self._control_of(self._encoded(plain, tools, name))
        return self._num_control[key]

    # --- what is refused --------------------------------------------------------------------------

    def _refuse_lost_messages(self, tools: Sequence[Mapping[str, Any]]) -> None:
        for kinds in (("user",), ("tool",), ("tool", "tool", "tool")):
            messages = [_message(kind, "0") for kind in kinds]
            text = self._probe(messages, tools)
            for at, kind in enumerate(kinds):
                others = [*messages[:at], _message(kind, "1"), *messages[at + 1 :]]
                if self._probe(others, tools) == text:
                    raise self._unusable(f"leaves out messages of the role {kind!r}")

    def _refuse_dependence(self, tools: Sequence[Mapping[str, Any]]) -> None:
        for kinds in (("user",), ("tool",), ("tool", "tool")):
            messages = [_message(kind, "0") for kind in kinds]
            wanted = self._probe(messages, tools)
            if _ANSWER in wanted:
                raise self._unusable("writes an answer of the model again after it")
            for history, answer in self._histories(tools):
                if self._probe(messages, tools, history, answer) != wanted:
                    raise self._unusable(
                        "writes something else between two turns after other former turns"
                    )

    def _refuse_later_changes(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """What was inserted has to stand there when the conversation has gone on."""
        later = ([_message("tool", "1")], [_message("user", "1")])
        for kinds in (("user",), ("tool",), ("tool", "tool")):
            messages = [_message(kind, "0") for kind in kinds]
            wanted = self._probe(messages, tools, generation_prompt=False)
            for following in later:
                goes_on: list[Message] = [*messages, {"role": "assistant", "content": "y"}]
                if not self._probe([*goes_on, *following], tools).startswith(wanted):
                    raise self._unusable("writes messages in another way when later turns follow")

    def _refuse_other_text(self) -> None:
        """The tokenizer may write a space before a text, or leave spaces out."""
        prefix = encode_completion(self._tokenizer, "x")
        for kind in ("user", "tool"):
            for word in _WORDS:
                text = self._probe([_message(kind, word)], ())
                ids = encode_completion(self._tokenizer, text)
                if self._decoded([*prefix, *ids]) == self._decoded(prefix) + text:
                    break
                history = self._rendered(
                    [_QUESTION, {"role": "assistant", "content": _ANSWER}, _message(kind, word)],
                    (),
                    "",
                )
                whole = encode_completion(self._tokenizer, history)
                if ids == whole[len(whole) - len(ids) :]:
                    break
            else:
                raise ModelError(
                    f"the tokenizer {self._tokenizer.name_or_path!r} cannot write what stands "
                    f"between two turns: {text[:60]!r} becomes {self._decoded(ids)[:60]!r}. Use "
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
        history: Sequence[Message] = (_QUESTION,),
        answer: str = _ANSWER,
        generation_prompt: bool = True,
    ) -> str:
        try:
            return self._inserted(messages, tools, "", history, answer, generation_prompt)
        except DataError as error:
            reason = str(error.__cause__)
            raise self._unusable(
                f"refuses {messages[0]['role']!r} messages after an answer ({reason[:100]})"
            ) from error

    def _histories(self, tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[Message], str]]:
        """Conversations of other lengths and contents, and answers that end them."""
        takes_system = True
        try:
            self._rendered([_message("system", "s"), _QUESTION], tools, "")
        except DataError:
            takes_system = False
        for roles in ("u", "uau", "uatau", "uat", "uatt", "uauatat", "uatatat"):
            for system in ("", "s") if takes_system else ("",):
                history = [_message_at(role, at) for at, role in enumerate(system + roles)]
                for before in ("", "words ", "<think>\nwhy\n</think>\n\n", '{"name": "f"}\n'):
                    yield history, before + _ANSWER

    def _unusable(self, reason: str) -> ModelError:
        return ModelError(
            f"the chat template of {self._tokenizer.name_or_path!r} cannot be used for tasks of "
            f"several turns: it {reason}. Use another model, or a chat template that only appends."
        )


def _break(token: re.Match[str]) -> str:
    text = token[0]
    return f"{text[0]} {text[1:]}" if len(text) > 1 else f"U+{ord(text):04X}"


def _changed(message: Message, change: Any) -> Message:
    return {key: text if key == "role" else change(text) for key, text in message.items()}


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content} | ({"name": "look_up"} if role == "tool" else {})


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
