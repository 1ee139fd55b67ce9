"""What saves memory changes no number it should not: modes, adapters, master weights, low bits."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.adamw import adamw
from transformers import AutoModelForCausalLM

from tiny import MEASURED, save_tiny_model, tiny_config
from tutelage.data.batch import Batch, collate
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError, MissingExtraError, RunError
from tutelage.memory.cpu import status_bytes
from tutelage.models.device import give_back
from tutelage.models.llama_cpu.layers import is_fast_family
from tutelage.models.load import load_model
from tutelage.models.lora import add_lora, checkpoint_activations, learning
from tutelage.models.offload import MappedFile
from tutelage.models.optimizer import DiskAdamW, MasterWeights, make_optimizer
from tutelage.models.teacher import HiddenStore, Teacher
from tutelage.setup.components import _load_teacher, build_components
from tutelage.train.loop import train

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.2}


def weights_of(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def run(models: Path, out: Path, **changes: Any) -> dict[str, Tensor]:
    """The student's weights after a tiny run."""
    for who in ("student", "teacher"):
        changes[who] = {"model": str(models / who)} | changes.get(who, {})
    train(tiny_config(models, out, **changes), log=lambda _: None)
    return weights_of(out / "student")


def metrics_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def are_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def some_batch(components: Any) -> Batch:
    from invariance.stepping import ragged_rollouts

    return collate(ragged_rollouts(components), 0)


# --- where the teacher rests ---------------------------------------------------------------------


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
        with teacher.awake():
            alive = weakref.ref(teacher.model)
        gc.collect()
        assert (alive() is not None) == is_kept, mode
    with pytest.raises(RuntimeError, match="awake"):
        _ = teacher.model


@pytest.mark.parametrize("change", ["touched", "gone"])
def test_a_teacher_whose_files_changed_is_not_loaded_again(
    change: str, tmp_path: Path, tiny_models: Path
) -> None:
    folder = shutil.copytree(tiny_models / "teacher", tmp_path / "teacher")
    teacher = {"model": str(folder), "mode": "offload"}
    components = build_components(tiny_config(tiny_models, tmp_path / "out", teacher=teacher))
    with components.teacher.awake():
        pass  # unchanged files are read again
    if change == "touched":
        os.utime(folder / "model.safetensors", (1, 1))
    else:
        shutil.rmtree(folder)
    with (
        pytest.raises(RunError, match=r"teacher '.*' have changed.*Restore them and start"),
        components.teacher.awake(),
    ):
        pass


def test_a_reloaded_teacher_leaves_no_mapped_file_behind(tiny_models: Path) -> None:
    def load() -> Any:
        return load_model(str(tiny_models / "teacher"))

    sequence = collate([Rollout(Prompt("p", ""), 0, (1, 3), (4, 5), False, (0.0, 0.0), "")], 0)
    for mode in ("reload", "offload"):  # in this order: what offload maps stays
        teacher = Teacher(load(), 20, mode=mode, load=load)
        with teacher.awake():
            read = teacher.read(sequence)
        gc.collect()
        is_mapped = str(tiny_models / "teacher") in Path("/proc/self/maps").read_text()
        assert is_mapped == (mode == "offload")
    assert len(read) == 2


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
        _load_teacher(config, torch.device("cpu"))


def test_the_old_key_says_what_it_is_now(tmp_path: Path, tiny_models: Path) -> None:
    teacher = {"model": "x", "offload": True}
    with pytest.raises(ConfigError, match=r'teacher.offload is now teacher.mode = "offload"'):
        tiny_config(tiny_models, tmp_path, teacher=teacher)


