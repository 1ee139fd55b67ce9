"""The teacher resident, offloaded or reloaded: the same bits, and its memory given back."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny import tiny_config
from tiny_runs import (
    are_equal,
    metrics_of,
    run,
)
from tutelage.data.batch import collate
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError, RunError
from tutelage.models.host_weights import has_plain_weights
from tutelage.models.load import load_model
from tutelage.models.teacher import HiddenStore, Teacher
from tutelage.setup.components import build_components
from tutelage.setup.teacher import load_teacher


def test_every_mode_and_store_learns_the_same_bits(tmp_path: Path, tiny_models: Path) -> None:
    short = {"num_steps": 2, "selection": {"rule": "soft_or", "keep": 0.5}}
    plain = run(tiny_models, tmp_path / "plain", **short)
    for number, teacher in enumerate(
        (
            {"mode": "offload"},
            {"mode": "reload"},
            {"mode": "resident", "hidden_budget_bytes": 0},
            {"mode": "reload", "hidden_budget_bytes": 2000},
        )
    ):
        out = tmp_path / str(number)
        assert are_equal(run(tiny_models, out, teacher=teacher, **short), plain), teacher
        assert metrics_of(out) == metrics_of(tmp_path / "plain")
    other = run(tiny_models, tmp_path / "other", teacher={"dtype": "bfloat16"}, **short)
    assert not are_equal(other, plain)  # the comparison sees a teacher that reads differently


def test_a_reloaded_teacher_is_gone_between_phases(tiny_models: Path) -> None:
    def load() -> Any:
        return load_model(str(tiny_models / "teacher"))

    for mode, is_kept in (("resident", True), ("offload", True), ("reload", False)):
        teacher = Teacher(load(), 20, mode=mode, load=load)
        with teacher.on_device():
            alive = weakref.ref(teacher.model)
        gc.collect()
        assert (alive() is not None) == is_kept, mode
    with pytest.raises(RuntimeError, match="on_device"):
        _ = teacher.model


@pytest.mark.parametrize("change", ["touched", "gone"])
def test_a_teacher_whose_files_changed_is_not_loaded_again(
    change: str, tmp_path: Path, tiny_models: Path
) -> None:
    folder = shutil.copytree(tiny_models / "teacher", tmp_path / "teacher")
    teacher = {"model": str(folder), "mode": "offload"}
    components = build_components(tiny_config(tiny_models, tmp_path / "out", teacher=teacher))
    with components.teacher.on_device():
        pass  # unchanged files are read again
    if change == "touched":
        os.utime(folder / "model.safetensors", (1, 1))
    else:
        shutil.rmtree(folder)
    with (
        pytest.raises(RunError, match=r"teacher '.*' have changed.*Restore them and start"),
        components.teacher.on_device(),
    ):
        pass


def test_a_reloaded_teacher_leaves_no_mapped_file_behind(tiny_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"  # what other tests have mapped is in another
    shutil.copytree(tiny_models / "teacher", folder)

    def load() -> Any:
        return load_model(str(folder))

    sequence = collate([Rollout(Prompt("p", ""), 0, (1, 3), (4, 5), False, (0.0, 0.0), "")], 0)
    for mode in ("reload", "offload"):  # in this order: what offload maps stays
        teacher = Teacher(load(), 20, mode=mode, load=load)
        with teacher.on_device():
            read = teacher.forward(sequence)
        gc.collect()
        is_mapped = str(folder) in Path("/proc/self/maps").read_text()
        assert is_mapped == (mode == "offload")
    assert len(read) == 2


@pytest.mark.parametrize("has_new_weights", [False, True], ids=["as CUDA", "meta"])
def test_an_offloaded_teacher_is_not_copied_back_from_the_device(
    has_new_weights: bool, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A move to CUDA gives the same parameters other numbers; one to meta makes new parameters.

    A device without numbers would make a copy from it an error.
    """
    model = load_model(str(tiny_models / "teacher"))
    model.lm_head.weight = model.model.embed_tokens.weight  # tied
    teacher = Teacher(model, 20, "meta", "offload")
    before = dict(model.state_dict(keep_vars=True))
    assert before["lm_head.weight"] is before["model.embed_tokens.weight"]
    tables = dict(model.named_buffers())
    assert tables  # such as the frequencies of rotary embeddings
    numbers = {name: (t.data_ptr(), t.detach().clone()) for name, t in before.items()}
    if not has_new_weights:
        to = model.to
        monkeypatch.setattr(model, "to", lambda d: to(d) if d == "cpu" else model._apply(_copy))
    for _ in range(2):
        with teacher.on_device():
            head = model.get_output_embeddings().weight.detach()
            assert all(value is not tables[name] for name, value in model.named_buffers())
            for name, weight in model.state_dict(keep_vars=True).items():
                assert weight.is_meta or weight.data_ptr() != numbers[name][0]
                assert (weight is before[name]) != has_new_weights
        for name, weight in model.state_dict(keep_vars=True).items():
            place, values = numbers[name]
            assert weight is before[name]
            assert weight.data_ptr() == place
            assert torch.equal(weight, values)
        assert all(value is tables[name] for name, value in model.named_buffers())
        assert head.is_meta or torch.equal(head, numbers["lm_head.weight"][1])


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def test_what_a_model_changes_in_its_buffers_stays_changed() -> None:
    """Frequencies for longer sequences take the place of others, and the module notes it."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    settings = LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        rope_parameters=rope,
    )
    models = [LlamaForCausalLM(settings) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    short, long = (
        collate([Rollout(Prompt("p", ""), 0, (1,) * n, (4, 5), False, (0.0, 0.0), "")], 0)
        for n in (4, 40)
    )
    resident, offload = (
        Teacher(model, 20, mode=mode)
        for model, mode in zip(models, ("resident", "offload"), strict=True)
    )
    for batch in (short, long, long, short, long):
        found = []
        for teacher in (resident, offload):
            with teacher.on_device():
                found.append(teacher.forward(batch).hidden)
        assert torch.equal(*found)


def test_a_table_that_was_made_on_the_device_comes_to_main_memory(tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "teacher"))
    teacher = Teacher(model, 20, "meta", "offload")
    table = torch.zeros(2, device="meta")
    with pytest.raises(NotImplementedError, match="meta"), teacher.on_device():
        model.register_buffer("table", table)  # meta has no numbers to copy back


def test_an_offloaded_teacher_that_does_not_fit_stays_in_main_memory(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_models / "teacher"))
    teacher = Teacher(model, 20, "meta", "offload")
    layer = model.model.layers[1]
    apply = layer._apply

    def refuse(*_: object, **__: object) -> None:
        monkeypatch.setattr(layer, "_apply", apply)
        raise MemoryError

    monkeypatch.setattr(layer, "_apply", refuse)
    with pytest.raises(MemoryError), teacher.on_device():
        pass
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


def test_an_offloaded_teacher_holds_no_file_that_others_could_change(
    tiny_models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"  # what other tests have mapped is in another
    shutil.copytree(tiny_models / "teacher", folder)
    teacher = Teacher(load_model(str(folder)), 20, "meta", "offload")
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert teacher.model.lm_head.weight.any()


def test_a_quantized_teacher_moves_with_what_lies_beside_its_weights(tiny_models: Path) -> None:
    class Quantized(torch.nn.Parameter):
        pass

    model = load_model(str(tiny_models / "teacher"))
    assert has_plain_weights(model)
    model.model.norm.weight = Quantized(model.model.norm.weight.data, requires_grad=False)
    assert not has_plain_weights(model)
    teacher = Teacher(model, 20, "meta", "offload")
    with pytest.raises(NotImplementedError, match="meta"), teacher.on_device():
        pass  # meta has no numbers to copy back


def test_hidden_states_beyond_the_budget_lie_in_a_file_without_a_name(tmp_path: Path) -> None:
    store = HiddenStore(1000, tmp_path)
    numbers = torch.randn(10, 20, dtype=torch.float64).bfloat16()  # 400 bytes
    kept = [store.keep(numbers) for _ in range(4)]
    assert all(torch.equal(x, numbers) for x in kept)
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert sum(str(tmp_path) in line and "deleted" in line for line in mapped) == 2
    assert list(tmp_path.iterdir()) == []  # so a crash leaves nothing behind
    del kept
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    store.empty()
    again = store.keep(numbers)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(again, numbers)
    assert len(store.keep(numbers[:0])) == 0


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(RunError, match=r"800 bytes.*No space left.*hidden_budget_bytes"):
        HiddenStore(0, tmp_path).keep(torch.zeros(100, 2))


def test_a_file_that_would_be_unpacked_in_every_step_is_refused(
    tmp_path: Path, tiny_models: Path
) -> None:
    file = tmp_path / "teacher.gguf"
    file.write_bytes(b"GGUF")
    shutil.copy(tiny_models / "teacher" / "config.json", tmp_path)
    teacher = {"model": str(file), "mode": "reload"}
    config = tiny_config(tiny_models, tmp_path / "out", teacher=teacher)
    with pytest.raises(ConfigError, match="'reload' would unpack"):
        load_teacher(config, torch.device("cpu"))


def test_the_old_key_says_what_it_is_now(tmp_path: Path, tiny_models: Path) -> None:
    teacher = {"model": "x", "offload": True}
    with pytest.raises(ConfigError, match=r'teacher.offload is now teacher.mode = "offload"'):
        tiny_config(tiny_models, tmp_path, teacher=teacher)
