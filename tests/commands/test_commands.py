"""Every command on the embedded models: what it prints, writes and computes."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import (
    ASSETS,
    LEDGER,
    STUDENT,
    TEACHER,
    TINY,
    Outcome,
    call,
    read_jsonl,
    succeed,
    write_jsonl,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sampling import sample
from tutelage import __version__
from tutelage.commands.progress import Reporter
from tutelage.config.parse import load_config
from tutelage.data.columns import LAST_ANSWER
from tutelage.data.tasks import LedgerTask
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.tiny import Architecture, save_tiny_model
from tutelage.setup.inputs import build_task

COMMANDS = (
    *("demo", "init", "config", "check", "train", "eval", "sample", "score"),
    *("report", "push", "compare", "serve-teacher"),
)
Trained = tuple[Path, Outcome]


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_of_the_command(command: str) -> None:
    text = succeed(command, "--help").out
    assert re.search(rf"^example:\n  tutelage {command}( \S+|$)", text, re.MULTILINE)


def test_help_of_train_has_an_example_of_several_processes() -> None:
    assert (
        "\n  python -m tutelage.commands.launch 2 train configs/" in succeed("train", "--help").out
    )


def test_help_lists_every_command_and_no_other() -> None:
    text = succeed("--help").out
    listed = re.findall(r"^    ([a-z-]+)(?: |$)", text, re.MULTILINE)
    assert listed == list(COMMANDS)


def test_version() -> None:
    assert succeed("--version").out == f"{__version__}\n"


# --- train ----------------------------------------------------------------------------------------


def test_train_as_json_prints_the_metrics_and_nothing_else(trained: Trained) -> None:
    folder, outcome = trained
    assert outcome.records == read_jsonl(folder / "metrics.jsonl")
    assert [record["step"] for record in outcome.records] == [1, 2, 3]
    assert "student at step 0: mean@2" in outcome.err
    assert "student exported to" in outcome.err


def test_metrics_have_the_promised_keys(trained: Trained) -> None:
    promised = {"step", "loss", "num_rows", "num_kept", "reverse_kl_nats", "entropy_nats"}
    promised |= {"grad_norm", "learning_rate", "seconds"}
    for record in read_jsonl(trained[0] / "metrics.jsonl"):
        assert promised <= record.keys()
        assert record["num_kept"] == record["num_rows"] > 0
        assert record["loss"] == pytest.approx(record["reverse_kl_nats"], rel=1e-6)
        assert {"rollout_s", "teacher_s", "learn_s"} <= record["seconds"].keys()


def test_a_run_leaves_everything_behind(trained: Trained) -> None:
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    expected = {"manifest.json", "metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "student"}
    assert expected | {"report.html", "checkpoint-000003"} <= names
    assert "lock" not in names
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["config"]["num_steps"] == 3


@pytest.mark.parametrize(
    ("rule", "keep"), [("soft_or", "0.5"), ("entropy", "0.3"), ("q3", "0.1"), ("random", "0.7")]
)
def test_exactly_the_floor_of_each_completion_is_trained(
    tmp_path: Path, own: Path, rule: str, keep: str
) -> None:
    """Completions of several lengths, drawn again here from the same seeds."""
    overrides = [f"selection.rule={rule}", f"selection.keep={keep}", f"out={tmp_path / 'run'}"]
    succeed("train", own, *overrides)
    first, second = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    lengths = first_lengths(own)
    assert len(set(lengths)) > 1
    assert first["num_rows"] == sum(lengths)
    assert first["num_kept"] == sum(max(1, math.floor(Fraction(keep) * m)) for m in lengths)
    # Every floor loses less than one row; the student of step 2 is not known here.
    lost = Fraction(keep) * second["num_rows"] - second["num_kept"]
    assert 0 <= lost < len(lengths)


def first_lengths(path: Path) -> list[int]:
    """Lengths of the completions of step 1, drawn with the public functions."""
    config = load_config(path)
    prompts = build_task(config.data).prompts(0, config.prompts_per_step, config.seed)
    model, tokenizer = load_model(config.student.model), load_tokenizer(config.student.model)
    rollouts = sample(model, tokenizer, prompts, config.sampling, (config.seed, 1))
    return [len(rollout.completion_ids) for rollout in rollouts]


def test_training_again_finds_the_run_finished(trained: Trained) -> None:
    folder, _ = trained
    before = (folder / "metrics.jsonl").read_bytes()
    again = call(
        "train", LEDGER, *TINY, f"out={folder}", "num_steps=3", "evaluation.num_problems=6",
        "evaluation.num_samples=2",
    )  # fmt: skip
    assert again.code == 0
    assert "is finished: found checkpoint-000003 of 3" in again.out
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_control_c_saves_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Reporter, metrics: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)

    command = ("train", LEDGER, *TINY, f"out={tmp_path / 'run'}")
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "on_step", interrupt)
        stopped = call(*command)
    assert stopped.code == 130
    assert "stopped after step 1; the same command continues" in stopped.out
    continued = succeed(*command)
    assert "continues: found checkpoint-000001 of 2" in continued.out
    steps = [record["step"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1, 2]


def test_allowing_a_change_continues_a_run(tmp_path: Path) -> None:
    command = ("train", LEDGER, *TINY, f"out={tmp_path / 'run'}")
    succeed(*command)
    refused = call("check", *command[1:], "num_steps=3")
    assert refused.code == 2
    assert "num_steps differ" in refused.err
    succeed("check", *command[1:], "num_steps=3", "--allow-change", "num_steps")
    succeed(*command, "num_steps=3", "--allow-change", "num_steps")
    steps = [record["step"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1, 2, 3]


# --- eval and sample ------------------------------------------------------------------------------


def test_the_exported_student_scores_as_in_its_run(trained: Trained) -> None:
    folder, _ = trained
    options = ("--num-prompts", 6, "--num-samples", 2, "--max-new-tokens", 64, "--json")
    (record,) = succeed("eval", folder / "student", *options).records
    recorded = [
        line
        for line in read_jsonl(folder / "evaluation.jsonl")
        if line["model"] == "student" and line["step"] == 3
    ]
    assert len(recorded) == 1
    for key in ("mean_at_k", "pass_at_k", "num_problems", "num_samples", "mean_at_k_low"):
        assert record[key] == recorded[0][key]
    assert record["num_problems"] == 6
    assert record["num_samples"] == 2


def test_the_exported_student_is_a_plain_transformers_model(trained: Trained) -> None:
    """Greedy text of `tutelage sample` equals that of transformers' own generate."""
    folder = trained[0] / "student"
    options = ("--num-prompts", 3, "--num-samples", 1, "--temperature", 0, "--json")
    records = succeed("sample", folder, *options, "--max-new-tokens", 64).records
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for record, prompt in zip(records, LedgerTask().held_out(3), strict=True):
        inputs = tokenizer(prompt.content, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert record["prompt_id"] == prompt.id
        assert record["text"] == text


def test_training_changed_the_student(trained: Trained) -> None:
    """The negative control of the two tests above."""
    options = ("--num-prompts", 6, "--num-samples", 2, "--max-new-tokens", 64, "--json")
    texts = [succeed("sample", m, *options).out for m in (trained[0] / "student", STUDENT)]
    assert texts[0] != texts[1]


def test_eval_in_words_says_what_json_says() -> None:
    options = ("--num-prompts", 4, "--num-samples", 3, "--max-new-tokens", 64)
    (record,) = succeed("eval", TEACHER, *options, "--json").records
    text = succeed("eval", TEACHER, *options).out
    for title, key in (("mean", "mean_at_k"), ("pass", "pass_at_k")):
        low, high = 100 * record[f"{key}_low"], 100 * record[f"{key}_high"]
        assert f"{title}@3  {100 * record[key]:.1f} %  [{low:.1f}, {high:.1f}]" in text
    assert "4 problems, 3 samples each" in text


def test_sample_agrees_with_eval() -> None:
    options = ("--num-prompts", 4, "--num-samples", 2, "--max-new-tokens", 64)
    records = succeed("sample", TEACHER, *options, "--json").records
    (summary,) = succeed("eval", TEACHER, *options, "--json").records
    verdicts = [record["is_correct"] for record in records]
    assert sum(verdicts) / len(verdicts) == pytest.approx(summary["mean_at_k"])
    prompts = {prompt.id: prompt for prompt in LedgerTask().held_out(4)}
    for record in records:
        assert (
            LedgerTask().grade(prompts[record["prompt_id"]], record["text"])
            is (record["is_correct"])
        )
    text = succeed("sample", TEACHER, *options).out
    assert text.count(", right]") == sum(verdicts)
    assert text.count(", wrong]") == len(verdicts) - sum(verdicts)


def test_eval_on_own_prompts_with_and_without_a_grader(own: Path) -> None:
    prompts = own.with_name("own.jsonl")
    command = ("eval", TEACHER, "--prompts", prompts, "--num-samples", 2, "--num-prompts", 3)
    (graded,) = succeed(*command, "--max-new-tokens", 64, "--json").records
    assert graded["num_problems"] == 3
    assert 0.0 <= graded["mean_at_k"] <= 1.0
    (bare,) = succeed(*command, "--max-new-tokens", 8, "--grader", "none", "--json").records
    assert bare["mean_at_k"] is None
    assert bare["pass_at_k"] is None


def test_an_answer_that_is_left_out_of_a_conversation_is_said_once(tmp_path: Path) -> None:
    """As in training, whatever else reads a file of conversations."""
    found = Architecture(AutoConfig.for_model("qwen3"), "", is_base=False)
    for seed, who in enumerate(("student", "teacher")):
        save_tiny_model(found, 267, seed, tmp_path / who)
    user, answer = ({"role": role, "content": "4"} for role in ("user", "assistant"))
    records = [{"messages": [user, answer], "completion": "4"}, {"messages": [user, user]}]
    prompts = write_jsonl(tmp_path / "p.jsonl", *records, {"messages": [answer, user]})
    given = write_jsonl(tmp_path / "c.jsonl", *records[:1])
    config = tmp_path / "c.toml"
    config.write_text(
        f'student.model = "{tmp_path}/student"\nteacher.model = "{tmp_path}/teacher"\n'
        f'[data]\nkind = "file"\npath = "{prompts}"\nnum_held_out = 2\n'
    )
    options = ("--num-samples", 1, "--max-new-tokens", 2)
    said = f"warning: {LAST_ANSWER} (1 prompts)"
    for command in (
        ("eval", tmp_path / "student", "--prompts", prompts, *options),
        ("sample", tmp_path / "student", "--prompts", prompts, *options),
        ("score", config, "--completions", given),
        ("score", config, "--completions", given, "--html", tmp_path / "p.html"),
    ):
        assert succeed(*command).err.splitlines().count(said) == 1, command


# --- score ----------------------------------------------------------------------------------------

STATISTICS = (
    "entropy_nats",
    "normalized_entropy",
    "reverse_kl_nats",
    "forward_kl_nats",
    "teacher_entropy_nats",
)


def test_score_equals_plain_transformers_in_float64(tmp_path: Path, own: Path) -> None:
    out = tmp_path / "tokens.jsonl"
    outcome = succeed("score", own, "data.num_held_out=4", "--num-prompts", 4, "--out", out)
    rows = read_jsonl(out)
    assert f"{len(rows)} tokens written to {out}" in outcome.out
    assert "cuts: 0.3 and 0.05 nats" in outcome.out
    texts = {
        record["id"]: next(record[k] for k in ("prompt", "question", "problem") if k in record)
        for record in read_jsonl(own.with_name("own.jsonl"))
    }
    seen = 0
    for prompt_id, sample_index in dict.fromkeys((r["prompt_id"], r["sample"]) for r in rows):
        group = [r for r in rows if (r["prompt_id"], r["sample"]) == (prompt_id, sample_index)]
        assert_scored(group, texts[prompt_id])
        seen += 1
    assert seen == 8
    assert len({row["quadrant"] for row in rows}) > 1


def assert_scored(rows: list[dict[str, Any]], text: str) -> None:
    """The rows of one completion, against two models run on it alone."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "ledger-teacher")
    assert [row["position"] for row in rows] == list(range(len(rows)))
    tokens = [row["token_id"] for row in rows]
    assert [row["token"] for row in rows] == [tokenizer.decode([token]) for token in tokens]
    ids = [*tokenizer(text).input_ids, *tokens]
    expected = plain_statistics(ids, len(tokens))
    for name, values in zip(STATISTICS, expected, strict=True):
        got = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(got, values, atol=1e-4, rtol=1e-4)
    for row in rows:
        is_uncertain, is_wrong = row["entropy_nats"] > 0.3, row["reverse_kl_nats"] > 0.05
        names = {(True, True): 1, (True, False): 2, (False, True): 3, (False, False): 4}
        assert row["quadrant"] == names[is_uncertain, is_wrong]


@torch.no_grad()
def plain_statistics(ids: list[int], num_tokens: int) -> list[torch.Tensor]:
    """The five statistics of the last `num_tokens` ids, by their definitions."""
    logs = []
    for name in ("ledger-overconfident", "ledger-teacher"):
        model = AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float64)
        logits = model(torch.tensor([ids])).logits[0, -num_tokens - 1 : -1]
        logs.append(torch.log_softmax(logits, dim=-1))
    log_p, log_q = logs
    p, q = log_p.exp(), log_q.exp()
    entropy = -(p * log_p).sum(-1)
    return [
        entropy,
        entropy / math.log(log_p.shape[-1]),
        (p * (log_p - log_q)).sum(-1),
        (q * (log_q - log_p)).sum(-1),
        -(q * log_q).sum(-1),
    ]


def test_score_to_standard_output_is_json_only(own: Path) -> None:
    outcome = succeed("score", own, "--num-prompts", 1, "sampling.num_samples=1")
    assert [record["position"] for record in outcome.records] == [*range(len(outcome.records))]
    assert "quadrant" in outcome.err


# --- check, report, compare -----------------------------------------------------------------------


def test_check_says_what_a_run_would_do(tmp_path: Path) -> None:
    rules = ("selection.rule=q3", "selection.keep=0.25", f"out={tmp_path / 'run'}")
    text = succeed("check", LEDGER, *TINY, *rules).out
    assert "tokenizers agree" in text
    assert "2 steps of 4 prompts x 1 completions, rule q3 keeps 25 % of tokens" in text
    assert "warning" not in text
    assert not (tmp_path / "run").exists()


def test_check_warns_of_another_sampling_distribution(own: Path) -> None:
    assert "warning: completions are not sampled from the distribution" in succeed("check", own).out


def test_check_and_train_warn_of_different_chat_templates(own: Path, tmp_path: Path) -> None:
    for who, template in (("a", "{{ messages[0].content }}"), ("b", "{{ messages[0].content }}>")):
        shutil.copytree(ASSETS / "ledger-teacher", tmp_path / who)
        (tmp_path / who / "chat_template.jinja").write_text(template)
    said = "warning: student and teacher have different chat templates"

    def command(name: str, student: str, chat: str = "true") -> Outcome:
        pair = (f"student.model={tmp_path / student}", f"teacher.model={tmp_path / 'b'}")
        out = f"out={tmp_path / student / chat}"
        return succeed(name, own, *pair, out, f"data.chat={chat}", "num_steps=1")

    assert said in command("check", "a").out
    assert said in command("train", "a").out
    assert "templates" not in command("check", "b").out
    assert "templates" not in command("check", "a", chat="false").out


def test_report_prints_where_the_page_is(tmp_path: Path, trained: Trained) -> None:
    page = tmp_path / "page.html"
    assert succeed("report", trained[0], "--out", page).out == f"{page}\n"
    assert "<html" in page.read_text(encoding="utf-8")
    assert succeed("report", trained[0]).out == f"{trained[0] / 'report.html'}\n"


def test_compare_pairs_runs_and_names_what_differs(tmp_path: Path, trained: Trained) -> None:
    other = tmp_path / "other"
    succeed(
        "train", LEDGER, *TINY, f"out={other}", "num_steps=1", "evaluation.num_problems=6",
        "evaluation.num_samples=2", "evaluation.teacher=false",
    )  # fmt: skip
    (record,) = succeed("compare", trained[0], other, "--json").records
    assert [run["num_steps"] for run in record["runs"]] == [3, 1]
    assert record["config"]["num_steps"] == ["3", "1"]
    (difference,) = record["differences"]
    assert difference["num_problems"] == 6
    means = [run["accuracy"]["value"] for run in record["runs"]]
    assert difference["interval"]["value"] == pytest.approx(means[1] - means[0])
    text = succeed("compare", trained[0], other).out
    assert "Config differences" in text
    assert "paired over 6 problems" in text
