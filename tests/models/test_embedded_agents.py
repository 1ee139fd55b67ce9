"""The embedded ledger-tools models: what ships, how they converse, whether the cards are true."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import tutelage
from tutelage.config.conversations import LedgerToolsData
from tutelage.config.sampling import SamplingConfig
from tutelage.data.batch import collate
from tutelage.data.types import Conversation, Rollout
from tutelage.envs.ledger_tools import LedgerToolsTask
from tutelage.models.chat.tool_format import detect_format
from tutelage.models.chat.turn_template import TurnTemplate
from tutelage.models.llama_cpu.decode import FastSlots
from tutelage.rollout.generate import generate
from tutelage.rollout.request import Agent, RolloutRequest
from tutelage.rollout.slots import open_slots

ASSETS = Path(tutelage.__file__).parent / "assets"
SCRIPTS = Path(__file__).parents[2] / "scripts"
TEACHER, STUDENT = NAMES = ("ledger-tools-teacher", "ledger-tools-overconfident")
BUDGET_BYTES = 3_000_000
TASK = LedgerToolsTask()
NUM_PROMPTS, NUM_SAMPLES = 32, 4

every_model = pytest.mark.parametrize("name", NAMES)


@functools.cache
def load_model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(ASSETS / name).eval()


@functools.cache
def load_tokenizer(name: str = TEACHER) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ASSETS / name)


@functools.cache
def rollouts(name: str) -> list[Rollout]:
    """Conversations about other prompts than the cards' own."""
    request = RolloutRequest(
        prompts=TASK.held_out(NUM_PROMPTS, seed=1),
        sampling=SamplingConfig(num_samples=NUM_SAMPLES, max_new_tokens=128),
        seed=(1,),
        agent=Agent(TASK.environment, LedgerToolsData()),
    )
    return generate(load_model(name), load_tokenizer(name), request, batch_size=128)


def talks(name: str) -> list[Conversation]:
    return [rollout.conversation for rollout in rollouts(name) if rollout.conversation]


def success(name: str) -> float:
    return sum(talk.outcome.is_success for talk in talks(name)) / len(talks(name))


def share(name: str, detail: str) -> float:
    """Share of conversations with at least one of something."""
    return sum(bool(talk.outcome.details[detail]) for talk in talks(name)) / len(talks(name))


def card_figures(name: str) -> dict[str, float]:
    """Figures of the table of a model card; percentages as shares."""
    card = (ASSETS / name / "README.md").read_text()
    rows = re.findall(r"^\| (.+) \| ([0-9.]+)(%?) \|$", card, re.M)
    return {label: float(value) / (100 if percent else 1) for label, value, percent in rows}


# What ships


def test_the_two_models_fit_their_budget() -> None:
    files = [path for name in NAMES for path in (ASSETS / name).iterdir()]
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= BUDGET_BYTES
    tokenizers = {(ASSETS / name / "tokenizer.json").read_bytes() for name in NAMES}
    assert len(tokenizers) == 1


@every_model
def test_plain_loading_gives_float32_of_bfloat16_values_on_the_fast_path(name: str) -> None:
    model, tokenizer = load_model(name), load_tokenizer(name)
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.to(torch.bfloat16).float())
        assert parameter.isfinite().all()
    assert model.config.vocab_size == len(tokenizer)
    for kind in ("pad_token_id", "eos_token_id"):
        assert getattr(model.generation_config, kind) == getattr(tokenizer, kind)
    assert isinstance(open_slots(model, (1, 2), 0, 2, 64), FastSlots)


# The tokenizer


@given(st.text(max_size=40) | st.sampled_from(['{"error": "no"}', "Total: price e, stock f"]))
def test_any_text_is_written_and_read_back(text: str) -> None:
    tokenizer = load_tokenizer()
    text = re.sub(r"<(?=\||pad)", "", text)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(text.encode())


def test_a_call_is_a_handful_of_tokens_and_numbers_have_one_for_each_digit() -> None:
    call = '{"name":"look_up_price","arguments":{"item":"e"}}'
    words = ['{"name":"', "look_up_price", '","arguments":{"item":"', "e", '"}}']
    tokenizer = load_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer(call)["input_ids"]) == words
    assert tokenizer.convert_ids_to_tokens(tokenizer("42+137")["input_ids"]) == list("42+137")


