"""What is tried when a model is loaded: its head, its reading of padded batches, its decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tutelage.rollout.slots as rows_module
from sampling import sample
from tutelage.config.sampling import SamplingConfig
from tutelage.data.batch import collate
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import DataError, ModelError
from tutelage.models.forward import read_alone, relative_gap
from tutelage.models.head import head, head_form, hidden_rows
from tutelage.models.limits import context_limit, has_position_table
from tutelage.models.load import load_model
from tutelage.models.tiny import Architecture, save_tiny_model, tiny_config, tiny_tokenizer
from tutelage.models.tokenizers import shared_vocabulary
from tutelage.rollout.slots import AlignedSlots, ModelSlots, PlainSlots, RecomputedSlots, slots_for
from tutelage.setup.trial import try_model

NUM_ROWS = 267


def tiny(kind: str, **options: Any) -> PreTrainedModel:
    """A tiny random model of a type, in evaluation mode."""
    changes = {name: options.pop(name) for name in list(options) if name.startswith("final_")}
    config = tiny_config(AutoConfig.for_model(kind, **options), NUM_ROWS, tiny_tokenizer())
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config).float().eval()


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "scale", "cap"),
    [
        ("llama", {}, 1.0, None),
        ("gemma2", {}, 1.0, 30.0),
        ("nanochat", {}, 1.0, 15.0),
        ("cohere", {"logit_scale": 0.25}, 0.25, None),  # multiplies
        ("granite", {"logits_scaling": 4.0}, 0.25, None),  # divides
        ("falcon_h1", {"lm_head_multiplier": 0.125}, 0.125, None),
        ("minicpm3", {"dim_model_base": 16}, 0.25, None),  # before the head
        ("xlstm", {}, 1.0, 30.0),  # output_logit_soft_cap
    ],
)
def test_scales_and_caps_are_read_off_under_any_name(
    kind: str, options: dict[str, Any], scale: float, cap: float | None
) -> None:
    form = head_form(tiny(kind, **options))
    assert form.scale == pytest.approx(scale, rel=1e-6)
    assert form.softcap == (None if cap is None else pytest.approx(cap, rel=1e-6))


def test_a_cap_in_a_nested_configuration_counts_at_logits_too_small_to_show_it() -> None:
    """Logits of a hundredth differ by 1e-8 with and without the cap, and grow in training."""
    config = AutoConfig.for_model("gemma4").get_text_config()
    config.final_logit_softcapping = 30.0
    outer = AutoConfig.for_model(
        "gemma4", text_config=tiny_config(config, NUM_ROWS, tiny_tokenizer())
    )
    outer.vision_config = outer.audio_config = None
    model = AutoModelForCausalLM.from_config(outer).float().eval()
    assert "final_logit_softcapping" not in model.config.to_dict()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1e-3
    logits = head(model, read_alone(model, (5, 6)), 259)
    assert logits.softcap == pytest.approx(30.0)


def test_other_things_done_to_logits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3")
    plain = type(model).forward

    def bent(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = output.logits + 1e-3 * output.logits.abs()
        return output

    monkeypatch.setattr(type(model), "forward", bent)
    with pytest.raises(ModelError, match="Qwen3ForCausalLM are more than its head times its"):
        try_model(model, "student 'x'", 259)


@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_layers_between_backbone_and_head_are_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=r"has layers between its backbone and its output") as said:
        try_model(tiny(kind), "student 'x'", 259)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("kind", ["xlm", "cpmant"])
def test_models_that_see_what_follows_are_refused(kind: str) -> None:
    with pytest.raises(ModelError, match="tokens attend to what follows them"):
        try_model(tiny(kind), "student 'x'", 259)


def test_a_backbone_under_an_undeclared_name_is_found() -> None:
    model = tiny("llama4_text")
    assert model.base_model is model
    assert try_model(model, "student 'x'", 259) == []


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("gemma3_text", PlainSlots),
        ("qwen3_next", PlainSlots),  # a linear attention, which masks padding
        ("lfm2", PlainSlots),
        ("jamba", PlainSlots),
        ("mamba", AlignedSlots),  # whose states would take padding in
        ("recurrent_gemma", RecomputedSlots),  # which keeps its states in itself
        ("rwkv", RecomputedSlots),
        ("openai-gpt", RecomputedSlots),  # without a cache
    ],
)
def test_decoding_takes_the_first_form_that_is_exact(kind: str, form: type[ModelSlots]) -> None:
    given = {"layer_types": ["conv", "full_attention"] * 16} if kind == "lfm2" else {}
    model = tiny(kind, **given)
    notes = try_model(model, "student 'x'", 259)
    assert isinstance(slots_for(model, 0), form)
    assert bool(notes) == (form is not PlainSlots)
    check_rows(slots_for(model, 0), model)


@torch.no_grad()
def check_rows(rows: Any, model: PreTrainedModel) -> None:
    """Rows that share prompts, end early and change places give what each gives alone."""
    generator = torch.Generator().manual_seed(2)
    prompts = [
        tuple(torch.randint(5, 250, (n,), generator=generator).tolist()) for n in (3, 11, 3, 6)
    ]
    order = [3, 1, 0, 1, 2]
    rows.prefill(range(len(order)), [prompts[i] for i in order])
    texts = [prompts[i] for i in order]
    for step in range(9):
        states = torch.stack([read_alone(model, ids)[-1] for ids in texts])
        assert relative_gap(rows.hidden, states) < 1e-4
        if step in (2, 5):
            index = torch.tensor([3, 0, 2] if step == 2 else [2, 0])
            rows.keep(index)
            texts = [texts[i] for i in index.tolist()]
        tokens = torch.randint(5, 250, (len(texts),), generator=generator)
        rows.decode_step(tokens)
        texts = [(*ids, token) for ids, token in zip(texts, tokens.tolist(), strict=True)]


def test_a_form_that_is_not_exact_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: Mamba in one padded cache."""
    monkeypatch.setattr(rows_module, "_FORMS", (PlainSlots,))
    with pytest.raises(ModelError, match=r"MambaForCausalLM cannot be decoded .* differ by 1") as x:
        slots_for(tiny("mamba"), 0)
    assert "\n" not in str(x.value)


