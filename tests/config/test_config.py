"""Configuration: every mistake is one line; fingerprints name what changes results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.config.parse import (
    SAFE_KEYS,
    changed_keys,
    fingerprint,
    load_config,
    parse_config,
    parse_saved_config,
    to_table,
)
from tutelage.config.schema import Config, FileData, LedgerData
from tutelage.config.verifiers import VerifiersData
from tutelage.errors import ConfigError

BASE: dict[str, Any] = {"student": {"model": "s"}, "teacher": {"model": "t"}}


def with_overrides(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "run.toml"
    path.write_text('[student]\nmodel = "s"\n[teacher]\nmodel = "t"\n')
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_stepz=3", "unknown key 'num_stepz'. Did you mean 'num_steps'?"),
        ("student.dtyp=float32", "unknown key 'student.dtyp'. Did you mean 'dtype'?"),
        ("samplin.top_p=0.9", "unknown key 'samplin'. Did you mean 'sampling'?"),
        ("optimizer.lr=1", "unknown key 'optimizer.lr'. Did you mean 'learning_rate'?"),
        ("selection.rule=softor", "got 'softor'. Did you mean 'soft_or'?"),
        ("teacher.dtype=bfloat61", "got 'bfloat61'. Did you mean 'bfloat16'?"),
        ("selection.rule=best", "selection.rule must be one of all, "),
        ("selection.keep=0.5", "selection.rule is missing"),
        (
            "data.kind=web",
            "data.kind must be one of ledger, coins, file, ledger_tools, shopping, travel, "
            "verifiers, got 'web'.",
        ),
        ("data.kind=file", "data.path is missing. Add it to the configuration or pass data.path="),
        ("num_steps=0", "num_steps must be at least 1, got 0."),
        ("num_steps=many", "num_steps: input should be a valid integer"),
        ("num_steps=1.5", "num_steps: input should be a valid integer"),
        ("prompts_per_step=0", "prompts_per_step must be at least 1, got 0."),
        ("prompts_per_step=1000000000000", "prompts_per_step must be at most 1048576, got 10"),
        ("sampling.max_new_tokens=99999999999", "max_new_tokens must be at most 1048576, got 99"),
        ("evaluation.num_problems=99999999999", "num_problems must be at most 1048576, got 9999"),
        ("evaluation.num_samples=99999999999", "evaluation.num_samples must be at most 1048576"),
        ("recording.num_prompts=99999999999", "recording.num_prompts must be at most 1048576"),
        ("recording.max_new_tokens=99999999999", "recording.max_new_tokens must be at most 10485"),
        ("sampling.num_samples=2000000", "num_samples must be at most 1048576, got 2000000"),
        ("micro_batch_size=-1", "micro_batch_size must be at least 1, got -1."),
        ("keep_checkpoints=0", "keep_checkpoints must be at least 1, got 0."),
        ("keep_best=loss", "keep_best: input should be 'none', 'mean_at_k', 'pass_at_k' or"),
        ("keep_best=mean_at_k", "evaluation.every must be at least 1 with keep_best = mean_at_k"),
        ("stop_when.patience=2", "stop_when.metric must be mean_at_k or pass_at_k or held_out_re"),
        ("stop_when={metric='mean_at_k'}", "stop_when.patience must be at least 1 without stop_w"),
        (
            "stop_when={metric='mean_at_k', value=90}",
            "stop_when.value must be in [0, 1], got 90.0. Write 0.9 for 90 %.",
        ),
        (
            "stop_when={metric='pass_at_k', patience=1}",
            "evaluation.every must be at least 1 with stop_when.metric = pass_at_k, got 0.",
        ),
        ("optimizer.learning_rate=0", "optimizer.learning_rate must be above 0, at most 10, "),
        ("optimizer.learning_rate=11", "learning_rate must be above 0, at most 10, got 11"),
        ("optimizer.weight_decay=1e7", "must be at most 1 / optimizer.learning_rate, beyond which"),
        ("objective.reverse_weight=1e10", "objective.reverse_weight must be 0 or have a size from"),
        ("sampling.temperature=1e-31", "sampling.temperature must be 0 or have a size from 1e-30"),
        ("seed=9223372036854775808", "seed must be a number of 64 bits, got 9223372036854775808."),
        (f"seed={'9' * 400}", "seed must be a number of 64 bits, got 1329 bits."),
        ("quadrant_thresholds=[true, 0.5]", "quadrant_thresholds must be a number, got true."),
        ("num_threads=1025", "num_threads must be from 0 to 1024, got 1025. 0 is torch's own."),
        ("student.lora={alpha=1e6}", "student.lora.alpha must be above 0, at most 65536, got 1000"),
        ("optimizer.schedule=step", "optimizer.schedule: input should be 'constant', 'linear'"),
        ("objective.kind=kld", "objective.kind must be one of kl, jsd"),
        ("sampling.top_p=0", "sampling.top_p must be in (0, 1], got 0"),
        ("sampling.max_new_tokens=0", "sampling.max_new_tokens must be at least 1, got 0"),
        ("student.dtype=float8", "student.dtype: input should be 'float32' or 'bfloat16'"),
        ("student.model.name=x", "override 'student.model.name=x': 'model' is a value"),
        ("num_steps", "override 'num_steps' is not of the form key=value."),
        ("=3", "override '=3' is not of the form key=value."),
    ],
)
def test_a_wrong_override_gives_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(tmp_path, override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", ["0 0", "1 -1", "-1 2"])
def test_weights_of_the_objective_are_at_least_0_and_not_both_0(
    tmp_path: Path, weights: str
) -> None:
    reverse, forward = weights.split()
    overrides = (f"objective.reverse_weight={reverse}", f"objective.forward_weight={forward}")
    with pytest.raises(ConfigError, match=r"at least 0 and not both 0, got \(.*\)\. Use 1 and 0"):
        with_overrides(tmp_path, "objective.kind=kl", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rule=soft_or", "keep=2"], "selection.keep must be in (0, 1], got 2.0. Use keep = 1.0"),
        (["rule=q3", "keep=0"], "selection.keep must be in (0, 1], got 0.0."),
        (["rule=q3", "kep=0.1"], "unknown key 'selection.kep'. Did you mean 'keep'?"),
        (["rule=all", "keep=0.5"], "Rule 'all' keeps every token; choose another selection.rule"),
        (["rule=q3", "scope=all"], "selection.scope: input should be 'completion' or 'batch'"),
    ],
)
def test_a_wrong_selection_gives_one_line(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(tmp_path, *(f"selection.{text}" for text in overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_named() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.model is missing\. Add it"):
        parse_config({"student": {"model": "s"}})
    with pytest.raises(ConfigError, match=r"student\.model is missing"):
        parse_config({"student": {}, "teacher": {"model": "t"}})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml does not exist. Give the path"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"num_steps = ", "is not valid TOML"), (b'out = "\xff"', "cannot be read")],
)
def test_an_unreadable_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_a_file_is_read_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        'num_steps = 7\nseed = 3\nstudent.model = "s"\n[teacher]\nmodel = "t"\ndtype = "float32"\n'
    )
    (tmp_path / "sub").mkdir()
    middle, path = tmp_path / "sub" / "middle.toml", tmp_path / "sub" / "mine.toml"
    middle.write_text('base = "../base.toml"\nseed = 4\nnum_steps = 8\n')
    path.write_text('base = "middle.toml"\nnum_steps = 9\n[teacher]\ndtype = "bfloat16"\n')
    config = load_config(path, ["teacher.model=u"])
    assert (config.num_steps, config.seed, config.student.model) == (9, 4, "s")
    assert (config.teacher.model, config.teacher.dtype) == ("u", "bfloat16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('base = "none.toml"', "none.toml does not exist"),
        ("base = 3", "base must be the path of a TOML file, got 3"),
        ('base = "bad.toml"', "bad.toml is its own base"),
        ('[base]\nmodel = "s"', "base must be the path of a TOML file"),
    ],
)
def test_a_wrong_base_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_overrides_are_toml_or_plain_text(tmp_path: Path) -> None:
    config = with_overrides(
        tmp_path,
        "num_steps=7",
        "out=runs/my folder",
        "selection.rule=soft_or",
        'selection.normalization="minmax"',
        "quadrant_thresholds=[0.5, 1]",
        "renormalize=false",
        "student.model=a=b",
    )
    assert (config.num_steps, config.out) == (7, "runs/my folder")
    assert to_table(config)["selection"] == {
        "rule": "soft_or",
        "keep": 0.5,
        "scope": "completion",
        "normalization": "minmax",
    }
    assert config.quadrant_thresholds == (0.5, 1.0)
    assert config.renormalize is False
    assert config.student.model == "a=b"


def test_tables_choose_their_kind() -> None:
    config = parse_config(BASE | {"data": {"kind": "file", "path": "p.jsonl"}})
    assert isinstance(config.data, FileData)
    assert isinstance(parse_config(BASE).data, LedgerData)
    assert to_table(parse_config(BASE))["selection"] == {"rule": "all"}


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 10**6),
        "num_steps": st.integers(1, 10**6),
        "selection": st.one_of(
            st.just({"rule": "all"}),
            st.fixed_dictionaries(
                {"rule": st.sampled_from(["q3", "soft_or", "random"])},
                optional={"keep": st.floats(0.001, 1.0), "scope": st.just("batch")},
            ),
        ),
        "quadrant_thresholds": st.one_of(
            st.just("median"), st.tuples(st.floats(1e-6, 5), st.floats(1e-6, 5))
        ),
        "optimizer": st.fixed_dictionaries({"learning_rate": st.floats(1e-9, 1.0)}),
        "data": st.one_of(
            st.just({"kind": "ledger", "num_items": 3}), st.just({"kind": "file", "path": "x"})
        ),
    },
)


@given(changes=CHANGES)
def test_a_configuration_survives_the_manifest(changes: dict[str, Any]) -> None:
    config = parse_config(BASE | changes)
    again = parse_config(json.loads(json.dumps(to_table(config))))
    assert again == config
    assert fingerprint(again) == fingerprint(config)
    assert changed_keys(json.loads(json.dumps(to_table(config))), to_table(again)) == []


@given(one=CHANGES, two=CHANGES)
def test_fingerprints_differ_exactly_when_a_key_that_matters_does(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    first, second = parse_config(BASE | one), parse_config(BASE | two)
    differ = changed_keys(to_table(first), to_table(second))
    assert (fingerprint(first) == fingerprint(second)) == (not differ) == (first == second)


@pytest.mark.parametrize("key", SAFE_KEYS)
def test_safe_keys_change_neither_fingerprint_nor_run(key: str) -> None:
    values: dict[str, Any] = {"checkpoint_writer": "inline", "trackers": ["wandb"]}
    values |= {"out": "elsewhere", "keep_best": "held_out_reverse_kl_nats"}
    base = BASE | {"evaluation": {"every": 1}}
    other = parse_config(base | {key: values.get(key, 9)})
    plain = parse_config(base)
    assert other != plain
    assert fingerprint(other) == fingerprint(plain)
    assert changed_keys(to_table(plain), to_table(other)) == []


def test_no_thread_writes_checkpoints_of_a_sharded_student() -> None:
    table = BASE | {"student": BASE["student"] | {"sharding": "fsdp2"}}
    parse_config(table | {"checkpoint_writer": "inline"})
    with pytest.raises(ConfigError, match=r"checkpoint_writer must be auto or inline with student"):
        parse_config(table | {"checkpoint_writer": "thread"})


def test_sharding_changes_neither_fingerprint_nor_run() -> None:
    student = {"sharding": "fsdp2", "sharding_group_size": 2}
    other = parse_config(BASE | {"student": BASE["student"] | student})
    plain = parse_config(BASE)
    assert other != plain
    assert fingerprint(other) == fingerprint(plain)
    assert changed_keys(to_table(plain), to_table(other)) == []


def test_changed_keys_are_dotted_and_include_those_of_another_kind() -> None:
    one = to_table(parse_config(BASE | {"seed": 1}))
    two = to_table(parse_config(BASE | {"selection": {"rule": "q3", "keep": 0.1}}))
    assert changed_keys(one, two) == [
        "seed",
        "selection.keep",
        "selection.normalization",
        "selection.rule",
        "selection.scope",
    ]


def test_a_saved_number_of_any_size_is_still_read() -> None:
    table = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"kind": "ledger"}}
    table["optimizer"] = {"max_grad_norm": 1e10}
    with pytest.raises(ConfigError, match="max_grad_norm must be 0 or have a size"):
        parse_config(table)
    assert parse_saved_config(table).optimizer.max_grad_norm == 1e10


def test_a_key_of_an_earlier_version_is_read_and_names_the_same_run(tmp_path: Path) -> None:
    now, earlier = (
        with_overrides(tmp_path, f"{key}=false") for key in ("renormalize", "renormalise")
    )
    assert not now.renormalize
    assert earlier == now
    assert parse_config(BASE | {"renormalise": False}) == parse_config(
        BASE | {"renormalize": False}
    )
    assert fingerprint(parse_config(BASE | {"renormalize": False})) == "0895a356"
    with pytest.raises(ConfigError, match="renormalise is the earlier name of renormalize"):
        parse_config(BASE | {"renormalise": False, "renormalize": False})


def test_an_override_goes_before_a_file_with_the_earlier_name(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('renormalise = false\nstudent.model = "s"\nteacher.model = "t"\n')
    assert not load_config(path).renormalize
    assert load_config(path, ["renormalize=true"]).renormalize
    assert load_config(path, ["renormalise=true"]).renormalize


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "data.environment is missing"),
        ({"environment": " "}, "data.environment must be a name, got ''"),
        (
            {"environment": "x", "arguments": {"taskset": {"id": "y"}}},
            "data.arguments must be without an id of a taskset",
        ),
        (
            {"environment": "x", "tool_format": "json"},
            "data.tool_format must be auto with verifiers, got json. Its renderer reads calls",
        ),
        (
            {"environment": "x", "tool_timeout_s": 3.0},
            "data.tool_timeout_s must be 10 with verifiers, got 3.0. State it for the harness",
        ),
        (
            {
                "environment": "x",
                "enable_thinking": False,
                "renderer": {"name": "qwen3", "enable_thinking": True},
            },
            "data.renderer must be without enable_thinking",
        ),
        ({"environment": "x", "num_concurrent": 0}, "data.num_concurrent must be at least 1"),
        ({"environment": "x", "timeout_s": 0.0}, "data.timeout_s must be in (0, 86400]"),
        ({"environment": "x", "num_held_out": -1}, "data.num_held_out must be at least 0"),
    ],
)
def test_keys_of_verifiers_that_cannot_be_used_are_refused(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config({**BASE, "data": {"kind": "verifiers", **keys}})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_table_of_an_environment_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        '[student]\nmodel = "s"\n[teacher]\nmodel = "t"\n[data]\nkind = "verifiers"\n'
        'environment = "x"\nrenderer.name = "qwen3"\narguments.taskset.split = "test"\n'
    )
    config = load_config(tmp_path / "c.toml", ["data.arguments.taskset.size=3"])
    assert isinstance(config.data, VerifiersData)
    assert config.data.arguments == {"taskset": {"split": "test", "size": 3}}
    assert config.data.renderer == {"name": "qwen3"}
    assert parse_saved_config(json.loads(json.dumps(to_table(config)))) == config
