"""Which class of transformers reads text with a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import safe_open

from tutelage.errors import ModelError
from tutelage.models.reference import ResolvedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class CausalClass(NamedTuple):
    """A class of transformers that gives logits for text."""

    auto: Any
    """The automatic class that loads it."""
    has_sdpa: bool
    """Whether it has fused attention; else only its own, eager one."""


def causal_class(config: PreTrainedConfig, ref: str) -> CausalClass:
    """The class of a causal language model, else of a model of images and text.

    The latter reads text alone as well; its vision layers stay as they are.

    Raises:
        ModelError: transformers has neither for this type.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            kind = found[0] if isinstance(found, tuple | list) else found
            return CausalClass(auto, bool(kind._supports_sdpa))
    raise ModelError(
        f"model {ref!r} is of type {config.model_type!r}, for which transformers has no causal "
        "language model. Use the whole model that it is a part of, or another one."
    )


def restore_padding_row(found: ResolvedModel, model: PreTrainedModel) -> None:
    """Give the padding token's embedding the file's numbers, in place.

    Some classes of transformers set it to zero after they have read it (Youtu). Where the head is
    tied, that row has been trained.
    """
    embeddings: Any = model.get_input_embeddings()
    index = embeddings.__dict__.get("padding_idx")
    if index is None:
        return
    names = {name for name, weight in model.named_parameters() if weight is embeddings.weight}
    for path in sorted(Path(found.source).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in names & {*file.keys()}:
                row = file.get_slice(name)[index : index + 1]
                embeddings.weight[index].copy_(row[0])
