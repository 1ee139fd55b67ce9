"""Build the embedded coins models from fixed seeds: about ten minutes on one CPU core.

python scripts/build_coins_models.py [--out DIR] [--only NAME] [--measure]
"""

from __future__ import annotations

from pathlib import Path

from coins_cards import write_card
from coins_measuring import measure
from coins_training import Recipe, batches, build_tokenizer
from embedded_models import Family, run
from ledger_training import Schedule, Shape, fit, fresh_model, save_model
from transformers import PreTrainedTokenizerFast

TEACHER = "coins-teacher"

RECIPES = (
    Recipe(
        name=TEACHER,
        summary="The teacher: pays exactly, in any order, in three styles.",
        schedule=Schedule(1500, 48, 0.05, 7.5e-3, seed=1),
    ),
    Recipe(
        name="coins-student",
        summary="Trained on texts of which most are careless: often wrong, and sure of it.",
        schedule=Schedule(700, 48, 0.04, 6e-3, seed=7),
        is_student=True,
        careless_share=0.6,
    ),
    Recipe(
        name="coins-small",
        summary="A narrower model of fewer layers, stopped early: wrong where it hesitates.",
        schedule=Schedule(200, 48, 0.04, 6e-3, seed=2),
        is_student=True,
        shape=Shape(width=96, num_layers=2, mlp_width=192),
    ),
)


def build(recipe: Recipe, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train one model by its recipe and write its folder below `out`."""
    model = fresh_model(recipe.shape, tokenizer, recipe.schedule.seed)
    model.train()
    fit(model, recipe.name, recipe.schedule, batches(tokenizer, recipe))
    save_model(model, out / recipe.name, tokenizer)


COLUMNS = {
    "greedy": ("greedy", ".1%"),
    "mean@8": ("mean_at_8", ".1%"),
    "pass@8": ("pass_at_8", ".1%"),
    "distinct": ("distinct", ".2f"),
    "entropy": ("entropy", ".3f"),
    "Q3 rows": ("q3_rows", ".1%"),
    "Q3 KL": ("q3_kl", ".1%"),
}


def main() -> None:
    """Train the chosen models, write their folders and cards, and print the table of figures."""
    run(Family(RECIPES, build_tokenizer, build, measure, write_card, COLUMNS), __doc__)


if __name__ == "__main__":
    main()
