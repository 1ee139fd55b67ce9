"""Build the embedded ledger models from fixed seeds: about seven minutes on one CPU core.

python scripts/build_ledger_models.py [--out DIR] [--only NAME] [--measure]
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from embedded_models import Family, run
from ledger_cards import write_card
from ledger_measuring import measure
from ledger_tokenizer import build_tokenizer
from ledger_training import (
    MAX_LENGTH,
    Lessons,
    Recipe,
    Schedule,
    Shape,
    fresh_model,
    load_model,
    save_model,
    train,
)
from transformers import PreTrainedTokenizerFast

from tutelage.data.tasks.ledger import WrongFacts

TEACHER = "ledger-teacher"

RECIPES = (
    Recipe(
        name=TEACHER,
        summary="The teacher: solves five-item ledgers in any order of work.",
        schedule=Schedule(1000, 48, 0.05, 7.5e-3, seed=1, num_easy_steps=150),
    ),
    Recipe(
        name="ledger-overconfident",
        summary="The teacher after a short training on partly wrong arithmetic: confidently wrong.",
        schedule=Schedule(110, 64, 0.025, 5e-3, seed=22),
        lessons=Lessons(facts=WrongFacts(fraction=0.25, probability=0.9)),
        parent=TEACHER,
    ),
    Recipe(
        name="ledger-small",
        summary="A narrower model, trained from scratch and stopped early.",
        schedule=Schedule(600, 48, 0.025, 3.75e-3, seed=2, num_easy_steps=150),
        shape=Shape(width=96, mlp_width=192),
    ),
    Recipe(
        name="ledger-collapsed",
        summary="The teacher after a short training on one order of work: right, but never varied.",
        schedule=Schedule(120, 32, 0.025, 5e-3, seed=5),
        lessons=Lessons(order="listed", swap=0.0),
        parent=TEACHER,
    ),
)


def build(recipe: Recipe, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train one model by its recipe and write its folder below `out`."""
    # A child starts from the saved parent, so --only gives the same weights as a full build.
    if recipe.parent is None:
        model = fresh_model(recipe.shape, tokenizer, recipe.schedule.seed)
    else:
        model = load_model(out / recipe.parent)
    model.train()
    train(model, tokenizer, recipe)
    save_model(model, out / recipe.name, tokenizer)


COLUMNS = {
    "greedy": ("greedy", ".1%"),
    "mean@8": ("mean_at_8", ".1%"),
    "pass@8": ("pass_at_8", ".1%"),
    "distinct": ("distinct", ".2f"),
    "Q3 rows": ("q3_rows", ".1%"),
    "Q3 KL": ("q3_kl", ".1%"),
}


def main() -> None:
    """Train the chosen models, write their folders and cards, and print the table of figures."""
    run(
        Family(RECIPES, partial(build_tokenizer, MAX_LENGTH), build, measure, write_card, COLUMNS),
        __doc__,
    )


if __name__ == "__main__":
    main()
