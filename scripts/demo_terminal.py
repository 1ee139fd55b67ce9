"""The picture of `tutelage demo` in a terminal: `docs/images/demo-terminal.svg`, from one run.

    script -qec "tutelage demo" demo.txt && python scripts/demo_terminal.py demo.txt

`script` (util-linux) records what the terminal received. Of a line that was drawn over, such as a
progress bar, the picture has the last state.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "demo-terminal.svg"
WIDTH = 100
MAX_BYTES = 60_000
_ERASED = re.compile(r"\r|\x1b\[\d*[AJK]")
_CURSOR = re.compile(r"\x1b\[\?25[hl]")
_SPINNERS = re.compile(r"[\u2800-\u28ff]")


def main() -> None:
    """Write the picture and print its size."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("recorded", type=Path, help="what script(1) recorded")
    recorded = options.parse_args().recorded.read_bytes().decode("utf-8")
    PICTURE.write_text(picture(recorded), encoding="utf-8")
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


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
    svg = "".join(f"{line.rstrip()}\n" for line in svg.strip().splitlines())
    if len(svg.encode("utf-8")) > MAX_BYTES:
        raise ValueError(f"the picture has {len(svg):,} bytes, more than {MAX_BYTES:,}")
    return svg


def settled(recorded: str) -> list[str]:
    """Each line in its last state; without spinners and what `script` adds."""
    lines = recorded.replace("\r\n", "\n").split("\n")
    shown = [_CURSOR.sub("", _ERASED.split(line)[-1]) for line in lines]
    return [
        line
        for line in shown
        if line and not line.startswith("Script ") and not _SPINNERS.search(line)
    ]


if __name__ == "__main__":
    main()
