"""`tutelage check --dry-run`: every recipe takes a real step, and one that cannot is refused."""

from __future__ import annotations

import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from tutelage.commands import dry_run as dryrun
from tutelage.commands.dry_run import dry_run
from tutelage.config.parse import load_config, parse_config
from tutelage.errors import ModelError, RunError
from tutelage.train.checkpoint import load_optimizer
from tutelage.train.step import Step

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob("*.toml")
    if "smollm2" not in path.name
)
HUB = {"student": {"model": "Qwen/Qwen3-0.6B"}, "teacher": {"model": "Qwen/Qwen3-8B"}}


QUICK_VARIANTS = (
    "tip/tip_qwen3_8b_4b_1gpu_24gb.toml",
    "eopd/eopd_qwen3_4b_1gpu_24gb.toml",
)
"""Of the recipes for one GPU, those that are tried every time."""


def recipe(name: str) -> Any:
    """A recipe as a case; other variants of a recipe for one GPU are slow."""
    is_slow = "_1gpu_" in name and name not in QUICK_VARIANTS
    return pytest.param(name, marks=[pytest.mark.slow] if is_slow else [])


@pytest.fixture(autouse=True)
def nothing_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Away from the checkout: recipes find no data of their own, and leave nothing behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUTELAGE_DATA", raising=False)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*map(recipe, RECIPES)])
def test_every_recipe_takes_a_step(name: str) -> None:
    if "4bit" in (CONFIGS / name).read_text():
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("peft")
    config = load_config(CONFIGS / name)
    lines = list(dry_run(config))
    assert lines[-3].startswith("one step ran: loss "), lines
    assert lines[-2].startswith("saved and exported; read back")
    assert lines[-1].startswith("continued from the checkpoint of step 1")
    assert any(line.startswith("scaled: num_steps ") for line in lines)
    is_scaled = [line for line in lines if line.startswith("scaled: ")]
    kept = ("selection", "objective", "optimizer", "weighting", "teacher", "student.dtype")
    assert not [line for line in is_scaled if line.split()[1].startswith(kept)]


def test_layers_that_run_on_cuda_alone_are_tried_as_transformers_own() -> None:
    config = load_config(
        CONFIGS / "examples" / "ledger.toml", ["student.layers=liger", "device=cpu"]
    )
    lines = list(dry_run(config))
    assert lines[-1].startswith("continued from the checkpoint of step 1")
    assert any(line.startswith("scaled: student.layers ") for line in lines)


def test_the_papers_settings() -> None:
    """What the methods' notes say, read from the files and not from what made them."""
    tip = {name: tomllib.loads((CONFIGS / "tip" / f"tip_{name}.toml").read_text()) for name in
           ("qwen3_8b_4b", "llama_70b_8b", "qwen25_14b_1_5b")}  # fmt: skip
    rates = {name: table["optimizer"]["learning_rate"] for name, table in tip.items()}
    assert rates == {"qwen3_8b_4b": 1e-6, "llama_70b_8b": 3e-7, "qwen25_14b_1_5b": 1e-6}
    for table in tip.values():
        assert (table["prompts_per_step"], table["sampling"]["num_samples"]) == (8, 16)
        assert (table["data"]["max_prompt_tokens"], table["sampling"]["max_new_tokens"]) == (
            2048,
            8192,
        )
        assert (table["selection"]["rule"], table["selection"]["keep"]) == ("soft_or", 0.5)
    for size in ("0_6b", "1_7b", "4b"):
        table = tomllib.loads((CONFIGS / "eopd" / f"eopd_qwen3_{size}.toml").read_text())
        objective = {"kind": "eopd", "estimator": "sampled", "fkl": "topk_renorm", "k": 16,
                     "threshold": 0.8, "forward_weight": 1.0, "clip": 0.2}  # fmt: skip
        assert table["objective"] == objective
        assert (table["prompts_per_step"], table["updates_per_step"]) == (128, 4)
        assert table["optimizer"]["learning_rate"] == 3e-6
        assert table["sampling"]["max_new_tokens"] == 4096
        assert table["data"]["enable_thinking"] is False