def test_a_model_that_fails_in_its_own_code_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt_neox")

    def broken(*_: Any, **__: Any) -> Any:
        raise AttributeError("no such\nthing")

    monkeypatch.setattr(type(model.base_model), "forward", broken)
    with pytest.raises(ModelError, match=r"no such thing \(AttributeError\)") as said:
        try_model(model, "student 'x'", 259)
    assert "\n" not in str(said.value)


# --- lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "has_table"),
    [
        ("gpt2", "n_positions", True),
        ("opt", "max_position_embeddings", True),
        ("gptj", "n_positions", True),
        ("mpt", "max_seq_len", True),
        ("doge", "keep_window_size", True),
        ("llama", "max_position_embeddings", False),
        ("qwen3_next", "max_position_embeddings", False),
    ],
)
def test_a_table_of_positions_ends_and_rotary_positions_do_not(
    kind: str, name: str, has_table: bool
) -> None:
    config = tiny_config(AutoConfig.for_model(kind), NUM_ROWS, tiny_tokenizer())
    setattr(config, name, 12)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    assert (context_limit(model), has_position_table(model)) == (12, has_table)
    prompt = [Prompt("a", "x" * 8)]
    assert sample(model, tiny_tokenizer(), prompt, SamplingConfig(max_new_tokens=4), (0,))
    batch = collate([Rollout(prompt[0], 0, (7,) * 8, (7,) * 5)], 0)
    if not has_table:
        hidden_rows(model, batch)
        return
    message = r"has positions for 12 tokens, but .* 13\. Lower"
    with pytest.raises(ModelError, match=message):
        sample(model, tiny_tokenizer(), prompt, SamplingConfig(max_new_tokens=5), (0,))
    with pytest.raises(ModelError, match=message):
        hidden_rows(model, batch)


def test_types_without_a_limit() -> None:
    assert context_limit(tiny("bloom")) is None
    assert context_limit(tiny("mamba")) is None


# --- tokens beyond the head -----------------------------------------------------------------------


def test_added_tokens_beyond_the_head_are_cut_unless_a_prompt_uses_them() -> None:
    """Gemma 3's tokenizer has a placeholder for images that its text models have no row for."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"])
    assert len(tokenizer) == 260
    model = tiny("gemma3_text")
    model.resize_token_embeddings(259)
    assert shared_vocabulary(tokenizer, tokenizer, 259, 262) == 259
    drawn = sample(model, tokenizer, [Prompt("a", "1+1")], SamplingConfig(max_new_tokens=4), (0,))
    assert max(drawn[0].completion_ids) < 259
    with pytest.raises(DataError, match=r"'b' has the token '<image_soft_token>' \(id 259\)"):
        sample(model, tokenizer, [Prompt("b", "a<image_soft_token>")], SamplingConfig(), (0,))


def test_ordinary_tokens_beyond_the_head_and_a_short_teacher_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    for rows, who in (((250, 259), "student"), ((259, 250), "teacher")):
        with pytest.raises(ModelError, match=f"the {who}'s output head has 250 rows"):
            shared_vocabulary(tokenizer, tokenizer, *rows)


def test_every_kind_of_layer_survives_shrinking(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3_next")
    save_tiny_model(Architecture(config, "a test", is_base=False), NUM_ROWS, 0, tmp_path / "m")
    tiny = AutoConfig.from_pretrained(tmp_path / "m")
    assert set(tiny.layer_types) == set(config.layer_types)
    assert tiny.num_hidden_layers == len(tiny.layer_types) == 2


# --- images and text, eager attention -------------------------------------------------------------


MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def saved(kind: str, folder: Path, **options: Any) -> str:
    found = Architecture(AutoConfig.for_model(kind, **options), "a test", is_base=False)
    save_tiny_model(found, NUM_ROWS, 0, folder)
    return str(folder)


def test_a_model_of_images_and_text_reads_text(tmp_path: Path) -> None:
    model = load_model(saved("qwen2_5_vl", tmp_path / "vl", text_config={"rope_parameters": MROPE}))
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert try_model(model, "student 'x'", 259) == []
    check_rows(slots_for(model, 0), model)


def test_a_text_part_without_a_class_of_its_own_is_not_blamed_on_its_files(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen2_5_vl").get_text_config()
    config.save_pretrained(tmp_path / "part")
    with pytest.raises(ModelError, match="transformers has no causal language model"):
        load_model(str(tmp_path / "part"))


def test_a_model_without_fused_attention_loads_eagerly_and_says_so(tmp_path: Path) -> None:
    model = load_model(saved("gpt_oss", tmp_path / "gpt-oss"))
    assert model.config._attn_implementation == "eager"
    (note,) = try_model(model, "teacher 'x'", 259, decodes=False)
    assert note.startswith("the teacher 'x', a GptOssForCausalLM, has no fused attention")
