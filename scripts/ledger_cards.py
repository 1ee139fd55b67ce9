"""Model cards of the embedded ledger models."""

from __future__ import annotations

from pathlib import Path

from ledger_measuring import Figures
from ledger_training import Recipe


def write_card(folder: Path, recipe: Recipe, figures: Figures) -> None:
    """Write README.md of a model folder."""
    (folder / "README.md").write_text(f"# {recipe.name}\n\n{recipe.summary}\n{figures}\n")
