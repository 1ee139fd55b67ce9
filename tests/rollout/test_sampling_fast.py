"""The hand-written step against the model's own forward pass, and the recorded hidden states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sampling import sample, sample_rollouts
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ModelError
from tutelage.models.llama_cpu.decode import FastSlots
from tutelage.rollout.request import earlier_samples
from tutelage.rollout.sample_token import sample_token
from tutelage.rollout.slots import PlainSlots, open_slots

RAGGED = [Prompt(f"p{i}", "abc defghij klm"[: 1 + 3 * i]) for i in range(5)]
WRITING = SamplingConfig(temperature=1.5, max_new_tokens=24, num_samples=3)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}
FAST: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": None, "num_key_value_heads": 4},
    "qwen2": {"num_key_value_heads": 1, "rope_parameters": YARN_ROPE},
    "qwen3": {},
}
PLAIN: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 6},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
}


def make(family: str, vocab_size: int, dtype: torch.dtype, **options: Any) -> Any:
    """A random model of 2 layers and width 32 whose tokens differ in probability."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    config = CONFIG_MAPPING[family](
        vocab_size=vocab_size,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
        **(options if family == "gpt2" else sizes | options),
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # norms and biases of their own, so that a forgotten one is seen
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = [2, 5, 9, 11]
    return model


def rows_of(model: Any, is_fast: bool = True) -> FastSlots | PlainSlots:
    rows = open_slots(model, (1, 7, 8), 0, 4, 48, is_fast)
    assert isinstance(rows, FastSlots | PlainSlots)
    return rows


def outcome(rollouts: list[Rollout]) -> list[tuple[tuple[int, ...], bool]]:
    return [(r.completion_ids, r.is_truncated) for r in rollouts]


