"""Model cards of the embedded coins models."""

from __future__ import annotations

from pathlib import Path

import embedded_models
from coins_measuring import Figures
from coins_training import Recipe
from ledger_tools_measuring import NUM_SAMPLES

WHAT = """\
A {num_layers}-layer Qwen3-style decoder of width {width} ({num_parameters:,} parameters) for the
*coins* task of `tutelage`: to `Ann buys a pen for 29 cents. There are coins of 4, 7 and 9 cents.
Which coins pay for it?` and a line break it answers with coins that pay the amount exactly, in any
order and one of three styles: `Pay 9 + 9 + 7 + 4 = 29.`, `Give 9, 20 left, 9, 11 left, 7, 4 left,
4, 0 left.` or `Take 29 - 9 = 20 - 9 = 11 - 7 = 4 - 4 = 0.`; `<eos>` ends the sequence. Many
amounts have dead ends: after 9 + 9 + 9 of 29 cents the rest cannot be paid.
"""

USE = """\
Load it with `AutoModelForCausalLM.from_pretrained` and sample at temperature 1 without top-p or
top-k. The weights are stored in bfloat16 to save space and meant to be computed in float32, which
the config asks for. The tokenizer has one token for each word and each number up to 60, puts
`<bos>` first and pads on the left.
"""

MEASURED = """\
Measured on {num_prompts} held-out prompts, {num_samples} samples each, in float32 at temperature 1;
a completion is right only if all that it says is true and the amount is paid. Held-out prompts ask
for an amount and a set of coins that no training prompt asks for together.
"""

TABLE = """\
| figure | value |
|---|---|
| greedy accuracy | {greedy:.1%} |
| mean@8 | {mean_at_8:.1%} |
| pass@8 | {pass_at_8:.1%} |
| distinct right completions per prompt among 8 | {distinct:.2f} |
| tokens of a completion | {num_tokens:.1f} |
| mean entropy of a token, nats | {entropy:.3f} |
| tokens with entropy > 0.3 nats | {choices:.1%} |
| mean KL to the teacher of a token, nats | {kl:.3f} |
| tokens with entropy < 0.5 nats and KL to the teacher > 0.5 nats | {q3_rows:.1%} |
| share of the KL to the teacher on these tokens | {q3_kl:.1%} |
"""

MAKING = """\
`python scripts/build_coins_models.py --only {name}` trains it from random weights: {num_steps}
supervised steps of {batch_size} completions of new prompts, {writers} (style and first word drawn
evenly), seed {seed}, Muon at {matrix_learning_rate:g} on the matrices and AdamW at
{learning_rate:g} on the rest, linear decay, one thread, torch {torch_version}, transformers
{transformers_version}. The same versions on the same kind of processor give the same bytes; others
give a model of about the same quality.
"""

LIMITS = """\
A toy for tests and demonstrations: made for prompts of the coins task and nothing else.{what}
"""

_STUDENT = """ It is no copy of its teacher: it was trained from random weights of its own{how}."""
_SOLVER = """of a reference solver that draws every coin evenly from those after which the rest can
be paid"""
_BOTH = """\
{right:.0%} of them of a reference solver that draws every coin evenly from those after which the
rest can be paid, and {wrong:.0%} of a careless one that draws evenly from those that do not
exceed the rest and, where it comes to a dead end, makes its last coin worth more"""


def write_card(folder: Path, recipe: Recipe, figures: Figures) -> None:
    """Write README.md of a model folder."""
    share = recipe.careless_share
    how = ", on texts of which some are wrong" if share else ", in fewer steps"
    fields = vars(recipe.schedule) | vars(recipe.shape) | vars(figures)
    fields |= {
        "name": recipe.name,
        "summary": recipe.summary,
        "what": _STUDENT.format(how=how) if recipe.is_student else "",
        "writers": _BOTH.format(right=1 - share, wrong=share) if share else _SOLVER,
        "num_samples": NUM_SAMPLES,
    }
    texts = embedded_models.CardTexts(WHAT, USE, MEASURED, TABLE, MAKING, LIMITS)
    embedded_models.write_card(folder, texts, fields)
