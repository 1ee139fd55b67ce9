"""A teacher with another tokenizer: which tokens a step learns from, and what of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tiny_runs import metrics_of
from tutelage.commands.check import check
from tutelage.config.parse import parse_config
from tutelage.config.schema import Config
from tutelage.data.types import Rollout
from tutelage.errors import ConfigError, ModelError
from tutelage.evaluation.verdict import verdict_of
from tutelage.models.alignment import AlignedReading
from tutelage.models.load import save_model
from tutelage.models.tokenizers import encode_prompt
from tutelage.setup import alignment
from tutelage.setup.components import build_components
from tutelage.setup.inputs import load_inputs
from tutelage.setup.objective import uniform_terms
from tutelage.train.loop import train
from tutelage.train.score_request import ScoreRequest
from tutelage.train.snapshot import score_for_page
from tutelage.train.step import Step
from tutelage.train.token_scores import score

PROMPTS = [{"prompt": f"the sum of {n} and two is", "answer": str(n + 2)} for n in range(12)]


def tokenizer_of(size: int, end: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the prompts, with a chat template of its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([each["prompt"] for each in PROMPTS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)
    tokenizer.chat_template = "{% for m in messages %}" + end[1] + "{{ m['content'] }}{% endfor %} "
    return tokenizer


def pieces(end: str) -> PreTrainedTokenizerFast:
    """Words of the prompts and byte tokens as Llama 2 has them, with such a template."""
    merges = list(
        dict.fromkeys(
            (word[:n], word[n])
            for word in ("▁sum", "▁of", "▁and", "▁two", "▁is", "the")
            for n in range(1, len(word))
        )
    )
    texts = [end, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map("".join, merges)]
    texts += sorted({c for each in PROMPTS for c in each["prompt"] if c != " "})
    vocab = {text: i for i, text in enumerate(texts)}
    core = Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)
    tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.chat_template = "{% for m in messages %}s{{ m['content'] }}{% endfor %}]"
    return tokenizer


def save(folder: Path, size: int, end: str, seed: int) -> Path:
    """A random model; `size` 0 is of SentencePiece's kind."""
    tokenizer = tokenizer_of(size, end) if size else pieces(end)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.25,
    )
    torch.manual_seed(seed)
    save_model(Qwen3ForCausalLM(config).eval(), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("aligned")
    save(found / "student", 300, "<end>", 0)
    save(found / "teacher", 275, "<stop>", 1)
    save(found / "same", 300, "<end>", 2)
    save(found / "pieces", 0, "<stop>", 3)
    (found / "prompts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in PROMPTS))
    return found


@pytest.fixture
def table(folder: Path) -> Callable[..., dict[str, Any]]:
    def make(teacher: str = "teacher", **changes: Any) -> dict[str, Any]:
        return {
            "student": {"model": str(folder / "student")},
            "teacher": {
                "model": str(folder / teacher),
                "vocabulary": "aligned",
                "stop_token": "class",
            },
            "data": {
                "kind": "file",
                "path": str(folder / "prompts.jsonl"),
                "num_held_out": 2,
                "grader": "number",
            },
            "objective": {"kind": "topk", "support": "student", "k": 4},
            "sampling": {"num_samples": 2, "max_new_tokens": 16},
            "evaluation": {"num_problems": 2, "num_samples": 1, "teacher": False},
            "num_steps": 2,
            "prompts_per_step": 2,
            "micro_batch_size": 3,
            "checkpoint_every": 0,
            "device": "cpu",
            **changes,
        }

    return make


def step_of(config: Config) -> Step:
    components = build_components(config)
    optimizer = torch.optim.SGD(components.student.parameters(), lr=0.1)
    return Step(config, components, Accelerator(cpu=True), components.student, optimizer)


@pytest.mark.parametrize(
    "method", [{}, {"selection": {"rule": "soft_or"}}, {"micro_batches": "packed"}], ids=str
)
def test_a_step_learns_from_the_aligned_tokens(table: Any, method: dict[str, Any]) -> None:
    step = step_of(parse_config(table(**method)))
    metrics = step.take(1)
    reading = step.components.reading
    assert isinstance(reading, AlignedReading)
    masks = [reading.aligner(r.completion_ids).of_student for r in step.rollouts]
    num_aligned, num_tokens = sum(map(sum, masks)), sum(map(len, masks))
    assert 0 < num_aligned < num_tokens
    assert metrics["num_rows"] == num_aligned
    assert metrics["aligned_share"] == pytest.approx(num_aligned / num_tokens)
    assert 0.8 < metrics["shared_share"] < 1
    assert metrics["num_nonfinite"] == 0
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("kind", ["teacher", "pieces"])
def test_the_teacher_predicts_each_row_behind_the_same_text(table: Any, kind: str) -> None:
    """Rows of the teacher against its forward pass over its own prompt and the text so far.

    A turn begins with a space for the teacher of SentencePiece's kind, whose prompt ends in "]".
    """
    step = step_of(parse_config(table(kind, prompts_per_step=6)))
    rollouts = step.generate(1)
    learned = step.learned(rollouts)
    batches = step.pack(learned, 1)
    step.teacher_forward(batches)
    reading, teacher = step.components.reading, step.components.teacher
    assert isinstance(reading, AlignedReading)
    num_checked = 0
    for one in batches:
        view = one.teacher_logits
        assert view is not None
        logits, row = view.block(0, len(view)), 0
        for name in one.batch.names:
            rollout = learned[name]
            prompt = reading([rollout])[0].prompt_ids
            assert reading.aligner.teacher.decode(prompt).startswith("s")  # its own template
            space = " " if kind == "pieces" else ""
            for place, is_row in enumerate(rollout.is_generated):
                if not is_row:
                    continue
                text = reading.aligner.student.decode(rollout.completion_ids[:place])
                ids = [*prompt, *reading.aligner.encode(space + text, 1)]
                exact = teacher.model(torch.tensor([ids])).logits[0, -1, : logits.shape[1]]
                torch.testing.assert_close(logits[row], exact, rtol=1e-4, atol=1e-4)
                row, num_checked = row + 1, num_checked + 1
    assert num_checked > 5


def written(step: Step, texts: list[str]) -> list[Rollout]:
    """Completions in the student's own tokens, ended by its stop."""
    tokenizer, prompts = step.components.tokenizer, step.components.task.prompts(0, 1, 0)
    ids = tuple(encode_prompt(tokenizer, prompts[0]))
    return [
        Rollout(prompts[0], i, ids, (*tokenizer(text).input_ids, tokenizer.eos_token_id))
        for i, text in enumerate(texts)
    ]


def test_equal_tokenizers_learn_as_from_one_vocabulary(table: Any) -> None:
    """The objective and its gradient in float64, through packing and both forward passes."""
    found = []
    for vocabulary in ("same", "aligned"):
        made = table("same", prompts_per_step=3)
        made["teacher"]["vocabulary"] = vocabulary
        config = parse_config(made)
        step = step_of(config)
        student, teacher = step.components.student, step.components.teacher
        student.double()
        teacher.model.double()
        rollouts = step.learned(written(step, ["the sum of 3", " and two", " is 5 the sum"]))
        assert step.checks.get("aligned_share", 1.0) == 1.0
        value = torch.zeros((), dtype=torch.float64)
        batches = step.pack(rollouts, 1)
        step.teacher_forward(batches)
        for one in batches:
            assert one.teacher_logits is not None
            rows, terms = torch.arange(one.batch.num_rows), uniform_terms(config.objective)
            objective = student(one.batch, teacher.to_device(one.teacher_logits), rows, terms)
            objective.total.backward()
            value = value + objective.total.detach()
        found.append([value, *(p.grad for p in student.parameters())])
    assert float(found[0][0]) > 0.1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_whole_run_evaluates_and_saves(table: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(parse_config(table(out=str(out), weighting={"kind": "ida"})), log=lambda _: None)
    for row in metrics_of(out):
        assert 0 < row["aligned_share"] < 1
        num_tokens = row["num_rows"] / row["aligned_share"]
        assert row["completion_length_mean"] == pytest.approx(num_tokens / 4)
    first = json.loads((out / "evaluation.jsonl").read_text().splitlines()[0])
    lines = (out / "evaluation_rows.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] == 0]
    assert 0 < sum(r["num_rows"] for r in rows) < sum(r["num_tokens"] for r in rows)
    # a mean over the aligned tokens, in the verdict too
    ratio = sum(r["reverse_kl_nats"] for r in rows) / sum(r["num_rows"] for r in rows)
    assert first["held_out_reverse_kl_nats"] == pytest.approx(ratio)
    found = verdict_of([*rows, *({**r, "step": 2} for r in rows)], 2)
    assert found is not None
    assert f"reverse KL {ratio:.4g} ->" in found.reason


def test_it_is_checked_with_its_own_prompts(table: Any, folder: Path, tmp_path: Path) -> None:
    lines = list(check(parse_config(table(out=str(tmp_path / "run"))), "tiny"))
    assert not any("chat templates" in line for line in lines)
    (line,) = [line for line in lines if line.startswith("vocabulary: ")]
    assert line.endswith("ids shared with the teacher's tokenizer, which has 275")
    inputs = load_inputs(parse_config(table()))
    prompts = inputs.task.prompts(0, 2, 0) + inputs.task.prompts(1, 2, 0) + inputs.task.held_out(2)
    longest = max(len(encode_prompt(inputs.teacher_tokenizer, prompt)) for prompt in prompts)
    assert longest > max(len(encode_prompt(inputs.tokenizer, prompt)) for prompt in prompts)
    teacher = shutil.copytree(folder / "teacher", tmp_path / "teacher")
    settings = json.loads((teacher / "config.json").read_text())
    settings["max_position_embeddings"] = longest + 15
    (teacher / "config.json").write_text(json.dumps(settings))
    made = table(str(teacher), out=str(tmp_path / "run"))
    (line,) = [line for line in check(parse_config(made), "tiny") if "positions" in line]
    assert f"the longest prompt has {longest} tokens and sampling.max_new_tokens is 16" in line
    assert f"the {longest + 15} positions of the teacher" in line


@pytest.mark.parametrize("function", [score, score_for_page])
def test_tokens_are_not_scored(table: Any, function: Any) -> None:
    with pytest.raises(ConfigError, match=r"tokens cannot be scored with teacher\.vocabulary"):
        function(parse_config(table()), ScoreRequest())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"objective": {"kind": "kl"}}, "objective.support = student"),
        ({"objective": {"kind": "topk"}}, "objective.support = student"),
        ({"evaluation": {}}, "evaluation.teacher = false"),
        ({"diagnostics": "kept"}, "diagnostics = all"),
        ({"recording": {"every": 1}}, "recording.every = 0"),
        ({"data": {"kind": "ledger_tools"}}, "single answers"),
    ],
)
def test_what_needs_every_token_is_refused(table: Any, change: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=f"teacher.vocabulary must be same without .*{what}"):
        parse_config(table(**change))


def test_stops_are_a_class(table: Any) -> None:
    made = table()
    made["teacher"]["stop_token"] = "map"
    with pytest.raises(ConfigError, match=r"teacher\.stop_token = class"):
        parse_config(made)


@pytest.mark.parametrize("name", ["LEAST_SHARED", "LEAST_ALIGNED"])
def test_too_little_in_common_is_one_line(
    table: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(alignment, name, 1.1)
    with pytest.raises(ModelError, match="Choose models with closer tokenizers"):
        build_components(parse_config(table()))


def test_recorded_numbers_follow_the_rows(table: Any) -> None:
    step = step_of(parse_config(table()))
    rollouts = [
        replace(r, hidden=torch.arange(len(r.completion_ids))[:, None], logprobs=tuple(
            float(i) for i in range(len(r.completion_ids))
        ))
        for r in step.generate(1)
    ]  # fmt: skip
    for before, after in zip(rollouts, step.learned(rollouts), strict=True):
        places = [i for i, is_row in enumerate(after.is_generated) if is_row]
        assert after.hidden is not None
        assert after.hidden.squeeze(1).tolist() == places == [int(x) for x in after.logprobs]
        assert after.completion_ids == before.completion_ids
