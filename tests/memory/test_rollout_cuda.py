"""Memory of draws by shapes, against slots that are there."""

from __future__ import annotations

import torch

from eager import cpu_device, make_model
from tutelage.memory.meta_model import Live, shadow
from tutelage.memory.rollout_cuda import rollout_memory
from tutelage.rollout.cuda.extend import Following
from tutelage.rollout.cuda.kv_slots import KVSlots


def test_slots_are_planned_by_their_shape() -> None:
    model = make_model("qwen3")
    real = KVSlots(model, cpu_device(), 5, 20)
    twin = shadow(model)
    planned = rollout_memory(twin, 5, 4, (10, 10))
    assert planned.cache == real.cache.nbytes == 2 * 2 * 5 * 2 * 256 * 32 * 4
    rows = sum(x.nbytes for x in vars(real.rows).values())
    work = [
        sum(x.nbytes for x in vars(real.work(n, real.num_splits(n, 20), 40)).values())
        for n in (2, 4, 8)
    ]
    assert rows + sum(work) <= planned.step <= 1.1 * (rows + sum(work))


def test_a_model_without_a_captured_step_keeps_a_token_in_each_place() -> None:
    twin = shadow(make_model("qwen3", head_dim=24))
    planned = rollout_memory(twin, 5, 4, (10, 10))
    assert 5 * 20 * 2 * 2 * 2 * 24 * 4 <= planned.cache <= 1.5 * 5 * 20 * 2 * 2 * 2 * 24 * 4


def test_prompts_that_are_read_in_portions_hold_two_of_them() -> None:
    twin = shadow(make_model("qwen3", max_position_embeddings=9000))
    one, two = (rollout_memory(twin, 2, n, (9000, 10)).prefill for n in (1, 2))
    assert one < two < 2 * one


@torch.no_grad()
def test_a_pass_over_insertions_is_planned_by_its_shape() -> None:
    model = make_model("qwen3", num_hidden_layers=1)
    slots = KVSlots(model, cpu_device(), 4, 1000)
    slots.cache.zero_()
    following = [Following(slot, 800, (3,) * 200) for slot in range(4)]
    held = [*model.parameters(), *model.buffers(), slots.cache, *vars(slots.rows).values()]
    with Live(held) as live:
        slots.extend(model, following, 0)
    twin = shadow(model)
    single, planned = (rollout_memory(twin, 4, 1, (2, 998), n).prefill for n in (0, 199))
    assert single < live.peak / 10
    assert live.peak <= planned < 1.5 * live.peak  # a CPU needs no copy of the mask
