"""The embedded coins models: what ships, whether it loads, and whether the cards are true."""

from __future__ import annotations

import functools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import tutelage
from tutelage.config.sampling import SamplingConfig
from tutelage.data.batch import collate
from tutelage.data.tasks import CoinsTask
from tutelage.data.tasks.coins import PIECE, _said, parse_purchase, vocabulary
from tutelage.data.types import Prompt, Rollout
from tutelage.evaluation.problems import embedded
from tutelage.evaluation.request import EvaluationRequest
from tutelage.models.llama_cpu.decode import FastSlots
from tutelage.rollout.generate import generate
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.slots import open_slots

ASSETS = Path(tutelage.__file__).parent / "assets"
SCRIPTS = Path(__file__).parents[2] / "scripts"
TEACHER, STUDENT, SMALL = NAMES = ("coins-teacher", "coins-student", "coins-small")
BUDGET_BYTES = 3_000_000
TASK = CoinsTask()
NUM_PROMPTS, NUM_SAMPLES = 24, 8

every_model = pytest.mark.parametrize("name", NAMES)


@functools.cache
def load_model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(ASSETS / name).eval()


@functools.cache
def load_tokenizer(name: str = TEACHER) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ASSETS / name)


@functools.cache
def rollouts(name: str) -> list[Rollout]:
    """Completions of other prompts than the cards' own."""
    sampling = SamplingConfig(num_samples=NUM_SAMPLES, max_new_tokens=64)
    request = RolloutRequest(TASK.held_out(NUM_PROMPTS, seed=1), sampling, seed=(1,))
    return generate(load_model(name), load_tokenizer(name), request, batch_size=256)


def right(name: str) -> list[Rollout]:
    return [r for r in rollouts(name) if TASK.grade(r.prompt, r.text, r.is_truncated)]


def mean_at_8(name: str) -> float:
    return len(right(name)) / len(rollouts(name))


def card_figures(name: str) -> dict[str, float]:
    """Figures of the table of a model card; percentages as shares."""
    card = (ASSETS / name / "README.md").read_text()
    rows = re.findall(r"^\| (.+) \| ([0-9.]+)(%?) \|$", card, re.M)
    return {label: float(value) / (100 if percent else 1) for label, value, percent in rows}


@functools.cache
@torch.inference_mode()
def token_figures(name: str) -> tuple[Tensor, Tensor]:
    """Entropy and reverse KL to the teacher of every sampled token, in nats."""
    batch = collate(rollouts(name), 0)
    student, teacher = (
        torch.distributions.Categorical(
            logits=batch.flatten(load_model(one)(batch.input_ids, batch.attention_mask).logits)
        )
        for one in (name, TEACHER)
    )
    return student.entropy(), torch.distributions.kl_divergence(student, teacher)


# What ships


def test_the_models_fit_their_budget_and_share_a_tokenizer() -> None:
    files = [path for name in NAMES for path in (ASSETS / name).iterdir()]
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= BUDGET_BYTES
    assert len({(ASSETS / name / "tokenizer.json").read_bytes() for name in NAMES}) == 1


@every_model
def test_plain_loading_gives_float32_of_bfloat16_values_on_the_fast_path(name: str) -> None:
    model, tokenizer = load_model(name), load_tokenizer(name)
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.to(torch.bfloat16).float())
        assert parameter.isfinite().all()
    assert model.config.vocab_size == len(tokenizer)
    for kind in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(model.generation_config, kind) == getattr(tokenizer, kind)
        assert getattr(model.config, kind) == getattr(tokenizer, kind)
    assert isinstance(open_slots(model, (1, 2), 0, 2, 64), FastSlots)


# The tokenizer


@given(st.lists(st.sampled_from(vocabulary()), max_size=30).map("".join))
def test_the_pieces_of_the_task_are_tokens_after_bos_and_back(text: str) -> None:
    tokenizer = load_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    known = set(vocabulary())
    pieces = re.findall(PIECE, text)
    assert tokenizer.convert_ids_to_tokens(ids[1:]) == [
        p if p in known else "<unk>" for p in pieces
    ]
    if known.issuperset(pieces):
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=25)
@given(st.text(st.characters(exclude_characters="<", codec="utf-8"), max_size=30))
def test_any_text_is_cut_into_the_same_pieces(text: str) -> None:
    # ASCII whitespace alone is shared by all definitions of a space.
    text = re.sub(r"[^\S \n]|[\x1c-\x1f]", "", text)
    assert len(load_tokenizer()(text)["input_ids"]) == 1 + len(re.findall(PIECE, text))


# What the models can do


