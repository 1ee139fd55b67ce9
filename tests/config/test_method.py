"""Every selection, objective and weighting from TOML to one step; what each of them refuses."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tiny import MEASURED, tiny_config, tiny_table
from tutelage.config.method import EOPDObjective
from tutelage.config.parse import load_config, parse_config
from tutelage.config.schema import Config
from tutelage.config.selection import Normalization
from tutelage.config.teachers import NEED_ALL_IDS
from tutelage.core import NORMALIZATIONS, RULES, TokenStats
from tutelage.core.terms import ReverseKL
from tutelage.core.weighting import GATES
from tutelage.data.batch import Batch, collate
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError
from tutelage.models.student import Student
from tutelage.setup.components import Components, build_components
from tutelage.setup.objective import row_weights
from tutelage.train.loop import train
from tutelage.train.step import Step

SELECTIONS = {
    "all": 'rule = "all"',
    "random": 'rule = "random"\nkeep = 0.3',
    "entropy": 'rule = "entropy"\nnormalization = "minmax"',
    "entropy_sample": 'rule = "entropy_sample"\nkeep = 0.3\ncorrect_sampling = true',
    "soft_or": 'rule = "soft_or"\nnormalization = "minmax_p98_both"',
    "soft_or_sample": 'rule = "soft_or_sample"\ncorrect_sampling = true\nscope = "batch"',
    "q3": 'rule = "q3"\nkeep = 0.1',
    "divergence": 'rule = "divergence"\nkeep = 0.1\nscope = "batch"',
    "forward_divergence": 'rule = "forward_divergence"\nkeep = 0.1',
    "bottom": 'rule = "bottom"\nnormalization = "quantile_05_95"',
    "lowest_logprob": 'rule = "lowest_logprob"\nkeep = 0.2',
    "probability_gap": 'rule = "probability_gap"\nb = 0.5\nkeep = 0.2',
    "extreme_advantage": 'rule = "extreme_advantage"\nend = "max"\nkeep = 0.001',
    "influence": 'rule = "influence"\nusefulness = "teachability"\nkeep = 0.2',
    "first_n": 'rule = "first_n"\nnum_tokens = 3',
    "teachability": 'rule = "teachability"\nkeep = 0.05',
    "gradient_norm": 'rule = "gradient_norm"\nkeep = 0.2',
    "local_oracle": 'rule = "local_oracle"\nkeep = 0.2',
    "local_gain": 'rule = "local_gain"\nkeep = 0.2',
}
OBJECTIVES = {
    "kl": 'kind = "kl"\nreverse_weight = 0.5\nforward_weight = 0.5',
    "jsd": 'kind = "jsd"\nteacher_weight = 0.1',
    "skew": 'kind = "skew_reverse_kl"\nalpha = 0.2',
    "akl": 'kind = "akl"',
    "topk": 'kind = "topk"\nk = 4',
    "topk_forward": 'kind = "topk"\ndirection = "forward"',
    "topk_student": 'kind = "topk"\nsupport = "student"',
    "sampled": 'kind = "sampled"\nclip = 0.1',
    "tropd": 'kind = "tropd"\nk = 4',
    "tropd_renorm": 'kind = "tropd"\nfkl = "topk_renorm"\nclip = 0.1',
    "eopd": 'kind = "eopd"',
    "eopd_sampled": 'kind = "eopd"\nestimator = "sampled"\nfkl = "topk_renorm"',
    "eopd_soft": 'kind = "eopd"\ngate = "soft"\nwidth = 0.2\nfkl = "topk_tail"\nk = 4',
    "eopd_percentile": 'kind = "eopd"\ngate = "percentile"\nthreshold = 0.8',
    "grpo": 'kind = "grpo"',
    "grpo_teacher": 'kind = "grpo"\nscale = "none"\nclip_high = 0.28\ndistillation_weight = 0.5',
    "opsa": 'kind = "opsa"\nclip = 0.1',
}
TEACHERLESS = ("grpo", "opsa")
"""Objectives of steps that read no teacher, with a rule and a weighting that need none."""
WEIGHTINGS = {
    "none": 'kind = "none"',
    "selectkd": 'kind = "selectkd"\noutside = 0.1',
    "ida": 'kind = "ida"',
    "fire": 'kind = "fire"\ndrop = 0.25',
    "paced": 'kind = "paced"',
    "reward": 'kind = "reward"\nbeta = 0.5',
}


def toml(models: Path, selection: str, objective: str, weighting: str) -> str:
    """A whole configuration as a user would write it."""
    return f"""
        prompts_per_step = 4
        micro_batch_size = 3
        device = "cpu"
        student.model = "{models / "student"}"
        teacher.model = "{models / "teacher"}"
        data = {{ kind = "ledger", num_items = 1 }}
        sampling = {{ num_samples = 2, max_new_tokens = 10 }}
        [selection]
        {selection}
        [objective]
        {objective}
        [weighting]
        {weighting}
    """


@pytest.fixture(scope="module")
def take(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: Path
) -> Callable[..., dict[str, Any]]:
    """Metrics of step 1, and what changed, for a selection, an objective and a weighting."""
    path = tmp_path_factory.mktemp("toml") / "run.toml"

    def run(selection: str = "all", objective: str = "kl", weighting: str = "none") -> Any:
        path.write_text(
            toml(tiny_models, SELECTIONS[selection], OBJECTIVES[objective], WEIGHTINGS[weighting])
        )
        return one_step(load_config(path))

    return run


def one_step(config: Config) -> dict[str, Any]:
    """One plain gradient step; every prompt's first sample counts as correct."""
    components = build_components(config)
    graded = itertools.cycle([True, False])
    object.__setattr__(components, "task", Graded(components.task, graded))
    before = [p.detach().clone() for p in components.student.parameters()]
    optimizer = torch.optim.SGD(components.student.parameters(), lr=0.1)
    metrics = Step(config, components, Accelerator(cpu=True), components.student, optimizer).take(1)
    pairs = zip(before, components.student.parameters(), strict=True)
    return metrics | {"change": max(float((a - b).detach().abs().max()) for a, b in pairs)}


