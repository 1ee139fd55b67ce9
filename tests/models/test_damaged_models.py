"""Model folders and GGUF files with every kind of damage: one line, no traceback and no guess."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    PreTrainedConfig,
)

from tutelage.data.types import Prompt
from tutelage.errors import ModelError
from tutelage.models.load import load_model, load_tokenizer, save_model
from tutelage.models.tokenizers import encode_completion, encode_prompt, no_panic, stop_ids

Damage = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path, qwen3: Any, tokenizer: Any) -> Path:
    save_model(qwen3, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def refuse(load: Callable[[str], Any], path: Path) -> str:
    """The one line with which loading fails."""
    with pytest.raises(ModelError) as caught:
        load(str(path))
    text = str(caught.value)
    assert repr(str(path)) in text
    assert "\n" not in text
    assert len(text) < 500
    return text


def edit(name: str, change: Callable[[Any], object]) -> Damage:
    """Change a JSON file in place."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return damage


def config(**changes: Any) -> Damage:
    return edit("config.json", lambda value: value.update(changes))


def layers(number: int) -> Damage:
    """Another number of layers, and no list of their kinds that would give it away."""

    def change(value: dict[str, Any]) -> None:
        value["num_hidden_layers"] = number
        value.pop("layer_types", None)

    return edit("config.json", change)


def replace(name: str, content: bytes | str) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def half(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def as_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def as_loop(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the safetensors file and keep its bytes."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        end = 8 + int(struct.unpack("<Q", content[:8])[0])
        value = json.loads(content[8:end])
        change(value["model.norm.weight"])
        text = json.dumps(value).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])

    return damage


def header_of_exabytes(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors") | {"model.norm.weight": torch.ones(7)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def index_of(text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def part(name: str) -> Damage:
    return index_of(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}}))


def another_index(folder: Path) -> None:
    """One that only the configuration names."""
    table = {"metadata": {}, "weight_map": {"model.norm.weight": "../b.safetensors"}}
    (folder / "evil.safetensors.index.json").write_text(json.dumps(table))
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "evil.safetensors.index.json"
    (folder / "config.json").write_text(json.dumps(config))


DEEP = '{"a":' * 100_000
WEIGHTS: dict[str, tuple[Damage, str]] = {
    "empty": (replace("model.safetensors", b""), "header too small"),
    "half": (half("model.safetensors"), "not fully covered"),
    "half a header": (replace("model.safetensors", b"\xff\x02\0\0\0\0\0\0{"), "header"),
    "header of exabytes": (header_of_exabytes, "header too large"),
    "offsets": (header(lambda t: t.update(data_offsets=[0, 10**15])), "offset"),
    "dtype": (header(lambda t: t.update(dtype="F99")), "F99"),
    "huge shape": (header(lambda t: t.update(shape=[2**62, 2**62])), "cannot load"),
    "another shape": (another_shape, "other shapes than its config.json says"),
    "a folder": (as_folder("model.safetensors"), "no file named model.safetensors"),
    "a loop": (as_loop("model.safetensors"), "no file named model.safetensors"),
    "half an index": (index_of('{"weight_map": {'), "cannot load"),
    "an index that is a list": (index_of("[]"), "cannot load"),
    "an index of nothing": (index_of("{}"), "weight_map"),
    "a missing part": (
        index_of('{"metadata": {}, "weight_map": {"model.norm.weight": "b.safetensors"}}'),
        "b.safetensors",
    ),
    "a part beside the folder": (part("../b.safetensors"), "from '../b.safetensors', outside"),
    "a part below, and out": (part("x/../../b.safetensors"), "b.safetensors', outside its folder"),
    "another index": (another_index, "from '../b.safetensors', outside"),
    "a part anywhere": (part("/etc/b.safetensors"), "from '/etc/b.safetensors', outside"),
}
CONFIGS: dict[str, tuple[Damage, str]] = {
    "half": (half("config.json"), "not a valid JSON file"),
    "list": (replace("config.json", "[1]"), "model_type"),
    "null": (replace("config.json", "null"), "cannot load"),
    "NUL bytes": (replace("config.json", b"\0" * 99), "not a valid JSON file"),
    "UTF-16": (replace("config.json", "{}".encode("utf-16")), "not a valid JSON file"),
    "byte order mark": (replace("config.json", b"\xef\xbb\xbf{}"), "not a valid JSON file"),
    "deep": (replace("config.json", DEEP), "recursion"),
    "folder": (as_folder("config.json"), "no config.json"),
    "loop": (as_loop("config.json"), "no config.json"),
    "unknown architecture": (config(model_type="no_such"), "no_such"),
    "no architecture": (edit("config.json", lambda c: c.pop("model_type")), "model_type"),
    "text for a number": (config(hidden_size="many"), "expected int, got str"),
    "negative": (config(num_hidden_layers=-3), "num_hidden_layers"),
    "no layers": (layers(0), "22 weights that Qwen3ForCausalLM does not use"),
    "heads below zero": (config(num_attention_heads=-4), "negative dimension"),
    "huge width": (config(hidden_size=10**12), "other shapes"),
    "no heads": (config(num_attention_heads=0), "division"),
    "huge vocabulary": (config(vocab_size=10**15), "other shapes"),
    "too narrow": (config(hidden_size=16), "other shapes"),
    "stop tokens cut": (replace("generation_config.json", '{"eos'), "generation_config.json of"),
    "stop tokens as list": (replace("generation_config.json", "[]"), "cannot load"),
}
SETTINGS = "tokenizer_config.json"


