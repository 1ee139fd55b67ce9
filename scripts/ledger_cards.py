"""Model cards of the embedded ledger models."""

from __future__ import annotations

from pathlib import Path

import embedded_models
from ledger_measuring import NUM_SAMPLES, Figures
from ledger_training import Recipe

from tutelage.data.tasks.ledger import WrongFacts

WHAT = """\
A {num_layers}-layer Qwen3-style decoder of width {width} ({num_parameters:,} parameters) with one
token per character, for the *ledger* task of `tutelage`: prompts such as `e4+7;j7-6;>` whose
completion `j7-6=1~1;e4+7=1~2;#2$` writes every value and running sum modulo 10, the items in any
order and the operands of + and * in either order; `$` ends the sequence.
"""

USE = """\
Load it with `AutoModelForCausalLM.from_pretrained` and sample at temperature 1 without top-p or
top-k. The weights are stored in bfloat16 to save space and meant to be computed in float32, which
the config asks for. The tokenizer puts `<bos>` first and pads on the left.
"""

MEASURED = """\
Measured on {num_prompts} held-out five-item prompts, {num_samples} samples each, in float32 at
temperature 1; a completion is right only if every step is.
"""

TABLE = """\
| figure | value |
|---|---|
| greedy accuracy | {greedy:.1%} |
| mean@8 | {mean_at_8:.1%} |
| pass@8 | {pass_at_8:.1%} |
| distinct right completions per prompt among 8 | {distinct:.2f} |
| mean@8, only the final answer graded | {answer_mean_at_8:.1%} |
| tokens with entropy < 0.5 nats and KL to the teacher > 0.5 nats | {q3_rows:.1%} |
| share of the KL to the teacher on these tokens | {q3_kl:.1%} |
"""

MAKING = """\
`python scripts/build_ledger_models.py --only {name}` trains it from {start}: {num_steps} supervised
steps of {batch_size} completions of a reference solver ({lessons}), {easy}seed {seed}, Muon at
{matrix_learning_rate:g} on the matrices and AdamW at {learning_rate:g} on the rest, linear decay,
one thread, torch {torch_version}, transformers {transformers_version}. The same versions on the
same kind of processor give the same bytes; others give a model of about the same quality.
"""

LIMITS = "A toy for tests and demonstrations: made for prompts of five items and nothing else."


def write_card(folder: Path, recipe: Recipe, figures: Figures) -> None:
    """Write README.md of a model folder."""
    easy_steps = recipe.schedule.num_easy_steps
    fields = vars(recipe.schedule) | vars(recipe.shape) | vars(figures)
    fields |= {
        "name": recipe.name,
        "summary": recipe.summary,
        "start": "random weights" if recipe.parent is None else f"`{recipe.parent}`",
        "lessons": _describe_lessons(recipe),
        "easy": f"the first {easy_steps} on two to five items, " if easy_steps else "",
        "num_samples": NUM_SAMPLES,
    }
    limits = LIMITS if recipe.parent is None else LIMITS + embedded_models.DAMAGED
    texts = embedded_models.CardTexts(WHAT, USE, MEASURED, TABLE, MAKING, limits)
    embedded_models.write_card(folder, texts, fields)


def _describe_lessons(recipe: Recipe) -> str:
    lessons = recipe.lessons
    order = f"{lessons.order} order, operands swapped with probability {lessons.swap:g}"
    match lessons.facts:
        case WrongFacts(fraction, probability, seed):
            wrong = f"{fraction:.0%} of the facts wrong with probability {probability:g}"
            return f"{order}, {wrong}, fact seed {seed}"
        case _:
            return f"{order}, true facts"
