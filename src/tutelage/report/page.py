"""The shell of every page: one file that fetches nothing; style and pictures are inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.files.atomic import write_output
from tutelage.report import plots, text
from tutelage.report.panels import Panel
from tutelage.report.token_viewer import csp_hash, template_text


@dataclass(frozen=True)
class PanelView:
    """A panel as the page embeds it: two data URIs and the words for it."""

    title: str
    unit: str
    alt: str
    light: str
    dark: str


def write_page(path: Path, context: dict[str, Any]) -> None:
    """Render a page and write it.

    Args:
        path: HTML file.
        context: kicker, name, facts, notes, `overview` (a template's name or None) with what that
            template shows, and `viewer_context`.

    Raises:
        RunError: the page cannot be written.
    """
    write_output(path, render_page(context).encode("utf-8"))


def render_page(context: dict[str, Any]) -> str:
    """The page as text; see `write_page`."""
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
    style = template_text("report.css")
    if context["has_conversations"]:
        style += template_text("conversations.css")
    shell = {"style": style, "style_hash": csp_hash(style)}
    return environment.get_template("report.html").render(shell | context)


def panel_views(panels: Sequence[Panel]) -> list[PanelView]:
    """Panels drawn for a light and for a dark page."""
    return [_panel_view(panel) for panel in panels]


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{100 * low:.1f} – {100 * high:.1f}"


def _panel_view(panel: Panel) -> PanelView:
    light, dark = (_data_uri(plots.render_svg(panel, theme)) for theme in (plots.LIGHT, plots.DARK))
    return PanelView(panel.title, panel.unit, panel.alt, light, dark)


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"
