"""The pair of a real language model: its stories, and a training that can be interrupted."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import build_lm_pair as pair
import lm_stories

from tutelage.grading.number import grade_number

RECIPE = pair.Recipe("teacher", num_examples=12, num_epochs=2, batch_size=4, num_warmup_steps=2)


@pytest.mark.parametrize("split", ["train", "prompts", "test"])
def test_every_solution_is_a_way_to_the_answer(split: str) -> None:
    for story in lm_stories.stories(3, split, 150):
        numbers = [int(n) for n in re.findall(r"\d+", story["prompt"])]
        assert sorted(numbers) == sorted(int(n) for n in _first_three(story))
        assert grade_number(story["solution"], story["answer"])
        for equation in re.findall(r"([\d(][-+*\d() ]*) = (\d+)", story["solution"]):
            assert _value(equation[0]) == int(equation[1])
            assert 1 <= int(equation[1]) <= lm_stories.LARGEST


def _value(expression: str) -> int:
    """Of numbers joined by +, − and ×, the first two in brackets at most."""
    parts = re.findall(r"\d+|[-+*]", expression)
    if "(" not in expression and parts[-2] == "*" and len(parts) > 3:
        raise AssertionError(f"{expression} needs brackets")
    value = int(parts[0])
    for sign, number in zip(parts[1::2], parts[2::2], strict=True):
        value = lm_stories.apply(sign, value, int(number))
    return value


def _first_three(story: dict[str, str]) -> list[str]:
    """The numbers of the prompt, as its solution has them without results."""
    text = re.sub(r"= \d+, \d+|= \d+\. Then \d+", "", story["solution"].split("####")[0])
    return re.findall(r"\d+", re.sub(r"= \d+", "", text))


def test_templates_of_the_test_are_in_no_other_split() -> None:
    shape = lambda story: re.sub(r"\d+", "0", story["prompt"])  # noqa: E731
    tests = {shape(story) for story in lm_stories.stories(1, "test", 200)}
    assert not tests & {shape(story) for story in lm_stories.stories(1, "train", 2000)}
    assert lm_stories.stories(1, "test", 5) == lm_stories.stories(1, "test", 9)[:5]


def test_a_solution_has_several_ways() -> None:
    assert all(len(set(lm_stories.ways(signs, 9, 4, 3))) >= 3 for signs, _ in lm_stories.TRAINING)


def test_a_batch_of_two_micro_batches_has_the_same_loss(tmp_path: Path) -> None:
    examples = _examples()
    losses = []
    for tokens in (4096, 24):
        model = pair.load_model(str(save_tiny_model(tmp_path / "m", seed=1)))
        optimizer = torch.optim.AdamW(model.parameters())
        machine = pair.Machine(micro_batch_tokens=tokens)
        losses.append([pair.update(model, optimizer, examples[:4], machine) for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] < losses[0][0]


def test_an_interrupted_training_ends_like_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "SAVE_EVERY_S", 0.0)  # after every step
    folder, examples = save_tiny_model(tmp_path / "m", seed=1), _examples()

    def trained(state: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        model = pair.load_model(str(folder))
        update, calls = pair.update, []

        def stopping(*parts: object) -> float:
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            calls.append(parts)
            return update(*parts)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(pair, "update", stopping)
            try:
                pair.train(model, examples, RECIPE, pair.Machine(), state, lambda line: None)
            except KeyboardInterrupt:
                assert stop_at is not None
        return dict(model.state_dict())

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "cut", stop_at=3)
    again = trained(tmp_path / "cut")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    trained(tmp_path / "other", stop_at=3)
    monkeypatch.setattr(sys.modules[__name__], "RECIPE", replace(RECIPE, seed=RECIPE.seed + 1))
    with pytest.raises(SystemExit, match=r"other was made with seed = \d+, and \d+ is asked for"):
        trained(tmp_path / "other")


def test_a_finished_model_of_another_recipe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "teacher").mkdir()
    recipe = pair.TASKS["stories"].recipes[0]
    facts = {"recipe": asdict(recipe), "machine": {"precision": "float32"}}
    (tmp_path / "teacher.json").write_text(json.dumps(facts))
    given = ["--task", "stories", "--out", str(tmp_path), "--only", "teacher"]

    def build(*more: str) -> None:
        monkeypatch.setattr("sys.argv", ["build_lm_pair.py", *given, *more])
        pair.main()

    build()  # nothing is left to do
    for more, value in ((("--precision", "bfloat16"), "'bfloat16'"), (("--epochs", "9"), "9")):
        with pytest.raises(SystemExit, match=f"and {value} is asked for"):
            build(*more)


def test_every_epoch_has_every_text_once() -> None:
    examples = _examples()
    found = [example for batch in pair.batches(examples, RECIPE) for example in batch]
    assert sorted(e.ids for e in found) == sorted(e.ids for e in 2 * examples)
    assert found[:12] != found[12:]
    other = replace(RECIPE, seed=2)
    assert found != [example for batch in pair.batches(examples, other) for example in batch]


def test_gsm8k_becomes_prompts_with_marked_answers(tmp_path: Path) -> None:
    row = {"id": "a/1", "problem": "How many?", "answer": "12", "solution": "6 + 6 = 12"}
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(row) + "\n")
    pair.write_data("gsm8k", tmp_path / "data", source, source)
    for split in ("train", "prompts", "test"):
        found = json.loads((tmp_path / "data" / f"{split}.jsonl").read_text())
        assert found["prompt"] == "Question: How many?\nAnswer:"
        assert found["solution"] == " 6 + 6 = 12\n#### 12"


def _examples() -> list[pair.Example]:
    return [pair.Example(tuple(range(3, 9 + n % 4 + n // 4)), 3 + n % 2) for n in range(12)]


def test_a_card_has_the_command_that_makes_the_model() -> None:
    facts = {
        "model": "package:m",
        "num_texts": 12,
        "parameters": 9,
        "minutes": 1.0,
        "last_loss_nats": 0.5,
        "torch": "2",
        "transformers": "5",
        "test": {"mean_at_k": 0.1},
        "num_problems": 2,
        "num_samples": 2,
        "machine": asdict(pair.Machine()),
    }
    for layers, word in ((None, "--examples 12 --epochs 2 --precision"), (4, "--layers 4")):
        recipe = asdict(replace(RECIPE, num_layers=layers))
        card = pair.card(pair.TASKS["stories"], facts | {"recipe": recipe})
        assert word in card
        assert ("pruned to 4 layers" in card) is (layers is not None)
