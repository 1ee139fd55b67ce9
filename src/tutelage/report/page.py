"""The shell of every page: one file that fetches nothing; style, data and script are inside."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.files.atomic import write_output
from tutelage.report import text
from tutelage.report.embed import csp_hash, template_text

if TYPE_CHECKING:
    from jinja2 import Environment

_STYLES = ("report.css", "curves.css", "tokens.css")


def write_page(path: Path, context: dict[str, Any], option: str = "--out") -> None:
    """Render a page and write it.

    Args:
        path: HTML file.
        context: kicker, name, facts, notes, `overview` (a template's name or None) with what that
            template shows, `panel_context` and `viewer_context`.
        option: of the command, that chooses another place.

    Raises:
        RunError: the page cannot be written.
    """
    write_output(path, render_page(context).encode("utf-8"), option)


def render_page(context: dict[str, Any]) -> str:
    """The page as text; see `write_page`."""
    return _environment().get_template("report.html").render(_shell(context) | context)


@cache
def _environment() -> Environment:
    """Templates, compiled once."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tutelage.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=text.number, percent=text.percent, visible=text.visible, interval=_interval
    )
    return environment


def _shell(context: dict[str, Any]) -> dict[str, Any]:
    """Style and script of the parts that the page has, with the hashes that allow them."""
    more = ["conversations"] if context["has_conversations"] else []
    style = "".join(map(template_text, [*_STYLES, *(f"{name}.css" for name in more)]))
    parts = ["curves.js"] if context["panel_data"] else []
    if context["tokens"]:
        parts += ["records.js", "detail.js", *(f"{name}.js" for name in more)]
        parts += ["viewer.js", "map.js", "rules.js"]
        parts += ["gate.js"] if context["has_gate"] else []
    parts += ["views.js", *(["follow.js"] if context.get("reload_s") else [])]
    script = _script(["dom.js", *parts]) if len(parts) > 1 else None
    return {
        "reload_s": None,
        "style": style,
        "style_hash": csp_hash(style),
        "script": script,
        "script_hash": script and csp_hash(script),
    }


def _script(names: list[str]) -> str:
    body = "\n".join(map(template_text, names))
    return f'"use strict";\n(() => {{\n{body}}})();\n'


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{100 * low:.1f} – {100 * high:.1f}"
