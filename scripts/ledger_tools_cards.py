"""Model cards of the embedded ledger-tools models."""

from __future__ import annotations

from pathlib import Path

import embedded_models
from ledger_tools_measuring import NUM_SAMPLES, Figures
from ledger_tools_tokenizer import WORDS
from ledger_tools_training import Conversations, Recipe
from ledger_training import Schedule

WHAT = """\
A {num_layers}-layer Qwen3-style decoder of width {width} ({num_parameters:,} parameters) for the
*ledger_tools* task of `tutelage`: to `Total: price e, stock k, price a` it answers in several
turns, with calls of the tools `look_up_price`, `look_up_stock` and `calculate` as plain JSON (one
call, or a list of several), and at last with the total alone.
"""

USE = """\
Load it with `AutoModelForCausalLM.from_pretrained`, render conversations with the tokenizer's chat
template (roles user, assistant and tool; it shows of the tools only their names), and sample
at temperature 1 without top-p or top-k; `<|end|>` ends a turn. The weights are stored in bfloat16
to save space and meant to be computed in float32, which the config asks for. The tokenizer has one
token for each byte and for each of {num_words} words of the task, and no token that begins a text;
it pads on the left.
"""

MEASURED = """\
Measured on {num_prompts} held-out three-item prompts, {num_samples} conversations each, in float32
at temperature 1; a conversation is a success only if every call and the final answer are right and
no call is superfluous or missing.
"""

TABLE = """\
| figure | value |
|---|---|
| success | {success:.1%} |
| pass@8 | {pass_at_8:.1%} |
| distinct successful conversations per prompt among 8 | {distinct:.2f} |
| mean score (share of right calls) | {score:.3f} |
| only the final answer graded | {answer_only:.1%} |
| conversations with a look-up by the wrong tool | {wrong_tool:.1%} |
| conversations in which an answer was ignored | {ignored_answer:.1%} |
| mean entropy of generated tokens, nats | {entropy:.3f} |
| median entropy where the teacher gives the token < 5%, nats | {wrong_entropy:.3f} |
| tokens with entropy < 0.5 nats and KL to the teacher > 0.5 nats | {q3_rows:.1%} |
| share of the KL to the teacher on these tokens | {q3_kl:.1%} |
"""

MAKING = """\
`python scripts/build_ledger_tools_models.py --only {name}` trains it from random weights
on conversations of a scripted agent, loss on the agent's tokens only: {stages}. Muon on the
matrices, AdamW on the rest, linear decay, one thread, torch {torch_version}, transformers
{transformers_version}. The same versions on the same kind of processor give the same bytes; others
give a model of about the same quality.
"""

LIMITS = "A toy for tests and demonstrations: it was trained on prompts of three items only."


def write_card(folder: Path, recipe: Recipe, figures: Figures) -> None:
    """Write README.md of a model folder."""
    fields = vars(recipe.shape) | vars(figures)
    fields |= {
        "name": recipe.name,
        "summary": recipe.summary,
        "stages": "; then ".join(_describe(*stage) for stage in recipe.stages),
        "num_samples": NUM_SAMPLES,
        "num_words": len(WORDS),
    }
    limits = LIMITS + embedded_models.DAMAGED if recipe.is_student else LIMITS
    texts = embedded_models.CardTexts(WHAT, USE, MEASURED, TABLE, MAKING, limits)
    embedded_models.write_card(folder, texts, fields)


def _describe(schedule: Schedule, conversations: Conversations) -> str:
    order = "in the order of the prompt"
    if conversations.reverse:
        order += f" or, {conversations.reverse:.0%} of them, in the reverse order"
    made = conversations.mistakes
    mistakes = "no mistakes"
    if made.tools or made.sums:
        mistakes = (
            f"{made.tools:.0%} of the entries looked up by the wrong tool and the answers of "
            f"{made.sums:.0%} of the sums replaced, each with probability "
            f"{made.probability:g}, mistake seed {made.seed}"
        )
    elif conversations.accidents:
        mistakes = f"{conversations.accidents:.0%} of them with mistakes that are context only"
    return (
        f"{schedule.num_steps} steps of {schedule.batch_size} conversations (look-ups {order}; "
        f"{mistakes}), seed {schedule.seed}, learning rates {schedule.matrix_learning_rate:g} and "
        f"{schedule.learning_rate:g}"
    )
