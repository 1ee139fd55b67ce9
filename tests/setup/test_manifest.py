"""A continued run has the prompts, tokenizer, template, weights and date that it began with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tiny import tiny_config
from tutelage.config.parse import changed_keys, current_table, fingerprint, parse_config, to_table
from tutelage.config.schema import Config
from tutelage.data.types import Prompt
from tutelage.errors import RunError
from tutelage.evaluation.evaluate import evaluate
from tutelage.evaluation.request import EvaluationRequest
from tutelage.models import tiny
from tutelage.models.chat.template import printed_date
from tutelage.models.load import load_tokenizer
from tutelage.models.tokenizers import decode, encode_prompt
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.manifest import at_the_date_of_the_run
from tutelage.train.loop import train

TEMPLATE = (
    "{{ strftime_now('%Y-%m-%d') }} {{ enable_thinking }}"
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
)
LORA = {"rank": 2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """A chat student and teacher whose template prints date and switch, and a file of prompts."""
    folder = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("student", "teacher")):
        found = tiny.architecture(str(tiny_models / name))
        tiny.save_tiny_model(found, 270, seed, folder / name)
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)
    lines = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config_of(pair: Path, out: Path, **changes: Any) -> Config:
    """Two steps, evaluated and recorded at both ends."""
    data = {
        "kind": "file",
        "path": str(pair / "prompts.jsonl"),
        "num_held_out": 2,
        "enable_thinking": False,
    }
    return tiny_config(
        pair,
        out,
        **{
            "data": data,
            "evaluation": {"num_problems": 2, "num_samples": 1},
            "recording": {"every": 1, "num_prompts": 1, "num_rollouts": 1},
            "checkpoint_every": 1,
            "num_steps": 1,
        }
        | changes,
    )


def run(config: Config, *allow_change: str) -> None:
    train(config, allow_change=allow_change, log=lambda _: None)


@pytest.fixture(scope="module")
def begun(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step with an adapter, and beside it the files it was made of."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(pair, folder / "pair")
    student = {"model": str(folder / "pair" / "student"), "lora": LORA}
    run(config_of(folder / "pair", folder / "run", student=student))
    return folder


@pytest.fixture
def own(begun: Path, tmp_path: Path) -> Path:
    """A copy of it to be spoiled."""
    shutil.copytree(begun, tmp_path / "own")
    manifest = tmp_path / "own" / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(begun), str(tmp_path / "own")))
    return tmp_path / "own"


def continuation(own: Path, **changes: Any) -> Config:
    student = {"model": str(own / "pair" / "student"), "lora": LORA}
    return config_of(own / "pair", own / "run", student=student, num_steps=2, **changes)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def heavier(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 1.001
    save_file(tensors, path, {"format": "pt"})


SPOILERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a training prompt": (
        lambda f: edit(f / "prompts.jsonl", "1+1=", "1+2="),
        r"the training prompts of data.path = '\S+prompts.jsonl' changed",
    ),
    "a held-out answer": (
        lambda f: (
            [edit(f / "prompts.jsonl", f'"answer": "{2 * i}"', '"answer": "99"') for i in HELD]
            and None
        ),
        r"held-out prompts of data.path = '\S+prompts.jsonl' changed",
    ),
    "the chat template": (
        lambda f: edit(f / "student" / "chat_template.jinja", "%Y-%m-%d", "%d.%m."),
        r"the chat template of student.model = '\S+student' changed",
    ),
    "the tokenizer": (
        lambda f: edit(
            f / "student" / "tokenizer.json",
            '"add_prefix_space": false',
            '"add_prefix_space": true',
        ),
        r"the tokenizer of student.model = '\S+student' changed",
    ),
    "weights under an adapter": (
        lambda f: heavier(f / "student" / "model.safetensors"),
        r"the student of student.model = '\S+student' changed",
    ),
    "the teacher's weights": (
        lambda f: heavier(f / "teacher" / "model.safetensors"),
        r"the teacher of teacher.model = '\S+teacher' changed",
    ),
    "the teacher's configuration": (
        lambda f: edit(
            f / "teacher" / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'
        ),
        r"the teacher of teacher.model = '\S+teacher' changed",
    ),
}
HELD = range(8)


@pytest.mark.parametrize("what", SPOILERS)
def test_what_was_edited_since_is_named_and_nothing_is_lost(own: Path, what: str) -> None:
    spoil, message = SPOILERS[what]
    before = {p: p.read_bytes() for p in (own / "run").rglob("*") if p.is_file()}
    spoil(own / "pair")
    with pytest.raises(RunError, match=message) as caught:
        run(continuation(own), "num_steps")
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in before} == before


def test_an_edit_may_be_allowed_and_is_then_the_run_s_own(own: Path) -> None:
    before = json.loads((own / "run" / "manifest.json").read_text())["inputs"]
    edit(own / "pair" / "prompts.jsonl", "1+1=", "1+2=")
    run(continuation(own), "num_steps", "data.path")
    after = json.loads((own / "run" / "manifest.json").read_text())["inputs"]
    assert {name for name in before if before[name] != after[name]} <= {
        "training prompts",
        "held-out prompts",
    }
    assert before != after


def test_a_run_from_before_there_were_digests_goes_on_and_gets_them(own: Path) -> None:
    path = own / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    digests = manifest.pop("inputs")
    del manifest["started"], manifest["config"]["optimizer"]["decay_all"]
    del manifest["config"]["scoring"], manifest["config"]["recording"]
    path.write_text(json.dumps(manifest))
    run(continuation(own), "num_steps")
    assert json.loads(path.read_text())["inputs"] == digests


def prompts_in(folder: Path, name: str, step: int) -> list[str]:
    lines = (folder / name).read_text().splitlines()
    return [r["prompt"] for r in map(json.loads, lines) if r["step"] == step]


def test_a_continued_run_prints_the_date_it_began_at_and_thinks_as_it_did(own: Path) -> None:
    path = own / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["started"][:10] in prompts_in(own / "run", "samples.jsonl", 0)[0]
    path.write_text(json.dumps(manifest | {"started": "2001-02-03T04:05:06"}))
    run(continuation(own), "num_steps")
    assert json.loads(path.read_text())["started"] == "2001-02-03T04:05:06"
    for name in ("samples.jsonl", "tokens.jsonl"):
        found = prompts_in(own / "run", name, 2)
        assert found
        for prompt in found:  # evaluated, held out for the token viewer, or trained on
            assert prompt.startswith("2001-02-03 False")


class Asked(Exception):
    """The prompt that an evaluation asks a model for."""


def first_prompt(pair: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def ask(sampler: TransformersSampler, request: RolloutRequest) -> None:
        ids = encode_prompt(sampler.tokenizer, request.prompts[0])
        raise Asked(decode(sampler.tokenizer, ids))

    monkeypatch.setattr(TransformersSampler, "sample", ask)
    student, problems = str(pair / "student"), str(pair / "prompts.jsonl")
    with pytest.raises(Asked) as asked:
        evaluate(EvaluationRequest(student, problems, device="cpu", out=str(out)))
    return str(asked.value)


def test_a_continued_evaluation_prints_the_date_it_began_at(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not first_prompt(pair, tmp_path, monkeypatch).startswith("2001")
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "2001-02-03T04:05:06"}))
    assert first_prompt(pair, tmp_path, monkeypatch).startswith("2001-02-03")


def test_a_date_holds_inside_and_the_clock_after(pair: Path) -> None:
    tokenizer = load_tokenizer(str(pair / "student"))
    prompt = Prompt("p", ({"role": "user", "content": "x"},))
    with printed_date(datetime(1999, 12, 31)):
        inside = decode(tokenizer, encode_prompt(tokenizer, prompt))
    assert inside.startswith("1999-12-31")
    assert not decode(tokenizer, encode_prompt(tokenizer, prompt)).startswith("1999")


# --- configurations of earlier versions -----------------------------------------------------------

BASE = {"student": {"model": "s"}, "teacher": {"model": "t"}}


def test_keys_that_came_later_make_no_other_run() -> None:
    config = parse_config(BASE)
    assert changed_keys(current_table(BASE), json.loads(json.dumps(to_table(config)))) == []


def test_a_key_that_came_later_has_the_effect_it_had_without_it() -> None:
    decayed = BASE | {"optimizer": {"weight_decay": 0.1}}
    new = to_table(parse_config(decayed))
    assert changed_keys(current_table(decayed), json.loads(json.dumps(new))) == [
        "optimizer.decay_all"
    ]


def test_keys_that_came_later_leave_the_name_of_a_run() -> None:
    """Written out or left out, a default is the same run; every other value is another."""
    config = parse_config(BASE)
    assert fingerprint(parse_config(to_table(config))) == fingerprint(config)
    lora = replace(config, student=replace(config.student, lora=parse_lora()))
    names = {fingerprint(c) for c in (config, lora, replace(config, seed=1))}
    assert len(names) == 3


def parse_lora() -> Any:
    return parse_config(BASE | {"student": {"model": "s", "lora": {}}}).student.lora


def test_what_is_asked_of_a_run_prints_its_date_and_of_others_today_s(own: Path) -> None:
    path = own / "run" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "2001-02-03T04:05:06"}))
    tokenizer = load_tokenizer(str(own / "pair" / "student"))
    prompt = Prompt("p", ({"role": "user", "content": "x"},))
    rendered = at_the_date_of_the_run(lambda _: decode(tokenizer, encode_prompt(tokenizer, prompt)))
    assert rendered(EvaluationRequest(str(own / "run"))).startswith("2001-02-03")
    for other in (own / "pair" / "student", own / "run" / "student"):
        assert not rendered(EvaluationRequest(str(other))).startswith("2001")
