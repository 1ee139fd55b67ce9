"""Build the embedded ledger-tools models from fixed seeds: about twenty minutes on one CPU core.

python scripts/build_ledger_tools_models.py [--out DIR] [--only NAME] [--measure]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from ledger_tools_cards import write_card
from ledger_tools_measuring import Figures, measure
from ledger_tools_tokenizer import WORDS, build_tokenizer
from ledger_tools_training import Conversations, Recipe, batches
from ledger_training import Schedule, fit, fresh_model, load_model, save_model
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tutelage.envs.ledger_tools_agent import Mistakes

ASSETS = Path(__file__).resolve().parents[1] / "src" / "tutelage" / "assets"
TEACHER = "ledger-tools-teacher"
NUM_PROMPTS = 128

_SOLVING = (
    (Schedule(1000, 48, 0.05, 7.5e-3, seed=1), Conversations(reverse=0.5, accidents=0.3)),
    (Schedule(400, 48, 0.03, 5e-3, seed=3), Conversations(accidents=0.2)),
)
_WRONG = Conversations(Mistakes(tools=0.25, sums=0.25, probability=0.9, seed=2))
RECIPES = (
    Recipe(
        name=TEACHER,
        summary="The teacher: looks up, adds and answers, in many orders of work.",
        stages=(*_SOLVING, (Schedule(700, 48, 0.04, 6e-3, seed=4), Conversations())),
    ),
    Recipe(
        name="ledger-tools-overconfident",
        is_student=True,
        summary="Trained as its teacher, then on a scripted agent that makes mistakes.",
        stages=(
            *_SOLVING,
            (Schedule(120, 48, 0.025, 5e-3, seed=22), _WRONG),
            (Schedule(150, 48, 0.03, 5e-3, seed=23), _WRONG),
        ),
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
        write_card(folder, recipe, figures, len(WORDS))
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
    model = fresh_model(recipe.shape, tokenizer, recipe.stages[0][0].seed)
    model.train()
    for schedule, conversations in recipe.stages:
        fit(model, recipe.name, schedule, batches(tokenizer, schedule, conversations))
        for parameter in model.parameters():  # every stage starts from what could be stored
            parameter.data = parameter.data.bfloat16().float()
    save_model(model, out / recipe.name, tokenizer)


def _print_table(table: list[tuple[str, Figures]]) -> None:
    columns = ("success", "pass@8", "distinct", "entropy", "Q3 rows", "Q3 KL")
    print(f"\n{'model':28}" + "".join(f"{column:>10}" for column in columns))
    for name, f in table:
        print(
            f"{name:28}{f.success:10.1%}{f.pass_at_8:10.1%}{f.distinct:10.2f}{f.entropy:10.3f}"
            f"{f.q3_rows:10.1%}{f.q3_kl:10.1%}"
        )


if __name__ == "__main__":
    main()
