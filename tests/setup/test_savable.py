"""A student that could not be saved is found before the first step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from tiny import tiny_config
from tutelage.commands.check import check
from tutelage.errors import ConfigError, ModelError
from tutelage.models.load import load_model, load_tokenizer, save_model
from tutelage.models.lora import add_lora, merge
from tutelage.models.tiny import Architecture, save_tiny_model
from tutelage.setup.savable import refuse_quantized, require_savable
from tutelage.train.loop import train


def with_settings(models: Path, folder: Path, **values: Any) -> Path:
    """A copy of the tiny models whose student's generation_config.json says more."""
    shutil.copytree(models, folder)
    path = folder / "student" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    "values",
    [{"do_sample": False, "temperature": 0.6}, {"length_penalty": 2.0, "num_beams": 1}],
)
def test_settings_without_effect_are_left_out_and_said(
    tiny_models: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    models = with_settings(tiny_models, tmp_path / "models", **values)
    config = tiny_config(models, tmp_path / "run", num_steps=1)
    said: list[str] = []
    train(config, log=said.append)
    (line,) = [line for line in said if "generation_config.json" in line]
    assert all(name in line for name in values.keys() - {"do_sample", "num_beams"})
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "student")
    before = GenerationConfig.from_pretrained(tiny_models / "student")
    assert saved.eos_token_id == before.eos_token_id
    assert saved.temperature in (None, 1.0)
    assert f"warning: {line.removeprefix('warning: ')}" in list(check(config, "run"))


def test_settings_that_contradict_each_other_are_one_line(
    tiny_models: Path, tmp_path: Path
) -> None:
    model = load_model(str(tiny_models / "student"))
    model.generation_config.num_return_sequences = 3
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be saved: Greedy"):
        require_savable(model, load_tokenizer(str(tiny_models / "student")))


def test_whatever_saving_raises_is_one_line(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_models / "student"))

    def fail(*_: Any, **__: Any) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(model, "state_dict", fail)
    with pytest.raises(ModelError, match="cannot be saved: too deep"):
        require_savable(model, load_tokenizer(str(tiny_models / "student")))


def test_weights_of_few_bits_are_refused(tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "student"))
    refuse_quantized(model, "s")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"'s' is quantized in its own files, .* is int8"):
        refuse_quantized(model, "s")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mixture"
    found = Architecture(AutoConfig.for_model("mixtral"), "a test", is_base=False)
    save_tiny_model(found, 267, 1, folder)
    return folder


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ((), r"student\.lora cannot adapt the experts of MixtralForCausalLM, which are one tensor"),
        (("q_proj", "gate"), r"student\.lora\S* .*(gate|router)"),
        (("experts",), r"student\.lora cannot be added: Target module MixtralExperts"),
    ],
)
def test_adapters_of_experts_and_routers_are_refused(
    mixture: Path, names: tuple[str, ...], pattern: str
) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=pattern):
        add_lora(load_model(str(mixture)), 2, 4.0, target_modules=names)


@pytest.mark.parametrize(
    ("is_tied", "name", "what"),
    [(False, "lm_head", "head"), (True, "embed_tokens", "embedding"), (True, "lm_head", "head")],
)
def test_adapters_of_head_and_embedding_are_refused(
    make_qwen3: Any, is_tied: bool, name: str, what: str
) -> None:
    """Neither is called where the loss is computed, so an adapter there would not be seen."""
    pytest.importorskip("peft")
    model = make_qwen3(40, 2, tie_word_embeddings=is_tied)
    with pytest.raises(ConfigError, match=f"target_modules fits .*{name}, the {what} of Qwen3"):
        add_lora(model, 2, 4.0, target_modules=("q_proj", name))


def test_an_adapter_of_transposed_layers_is_silent_and_merges(tmp_path: Path) -> None:
    """GPT-2's linear layers hold their weights the other way round."""
    pytest.importorskip("peft")
    found = Architecture(AutoConfig.for_model("gpt2"), "", is_base=False)
    save_tiny_model(found, 267, 0, tmp_path / "gpt2")
    model = load_model(str(tmp_path / "gpt2"))
    add_lora(model, 2, 4.0)  # a warning would be an error here
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        adapted, plain = (m(ids).logits for m in (model, load_model(str(tmp_path / "gpt2"))))
        merged = merge(model)(ids).logits
    assert float((adapted - plain).norm() / plain.norm()) > 1e-2
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


def test_attention_of_a_mixture_can_be_adapted_and_saved(mixture: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, tokenizer = load_model(str(mixture)), load_tokenizer(str(mixture))
    add_lora(model, 2, 4.0, target_modules=("q_proj", "v_proj"))
    assert require_savable(model, tokenizer) == []
    save_model(model, tokenizer, tmp_path / "adapter")
