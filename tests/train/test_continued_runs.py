"""What a run leaves behind when it goes on, and what it says before it starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from sampling import sample
from tiny import TOKENIZER, tiny_config
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, ModelError, RunError
from tutelage.models.load import load_model, load_tokenizer
from tutelage.setup.components import build_components
from tutelage.train.checkpoint import list_checkpoints
from tutelage.train.loop import train


def test_a_run_extended_after_its_end_exports_the_new_weights(
    tmp_path: Path, tiny_models: Path
) -> None:
    out = tmp_path / "run"
    train(tiny_config(tiny_models, out, num_steps=2), log=lambda _: None)
    before = load_file(out / "student" / "model.safetensors")
    longer = tiny_config(tiny_models, out, num_steps=4)
    train(longer, allow_change=("num_steps",), log=lambda _: None)
    after = load_file(out / "student" / "model.safetensors")
    last = load_file(out / "checkpoint-000004" / "model" / "model.safetensors")
    assert all(torch.equal(after[name], last[name]) for name in last)
    assert any(not torch.equal(after[name], before[name]) for name in last)
    assert "4 steps" in (out / "student" / "README.md").read_text()


def test_a_finished_run_exports_what_is_missing(tmp_path: Path, tiny_models: Path) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", num_steps=2)
    train(config, log=lambda _: None)
    (tmp_path / "run" / "student" / "model.safetensors").rename(tmp_path / "kept")
    for file in (tmp_path / "run" / "student").iterdir():
        file.unlink()
    (tmp_path / "run" / "student").rmdir()
    train(config, log=lambda _: None)
    again = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert all(torch.equal(again[n], x) for n, x in load_file(tmp_path / "kept").items())


def test_remnants_of_a_killed_save_are_swept(tmp_path: Path, tiny_models: Path) -> None:
    remnant = tmp_path / "run" / ".checkpoint-000001.123.tmp"
    remnant.mkdir(parents=True)
    (remnant / "optimizer.safetensors").write_bytes(b"half")
    train(tiny_config(tiny_models, tmp_path / "run", num_steps=1), log=lambda _: None)
    assert not remnant.exists()


def test_an_unknown_key_to_allow_is_refused(tmp_path: Path, tiny_models: Path) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", num_steps=1)
    with pytest.raises(ConfigError, match="'num_stesp' is no key"):
        train(config, allow_change=("num_stesp",), log=lambda _: None)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"sampling": {"max_new_tokens": 4, "top_p": 0.9}}, "not sampled from the distribution"),
        ({"sampling": {"max_new_tokens": 4}}, None),
    ],
)
def test_sampling_another_distribution_is_said_aloud(
    tmp_path: Path, tiny_models: Path, changes: dict[str, object], part: str | None
) -> None:
    said: list[str] = []
    train(tiny_config(tiny_models, tmp_path / "run", num_steps=1, **changes), log=said.append)
    warned = [line for line in said if line.startswith("warning")]
    assert len(warned) == (part is not None)
    assert part is None or part in warned[0]


def test_a_repeated_prompt_draws_new_samples(tiny_models: Path) -> None:
    model, tokenizer = load_model(str(tiny_models / "student")), load_tokenizer(TOKENIZER)
    prompt = Prompt("same", "a1+1;>")
    settings = SamplingConfig(max_new_tokens=12, num_samples=2)
    once = sample(model, tokenizer, [prompt], settings, (0, 1))
    rollouts = sample(model, tokenizer, [prompt] * 4, settings, (0, 1))
    assert [r.completion_ids for r in rollouts[:2]] == [r.completion_ids for r in once]
    assert len({r.completion_ids for r in rollouts}) == 8


def test_an_architecture_whose_logits_are_more_than_scaled_and_capped_is_refused(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run")
    build_components(config)  # as it is, head and hidden states give the logits
    plain = Qwen3ForCausalLM.forward

    def shifted(self: Qwen3ForCausalLM, *args: object, **kwargs: object) -> object:
        output = plain(self, *args, **kwargs)
        output.logits = output.logits + 0.01 * output.logits.abs()
        return output

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", shifted)
    with pytest.raises(ModelError, match="more than its head times its hidden states"):
        build_components(config)


def test_checkpoints_that_a_killed_run_did_not_remove_go_at_the_next_start(
    tmp_path: Path, tiny_models: Path
) -> None:
    out = tmp_path / "run"
    train(tiny_config(tiny_models, out, keep_checkpoints=9), log=lambda _: None)
    assert [step for step, _ in list_checkpoints(out)] == [2, 4]
    train(tiny_config(tiny_models, out, keep_checkpoints=1), log=lambda _: None)
    assert [step for step, _ in list_checkpoints(out)] == [4]


@pytest.mark.parametrize("kind", ["adamw", "adamw_on_disk", "adafactor"])
def test_a_run_with_weight_decay_goes_on_with_every_weight_s_own_moments(
    tmp_path: Path, tiny_models: Path, kind: str
) -> None:
    """Decayed weights and others are two groups, whose order is not that of the model."""
    optimizer = {"kind": kind, "weight_decay": 0.5, "schedule": "constant", "learning_rate": 1e-2}
    changes = {"optimizer": optimizer, "num_steps": 2, "checkpoint_every": 1}
    train(tiny_config(tiny_models, tmp_path / "whole", **changes), log=lambda _: None)
    train(
        tiny_config(tiny_models, tmp_path / "two", **changes | {"num_steps": 1}),
        log=lambda _: None,
    )
    train(
        tiny_config(tiny_models, tmp_path / "two", **changes),
        allow_change=("num_steps",),
        log=lambda _: None,
    )
    whole, two = (
        load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "two")
    )
    assert all(torch.equal(two[name], whole[name]) for name in whole)


LATER_KEYS = ("micro_batches", "checkpoint_writer", "student.layers", "optimizer.decay_all")
"""Keys of the configuration that the first published version did not have."""


def test_a_run_folder_of_the_first_version_goes_on(tmp_path: Path, tiny_models: Path) -> None:
    out, lines = tmp_path / "run", list[str]()
    changes = {"num_steps": 2, "checkpoint_every": 1, "renormalize": False}
    train(tiny_config(tiny_models, out, **changes), log=lambda _: None)
    whole = load_file(out / "student" / "model.safetensors")
    shutil.rmtree(out / "checkpoint-000002")
    shutil.rmtree(out / "student")
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    config = manifest["config"]
    for key in LATER_KEYS:
        table, _, name = key.rpartition(".")
        del (config[table] if table else config)[name]
    config["renormalise"] = config.pop("renormalize")
    earlier = {key: manifest[key] for key in ("fingerprint", "versions", "hardware", "commit")}
    path.write_text(json.dumps({"config": config, **earlier}))
    with pytest.raises(RunError, match="holds another run: renormalize differ"):
        train(tiny_config(tiny_models, out, **changes | {"renormalize": True}))
    assert train(tiny_config(tiny_models, out, **changes), log=lines.append).is_finished
    assert lines[0].endswith("continues: found checkpoint-000001 of 2")
    again = load_file(out / "student" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