# --- moments on disk, and memory that is given back -----------------------------------------------


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder on a disk: what is resident of a file in memory is another matter."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def resident_bytes(folder: Path) -> int:
    """Memory that this process has of files that were in a folder and have no name."""
    total, is_there = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(" ")[0].endswith(":"):
            is_there = str(folder) in line and "deleted" in line
        elif is_there and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def two_updates(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(2):
        for weight in weights[step:]:  # one weight has a gradient only once
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


def some_weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1000, 33), (5,), (7, 4096), (1, 1)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("piece", [1024, 1 << 22])
def test_moments_on_disk_are_those_in_memory(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutelage.models.optimizer._PIECE", piece)
    kinds: dict[Any, list[torch.nn.Parameter]] = {
        "adamw": some_weights(),
        "adamw_on_disk": some_weights(),
    }
    made = {}
    for kind, weights in kinds.items():
        made[kind] = make_optimizer(kind, weights, 1e-2, (0.9, 0.95), 0.1, tmp_path)
        two_updates(made[kind], weights)
    for plain, mapped in zip(*kinds.values(), strict=True):
        assert torch.equal(plain, mapped)
        left, right = made["adamw"].state[plain], made["adamw_on_disk"].state[mapped]
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    other = some_weights()
    two_updates(make_optimizer("adamw", other, 1e-2, (0.9, 0.95), 0.0, tmp_path), other)
    assert not torch.equal(other[0], kinds["adamw"][0])  # the comparison sees another decay
    assert list(tmp_path.iterdir()) == []  # a crash leaves nothing behind


def test_only_a_piece_of_the_moments_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutelage.models.optimizer._PIECE", 1024)
    weights = some_weights()
    optimizer = DiskAdamW(weights, tmp_path, lr=1e-2)
    during: list[int] = []

    def watched(*arguments: Any, **options: Any) -> None:
        adamw(*arguments, **options)
        during.append(resident_bytes(tmp_path))

    monkeypatch.setattr("tutelage.models.optimizer.adamw", watched)
    two_updates(optimizer, weights)
    assert max(during) < sum(weight.nbytes for weight in weights)  # half of all moments
    assert resident_bytes(tmp_path) == 0
    total = sum(float(state["exp_avg"].abs().sum()) for state in optimizer.state.values())
    assert total > 0
    assert resident_bytes(tmp_path) > 50 * 4096  # whoever looks at them takes memory
    optimizer.release()
    assert resident_bytes(tmp_path) == 0
    assert total == sum(float(s["exp_avg"].abs().sum()) for s in optimizer.state.values())
    optimizer.load_state_dict(optimizer.state_dict())
    assert resident_bytes(tmp_path) == 0
    assert total == sum(float(s["exp_avg"].abs().sum()) for s in optimizer.state.values())


def test_a_checkpoint_gives_the_moments_memory_back(tmp_path: Path, tiny_models: Path) -> None:
    out = tmp_path / "run"
    seen: list[int] = []
    models = {who: {"model": str(tiny_models / who)} for who in ("student", "teacher")}
    optimizer = {"kind": "adamw_on_disk"}
    config = tiny_config(tiny_models, out, **models, optimizer=optimizer, checkpoint_every=1)
    train(config, log=lambda _: None, on_step=lambda _: seen.append(resident_bytes(tmp_path)))
    assert len(seen) > 2
    assert set(seen) == {0}


def test_moments_go_from_memory_to_disk_and_back(tmp_path: Path) -> None:
    weights = some_weights()
    plain = make_optimizer("adamw", weights, 1e-2, (0.9, 0.95), 0.1)
    two_updates(plain, weights)
    mapped = DiskAdamW(weights, tmp_path, lr=1e-2)
    mapped.load_state_dict(plain.state_dict())
    assert resident_bytes(tmp_path) == 0
    for weight in weights:
        for name, value in plain.state[weight].items():
            assert torch.equal(mapped.state[weight][name], value)
    assert resident_bytes(tmp_path) > 0  # they were read from the file


def test_weights_elsewhere_and_a_full_disk_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = [torch.nn.Parameter(torch.empty(3, device="meta"))]
    with pytest.raises(ConfigError, match=r"got some on meta\. Set optimizer.offload = true"):
        DiskAdamW(elsewhere, tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(RunError, match=r"moments do not fit.*No space left.*Free some space"):
        DiskAdamW(some_weights(), tmp_path)


def test_numbers_stay_in_a_file_whose_pages_were_released(tmp_path: Path) -> None:
    file = MappedFile(1 << 20, tmp_path)
    numbers = file.tensor(0, 1 << 18, torch.float32)
    numbers.copy_(torch.arange(1 << 18))
    assert resident_bytes(tmp_path) == 1 << 20
    file.release(4096, 8192)
    assert resident_bytes(tmp_path) == (1 << 20) - 8192
    assert torch.equal(numbers, torch.arange(1 << 18, dtype=torch.float32))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    blocks = [torch.ones(1 << 14) for _ in range(1000)]  # 64 KiB each
    pin = torch.ones(1 << 14)  # lies above them, so the heap cannot shrink by itself
    del blocks[::2]
    before = status_bytes("VmRSS")
    give_back()
    assert before - status_bytes("VmRSS") > 16 << 20
    assert float(pin.sum()) == 1 << 14


def test_a_cpu_offloads_to_the_teachers_own_files(tmp_path: Path, tiny_models: Path) -> None:
    def mode(**changes: Any) -> str:
        teacher = {"model": str(tiny_models / "teacher"), "mode": "offload"} | changes
        return build_components(tiny_config(tiny_models, tmp_path, teacher=teacher)).teacher.mode

    assert mode() == "reload"
    assert mode(mode="resident") == "resident"
    if importlib.util.find_spec("bitsandbytes") is not None:
        assert mode(quantization="8bit") == "offload"  # it would be quantised in every step


# --- what is trained, and how ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"dtype": "bfloat16"}},
        pytest.param(
            {"student": {"lora": LORA, "activation_checkpointing": True}}, marks=needs_peft
        ),
        {"optimizer": {"kind": "adamw_on_disk"}},
        {"optimizer": {"kind": "adamw_on_disk"}, "student": {"dtype": "bfloat16"}},
        pytest.param({"optimizer": {"kind": "adamw_8bit"}}, marks=needs_bitsandbytes),
        {"optimizer": {"kind": "adafactor", "offload": True}, "student": {"dtype": "bfloat16"}},
    ],
    ids=["bfloat16", "lora", "on_disk", "on_disk_bfloat16", "adamw_8bit", "adafactor"],
)
def test_a_continued_run_ends_in_the_same_bits(
    tmp_path: Path, tiny_models: Path, changes: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    optimizer = {"learning_rate": 2e-3} | changes.get("optimizer", {})
    once = run(tiny_models, out, **changes | {"optimizer": optimizer})
    metrics = metrics_of(out)
    assert not are_equal(once, weights_of(tiny_models / "student"))
    shutil.rmtree(out / "checkpoint-000004")
    shutil.rmtree(out / "student")
    assert are_equal(run(tiny_models, out, **changes | {"optimizer": optimizer}), once)
    assert metrics_of(out) == metrics


def test_master_weights_add_up_what_bfloat16_rounds_away() -> None:
    plain = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    mastered = torch.nn.Parameter(plain.detach().clone())
    exact = torch.nn.Parameter(torch.ones(64))
    masters = MasterWeights([mastered, exact])
    assert masters.masters[1] is exact
    optimizers = [torch.optim.SGD([w], lr=1e-3) for w in (plain, masters.masters[0], exact)]
    masters.register_hook(optimizers[1])
    for _ in range(20):
        plain.grad = torch.ones_like(plain)
        exact.grad = torch.ones_like(exact)
        for part in (1.0, 2.0**-9, -(2.0**-9)):  # bfloat16 would lose the small ones
            mastered.grad = torch.full_like(mastered, part)
            masters.accumulate_grads()
            assert mastered.grad is None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(masters.masters[0], exact)
    assert torch.equal(mastered, exact.bfloat16())
    assert mastered[0] < 0.99
    assert plain[0] == 1  # the control: each update alone is below half a unit


def test_checkpointed_activations_leave_rollouts_as_they_are(tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "student"))
    assert is_fast_family(model)
    checkpoint_activations(model)
    assert is_fast_family(model)


