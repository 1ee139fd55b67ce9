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


def test_an_offloaded_teacher_is_not_copied_back_from_the_device(tiny_models: Path) -> None:
    """The device here has no numbers: a weight that were copied from it would be an error."""
    model = load_model(str(tiny_models / "teacher"))
    model.lm_head.weight = model.model.embed_tokens.weight  # tied
    before = dict(model.state_dict(keep_vars=True))
    assert before["lm_head.weight"] is before["model.embed_tokens.weight"]
    tables = dict(model.named_buffers())
    assert tables  # such as the frequencies of rotary embeddings
    numbers = {name: (t.data_ptr(), t.detach().clone()) for name, t in before.items()}
    teacher = Teacher(model, 20, "meta", "offload")
    for _ in range(2):
        with teacher.on_device():
            assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
        for name, weight in model.state_dict(keep_vars=True).items():
            place, values = numbers[name]
            assert weight is before[name]
            assert weight.data_ptr() == place
            assert torch.equal(weight, values)
        assert all(value is tables[name] for name, value in model.named_buffers())


def test_an_offloaded_teacher_that_does_not_fit_stays_in_main_memory(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_models / "teacher"))
    teacher = Teacher(model, 20, "meta", "offload")
    layer = model.model.layers[1]
    monkeypatch.setattr(layer, "_apply", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError), teacher.on_device():
        pass
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


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
