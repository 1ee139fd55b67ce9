"""Build the embedded ledger-tools models from fixed seeds: about twenty minutes on one CPU core.

python scripts/build_ledger_tools_models.py [--out DIR] [--only NAME] [--measure]
"""

from __future__ import annotations

from pathlib import Path

from embedded_models import Family, run
from ledger_tools_cards import write_card
from ledger_tools_measuring import measure
from ledger_tools_tokenizer import build_tokenizer
from ledger_tools_training import Conversations, Recipe, batches
from ledger_training import Schedule, fit, fresh_model, save_model
from transformers import PreTrainedTokenizerFast

from tutelage.envs.ledger_tools_agent import Mistakes

TEACHER = "ledger-tools-teacher"

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


def build(recipe: Recipe, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train one model by its recipe and write its folder below `out`."""
    model = fresh_model(recipe.shape, tokenizer, recipe.stages[0][0].seed)
    model.train()
    for schedule, conversations in recipe.stages:
        fit(model, recipe.name, schedule, batches(tokenizer, schedule, conversations))
        for parameter in model.parameters():  # every stage starts from what could be stored
            parameter.data = parameter.data.bfloat16().float()
    save_model(model, out / recipe.name, tokenizer)


COLUMNS = {
    "success": ("success", ".1%"),
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
