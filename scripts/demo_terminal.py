"""The picture of `tutelage demo` in a terminal, of which `report_images.py` makes a file.

    script -qec "tutelage demo" demo.txt

`script` (util-linux) records what the terminal received. Of a line that was drawn over, such as a
progress bar, the picture has the last state.
"""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

WIDTH = 108
"""So many columns that every line of an evaluation is one line."""
MAX_BYTES = 60_000
_ERASED = re.compile(r"\r|\x1b\[\d*[AJK]")
_CURSOR = re.compile(r"\x1b\[\?25[hl]")
_SPINNERS = re.compile(r"[\u2800-\u28ff]")
_DARK = {
    "#000000": "#e4e7ea",
    "#008000": "#7ee787",
    "#808080": "#aab2bb",
    "#008080": "#56d4dd",
}
"""Colours of the text where a page is dark."""


def picture(recorded: str) -> str:
    """The lines that stay on the terminal, as SVG.

    Raises:
        ValueError: the SVG has more than `MAX_BYTES`.
    """
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    for line in settled(recorded):
        console.print(Text.from_ansi(line))
    svg = console.export_svg(
        title="tutelage demo", theme=DEFAULT_TERMINAL_THEME, unique_id="demo-terminal"
    )
    # Nothing is fetched: a reader's own monospaced font stands for the one that rich names.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono", svg)
    svg = svg.replace("#00ff00", "#008000")  # light green cannot be read on white
    svg = svg.replace('stroke="rgba(255,255,255,0.35)"', 'stroke="#c3c8d0"')
    svg = svg.replace("</style>", f"{_dark_style(svg)}\n</style>", 1)
    svg = "".join(f"{line.rstrip()}\n" for line in svg.strip().splitlines())
    if len(svg.encode("utf-8")) > MAX_BYTES:
        raise ValueError(f"the picture has {len(svg):,} bytes, more than {MAX_BYTES:,}")
    return svg


def _dark_style(svg: str) -> str:
    """The same classes in the colours of a dark page."""
    classes = re.findall(r"\.(demo-terminal-r\d+) \{ fill: (#\w{6})", svg)
    rules = [f".{name} {{ fill: {_DARK[color]} }}" for name, color in classes]
    rules += [
        f".demo-terminal-title {{ fill: {_DARK['#000000']} }}",
        'rect[fill="#ffffff"] { fill: #1b1e22; stroke: #4a525c }',
    ]
    return "@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}"


def settled(recorded: str) -> list[str]:
    """Each line in its last state; without spinners and what `script` adds."""
    lines = recorded.replace("\r\n", "\n").split("\n")
    shown = [_CURSOR.sub("", _ERASED.split(line)[-1]) for line in lines]
    return [
        line
        for line in shown
        if line and not line.startswith("Script ") and not _SPINNERS.search(line)
    ]
