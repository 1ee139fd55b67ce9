"""Checks before training that the student can be saved."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tutelage.errors import ConfigError, ModelError
from tutelage.models.forward import foreign
from tutelage.models.tokenizers import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
"""Settings of generation that mean nothing without sampling."""
_BEAMS = ("early_stopping", "length_penalty")
"""Settings that mean nothing without beams."""
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuse_quantized(model: PreTrainedModel, ref: str) -> None:
    """Refuses a student whose files hold quantized weights, which cannot be trained.

    Raises:
        ConfigError: it is one.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = [n for n, t in tensors if t.dim() >= 2 and "weight" in n and t.dtype not in _PLAIN]
    if found:
        dtype = str(dict(tensors)[found[0]].dtype).removeprefix("torch.")
        raise ConfigError(
            f"student {ref!r} is quantized in its own files, {found[0]} is {dtype}. Quantized "
            "weights cannot be trained: give its unquantized original, with student.quantization "
            "and student.lora to train it in few bits."
        )


def require_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Save all of a checkpoint but its weights on trial, and remove settings without effect.

    Args:
        model: the student, with its adapter if it has one.
        tokenizer: its tokenizer.

    Returns:
        Warnings about the files that will be saved.

    Raises:
        ModelError: the student cannot be saved.
    """
    notes = _without_idle_settings(model)
    with (
        tempfile.TemporaryDirectory(prefix="tutelage-save-") as name,
        foreign("cannot be saved", model),
    ):
        model.config.save_pretrained(name)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(name)
        save_tokenizer(tokenizer, Path(name))
        model.state_dict()
    return notes


def _without_idle_settings(model: PreTrainedModel) -> list[str]:
    """Removes settings without effect, with which a generation_config.json cannot be saved."""
    settings: Any = model.generation_config
    if settings is None or _complaint(settings) is None:
        return []
    names: tuple[str, ...] = () if settings.do_sample else _SAMPLING
    names += () if settings.num_beams is not None and settings.num_beams > 1 else _BEAMS
    given = {name: vars(settings)[name] for name in names if vars(settings).get(name) is not None}
    for name in given:
        setattr(settings, name, None)
    complaint = _complaint(settings)
    if complaint is not None:
        raise ModelError(
            f"the student's generation_config.json cannot be saved: {complaint}. Correct it."
        )
    listed = ", ".join(f"{name} = {value}" for name, value in given.items())
    return [
        f"the student's generation_config.json sets {listed} without effect (do_sample or "
        "num_beams is off); the saved student leaves it out"
    ]


def _complaint(settings: Any) -> str | None:
    """Why settings cannot be saved, in one line."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())[:300].rstrip(".")
    return None
