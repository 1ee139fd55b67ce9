"""What the scripts that build embedded models share: their command, and a model card's form."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from ledger_training import load_model
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

ASSETS = Path(__file__).resolve().parents[1] / "src" / "tutelage" / "assets"
NUM_PROMPTS = 128
"""Held-out prompts that a card's figures are measured on."""

DAMAGED = """ It is a damaged copy of its teacher, which is a best case for on-policy distillation:
say so wherever figures obtained with it appear."""

_PREAMBLE = """\
---
license: apache-2.0
library_name: transformers
tags: [tutelage, synthetic]
---
# {name}

{summary}
"""


@dataclass(frozen=True)
class CardTexts:
    """Templates of a model card's sections."""

    what: str
    use: str
    measured: str
    table: str
    making: str
    limits: str


def write_card(folder: Path, texts: CardTexts, fields: Mapping[str, object]) -> None:
    """Write README.md of a model folder.

    Args:
        folder: of the model.
        texts: its sections.
        fields: values for them, `name` and `summary` among them; versions need not be.
    """
    versions = {
        "torch_version": torch.__version__.partition("+")[0],
        "transformers_version": transformers.__version__,
    }
    filled = {**fields, **versions}
    parts = [
        _PREAMBLE.format(**filled),
        _paragraph(texts.what, filled),
        "## Use\n",
        _paragraph(texts.use, filled),
        "## Figures\n",
        _paragraph(texts.measured, filled),
        texts.table.format(**filled),
        "## How it was made\n",
        _paragraph(texts.making, filled),
        "## Limits\n",
        _paragraph(texts.limits, filled),
    ]
    (folder / "README.md").write_text("\n".join(parts))


def _paragraph(template: str, fields: Mapping[str, object]) -> str:
    text = template.format(**fields)
    return textwrap.fill(text, 98, break_long_words=False, break_on_hyphens=False) + "\n"


@dataclass(frozen=True)
class Family:
    """The models of one task and how they are made; the first recipe is the teacher's."""

    recipes: Sequence[Any]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    build: Callable[[Any, Path, PreTrainedTokenizerFast], None]
    """Trains one model by its recipe and writes its folder below another."""
    measure: Callable[[Qwen3ForCausalLM, Qwen3ForCausalLM, PreTrainedTokenizerFast, int], Any]
    """Figures of a model beside its teacher."""
    write_card: Callable[[Path, Any, Any], None]
    """Writes the card of a folder from recipe and figures."""
    columns: Mapping[str, tuple[str, str]]
    """Of the table that is printed: a figure's name and format by heading."""


def run(family: Family, description: str) -> None:
    """The command: train the chosen models, write folders and cards, print the table of figures."""
    names = [recipe.name for recipe in family.recipes]
    arguments = _arguments(description, names)
    torch.set_num_threads(1)  # the order of additions, and so the weights, depends on it
    torch.use_deterministic_algorithms(True)
    disable_progress_bar()
    tokenizer, teacher = family.tokenizer(), names[0]
    if arguments.only not in (None, teacher) and not (arguments.out / teacher).is_dir():
        raise SystemExit(f"{arguments.out} has no {teacher}. Build it first: --only {teacher}.")
    table = {}
    for recipe in (r for r in family.recipes if arguments.only in (None, r.name)):
        folder = arguments.out / recipe.name
        if not arguments.measure:
            family.build(recipe, arguments.out, tokenizer)
        models = load_model(folder), load_model(arguments.out / teacher)
        table[recipe.name] = family.measure(*models, tokenizer, NUM_PROMPTS)
        family.write_card(folder, recipe, table[recipe.name])
    print(f"\n{'model':28}" + "".join(f"{heading:>10}" for heading in family.columns))
    for name, figures in table.items():
        cells = (f"{getattr(figures, key):>10{form}}" for key, form in family.columns.values())
        print(f"{name:28}{''.join(cells)}")


def _arguments(description: str, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the model folders")
    parser.add_argument("--only", choices=names, help="build this one alone")
    parser.add_argument("--measure", action="store_true", help="measure and rewrite the cards only")
    return parser.parse_args()