def test_the_template_goes_on_turn_by_turn_and_shows_the_names_of_the_tools() -> None:
    tokenizer = load_tokenizer()
    assert detect_format(tokenizer) == "json"
    between = TurnTemplate(tokenizer, {tokenizer.eos_token_id}).between(
        [{"role": "tool", "name": "calculate", "content": "42"}], (), "x"
    )
    assert tokenizer.decode(between) == "<|tool|>42<|end|><|assistant|>"
    opening = TASK.environment().start(TASK.held_out(1)[0], 0)
    text = tokenizer.apply_chat_template(
        list(opening.messages), tools=list(opening.tools), tokenize=False
    )
    assert text.startswith("<|tools|>look_up_price,look_up_stock,calculate<|end|><|user|>Total: ")
    with pytest.raises(Exception, match="roles are user, assistant and tool, got system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


# What the models can do


@pytest.mark.slow
@every_model
def test_the_card_states_what_is_measured(name: str) -> None:
    stated = card_figures(name)
    assert abs(success(name) - stated["success"]) < 0.12
    assert (
        abs(share(name, "wrong_tool") - stated["conversations with a look-up by the wrong tool"])
        < 0.15
    )


@pytest.mark.slow
def test_the_teacher_is_right_in_many_ways() -> None:
    assert card_figures(TEACHER)["success"] >= 0.95  # of 1,024 conversations
    assert success(TEACHER) >= 0.92  # of 128
    right = {
        (rollout.prompt.id, rollout.generated_ids): rollout.conversation.num_turns
        for rollout in rollouts(TEACHER)
        if rollout.conversation and rollout.conversation.outcome.is_success
    }
    assert len(right) / NUM_PROMPTS > 3.4  # of four samples
    assert set(right.values()) == {4, 5, 6}


@pytest.mark.slow
def test_the_overconfident_student_is_wrong_and_sure_of_it() -> None:
    assert 0.1 < success(STUDENT) <= 0.4
    assert share(STUDENT, "wrong_tool") > 0.2
    assert share(STUDENT, "ignored_answer") > 0.2
    assert share(STUDENT, "malformed") < 0.05
    entropy, kl, is_wrong = token_figures(STUDENT)
    assert entropy[is_wrong].median() < 0.5
    assert entropy.mean() > 0.05  # it is not sure of everything
    chosen = (entropy < 0.5) & (kl > 0.5)
    assert 0.005 < chosen.float().mean() < 0.1
    assert kl[chosen].sum() / kl.sum() > 0.4
    # Control: the teacher writes next to nothing that it finds wrong itself.
    assert token_figures(TEACHER)[2].float().mean() < 0.2 * is_wrong.float().mean()


@torch.inference_mode()
def token_figures(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of every generated token: entropy, reverse KL, and whether the teacher gives it under 5 %."""
    batch = collate(rollouts(name), 0)
    student, teacher = (
        torch.distributions.Categorical(
            logits=batch.flatten(load_model(one)(batch.input_ids, batch.attention_mask).logits)
        )
        for one in (name, TEACHER)
    )
    kl = torch.distributions.kl_divergence(student, teacher)
    return student.entropy(), kl, teacher.log_prob(batch.tokens) < -3


# How they are made


def test_the_script_repeats_itself_and_writes_the_shipped_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from build_ledger_tools_models import RECIPES, build
    from ledger_tools_tokenizer import build_tokenizer

    assert tuple(recipe.name for recipe in RECIPES) == NAMES
    tokenizer = build_tokenizer()
    for out in (tmp_path / "a", tmp_path / "b"):
        for recipe in RECIPES:
            stages = [(replace(a, num_steps=2, batch_size=2), b) for a, b in recipe.stages]
            build(replace(recipe, stages=tuple(stages)), out, tokenizer)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        for name in NAMES:
            written = [(tmp_path / out / name / file).read_bytes() for out in "ab"]
            assert written[0] == written[1]
    made, shipped = tmp_path / "a" / TEACHER, ASSETS / TEACHER
    assert (made / "tokenizer.json").read_bytes() == (shipped / "tokenizer.json").read_bytes()
    for file in ("config.json", "tokenizer_config.json"):
        assert json.loads((made / file).read_text()) == json.loads((shipped / file).read_text())


def test_the_agents_tokens_are_the_targets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from build_ledger_tools_models import RECIPES
    from ledger_tools_training import batches

    tokenizer = load_tokenizer()
    for schedule, lessons in (stage for recipe in RECIPES for stage in recipe.stages):
        ids, targets = batches(tokenizer, replace(schedule, batch_size=16), lessons)(0)
        for row, wanted in zip(ids, targets, strict=True):
            is_target = wanted != -100
            assert torch.equal(wanted[is_target], row[is_target])
            taught = tokenizer.decode(row[is_target])
            assert "<|tool|>" not in taught
            assert "<|user|>" not in taught
            assert taught.count("<|end|>") == tokenizer.decode(row).count("<|assistant|>")
        assert (targets == -100).any()
