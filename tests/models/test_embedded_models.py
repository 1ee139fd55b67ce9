"""The embedded ledger models: what ships, whether it loads, and whether the cards are true."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import tutelage
from tutelage.data.tasks import LedgerTask
from tutelage.data.tasks.ledger import DIGITS, LETTERS, OPERATORS, PUNCTUATION
from tutelage.data.types import Prompt

ASSETS = Path(tutelage.__file__).parent / "assets"
SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = ("ledger-teacher", "ledger-overconfident", "ledger-small", "ledger-collapsed")
OTHERS = ("ledger-tools-teacher", "ledger-tools-overconfident",
          "coins-teacher", "coins-student", "coins-small")  # fmt: skip
"""Of which `test_embedded_agents` and `test_embedded_coins` are the tests."""
BUDGET_BYTES = 4_000_000
CHARACTERS = LETTERS + DIGITS + OPERATORS + PUNCTUATION
TASK = LedgerTask()
NUM_PROMPTS, NUM_SAMPLES = 32, 8

every_model = pytest.mark.parametrize("name", NAMES)


@functools.cache
def load_model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(ASSETS / name).eval()


@functools.cache
def load_tokenizer(name: str = NAMES[0]) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ASSETS / name)


@functools.cache
def prompts() -> list[Prompt]:
    return [p for p in TASK.held_out(NUM_PROMPTS, seed=1) for _ in range(NUM_SAMPLES)]


@functools.cache
def sampled_ids(name: str) -> torch.Tensor:
    """Prompts and sampled completions [B, T] of a model; other prompts than the cards' own."""
    ids = load_tokenizer(name)([p.content for p in prompts()], return_tensors="pt")["input_ids"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return load_model(name).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=48,
        )


@functools.cache
def right_completions(name: str) -> list[tuple[Prompt, str]]:
    """The sampled completions of which every step is right."""
    width = len(load_tokenizer()(prompts()[0].content)["input_ids"])
    texts = load_tokenizer().batch_decode(sampled_ids(name)[:, width:], skip_special_tokens=True)
    return [(p, t) for p, t in zip(prompts(), texts, strict=True) if TASK.grade(p, t)]


def mean_at_8(name: str) -> float:
    return len(right_completions(name)) / len(prompts())


def pass_at_8(name: str) -> float:
    return len({p.id for p, _ in right_completions(name)}) / NUM_PROMPTS


def card_figures(name: str) -> dict[str, float]:
    """Figures of the table of a model card; percentages as shares."""
    rows = re.findall(
        r"^\| (.+) \| ([0-9.]+)(%?) \|$", (ASSETS / name / "README.md").read_text(), re.M
    )
    return {label: float(value) / (100 if percent else 1) for label, value, percent in rows}


# What ships


def test_the_models_fit_the_budget_and_hold_nothing_executable() -> None:
    files = [path for name in NAMES for path in (ASSETS / name).iterdir()]
    assert {path.name for path in ASSETS.iterdir()} == {*NAMES, *OTHERS, "ledger.toml"}
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= BUDGET_BYTES


@every_model
def test_plain_loading_gives_a_finite_float32_model_and_its_tokenizer(name: str) -> None:
    model, tokenizer = load_model(name), load_tokenizer(name)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.config.vocab_size == len(tokenizer)
    for kind in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(model.generation_config, kind) == getattr(tokenizer, kind)
        assert getattr(model.config, kind) == getattr(tokenizer, kind)


@every_model
def test_the_stored_weights_are_bfloat16(name: str) -> None:
    # The values survive a trip through bfloat16 only if that is how they were stored.
    for parameter in load_model(name).parameters():
        assert torch.equal(parameter, parameter.to(torch.bfloat16).float())


def test_all_models_have_the_same_tokenizer() -> None:
    files = {(ASSETS / name / "tokenizer.json").read_bytes() for name in NAMES}
    assert len(files) == 1


# The tokenizer


@given(st.text(CHARACTERS, max_size=60))
def test_one_token_per_character_after_bos_and_back(text: str) -> None:
    tokenizer = load_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids[1:]) == text


