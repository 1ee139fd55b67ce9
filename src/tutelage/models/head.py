"""A causal language model as two parts: the backbone, and the head that projects its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tutelage.core import LazyLogits
from tutelage.data.batch import Batch
from tutelage.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hidden_rows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states of the positions that predict completion tokens, `[N, D]`."""
    output = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return batch.flatten(output.last_hidden_state)


def head(model: PreTrainedModel, hidden: Tensor, vocab_size: int) -> LazyLogits:
    """The model's logits for rows of hidden states, over the first `vocab_size` ids.

    Raises:
        ModelError: the model has no output embeddings to project with.
    """
    projection = model.get_output_embeddings()
    if projection is None:
        raise ModelError(
            f"{type(model).__name__} has no output head, so it gives no logits. "
            "Use a causal language model."
        )
    settings = model.config.to_dict()
    scale = float(settings.get("logit_scale") or 1.0)  # Cohere
    scale /= float(settings.get("logits_scaling") or 1.0)  # Granite
    logits = LazyLogits(
        hidden,
        projection.weight,
        projection.bias,
        scale=scale,
        softcap=settings.get("final_logit_softcapping"),  # Gemma
    )
    return logits.cut(vocab_size)
