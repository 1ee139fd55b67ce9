"""The ids that end a text, of student and teacher together, as one class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.errors import ModelError
from tutelage.models.tokenizers import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Side = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


def stop_class(student: Side, teacher: Side, vocab_size: int) -> tuple[int, ...]:
    """Every id that ends a text for one side or for both, ascending; none where that is one id.

    An id that ends the text for one side only is in the class for both: kept as a class of its own
    it would have probability 0 on the side for which it is a stop, and wherever the other side
    gives it any, a divergence in one direction would be infinite.

    Args:
        student: the student and its tokenizer.
        teacher: the teacher and its tokenizer, with the same vocabulary.
        vocab_size: V; ids beyond have no probability.

    Raises:
        ModelError: a side has no such id.
    """
    found: set[int] = set()
    for who, side in (("student", student), ("teacher", teacher)):
        own = {i for i in stop_ids(*side) if i < vocab_size}
        if not own:
            raise ModelError(
                f"teacher.stop_token = 'class' needs ids that end a text, but the {who} has none "
                f"below {vocab_size}. Add eos_token_id to its generation_config.json, or use 'map'."
            )
        found |= own
    return tuple(sorted(found)) if len(found) > 1 else ()