def setting(**changes: Any) -> Damage:
    return edit(SETTINGS, lambda value: value.update(changes))


def tokens(change: Callable[[Any], object]) -> Damage:
    return edit("tokenizer.json", change)


def split(pattern: str) -> dict[str, Any]:
    behavior = {"behavior": "Isolated", "invert": False}
    return {"type": "Split", "pattern": {"Regex": pattern}} | behavior


TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "half": (half("tokenizer.json"), "cannot load the tokenizer"),
    "empty": (replace("tokenizer.json", ""), "Expecting value"),
    "nothing in it": (replace("tokenizer.json", "{}"), "cannot load the tokenizer"),
    "list": (replace("tokenizer.json", "[]"), "cannot load the tokenizer"),
    "deep": (replace("tokenizer.json", DEEP), "recursion"),
    "NUL bytes": (replace("tokenizer.json", b"\0" * 99), "cannot load the tokenizer"),
    "byte order mark": (replace("tokenizer.json", b"\xef\xbb\xbf{}"), "BOM"),
    "folder": (as_folder("tokenizer.json"), "the folder has none of tokenizer.json"),
    "loop": (as_loop("tokenizer.json"), "the folder has none of tokenizer.json"),
    "unknown kind": (tokens(lambda t: t["model"].update(type="X")), "cannot load the tokenizer"),
    "fractional id": (tokens(lambda t: t["model"]["vocab"].update(a=1.5)), "expected u32"),
    "negative id": (tokens(lambda t: t["model"]["vocab"].update(a=-1)), "expected u32"),
    "no tokens": (tokens(lambda t: t["model"].update(vocab={})), "UNK"),
    "bad pattern": (tokens(lambda t: t.update(pre_tokenizer=split("(("))), "parenthesis"),
    "half of the settings": (half(SETTINGS), "cannot load the tokenizer"),
    "settings as list": (replace(SETTINGS, "[]"), "cannot load the tokenizer"),
    "deep settings": (replace(SETTINGS, DEEP), "recursion"),
    "class as number": (setting(tokenizer_class=7), "cannot load the tokenizer"),
    "stop token as number": (setting(eos_token=7), "eos_token"),
    "stop token as table": (setting(eos_token={}), "eos_token"),
    "length as text": (setting(model_max_length="x"), "cannot load the tokenizer"),
    "template as list": (setting(chat_template=[1]), "cannot load the tokenizer"),
    "template that is no text": (replace("chat_template.jinja", b"\xff\xfe"), "decode"),
}


@pytest.mark.parametrize(("damage", "message"), (WEIGHTS | CONFIGS).values(), ids=WEIGHTS | CONFIGS)
def test_damaged_weights_and_settings(folder: Path, damage: Damage, message: str) -> None:
    assert load_model(str(folder)) is not None
    damage(folder)
    assert message in refuse(load_model, folder)


