"""The README.md of an exported student: recipe, data, seed and what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from tutelage.config.parse import fingerprint, to_table
from tutelage.config.schema import Config, FileData
from tutelage.config.self_teacher import SelfTeacher
from tutelage.evaluation.verdict import Verdict
from tutelage.models.reference import resolve_model


def model_card(
    config: Config,
    evaluations: Sequence[dict[str, Any]],
    about: dict[str, Any],
    verdict: Verdict | None = None,
) -> str:
    """Markdown with the hub's header.

    Args:
        config: the run.
        evaluations: records of `evaluation.jsonl`.
        about: `environment()`: versions, hardware, commit.
        verdict: what the run achieved; None where it was not measured.
    """
    samples, updates = config.sampling.num_samples, config.updates_per_step
    data = config.data
    source = data.path if isinstance(data, FileData) else data.kind
    selection = to_table(config)["selection"]
    lines = [
        *_header(config),
        "# Student of an on-policy distillation run",
        "",
        f"* Student `{config.student.model}`, {_teacher(config)}.",
        f"* Data: `{source}`; {config.num_steps} steps of {config.prompts_per_step} prompts x "
        f"{samples} completions of at most {config.sampling.max_new_tokens} tokens, "
        f"{updates} updates a step.",
        f"* Tokens trained on: {_values(selection)}.",
        f"* Objective: {_values(to_table(config)['objective'])}.",
        f"* Optimizer: {_values(to_table(config)['optimizer'])}.",
        f"* Seed {config.seed}; configuration fingerprint `{fingerprint(config)}`; "
        f"commit `{about['commit']}`; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + ".",
        "",
        *([] if verdict is None else [f"Verdict: **{verdict.word}** ({verdict.reason}).", ""]),
        *_table(evaluations),
        "## Configuration",
        "",
        "```json",
        json.dumps(_without_addresses(to_table(config)), indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _without_addresses(table: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the servers of this run, which concern no reader of the card."""
    for places in (table["engine"], table["teacher"], *table["teachers"].values()):
        for key in ("url", "urls", "logprob_url"):
            places.pop(key, None)
    return table


def _teacher(config: Config) -> str:
    teacher = config.teacher
    if not isinstance(teacher, SelfTeacher):
        return f"teacher `{teacher.model}`"
    told = (
        f", with the context `{teacher.context!r}` beside every prompt" if teacher.context else ""
    )
    return f"its own teacher with {teacher.weights} weights{told}"


def _header(config: Config) -> Iterator[str]:
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation")
    if not resolve_model(config.student.model).is_local:
        yield f"base_model: {json.dumps(config.student.model)}"
    yield from ("tags: [on-policy-distillation, tutelage]", "---", "")


def _values(table: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in table.items())


def _table(evaluations: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not evaluations:
        yield from ("Nothing was measured on held-out prompts.", "")
        return
    first = evaluations[0]
    yield (
        f"Measured on {first['num_problems']} held-out prompts x {first['k']} completions, one run "
        "(95 % intervals over prompts, in percent):"
    )
    yield from (
        "",
        "| model | step | mean@k | pass@k | reverse KL, nats |",
        "|---|---|---|---|---|",
    )
    for record in evaluations:
        kl = record["held_out_reverse_kl_nats"]
        cells = [record["model"], str(record["step"])]
        cells += [_interval(record, name) for name in ("mean_at_k", "pass_at_k")]
        yield f"| {' | '.join([*cells, '-' if kl is None else f'{kl:.4f}'])} |"
    yield ""


def _interval(record: dict[str, Any], name: str) -> str:
    value, low, high = (record[f"{name}{end}"] for end in ("", "_low", "_high"))
    if None in (value, low, high):
        return "-"
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
