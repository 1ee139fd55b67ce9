"""The part of a completion that answers: after its thoughts, and inside its last box.

Completions are untrusted text: this is string handling whose time grows with the text's length.
"""

from __future__ import annotations

import re

MAX_TEXT = 200_000
"""Characters of a completion that are looked at, counted from its end."""

_THOUGHT = re.compile(
    r"<(?P<end>/)?(?:seed:)?(?:think(?:ing)?|thought|reasoning)>|\[(?P<end_2>/)?THINK\]"
    r"|◁(?P<end_3>/)?think▷|<\|(?:START|(?P<end_4>END))_THINKING\|>"
    r"|<\|(?:begin|(?P<end_5>end))_of_thought\|>|<\|inner_(?:prefix|(?P<end_6>suffix))\|>"
    r"|<\|channel\|>(?:analysis|(?P<end_7>final))?|<\|channel>|(?P<end_8><channel\|>)"
)
"""How models mark where a thought begins and ends."""
THOUGHT_TOKENS = (
    *("<think>", "</think>", "<thinking>", "</thinking>", "<thought>", "</thought>"),
    *("<reasoning>", "</reasoning>", "<seed:think>", "</seed:think>", "[THINK]", "[/THINK]"),
    *("◁think▷", "◁/think▷", "<|START_THINKING|>", "<|END_THINKING|>", "<|begin_of_thought|>"),
    *("<|end_of_thought|>", "<|inner_prefix|>", "<|inner_suffix|>", "<|channel|>", "<|channel>"),
    "<channel|>",
)
"""The same marks as tokens, which many tokenizers count among their control tokens."""
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{0-9A-Za-z\\])")


def after_thoughts(completion: str) -> str | None:
    """What follows the last thought; None where it never ends.

    A thought that the prompt opened (`opened_thought`) has to stand before the completion.
    """
    text = completion[-MAX_TEXT:]
    marks = list(_THOUGHT.finditer(text))
    if not marks:
        return text
    return text[marks[-1].end() :] if any(marks[-1].groups()) else None


def ends_of_marks(text: str) -> list[int]:
    """Where each mark of a thought ends."""
    return [mark.end() for mark in _THOUGHT.finditer(text)]


def opened_thought(prompt: str) -> str:
    """The mark at the end of a rendered prompt that opens a thought; "" if none does.

    Chat templates of models that always think end their generation prompt with it, so that the
    completion begins inside of the thought and only closes it.
    """
    for found in _THOUGHT.finditer(prompt, max(0, len(prompt) - 100)):
        if not any(found.groups()) and not prompt[found.end() :].strip():
            return prompt[found.start() :]
    return ""


def closes_unopened(completion: str) -> bool:
    """Whether a thought ends that began before the completion: its prompt had opened it."""
    first = _THOUGHT.search(completion)
    return first is not None and any(first.groups())


def has_box(text: str) -> bool:
    """Whether a text marks an answer by ``\\boxed`` or ``\\fbox``, finished or not."""
    return _BOX.search(text) is not None


def last_box(text: str) -> str | None:
    """Content of the last ``\\boxed{...}``; "" if it is empty or unfinished, None without one."""
    boxes = list(_BOX.finditer(text))
    return _content(text[boxes[-1].end() :]) if boxes else None


def unboxed(answer: str) -> str:
    """An answer without the boxes around it."""
    for _ in range(3):
        box = _BOX.match(answer.strip())
        if box is None:
            break
        answer = _content(answer.strip()[box.end() :])
    return answer


def _content(text: str) -> str:
    if not text.startswith("{"):
        found = re.match(r"\\[a-zA-Z]+|[0-9A-Za-z]", text)
        return found[0] if found else ""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[1 : brace.start()].strip()
    return ""


def finished_lines(text: str, is_truncated: bool) -> str:
    """The text; one that was cut off without its last line, which may lack digits."""
    return text.rpartition("\n")[0] if is_truncated else text