@pytest.mark.parametrize(
    ("ref", "kind", "tied"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "LlamaForCausalLM", "tied"),
        ("google/gemma-2-2b-it", "Gemma2ForCausalLM", "tied"),
        ("google/gemma-3-1b-it", "Gemma3ForCausalLM", "tied"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "LlamaForCausalLM", "tied"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2ForCausalLM", "untied"),
    ],
)
def test_known_families_without_network(ref: str, kind: str, tied: str) -> None:
    lines = list(dry_run(parse_config({"student": {"model": ref}, "teacher": {"model": ref}})))
    assert f"a tiny random {kind}, {tied} head" in lines[0]
    assert lines[-3].startswith("one step ran: ")


def test_heads_of_different_size_stay_different() -> None:
    config = load_config(CONFIGS / "tip" / "tip_qwen25_14b_1_5b.toml")
    student, teacher, *_ = dry_run(config)
    assert "head of 267 rows" in student
    assert "151,936" in student
    assert "head of 395 rows" in teacher
    assert "152,064" in teacher


def test_a_model_of_one_layer_is_no_exception(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("one-layer")
    Qwen3Config(num_hidden_layers=1).save_pretrained(folder)
    lines = list(dry_run(parse_config(HUB | {"student": {"model": str(folder)}})))
    assert lines[-3].startswith("one step ran: ")


def test_own_prompts_are_used_where_they_are(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "three and more"}\n{"prompt": "two"}\n')
    table = HUB | {"data": {"kind": "file", "path": str(path), "num_held_out": 1}}
    lines = list(dry_run(parse_config(table)))
    assert f"data: 3 prompts of {path}, the shortest of its first 3" in lines


def test_a_model_that_is_nowhere_is_one_line() -> None:
    table: dict[str, Any] = HUB | {"teacher": {"model": "no-such-folder"}}
    with pytest.raises(ModelError, match="'no-such-folder' does not exist"):
        list(dry_run(parse_config(table)))


def test_a_step_that_teaches_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: student and teacher from the same seed agree, and nothing is learned."""
    save = dryrun.save_tiny_model
    monkeypatch.setattr(dryrun, "save_tiny_model", lambda a, n, seed, f: save(a, n, 0, f))
    with pytest.raises(RunError, match="trained nothing"):
        list(dry_run(parse_config({name: {"model": "Qwen/Qwen3-8B"} for name in HUB})))


def test_completions_of_a_prompt_have_unequal_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[list[int]] = []
    write = Step.generate

    def noted(step: Step, number: int) -> Any:
        drawn = write(step, number)
        lengths.append([len(r.completion_ids) for r in drawn])
        return drawn

    monkeypatch.setattr(Step, "generate", noted)
    list(dry_run(parse_config(HUB)))
    assert len(lengths) == 3  # two steps, and the second again
    assert lengths[1] == lengths[2]
    assert all(len(found) >= 4 and len(set(found)) > 1 for found in lengths)


def test_an_export_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    load = dryrun.load_model

    def other(*args: Any) -> Any:
        model = load(*args)
        model.get_output_embeddings().weight.data.mul_(1.1)
        return model

    monkeypatch.setattr(dryrun, "load_model", other)
    with pytest.raises(RunError, match="the exported student is not the trained one"):
        list(dry_run(parse_config(HUB)))


def test_a_continuation_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(path: Path, components: Any, optimizer: Any) -> None:
        load_optimizer(path, components, optimizer)
        for state in optimizer.state.values():
            state["exp_avg"].zero_()

    monkeypatch.setattr("tutelage.train.loop.load_optimizer", forgetful)
    with pytest.raises(RunError, match="continued from its checkpoint is another run"):
        list(dry_run(parse_config(HUB)))


def test_a_signal_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops in order, so that nothing is left to compare."""
    write = Step.generate

    def interrupted(step: Step, number: int) -> Any:
        signal.raise_signal(signal.SIGINT)
        return write(step, number)

    monkeypatch.setattr(Step, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(dry_run(parse_config(HUB)))