def test_activations_computed_twice_give_the_same_gradient(tiny_models: Path) -> None:
    def gradients(is_checkpointed: bool) -> tuple[list[Tensor], int]:
        model = load_model(str(tiny_models / "student"))
        if is_checkpointed:
            checkpoint_activations(model)
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        with learning(model, (0,)):
            model(torch.arange(12)[None] % 20, use_cache=False).logits.square().sum().backward()
        assert not any(module.training for module in model.modules())
        return [p.grad for p in model.parameters() if p.grad is not None], len(calls)

    (plain, once), (found, twice) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@needs_peft
def test_an_adapter_starts_as_nothing_and_is_exported_as_a_plain_model(
    tmp_path: Path, tiny_models: Path
) -> None:
    base = load_model(str(tiny_models / "student"))
    ids = torch.arange(12)[None] % 20
    expected = base(ids).logits
    add_lora(base, 4, 8.0)
    assert torch.equal(base(ids).logits, expected)
    student = {"lora": LORA | {"dropout": 0.0}}
    out = tmp_path / "out"
    merged = run(tiny_models, out, student=student)
    names = sorted(p.name for p in (out / "checkpoint-000004" / "model").iterdir())
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    assert merged.keys() == weights_of(tiny_models / "student").keys()
    config = tiny_config(
        tiny_models, out, student={"model": str(tiny_models / "student")} | student
    )
    trained = build_components(config, str(out / "checkpoint-000004" / "model")).student.model
    exported = load_model(str(out / "student"))
    assert (trained(ids).logits - exported(ids).logits).abs().max() < 1e-4
    assert (exported(ids).logits - expected).abs().max() > 1e-3
    assert not trained.get_output_embeddings().weight.requires_grad


