"""Which class of transformers reads text with a model's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tutelage.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