def test_a_model_without_prompts_is_asked_those_of_its_own_task() -> None:
    for name, task in ((TEACHER, "coins"), ("ledger-teacher", "ledger")):
        request = EvaluationRequest(str(ASSETS / name), num_problems=2)
        assert embedded(request, load_tokenizer(name)).name == task


@pytest.mark.slow
@every_model
def test_the_card_states_what_is_measured(name: str) -> None:
    stated = card_figures(name)
    assert abs(mean_at_8(name) - stated["mean@8"]) < 0.12
    entropy, kl = token_figures(name)
    assert abs(entropy.mean() - stated["mean entropy of a token, nats"]) < 0.1
    error = 3 * kl.std() / len(kl) ** 0.5  # few tokens have most of it
    assert abs(kl.mean() - stated["mean KL to the teacher of a token, nats"]) < 0.1 + error


@pytest.mark.slow
def test_the_teacher_is_right_in_many_ways() -> None:
    assert card_figures(TEACHER)["mean@8"] >= 0.8  # of 1,024 completions
    assert mean_at_8(TEACHER) >= 0.68  # of 192, about 24 prompts
    assert len({(r.prompt.id, r.text) for r in right(TEACHER)}) / NUM_PROMPTS > 5
    for style in (" + ", " left", " - "):
        assert any(style in rollout.text for rollout in right(TEACHER))


@pytest.mark.slow
@pytest.mark.parametrize("name", [STUDENT, SMALL])
def test_a_student_is_wrong_but_not_hopeless(name: str) -> None:
    assert 0.08 < mean_at_8(name) <= 0.5


@pytest.mark.slow
def test_careless_texts_make_sure_of_what_is_wrong() -> None:
    def q3(name: str) -> tuple[float, float]:
        entropy, kl = token_figures(name)
        chosen = (entropy < 0.5) & (kl > 0.5)
        return chosen.float().mean().item(), (kl[chosen].sum() / kl.sum()).item()

    rows, share = q3(STUDENT)
    assert rows > 0.01
    assert share > 0.5
    assert share > 3 * q3(SMALL)[1]


# How they are made


def test_the_script_repeats_itself_and_writes_the_shipped_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from build_coins_models import RECIPES, build
    from coins_training import build_tokenizer

    assert tuple(recipe.name for recipe in RECIPES) == NAMES
    tokenizer = build_tokenizer()
    for out in (tmp_path / "a", tmp_path / "b"):
        for recipe in RECIPES[:2]:
            short = replace(recipe.schedule, num_steps=2, batch_size=2)
            build(replace(recipe, schedule=short), out, tokenizer)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        for name in NAMES[:2]:
            written = [(tmp_path / out / name / file).read_bytes() for out in "ab"]
            assert written[0] == written[1]
    made, shipped = tmp_path / "a" / TEACHER, ASSETS / TEACHER
    assert (made / "tokenizer.json").read_bytes() == (shipped / "tokenizer.json").read_bytes()
    for file in ("config.json", "tokenizer_config.json"):
        assert json.loads((made / file).read_text()) == json.loads((shipped / file).read_text())


def test_completions_are_the_targets_and_many_careless_ones_are_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from build_coins_models import RECIPES
    from coins_training import batches

    tokenizer = load_tokenizer()
    for careless in (0.0, 1.0):
        recipe = replace(RECIPES[1], careless_share=careless)
        right = []
        for step in range(3):
            for row, wanted in zip(*batches(tokenizer, recipe)(step), strict=True):
                is_target = wanted != -100
                assert torch.equal(wanted[is_target], row[is_target])
                assert wanted[is_target][-1] == tokenizer.eos_token_id
                asked, said = (
                    tokenizer.decode(ids, skip_special_tokens=True)
                    for ids in (row[~is_target], row[is_target])
                )
                assert asked.endswith("\n")
                amount = max(map(int, re.findall("[0-9]+", asked)))
                right.append(TASK.grade(Prompt("p", asked, str(amount)), said))
        if careless:
            assert 0.1 < fmean(right) < 0.7
        else:
            assert all(right)


def test_a_careless_completion_is_wrong_in_its_last_coin_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from coins_training import pay_carelessly

    rng, num_wrong = random.Random(1), 0
    for prompt in TASK.prompts(0, 100, seed=1):
        purchase, text = parse_purchase(prompt), pay_carelessly(prompt, rng)
        assert purchase is not None
        said = _said(text)
        assert said is not None
        *first, last = said[0]
        assert sum(first) + last == purchase.amount
        assert set(first) <= set(purchase.coins)
        assert any(0 <= last - coin < min(purchase.coins) for coin in purchase.coins)
        assert TASK.grade(prompt, text) == (last in purchase.coins)
        num_wrong += last not in purchase.coins
    assert 30 < num_wrong < 90
