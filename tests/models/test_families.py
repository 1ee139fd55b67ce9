"""The same promises for every supported family: head, sampling, packing and learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from sampling import sample_rollouts
from tutelage.config.parse import parse_config
from tutelage.config.sampling import SamplingConfig
from tutelage.data.batch import collate
from tutelage.data.types import Prompt, Rollout
from tutelage.models.head import head, hidden_rows
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.tiny import Architecture, save_tiny_model
from tutelage.models.tokenizers import vocabulary_size
from tutelage.train.loop import train

# Name, model type, tied head, and what is special about it.
FAMILIES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "qwen3-tied": ("qwen3", True, {}),
    "qwen3-untied": ("qwen3", False, {}),
    "qwen2.5-tied": ("qwen2", True, {"num_key_value_heads": 2}),
    "qwen2.5-untied": ("qwen2", False, {"num_key_value_heads": 2}),
    # Llama 3.2 and SmolLM2
    "llama-tied": ("llama", True, {"num_key_value_heads": 8}),
    "llama-untied": (
        "llama",
        False,
        {
            "num_key_value_heads": 8,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "gemma-2-softcap": ("gemma2", True, {"sliding_window": 8}),
    "gemma-3": ("gemma3_text", True, {"sliding_window": 8}),
    "granite-scaled": ("granite", True, {"logits_scaling": 4.0}),
    "cohere-scaled": ("cohere", True, {"logit_scale": 0.25}),
}
PROMPTS = [Prompt("a", "12+7="), Prompt("b", "What is left of nine if four leave?")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student and a teacher of every family, the teacher's head padded further."""
    place = tmp_path_factory.mktemp("families")
    for name, (kind, is_tied, options) in FAMILIES.items():
        config = AutoConfig.for_model(kind, tie_word_embeddings=is_tied, **options)
        found = Architecture(config, "a test", is_base=False)
        for seed, (who, rows) in enumerate([("student", 267), ("teacher", 395)]):
            save_tiny_model(found, rows, seed, place / name / who)
    return {name: place / name for name in FAMILIES}


def student(folder: Path) -> PreTrainedModel:
    return load_model(str(folder / "student"))


def rollouts() -> list[Rollout]:
    generator = torch.Generator().manual_seed(1)
    lengths = [(3, 1), (2, 20), (5, 2), (4, 13)]
    ids = [torch.randint(0, 256, (a + b,), generator=generator).tolist() for a, b in lengths]
    pairs = zip(ids, lengths, strict=True)
    return [Rollout(PROMPTS[0], 0, tuple(x[:a]), tuple(x[a:])) for x, (a, _) in pairs]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_head_times_hidden_states_alone_or_packed(
    folders: dict[str, Path], name: str
) -> None:
    model, every = student(folders[name]), rollouts()
    with torch.no_grad():
        packed = hidden_rows(model, collate(every, 0))
        logits = head(model, packed, 259).block(0, len(packed))
        start = 0
        for rollout in every:
            ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
            theirs = model(input_ids=ids, use_cache=False).logits[0]
            wanted = theirs[len(rollout.prompt_ids) - 1 : -1, :259]
            ours = logits[start : start + len(wanted)]
            assert float((ours - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())
            start += len(wanted)
        assert start == len(logits)


def test_a_forgotten_soft_cap_would_be_seen(folders: dict[str, Path]) -> None:
    """Negative control: Gemma 2 without its final soft cap gives other logits."""
    model, batch = student(folders["gemma-2-softcap"]), collate(rollouts(), 0)
    with torch.no_grad():
        hidden = hidden_rows(model, batch)
        capped = head(model, hidden, 259).block(0, len(hidden))
        bare = replace(head(model, hidden, 259), softcap=None).block(0, len(hidden))
    assert float((capped - bare).abs().max()) > 1e-3 * float(bare.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_sampling_is_what_generate_says(folders: dict[str, Path], name: str) -> None:
    model = student(folders[name])
    tokenizer = load_tokenizer(str(folders[name] / "student"))
    drawn = sample_rollouts(model, tokenizer, PROMPTS, SamplingConfig(0.0, 1.0, 0, 12), (0,))
    for rollout in drawn:
        ids = torch.tensor([rollout.prompt_ids])
        beyond = list(range(vocabulary_size(tokenizer), 267))
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=beyond,
        )
        assert list(rollout.completion_ids) == theirs[0, ids.shape[1] :].tolist()


def settings(folder: Path, out: Path, prompts: Path, **changes: Any) -> Any:
    table = {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "data": {"kind": "file", "path": str(prompts), "num_held_out": 0},
        "sampling": {"max_new_tokens": 8},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
        "evaluation": {"num_problems": 0},
        "num_steps": 1,
        "prompts_per_step": 2,
        "device": "cpu",
        "out": str(out),
    }
    return parse_config(table | changes)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one and one"}\n{"prompt": "two"}\n{"prompt": "three"}\n')
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_bring_the_student_to_its_teacher(
    folders: dict[str, Path], name: str, tmp_path: Path, prompts: Path
) -> None:
    seen: list[dict[str, Any]] = []
    config = settings(folders[name], tmp_path / "run", prompts, num_steps=6)
    train(config, log=lambda _: None, on_step=seen.append)
    assert seen[-1]["loss"] < 0.9 * seen[0]["loss"]
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


def cut(source: Path, target: Path, num_rows: int) -> None:
    model, tokenizer = load_model(str(source)), load_tokenizer(str(source))
    model.resize_token_embeddings(num_rows)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@pytest.mark.parametrize("name", ["qwen2.5-tied", "qwen2.5-untied"])
def test_padded_heads_train_as_if_they_were_cut(
    folders: dict[str, Path], name: str, tmp_path: Path, prompts: Path
) -> None:
    """A pair such as 151,936 and 152,064 rows gives the step of the pair without padding."""
    rows = 259
    for who in ("student", "teacher"):
        cut(folders[name] / who, tmp_path / "cut" / who, rows)
    weights = []
    for place in (folders[name], tmp_path / "cut"):
        out = tmp_path / f"run-{place.name}"
        train(settings(place, out, prompts), log=lambda _: None)
        weights.append(load_file(out / "student" / "model.safetensors"))
    padded, plain = weights
    start = load_file(folders[name] / "student" / "model.safetensors")
    assert padded.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(padded[key][: len(value)], value, rtol=0, atol=1e-6)
        assert padded[key].shape == start[key].shape
        assert torch.equal(padded[key][len(value) :], start[key][len(value) :])
    moved = max(float((padded[key] - start[key]).abs().max()) for key in start)
    assert moved > 1e-3


def test_a_real_pair_of_padded_heads_takes_a_step(tmp_path: Path, prompts: Path) -> None:
    """151,936 and 152,064 rows themselves, eight wide."""
    sizes = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    for seed, (who, rows) in enumerate([("student", 151936), ("teacher", 152064)]):
        found = Architecture(AutoConfig.for_model("qwen2", **sizes), "a test", is_base=False)
        save_tiny_model(found, rows, seed, tmp_path / who)
    seen: list[dict[str, Any]] = []
    train(settings(tmp_path, tmp_path / "run", prompts), log=lambda _: None, on_step=seen.append)
    assert seen[0]["grad_norm"] > 0
    assert load_model(str(tmp_path / "run" / "student")).config.vocab_size == 151936
