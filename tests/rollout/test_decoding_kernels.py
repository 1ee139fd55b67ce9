"""Every kernel under Triton's interpreter against the same operation in torch."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from counting import Launches
from eager import cpu_device, make_model

pytest.importorskip("triton")

from tutelage.config.sampling import SamplingConfig
from tutelage.models.lora import add_lora
from tutelage.rollout.cuda import kernels, sample_kernels
from tutelage.rollout.cuda.blocks import num_splits, num_vocab_blocks
from tutelage.rollout.cuda.kv_slots import KVSlots, make_token_sampling
from tutelage.rollout.cuda.operators import Heads, TorchOperators
from tutelage.rollout.cuda.state import Rows, Sizes, Work, make_rows, make_work
from tutelage.rollout.cuda.triton_operators import TritonOperators

# Minus infinity minus itself is computed, and then masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

SIZES = Sizes(2, 6, 2, 32, 48, 40, 5000, torch.float32, torch.device("cpu"))
CAPACITY = 160


def scene(dtype: torch.dtype = torch.float32, splits: int = 1) -> tuple[Rows, Work, Tensor]:
    """Four rows in the middle of their completions, one of them done; NaN where nothing is."""
    torch.manual_seed(3)
    sizes = Sizes(*[dtype if x is torch.float32 else x for x in SIZES.__dict__.values()])
    rows = make_rows(sizes, 4, 8)
    work = make_work(sizes, 4, num_vocab_blocks(4500), splits)
    rows.slot.copy_(torch.tensor([2, 0, 3, 1]))
    rows.position.copy_(torch.tensor([0, 5, 159, 71]))
    rows.done.copy_(torch.tensor([0, 0, 0, 1]))
    rows.column.copy_(torch.tensor([3, 0, 7, 2]))
    rows.token.copy_(torch.tensor([5, 0, 49, 7]))
    rows.uniform.uniform_()
    for tensor in (rows.hidden, work.x, work.y, work.qkv, work.gate_up, work.logits):
        tensor.normal_()
    cache = torch.randn(2, 4, 2, CAPACITY, 32).to(dtype)
    for slot, position in zip(rows.slot.tolist(), rows.position.tolist(), strict=True):
        cache[:, slot, :, position:] = torch.nan
    return rows, work, cache


def both(
    run: Callable[[Any, Rows, Work, Tensor], None], **options: Any
) -> list[tuple[str, Tensor, Tensor]]:
    """Everything that an operation changed, with the kernels' value and torch's."""
    pairs = []
    scenes = [scene(**options) for _ in range(2)]
    before = scene(**options)
    for operators, each in zip((TritonOperators(), TorchOperators()), scenes, strict=True):
        run(operators, *each)
    for part in range(2):
        for field in fields(before[part]):  # type: ignore[arg-type]
            values = [each[part].__dict__[field.name] for each in (*scenes, before)]
            pairs.append((field.name, values[0], values[1]))
    pairs.append(("cache", scenes[0][2], scenes[1][2]))
    return pairs


def check(pairs: list[tuple[str, Tensor, Tensor]], *names: str, tolerance: float = 1e-5) -> None:
    """What the operation has to write, and all that the two must agree on."""
    for name, ours, expected in pairs:
        if name in names:
            assert not torch.equal(expected, torch.zeros_like(expected))
            torch.testing.assert_close(
                ours, expected, rtol=tolerance, atol=tolerance, equal_nan=name == "cache"
            )


def test_embedding_and_norms() -> None:
    torch.manual_seed(5)
    table, weight = torch.randn(50, 48), torch.randn(48)
    pairs = both(lambda o, rows, work, _: o.embed_norm(rows, work, table, weight, 1e-6))
    check(pairs, "x", "normed", "states", "column", "position")
    pairs = both(lambda o, rows, work, _: o.add_norm(rows, work, weight, 1e-6))
    check(pairs, "x", "normed", "position")
    pairs = both(lambda o, rows, work, _: o.end_step(rows, work, weight, 1e-6, CAPACITY - 1))
    check(pairs, "hidden", "position", "column")


def test_norms_in_bfloat16() -> None:
    torch.manual_seed(5)
    weight = torch.randn(48).bfloat16()
    pairs = both(
        lambda o, rows, work, _: o.add_norm(rows, work, weight, 1e-6), dtype=torch.bfloat16
    )
    check(pairs, "x", "normed", tolerance=2e-2)  # the interpreter cuts off where a GPU rounds


def test_swiglu() -> None:
    check(both(lambda o, rows, work, _: o.swiglu(work)), "opened")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("is_normed", [False, True])
def test_attention(splits: int, window: int, is_normed: bool) -> None:
    torch.manual_seed(5)
    weights = (torch.randn(32), torch.randn(32)) if is_normed else (None, None)
    heads = Heads(6, 2, 32, 0.2, window, *weights, 1e-6)
    angles = torch.randn(CAPACITY, 16)
    turn = (angles.cos(), angles.sin())

    def run(operators: Any, rows: Rows, work: Work, cache: Tensor) -> None:
        operators.attend(rows, work, heads, (cache[0], cache[1]), turn)

    pairs = {name: (a, b) for name, a, b in both(run, splits=splits)}
    ours, expected = pairs["mixed"]
    torch.testing.assert_close(ours[:3], expected[:3], rtol=1e-5, atol=1e-5)
    assert ours[3].isfinite().all()
    check([("cache", *pairs["cache"])], "cache")


def test_attention_in_half_precision() -> None:
    torch.manual_seed(5)
    heads = Heads(6, 2, 32, 0.2, 0, None, None, 0.0)
    angles = torch.randn(CAPACITY, 16)
    turn = (angles.cos(), angles.sin())
    pairs = both(
        lambda o, rows, work, cache: o.attend(rows, work, heads, (cache[0], cache[1]), turn),
        dtype=torch.float16,  # the interpreter multiplies no bfloat16
    )
    ours, expected = next((a, b) for name, a, b in pairs if name == "mixed")
    torch.testing.assert_close(ours[:3], expected[:3], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.3),
        SamplingConfig(temperature=0.0),
        SamplingConfig(0.9, top_p=0.4),
        SamplingConfig(0.6, 0.95, 20),
    ],
)
def test_picks(config: SamplingConfig) -> None:
    sampling = make_token_sampling(config, 4500, [3, 17, 2], torch.device("cpu"))

    def run(operators: Any, rows: Rows, work: Work, cache: Tensor) -> None:
        work.logits[:, 4500:] = 50.0  # padding rows of the head
        work.logits[1] = work.logits[1].round()  # many ties
        work.logits[2, 100:] = -torch.inf
        work.logits[3, :] = -60.0
        work.logits[3, 17] = 60.0  # a stop token, for sure
        operators.sample(rows, work, sampling)

    pairs = both(run)
    check(pairs, "token", "tokens", "logprobs", "done")


@pytest.mark.parametrize(
    ("config", "value"),
    [
        (SamplingConfig(), torch.nan),
        (SamplingConfig(), torch.inf),
        (SamplingConfig(0.0), torch.nan),
        (SamplingConfig(0.7, 1.0, 5), torch.nan),
    ],
)
def test_logits_that_are_not_numbers_give_a_logprob_that_is_none(
    config: SamplingConfig, value: float
) -> None:
    rows, work, _ = scene()
    work.logits[0, 2100] = value
    sampling = make_token_sampling(config, 4500, [3], torch.device("cpu"))
    TritonOperators().sample(rows, work, sampling)
    written = rows.logprobs.gather(1, rows.column.long()[:, None])[:, 0]
    assert written.isfinite().tolist() == [False, True, True, True]
    assert 0 <= rows.token[0] < 4500


def test_ends_of_the_interval_stay_inside_the_vocabulary() -> None:
    rows, work, _ = scene()
    work.logits[:, :2] = work.logits[:, 4490:] = -torch.inf
    for uniform, token in ((0.0, 2), (1.0 - 2.0**-53, 4489)):
        rows.uniform.fill_(uniform)
        sampling = make_token_sampling(SamplingConfig(), 4500, [3], torch.device("cpu"))
        TritonOperators().sample(rows, work, sampling)
        assert rows.token.tolist() == [token] * 4


def launches(monkeypatch: pytest.MonkeyPatch, config: SamplingConfig, splits: int = 1,
             rank: int = 0, **options: Any) -> tuple[int, Counter[str]]:  # fmt: skip
    """Kernels of one decoding step, and the operators of torch that are more of them."""
    monkeypatch.setattr(TritonOperators, "_start", count_only)
    operators, model = TritonOperators(), make_model(**options)
    if rank:
        add_lora(model, rank, 2.0 * rank)
    slots = KVSlots(model, cpu_device(operators), 8, 40)
    rows, work = slots.rows, make_work(slots.sizes, 8, 1, splits)
    sampling = make_token_sampling(config, 33, [2], torch.device("cpu"))
    with torch.no_grad(), Launches() as seen:
        slots.step(rows, work, slots.cache, slots.turn, sampling)
    return operators.launches, seen.found


FILTERED = SamplingConfig(0.7, 0.9, 5)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"family": "qwen3", "tie_word_embeddings": True},
        {"family": "llama"},
        {"family": "mistral", "sliding_window": 6},
    ],
)
@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(0.0), FILTERED])
def test_a_step_is_eight_launches_a_layer_and_four_more(
    monkeypatch: pytest.MonkeyPatch,
    layers: int,
    options: dict[str, Any],
    config: SamplingConfig,
) -> None:
    """Four kernels and four products a layer; logits, two that pick, and the last norm."""
    kernels_, operators = launches(monkeypatch, config, num_hidden_layers=layers, **options)
    assert kernels_ == 4 * layers + 3
    assert operators == {"mm": 4 * layers + 1}


def test_biases_cost_no_launch_and_split_caches_one_a_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"family": "qwen2", "num_key_value_heads": 1, "hidden_size": 128}
    kernels_, operators = launches(monkeypatch, SamplingConfig(), splits=3, **options)
    assert kernels_ == 2 * 5 + 3
    assert operators == {"addmm": 2, "mm": 2 * 3 + 1}


def test_an_adapter_is_three_launches_for_each_layer_that_it_adapts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("peft")
    kernels_, operators = launches(monkeypatch, SamplingConfig(), rank=2, family="qwen3")
    assert kernels_ == 2 * 4 + 3
    assert operators == {"mm": 2 * (4 + 2 * 7) + 1, "add_": 2 * 7}


NUMBERS = {"token", "slot", "position", "done", "column"}
"""What a kernel reads of its row as one number, with all of its warps."""


def numbers(source: str) -> tuple[set[str], set[str]]:
    """Numbers of a row that a kernel loads and those that it stores."""
    loaded: set[str] = set()
    stored: set[str] = set()
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("tl.load", "tl.store"):
            into = loaded if ast.unparse(call.func) == "tl.load" else stored
            names = ast.walk(call.args[0])
            into |= {name.id for name in names if isinstance(name, ast.Name)} & NUMBERS
    return loaded, stored


def test_no_kernel_stores_a_number_that_another_of_its_warps_may_still_load() -> None:
    for name in ("embed_norm", "attend"):
        loaded, stored = numbers(inspect.getsource(kernels.__dict__[name].fn))
        assert loaded
        assert not stored
    for kernel in (sample_kernels.sample, sample_kernels.sample_filtered):
        assert "column" not in numbers(inspect.getsource(kernel.fn))[1]
    assert "column" not in numbers(inspect.getsource(sample_kernels._note.fn))[1]


def test_what_ends_a_step_stores_what_nothing_else_in_it_depends_on() -> None:
    loaded, stored = numbers(inspect.getsource(kernels.add_norm.fn))
    assert (loaded, stored) == ({"position", "done", "column"}, {"position", "column"})


def count_only(self: TritonOperators, *args: Any, **options: Any) -> None:
    self.launches += 1


def test_splits_fill_the_device_and_bound_what_one_program_reads() -> None:
    assert num_splits(64, 8, 512, 132) == 1
    assert num_splits(8, 8, 512, 132) == 5
    assert num_splits(64, 8, 8192, 132) == 4
    assert num_splits(1, 1, 256, 132) == 4
