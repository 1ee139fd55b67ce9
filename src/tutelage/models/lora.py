"""Low-rank adapters through peft, and the few modules that behave differently while learning."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tutelage.core.counter import counter_uniform
from tutelage.errors import ConfigError, MissingExtraError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "default"
_FILE = "adapter_model.safetensors"


def add_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Freeze a model and add trainable low-rank updates, in place: ``W + (alpha/rank)·B·A``.

    B starts at zero, so the model says the same as before. The adapter is float32 whatever the
    model's dtype.

    Args:
        model: model to adapt; its class and head stay as they are.
        rank: rank of the updates.
        alpha: their scale is alpha/rank.
        dropout: share of the adapter's inputs dropped inside `learning`.
        target_modules: names of linear layers; none means all but the head.
        seed: seed of A.

    Raises:
        MissingExtraError: peft is not installed.
        ConfigError: a name of `target_modules` fits no layer, or one that cannot be adapted.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "lora", "student.lora")
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    if not target_modules:
        _refuse_fused_experts(model)
    _refuse_head(model, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules) or "all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng(_cuda_devices()):
        torch.manual_seed(seed)
        try:
            model.add_adapter(config, _NAME)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"student.lora cannot be added: {reason}") from None
    _refuse_adapted_experts(model)
    model.get_adapter_state_dict = partial(_adapter_weights, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.eval()


def _adapter_weights(
    model: PreTrainedModel, adapter_name: str = _NAME, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapter's weights; peft would look on the hub whether embeddings, never adapted, grew."""
    from peft import get_peft_model_state_dict

    weights: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=state_dict, adapter_name=adapter_name, save_embedding_layers=False
    )
    return weights


_OTHERS = "Name its attention layers in student.lora.target_modules, such as q_proj and v_proj."


def _refuse_fused_experts(model: PreTrainedModel) -> None:
    """Experts in one tensor are no linear layers, and what adapts them cannot be saved."""
    names = (n for n, weight in model.named_parameters() if weight.dim() > 2 and "expert" in n)
    name = next(names, None)
    if name is not None:
        raise ConfigError(
            f"student.lora cannot adapt the experts of {type(model).__name__}, which are one "
            f"tensor ({name}). {_OTHERS}"
        )


def _refuse_head(model: PreTrainedModel, target_modules: Sequence[str]) -> None:
    """Losses and rollouts take the head's weight, perhaps the embedding's, and never call it."""
    for name, module in model.named_modules():
        is_head = module is model.get_output_embeddings()
        is_named = any(f".{name}".endswith(f".{target}") for target in target_modules)
        if is_named and (is_head or isinstance(module, nn.Embedding)):
            raise ConfigError(
                f"student.lora.target_modules fits {name}, the {'head' if is_head else 'embedding'}"
                f" of {type(model).__name__}, which stays as it is. {_OTHERS}"
            )


def _refuse_adapted_experts(model: PreTrainedModel) -> None:
    """Experts in one tensor, and the router: its scores decide which experts learn at all."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if not isinstance(module, LoraLayer):
            continue
        is_router = leaf in ("gate", "router") and "experts" in dict(
            model.get_submodule(parent).named_children()
        )
        if is_router or leaf == "experts":
            raise ConfigError(
                f"student.lora.target_modules fits {name}, the "
                f"{'router' if is_router else 'experts'} of {type(model).__name__}. {_OTHERS}"
            )


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Read the weights that `save_pretrained` wrote for a model with the same adapter."""
    set_adapter_weights(model, load_file(folder / _FILE))


def set_adapter_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Give a model with an adapter the adapter weights of another, `get_adapter_state_dict()`."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, weights, _NAME)


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Add the adapter to the weights, in place; a plain model remains, without peft."""
    from peft.tuners.lora import LoraLayer

    adapted = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, module in adapted:
        module.merge()
        model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    return model.requires_grad_(True)


def with_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """A model with the adapter of a folder added to its weights; a plain model again.

    Raises:
        MissingExtraError: peft is not installed.
        ModelError: the adapter is no change of weights, or does not fit the model.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "lora", f"The adapter {folder!r}")
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not there: refused below
        adapted = PeftModel.from_pretrained(model, folder, _NAME)
        if not hasattr(adapted.base_model, "merge_and_unload"):
            kind = adapted.peft_config[_NAME].peft_type.value
            raise ModelError(
                f"adapter {folder!r} is of type {kind}, which is no change of weights and cannot "
                "be added to them. Use a LoRA adapter."
            )
        _refuse_partial(adapted.load_adapter(folder, _NAME), folder)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.requires_grad_(True)


def _refuse_partial(report: Any, folder: str) -> None:
    """Weights of an adapter without a layer, or layers without weights: peft leaves both out."""
    lost = sorted(report.unexpected_keys)
    lacking = sorted(k for k in report.missing_keys if _NAME in k.split("."))
    if not lost and not lacking:
        return
    what = f"{len(lost)} of its weights have no layer there" if lost else (
        f"it lacks {len(lacking)} weights"
    )  # fmt: skip
    raise ModelError(
        f"adapter {folder!r} does not fit its base: {what}, first {[*lost, *lacking][0]!r}. Check "
        "base_model_name_or_path in its adapter_config.json, and that its files are complete."
    )


def full_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and weights that a plain model would have: an adapter is added, layer after layer."""
    for name, weight, layer in _full_weights(model):
        if layer is not None:
            weight = weight + layer.get_delta_weight(_NAME).to(weight)
        yield name, weight.detach()


def full_shapes(model: PreTrainedModel) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of each of the `full_weights`, without computing them."""
    return ((name, weight.dtype, tuple(weight.shape)) for name, weight, _ in _full_weights(model))


def _full_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor, Any]]:
    """Names of a plain model, its weights, and the adapted layer whose update is added to each."""
    adapted: dict[str, Any] = {}
    if model._hf_peft_config_loaded:
        from peft.tuners.lora import LoraLayer

        adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, weight in model.named_parameters():
        place, _, leaf = name.partition(".base_layer.")
        if place in adapted and leaf:
            yield f"{place}.{leaf}", weight, adapted[place] if leaf == "weight" else None
        elif not adapted or ".lora_" not in name:
            yield name, weight, None


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input inside `learning`; the backward pass computes the rest again."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # a hook for the reentrant kind, which slows rollouts


@contextmanager
def learning(model: PreTrainedModel, seed: tuple[int, ...]) -> Iterator[None]:
    """Inside, layers checkpoint their activations and adapters drop inputs, if they are set to.

    Everything else stays in evaluation mode, so that what learns is what wrote and was scored.
    The context must last until the backward pass is done, which repeats the forward pass.

    Args:
        model: the student.
        seed: names the numbers of dropout.
    """
    switched = [module for name, module in model.named_modules() if _switches(name, module)]
    for module in switched:
        module.training = True
    place = torch.zeros(1, dtype=torch.int64)
    number = int(counter_uniform(seed, place, place) * 2**52)
    try:
        with torch.random.fork_rng(_cuda_devices()):
            torch.manual_seed(number)
            yield
    finally:
        for module in switched:
            module.training = False


def _switches(name: str, module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(module, GradientCheckpointingLayer):
        return bool(module.gradient_checkpointing)
    return isinstance(module, nn.Dropout) and ".lora_dropout." in name


def _cuda_devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []
