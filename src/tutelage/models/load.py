"""Models from folders, GGUF files, installed packages or the hub; pruned and saved as folders.

No code from a model is ever executed and no pickled weights are read: only safetensors and GGUF.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from tutelage.data.hub import is_hub_reachable
from tutelage.errors import (
    ConfigError,
    MissingExtraError,
    ModelError,
    RunError,
    TutelageError,
    remedy,
)
from tutelage.files.atomic import new_folder
from tutelage.models.device import find_device
from tutelage.models.gguf import parsed_once
from tutelage.models.limits import refuse_partial_blocks
from tutelage.models.llama_cpu.patch import use_fast_layers
from tutelage.models.lora import with_adapter
from tutelage.models.reference import (
    TOKENIZER_FILES,
    ResolvedModel,
    causal_class,
    has_tokenizer,
    refuse_parts_elsewhere,
    refuse_unread_weights,
    resolve_model,
    restore_padding_row,
    tokenizer_place,
)
from tutelage.models.tokenizers import no_panic, save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load_model(
    ref: str,
    dtype: str = "float32",
    device: str = "cpu",
    attn: str = "sdpa",
    quantization: str = "none",
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode.

    A GGUF file is unpacked to plain weights, so that the model can be trained and saved.

    Args:
        ref: Model reference, see `resolve_model`.
        dtype: float32, bfloat16, float16 or float64.
        device: auto, cpu, cuda or cuda:N, see `find_device`.
        attn: Attention implementation of transformers, such as sdpa or eager.
        quantization: none, 8bit or 4bit (bitsandbytes).

    Returns:
        The model on `device`.

    Raises:
        ConfigError: Unknown dtype or device.
        ModelError: The reference is not a complete, readable causal language model.
        MissingExtraError: A GGUF file without the package `gguf`, or a quantised model without
            `bitsandbytes`.
    """
    target = find_device(device)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}. Choose one.")
    found = resolve_model(ref)
    _refuse_unread_generation_config(found)
    with _explained(found, "model"):
        refuse_parts_elsewhere(found)
    if found.adapter is not None and quantization != "none":
        raise ConfigError(
            f"model {found.ref!r} is an adapter, which cannot be merged into {quantization} "
            "weights. Leave quantization at none."
        )
    with _without_bars() if found.is_local else contextlib.nullcontext():
        if quantization != "none":
            low_bits = _low_bits(found, quantization, dtype) | {"device_map": {"": str(target)}}
            model = _load_plain(found, DTYPES[dtype], attn, low_bits)
            if quantization == "4bit" and target.type == "cpu":
                refuse_partial_blocks(model, found.ref)
            return model.eval()
        if found.gguf_file is None:
            model = _load_plain(found, DTYPES[dtype], attn)
        else:
            model = _load_gguf(found, DTYPES[dtype], attn)
    if found.adapter is not None:
        with _explained(found, "adapter"):
            model = with_adapter(model, found.adapter)
    if target.type == "cpu":
        use_fast_layers(model)
    return model.to(target).eval()


def load_model_config(found: ResolvedModel) -> PreTrainedConfig:
    """The configuration of a resolved model, without its weights.

    Raises:
        ModelError: There is no usable configuration.
        MissingExtraError: A GGUF file without the package `gguf`.
    """
    from transformers import AutoConfig

    with _explained(found, "configuration"), _without_bars(), _parsed_once(found):
        return AutoConfig.from_pretrained(found.source, **_options(found))


def file_dtype(ref: str) -> torch.dtype | None:
    """What config.json says of the weights in a model's files; a model of another dtype is a copy.

    Raises:
        ModelError: There is no usable configuration.
        MissingExtraError: A GGUF file without the package `gguf`.
    """
    config = load_model_config(resolve_model(ref))
    found = config.dtype or config.get_text_config().dtype
    return found if isinstance(found, torch.dtype) else None


def load_tokenizer(ref: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model reference, see `resolve_model`.

    Raises:
        ModelError: There is no usable tokenizer.
        MissingExtraError: A GGUF file without the package `gguf`.
    """
    from transformers import AutoTokenizer

    found = tokenizer_place(ref)
    options = _options(found)
    _refuse_missing_tokenizer(found)
    with _explained(found, "tokenizer"), no_panic(ref), _parsed_once(found):
        tokenizer = AutoTokenizer.from_pretrained(found.source, **options)
        tokenizer("a ü", add_special_tokens=False)  # one may load and yet encode nothing
        return tokenizer


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    card: str | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a transformers folder, whole or not at all.

    Everything is written to a temporary folder beside the target, flushed to disk and renamed; an
    existing model of that name is only removed after its successor stands.

    Args:
        model: Model to save as config.json and safetensors.
        tokenizer: Its tokenizer.
        folder: Target folder; its parents are created.
        card: Text of README.md, or None for no such file.
        tensors: Weights by name instead of those that the model holds now.

    Raises:
        RunError: The folder cannot be written, or holds something that is not a model.
    """
    target = Path(folder)
    with explained_save(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(target, is_private=False, replaces=True) as new:
            fill_model_folder(model, tokenizer, new, card, tensors)


@contextlib.contextmanager
def explained_save(target: Path) -> Iterator[None]:
    """Refuse to replace what is no model, and turn errors of the disk into one line."""
    if target.exists() and not (target / "config.json").is_file():
        raise RunError(f"{target} exists and is not a model folder. Choose another folder.")
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"cannot save the model to {target}: {_one_line(error).rstrip('.')}. "
            f"What stood there stays. {remedy(error)}"
        ) from error


def fill_model_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """The part of `save_model` that writes the files, into a folder that is there."""
    with _without_bars(is_reading=False):
        model.save_pretrained(folder, state_dict=tensors)
    save_tokenizer(tokenizer, folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def _low_bits(found: ResolvedModel, quantization: str, dtype: str) -> dict[str, Any]:
    """Options that load the linear layers, the head aside, in 8 or 4 bits."""
    if found.gguf_file is not None:
        raise ConfigError(
            f"model {found.ref!r} is a GGUF file and cannot be loaded in {quantization}. "
            "Give a model folder, or leave quantization at none."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "lowbit", f"quantization = {quantization!r}")
    from transformers import BitsAndBytesConfig

    # it tells of every product in 8 bits that its inputs are rounded
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    bits = BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    return {"quantization_config": bits}


def _load_plain(
    found: ResolvedModel,
    dtype: torch.dtype,
    attn: str,
    low_bits: dict[str, Any] | None = None,
) -> PreTrainedModel:
    options = _options(found) | (low_bits or {})
    kind = causal_class(load_model_config(found), found.ref)
    with _explained(found, "model"):
        model, report = kind.auto.from_pretrained(
            found.source,
            dtype=dtype,
            attn_implementation=attn if kind.has_sdpa else "eager",
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if model._hf_peft_config_loaded:  # a hub id that transformers found to be one
        raise ModelError(
            f"model {found.ref!r} is an adapter on the hub. Download it and give its folder, which "
            "is merged into its base."
        )
    _refuse_missing_weights(found, report)
    if low_bits is None and not hasattr(model, "hf_quantizer"):
        refuse_unread_weights(found, model, report["unexpected_keys"])
    if found.is_local and low_bits is None:
        with _explained(found, "model"), torch.no_grad():
            restore_padding_row(found, model)
    loaded: PreTrainedModel = model
    return loaded


def _load_gguf(found: ResolvedModel, dtype: torch.dtype, attn: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.initialization import no_init_weights

    options = _options(found) | {"config": load_model_config(found)}
    with _explained(found, "model"), _parsed_once(found):
        unpacked, report = AutoModelForCausalLM.from_pretrained(
            found.source,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **options,
        )
    _refuse_missing_weights(found, report)
    refuse_unread_weights(found, unpacked, report["unexpected_keys"])
    config = type(unpacked.config).from_dict(
        {k: v for k, v in unpacked.config.to_dict().items() if k != "quantization_config"}
    )
    # A model from GGUF counts as quantised and refuses to be saved, so its weights move to one
    # that was never anything but plain.
    with _explained(found, "model"), no_init_weights():  # its settings may ask for other shapes
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)
        model.load_state_dict(unpacked.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = unpacked.generation_config
    return model


def _refuse_missing_weights(found: ResolvedModel, report: Mapping[str, Any]) -> None:
    """Some that the files lack: transformers would go on with random numbers in their place."""
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"model {found.ref!r} lacks {len(missing)} weights, first {missing[0]!r}. "
            "Its files are incomplete or belong to another config.json."
        )


def _parsed_once(found: ResolvedModel) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if found.gguf_file is None else parsed_once()


@contextlib.contextmanager
def _without_bars(is_reading: bool = True) -> Iterator[None]:
    """Disks take seconds and draw no progress bars; downloads still do.

    Writing leaves the process's standard error alone: a thread may write beside others.
    """
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The GGUF reader draws its bar without asking that setting.
        with contextlib.redirect_stderr(io.StringIO()) if is_reading else contextlib.nullcontext():
            yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _refuse_missing_tokenizer(found: ResolvedModel) -> None:
    """A folder without one: transformers would go on with an empty vocabulary."""
    is_folder = found.is_local and found.gguf_file is None
    if is_folder and not has_tokenizer(found.source):
        raise ModelError(
            f"cannot load the tokenizer {found.ref!r}: the folder has none of "
            f"{', '.join(TOKENIZER_FILES)}. Copy the tokenizer of its base model there."
        )


def _refuse_unread_generation_config(found: ResolvedModel) -> None:
    """One that cannot be read: transformers would go on without the stop tokens in it."""
    path = Path(found.source) / "generation_config.json"
    if found.is_local and found.gguf_file is None and path.exists():
        with _explained(found, "generation_config.json of"):
            json.loads(path.read_text(encoding="utf-8"))


def _options(found: ResolvedModel) -> dict[str, Any]:
    is_here = found.is_local or not is_hub_reachable()
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": is_here}
    if found.gguf_file is not None:
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtraError("gguf", "gguf", "Reading a GGUF file")
        options["gguf_file"] = found.gguf_file
    return options


@contextlib.contextmanager
def _explained(found: ResolvedModel, part: str) -> Iterator[None]:
    """Turn what transformers and its readers raise about bad files into one line."""
    try:
        yield
    except TutelageError:
        raise
    except Exception as error:  # what readers raise is anyone's guess; tokenizers: Exception itself
        away = "It is no folder here; check the name and the network, or give a folder."
        hint = "Check that the files are complete." if found.is_local else away
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            hint = "Use a smaller model, dtype or quantization, or free memory."
        reason = _one_line(error) or type(error).__name__
        if not found.is_local and isinstance(error, OSError) and not is_hub_reachable():
            reason = "it is not in the cache on this machine, and the hub cannot be reached"
        if "ignore_mismatched_sizes" in reason:
            reason = "its weights have other shapes than its config.json says"
        base = "" if found.is_local or found.adapter is None else f" from its base {found.source!r}"
        if base:
            hint = "Download it, and give its folder as base_model_name_or_path of the adapter."
        raise ModelError(
            f"cannot load the {part} {found.ref!r}{base}: {reason.rstrip('.')}. {hint}"
        ) from error


def _one_line(error: Exception) -> str:
    """Its text, or as many whole sentences of it as fit."""
    text = " ".join(str(error).split())
    if len(text) <= 200:
        return text
    whole, end, _ = text[:200].rpartition(". ")
    return whole + end.strip() if end else text[:197] + "..."
