"""Build the embedded coins models from fixed seeds: about ten minutes on one CPU core.

python scripts/build_coins_models.py [--out DIR] [--only NAME] [--measure]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from coins_cards import write_card
from coins_measuring import Figures, measure
from coins_training import Recipe, batches, build_tokenizer
from ledger_training import Schedule, Shape, fit, fresh_model, load_model, save_model
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

ASSETS = Path(__file__).resolve().parents[1] / "src" / "tutelage" / "assets"
TEACHER = "coins-teacher"
NUM_PROMPTS = 128

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
        careless_share=0.6,
    ),
    Recipe(
        name="coins-small",
        summary="A narrower model of fewer layers, stopped early: wrong where it hesitates.",
        schedule=Schedule(200, 48, 0.04, 6e-3, seed=2),
        shape=Shape(width=96, num_layers=2, mlp_width=192),
    ),
)


def main() -> None:
    """Train the chosen models, write their folders and cards, and print the table of figures."""
    arguments = _arguments()
    torch.set_num_threads(1)  # the order of additions, and so the weights, depends on it
    torch.use_deterministic_algorithms(True)
    disable_progress_bar()
    tokenizer = build_tokenizer()
    if arguments.only not in (None, TEACHER) and not (arguments.out / TEACHER).is_dir():
        raise SystemExit(f"{arguments.out} has no {TEACHER}. Build it first: --only {TEACHER}.")
    table = []
    for recipe in (r for r in RECIPES if arguments.only in (None, r.name)):
        folder = arguments.out / recipe.name
        if not arguments.measure:
            build(recipe, arguments.out, tokenizer)
        model, teacher = load_model(folder), load_model(arguments.out / TEACHER)
        figures = measure(model, teacher, tokenizer, NUM_PROMPTS)
        write_card(folder, recipe, figures, is_student=recipe.name != TEACHER)
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
    model = fresh_model(recipe.shape, tokenizer, recipe.schedule.seed)
    model.train()
    fit(model, recipe.name, recipe.schedule, batches(tokenizer, recipe))
    save_model(model, out / recipe.name, tokenizer)


def _print_table(table: list[tuple[str, Figures]]) -> None:
    columns = ("greedy", "mean@8", "pass@8", "distinct", "entropy", "Q3 rows", "Q3 KL")
    print(f"\n{'model':16}" + "".join(f"{column:>10}" for column in columns))
    for name, f in table:
        print(
            f"{name:16}{f.greedy:10.1%}{f.mean_at_8:10.1%}{f.pass_at_8:10.1%}{f.distinct:10.2f}"
            f"{f.entropy:10.3f}{f.q3_rows:10.1%}{f.q3_kl:10.1%}"
        )


if __name__ == "__main__":
    main()