class Graded:
    """A task whose verdicts are known: a random student is never right."""

    def __init__(self, task: Any, verdicts: Any) -> None:
        self.task, self.verdicts = task, verdicts

    def prompts(self, *arguments: Any) -> list[Prompt]:
        found: list[Prompt] = self.task.prompts(*arguments)
        return found

    def grade(self, prompt: Prompt, text: str, is_truncated: bool) -> bool:
        return bool(next(self.verdicts))


def assert_sound(metrics: dict[str, Any]) -> None:
    assert 0 < metrics["num_kept"] <= metrics["num_rows"]
    assert metrics["num_nonfinite"] == 0
    assert metrics["grad_norm"] > 0
    assert metrics["change"] > 0
    if metrics["reverse_kl_nats"] is None:  # no teacher was read
        assert metrics["quadrants"] == {}
        assert "teacher_s" not in metrics["seconds"]
        return
    shares = [q["share"] for q in metrics["quadrants"].values()]
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    assert sum(q["kl_mass"] for q in metrics["quadrants"].values()) == pytest.approx(1, abs=1e-9)


def test_no_rule_and_no_kind_was_forgotten() -> None:
    assert set(SELECTIONS) == set(RULES)
    assert set(NEED_ALL_IDS) == {name for name, rule in RULES.items() if rule.extras}
    assert get_args(Normalization) == NORMALIZATIONS
    assert get_args(get_type_hints(EOPDObjective)["gate"]) == GATES
    for name, table in (("objective", OBJECTIVES), ("weighting", WEIGHTINGS)):
        written = {tomllib.loads(text)["kind"] for text in table.values()}
        with pytest.raises(ConfigError) as caught:
            parse_config(
                {name: {"kind": "?"}, "student": {"model": "s"}, "teacher": {"model": "t"}}
            )
        listed = str(caught.value).partition("must be one of ")[2].partition(", got")[0]
        assert written == set(listed.split(", "))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_rule_trains(take: Callable[..., dict[str, Any]], selection: str) -> None:
    metrics = take(selection=selection)
    assert_sound(metrics)
    assert (metrics["num_kept"] == metrics["num_rows"]) == (selection == "all")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(take: Callable[..., dict[str, Any]], objective: str) -> None:
    metrics = take(objective=objective)
    assert_sound(metrics)
    assert (metrics["reverse_kl_nats"] is None) == (objective in TEACHERLESS)
    assert ("reward_mean" in metrics) == ("grade_s" in metrics["seconds"]) == ("grpo" in objective)
    assert ("outside_trust_share" in metrics) == objective.startswith("tropd")
    assert 0 < metrics.get("outside_trust_share", 0.5) < 1
    if objective.startswith("eopd"):
        assert 0 <= metrics["gate_share"] <= 1
        if objective in ("eopd", "eopd_sampled"):  # the gate is hard, at 0.8 nats
            high = metrics["high_entropy"]
            assert metrics["gate_share"] == pytest.approx(high["teacher_share"])
            assert metrics["gated_forward_kl_nats"] == pytest.approx(high["forward_kl_nats"])
    else:
        assert metrics["gate_share"] is None


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_trains(take: Callable[..., dict[str, Any]], weighting: str) -> None:
    assert_sound(take(weighting=weighting))


