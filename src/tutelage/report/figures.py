"""The plots of a run's page as files for papers: SVG and PNG, on white."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tutelage.errors import RunError
from tutelage.files.atomic import write_output
from tutelage.report.panels import Panel, panels_of
from tutelage.report.plots import LIGHT, Theme, draw_panel, render
from tutelage.report.records import RunRecord, read_run
from tutelage.report.token_plots import draw_entropies, draw_kept, draw_map, draw_overlap, highest
from tutelage.report.tokens import rows_of, snapshots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw: TypeAlias = "Callable[[Axes, Theme], None]"
_SQUARE = (4.6, 3.6)


def write_figures(run: Path, folder: Path) -> list[Path]:
    """Write each plot of a run as `NAME.svg` and `NAME.png`.

    Args:
        run: run folder with manifest.json and metrics.jsonl.
        folder: where the files go; it is made if it is not there.

    Returns:
        The files, in the order of the page. Of recorded tokens there are pictures of the first
        and of the last snapshot.

    Raises:
        RunError: the folder is no run folder, holds a malformed line or nothing to draw, or a
            file cannot be written.
    """
    record = read_run(run)
    paths = []
    for name, draw, size in _figures(record):
        for kind in ("svg", "png"):
            path = folder / f"{name}.{kind}"
            write_output(path, render(draw, LIGHT, kind, size), "--figures")
            paths.append(path)
    if not paths:
        raise RunError(f"{run} has measured nothing that could be drawn. Train it further first.")
    return paths


def _figures(record: RunRecord) -> Iterator[tuple[str, Draw, tuple[float, float]]]:
    for panel in panels_of(record):
        yield _file_name(panel.title), partial(_labelled, panel), (4.6, 2.7)
    found, ends = snapshots(record.tokens), highest(rows_of(record.tokens))
    for kind in dict.fromkeys(kind for _, kind in found):
        steps = [step for step, other in found if other == kind]
        for step in dict.fromkeys((min(steps), max(steps))):
            records = found[step, kind]
            rows, where = rows_of(records), f"{_file_name(kind)}-step-{step}"
            if rows:
                yield (
                    f"entropy-kl-map-{where}",
                    partial(draw_map, rows, record.config, ends),
                    _SQUARE,
                )
                yield f"entropies-{where}", partial(draw_entropies, records), _SQUARE
                yield f"rules-overlap-{where}", partial(draw_overlap, records, rows), (5.2, 2.7)
                kept = partial(draw_kept, records, rows, record.config)
                yield f"rules-kept-{where}", kept, (6.2, 2.7)


def _labelled(panel: Panel, axes: Axes, theme: Theme) -> None:
    """A panel without the page around it needs its unit at the axis."""
    draw_panel(panel, axes, theme)
    axes.set_ylabel(panel.unit, fontsize=8, color=theme.ink)


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "tokens"