@needs_peft
def test_dropout_is_off_while_the_student_writes_and_is_scored(
    tmp_path: Path, tiny_models: Path
) -> None:
    found = []
    for dropout in (0.0, 0.5):
        out = tmp_path / str(dropout)
        lora = {"rank": 4, "dropout": dropout}
        rule = {"rule": "soft_or", "keep": 0.5}
        run(tiny_models, out, student={"lora": lora}, selection=rule, num_steps=2)
        found.append(metrics_of(out))
    (first, second), (first_dropped, second_dropped) = found
    assert first["reverse_kl_nats"] == first_dropped["reverse_kl_nats"]
    assert first["grad_norm"] != first_dropped["grad_norm"]
    assert second["reverse_kl_nats"] != second_dropped["reverse_kl_nats"]


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher whose widths are multiples of 64, as 4-bit kernels ask."""
    folder = tmp_path_factory.mktemp("wide")
    for seed, who in enumerate(("student", "teacher")):
        save_tiny_model(folder / who, seed, hidden_size=64, intermediate_size=128, head_dim=16)
    return folder


@needs_bitsandbytes
@needs_peft
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_low_bit_weights_teach_and_carry_an_adapter(
    tmp_path: Path, wide_models: Path, bits: str
) -> None:
    model = load_model(str(wide_models / "student"))
    low = load_model(str(wide_models / "student"), quantization=bits)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(
        bits == "8bit"
    )
    exact, found = (m.model.layers[0].mlp.up_proj(x) for m in (model, low))
    bound = 0.02 if bits == "8bit" else 0.2
    assert 0 < (found - exact).norm() / exact.norm() < bound
    if bits == "8bit":  # an adapter learns through it
        (g_exact,), (g_found,) = (torch.autograd.grad(y.sum(), x) for y in (exact, found))
        assert 0 < (g_found - g_exact).norm() / g_exact.norm() < bound
    assert low.get_memory_footprint() < model.get_memory_footprint()
    student = {"quantization": bits if bits == "8bit" else "none", "lora": {"rank": 2}}
    teacher = {"quantization": bits, "mode": "offload"}
    out = tmp_path / "out"
    trained = run(wide_models, out, student=student, teacher=teacher, num_steps=2)
    start = weights_of(wide_models / "student")
    assert trained.keys() == start.keys()
    assert not are_equal(trained, start)


@needs_bitsandbytes
@needs_peft
def test_learning_through_4_bits_is_refused_on_a_cpu(tmp_path: Path, tiny_models: Path) -> None:
    # bitsandbytes packs the weights there for a kernel that has no gradient
    student = {"model": str(tiny_models / "student"), "quantization": "4bit", "lora": {}}
    with pytest.raises(ConfigError, match="needs CUDA"):
        build_components(tiny_config(tiny_models, tmp_path, student=student))


# --- what cannot be had ---------------------------------------------------------------------------


def test_what_is_missing_is_one_line(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if importlib.util.find_spec("bitsandbytes") is not None:
        with pytest.raises(ConfigError, match="Use adamw_8bit"):
            make_optimizer("paged_adamw_8bit", weights, 1e-3, (0.9, 0.95), 0.0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="extra 'lowbit'"):
        make_optimizer("adamw_8bit", weights, 1e-3, (0.9, 0.95), 0.0)
    with pytest.raises(MissingExtraError, match="extra 'lowbit'"):
        load_model(str(tiny_models / "student"), quantization="4bit")
    with pytest.raises(MissingExtraError, match="extra 'lora'"):
        add_lora(torch.nn.Linear(2, 2), 2, 4.0)  # type: ignore[arg-type]


def test_settings_that_exclude_each_other_are_one_line(tmp_path: Path, tiny_models: Path) -> None:
    student = {"model": "x", "quantization": "4bit"}
    with pytest.raises(ConfigError, match=r"student.quantization must be none, got '?4bit"):
        tiny_config(tiny_models, tmp_path, student=student)
    lora = {"model": "x", "lora": {"rnk": 3}}
    with pytest.raises(ConfigError, match=r"unknown key 'student.lora.rnk'. Did you mean 'rank'"):
        tiny_config(tiny_models, tmp_path, student=lora)


@needs_peft
def test_an_adapter_needs_layers_that_exist(tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "student"))
    with pytest.raises(ConfigError, match=r"student.lora cannot be added.*nosuch"):
        add_lora(model, 2, 4.0, target_modules=["nosuch"])
