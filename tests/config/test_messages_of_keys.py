"""Messages about a configuration: the keys they name exist, what they suggest is accepted."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tutelage.config.keys import KEYS, TABLES, kinds_at
from tutelage.config.parse import load_config, parse_config
from tutelage.config.suggest import OTHER_NAMES, find_key
from tutelage.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MODELS: dict[str, Any] = {"student": {"model": "s"}, "teacher": {"model": "t"}}
KINDS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "data": ("kind", {"file": {"path": "p"}, "verifiers": {"environment": "e"}}),
    "engine": ("kind", {"vllm_server": {"urls": ["u"], "folder": "f"}}),
    "selection": ("rule", {"first_n": {"num_tokens": 1}}),
    "objective": ("kind", {}),
    "weighting": ("kind", {}),
}


def explain(table: dict[str, Any]) -> str:
    """What is said about a table; empty if nothing."""
    try:
        parse_config(table)
    except ConfigError as error:
        return str(error)
    return ""


def configurations() -> Iterator[dict[str, Any]]:
    """One of every kind of every table, with all that it requires."""
    for name, (field, needed) in KINDS.items():
        for tag in TABLES[name]:
            kinds = {name: {field: tag, **needed.get(tag, {})}}
            sampling = {"num_samples": 2} if tag in ("paced", "grpo") else {}
            yield {**MODELS, "sampling": sampling, **kinds}
    yield {**MODELS, "student": {"model": "s", "lora": {}}}


def tables_in(configuration: dict[str, Any], parents: tuple[str, ...] = ()) -> Iterator[Any]:
    yield parents, configuration
    for name, value in configuration.items():
        if isinstance(value, dict):
            yield from tables_in(value, (*parents, name))


def changed(table: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    head, *rest = path
    return {**table, head: changed(table.get(head, {}), tuple(rest), value) if rest else value}


def location(configuration: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    """The path with the tag of a union after its name, as pydantic gives it."""
    if path and path[0] in KINDS and path[0] in configuration:
        return [path[0], configuration[path[0]][KINDS[path[0]][0]], *path[1:]]
    return list(path)


WRONG: tuple[Any, ...] = (
    "x",
    3,
    -1,
    0,
    50,
    1.5,
    True,
    [],
    ["x"],
    {},
    "50%",
    float("nan"),
    float("inf"),
    None,
)


def test_every_configuration_here_is_accepted() -> None:
    found = list(configurations())
    assert len(found) > 20
    assert [explain(table) for table in found] == [""] * len(found)


def test_every_message_names_keys_that_exist() -> None:
    keys = set(KEYS)
    tables = {key.rpartition(".")[0] for key in keys} | {"student", "teacher"}
    seen, refused = 0, set[tuple[object, ...]]()
    for configuration in configurations():
        for parents, _ in list(tables_in(configuration)):
            place = location(configuration, parents)
            shape = kinds_at(place)[0]
            for name in (*shape.keys, "zzz"):
                for value in WRONG:
                    # What is refused once is refused beside any other table, in the same words.
                    if (case := (*place, name, repr(value))) in refused:
                        continue
                    message = explain(changed(configuration, (*parents, name), value))
                    if not message:
                        continue
                    refused.add(case)
                    seen += 1
                    assert "\n" not in message
                    key = re.match(r"(?:unknown key ')?([a-z_0-9.]+)", message)
                    assert key, message
                    unknown = message.startswith("unknown key")
                    assert unknown or key[1] in keys | tables, message
    assert seen > 500


def test_a_key_with_a_slip_leads_to_the_key() -> None:
    for configuration in configurations():
        for parents, _ in list(tables_in(configuration)):
            shape = kinds_at(location(configuration, parents))[0]
            for name in shape.keys:
                if len(name) < 4:
                    continue
                slip = f"{name[:2]}{name[3:]}x"
                message = explain(changed(configuration, (*parents, slip), 1))
                assert re.search(rf"Did you mean '(?:[a-z_.]+\.)?{name}'\?", message), message


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_another_name_for_a_key_leads_to_a_key(name: str) -> None:
    found = find_key(name)
    assert found in KEYS or found == "kind"
    message = explain({**MODELS, name: 1})
    assert f"Did you mean {found!r}?" in message or message.startswith("unknown key"), message


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("objective.kind", "reverse_kl", {"objective.kind": "kl"}),
        (
            "objective.kind",
            "forward_kl",
            {"objective.kind": "kl", "objective.reverse_weight": 0, "objective.forward_weight": 1},
        ),
        ("student.dtype", "bf16", {"student.dtype": "bfloat16"}),
        ("teacher.dtype", "fp16", {"teacher.dtype": "float16"}),
        ("teacher.quantization", "int8", {"teacher.quantization": "8bit"}),
        ("selection.rule", "tip", {"selection.rule": "soft_or"}),
        ("engine.kind", "hf", {"engine.kind": "transformers"}),
        ("optimizer.kind", "AdamW", {"optimizer.kind": "adamw"}),
    ],
)
def test_another_word_for_a_value_leads_to_it(key: str, value: str, meant: dict[str, Any]) -> None:
    message = explain(changed(MODELS, tuple(key.split(".")), value))
    suggested = re.search(r"Did you mean '([^']+)'(?: with (.+?))?\?$", message)
    assert suggested, message
    assert suggested[1] == meant[key]
    table = MODELS
    for name, right in meant.items():
        assert name == key or f"{name}={right}" in message
        table = changed(table, tuple(name.split(".")), right)
    assert explain(table) == ""


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("selection.keep", 50, ("Write 0.5 for 50 %",)),
        ("selection.keep", "50%", ("Write 0.5.",)),
        ("sampling.top_p", 95, ("Write 0.95 for 95 %",)),
        ("evaluation.top_p", 95, ("Write 0.95 for 95 %",)),
        ("trackers", "wandb", ("must be a list, got 'wandb'", "'trackers=[\"wandb\"]'")),
        ("data.num_items", 99, ("data.num_items must be from 1 to 16, got 99",)),
        ("objective.alpha", 1, ("objective.alpha", "belongs to objective.kind skew_reverse_kl")),
        ("engine.x", 1, ("'engine.x'",)),
    ],
)
def test_values_that_are_often_meant_otherwise(
    key: str, value: Any, parts: tuple[str, ...]
) -> None:
    table = {
        **MODELS,
        "data": {"kind": "ledger"},
        "selection": {"rule": "q3"},
        "objective": {"kind": "kl"},
        "engine": {"kind": "vllm"},
    }
    message = explain(changed(table, tuple(key.split(".")), value))
    for part in parts:
        assert part in message


def test_a_missing_model_is_asked_for_by_its_key() -> None:
    assert explain({}).startswith("student.model is missing")
    assert "pass student.model=VALUE" in explain({"teacher": {"model": "t"}})
    assert explain({"student": {"model": "s"}}).startswith("teacher.model is missing")
    assert explain({**MODELS, "engine": {"kind": "vllm_server"}}).startswith(
        "engine.urls is missing"
    )


# --- messages anywhere in the program -------------------------------------------------------------


def texts_of_errors() -> Iterator[tuple[str, str]]:
    """Literal texts inside every raised error and every call of `require`."""
    for path in sorted((ROOT / "src" / "tutelage").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_raise = isinstance(node, ast.Raise)
            is_check = isinstance(node, ast.Call) and ast.unparse(node.func) == "require"
            if is_raise or is_check:
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                        yield path.name, inner.value


def test_keys_in_messages_anywhere_are_keys_of_the_configuration() -> None:
    tables = {key.partition(".")[0] for key in KEYS if "." in key} | {"task", "config"}
    known = set(KEYS) | {key.rpartition(".")[0] for key in KEYS}
    files = {"config.json", "config.toml", "evaluation.jsonl"}
    seen = 0
    for place, text in texts_of_errors():
        for key in re.findall(r"(?<![\w./-])[a-z]+\.[a-z_0-9]+(?:\.[a-z_0-9]+)?(?![\w/(])", text):
            if key.partition(".")[0] in tables and key not in files:
                seen += 1
                assert key in known, (place, text)
    assert seen > 30


def test_advice_to_install_names_what_the_extra_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    seen = 0
    for path in sorted((ROOT / "src" / "tutelage").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "MissingExtraError":
                package, extra, _ = node.args
                if isinstance(package, ast.Constant) and isinstance(extra, ast.Constant):
                    seen += 1
                    wanted = extras[extra.value]
                    assert any(text.startswith(package.value) for text in wanted), path
    assert seen >= 8


@pytest.mark.parametrize("key", ["num_steps", "seed", "optimizer.weight_decay", "sampling.top_k"])
def test_a_truth_value_is_no_number(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(key)} must be a number, got true"):
        load_config(ROOT / "configs" / "examples" / "ledger.toml", [f"{key}=true"])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("gradient_checkpointing", "student.activation_checkpointing"),
        ("teacher_model", "teacher.model"),
        ("lora_r", "student.lora.rank"),
        ("eval_steps", "evaluation.every"),
    ],
)
def test_a_known_name_goes_before_one_that_looks_alike(name: str, key: str) -> None:
    assert f"Did you mean {key!r}?" in explain({**MODELS, name: 1})