COMBINATIONS = [
    ("soft_or", "eopd", "none"),
    ("q3", "eopd_sampled", "paced"),
    ("first_n", "jsd", "reward"),
    ("teachability", "akl", "selectkd"),
    ("soft_or_sample", "eopd_soft", "fire"),
    ("entropy_sample", "sampled", "paced"),
    ("random", "topk", "fire"),
    ("local_oracle", "skew", "reward"),
    ("gradient_norm", "topk_forward", "selectkd"),
    ("bottom", "eopd_percentile", "reward"),
    ("local_gain", "topk_student", "selectkd"),
    ("divergence", "akl", "fire"),
    ("q3", "grpo", "none"),
    ("entropy", "grpo_teacher", "paced"),
    ("lowest_logprob", "opsa", "paced"),
    ("probability_gap", "sampled", "ida"),
    ("extreme_advantage", "tropd", "none"),
    ("forward_divergence", "tropd_renorm", "ida"),
    ("influence", "eopd", "selectkd"),
]


@pytest.mark.parametrize(("selection", "objective", "weighting"), COMBINATIONS)
def test_methods_compose(
    take: Callable[..., dict[str, Any]], selection: str, objective: str, weighting: str
) -> None:
    assert_sound(take(selection, objective, weighting))


def test_the_sample_of_combinations_has_every_rule_kind_and_objective() -> None:
    seen = [set(column) for column in zip(*COMBINATIONS, strict=True)]
    assert seen[1] | {"kl"} == set(OBJECTIVES)
    assert seen[2] == set(WEIGHTINGS)
    assert len(seen[0]) == len(COMBINATIONS) - 1  # q3 twice


