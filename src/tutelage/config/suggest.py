"""What a user may have meant: keys and values of a configuration under other names."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]
"""A JSON schema, as pydantic writes it."""

_KEYS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "clip_grad": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "max_norm": "max_grad_norm",
    "warmup": "warmup_steps",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "steps": "num_steps",
    "max_steps": "num_steps",
    "iterations": "num_steps",
    "epochs": "num_steps",
    "num_epochs": "num_steps",
    "num_train_epochs": "num_steps",
    "batch_size": "prompts_per_step",
    "train_batch_size": "prompts_per_step",
    "per_device_train_batch_size": "micro_batch_size",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "n": "num_samples",
    "num_generations": "num_samples",
    "temp": "temperature",
    "r": "rank",
    "bits": "quantization",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "precision": "dtype",
    "torch_dtype": "dtype",
    "name": "model",
    "path": "model",
    "model_id": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_accumulation_steps": "micro_batch_tokens",
    "bf16": "dtype",
    "fp16": "dtype",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "betas": "beta2",
    "student_model": "student.model",
    "teacher_model": "teacher.model",
    "teacher_model_name_or_path": "teacher.model",
    "use_vllm": "engine.kind",
    "max_prompt_length": "max_prompt_tokens",
    "warmup_ratio": "warmup_steps",
    "resume": "out",
    "resume_from_checkpoint": "out",
    "dataset": "path",
    "file": "path",
    "output": "out",
    "output_dir": "out",
    "random_seed": "seed",
    "report_to": "trackers",
    "save_steps": "checkpoint_every",
    "eval_steps": "evaluation.every",
    "eval_every": "evaluation.every",
    "ratio": "keep",
    "fraction": "keep",
    "loss": "kind",
}
_VALUES = {
    "reverse_kl": "kl",
    "rkl": "kl",
    "forward_kl": "kl",
    "fkl": "kl",
    "k1": "sampled",
    "gkd": "jsd",
    "tip": "soft_or",
    "none": "all",
    "off": "none",
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "int8": "8bit",
    "8": "8bit",
    "int4": "4bit",
    "nf4": "4bit",
    "4": "4bit",
    "hf": "transformers",
    "jsonl": "file",
    "parquet": "file",
    "hub": "file",
    "dataset": "file",
    "gsm8k": "number",
    "boxed": "math",
    "gpu": "cuda",
}
_WITH = {"forward_kl": " with objective.reverse_weight=0 and objective.forward_weight=1"}
_WITH["fkl"] = _WITH["forward_kl"]


def did_you_mean_value(value: object, allowed: Sequence[str]) -> str:
    """The allowed word that a value stands for, as a question; empty without one."""
    word = str(value).lower().replace("-", "_")
    near = difflib.get_close_matches(word, allowed, 1)
    meant = _VALUES.get(word)
    if meant not in allowed:
        meant = near[0] if near else None
    extra = _WITH.get(word, "") if meant == "kl" else ""
    return f" Did you mean {meant!r}{extra}?" if meant else ""


def did_you_mean_key(schema: Schema, parents: Sequence[str], name: str) -> str:
    """The key that an unknown one stands for, as a question, or the keys that there are.

    Args:
        schema: of the whole configuration.
        parents: the tables that the unknown key is in, with the tag of a union after its name.
        name: the unknown key.
    """
    known = list(table_at(schema, parents)["properties"])
    found = owners(schema, parents, name)
    if found:
        return f" It belongs to {found}."
    word = name.lower().replace("-", "_")
    if _KEYS.get(word) in known:
        return f" Did you mean {_KEYS[word]!r}?"
    near = difflib.get_close_matches(word, known, 1)
    other = find_key(schema, word)
    if near and not (other and word in _KEYS):
        return f" Did you mean {near[0]!r}?"
    return f" Did you mean {other!r}?" if other else f" Known keys: {', '.join(known)}."


def find_key(schema: Schema, name: str) -> str | None:
    """The dotted key of the configuration that a name stands for, with or without its table."""
    keys = dict.fromkeys(dotted_keys(schema))
    by_name: dict[str, str] = {}
    for key in keys:
        by_name.setdefault(key.rpartition(".")[2], key)
    table, dot, last = name.rpartition(".")
    for meant in (name, f"{table}{dot}{_KEYS.get(last, last)}", _KEYS.get(last, last)):
        if meant in keys:
            return meant
        if not dot and meant in by_name:
            return by_name[meant]
    near = difflib.get_close_matches(name, by_name, 1, 0.8) if not dot else []
    return by_name[near[0]] if near else None


def dotted_keys(schema: Schema, shape: Schema | None = None, prefix: str = "") -> Iterator[str]:
    """Every key that a configuration may have, of whatever kinds its tables are; tables not."""
    for name, inner in (schema if shape is None else shape)["properties"].items():
        tables = list(_tables(schema, inner))
        for table in tables:
            yield from dotted_keys(schema, table, f"{prefix}{name}.")
        if not tables:
            yield f"{prefix}{name}"


def required_keys(schema: Schema, parents: Sequence[str], name: str) -> list[str]:
    """A missing key by itself, or what is required of a missing table."""
    shape = table_at(schema, parents)["properties"].get(name, {})
    tables = list(_tables(schema, shape))
    if len(tables) != 1 or not tables[0].get("required"):
        return [name]
    return [f"{name}.{key}" for key in tables[0]["required"]]


def without_tags(schema: Schema, location: Sequence[str]) -> list[str]:
    """The keys in the place of an error, without what pydantic adds: tags, types and numbers."""
    keys: list[str] = []
    shape: Schema | None = schema
    tags: Mapping[str, str] = {}
    for part in location:
        if part in tags:
            shape, tags = _resolved(schema, {"$ref": tags[part]}), {}
        elif not part.isdigit() and "[" not in part:
            keys.append(part)
            inner = (shape or {}).get("properties", {}).get(part, {})
            tags = inner.get("discriminator", {}).get("mapping", {})
            tables = list(_tables(schema, inner))
            shape = tables[0] if tables else None
    return keys


def owners(schema: Schema, parents: Sequence[str], name: str) -> str:
    """The kinds of the same table that have a key, such as "objective.kind jsd"; empty: none."""
    if len(parents) != 2:
        return ""
    union = schema["properties"].get(parents[0], {}).get("discriminator")
    if union is None:
        return ""
    shapes = {tag: _resolved(schema, {"$ref": ref}) for tag, ref in union["mapping"].items()}
    found = [tag for tag, shape in shapes.items() if name in shape["properties"]]
    return f"{parents[0]}.{union['propertyName']} {', '.join(found)}" if found else ""


def table_at(schema: Schema, parents: Sequence[str]) -> Schema:
    """The table that a list of keys leads to, with the tag of a union after its name."""
    shape = schema
    tags: Mapping[str, str] = {}
    for part in parents:
        if part in tags:
            shape, tags = _resolved(schema, {"$ref": tags[part]}), {}
            continue
        inner = shape["properties"][part]
        tags = inner.get("discriminator", {}).get("mapping", {})
        shape = next(_tables(schema, inner))
    return shape


def _tables(schema: Schema, shape: Schema) -> Iterator[Schema]:
    """The tables that a property may be: one, one that may be left out, or those of a union."""
    for choice in (shape, *shape.get("anyOf", ()), *shape.get("oneOf", ())):
        found = _resolved(schema, choice)
        if "properties" in found:
            yield found


def _resolved(schema: Schema, shape: Schema) -> Schema:
    if "$ref" not in shape:
        return shape
    found: Schema = schema["$defs"][shape["$ref"].rsplit("/", 1)[-1]]
    return found
