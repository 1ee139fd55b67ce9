"""Folders of adapters as models: merged into the base that they name, or one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tutelage.config.parse import parse_config
from tutelage.errors import ConfigError, ModelError
from tutelage.models.load import load_model, load_tokenizer, save_model
from tutelage.models.lora import add_lora, load_adapter
from tutelage.models.reference import resolve_model
from tutelage.models.tiny import Architecture, save_tiny_model
from tutelage.setup.manifest import model_digest
from tutelage.train.loop import train

peft = pytest.importorskip("peft")
IDS = torch.tensor([[7, 8, 9]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_tiny_model(
        Architecture(AutoConfig.for_model("qwen3"), "", False), 267, 0, tmp_path / "base"
    )
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """What peft writes: an adapter that is no zero, a path to its base, no tokenizer."""
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(load_model(str(base)), config)
    model.base_model.model.name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path=str(base))
    return tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def test_an_adapter_is_saved_without_a_look_for_its_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a GGUF file the folder has no config.json, and peft would ask the hub for one."""

    def ask(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", ask)
    model, tokenizer = load_model(str(base)), load_tokenizer(str(base))
    model.config._name_or_path = model.name_or_path = str(tmp_path)
    add_lora(model, 2, 4.0)
    save_model(model, tokenizer, tmp_path / "saved")
    again = load_model(str(base))
    add_lora(again, 2, 4.0, seed=1)
    load_adapter(again, tmp_path / "saved")
    ours, theirs = (m.get_adapter_state_dict() for m in (again, model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_is_merged_into_its_base(base: Path, adapter: Path) -> None:
    merged = load_model(str(adapter))
    expected = peft.PeftModel.from_pretrained(load_model(str(base)), str(adapter))
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-4, atol=1e-5)
    assert float((logits(merged) - logits(load_model(str(base)))).abs().max()) > 1e-2
    names = [name for name, _ in merged.named_parameters()]
    assert names == [name for name, _ in load_model(str(base)).named_parameters()]
    assert all(weight.requires_grad for weight in merged.parameters())
    assert load_tokenizer(str(adapter)).get_vocab() == load_tokenizer(str(base)).get_vocab()
    assert resolve_model(str(adapter)).ref == str(adapter)


def test_adapters_train_as_student_and_as_teacher(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    for student, teacher in ((adapter, base), (base, adapter)):
        seen: list[dict[str, Any]] = []
        out = tmp_path / student.name
        table = {
            "student": {"model": str(student)},
            "teacher": {"model": str(teacher)},
            "data": {"kind": "file", "path": str(prompts), "num_held_out": 0, "chat": False},
            "sampling": {"max_new_tokens": 4},
            "evaluation": {"num_problems": 0},
            "num_steps": 1,
            "prompts_per_step": 2,
            "device": "cpu",
            "out": str(out / "run"),
        }
        train(parse_config(table), log=lambda _: None, on_step=seen.append)
        assert seen[0]["loss"] > 1e-3
        assert not (out / "run" / "student" / "adapter_config.json").exists()
        assert logits(load_model(str(out / "run" / "student"))).isfinite().all()


def test_a_copied_configuration_without_weights_changes_nothing(base: Path, adapter: Path) -> None:
    """torchtune copies the base's configuration and tokenizer beside the adapter."""
    before = logits(load_model(str(adapter)))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    assert torch.equal(logits(load_model(str(adapter))), before)


def test_a_base_beside_its_adapter_is_found_by_a_relative_path(base: Path, adapter: Path) -> None:
    before = logits(load_model(str(adapter)))
    edit(adapter, base_model_name_or_path="../base")
    assert torch.equal(logits(load_model(str(adapter))), before)


def beside_weights(base: Path, adapter: Path) -> None:
    shutil.copy(base / "model.safetensors", adapter)
    shutil.copy(base / "config.json", adapter)


def nameless(base: Path, adapter: Path) -> None:
    edit(adapter, base_model_name_or_path=None)


def unconfigured(base: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def pickled(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def absent(base: Path, adapter: Path) -> None:
    shutil.rmtree(base)


def nested(base: Path, adapter: Path) -> None:
    edit(adapter, base_model_name_or_path=str(adapter))


def foreign_shapes(base: Path, adapter: Path) -> None:
    shutil.rmtree(base)
    save_tiny_model(Architecture(AutoConfig.for_model("gpt2"), "", False), 267, 0, base)


def change(adapter: Path, rule: Callable[[str], str | None]) -> None:
    """Rename weights of an adapter, or leave them out."""
    file = adapter / "adapter_model.safetensors"
    weights = {new: w for name, w in load_file(file).items() if (new := rule(name)) is not None}
    save_file(weights, file)


def renamed(base: Path, adapter: Path) -> None:
    change(adapter, lambda name: name.replace("model.model.", "model.model.language_model."))


def deeper(base: Path, adapter: Path) -> None:
    change(adapter, lambda name: name.replace("layers.1", "layers.7"))


def halved(base: Path, adapter: Path) -> None:
    change(adapter, lambda name: name if "layers.0" in name else None)


def one_sided(base: Path, adapter: Path) -> None:
    change(adapter, lambda name: name if "lora_A" in name else None)


def unknown_kind(base: Path, adapter: Path) -> None:
    edit(adapter, peft_type="ZZZ")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (renamed, r"does not fit its base: \d+ of its weights have no layer .*language_model"),
        (deeper, r"does not fit its base: \d+ of its weights have no layer .*layers\.7"),
        (halved, r"does not fit its base: it lacks \d+ weights, first .*layers\.1"),
        (one_sided, r"does not fit its base: it lacks \d+ weights, first .*lora_B"),
        (unknown_kind, r"cannot load the adapter .*ZZZ"),
        (beside_weights, r"holds whole weights \(model\.safetensors\) and an adapter"),
        (nameless, "does not name its base"),
        (unconfigured, "does not name its base"),
        (pickled, "is an adapter without adapter_model.safetensors; pickled"),
        (absent, "does not exist"),
        (nested, "adapter of an adapter"),
        (foreign_shapes, "cannot load the adapter"),
    ],
)
def test_adapters_that_lead_nowhere_are_one_line(
    base: Path, adapter: Path, damage: Any, message: str
) -> None:
    damage(base, adapter)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(adapter))
    assert "\n" not in str(caught.value)


def test_a_base_on_the_hub_that_is_not_here_is_one_line(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutelage.models.load.is_hub_reachable", lambda: False)
    edit(adapter, base_model_name_or_path="nobody/no-such-base")
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            ModelError, match="from its base 'nobody/no-such-base': it is not in"
        ) as caught:
            load(str(adapter))
        assert "\n" not in str(caught.value)


def test_low_bits_and_an_adapter_are_refused(adapter: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be merged into 8bit weights"):
        load_model(str(adapter), quantization="8bit")


def test_the_digest_of_a_reference_to_an_adapter_is_of_both(adapter: Path, base: Path) -> None:
    before = {model_digest(str(adapter)), model_digest(str(base))}
    edit(adapter, r=3)
    changed = model_digest(str(adapter))
    assert len({*before, changed}) == 3
    (base / "generation_config.json").write_text("{}")
    assert model_digest(str(adapter)) != changed


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"},
     {"target_modules": ["embed_tokens", "q_proj"]}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_every_kind_of_low_rank_adapter_says_what_peft_says(
    tmp_path: Path, base: Path, options: dict[str, Any]
) -> None:
    model = load_model(str(base))
    kind = {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**kind | options))
    torch.manual_seed(0)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(tmp_path / "other", save_embedding_layers=False)
    wanted = logits(adapted.eval())
    edit(tmp_path / "other", base_model_name_or_path=str(base))
    assert float((logits(load_model(str(tmp_path / "other"))) - wanted).abs().max()) < 1e-4


def test_virtual_tokens_are_no_change_of_weights(tmp_path: Path, base: Path) -> None:
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(load_model(str(base)), prompt).save_pretrained(tmp_path / "other")
    edit(tmp_path / "other", base_model_name_or_path=str(base))
    with pytest.raises(ModelError, match="is of type PROMPT_TUNING, which is no change of weights"):
        load_model(str(tmp_path / "other"))
