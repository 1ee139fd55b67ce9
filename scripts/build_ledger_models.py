"""Build the embedded ledger models from fixed seeds: about seven minutes on one CPU core.

python scripts/build_ledger_models.py [--out DIR] [--only NAME] [--measure]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from ledger_cards import write_card
from ledger_measuring import Figures, measure
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
from transformers.utils.logging import disable_progress_bar

from tutelage.data.tasks.ledger import WrongFacts

ASSETS = Path(__file__).resolve().parents[1] / "src" / "tutelage" / "assets"
TEACHER = "ledger-teacher"
NUM_PROMPTS = 128

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


def main() -> None:
    """Train the chosen models, write their folders and cards, and print the table of figures."""
    arguments = _arguments()
    torch.set_num_threads(1)  # the order of additions, and so the weights, depends on it
    torch.use_deterministic_algorithms(True)
    disable_progress_bar()
    tokenizer = build_tokenizer(MAX_LENGTH)
    if arguments.only not in (None, TEACHER) and not (arguments.out / TEACHER).is_dir():
        raise SystemExit(f"{arguments.out} has no {TEACHER}. Build it first: --only {TEACHER}.")
    recipes = [r for r in RECIPES if arguments.only in (None, r.name)]
    table = []
    for recipe in recipes:
        folder = arguments.out / recipe.name
        if not arguments.measure:
            build(recipe, arguments.out, tokenizer)
        model, teacher = load_model(folder), load_model(arguments.out / TEACHER)
        figures = measure(model, teacher, tokenizer, NUM_PROMPTS)
        write_card(folder, recipe, figures)
        table.append((recipe.name, figures))
    _print_table(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the model folders")
    parser.add_argument("--only", choices=[r.name for r in RECIPES], help="build this one alone")
    parser.add_argument("--measure", action="store_true", help="measure and rewrite the cards only")
    arguments: argparse.Namespace = parser.parse_args()
    return arguments


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


def _print_table(table: list[tuple[str, Figures]]) -> None:
    columns = ("greedy", "mean@8", "pass@8", "distinct", "Q3 rows", "Q3 KL")
    print(f"\n{'model':22}" + "".join(f"{column:>10}" for column in columns))
    for name, f in table:
        print(
            f"{name:22}{f.greedy:10.1%}{f.mean_at_8:10.1%}{f.pass_at_8:10.1%}{f.distinct:10.2f}"
            f"{f.q3_rows:10.1%}{f.q3_kl:10.1%}"
        )


if __name__ == "__main__":
    main()