def fresh_hidden(model: Any, rollout: Rollout) -> torch.Tensor:
    """Hidden states of one plain forward pass without cache or padding."""
    sequence = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    with torch.no_grad():
        hidden: torch.Tensor = model.base_model(input_ids=sequence, use_cache=False)[0][0]
    return hidden[len(rollout.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_fast_rows_draw_what_the_model_draws(family: str, batch_size: int, tokenizer: Any) -> None:
    model = make(family, len(tokenizer), torch.float32, **FAST[family])
    assert isinstance(rows_of(model), FastSlots)
    fast, plain = (
        sample_rollouts(model, tokenizer, RAGGED, WRITING, (1,), batch_size, is_fast=is_fast)
        for is_fast in (True, False)
    )
    assert outcome(fast) == outcome(plain)
    lengths = {len(r.completion_ids) for r in fast}
    assert len(lengths) > 3  # completions left at different times
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_layers_too_large_to_be_joined_draw_the_same(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("qwen2", len(tokenizer), torch.float64)
    joined = sample_rollouts(model, tokenizer, RAGGED, WRITING, (1,), 4)
    monkeypatch.setattr("tutelage.models.llama_cpu.layers._SMALL_BYTES", 0)
    apart = sample_rollouts(model, tokenizer, RAGGED, WRITING, (1,), 4)
    assert outcome(apart) == outcome(joined)


@pytest.mark.parametrize(("ahead", "num_reads"), [(0, 3), (1024, 1)])
def test_every_prompt_is_read_once(
    ahead: int, num_reads: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("qwen3", len(tokenizer), torch.float64)
    expected = sample_rollouts(model, tokenizer, RAGGED, WRITING, (1,), 64)
    read: list[list[Any]] = []
    original = FastSlots._prefill_batch

    def counting(rows: FastSlots, prompts: list[Any]) -> Any:
        read.append(prompts)
        return original(rows, prompts)

    monkeypatch.setattr(FastSlots, "_prefill_batch", counting)
    monkeypatch.setattr("tutelage.models.llama_cpu.decode._PREFILL_AHEAD", ahead)
    drawn = sample_rollouts(model, tokenizer, RAGGED, WRITING, (1,), 8)
    assert outcome(drawn) == outcome(expected)
    prompts = [ids for each in read for ids in each]
    assert len(prompts) == len(set(prompts)) == len(RAGGED)
    assert len(read) == num_reads


POOL = [Prompt(f"p{i}", text) for i, text in enumerate(("ab", "cd", "efgh", "ijkl", "mnopqrstuv"))]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompts=st.lists(st.sampled_from(POOL), min_size=1, max_size=9), batch_size=st.integers(1, 9)
)
def test_any_prompts_in_any_order_and_batch_are_read_once_and_drawn_alike(
    prompts: list[Prompt], batch_size: int, qwen3: Any, tokenizer: Any
) -> None:
    config = SamplingConfig(temperature=1.5, max_new_tokens=6)
    read: list[Any] = []
    original = FastSlots._prefill_batch

    def counting(rows: FastSlots, distinct: list[Any]) -> Any:
        read.extend(distinct)
        return original(rows, distinct)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastSlots, "_prefill_batch", counting)
        fast = sample_rollouts(qwen3, tokenizer, prompts, config, (1,), batch_size)
    plain = sample_rollouts(qwen3, tokenizer, prompts, config, (1,), batch_size, is_fast=False)
    assert outcome(fast) == outcome(plain)
    assert len(read) == len(set(read)) == len(set(prompts))


@torch.no_grad()
def test_what_was_read_ahead_may_wait(tokenizer: Any) -> None:
    model = make("qwen3", len(tokenizer), torch.float64)
    rows, apart = rows_of(model), rows_of(model)
    assert isinstance(rows, FastSlots)
    early, late = (1, 7, 8), (1, 9)
    rows.prefill([0], [early], [late])
    rows.prefill([1], [(1, 4)], [late])
    assert [ids for done in rows.prefills for ids in done.prompts] == [late]
    rows.prefill([2, 3], [late, early])
    apart.prefill(range(4), [early, (1, 4), late, early])
    torch.testing.assert_close(rows.hidden, apart.hidden)


@torch.no_grad()
def test_a_row_that_has_ended_waits_beyond_the_longest_completion(tokenizer: Any) -> None:
    """Others start late beside a row at the end of its cache, which must not leave it."""
    rows = rows_of(make("qwen3", len(tokenizer), torch.float64))
    prompts = [(1, 7, 8), (1, 9), (1, 6, 5, 4), (1, 7)]
    rows.prefill(range(4), prompts)
    token = torch.tensor([3, 4, 5, 6])
    for _ in range(44):  # to the end of what 48 columns hold
        rows.decode_step(token)
    rows.prefill([1], [(1, 9)])
    expected = rows_of(make("qwen3", len(tokenizer), torch.float64), is_fast=False)
    expected.prefill([0], [(1, 9)])
    for _ in range(20):
        assert torch.allclose(rows.hidden[1], expected.hidden[0], atol=1e-6)
        rows.decode_step(token)
        expected.decode_step(token[1:2])


@pytest.mark.parametrize("change", ["a bias less", "a layer of another kind"])
def test_layers_that_do_not_fit_together_are_called_one_by_one(change: str, tokenizer: Any) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = make("qwen2", len(tokenizer), torch.float64)
    layer = model.base_model.layers[0]
    if change == "a bias less":
        layer.self_attn.k_proj.bias = None
    else:
        layer.mlp.up_proj.__class__ = layer.mlp.down_proj.__class__ = Doubled
    assert isinstance(rows_of(model), FastSlots)
    check_hidden(
        model, sample_rollouts(model, tokenizer, RAGGED, WRITING, (1,), record_hidden=True), 1e-6
    )


@pytest.mark.parametrize("family", PLAIN)
def test_other_models_take_their_own_forward_pass(family: str, tokenizer: Any) -> None:
    model = make(family, len(tokenizer), torch.float32, **PLAIN[family])
    assert isinstance(rows_of(model), PlainSlots)
    drawn = sample_rollouts(model, tokenizer, RAGGED, WRITING, (1,), 4, record_hidden=True)
    check_hidden(model, drawn, 1e-4)


@pytest.mark.parametrize(
    "rope", [LONG_ROPE, {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}]
)
def test_other_rotary_embeddings_are_left_to_the_model(rope: Any, tokenizer: Any) -> None:
    assert isinstance(rows_of(make("llama", len(tokenizer), torch.float32)), FastSlots)
    model = make("llama", len(tokenizer), torch.float32, rope_parameters=rope)
    assert isinstance(rows_of(model), PlainSlots)


def test_a_trial_on_one_repeated_token_still_sees_a_wrong_step(tokenizer: Any) -> None:
    model = make("qwen3", len(tokenizer), torch.float32)
    assert FastSlots(model, 0, 2, 8).matches_model((7,))
    model.base_model.layers[1].self_attn.scaling *= 2
    assert not FastSlots(model, 0, 2, 8).matches_model((7, 7))


def test_numbers_gone_wrong_are_not_trusted(tokenizer: Any) -> None:
    model = make("qwen3", len(tokenizer), torch.float32)
    with torch.no_grad():
        model.base_model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    assert isinstance(rows_of(model), PlainSlots)


def test_numbers_gone_wrong_are_placed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN comes with the embedding of a token that was drawn, in the second segment or later."""
    monkeypatch.setattr("tutelage.rollout.generate._SEGMENT", 4)
    model = make("qwen3", len(tokenizer), torch.float64)
    model.generation_config.eos_token_id = [2]
    config = SamplingConfig(temperature=1.5, max_new_tokens=40)
    (rollout,) = sample(model, tokenizer, RAGGED[:1], config, (0,))
    fine, early = rollout.completion_ids, {0, 1, 2, *rollout.prompt_ids}
    place = next(i for i, t in enumerate(fine) if i > 4 and t not in early | {*fine[:i]})
    with torch.no_grad():
        model.get_input_embeddings().weight[fine[place]] = torch.nan
    with pytest.raises(ModelError, match=f"got them at token {place + 1}"):
        sample(model, tokenizer, RAGGED[:1], config, (0,))


@pytest.mark.parametrize("is_fast", [True, False])
def test_what_comes_after_the_end_harms_nobody(is_fast: bool, tokenizer: Any) -> None:
    """A stop token whose embedding overflows is read only by the row that it ended."""
    model = make("llama", len(tokenizer), torch.float32)
    prompts = [Prompt(f"p{i}", "a" if i % 2 else "ba") for i in range(12)]
    config = SamplingConfig(max_new_tokens=20, num_samples=3)
    first = sample_rollouts(model, tokenizer, prompts, config, (1,), 16)
    read = {token for rollout in first for token in rollout.prompt_ids}
    stops = [token for token in range(9, len(tokenizer)) if token not in read][::2]
    model.generation_config.eos_token_id = stops
    with torch.no_grad():
        model.get_input_embeddings().weight[stops] = torch.nan
    assert isinstance(rows_of(model), FastSlots)
    drawn = sample_rollouts(model, tokenizer, prompts, config, (1,), 16, is_fast=is_fast)
    assert {len(rollout.completion_ids) for rollout in drawn} > {1}


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_right_step_is_trusted(family: str, dtype: torch.dtype, tokenizer: Any) -> None:
    assert isinstance(rows_of(make(family, len(tokenizer), dtype, **FAST[family])), FastSlots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["position", "scale", "sign", "norm", "order"])
def test_a_wrong_step_is_seen(fault: str, dtype: torch.dtype, tokenizer: Any) -> None:
    rows = FastSlots(make("qwen3", len(tokenizer), dtype), 0, 2, 8)
    first = rows.layers[0]
    match fault:
        case "position":  # every new token would sit one place too far to the right
            rows.turn = rows.turn.roll(-1, 0)
        case "scale":
            rows.scale *= 2
        case "sign":
            rows.turn = rows.turn.conj().resolve_conj()
        case "norm":
            rows.layers[0] = first._replace(qk_norm=None)
        case "order":
            rows.layers.reverse()
    assert not rows.matches_model((1, 7, 8))


def test_a_variant_of_a_family_falls_back(tokenizer: Any) -> None:
    model = make("qwen3", len(tokenizer), torch.float32)
    model.base_model.layers[1].self_attn.scaling *= 2  # the step by hand has one scale
    assert isinstance(rows_of(model), PlainSlots)
    drawn = sample_rollouts(model, tokenizer, RAGGED, WRITING, (1,), record_hidden=True)
    check_hidden(model, drawn, 1e-5)


def test_adapters_take_part(tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    model = make("qwen3", len(tokenizer), torch.float32)
    bare = sample_rollouts(model, tokenizer, RAGGED, WRITING, (1,))
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert isinstance(rows_of(model.eval()), FastSlots)
    adapted = sample_rollouts(model, tokenizer, RAGGED, WRITING, (1,), record_hidden=True)
    check_hidden(model, adapted, 1e-5)
    assert outcome(adapted) != outcome(bare)


def test_hooks_are_not_passed_by(tokenizer: Any) -> None:
    model = make("qwen3", len(tokenizer), torch.float32)
    calls: list[int] = []
    handle = model.base_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    sample(model, tokenizer, RAGGED[:1], SamplingConfig(max_new_tokens=1), (0,))  # and a trial
    calls.clear()
    (rollout,) = sample(model, tokenizer, RAGGED[:1], SamplingConfig(max_new_tokens=9), (0,))
    assert len(calls) == len(rollout.completion_ids)
    handle.remove()
    assert isinstance(rows_of(model), FastSlots)
    handle = model.base_model.layers[1].register_forward_pre_hook(lambda *_: None)
    assert isinstance(rows_of(model), PlainSlots)
    handle.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(rows_of(model), PlainSlots)


# --- recorded hidden states -----------------------------------------------------------------------


def check_hidden(model: Any, drawn: list[Rollout], tolerance: float) -> None:
    """Recorded states and their entropies are those of a fresh pass, relative to their size."""
    weight = model.get_output_embeddings().weight
    for rollout in drawn:
        expected, hidden = fresh_hidden(model, rollout), rollout.hidden
        assert hidden is not None
        assert (hidden.dtype, hidden.shape) == (expected.dtype, expected.shape)
        assert (hidden - expected).abs().max() <= tolerance * expected.abs().max()
        ours, theirs = (entropies(x @ weight.t()) for x in (hidden, expected))
        torch.testing.assert_close(ours, theirs, atol=20 * tolerance, rtol=0)


def entropies(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("family", FAST)
def test_recorded_states_are_those_of_a_fresh_pass(
    family: str, dtype: torch.dtype, tolerance: float, is_fast: bool, tokenizer: Any
) -> None:
    model = make(family, len(tokenizer), dtype, **FAST[family])
    drawn = sample_rollouts(
        model, tokenizer, RAGGED, WRITING, (2,), 4, record_hidden=True, is_fast=is_fast
    )
    check_hidden(model, drawn, tolerance)
    moved = [replace(r, hidden=r.hidden.roll(1, 0)) for r in drawn if r.hidden is not None]
    assert len(moved) == len(drawn)
    with pytest.raises(AssertionError):  # a state of the wrong position would be seen
        check_hidden(model, moved, tolerance)


def test_nothing_is_recorded_unasked(qwen3: Any, tokenizer: Any) -> None:
    sampled = sample_rollouts(qwen3, tokenizer, RAGGED, WRITING, (0,))
    assert all(rollout.hidden is None for rollout in sampled)


# --- several processes ----------------------------------------------------------------------------


def test_processes_draw_together_what_one_draws(qwen3: Any, tokenizer: Any) -> None:
    prompts = [RAGGED[0], RAGGED[1], RAGGED[0], RAGGED[0]]
    config = SamplingConfig(max_new_tokens=12, num_samples=2)
    whole = outcome(sample(qwen3, tokenizer, prompts, config, (3,)))
    first = earlier_samples(prompts, 2)
    assert first == [0, 0, 2, 4]
    halves = [
        outcome(sample(qwen3, tokenizer, prompts[h], config, (3,), first_sample=first[h]))
        for h in (slice(0, 2), slice(2, 4))
    ]
    assert halves[0] + halves[1] == whole
    assert len(set(whole[:2] + whole[4:])) == 6  # a prompt that comes again draws other samples
    apart = outcome(sample(qwen3, tokenizer, prompts[2:], config, (3,)))
    assert apart == whole[:2] + whole[4:6]  # without the offset they would be drawn twice


# --- a large vocabulary ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_ids", [1023, 1025, 1280, 5000])
def test_blocks_draw_what_one_long_sum_draws(num_ids: int) -> None:
    generator = torch.Generator().manual_seed(num_ids)
    logits = 4 * torch.randn(300, num_ids, generator=generator, dtype=torch.float64)
    logits[:, torch.rand(num_ids, generator=generator) < 0.7] = -torch.inf
    uniform = torch.rand(300, generator=generator, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    cumulative = logits.softmax(-1).cumsum(-1)
    expected = (cumulative <= (uniform * cumulative[:, -1])[:, None]).sum(-1)
    token, logprob = sample_token(logits, uniform, SamplingConfig())
    assert (token == expected).sum() >= 299  # the last bit may decide at an edge
    assert logits.gather(1, token[:, None]).isfinite().all()
    torch.testing.assert_close(logprob, logits.log_softmax(-1).gather(1, token[:, None])[:, 0])


def test_the_ends_of_blocks_draw_possible_tokens() -> None:
    """A number just below a block's end, which two ways of adding up place differently."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 16, 256, generator=generator, dtype=torch.float64)
    logits[..., 200:] = -torch.inf
    edge = logits.flatten(1).softmax(-1).view(400, 16, 256).sum(-1).cumsum(-1)
    below = torch.nextafter(edge[:, 7] / edge[:, -1], torch.zeros(400, dtype=torch.float64))
    token, _ = sample_token(logits.flatten(1), below, SamplingConfig())
    assert logits.flatten(1).gather(1, token[:, None]).isfinite().all()
    assert (token // 256).unique().tolist() == [7]


def test_numbers_gone_wrong_are_reported_in_a_large_vocabulary() -> None:
    logits = torch.zeros(3, 1025)
    logits[1, 7], logits[2] = torch.nan, -torch.inf
    token, logprob = sample_token(
        logits, torch.full((3,), 0.99, dtype=torch.float64), SamplingConfig()
    )
    assert token[0] == 1014
    assert logprob.isfinite().tolist() == [True, False, False]