def test_metrics_hold_the_diagnostics(take: Callable[..., dict[str, Any]]) -> None:
    metrics = take(objective="eopd_percentile")
    assert 0.1 <= metrics["gate_share"] <= 0.3  # the upper fifth
    assert 0 < metrics["teacher_top16_mass"] <= 1
    assert metrics["high_entropy"].keys() == {
        "teacher_share", "student_share", "reverse_kl_nats", "forward_kl_nats"
    }  # fmt: skip
    for name in ("duplicate_share", "truncated_share", "kept_kl_share"):
        assert 0 <= metrics[name] <= 1
    for quadrant in metrics["quadrants"].values():
        assert quadrant.keys() == {"share", "kl_mass", "kept_share"}
    json.dumps(metrics, allow_nan=False)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"selection": 'rule = "soft_or"\nkeep = 0'}, "selection.keep must be in (0, 1], got 0.0."),
        ({"selection": 'rule = "random"\nkeep = 1.5'}, "(0, 1], got 1.5. Use keep = 1.0"),
        ({"selection": 'rule = "q3"\nkeep = nan'}, "selection.keep must be in (0, 1], got nan."),
        ({"selection": 'rule = "soft_orr"'}, "got 'soft_orr'. Did you mean 'soft_or'?"),
        ({"selection": 'rule = "first_n"'}, "selection.num_tokens is missing."),
        (
            {"selection": 'rule = "first_n"\nnum_tokens = 0'},
            "num_tokens must be at least 1, got 0.",
        ),
        ({"selection": 'rule = "first_n"\nkeep = 0.5'}, "unknown key 'selection.keep'"),
        (
            {"selection": 'rule = "soft_or"\ncorrect_sampling = true'},
            "unknown key 'selection.correct_sampling'",
        ),
        (
            {"selection": 'rule = "probability_gap"\nb = 1.5'},
            "selection.b must be in [0, 1], got 1.5.",
        ),
        (
            {"selection": 'rule = "influence"\ncombine = "or"'},
            "selection.combine: input should be 'none', 'soft_or' or 'soft_and', got 'or'.",
        ),
        ({"objective": 'kind = "jsd"\nteacher_weight = 1'}, "strictly between 0 and 1, got 1.0."),
        ({"objective": 'kind = "jsd"\nteacher_weight = 0'}, "strictly between 0 and 1, got 0.0."),
        ({"objective": 'kind = "skew_reverse_kl"\nalpha = 1'}, "alpha must be in [0, 1), got 1.0."),
        ({"objective": 'kind = "topk"\nk = 0'}, "objective.k must be at least 1, got 0."),
        ({"objective": 'kind = "sampled"\nclip = 0'}, "objective.clip must be above 0, got 0.0."),
        (
            {"objective": 'kind = "grpo"\nclip_low = 1.2'},
            "objective.clip_low must be in (0, 1], got 1.2.",
        ),
        ({"objective": 'kind = "grpo"\nclip_high = 0'}, "clip_high must be above 0, got 0.0."),
        (
            {"objective": 'kind = "grpo"\ndistillation_weight = -1'},
            "objective.distillation_weight must be at least 0, got -1.0.",
        ),
        ({"objective": 'kind = "tropd"\nk = 0'}, "objective.k must be at least 1, got 0."),
        ({"objective": 'kind = "tropd"\nclip = 0'}, "objective.clip must be above 0, got 0.0."),
        (
            {"objective": 'kind = "tropd"\nfkl = "full"'},
            "'topk_tail' or 'topk_renorm', got 'full'",
        ),
        ({"objective": 'kind = "grpo"\nclip = 0.2'}, "unknown key 'objective.clip'"),
        ({"objective": 'kind = "opsa"\nclip = 0'}, "objective.clip must be above 0, got 0.0."),
        ({"objective": 'kind = "eopd"\nthreshold = -0.1'}, "at least 0 nats, got -0.1."),
        (
            {"objective": 'kind = "eopd"\ngate = "percentile"\nthreshold = 1.5'},
            "in [0, 1] for gate = 'percentile', got 1.5.",
        ),
        ({"objective": 'kind = "eopd"\nwidth = 0'}, "objective.width must be above 0, got 0.0."),
        ({"objective": 'kind = "eopd"\nforward_weight = -1'}, "at least 0, got -1.0."),
        ({"objective": 'kind = "eodp"'}, "got 'eodp'. Did you mean 'eopd'?"),
        ({"weighting": 'kind = "fire"\ndrop = 1'}, "weighting.drop must be in [0, 1), got 1.0."),
        ({"weighting": 'kind = "reward"\nbeta = 0'}, "weighting.beta must be above 0, got 0.0."),
        ({"weighting": 'kind = "selectkd"\noutside = -1'}, "at least 0, got -1.0."),
        ({"weighting": 'kind = "pace"'}, "got 'pace'. Did you mean 'paced'?"),
    ],
)
def test_a_wrong_method_is_refused_in_one_line(
    tmp_path: Path, tables: dict[str, str], message: str
) -> None:
    path = tmp_path / "run.toml"
    usual = {"selection": 'rule = "all"', "objective": 'kind = "kl"', "weighting": 'kind = "none"'}
    path.write_text(toml(tmp_path, **(usual | tables)))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["paced", "reward"])
def test_weights_by_verdict_need_a_verdict_on_every_completion(kind: str) -> None:
    table = {"student": {"model": "s"}, "teacher": {"model": "t"}, "weighting": {"kind": kind}}
    config = parse_config({**table, "sampling": {"num_samples": 2}})
    stats = TokenStats(*torch.rand(6, 3))
    with pytest.raises(ConfigError) as caught:
        row_weights(config, stats, torch.tensor([0, 0, 1]), [True, None])
    assert f"weighting.kind = '{kind}' needs a verdict" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("table", "kind"), [("weighting", "paced"), ("objective", "grpo")])
def test_with_one_sample_they_would_train_on_nothing(table: str, kind: str) -> None:
    tables = {"student": {"model": "s"}, "teacher": {"model": "t"}, table: {"kind": kind}}
    with pytest.raises(ConfigError, match=f"num_samples must be at least 2 for {kind}, got 1"):
        parse_config(tables)


@pytest.mark.parametrize("kind", ["grpo", "opsa"])
def test_ida_needs_an_advantage_over_the_teacher(kind: str) -> None:
    tables = {"student": {"model": "s"}, "teacher": {"model": "t"}, "weighting": {"kind": "ida"}}
    tables |= {"objective": {"kind": kind}, "sampling": {"num_samples": 2}}
    with pytest.raises(ConfigError, match=f"another than ida with objective.kind = {kind}, got"):
        parse_config(tables)


