"""GGUF files: read once and as their library reads them; damaged ones end in one line."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.errors import ModelError
from tutelage.models.gguf import parsed_once
from tutelage.models.load import load_model, load_model_config
from tutelage.models.reference import resolve_model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file: a Llama of one layer."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_array("test.texts", ["a", "bc"])
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(16)
    layer = {f"attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    layer |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "output_norm": (32,)}
    shapes |= {"token_embd": (16, 32), "output": (16, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_a_whole_file_is_parsed_once_and_again_when_it_changes(
    gguf_file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = pytest.importorskip("gguf.gguf_reader").GGUFReader
    parsed, build = [], reader._build_fields
    monkeypatch.setattr(
        reader, "_build_fields", lambda self, *given: parsed.append(1) or build(self, *given)
    )
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file)
    model = load_model(str(path))
    load_model_config(resolve_model(str(path)))
    again = load_model(str(path), "bfloat16")
    assert len(parsed) == 1
    assert model.config.num_hidden_layers == again.config.num_hidden_layers == 1
    assert all(bool((weight == 1).all()) for weight in again.state_dict().values())
    path.write_bytes(gguf_file[:-4] + struct.pack("<f", 2.0))
    changed = load_model(str(path))
    assert len(parsed) == 2
    assert sum(float((weight != 1).sum()) for weight in changed.state_dict().values()) == 1


@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_settings_are_those_of_the_library_s_own_reader(order: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama", endianess=gguf.GGUFEndian[order])
    lists: list[list[Any]] = [
        [1, 2, -3],
        [0.5, -2.0],
        [True, False],
        ["a", "", "zwölf\n", "b" * 300],
    ]
    for i, values in enumerate(lists):
        writer.add_array(f"test.list_{i}", values)
        writer.add_string(f"test.text_{i}", f"after list {i}")
    writer.add_tensor("output.weight", torch.ones(2, 3).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own = gguf.GGUFReader(str(path))
    with parsed_once():
        ours = gguf.GGUFReader(str(path))
    assert type(ours) is not type(own)
    assert [ours.fields[f"test.list_{i}"].contents() for i in range(len(lists))] == lists
    assert ours.fields.keys() == own.fields.keys()
    for name, field in own.fields.items():
        found = ours.fields[name]
        assert (found.offset, found.data, found.types) == (field.offset, field.data, field.types)
        assert [part.tobytes() for part in found.parts] == [part.tobytes() for part in field.parts]
    assert [t.data.tolist() for t in ours.tensors] == [t.data.tolist() for t in own.tensors]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "BF16", "F16"])
def test_weights_are_unpacked_as_by_the_library(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    weights = torch.randn(3, 37, 64, generator=torch.Generator().manual_seed(0)).numpy()
    packed = gguf.quantize(weights, gguf.GGMLQuantizationType[kind])
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    monkeypatch.setattr("tutelage.models.gguf._PIECE_BYTES", 300)
    with parsed_once():
        found = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


def test_a_model_whose_weights_are_read_draws_none(gguf_file: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_file)
    before = torch.get_rng_state()
    model = load_model(str(tmp_path / "m.gguf"))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(bool((weight == 1).all()) for weight in model.state_dict().values())


def number(name: bytes, value: int) -> Callable[[bytes], bytes]:
    """Another number in the settings."""

    def change(content: bytes) -> bytes:
        at = content.rindex(name) + len(name) + 4
        return content[:at] + struct.pack("<I", value) + content[at + 4 :]

    return change


def endless(name: bytes) -> Callable[[bytes], bytes]:
    """A list that claims more than there is."""

    def change(content: bytes) -> bytes:
        at = content.rindex(name) + len(name) + 8  # kinds of the setting and of what it lists
        return content[:at] + struct.pack("<Q", 1 << 60) + content[at + 8 :]

    return change


COUNT = b"llama.block_count"
GGUF: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "half": (lambda b: b[: len(b) // 2], "cannot load"),
    "a thousand bytes": (lambda b: b[:1000], "cannot load"),
    "a hundred bytes": (lambda b: b[:100], "cannot load"),
    "all but the end": (lambda b: b[:-50], "cannot load"),
    "tensors without end": (lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:], "cannot load"),
    "settings without end": (lambda b: b[:16] + struct.pack("<Q", 1 << 60) + b[24:], "cannot"),
    "text without end": (lambda b: b[:24] + struct.pack("<Q", 1 << 60) + b[32:], "cannot load"),
    "numbers without end": (endless(b"test.numbers"), "cannot load"),
    "texts without end": (endless(b"test.texts"), "cannot load"),
    "another version": (lambda b: b[:4] + struct.pack("<I", 99) + b[8:], "cannot load"),
    "zeros": (lambda b: b[:4] + bytes(len(b) - 4), "cannot load"),
    "unknown architecture": (lambda b: b.replace(b"llama", b"zzzzz"), "zzzzz"),
    "another width": (number(b"llama.embedding_length", 64), "size mismatch"),
    "a layer more": (number(COUNT, 2), "lacks 9 weights, first 'model.layers.1."),
    "a million dimensions": (number(b"llama.embedding_length", 10**6), "cannot load"),
    "a tensor less": (
        lambda b: b.replace(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight"),
        "lacks 1 weights, first 'model.layers.0.self_attn.q_proj.weight'",
    ),
}


@pytest.mark.skipif(find_spec("gguf") is None, reason="package gguf not installed")
@pytest.mark.filterwarnings("ignore")  # of numpy about sizes
def test_damaged_gguf_files(gguf_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file)
    assert load_model(str(path)).num_parameters() > 0
    for name, (change, message) in GGUF.items():
        path.write_bytes(change(gguf_file))
        with pytest.raises(ModelError, match=re.escape(message)) as caught:
            load_model(str(path))
        line = str(caught.value)
        assert repr(str(path)) in line, name
        assert "\n" not in line