@pytest.mark.parametrize(("damage", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_damaged_tokenizers(folder: Path, damage: Damage, message: str) -> None:
    if (folder / "chat_template.jinja").exists():  # which goes before the one in the settings
        (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(str(folder)) is not None
    damage(folder)
    assert message in refuse(load_tokenizer, folder)


def test_a_pattern_without_end_is_one_line(folder: Path) -> None:
    """The Rust library panics, with a message of its own, once such a text comes."""
    tokens(lambda t: t.update(pre_tokenizer=split("(a+)+$")))(folder)
    tokenizer = load_tokenizer(str(folder))
    text = "a" * 40 + "!"
    with pytest.raises(BaseException, match="retry-limit") as panic:  # the negative control
        tokenizer(text)
    assert not isinstance(panic.value, Exception)
    line = refuse(lambda _: encode_prompt(tokenizer, Prompt("1", text)), folder)
    assert line == refuse(lambda _: encode_completion(tokenizer, text), folder)
    assert "cannot encode a text: Onig: Regex search error: retry-limit-in-match over." in line


def test_other_errors_are_nobodys_panic() -> None:
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), no_panic("x"):
            raise error


def test_code_beside_a_tokenizer_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise AssertionError('executed')\n")
    setting(auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})(folder)
    assert len(load_tokenizer(str(folder))) > 0


@pytest.mark.parametrize("declared", ["x", [2, "x"], [2, -5], 2.5, [True]])
def test_stop_tokens_that_are_no_ids(folder: Path, tokenizer: Any, declared: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    model = load_model(str(folder))
    with pytest.raises(ModelError, match="eos_token_id must be an id or a list of ids, got"):
        stop_ids(model, tokenizer)


Q_PROJ = "model.layers.0.self_attn.q_proj"
ATTENTION = "model.layers.0.self_attn"
SHAPES = {"masked_bias": (), "causal_mask": (1, 1, 8, 8), "inv_freq": (4,)}
LEFT_OVER: dict[str, tuple[tuple[str, ...], str | None]] = {
    "a bias": ((f"{Q_PROJ}.bias",), f"has 1 weights that .* does not use, first '{Q_PROJ}.bias'"),
    "scales of few bits": ((f"{Q_PROJ}.weight_scale_inv",), "does not use, first .*_scale_inv"),
    "an adapter": ((f"{Q_PROJ}.lora_A.weight",), "does not use, first .*lora_A"),
    "norms of another family": (
        ("model.layers.1.pre_feedforward_layernorm.weight",),
        "does not use, first .*pre_feedforward",
    ),
    "a layer more": (("model.layers.2.input_layernorm.weight",), r"does not use, .*layers\.2"),
    "a bias of the head": (("lm_head.bias",), "does not use, first 'lm_head.bias'"),
    "other heads and towers": (("v_head.weight", "mtp.fc.weight", "visual.blocks.0.w"), None),
    "masked bias": ((f"{ATTENTION}.masked_bias",), None),
    "causal mask": ((f"{ATTENTION}.causal_mask",), None),
    "frequencies": ((f"{ATTENTION}.rotary_emb.inv_freq", f"{ATTENTION}.inv_freq"), None),
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_weights_that_a_model_would_leave_out_are_refused(folder: Path, name: str) -> None:
    extra, message = LEFT_OVER[name]
    file = folder / "model.safetensors"
    shapes = {key: SHAPES.get(key.rpartition(".")[2], (4,)) for key in extra}
    weights = load_file(file) | {key: torch.ones(shape) for key, shape in shapes.items()}
    save_file(weights, file, metadata={"format": "pt"})
    if message is None:
        assert load_model(str(folder)).num_parameters() > 0
        return
    assert re.search(message, refuse(load_model, folder))


TINY: dict[str, Any] = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0}
MASKED: dict[str, tuple[PreTrainedConfig, str]] = {
    "gpt2": (GPT2Config(n_embd=16, n_layer=1, n_head=2, **TINY), "attn"),
    "gptj": (GPTJConfig(n_embd=16, n_layer=1, n_head=2, rotary_dim=4, **TINY), "attn"),
    "codegen": (CodeGenConfig(n_embd=16, n_layer=1, n_head=4, rotary_dim=2, **TINY), "attn"),
    "gpt_neo": (
        GPTNeoConfig(
            hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]], **TINY
        ),
        "attn.attention",
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_among_old_weights_are_no_weights(tmp_path: Path, name: str) -> None:
    config, place = MASKED[name]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = load_file(file)

    def add(**buffers: torch.Tensor) -> None:
        named = {f"transformer.h.0.{place}.{key}": value for key, value in buffers.items()}
        save_file(saved | named, file, metadata={"format": "pt"})

    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    add(bias=mask, masked_bias=torch.tensor(-1e9), causal_mask=mask.clone())
    assert load_model(str(tmp_path)).num_parameters() > 0
    if name in ("gptj", "codegen"):  # the others' own class expects or passes over the name
        add(bias=torch.ones(16))
        assert f"first 'transformer.h.0.{place}.bias'" in refuse(load_model, tmp_path)
