"""A causal language model as two parts: the backbone, and the head that projects its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tutelage.core import LazyLogits
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.models.backbone import is_written_out, last_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hidden_rows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states of the positions that predict completion tokens, `[N, D]`.

    Padding on the right needs no mask: a causal model's tokens do not see what follows them.
    """
    if batch.is_padded_right and batch.num_rows and is_written_out(model):
        width = batch.input_ids.shape[1]
        first = int((batch.row_index % width).min())
        hidden = last_hidden(model, batch.input_ids, first)
        # Row b·T + t of the whole is row b·(T − first) + t − first of this.
        skipped = (batch.row_index // width + 1) * first
        return hidden.flatten(0, 1).index_select(0, batch.row_index - skipped)
    masks = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    if batch.is_padded_right:
        masks = {}
    output = model.base_model(input_ids=batch.input_ids, use_cache=False, **masks)
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
