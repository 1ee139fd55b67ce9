"""The process that renders chat templates: programs that come with models, run under limits.

Run as a program by `templates`; it imports nothing of this package, so it starts quickly. It
reads one JSON object a line, {"template", "variables", "max_characters", "date", "alarm_s"}, and
answers {"text"}, or {"fault", "reason"} where the fault is the template's or the messages'. The
parent kills it at its deadline; the kernel refuses memory, files, hence sockets, and to all but
root processes.

A template sees what transformers shows it: the sandbox, its settings, filters and functions.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2.debug  # noqa: F401  what jinja2 and pprint load late has to be here before the limits
from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 28
"""Address space of the process."""
_TEMPLATES_OWN = (
    TemplateSyntaxError, SyntaxError, SecurityError, MemoryError, RecursionError, OSError,
    AssertionError,
)  # fmt: skip
_BY_MESSAGES = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
    RuntimeError, NameError,
)  # fmt: skip


def main() -> None:
    """Answer requests until the input ends."""
    render("{{ strftime_now('%c %Z') }}{{ [1] | pprint }}{{ {} | tojson }}", {}, 99)
    _limit()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # Should the parent die, the kernel still ends a template that never would.
        signal.alarm(request.pop("alarm_s"))
        reply = answer(**request)
        signal.alarm(0)
        print(json.dumps(reply), flush=True)


def answer(
    template: str, variables: dict[str, Any], max_characters: int, date: str | None = None
) -> dict[str, str]:
    """The text, or whose fault it is that there is none, and why."""
    try:
        return {"text": render(template, variables, max_characters, date)}
    except _TEMPLATES_OWN as error:
        return {"fault": "template", "reason": _reason(error)}
    except _BY_MESSAGES as error:
        return {"fault": "messages", "reason": _reason(error)}


def render(
    template: str, variables: dict[str, Any], max_characters: int, date: str | None = None
) -> str:
    """The text of a template, of at most so many characters, at a date or now."""
    random.seed(0)  # the filter that picks at random picks the same in every process
    parts, left = [], max_characters
    now = datetime.now() if date is None else datetime.fromisoformat(date)
    for part in compiled(template).generate({**variables, "strftime_now": now.strftime}):
        left -= len(part)
        if left < 0:
            raise MemoryError(f"it writes more than {max_characters} characters")
        parts.append(part)
    return "".join(parts)


@lru_cache(maxsize=4)
def compiled(template: str) -> Template:
    """A template in the sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template)


class Generation(Extension):
    """Blocks of {% generation %}, which mark what an assistant wrote, are rendered as they are."""

    tags = {"generation"}  # noqa: RUF012  as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The content of the block, in a scope of its own."""
        number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(number)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _reason(error: Exception) -> str:
    return str(error)[:500] or type(error).__name__


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for nothing in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(nothing, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # input, output, errors, and no other


if __name__ == "__main__":
    main()