@pytest.mark.parametrize(("key", "kind"), [("weighting", "paced"), ("objective", "grpo")])
def test_on_prompts_without_a_grader_they_are_refused_and_write_nothing(
    tmp_path: Path, tiny_models: Path, key: str, kind: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": str(i), "prompt": f"a{i}+7;>"}) for i in range(6)]
    prompts.write_text("\n".join(lines))
    data = {"kind": "file", "path": str(prompts), "chat": False, "num_held_out": 1}
    table = tiny_table(tiny_models, tmp_path / "run", data=data, **{key: {"kind": kind}})
    with pytest.raises(ConfigError, match=r"but data\.grader is 'none'\. Set data\.grader"):
        train(parse_config(table), log=lambda _: None)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# --- exactness ------------------------------------------------------------------------------------


def trained(models: Path, out: Path, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics without times and memory, and final weights, of two steps."""
    train(tiny_config(models, out, num_steps=2, **changes), log=lambda _: None)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in step.items() if k not in MEASURED} for step in steps]
    return steps, load_file(out / "student" / "model.safetensors")


@pytest.mark.parametrize("selection", [{"rule": "all"}, {"rule": "soft_or", "keep": 0.5}])
def test_a_gate_that_never_opens_is_plain_distillation_bit_for_bit(
    tmp_path: Path, tiny_models: Path, selection: dict[str, Any]
) -> None:
    shut = {"kind": "eopd", "threshold": 1e9}
    open_gate = {"kind": "eopd", "threshold": 0.0}
    plain, plain_weights = trained(tiny_models, tmp_path / "kl", selection=selection)
    gated, weights = trained(tiny_models, tmp_path / "shut", selection=selection, objective=shut)
    assert [step.pop("gate_share") for step in gated] == [0.0, 0.0]
    assert [step.pop("gate_share") for step in plain] == [None, None]
    assert gated == plain
    assert all(torch.equal(weights[name], value) for name, value in plain_weights.items())
    opened, _ = trained(tiny_models, tmp_path / "open", selection=selection, objective=open_gate)
    assert opened[0]["loss"] > plain[0]["loss"]  # negative control
    assert opened[0]["gate_share"] == 1.0


def test_a_batch_without_a_supervised_token_gives_a_counted_connected_zero(
    tiny_models: Path,
) -> None:
    """Sampling cannot write empty completions, but a micro-batch may keep no row of its own."""
    components: Components = build_components(tiny_config(tiny_models, Path("unused")))
    prompt = Prompt("p", "a1+7;>")
    ids = tuple(components.tokenizer(prompt.content).input_ids)
    empty: Batch = collate([Rollout(prompt, 0, ids, ()), Rollout(prompt, 1, ids, ())], 0)
    full: Batch = collate([Rollout(prompt, 0, ids, (4, 5, 6))], 0)
    student: Student = components.student
    for batch, rows in ((empty, torch.arange(0)), (full, torch.arange(0))):
        student.zero_grad()
        found = student(batch, components.teacher.forward(batch), rows, [(ReverseKL(), 1.0)])
        assert found.total.item() == 0.0
        assert len(found.value) == 0
        found.total.backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert gradients
        assert all(bool((g == 0).all()) for g in gradients)
    assert empty.num_rows == 0


def test_a_normalization_is_named_or_absent() -> None:
    models = {"student": {"model": "s"}, "teacher": {"model": "t"}}
    with pytest.raises(ConfigError, match=r"got 'minmax_p89'\. Did you mean 'minmax_p98'"):
        parse_config({"selection": {"rule": "q3", "normalization": "minmax_p89"}, **models})
    with pytest.raises(ConfigError, match=r"unknown key 'selection\.normalization'"):
        parse_config({"selection": {"rule": "random", "normalization": "minmax"}, **models})


def test_the_grader_is_asked_about_truncated_completions(tiny_models: Path, tmp_path: Path) -> None:
    """One token is never enough to stop at; the verdicts still say right, wrong, right, wrong."""
    path = tmp_path / "run.toml"
    path.write_text(toml(tiny_models, SELECTIONS["all"], OBJECTIVES["kl"], WEIGHTINGS["paced"]))
    metrics = one_step(load_config(path, ["sampling.max_new_tokens=1"]))
    assert metrics["truncated_share"] > 0.9
    assert metrics["change"] > 0  # if all were wrong, paced weights s(1 - s) would be 0


@pytest.mark.parametrize("kind", TEACHERLESS)
def test_states_of_a_teacher_that_no_step_reads_are_refused(
    tmp_path: Path, tiny_models: Path, kind: str
) -> None:
    changes: dict[str, Any] = {"objective": {"kind": kind}}
    changes |= {"rollouts": {"source": "stored", "teacher_states": "float32"}}
    table = tiny_table(tiny_models, tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=r"rollouts\.teacher_states has no effect"):
        train(parse_config(table), log=lambda _: None)
