"""Sampling against exact probabilities, transformers' own decoding and fresh forward passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from sampling import sample
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError, ModelError
from tutelage.rollout.sample_token import filter_probs, sample_token, uniforms

RAGGED = [Prompt(f"p{i}", "abc defghij klm"[: 1 + 3 * i]) for i in range(5)]


@pytest.fixture(params=["qwen3", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def tokens(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.completion_ids for rollout in rollouts]


def fresh_log_p(model: Any, rollout: Rollout, temperature: float) -> torch.Tensor:
    """Log-probabilities from one plain forward pass without cache or padding."""
    sequence = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    with torch.no_grad():
        logits = model(input_ids=sequence, use_cache=False).logits[0]
    log_p = (logits / temperature).log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
    return log_p.gather(1, torch.tensor(rollout.completion_ids)[:, None]).squeeze(1)


def test_greedy_equals_generate(model: Any, tokenizer: Any) -> None:
    config = SamplingConfig(temperature=0.0, max_new_tokens=12)
    ours = sample(model, tokenizer, RAGGED, config, seed=(0,), batch_size=3)
    for prompt, rollout in zip(RAGGED, ours, strict=True):
        start = torch.tensor([tokenizer(prompt.content).input_ids])
        theirs = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=12
        )
        assert list(rollout.completion_ids) == theirs[0, start.shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_equal_a_fresh_forward_pass(
    model: Any, tokenizer: Any, temperature: float
) -> None:
    config = SamplingConfig(temperature, top_p=0.8, max_new_tokens=10, num_samples=2)
    for rollout in sample(model, tokenizer, RAGGED, config, seed=(3,)):
        expected = fresh_log_p(model, rollout, temperature)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0)


def test_greedy_logprobs_are_those_of_temperature_one(qwen3: Any, tokenizer: Any) -> None:
    config = SamplingConfig(temperature=0.0, max_new_tokens=5)
    (rollout,) = sample(qwen3, tokenizer, RAGGED[:1], config, seed=(0,))
    expected = fresh_log_p(qwen3, rollout, 1.0)
    torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0)


def test_first_token_frequencies_match_the_model(qwen3: Any, tokenizer: Any) -> None:
    config = SamplingConfig(max_new_tokens=1, num_samples=4000)
    rollouts = sample(qwen3, tokenizer, RAGGED[1:2], config, seed=(1,), batch_size=1000)
    with torch.no_grad():
        start = torch.tensor([rollouts[0].prompt_ids])
        probs = qwen3(start).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(
        torch.tensor([ids[0] for ids in tokens(rollouts)]), minlength=len(probs)
    )
    rare = probs * 4000 < 20
    seen = torch.stack([*counts[~rare], counts[rare].sum()]).double().numpy()
    expected = torch.stack([*probs[~rare], probs[rare].sum()]).numpy() * 4000
    assert rare.any()
    assert chisquare(seen, expected).pvalue > 1e-4
    assert chisquare(seen, expected[::-1]).pvalue < 1e-9  # the test can tell another model


def test_tokens_do_not_depend_on_batch_or_order(model: Any, tokenizer: Any) -> None:
    config = SamplingConfig(max_new_tokens=10, num_samples=3)
    whole = sample(model, tokenizer, RAGGED, config, seed=(7, 1), batch_size=64)
    small = sample(model, tokenizer, RAGGED, config, seed=(7, 1), batch_size=2)
    turned = sample(model, tokenizer, RAGGED[::-1], config, seed=(7, 1), batch_size=4)
    assert tokens(small) == tokens(whole)
    by_name = {(r.prompt.id, r.sample): r.completion_ids for r in turned}
    assert by_name == {(r.prompt.id, r.sample): r.completion_ids for r in whole}


def test_other_seeds_prompts_and_samples_draw_other_tokens(qwen3: Any, tokenizer: Any) -> None:
    same_text = [Prompt("a", "abc"), Prompt("b", "abc")]
    config = SamplingConfig(max_new_tokens=12, num_samples=3)
    first = sample(qwen3, tokenizer, same_text, config, seed=(0, 0))
    second = sample(qwen3, tokenizer, same_text, config, seed=(0, 1))
    assert len({*tokens(first), *tokens(second)}) == 12


def test_more_tokens_or_samples_extend_what_was_drawn(qwen3: Any, tokenizer: Any) -> None:
    short = sample(qwen3, tokenizer, RAGGED, SamplingConfig(max_new_tokens=4), seed=(0,))
    config = SamplingConfig(max_new_tokens=9, num_samples=2)
    longer = [r for r in sample(qwen3, tokenizer, RAGGED, config, seed=(0,)) if r.sample == 0]
    assert [ids[:4] for ids in tokens(longer)] == tokens(short)


def test_order_is_prompt_major_and_progress_counts_completions(qwen3: Any, tokenizer: Any) -> None:
    done: list[int] = []
    config = SamplingConfig(max_new_tokens=2, num_samples=3)
    rollouts = sample(qwen3, tokenizer, RAGGED, config, (0,), batch_size=4, progress=done.append)
    expected = [(prompt.id, s) for prompt in RAGGED for s in range(3)]
    assert [(r.prompt.id, r.sample) for r in rollouts] == expected
    assert sum(done) == 15


def test_no_prompts_give_no_rollouts(qwen3: Any, tokenizer: Any) -> None:
    assert sample(qwen3, tokenizer, [], SamplingConfig(), seed=(0,)) == []


@pytest.mark.parametrize(
    ("declared", "stops"), [([2, 5], {2, 5}), (5, {2, 5}), ([4, 5], {2, 4, 5}), (None, {2})]
)
def test_every_stop_id_ends_a_completion(
    qwen3: Any, tokenizer: Any, declared: Any, stops: set[int]
) -> None:
    qwen3.generation_config.eos_token_id = declared
    config = SamplingConfig(temperature=2.0, max_new_tokens=60, num_samples=20)
    rollouts = sample(qwen3, tokenizer, RAGGED, config, seed=(0,))
    assert {r.completion_ids[-1] for r in rollouts if not r.is_truncated} == stops
    for rollout in rollouts:
        assert stops.isdisjoint(rollout.completion_ids[:-1])
        assert rollout.is_truncated == (rollout.completion_ids[-1] not in stops)
        assert len(rollout.completion_ids) == 60 or not rollout.is_truncated


def test_a_stop_at_the_very_last_token_is_not_truncation(qwen3: Any, tokenizer: Any) -> None:
    config = SamplingConfig(temperature=2.0, max_new_tokens=60, num_samples=8)
    long = sample(qwen3, tokenizer, RAGGED, config, seed=(0,))
    stopped = next(r for r in long if not r.is_truncated and len(r.completion_ids) > 1)
    for length, truncated in ((0, False), (-1, True)):
        limit = len(stopped.completion_ids) + length
        config = SamplingConfig(temperature=2.0, max_new_tokens=limit, num_samples=8)
        again = sample(qwen3, tokenizer, RAGGED, config, seed=(0,))[long.index(stopped)]
        assert again.is_truncated is truncated
        assert again.completion_ids == stopped.completion_ids[:limit]


def test_text_has_no_special_tokens(qwen3: Any, tokenizer: Any) -> None:
    config = SamplingConfig(temperature=2.0, max_new_tokens=30, num_samples=4)
    for rollout in sample(qwen3, tokenizer, RAGGED, config, seed=(0,)):
        kept = [i for i in rollout.completion_ids if i > 5]
        assert rollout.text == "".join(tokenizer.convert_ids_to_tokens(kept))


def test_padding_rows_of_the_head_are_never_drawn(tokenizer: Any, make_qwen3: Any) -> None:
    model = make_qwen3(len(tokenizer) + 9, tie_word_embeddings=False)
    with torch.no_grad():
        # The padding rows win against every real token wherever the hidden state leans this way.
        model.lm_head.weight[-9:] = 50 * model.lm_head.weight[-9:].sign()
    config = SamplingConfig(max_new_tokens=20, num_samples=4)
    drawn = {i for ids in tokens(sample(model, tokenizer, RAGGED, config, (0,))) for i in ids}
    assert max(drawn) < len(tokenizer)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_come_back_and_dropout_stays_off(
    gpt2: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    config = SamplingConfig(max_new_tokens=8)
    quiet = sample(gpt2, tokenizer, RAGGED, config, seed=(0,))
    gpt2.train()
    gpt2.gradient_checkpointing_enable()
    gpt2.transformer.h[0].eval()  # a part that its owner has frozen
    before = {name: module.training for name, module in gpt2.named_modules()}
    if fails:
        with torch.no_grad():
            gpt2.lm_head.weight.fill_(float("nan"))
        with pytest.raises(ModelError, match="not numbers"):
            sample(gpt2, tokenizer, RAGGED, config, seed=(0,))
    else:
        assert tokens(sample(gpt2, tokenizer, RAGGED, config, seed=(0,))) == tokens(quiet)
    assert {name: module.training for name, module in gpt2.named_modules()} == before
    assert gpt2.is_gradient_checkpointing
    assert gpt2.config.use_cache


def test_a_model_can_be_trained_after_sampling(qwen3: Any, tokenizer: Any) -> None:
    sample(qwen3.train(), tokenizer, RAGGED, SamplingConfig(max_new_tokens=3), seed=(0,))
    qwen3(torch.tensor([[1, 7, 8]])).logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in qwen3.parameters())


# --- one draw -------------------------------------------------------------------------------------

weights = st.lists(st.integers(0, 8), min_size=2, max_size=9).filter(any)


def allowed(probs: list[float], top_k: int, top_p: float) -> set[int]:
    """Top-k, then the smallest set of likeliest tokens with at least top_p of what is left."""
    ranked = sorted(range(len(probs)), key=lambda v: (-probs[v], v))[: top_k or None]
    total, kept, mass = sum(probs[v] for v in ranked), set(), 0.0
    for v in ranked:
        if mass >= top_p * total:
            break
        kept.add(v)
        mass += probs[v]
    return {v for v in kept if probs[v] > 0}


@given(weights, st.integers(0, 10), st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.83, 1.0]))
def test_filters_keep_what_a_loop_keeps(numbers: list[int], top_k: int, top_p: float) -> None:
    probs = [n / 64 for n in numbers]  # exact in binary, so that ties and edges are exact
    config = SamplingConfig(top_k=top_k, top_p=top_p)
    kept = filter_probs(torch.tensor([probs], dtype=torch.float64), config)[0]
    assert {v for v, p in enumerate(kept.tolist()) if p > 0} == allowed(probs, top_k, top_p)
    assert all(p in (0.0, original) for p, original in zip(kept.tolist(), probs, strict=True))


@given(weights, st.floats(0, 1, exclude_max=True), st.integers(0, 4))
def test_draw_inverts_the_cumulative_distribution(
    numbers: list[int], uniform: float, top_k: int
) -> None:
    logits = torch.tensor([numbers], dtype=torch.float64).log()
    config = SamplingConfig(top_k=top_k)
    token, logprob = sample_token(logits, torch.tensor([uniform], dtype=torch.float64), config)
    probs = [n / sum(numbers) for n in numbers]
    kept = filter_probs(torch.tensor([probs], dtype=torch.float64), config)[0].tolist()
    shares = [p / math.fsum(kept) for p in kept]
    below = math.fsum(shares[: token.item()])
    assert shares[token.item()] > 0
    assert below - 1e-12 <= uniform < below + shares[token.item()] + 1e-12
    assert logprob.item() == pytest.approx(math.log(probs[token.item()]))


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(top_k=2, top_p=0.9)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(config: SamplingConfig) -> None:
    logits = torch.tensor([[-math.inf, 1.0, 0.5, -math.inf]] * 2)
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_token(logits, edges, config)[0].tolist() == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_reported(value: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, value]])
    half = torch.full((2,), 0.5, dtype=torch.float64)
    token, logprob = sample_token(logits, half, SamplingConfig())
    assert token[0] == 1
    assert logprob.isfinite().tolist() == [True, False]


# --- uniforms -------------------------------------------------------------------------------------


def test_uniforms_equal_splitmix64_in_plain_integers() -> None:
    def plain(key: int, number: int) -> float:
        mask = (1 << 64) - 1
        z = (key + (number + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) / 2**53

    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    expected = [[plain(key & ((1 << 64) - 1), i) for i in range(50)] for key in keys]
    assert uniforms(keys, 50).tolist() == expected


def test_uniforms_are_uniform_and_rows_are_unrelated() -> None:
    values = uniforms(list(range(200)), 50)
    assert kstest(values.flatten().numpy(), "uniform").pvalue > 1e-4
    assert torch.corrcoef(values).fill_diagonal_(0).abs().max() < 0.7
    assert len(values.unique()) == values.numel()


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("max_new_tokens", 0),
        ("num_samples", 0),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"sampling\.{field} must be .*got {value}"):
        SamplingConfig(**{field: value})  # type: ignore[arg-type]


def test_batch_size_zero_is_refused(qwen3: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        sample(qwen3, tokenizer, RAGGED, SamplingConfig(), seed=(0,), batch_size=0)


@pytest.mark.parametrize(("end", "thought"), [("<think>", "<think>"), ("", "")])
def test_a_thought_that_the_template_opened_goes_with_the_completion(
    qwen3: Any, make_tokenizer: Any, end: str, thought: str
) -> None:
    template = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer = make_tokenizer(chat_template=f"{template}<|start|>assistant\n{end}")
    prompt = Prompt("p", ({"role": "user", "content": "a <think>"},))
    drawn = sample(qwen3, tokenizer, [prompt], SamplingConfig(max_new_tokens=3), seed=(0,))
    assert drawn[0].thought == thought
    assert drawn[0].graded_text == thought + drawn[0].text