@given(st.text(st.characters(exclude_characters=CHARACTERS + "$<", codec="utf-8"), max_size=20))
def test_every_unknown_character_becomes_one_unk(text: str) -> None:
    tokenizer = load_tokenizer()
    assert tokenizer(text)["input_ids"][1:] == [tokenizer.unk_token_id] * len(text)


def test_the_end_sign_is_the_end_of_sequence_and_is_not_decoded() -> None:
    tokenizer = load_tokenizer()
    ids = tokenizer("#2$")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "#2"


def test_padding_goes_to_the_left() -> None:
    tokenizer = load_tokenizer()
    batch = tokenizer(["a1", "a1+2;>"], padding=True)
    assert batch["attention_mask"] == [[0] * 4 + [1] * 3, [1] * 7]
    assert batch["input_ids"][0][:4] == [tokenizer.pad_token_id] * 4


# What the models can do


@pytest.mark.slow
@every_model
def test_the_card_states_what_is_measured(name: str) -> None:
    stated = card_figures(name)["mean@8"]
    assert abs(mean_at_8(name) - stated) < 0.12


@pytest.mark.slow
def test_the_teacher_is_right_in_many_ways() -> None:
    right = right_completions("ledger-teacher")
    assert mean_at_8("ledger-teacher") > 0.9
    assert len({(p.id, text) for p, text in right}) / NUM_PROMPTS > 6


@pytest.mark.slow
def test_the_collapsed_model_is_right_in_one_way() -> None:
    right = right_completions("ledger-collapsed")
    assert mean_at_8("ledger-collapsed") > 0.85
    assert len({(p.id, text) for p, text in right}) / NUM_PROMPTS < 2


@pytest.mark.slow
def test_the_overconfident_student_is_wrong_and_sure_of_it() -> None:
    assert mean_at_8("ledger-overconfident") <= 0.4
    rows, kl = q3_shares("ledger-overconfident")
    assert 0.005 < rows < 0.05
    assert kl > 0.4
    # Control: the small student is wrong about as often, but it hesitates, so trying again helps.
    assert pass_at_8("ledger-overconfident") < 0.7 < 0.8 < pass_at_8("ledger-small")


@pytest.mark.slow
def test_the_small_student_is_wrong_but_not_hopeless() -> None:
    assert 0.02 < mean_at_8("ledger-small") <= 0.5


def q3_shares(name: str) -> tuple[float, float]:
    """Share of tokens with entropy below and reverse KL above 0.5 nats, and of the KL they hold."""
    ids = sampled_ids(name)
    width = len(load_tokenizer()(prompts()[0].content)["input_ids"])
    with torch.inference_mode():
        student = torch.distributions.Categorical(logits=load_model(name)(ids).logits)
        teacher = torch.distributions.Categorical(logits=load_model("ledger-teacher")(ids).logits)
    counts = ids[:, width:] != load_tokenizer().pad_token_id
    entropy = student.entropy()[:, width - 1 : -1][counts]
    kl = torch.distributions.kl_divergence(student, teacher)[:, width - 1 : -1][counts]
    chosen = (entropy < 0.5) & (kl > 0.5)
    return chosen.float().mean().item(), (kl[chosen].sum() / kl.sum()).item()


# How they are made


def test_the_script_repeats_itself_and_writes_the_shipped_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from dataclasses import replace

    from build_ledger_models import RECIPES, build
    from ledger_tokenizer import build_tokenizer
    from ledger_training import MAX_LENGTH

    assert [recipe.name for recipe in RECIPES] == list(NAMES)
    tokenizer = build_tokenizer(MAX_LENGTH)
    for out in (tmp_path / "a", tmp_path / "b"):
        for recipe in RECIPES[:2]:
            short = replace(recipe.schedule, num_steps=2, batch_size=2)
            build(replace(recipe, schedule=short), out, tokenizer)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        for name in NAMES[:2]:
            written = [(tmp_path / out / name / file).read_bytes() for out in "ab"]
            assert written[0] == written[1]
    made, shipped = tmp_path / "a" / NAMES[0], ASSETS / NAMES[0]
    assert (made / "tokenizer.json").read_bytes() == (shipped / "tokenizer.json").read_bytes()
    assert json.loads((made / "config.json").read_text()) == json.loads(
        (shipped / "config.json").read_text()
    )
